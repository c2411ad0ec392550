"""Rows' summaries in memory, from the kernel that makes them to the one that goes on with them.

They are a tensor of [8 with STATS, else 4; rows; SPLITS].
"""

import triton
import triton.language as tl

from .math import Summary, merge_all


@triton.jit
def save(saved, row, rows, part, batch, K):
    """The summary of a part of each row."""
    each = batch * K.SPLITS
    at = saved + rows.number * K.SPLITS + part
    tl.store(at, row.m, mask=rows.counted)
    tl.store(at + each, row.s, mask=rows.counted)
    tl.store(at + 2 * each, row.mass, mask=rows.counted)
    tl.store(at + 3 * each, row.dot, mask=rows.counted)
    if K.STATS:
        tl.store(at + 4 * each, row.spread, mask=rows.counted)
        tl.store(at + 5 * each, row.total, mask=rows.counted)
        tl.store(at + 6 * each, row.cross, mask=rows.counted)
        # Its bits, as float32 does not have all integers.
        best = row.best.to(tl.int64) if K.DOUBLE else row.best
        tl.store(at + 7 * each, best.to(row.m.dtype, bitcast=True), mask=rows.counted)


@triton.jit
def load_saved(saved, rows, batch, classes, K):
    """The summary of each row, of all its parts."""
    each = batch * K.SPLITS
    at = saved + rows.number[:, None] * K.SPLITS + tl.arange(0, K.SPLITS)[None, :]
    mask = rows.counted[:, None]
    m = tl.load(at, mask=mask, other=0.0)
    s = tl.load(at + each, mask=mask, other=1.0)
    mass = tl.load(at + 2 * each, mask=mask, other=0.0)
    dot = tl.load(at + 3 * each, mask=mask, other=0.0)
    zero = tl.zeros_like(m)
    spread, total, cross, best = zero, zero, zero, zero.to(tl.int32)
    if K.STATS:
        spread = tl.load(at + 4 * each, mask=mask, other=0.0)
        total = tl.load(at + 5 * each, mask=mask, other=0.0)
        cross = tl.load(at + 6 * each, mask=mask, other=0.0)
        bits = tl.load(at + 7 * each, mask=mask, other=0.0)
        best = bits.to(tl.int64 if K.DOUBLE else tl.int32, bitcast=True).to(tl.int32)
    parts = Summary(m=m, s=s, mass=mass, dot=dot, spread=spread, total=total, cross=cross, best=best)
    return merge_all(parts, classes, K)
