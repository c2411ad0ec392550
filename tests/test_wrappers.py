"""What wraps a loss or a model: data parallelism, offloading, functional calls, threads, DTensor.

Checkpointing, torch.func and debugging modes are in tests/test_autograd.py, copies in tests/test_module.py.
"""

import contextlib
import itertools
import os
import re
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import TORCH, Calls
from parity import REDUCTIONS, make
from processes import run
from test_options import call, flat, shifted_call
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import xent_ext
from bench import machine
from xent_ext import ahead, backends, cpu, dispatch, memory

all_reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
distributed = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no torch.distributed with gloo",
)

PROCESSES = 2


# --- In several processes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the functions in `WORK` returned in the first of several processes of one gloo group."""
    path = tmp_path_factory.mktemp("processes")
    run(process, PROCESSES, path)
    return torch.load(path / "found", weights_only=True)


def process(rank, path):
    """Here the CPU implementation takes every call that it can."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    backends.BACKEND, dispatch.is_small = "auto", lambda *_: False
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=PROCESSES)
    try:
        found = {name: work(rank) for name, work in WORK.items()}
        if rank == 0:
            torch.save(found, path / "found")
    finally:
        torch.distributed.destroy_process_group()


def new_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5))


def new_batch():
    """Rows of which each process has as many that count."""
    torch.manual_seed(1)
    x, target = torch.randn(2 * PROCESSES, 6, 8), torch.randint(5, (2 * PROCESSES, 6))
    target[:, 3] = -100
    return x, target


def step(model, criterion, x, target):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    criterion(model(x).flatten(0, 1), target.flatten()).backward()
    optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def fused_step(model, rank):
    """A step of one process, with its part of the batch and this package's loss."""
    x, target = (part.chunk(PROCESSES)[rank] for part in new_batch())
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = Calls().watch(monkeypatch, cpu)
        parameters = step(model, xent_ext.CrossEntropyLoss(label_smoothing=0.1), x, target)
    assert len(calls) == 1
    return parameters


def data_parallel(rank):
    model = torch.nn.parallel.DistributedDataParallel(new_model())
    return {name.removeprefix("module."): value for name, value in fused_step(model, rank).items()}


def fully_sharded(rank):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (PROCESSES,))
    model = new_model()
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)
    return {name: value.full_tensor() for name, value in fused_step(model, rank).items()}


class Head(torch.nn.Module):
    """The last layer, with its loss."""

    def __init__(self, cross_entropy):
        super().__init__()
        self.linear, self.cross_entropy = torch.nn.Linear(8, CLASSES), cross_entropy

    def forward(self, hidden, target):
        return self.cross_entropy(self.linear(hidden), target)


ROWS, CLASSES, CHUNKS, BLOCK = 256, 512, 4, 1 << 14


def peaks(wrap, hooks=contextlib.nullcontext):
    """The most bytes that two steps of a loss by chunks of rows hold: with this package's loss, and with PyTorch's."""
    found = []
    for cross_entropy in (xent_ext.cross_entropy, F.cross_entropy):
        torch.manual_seed(0)
        head = wrap(Head(cross_entropy))
        hidden, target = torch.randn(ROWS, 8, requires_grad=True), torch.randint(CLASSES, (ROWS,))

        def step(head=head, hidden=hidden, target=target):
            for _ in range(2):
                with hooks():
                    chunks = zip(hidden.chunk(CHUNKS), target.chunk(CHUNKS), strict=True)
                    loss = sum(head(*chunk) for chunk in chunks) / CHUNKS
                loss.backward()

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(cpu, "BLOCK_BYTES", BLOCK)
            monkeypatch.setattr(memory, "_buffers", threading.local())
            monkeypatch.setattr(ahead, "LARGE", 0)
            dispatch.forget()
            found.append(machine.peak_memory(step, torch.device("cpu"))[1])
    return found


def assert_no_higher(peaks):
    ours, theirs = peaks
    assert ours <= theirs + 4 * BLOCK
    assert theirs >= 2 * ROWS * CLASSES * 4 / CHUNKS


