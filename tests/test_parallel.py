"""Classes in slices on the processes of a gloo group: the loss of the whole logits, and nothing that hangs.

Each number of processes is started once, with a deadline. They do all of their `WORK`, and what they return is compared
here with what one process finds.
"""

import datetime
import itertools
import os
import re
import time

import pytest
import torch
import torch.distributed as dist
from parity import class_axis, make
from processes import run
from test_options import ALONE, allowed, call, flat, outcome, plain

import xent_ext
from xent_ext import backends, dispatch

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no torch.distributed with gloo"
)
SIZES = {2: (10, 13), 3: (0, 22, 1), 4: (7, 5, 0, 11)}  # of 23 classes
TWO_CALLS = [("mean", 0.0), ("none", 0.1)]


def start(function, processes, path, *args):
    """What `function(rank, *args)` returns in each process of a group of so many, as files of a new folder have it."""
    path.mkdir()
    run(in_group, processes, processes, path, function, args)
    return [torch.load(path / str(rank), weights_only=False) for rank in range(processes)]


def in_group(rank, processes, path, function, args):
    """Here the CPU implementation takes every call that it can."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    backends.BACKEND, dispatch.is_small = "auto", lambda *_: False
    store, timeout = f"file://{path}/store", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes, timeout=timeout)
    try:
        torch.save(function(rank, *args), path / str(rank))
        dist.barrier()
    finally:
        dist.destroy_process_group()


# --- Calls with a group


def sliced(args, start, size):
    """A rank's arguments of a call."""
    axis, found = class_axis(args["input"].shape), dict(args)
    for name, value in args.items():
        if name == "weight":
            found[name] = value[start : start + size]
        elif name == "input" or (name == "target" and value.is_floating_point()):
            found[name] = value.detach().narrow(axis, start, size).clone().requires_grad_(value.requires_grad)
    return found


