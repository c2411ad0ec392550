"""How the logits of a tile are read: in pieces.

A row is held in two pieces. The body is BLOCK classes, a power of two. The rest, if there is one, is REST more: what a
body of a smaller power of two leaves or, where rows start at any element, the classes at the two ends of a row that
fill no aligned vector (EDGE logits), so that the body is whole vectors.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .math import Summary, best_of, dense_dot, dense_mass, exponentials, spread_of, widened
from .rows import multiple, row_offsets, transformed


class Columns(NamedTuple):
    """Columns of a tile's rows: classes, less each row's `skip`."""

    number: Any  # [1 or ROWS, BLOCK or REST]
    inside: Any  # whether the row has such a class


class Piece(NamedTuple):
    """What is read of some columns, [ROWS, BLOCK or REST]."""

    columns: Columns
    mask: Any  # those inside, of rows that are not ignored
    x: Any  # logits
    z: Any  # and what they are transformed to; -inf outside the mask
    q: Any  # probabilities, if they are the targets
    b: Any  # dense target mass, if there is any


@triton.jit
def body_of(rows, start, classes, K):
    """The body from its column `start` on."""
    column = start + tl.arange(0, K.BLOCK)[None, :]
    if K.EDGE > 0:
        return Columns(number=column, inside=column < whole_vectors(rows, classes, K))
    else:
        return Columns(number=column, inside=column < multiple(classes, K.CLASS_VEC))


@triton.jit
def rest_of(rows, classes, K):
    """The rest: what the body leaves of each row, or its two ends, half of the columns for each."""
    column = tl.arange(0, K.REST)[None, :]
    if K.EDGE > 0:
        column -= K.REST // 2
        column += tl.where(column < 0, 0, whole_vectors(rows, classes, K))
        c = rows.skip[:, None] + column
        return Columns(number=column, inside=(c >= 0) & (c < classes))
    else:
        column += K.BLOCK
        return Columns(number=column, inside=column < multiple(classes, K.CLASS_VEC))


@triton.jit
def whole_vectors(rows, classes, K):
    """Columns that fill whole vectors, [ROWS, 1]."""
    return ((classes - rows.skip) // K.EDGE * K.EDGE)[:, None]


@triton.jit
def pointers(view, rows, columns, K):
    """Pointers to the columns of the rows, [ROWS, BLOCK or REST]."""
    start = multiple(row_offsets(view, rows.outer, rows.inner, K) + rows.skip, K.EDGE)
    column = columns.number
    if K.WIDE:
        column = column.to(tl.int64)
    return (view.ptr + start)[:, None] + column * multiple(view.by_class, K.ROW_VEC)


@triton.jit
def read(given, rows, columns, K):
    """A piece of the rows. Ignored rows are not read but where neighbours in memory are rows: one access takes several,
    which are blanked."""
    at = pointers(given.logits, rows, columns, K)
    mask = rows.counted[:, None] & columns.inside
    if K.ROW_VEC == 1:
        x = widened(tl.load(at, mask=mask, other=float("-inf")), K)
    else:
        some = rows.live.to(tl.int32) * tl.max(rows.counted.to(tl.int32), 0) > 0
        x = widened(tl.load(at, mask=some[:, None] & columns.inside, other=float("-inf")), K)
        x = tl.where(mask, x, float("-inf"))
    z = x
    if given.transform.logit_scale is not None or given.transform.softcap is not None:
        z = tl.where(mask, transformed(x, given.transform), float("-inf"))
    q = tl.zeros((1, 1), x.dtype)
    b = q
    if given.target.probabilities is not None:
        at = pointers(given.target.probabilities, rows, columns, K)
        q = widened(tl.load(at, mask=mask, other=0.0), K)
    if K.DENSE:
        w = widened(tl.where(mask, 1.0, 0.0), K)
        if given.target.weight is not None:
            at = given.target.weight + rows.skip[:, None] + columns.number
            w = widened(tl.load(at, mask=mask, other=0.0), K)
        b = tl.where(mask, dense_mass(w, q, rows.smoothing, given.target, given.target.classes), 0.0)
    return Piece(columns=columns, mask=mask, x=x, z=z, q=q, b=b)


@triton.jit
def store(view, rows, columns, value, K):
    at = pointers(view, rows, columns, K)
    tl.store(at, value.to(view.ptr.dtype.element_ty), mask=rows.live[:, None] & columns.inside)


@triton.jit
def summarised(piece, m, rows, given, K):
    """What a piece adds to its rows' summaries, which are relative to m; without the point mass."""
    e = exponentials(piece.z, m)
    zero = tl.zeros_like(m)
    mass, dot, spread, total, cross, best = zero, zero, zero, zero, zero, zero.to(tl.int32)
    if K.DENSE:
        mass = tl.sum(piece.b, 1)
        dot = dense_dot(piece.b, piece.z, m, piece.mask)
    if K.ENTROPY:
        spread = spread_of(e, piece.z, m)
    if given.target.probabilities is not None:
        total = tl.sum(piece.q, 1)
        cross = dense_dot(piece.q, piece.z, m, piece.mask)
    if K.PREDICT:
        best = best_of(piece.z, m, rows.skip[:, None] + piece.columns.number, given.target.classes)
    return Summary(m=m, s=tl.sum(e, 1), mass=mass, dot=dot, spread=spread, total=total, cross=cross, best=best)
