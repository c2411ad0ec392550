"""Data parallelism over the last linear layer with its loss: a step of two processes is that of one."""

import os

import pytest
import torch
import torch.nn.functional as F
from processes import run
from test_wrappers import PROCESSES, distributed, right_sharding

import xent_ext


class Model(torch.nn.Module):
    """Tokens to a loss, with the head tied to the embedding or with one of its own."""

    def __init__(self, criterion, tied):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(50, 16)
        self.body = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh())
        self.criterion = criterion
        if tied:
            self.criterion.linear.weight = self.embedding.weight

    def forward(self, tokens, target):
        return self.criterion(self.body(self.embedding(tokens)), target).mean()


class Unfused(torch.nn.Module):
    """What the fused layer and loss stand for."""

    def __init__(self, reduction):
        super().__init__()
        self.linear, self.reduction = torch.nn.Linear(16, 50, bias=False), reduction

    def forward(self, input, target):
        return F.cross_entropy(self.linear(input).movedim(-1, 1), target, reduction=self.reduction)


def new_model(kind, reduction, tied):
    torch.manual_seed(1)
    if kind == "unfused":
        return Model(Unfused(reduction), tied)
    return Model(xent_ext.LinearCrossEntropyLoss(16, 50, reduction=reduction, chunk_rows=3), tied)


def step(model, tokens, target):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        model(tokens, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def new_batch():
    torch.manual_seed(2)
    return torch.randint(50, (2 * PROCESSES, 5)), torch.randint(50, (2 * PROCESSES, 5))


def data_parallel(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def sharded_root(model):
    """The head in the unit of the whole model."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.body)
    return fully_shard(model)


def sharded_head(model):
    """The head in a unit of its own, whose weight is gone between forward and backward."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.criterion)
    return fully_shard(model)


WRAPPERS = {"DDP": data_parallel, "FSDP, root": sharded_root, "FSDP, own unit": sharded_head}
CASES = [
    (name, reduction, tied)
    for name in WRAPPERS
    for reduction in ("mean", "none")
    for tied in (False, True)
    if not (tied and name == "FSDP, own unit")  # whose weight would be in two units
]


def process(rank, path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=PROCESSES)
    try:
        torch.distributed.init_device_mesh("cpu", (PROCESSES,))
        found = {}
        for name, reduction, tied in CASES:
            model = WRAPPERS[name](new_model("fused", reduction, tied))
            parameters = step(model, *(part.chunk(PROCESSES)[rank] for part in new_batch()))
            found[name, reduction, tied] = {
                key.removeprefix("module."): value.full_tensor() if hasattr(value, "full_tensor") else value
                for key, value in parameters.items()
            }
        if rank == 0:
            torch.save(found, path / "found")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    run(process, PROCESSES, path)
    return torch.load(path / "found", weights_only=True)


@distributed
@right_sharding
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_that_of_one_process(found, case):
    _, reduction, tied = case
    expected = step(new_model("unfused", reduction, tied), *new_batch())
    torch.testing.assert_close(found[case], expected)
