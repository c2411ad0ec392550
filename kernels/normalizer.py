"""What a mean divides by, and the sum of what the programs of a schedule left.

Sums are made in a fixed order, without atomics, so that the same input gives the same bits.
"""

import triton
import triton.language as tl

from .tile import normalizer, rows_weight


@triton.jit(do_not_specialize=["ignore_index", "rows", "span"])
def normalizer_parts(
    target_ptr,  # None: probabilities, no row is ignored
    weight_ptr,  # None: all ones
    sample_weight_ptr,  # None: all ones
    parts_ptr,
    rows: tl.int64,
    span: tl.int64,  # rows for each program
    ignore_index: tl.int64,
    classes,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Number, or weight, of the rows that count: neither ignored nor out of range."""
    begin = tl.program_id(0) * span
    end = tl.minimum(begin + span, rows)
    total = tl.zeros((BLOCK,), ACC)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += rows_weight(target_ptr, weight_ptr, sample_weight_ptr, row, row < end, ignore_index, classes, ACC)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["ignore_index", "rows", "count", "span"])
def sum_parts(
    losses_ptr,
    normalizer_ptr,  # None: the rows are counted here, or `divisor` is the normaliser
    target_ptr,
    weight_ptr,
    sample_weight_ptr,
    out_ptr,
    rows: tl.int64,
    ignore_index: tl.int64,
    classes,
    count: tl.int64,
    span: tl.int64,  # losses for each program
    divisor: tl.float64,
    PARTS: tl.constexpr,
    COUNT: tl.constexpr,
    NOT_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum of `count` losses over the normaliser; with several programs, one part from each."""
    begin = tl.program_id(0) * span
    end = tl.minimum(begin + span, count)
    total = tl.zeros((BLOCK,), ACC)
    for start in range(begin, end, BLOCK):
        k = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + k, mask=k < end, other=0.0).to(ACC)
    out = tl.sum(total, 0) / normalizer(
        normalizer_ptr, divisor, target_ptr, weight_ptr, sample_weight_ptr, rows, ignore_index, classes, PARTS, COUNT,
        NOT_ZERO, ACC,
    )  # fmt: skip
    tl.store(out_ptr + tl.program_id(0), out.to(out_ptr.dtype.element_ty))
