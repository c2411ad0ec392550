"""Rows' summaries in memory, from the kernel that makes them to the one that goes on with them.

They are a tensor of [parts, FIELDS, rows]: the parts of a row are those of the programs that share it or, gathered,
those of the ranks that share the classes. `collect` makes one of a rank's.
"""

import triton
import triton.language as tl

from .arguments import Given
from .math import Summary, merge_all, point_dot, widened
from .outcome import with_point
from .rows import all_classes, rows_of


@triton.jit
def save(saved, row, rows, part, batch, K):
    """The summary of a part of each row."""
    at = saved + part * K.FIELDS * batch + rows.number
    tl.store(at, row.m, mask=rows.counted)
    tl.store(at + batch, row.s, mask=rows.counted)
    tl.store(at + 2 * batch, row.mass, mask=rows.counted)
    tl.store(at + 3 * batch, row.dot, mask=rows.counted)
    if K.STATS:
        tl.store(at + 4 * batch, row.spread, mask=rows.counted)
        tl.store(at + 5 * batch, row.total, mask=rows.counted)
        tl.store(at + 6 * batch, row.cross, mask=rows.counted)
        # Its bits, as float32 does not have all integers.
        best = row.best.to(tl.int64) if K.DOUBLE else row.best
        tl.store(at + 7 * batch, best.to(row.m.dtype, bitcast=True), mask=rows.counted)


@triton.jit
def load_saved(saved, rows, batch, classes, K):
    """The summary of each row, of all its parts; with its point mass if they were gathered."""
    part = tl.arange(0, K.SPLITS)[None, :]
    at = saved + part * K.FIELDS * batch + rows.number[:, None]
    mask = rows.counted[:, None]
    if K.RANKS > 0:
        mask = mask & (part < K.RANKS)
    m = tl.load(at, mask=mask, other=0.0)
    s = tl.load(at + batch, mask=mask, other=1.0)
    mass = tl.load(at + 2 * batch, mask=mask, other=0.0)
    dot = tl.load(at + 3 * batch, mask=mask, other=0.0)
    zero = tl.zeros_like(m)
    spread, total, cross, best = zero, zero, zero, zero.to(tl.int32)
    if K.STATS:
        spread = tl.load(at + 4 * batch, mask=mask, other=0.0)
        total = tl.load(at + 5 * batch, mask=mask, other=0.0)
        cross = tl.load(at + 6 * batch, mask=mask, other=0.0)
        bits = tl.load(at + 7 * batch, mask=mask, other=0.0)
        best = bits.to(tl.int64 if K.DOUBLE else tl.int32, bitcast=True).to(tl.int32)
    if K.RANKS > 0:  # there are as many parts as ranks, not a power of two
        m = tl.where(part < K.RANKS, m, float("-inf"))
        s = tl.where(part < K.RANKS, s, 0.0)
        best = tl.where(part < K.RANKS, best, 2 * classes)
    parts = Summary(m=m, s=s, mass=mass, dot=dot, spread=spread, total=total, cross=cross, best=best)
    return merge_all(parts, classes, K)


@triton.jit(do_not_specialize=["batch", "tiles", "ignore_index"])
def collect(
    given: Given,
    saved,
    packed,  # [FIELDS, rows]
    batch: tl.int64,  # rows
    tiles,
    ignore_index: tl.int64,
    K: tl.constexpr,  # Constants
):
    """The summary of a rank's part of each row, with its point mass, as it goes to the other ranks."""
    rows = rows_of(tl.program_id(0), given, ignore_index, K)
    row = with_point(load_saved(saved, rows, batch, all_classes(given.target), K), rows)
    if K.STATS and given.target.indices is not None:
        # As if the class index were probabilities, as another rank has its logit.
        here = widened(tl.where(rows.here, 1.0, 0.0), K)
        cross = point_dot(here, rows.z, row.m)
        row = Summary(
            m=row.m, s=row.s, mass=row.mass, dot=row.dot, spread=row.spread, total=here, cross=cross, best=row.best
        )
    save(packed, row, rows, 0, batch, K)
