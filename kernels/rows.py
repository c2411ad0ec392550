"""The rows that a program has, and what their targets ask for.

Logits of any layout are (outer, inner, class) with three strides. A tile is ROWS consecutive values of `inner` under
one value of `outer`. A row's number says where its target, its loss and its summary stand. Offsets of rows are 64-bit;
those within a tile are 32-bit unless WIDE.

Accesses are as wide as the compiler can prove aligned. Of an integer argument it knows at most that 16 divides it;
CLASS_VEC says what divides the number of classes and the strides across which classes are neighbours in memory,
ROW_VEC the same of rows. One of the two is 1.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .math import point_mass, softcapped, widened


class Rows(NamedTuple):
    """The rows of a tile: [ROWS] of each but `tile`, `outer`, `inner` and `smoothing`."""

    tile: Any
    outer: Any
    inner: Any  # of the first row
    skip: Any  # columns are counted from this class on, which starts a vector (see pieces.py)
    number: Any
    live: Any  # whether there is such a row
    counted: Any  # and it is not ignored
    target: Any  # its class; 0 where that is no class, so that nothing out of bounds is read or written for it
    point: Any  # target mass at that class
    z: Any  # z at that class
    weight: Any  # what its loss is multiplied by
    smoothing: Any


@triton.jit
def share_of(items):
    """How many of the items this program does, of n programs: that of its own number, and every n-th after it."""
    return tl.cdiv(items - tl.program_id(0), tl.num_programs(0))


@triton.jit
def multiple(x, VEC: tl.constexpr):
    """x, which is a multiple of VEC, so that the compiler sees it."""
    if VEC > 1:
        x = x // VEC * VEC
    return x


@triton.jit
def row_offsets(view, outer, inner, K):
    """Where class 0 of each of the rows stands, [ROWS], in elements."""
    lane = tl.arange(0, K.ROWS)
    if K.WIDE:
        lane = lane.to(tl.int64)
    by_inner = multiple(view.inner, K.CLASS_VEC)
    return outer * multiple(view.outer, K.CLASS_VEC * K.ROW_VEC) + inner * by_inner + lane * by_inner


@triton.jit
def rows_of(tile, given, ignore_index, K):
    """The rows of a tile."""
    blocks = tl.cdiv(given.inner, K.ROWS)
    outer = (tile // blocks).to(tl.int64)
    inner = ((tile % blocks) * K.ROWS).to(tl.int64)
    each = inner + tl.arange(0, K.ROWS)
    number = outer * given.row_outer + each * given.row_inner
    live = each < multiple(given.inner, K.ROW_VEC)
    start = row_offsets(given.logits, outer, inner, K)

    target = given.target
    zero = tl.zeros_like(tl.arange(0, K.ROWS))
    skip, t, counted, point, z = zero, zero, live, widened(zero, K), widened(zero, K)
    if K.EDGE > 0:
        skip = tl.minimum((-start & (K.EDGE - 1)).to(tl.int32), given.target.classes)
    smoothing = tl.zeros((), tl.float32)
    if target.smoothing is not None:
        smoothing = tl.load(target.smoothing)
    if target.indices is not None:
        t = tl.load(target.indices + number, mask=live, other=0).to(tl.int64)
        counted = live & (t != ignore_index)
        valid = counted & (t >= 0) & (t < given.target.classes)
        t = tl.where(valid, t, 0).to(tl.int32)
        w = widened(tl.where(valid, 1.0, 0.0), K)
        if target.weight is not None:
            w = widened(tl.load(target.weight + t, mask=valid, other=0.0), K)
        # NaN where the target is no class, so that the row's loss and gradient are.
        point = tl.where(valid, point_mass(w, smoothing), tl.where(counted, float("nan"), 0.0))
        # Read before the sums over the rows, which all threads wait for: the gradient may take the logits' memory.
        at = t.to(tl.int64) if K.WIDE else t
        x = tl.load(given.logits.ptr + start + at * given.logits.by_class, mask=valid, other=0.0)
        z = transformed(widened(x, K), given.transform)
    weight = widened(tl.where(counted, 1.0, 0.0), K)
    if target.sample_weight is not None:
        weight = tl.load(target.sample_weight + number, mask=counted, other=0.0)
    return Rows(
        tile=tile, outer=outer, inner=inner, skip=skip, number=number, live=live, counted=counted, target=t,
        point=point, z=z, weight=weight, smoothing=smoothing,
    )  # fmt: skip


@triton.jit
def transformed(x, transform):
    """z, of which the loss is the softmax cross entropy."""
    if transform.logit_scale is not None:
        x = x * tl.load(transform.logit_scale)
    if transform.softcap is not None:
        x = softcapped(x, tl.load(transform.softcap))
    return x


@triton.jit
def load_rows(ptr, rows):
    """A number of each row; 0 if it is ignored."""
    return tl.load(ptr + rows.number, mask=rows.counted, other=0.0)


@triton.jit
def store_rows(ptr, rows, value):
    """A number of each row, 0 if it is ignored; nothing where it is not wanted."""
    if ptr is not None:
        tl.store(ptr + rows.number, tl.where(rows.counted, value, 0.0), mask=rows.live)
