"""Schedule `resident`: whole rows in the registers of one program, each logit read once."""

import triton
import triton.language as tl

from .arguments import Given, Gradient, Results
from .math import joined
from .normalizer import divisor
from .outcome import factors_of, rows_to_store, store_gradient, store_results, was_expected, with_point
from .pieces import body_of, read, rest_of, summarised
from .rows import rows_of, share_of, store_rows


@triton.jit(do_not_specialize=["batch", "tiles", "ignore_index"])
def resident(
    given: Given,
    results: Results,
    gradient: Gradient,
    batch: tl.int64,  # rows
    tiles,
    ignore_index: tl.int64,
    K: tl.constexpr,  # Constants
):
    if gradient.seen is not None and was_expected(gradient, K):
        return
    turns = share_of(tiles) if K.TURNS else 1  # a constant: no loop is compiled
    for turn in range(turns):
        rows = rows_of(tl.program_id(0) + turn * tl.num_programs(0), given, ignore_index, K)

        body = read(given, rows, body_of(rows, 0, given.target.classes, K), K)
        m = tl.max(body.z, 1)
        if K.REST > 0:
            rest = read(given, rows, rest_of(rows, given.target.classes, K), K)
            m = tl.maximum(m, tl.max(rest.z, 1))
        row = summarised(body, m, rows, given, K)
        if K.REST > 0:
            row = joined(row, summarised(rest, m, rows, given, K))
        row = with_point(row, rows)

        total = 1.0
        if gradient.view is not None or K.WHOLE:
            total = divisor(gradient.normalizer, given.target, batch, ignore_index, K)
        if results.loss is not None:
            store_results(results, given, rows, row, total, K)
        if gradient.view is not None:
            rows = rows_to_store(rows, gradient)
            factors = factors_of(gradient, given, rows, row, total, K)
            slope = store_gradient(gradient, given, rows, body, factors, K)
            if K.REST > 0:
                slope += store_gradient(gradient, given, rows, rest, factors, K)
            store_rows(gradient.slope, rows, slope)