def fully_sharded_peaks(rank):
    """Of the last layer alone, in a checkpoint, and under hooks."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (PROCESSES,))
    return {
        "alone": peaks(lambda head: fully_shard(head, mesh=mesh)),
        "checkpoint": peaks(lambda head: fully_shard(checkpointed(head), mesh=mesh)),
        "offloaded by hooks": peaks(lambda head: fully_shard(head, mesh=mesh), Offloaded),
    }


class Offloaded(saved_tensors_hooks):
    """As torchtune and TRL offload activations: what is large is copied away, and back where backward asks for it."""

    def __init__(self):
        self.kept = {}
        super().__init__(self.pack, self.unpack)

    def pack(self, tensor):
        key = len(self.kept)
        is_small = isinstance(tensor, torch.nn.Parameter) or tensor.nbytes < 1024
        self.kept[key] = tensor if is_small else tensor.detach().clone()
        return key

    def unpack(self, key):
        return self.kept.pop(key).clone()


def cases():
    """Calls whose rows don't divide by the processes, and weigh more in one than in the other."""
    of_probabilities = call((7, 5), probabilities=True, sample_weight="sample_weight")
    of_probabilities["sample_weight"].requires_grad_(False)
    return {
        "mean": call((7, 5)),
        "sum": call((7, 5), reduction="sum", softcap=2.0, sample_weight="sample_weight"),
        "none": call((7, 5), reduction="none", logit_scale="logit_scale", return_stats=True),
        "normalizer": call((7, 5), normalizer="normalizer", sample_weight="sample_weight"),
        "probabilities": of_probabilities,
        "images": call((3, 5, 4), z_loss=0.1),
        "shift": shifted_call(reduction="sum"),
        "fewer rows than processes": call((1, 5), ignored=0.0, softcap=2.0),
    }


