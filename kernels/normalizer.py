"""What a mean divides by, and the sum of what the programs of a schedule left.

Sums are made in a fixed order, without atomics, so that the same input gives the same bits.
"""

import triton
import triton.language as tl

from .arguments import Target
from .math import widened


@triton.jit
def rows_weight(target, number, mask, ignore_index, K):
    """What each row counts for in a mean: 1 or its target's weight, times its sample weight.

    0 if it is ignored or its target is no class.
    """
    w = widened(mask, K)
    if target.indices is not None:
        t = tl.load(target.indices + number, mask=mask, other=-1).to(tl.int64)
        mask = mask & (t != ignore_index) & (t >= 0) & (t < target.classes)
        w = widened(mask, K)
        if target.weight is not None:
            w = widened(tl.load(target.weight + t, mask=mask, other=0.0), K)
    if target.sample_weight is not None:
        w *= tl.load(target.sample_weight + number, mask=mask, other=0.0)
    return w


@triton.jit
def divisor(parts, target, batch, ignore_index, K):
    """What the loss of so many rows is divided by: the normaliser of a mean, whose `parts` may be there already."""
    total = tl.full((), 1.0, tl.float32)
    if K.MEAN:
        if parts is not None:
            total = tl.sum(tl.load(parts + tl.arange(0, K.PARTS)), 0)
        elif K.COUNT > 0:
            number = tl.arange(0, K.COUNT)
            total = tl.sum(rows_weight(target, number, number < batch, ignore_index, K), 0)
        else:
            total = widened(batch, K)
        if K.NOT_ZERO:
            total = tl.where(total == 0, float("inf"), total)
    return total


@triton.jit(do_not_specialize=["batch", "span", "ignore_index"])
def normalizer_parts(
    target: Target,
    parts,
    batch: tl.int64,  # rows
    span: tl.int64,  # rows for each program
    ignore_index: tl.int64,
    K: tl.constexpr,  # Constants
):
    """Number, or weight, of the rows that count: neither ignored nor out of range."""
    begin = tl.program_id(0) * span
    end = tl.minimum(begin + span, batch)
    total = widened(tl.zeros_like(tl.arange(0, K.BLOCK)), K)
    for start in range(begin, end, K.BLOCK):
        number = start + tl.arange(0, K.BLOCK)
        total += rows_weight(target, number, number < end, ignore_index, K)
    tl.store(parts + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["count", "span", "batch", "ignore_index"])
def sum_parts(
    target: Target,
    losses,
    normalizer,
    out,
    count: tl.int64,  # losses
    span: tl.int64,  # losses for each program
    batch: tl.int64,  # rows
    ignore_index: tl.int64,
    K: tl.constexpr,  # Constants
):
    """Sum of `count` losses over the normaliser; with several programs, one part from each."""
    begin = tl.program_id(0) * span
    end = tl.minimum(begin + span, count)
    total = widened(tl.zeros_like(tl.arange(0, K.BLOCK)), K)
    for start in range(begin, end, K.BLOCK):
        k = start + tl.arange(0, K.BLOCK)
        total += widened(tl.load(losses + k, mask=k < end, other=0.0), K)
    result = tl.sum(total, 0) / divisor(normalizer, target, batch, ignore_index, K)
    tl.store(out + tl.program_id(0), result.to(out.dtype.element_ty))