def cases():
    found = {}
    for place, ((name, options), probabilities) in enumerate(itertools.product(ALONE.items(), (False, True))):
        reduction, smoothing = TWO_CALLS[(place + place // 2) % 2]  # either kind of target with both, by turns
        options = allowed({**options, "reduction": reduction, "label_smoothing": smoothing})
        key = f"{name}, {'probabilities' if probabilities else 'indices'}, {reduction}"
        found[key] = call((7, 23), probabilities=probabilities, **options)
    found["pixels"] = call((2, 23, 3), return_stats=True)
    found["one row"] = call((23,), return_stats=True)
    return found


def slices(rank):
    """All cases, and how many bytes went to the other ranks; the group is usable afterwards."""
    sizes = SIZES[dist.get_world_size()]
    place = {"process_group": dist.group.WORLD, "class_start": sum(sizes[:rank]), "num_classes": 23}
    return {
        name: outcome(xent_ext.cross_entropy, sliced(args, sum(sizes[:rank]), sizes[rank]) | place)
        for name, args in cases().items()
    }


def equal_slices(rank):
    """Of 24 classes, the last two of them padding, by the module."""
    args = call((7, 24))
    size = 24 // dist.get_world_size()
    module = xent_ext.CrossEntropyLoss(process_group=dist.group.WORLD, num_classes=22)
    here = sliced(args, size * rank, size)
    module.weight = here["weight"]
    loss = module(here["input"], here["target"] % 22)
    loss.backward()
    return loss.detach(), here["input"].grad, xent_ext.explain(**here, process_group=dist.group.WORLD, num_classes=22)


def need_no_start(found):
    """Slices of equal size, with padding in the last."""
    args = call((7, 24))
    input = args["input"].detach()[:, :22].requires_grad_()
    loss = plain(input=input, target=args["target"] % 22, weight=args["weight"][:22])
    loss.backward()
    whole = torch.cat([gradient for _, gradient, _ in found], 1)
    torch.testing.assert_close(whole[:, :22], input.grad)
    assert not whole[:, 22:].any()
    for ours, _, explanation in found:
        torch.testing.assert_close(ours, loss)
        assert explanation.implementation == "cpu"
        assert explanation.traffic.sent == 7 * 5 * 8  # five float64 for each row, as there are class weights
        assert explanation.traffic.received == 3 * explanation.traffic.sent


def are_the_whole(found):
    """Each option, kind of target and shape: equal on all ranks to the bit, and equal to one process's float64."""
    for name, args in cases().items():
        ranks, true = [of_rank[name] for of_rank in found], outcome(plain, args)
        whole = dict(ranks[0])
        whole["d input"] = torch.cat([of_rank["d input"] for of_rank in ranks], class_axis(args["input"].shape))
        if "d logit_scale" in whole:
            whole["d logit_scale"] = sum(of_rank["d logit_scale"] for of_rank in ranks)
        for key, value in whole.items():
            torch.testing.assert_close(value, true[key], msg=lambda m, at=(name, key): f"{at}: {m}")
            if key not in ("d input", "d logit_scale"):
                assert all(torch.equal(of_rank[key], value) for of_rank in ranks), (name, key)


# --- The last layer


def layer_cases():
    """Calls of the layer (23, 6) with 7 rows in chunks of 3, by name."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def of(options, probabilities=False):
        target = torch.randint(23, (7,), generator=generator)
        target[2] = -100
        return {
            "input": random(7, 6).requires_grad_(),
            "linear_weight": random(23, 6).requires_grad_(),
            "target": random(7, 23).softmax(1) if probabilities else target,
            "linear_bias": random(23).requires_grad_(),
            "chunk_rows": 3,
            **options,
        }

    weights = {"weight": random(23).abs(), "sample_weight": random(7).abs().requires_grad_()}
    return {
        "mean": of({}),
        "sum": of({"reduction": "sum", "label_smoothing": 0.1, "softcap": 2.0}),
        "none": of({"reduction": "none", "z_loss": 0.1}),
        "weights": of(weights | {"logit_scale": torch.tensor(0.7, dtype=torch.float64, requires_grad=True)}),
        "weights, none": of(weights | {"reduction": "none"}),
        "probabilities": of({"return_stats": True}, probabilities=True),
        "statistics": of({"return_stats": True, "weight": weights["weight"]}),
        "one chunk": of({"chunk_rows": None}),
        "frozen": of({"linear_weight": random(23, 6), "linear_bias": None}),
    }


def of_layer(args, rank=None):
    """A rank's arguments of a call of the layer, or with no rank those of the whole."""
    if rank is None:
        return args
    sizes = SIZES[dist.get_world_size()]
    start, size = sum(sizes[:rank]), sizes[rank]
    found = {**args, "process_group": dist.group.WORLD, "class_start": start, "num_classes": 23}
    for name in ("linear_weight", "linear_bias", "weight"):
        if args.get(name) is not None:
            value = args[name]
            found[name] = value.detach()[start : start + size].clone().requires_grad_(value.requires_grad)
    if args["target"].is_floating_point():
        found["target"] = args["target"][:, start : start + size]
    return found


def layers(rank):
    return {name: outcome(xent_ext.linear_cross_entropy, of_layer(args, rank)) for name, args in layer_cases().items()}


def are_the_whole_layer(found):
    for name, args in layer_cases().items():
        ranks, true = [of_rank[name] for of_rank in found], outcome(xent_ext.linear_cross_entropy, args)
        for key, value in ranks[0].items():
            if key in ("d linear_weight", "d linear_bias"):
                value = torch.cat([of_rank[key] for of_rank in ranks])
            elif key == "d logit_scale":
                value = sum(of_rank[key] for of_rank in ranks)
            else:
                assert all(torch.equal(of_rank[key], value) for of_rank in ranks), (name, key)
            torch.testing.assert_close(value, true[key], msg=lambda m, at=(name, key): f"{at}: {m}")


def test_padding_of_the_layer_takes_no_part():
    """Rows of the weight from num_classes on: whatever they hold, and their gradients are 0."""
    for name, args in layer_cases().items():
        ours = dict(args, num_classes=23)
        for key in ("linear_weight", "linear_bias", "weight"):
            if args.get(key) is not None:
                rest = torch.full((5, *args[key].shape[1:]), torch.nan, dtype=torch.float64)
                ours[key] = torch.cat([args[key].detach(), rest]).requires_grad_(args[key].requires_grad)
        if args["target"].is_floating_point():
            ours["target"] = torch.cat([args["target"], torch.full((7, 5), torch.nan, dtype=torch.float64)], 1)
        found, true = outcome(xent_ext.linear_cross_entropy, ours), outcome(xent_ext.linear_cross_entropy, args)
        for key, value in found.items():
            if key in ("d linear_weight", "d linear_bias"):
                assert not value[23:].any()
                value = value[:23]
            torch.testing.assert_close(value, true[key], msg=lambda m, at=(name, key): f"{at}: {m}")


# --- DTensors


def placed(args, mesh, placements):
    """Tensors as DTensors, whole elsewhere than in the placements given by name."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    return {
        name: distribute_tensor(value.detach(), mesh, placements.get(name, [Replicate()] * mesh.ndim)).requires_grad_(
            value.requires_grad
        )
        if isinstance(value, torch.Tensor)
        else value
        for name, value in args.items()
    }


def tensors_cases():
    rows = {"return_stats": True, "label_smoothing": 0.1}
    return {
        "mean": call((8, 23)),
        "statistics": call((8, 23), **rows),
        "weights": call((8, 23), sample_weight="sample_weight", logit_scale="logit_scale", reduction="sum"),
        "none": call((8, 23), reduction="none", z_loss=0.1),
        "probabilities": call((8, 23), probabilities=True, reduction="sum"),
        "pixels": call((4, 23, 6), **rows),
        "shift": shifted_case(),
    }


def shifted_case():
    x, tokens, _ = make((4, 23, 5), torch.float64, seed=4)
    return {
        "input": x.movedim(1, -1).contiguous().requires_grad_(),
        "target": tokens,
        "shift": True,
        "return_stats": True,
    }


def distributed_logits(rank):
    """The cases on a line of all ranks, and for four on a plane whose other dimension has the batch."""
    from torch.distributed.tensor import Replicate, Shard

    ranks, found = dist.get_world_size(), {}
    for (name, args), plane in itertools.product(tensors_cases().items(), (False, True)):
        if plane and ranks != 4:
            continue
        mesh = dist.init_device_mesh("cpu", (2, 2) if plane else (ranks,))
        axis, batch = (2 if args.get("shift") else 1), [Shard(0)] * plane
        placements = {
            "input": [*batch, Shard(axis)],
            "target": [*batch, Replicate()],
            "sample_weight": [*batch, Replicate()],
        }
        if args["target"].is_floating_point():
            placements["target"] = placements["input"]
        here = outcome_of_shards(xent_ext.cross_entropy, placed(args, mesh, placements))
        found[f"{name} on a {'plane' if plane else 'line'}"] = {key: value.full_tensor() for key, value in here.items()}
    return found


def outcome_of_shards(function, args):
    """`test_options.outcome` of DTensors, for the loss alone: the same random factors."""
    found = flat(function(**args))
    factor = torch.randn(found["loss"].shape, generator=torch.Generator().manual_seed(5)).to(found["loss"].dtype)
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = args["input"].device_mesh
    (found["loss"] * distribute_tensor(factor, mesh, [Replicate()] * mesh.ndim)).sum().backward()
    leaves = {name: value for name, value in args.items() if isinstance(value, torch.Tensor) and value.requires_grad}
    return {name: value.detach() for name, value in found.items()} | {f"d {name}": t.grad for name, t in leaves.items()}


def are_those_of_whole_logits(ranks):
    """Uneven shards of the classes, alone and with shards of the batch beside them."""
    for name, found in ranks[0].items():
        args = tensors_cases()[name.partition(" on ")[0]]
        function = xent_ext.cross_entropy if args.get("shift") else plain
        true = outcome(function, args, upstreams=("loss",))
        for key, value in found.items():
            torch.testing.assert_close(value, true[key], msg=lambda m, at=(name, key): f"{at}: {m}")


def distributed_layers(rank):
    """The layer's cases with shards of the classes, of the batch with a gathered weight, and on a plane of both."""
    from torch.distributed.tensor import Replicate, Shard

    ranks, found = dist.get_world_size(), {}
    line, plane = (ranks,), (2, 2)
    one, rows = Replicate(), Shard(0)
    ways = {
        "classes": (line, [one], [Shard(0)]),
        "batch": (line, [rows], [Shard(0)]),
        "both": (plane, [rows, one], [one, Shard(0)]),
    }
    for name, args in layer_cases().items():
        for way, (shape, of_rows, of_classes) in ways.items():
            if name == "weights" and way != "classes":
                continue  # the gradient of sample_weight hangs on the mean over other shards
            mesh = dist.init_device_mesh("cpu", shape)
            placements = dict.fromkeys(("input", "target", "sample_weight"), of_rows) | {"linear_weight": of_classes}
            here = outcome_of_shards(xent_ext.linear_cross_entropy, placed(args, mesh, placements))
            found[f"{name}, {way}"] = {key: value.full_tensor() for key, value in here.items()}
    return found


def are_those_of_the_whole_layer(ranks):
    for name, found in ranks[0].items():
        args = layer_cases()[name.rpartition(", ")[0]]
        true = outcome(xent_ext.linear_cross_entropy, args, upstreams=("loss",))
        for key, value in found.items():
            torch.testing.assert_close(value, true[key], msg=lambda m, at=(name, key): f"{at}: {m}")


# --- What goes wrong


WRONG = {
    # What differs, what each rank gives, and the error of all ranks.
    "rows": ({"target": (5, 6)}, r"ValueError: on rank 1 of the process_group: Expected input batch_size \(5\)"),
    "dtype": ({"dtype": ("float32", "int64")}, r"NotImplementedError: on rank 1 of the process_group: input must be"),
    "mixed dtypes": ({"dtype": ("float32", "float64")}, r"RuntimeError: dtype must be the same on all ranks"),
    "targets": ({"seed": (0, 1)}, r"RuntimeError: target must be the same on all ranks .* with hash .* on rank 1"),
    "options": ({"label_smoothing": (0.0, 0.1)}, r"RuntimeError: label_smoothing must be the same on all ranks"),
    "gap": ({"class_start": (0, 12)}, r"ValueError: every class must be on one rank .* rank 1 starts at class 12"),
    "too few": ({"num_classes": (23, 23)}, r"ValueError: every class must be on one rank .*, got 20 of 23"),
}


def wrong_call(rank, difference):
    of_rank = {name: values[rank] for name, values in difference.items()}
    generator = torch.Generator().manual_seed(of_rank.pop("seed", 0))
    target = torch.randint(20, (of_rank.pop("target", 5),), generator=generator)
    place = {"process_group": dist.group.WORLD, "class_start": 10 * rank, "num_classes": 20}
    input = torch.zeros(5, 10, dtype=getattr(torch, of_rank.pop("dtype", "float32")))
    return {"input": input, "target": target, **place, **of_rank}


def message_of(function, args):
    try:
        function(**args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def errors(rank):
    """What each rank raises where the ranks' calls differ; after each, and without the check, the group goes on."""
    backends.CHECK = True
    found = {}
    for name, (difference, _) in WRONG.items():
        args = wrong_call(rank, difference)
        found[name] = message_of(xent_ext.cross_entropy, args)
        if name in ("rows", "targets", "gap"):
            features = torch.ones(5, 4)
            layer = {"linear_weight": torch.ones(10, 4), **{k: v for k, v in args.items() if k != "input"}}
            found[f"{name} of the layer"] = message_of(xent_ext.linear_cross_entropy, {"input": features, **layer})
        found[f"after {name}"] = message_of(xent_ext.cross_entropy, wrong_call(rank, {}))
    backends.CHECK = False
    found["class index"] = message_of(xent_ext.cross_entropy, wrong_call(rank, {}) | {"target": torch.full((5,), 20)})
    leaf = torch.zeros(5, 10, requires_grad=True)
    loss = xent_ext.cross_entropy(**wrong_call(rank, {}) | {"input": leaf})
    found["create_graph"] = message_of(lambda: torch.autograd.grad(loss, leaf, create_graph=True), {})
    found["weight"] = message_of(
        xent_ext.cross_entropy,
        wrong_call(rank, {}) | {"target": torch.ones(5, 10) / 20, "weight": torch.ones(10, requires_grad=True)},
    )
    return found


def are_the_same_on_all_ranks(found):
    first, second = found
    assert first == second
    for name, (_, error) in WRONG.items():
        assert re.match(error, first[name]), first[name]
        assert first[f"after {name}"] == "nothing"
        if f"{name} of the layer" in first:
            assert re.match(error.partition(r" Expected")[0], first[f"{name} of the layer"])
    assert re.match(r"IndexError: Target 20 is out of bounds.*\[0, 20\)", first["class index"])
    assert re.match("NotImplementedError: .* create_graph=True", first["create_graph"])
    assert re.match("NotImplementedError: .* gradient with respect to the weight", first["weight"])


def one_rank_raises(rank):
    """Without the check: a rank that raises before it sends anything leaves the other to the group's timeout."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=5))
    start = time.monotonic()
    args = {"input": torch.zeros(5, 10), "target": torch.zeros(5 + rank, dtype=torch.int64), "process_group": group}
    message = message_of(xent_ext.cross_entropy, args)
    waited = time.monotonic() - start
    dist.barrier()
    return message, waited, message_of(xent_ext.cross_entropy, wrong_call(rank, {}))


def is_not_waited_for_beyond_the_timeout(found):
    (first, waited, after), (second, _, after_second) = found
    assert second.startswith("ValueError: Expected input batch_size")
    assert first.startswith(("RuntimeError", "DistBackendError"))
    assert waited < 30
    assert after == after_second == "nothing"


# --- Training


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.hidden = torch.nn.Embedding(23, 8), torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 23, bias=False)

    def forward(self, tokens):
        return torch.tanh(self.hidden(self.embedding(tokens)))


def train(model, loss_of, batches):
    """The parameters after a few steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for tokens, target in batches:
        loss_of(tokens, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in model.named_parameters()}


def batches():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(23, (2, 8), generator=generator) for _ in range(3)]


def trained_by_ddp(mesh):
    """The head's slice and the layer's loss, with the rest in copies, whose gradients the batch's shards average."""
    data, classes = mesh["data"], mesh["classes"]
    model, rank = Model(), classes.get_local_rank()
    start, end = ((0, 12), (12, 23))[rank]
    model.head.weight = torch.nn.Parameter(model.head.weight.detach()[start:end].clone())
    wrapped = torch.nn.parallel.DistributedDataParallel(
        Whole(model, classes.get_group(), start), process_group=data.get_group()
    )
    rows = slice(4 * data.get_local_rank(), 4 * data.get_local_rank() + 4)
    found = train(model, lambda tokens, target: wrapped(tokens[rows], target[rows]), batches())
    slices = [None, None]
    dist.all_gather_object(slices, found["head.weight"], group=classes.get_group())
    return found | {"head.weight": torch.cat(slices)}


class Whole(torch.nn.Module):
    """Tokens to a loss, with a slice of the classes."""

    def __init__(self, model, group, start):
        super().__init__()
        self.model, self.place = model, {"process_group": group, "class_start": start, "num_classes": 23}

    def forward(self, tokens, target):
        weight = self.model.head.weight
        return xent_ext.linear_cross_entropy(self.model(tokens), weight, target, chunk_rows=3, **self.place)


def trained_by_fsdp(mesh):
    """FSDP over shards of the batch, a column-parallel head, and PyTorch's name for the loss of its DTensor logits."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

    data, classes = mesh["data"], mesh["classes"]
    model = Model()
    parallelize_module(model, classes, {"head": ColwiseParallel(use_local_output=False)})
    fully_shard(model.head, mesh=data)
    fully_shard(model, mesh=data)
    rows = slice(4 * data.get_local_rank(), 4 * data.get_local_rank() + 4)

    def loss_of(tokens, target):
        with xent_ext.installed(), loss_parallel():
            return torch.nn.functional.cross_entropy(model.head(model(tokens[rows])), target[rows])

    return train(model, loss_of, batches())


def training(rank):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    return {"DDP": trained_by_ddp(mesh), "FSDP": trained_by_fsdp(mesh)}


def is_that_of_one_process(ranks):
    """Tensor parallelism of the classes beside data parallelism."""
    model = Model()
    one = train(model, lambda x, target: torch.nn.functional.cross_entropy(model.head(model(x)), target), batches())
    for found in ranks:
        for name, parameters in found.items():
            for key, value in one.items():
                torch.testing.assert_close(parameters[key], value, msg=lambda m, at=(name, key): f"{at}: {m}")


# --- All of it

# What so many processes do, and what is then to be true of what they return.
WORK = {
    2: {slices: are_the_whole, layers: are_the_whole_layer, errors: are_the_same_on_all_ranks}
    | {one_rank_raises: is_not_waited_for_beyond_the_timeout},
    3: {slices: are_the_whole, layers: are_the_whole_layer},
    4: {slices: are_the_whole, equal_slices: need_no_start},
}
if backends.RECENT:  # as DTensor logits need
    WORK[3][distributed_logits] = WORK[4][distributed_logits] = are_those_of_whole_logits
    WORK[4] |= {distributed_layers: are_those_of_the_whole_layer, training: is_that_of_one_process}


def work(rank):
    return {function.__name__: function(rank) for function in WORK[dist.get_world_size()]}


@pytest.mark.parametrize("processes", WORK)
def test_processes(processes, tmp_path):
    found = start(work, processes, tmp_path / "answers")
    for function, is_right in WORK[processes].items():
        is_right([of_rank[function.__name__] for of_rank in found])