def results(args, cross_entropy=xent_ext.cross_entropy):
    """The loss, the statistics, and the gradients of sums of their squares."""
    leaves = {name: value for name, value in args.items() if isinstance(value, torch.Tensor) and value.requires_grad}
    found = flat(cross_entropy(**args))
    total = sum(value.square().sum() for name, value in found.items() if name in ("loss", "lse", "entropy"))
    gradients = torch.autograd.grad(total, list(leaves.values()))
    found = {name: value.detach() for name, value in found.items()}
    return found | {f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def distributed_tensors(rank):
    """The results of all cases, in several placements of the logits and of what else has rows."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line = torch.distributed.init_device_mesh("cpu", (PROCESSES,))
    plane = torch.distributed.init_device_mesh("cpu", (1, PROCESSES))
    placements = {
        "shards": (line, [Shard(0)], [Shard(0)]),
        "shards, targets in copies": (line, [Shard(0)], [Replicate()]),
        "copies, targets in shards": (line, [Replicate()], [Shard(0)]),
        "shards along one of two dimensions": (plane, [Replicate(), Shard(0)], [Replicate(), Replicate()]),
    }
    found = {}
    for (name, args), (where, (mesh, of_input, of_rows)) in itertools.product(cases().items(), placements.items()):
        everywhere = [Replicate()] * mesh.ndim
        by_name = {"input": of_input, "target": of_rows, "sample_weight": of_rows}
        args = {
            key: distribute_tensor(value.detach(), mesh, by_name.get(key, everywhere)).requires_grad_(
                value.requires_grad
            )
            if isinstance(value, torch.Tensor)
            else value
            for key, value in args.items()
        }
        with pytest.MonkeyPatch.context() as monkeypatch:
            calls = Calls().watch(monkeypatch, cpu)
            here = results(args)
        assert len(calls) == 1 or args["input"].to_local().numel() == 0
        found[f"{name}: {where}"] = {key: value.full_tensor() for key, value in here.items()}
    return found


def compiled_distributed_tensors(rank):
    """The results of some cases in one graph."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (PROCESSES,))
    found = {}
    for name in ("mean", "none"):
        args = {key: value for key, value in cases()[name].items() if key in ("input", "target", "reduction")}
        for key in ("input", "target"):
            args[key] = distribute_tensor(args[key].detach(), mesh, [Shard(0)])
        args["input"].requires_grad_()
        function = torch.compile(xent_ext.cross_entropy, fullgraph=True, backend="aot_eager")
        found[name] = {key: value.full_tensor() for key, value in results(args, function).items()}
    return found


def sharded_classes(rank):
    """Losses and gradients of logits in shards of the classes, 7 in two shards, under PyTorch's name."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = torch.distributed.init_device_mesh("cpu", (PROCESSES,))
    input, target, _ = make((8, 7))
    target = distribute_tensor(target, mesh, [Replicate()])
    found = {}
    for context in (contextlib.nullcontext, loss_parallel):
        logits = distribute_tensor(input, mesh, [Shard(1)]).requires_grad_()
        with xent_ext.installed(), context():
            loss = F.cross_entropy(logits, target)
            loss.backward()
        found[context.__name__] = loss.full_tensor().detach(), logits.grad.full_tensor()
    return found


def errors_of_distributed_tensors(rank):
    """What is raised for logits, a target and weights of rows that have no loss of shards."""
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (PROCESSES,))
    input, target, _ = make((8, 6))
    rows = distribute_tensor(target, mesh, [Replicate()])
    logits = distribute_tensor(input, mesh, [Shard(0)])
    f = distribute_tensor(torch.ones(8), mesh, [Shard(0)]).requires_grad_()
    in_positions = distribute_tensor(torch.randn(2, 4, 6), mesh, [Shard(1)])
    calls = {
        "summands": lambda: xent_ext.cross_entropy(logits.sum(0).redistribute(mesh, [Partial()]), rows[0]),
        "positions": lambda: xent_ext.cross_entropy(in_positions, rows.view(2, 4), shift=True),
        "target": lambda: xent_ext.cross_entropy(logits, target),
        "weights": lambda: xent_ext.cross_entropy(logits, rows, sample_weight=f),
        "batch size": lambda: xent_ext.cross_entropy(logits, rows[:7]),
        "explain": lambda: xent_ext.explain(logits, rows),
    }
    found = {}
    for name, function in calls.items():
        with pytest.raises(Exception) as caught:  # noqa: PT011
            function()
        found[name] = f"{caught.type.__name__}: {caught.value}"
    return found


needs_recent = pytest.mark.skipif(not backends.RECENT, reason="DTensor logits need PyTorch 2.12")
WORK = {
    "DDP": data_parallel,
    "FSDP": fully_sharded,
    "FSDP, peaks": fully_sharded_peaks,
    **({"DTensor": distributed_tensors} if backends.RECENT else {}),
    **({} if TORCH < (2, 13) else {"DTensor, compiled": compiled_distributed_tensors}),
    "DTensor, classes": sharded_classes,
    "DTensor, errors": errors_of_distributed_tensors,
}


right_sharding = pytest.mark.skipif(
    TORCH < (2, 12), reason="on a CPU older fully_shard adds gradients up in place of averaging, PyTorch's loss's too"
)


@distributed
@pytest.mark.parametrize("name", ["DDP", pytest.param("FSDP", marks=right_sharding)])
def test_data_parallel(found, name):
    """A step of several processes, each with its part of the batch, is that of one with the whole batch."""
    expected = step(new_model(), torch.nn.CrossEntropyLoss(label_smoothing=0.1), *new_batch())
    torch.testing.assert_close(found[name], expected)


@distributed
@needs_recent
@pytest.mark.parametrize("name", cases())
def test_distributed_tensors(found, name):
    """Each process computes its shard of the batch by the fused loss, and together they have that of the whole."""
    expected = results(cases()[name])
    results_by_place = {key: value for key, value in found["DTensor"].items() if key.startswith(f"{name}: ")}
    assert len(results_by_place) == 4
    for result in results_by_place.values():
        torch.testing.assert_close(result, expected)


@distributed
@pytest.mark.skipif(TORCH < (2, 13), reason="this PyTorch's compiler can't trace the placements of a DTensor")
@pytest.mark.parametrize("name", ["mean", "none"])
def test_distributed_tensors_in_a_graph(found, name):
    args = {key: value for key, value in cases()[name].items() if key in ("input", "target", "reduction")}
    torch.testing.assert_close(found["DTensor, compiled"][name], results(args))


@distributed
def test_distributed_classes(found):
    """Under PyTorch's name, within `loss_parallel` or not (and on older ones by PyTorch's own)."""
    input, target, _ = make((8, 7))
    loss = F.cross_entropy(input.requires_grad_(), target)
    loss.backward()
    for whole in found["DTensor, classes"].values():
        torch.testing.assert_close(whole, (loss.detach(), input.grad))


@distributed
@needs_recent
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("summands", r"NotImplementedError: input must be .*got P"),
        ("positions", r"NotImplementedError: input must be .*\[0\] of shape \(2, 4, 6\), or its classes, got S"),
        ("target", r"RuntimeError: target must be a DTensor on the mesh of input, got Tensor"),
        ("weights", r"NotImplementedError: sample_weight must not require grad"),
        ("batch size", r"ValueError: Expected input batch_size \(8\) to match target batch_size \(7\)"),
        ("explain", r"TypeError: .*to_local"),
    ],
)
def test_errors_of_distributed_tensors(found, name, error):
    assert re.match(error, found["DTensor, errors"][name])


@distributed
@pytest.mark.skipif(backends.RECENT, reason="this PyTorch has all that DTensor logits need")
def test_distributed_tensors_of_older_pytorch(found):
    assert re.match("NotImplementedError: DTensor logits need PyTorch 2.12", found["DTensor, errors"]["weights"])


@distributed
@pytest.mark.parametrize("name", ["alone", "checkpoint", "offloaded by hooks"])
def test_fully_sharded_peaks_are_no_higher_than_pytorchs(found, name):
    assert_no_higher(found["FSDP, peaks"][name])


# --- In one process


def checkpointed(head, implementation="NO_REENTRANT"):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    return checkpoint_wrapper(head, checkpoint_impl=CheckpointImpl[implementation])


def offloaded(head):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import offload_wrapper

    return offload_wrapper(head)


WRAPPERS = {
    "alone": [lambda head: head],
    "save_on_cpu": [lambda head: head, save_on_cpu],
    "offloaded by hooks": [lambda head: head, Offloaded],
    "checkpoint": [checkpointed],
    "reentrant checkpoint": [lambda head: checkpointed(head, "REENTRANT")],
    "offload_wrapper": [offloaded],
    "offloaded checkpoint": [lambda head: offloaded(checkpointed(head))],
    "checkpoint under hooks": [checkpointed, Offloaded],
}


@distributed
@pytest.mark.parametrize("name", WRAPPERS)
def test_peaks_are_no_higher_than_pytorchs(cpu_blocks, name):
    assert_no_higher(peaks(*WRAPPERS[name]))
    assert cpu_blocks


@all_reductions
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_saved_tensors_hooks(fused, device, reduction, probabilities):
    """What is saved may be kept in the host's memory, or in another form; the gradient made ahead is not saved."""
    input, target, weight = make((7, 5), probabilities=probabilities, weighted=True, device=device)
    input.requires_grad_()
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.numpy(force=True)

    def gradient():
        loss = xent_ext.cross_entropy(input, target, weight, reduction=reduction)
        return torch.autograd.grad(loss.square().sum(), input)[0]

    plain = gradient()
    with save_on_cpu():
        assert torch.equal(gradient(), plain)
    with saved_tensors_hooks(pack, lambda array: torch.from_numpy(array).to(device)):
        assert torch.equal(gradient(), plain)
    assert any(tensor is input for tensor in packed)
    assert sum(tensor.shape == input.shape for tensor in packed) == 1 + probabilities


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(6, 40), (2, 7, 5)], ids=str)
def test_saved_tensors_come_back_in_other_strides(triton_backend, device, shape, reduction):
    """As `save_on_cpu` brings back logits whose classes are strided: what forward left is laid out for the others."""
    x = torch.randn(shape[::-1], device=device).permute(*reversed(range(len(shape)))).requires_grad_()
    target = torch.randint(shape[1], shape[:1] + shape[2:], device=device)

    def gradient(function):
        return torch.autograd.grad(function(x, target, reduction=reduction).square().sum(), x)[0]

    with saved_tensors_hooks(lambda tensor: tensor, torch.Tensor.contiguous):
        found = gradient(xent_ext.cross_entropy)
    torch.testing.assert_close(found, gradient(F.cross_entropy))


