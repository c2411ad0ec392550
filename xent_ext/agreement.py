"""Whether the ranks that share the classes make calls that fit together: what `XENT_EXT_CHECK=1` asks for.

Without it a rank that raises, or that makes another call than the others, leaves them waiting for the group's timeout.
With it every rank tells the others what it is about to do, or why it can't, before anything else is sent, and all raise
the same error.
"""

import ctypes
import dataclasses
import hashlib
from typing import Any, NamedTuple

import torch.distributed as dist

from .layout import batch_shape, class_axis, visible
from .problem import NUMBERS

WRONG = (IndexError, RuntimeError, TypeError, ValueError)


class Told(NamedTuple):
    """What a rank tells the others of its call."""

    facts: dict[str, Any]  # what must be the same on all
    start: int = 0  # its first class
    classes: int = 0  # how many it has
    error: Exception | None = None


def check(group, prepare, *call):
    """Raise on all ranks of the group what is wrong with the call of any. `prepare` makes problem and tensors of it."""
    try:
        mine = told(*prepare(*call))
    except WRONG as error:
        mine = Told({}, error=error)
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for rank, other in enumerate(everyone):
        if other.error is not None:
            raise type(other.error)(f"on rank {rank} of the process_group: {other.error}") from mine.error
    for name, fact in everyone[0].facts.items():
        for rank, other in enumerate(everyone):
            if other.facts[name] != fact:
                raise RuntimeError(
                    f"{name} must be the same on all ranks of the process_group, got {fact} on rank 0 and "
                    f"{other.facts[name]} on rank {rank}"
                )
    check_slices(everyone)


def check_slices(everyone):
    """Raise ValueError unless every class is in one slice."""
    total, end = everyone[0].facts["num_classes"], 0
    for start, classes, rank in sorted((other.start, other.classes, rank) for rank, other in enumerate(everyone)):
        if classes and start != end:
            raise ValueError(
                f"every class must be on one rank of the process_group: rank {rank} starts at class {start}, and the "
                f"classes before it end at {end}"
            )
        end += classes
    if end != total:
        raise ValueError(f"every class must be on one rank of the process_group, got {end} of {total}")


def told(problem, tensors):
    """`Told` of a call that was prepared."""
    logits = visible(problem, tensors.input)
    facts = dataclasses.asdict(problem)
    for name in ("group", "rank", "class_start"):
        del facts[name]
    facts |= {"shape of the rows": tuple(batch_shape(logits.shape)), "dtype of input": tensors.input.dtype}
    if problem.probabilities:
        facts["dtype of target"] = tensors.target.dtype
    else:
        facts["target"] = contents(tensors.target)
    for name in ("weight", "normalizer", "sample_weight", *NUMBERS):
        tensor = getattr(tensors, name)
        facts[name] = None if tensor is None else "given" if name == "weight" else contents(tensor)
    return Told(facts, problem.class_start, logits.shape[class_axis(logits.shape)])


def contents(tensor):
    """What stands for the values of a tensor."""
    tensor = tensor.detach().cpu().contiguous()
    values = ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} with hash {hashlib.sha256(values).hexdigest()[:16]}"
