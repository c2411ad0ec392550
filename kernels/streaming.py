"""Schedules `streaming` and `split`: programs loop over rows that are too long to hold.

The first walk keeps an online summary (Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018).
The second, where a gradient is wanted, goes backward: what was read last, and is still in cache, is read again first.
With few rows each is split over SPLITS programs, which only summarise their parts; `gradient` does the rest.
"""

import triton
import triton.language as tl

from .arguments import Given, Gradient, Results
from .math import merge, nothing
from .normalizer import divisor
from .outcome import factors_of, rows_to_store, store_gradient, store_results, with_point
from .pieces import Columns, body_of, read, rest_of, summarised
from .rows import all_classes, rows_of, store_rows
from .saved import save

PART = tl.constexpr(64)  # parts start at multiples of this many classes: whole vectors


@triton.jit
def summary_of(columns, rows, given, K):
    """Read the logits of some columns; return their rows' summary."""
    piece = read(given, rows, columns, K)
    return summarised(piece, tl.max(piece.z, 1), rows, given, K)


@triton.jit(do_not_specialize=["batch", "tiles", "ignore_index"])
def streaming(
    given: Given,
    results: Results,
    gradient: Gradient,
    saved,  # None: no gradient will be made later
    batch: tl.int64,  # rows
    tiles,
    ignore_index: tl.int64,
    K: tl.constexpr,  # Constants
):
    for item in range(tl.program_id(0), tiles * K.SPLITS, tl.num_programs(0)):
        part = item % K.SPLITS
        rows = rows_of(item // K.SPLITS, given, ignore_index, K)

        row = nothing(rows.point, all_classes(given.target))
        if K.REST > 0:
            rest = rest_of(rows, given.target.classes, K)
            if part == 0:
                row = summary_of(rest, rows, given, K)
        span = tl.cdiv(given.target.classes, K.SPLITS * PART) * PART
        end = tl.minimum((part + 1) * span, given.target.classes)
        # No trip at all where every row of the program is ignored.
        end = tl.where(tl.max(rows.counted.to(tl.int32), 0) > 0, end, 0)
        for start in range(part * span, end, K.BLOCK):
            body = body_of(rows, start, given.target.classes, K)
            if K.SPLITS > 1:
                body = Columns(number=body.number, inside=body.inside & (body.number < (part + 1) * span))
            row = merge(row, summary_of(body, rows, given, K), all_classes(given.target), K)
        if saved is not None:
            save(saved, row, rows, part, batch, K)
        row = with_point(row, rows)

        if K.SPLITS == 1 and results.loss is not None:
            store_results(results, given, rows, row, 1.0, K)
        if gradient.view is not None:
            total = divisor(gradient.normalizer, given.target, batch, ignore_index, K)
            rows = rows_to_store(rows, gradient)
            factors = factors_of(gradient, given, rows, row, total, K)
            slope = tl.zeros_like(row.m)
            blocks = tl.cdiv(given.target.classes, K.BLOCK)
            for k in range(blocks):
                body = body_of(rows, (blocks - 1 - k) * K.BLOCK, given.target.classes, K)
                slope += store_gradient(gradient, given, rows, read(given, rows, body, K), factors, K)
            if K.REST > 0:
                slope += store_gradient(gradient, given, rows, read(given, rows, rest, K), factors, K)
            store_rows(gradient.slope, rows, slope)  # `gradient` has one for each block: here the others are zero