def test_functional_call(fused, device):
    model = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.LogSoftmax(1)).to(device)
    criterion = xent_ext.CrossEntropyLoss(torch.rand(5, device=device))
    x, target = torch.randn(7, 8, device=device), torch.arange(7, device=device) % 5
    other = {name: torch.randn_like(value, requires_grad=True) for name, value in model.named_parameters()}
    weight = {"weight": torch.rand(5, device=device)}
    loss = torch.func.functional_call(criterion, weight, (torch.func.functional_call(model, other, (x,)), target))
    expected = F.cross_entropy(torch.func.functional_call(model, other, (x,)), target, weight["weight"])
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, list(other.values())) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert len(fused) == 1


def test_per_sample_gradients(fused, device):
    """By vmap over functional_call, as for differential privacy."""
    model = torch.nn.Linear(8, 5).to(device)
    x, target = torch.randn(7, 8, device=device), torch.arange(7, device=device) % 5

    def per_sample(cross_entropy):
        def loss(parameters, x, target):
            return cross_entropy(torch.func.functional_call(model, parameters, (x,)), target)

        parameters = {name: value.detach() for name, value in model.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, target)

    torch.testing.assert_close(per_sample(xent_ext.cross_entropy), per_sample(F.cross_entropy))


@all_reductions
def test_threads(many_blocks, reduction):
    """Threads share a module, and each has the results that it has alone."""
    criterion = xent_ext.CrossEntropyLoss(reduction=reduction)
    batches = [make((64, 50), torch.bfloat16, seed=seed)[:2] for seed in range(4)]

    def work(batch, factor):
        input, target = batch
        input = input.detach().requires_grad_()
        loss = criterion(input, target)
        return loss.detach(), torch.autograd.grad(factor * loss.sum(), input)[0]

    alone = [work(batch, factor) for factor, batch in enumerate(batches, 1)]
    found = [[] for _ in batches]
    threads = [
        threading.Thread(target=lambda i=i, batch=batch: found[i].extend(work(batch, i + 1) for _ in range(20)))
        for i, batch in enumerate(batches)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, expected in zip(found, alone, strict=True):
        assert len(results) == 20
        for result in results:
            assert all(map(torch.equal, result, expected))
