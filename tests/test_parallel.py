"""Classes in slices on the processes of a gloo group: the loss of the whole logits, and nothing that hangs.

Each number of processes is started once, with a deadline. They make all calls in `WORK`, and what they return is
compared here with what one process finds.
"""

import datetime
import itertools
import os
import time

import pytest
import torch
import torch.distributed as dist
from parity import class_axis
from test_options import ALONE, allowed, call, outcome, plain

import xent_ext
from xent_ext import backends, dispatch

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no torch.distributed with gloo"
)
needs_recent = pytest.mark.skipif(not backends.RECENT, reason="DTensor logits, and graphs, need PyTorch 2.12")
DEADLINE = 120  # seconds
SIZES = {2: (10, 13), 3: (0, 22, 1), 4: (7, 5, 0, 11)}  # of 23 classes
TWO_CALLS = [("mean", 0.0), ("none", 0.1)]


def start(function, processes, path, *args):
    """What `function(rank, *args)` returns in each process of a group of so many, as files of a new folder have it."""
    path.mkdir()
    context = torch.multiprocessing.spawn(
        in_group, args=(processes, path, function, args), nprocs=processes, join=False
    )
    end = time.monotonic() + DEADLINE
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"{function.__name__} had not ended after {DEADLINE} s"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(path / str(rank), weights_only=False) for rank in range(processes)]


def in_group(rank, processes, path, function, args):
    """Here the CPU implementation takes every call that it can."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    backends.BACKEND, dispatch.is_small = "auto", lambda *_: False
    store, timeout = f"file://{path}/store", datetime.timedelta(seconds=20)
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
    for (name, options), probabilities in itertools.product(ALONE.items(), (False, True)):
        for reduction, smoothing in TWO_CALLS:
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


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What functions return in each of so many processes, started once."""
    path, found = tmp_path_factory.mktemp("processes"), {}

    def of(function, processes):
        key = f"{function.__name__}-{processes}"
        if key not in found:
            found[key] = start(function, processes, path / key)
        return found[key]

    return of


@pytest.mark.parametrize("processes", SIZES)
def test_slices_are_the_whole(answers, processes):
    """Each option, kind of target and shape: equal on all ranks to the bit, and equal to one process's float64."""
    found = answers(slices, processes)
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


@pytest.mark.parametrize("processes", [2, 3])
def test_layers_in_slices_are_the_whole(answers, processes):
    found = answers(layers, processes)
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
