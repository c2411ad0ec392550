"""A case of `verify` whose classes are on two devices, each with a process of its own."""

import functools
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

import xent_ext

from . import verify_calls as calls
from .verify_cases import Case
from .verify_errors import Found, LeftOut
from .workers import GROUPS, join_group

RANKS = 2
DEADLINE = 120  # seconds
BY_CLASS = ("input", "weight")


def class_parallel(case: Case, device, found: Found):
    """The loss, equal on both to the bit, and the gradients of both slices, beside those of one call of all classes."""
    if not (dist.is_available() and dist.is_backend_available(GROUPS[device.type])):
        raise LeftOut(f"this PyTorch has no torch.distributed with {GROUPS[device.type]}")
    given = calls.inputs(case, device)
    with tempfile.TemporaryDirectory() as folder:
        torch.save({name: values.cpu() for name, values in given.items()}, Path(folder) / "given")
        start_ranks(folder, case, device.type)
        of_ranks = [torch.load(Path(folder) / str(rank), map_location=device) for rank in range(RANKS)]
    results = [each for each, _ in of_ranks]
    for _, problems in of_ranks:
        found.problems += problems
    found.plan = "two processes, a slice each"
    found.same("on the other device", *(calls.without(each, "gradient of input") for each in results))
    gradient = torch.cat([each["gradient of input"] for each in results], 1)
    whole = results[0] | {"gradient of input": gradient}
    found.close(whole, *calls.theirs(case, given), *calls.truth(case, given))


def start_ranks(folder: str, case: Case, kind: str):
    """Run both processes to their end; those that have none after a while raise TimeoutError."""
    context = torch.multiprocessing.spawn(in_rank, (folder, case, kind), RANKS, join=False)
    end = time.monotonic() + DEADLINE
    try:
        while not context.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"two processes had not ended after {DEADLINE} seconds")
    finally:
        for process in context.processes:
            process.kill()


def in_rank(rank: int, folder: str, case: Case, kind: str):
    device = join_group(kind, rank, RANKS, f"{folder}/store", DEADLINE / 2)
    try:
        torch.save(in_group(rank, folder, case, device), Path(folder) / str(rank))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def in_group(rank: int, folder: str, case: Case, device) -> tuple[dict, list[str]]:
    """What this rank's slice gives, and what is wrong with how it does."""
    classes, found = case.shape[1], Found(case)
    bounds = (0, 2 * classes // 5, classes)  # slices of two sizes
    first, last = bounds[rank : rank + 2]
    given = {
        name: (values[..., first:last] if name in BY_CLASS else values).contiguous().to(device)
        for name, values in torch.load(Path(folder) / "given").items()
    }
    function = functools.partial(
        xent_ext.cross_entropy, process_group=dist.group.WORLD, class_start=first, num_classes=classes
    )
    (results,), (again,) = (calls.ours(case, given, found, function) for _ in range(2))
    found.same("in a second run", results, again)
    return {name: values.cpu() for name, values in results.items()}, found.problems
