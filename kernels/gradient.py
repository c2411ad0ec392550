"""Schedule `gradient`: from the saved summary of each row, every logit read once.

It makes deferred gradients and, after the parts of split rows were summarised, the loss as well.
"""

import triton
import triton.language as tl

from .arguments import Given, Gradient, Results
from .math import widened
from .normalizer import divisor
from .outcome import factors_of, rows_to_store, store_gradient, store_results, was_expected, with_point
from .pieces import body_of, read, rest_of, store
from .rows import rows_of, share_of, store_rows
from .saved import load_saved


@triton.jit(do_not_specialize=["batch", "tiles", "ignore_index"])
def gradient(
    given: Given,
    results: Results,
    gradient: Gradient,
    saved,
    batch: tl.int64,  # rows
    tiles,
    ignore_index: tl.int64,
    K: tl.constexpr,  # Constants
):
    if gradient.seen is not None and was_expected(gradient, K):
        return
    blocks = 1 if gradient.view is None else tl.cdiv(given.target.classes, K.BLOCK)
    turns = share_of(tiles * blocks) if K.TURNS else 1  # a constant: no loop is compiled
    for turn in range(turns):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        block = item % blocks
        rows = rows_of(item // blocks, given, ignore_index, K)
        row = with_point(load_saved(saved, rows, batch, given.target.classes, K), rows)

        if results.loss is not None:
            if block == 0:
                store_results(results, given, rows, row, 1.0, K)
        if gradient.view is not None:
            total = divisor(gradient.normalizer, given.target, batch, ignore_index, K)
            rows = rows_to_store(rows, gradient)
            factors = factors_of(gradient, given, rows, row, total, K)
            body = read(given, rows, body_of(rows, block * K.BLOCK, given.target.classes, K), K)
            slope = store_gradient(gradient, given, rows, body, factors, K)
            if K.REST > 0:
                if block == 0:
                    rest = read(given, rows, rest_of(rows, given.target.classes, K), K)
                    slope += store_gradient(gradient, given, rows, rest, factors, K)
            if gradient.slope is not None:
                store_rows(gradient.slope + block * batch, rows, slope)


@triton.jit(do_not_specialize=["tiles"])
def rescale(
    given: Given,  # in place of the logits it has their gradient
    gradient: Gradient,
    tiles,
    K: tl.constexpr,  # Constants
):
    """Multiply the gradient that was made for the expected upstream gradient by what came over that."""
    if was_expected(gradient, K):
        return
    blocks = tl.cdiv(given.target.classes, K.BLOCK)
    factor = widened(tl.load(gradient.upstream.loss), K) / tl.load(gradient.expected)
    for item in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = rows_of(item // blocks, given, 0, K)
        piece = read(given, rows, body_of(rows, (item % blocks) * K.BLOCK, given.target.classes, K), K)
        store(gradient.view, rows, piece.columns, piece.x * factor, K)
