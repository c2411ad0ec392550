"""Where a program's tile lies, and what its rows ask for.

Logits of any layout are (outer, inner, class) with three strides. A program owns ROWS consecutive values of
`inner` under one value of `outer`. Row (o, i) has the number o * row_outer + i * row_inner, which is where its
target, its loss and its summary stand. Offsets of rows are 64-bit; those within a tile are 32-bit unless WIDE.

A row is held in two pieces. The body is BLOCK classes, a power of two. The rest, if there is one, is REST more: what a
body of a smaller power of two leaves or, where rows start at any element, the classes at the two ends of a row that
fill no aligned vector (EDGE logits), so that the body is whole vectors.

Accesses are as wide as the compiler can prove aligned. Of an integer argument it knows at most that 16 divides it;
CLASS_VEC says what divides the number of classes and the strides across which classes are neighbours in memory,
ROW_VEC the same of rows. One of the two is 1.
"""

import triton
import triton.language as tl

from .math import dense_mass, point_mass


@triton.jit
def multiple(x, VEC: tl.constexpr):
    """x, which is a multiple of VEC, so that the compiler sees it."""
    if VEC > 1:
        x = x // VEC * VEC
    return x


@triton.jit
def program_rows(pid, inner, row_outer, row_inner, ROWS: tl.constexpr, ROW_VEC: tl.constexpr):
    """(outer, first inner, row numbers, mask of the rows that exist) of program `pid`."""
    blocks = tl.cdiv(inner, ROWS)
    outer = (pid // blocks).to(tl.int64)
    first = ((pid % blocks) * ROWS).to(tl.int64)
    i = first + tl.arange(0, ROWS)
    return outer, first, outer * row_outer + i * row_inner, i < multiple(inner, ROW_VEC)


@triton.jit
def row_offsets(
    outer,
    first,
    s_outer,
    s_inner,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    CLASS_VEC: tl.constexpr,
    ROW_VEC: tl.constexpr,
):
    """Where class 0 of each of the program's rows stands, [ROWS], in elements."""
    lane = tl.arange(0, ROWS)
    if WIDE:
        lane = lane.to(tl.int64)
    s_inner = multiple(s_inner, CLASS_VEC)
    return outer * multiple(s_outer, CLASS_VEC * ROW_VEC) + first * s_inner + lane * s_inner


@triton.jit
def whole_vectors(offset, classes, EDGE: tl.constexpr):
    """(classes before the first aligned vector of EDGE logits, classes that whole vectors hold), each [ROWS]."""
    skip = tl.minimum((-offset & (EDGE - 1)).to(tl.int32), classes)
    return skip, (classes - skip) // EDGE * EDGE


@triton.jit
def body_columns(offset, start, classes, BLOCK: tl.constexpr, EDGE: tl.constexpr, CLASS_VEC: tl.constexpr):
    """The body from its column `start` on: (first class, columns, mask); class = first class + column.

    Shapes: first class [ROWS]; columns [1, BLOCK]; mask [ROWS or 1, BLOCK].
    """
    column = start + tl.arange(0, BLOCK)[None, :]
    if EDGE > 0:
        skip, length = whole_vectors(offset, classes, EDGE)
        return skip, column, column < length[:, None]
    else:
        return tl.zeros(offset.shape, tl.int32), column, column < multiple(classes, CLASS_VEC)


@triton.jit
def rest_columns(offset, classes, BLOCK: tl.constexpr, REST: tl.constexpr, EDGE: tl.constexpr, CLASS_VEC: tl.constexpr):
    """The rest of the row, as `body_columns` has it, but columns [ROWS or 1, REST]; its first class is 0."""
    column = tl.arange(0, REST)[None, :]
    if EDGE > 0:
        skip, length = whole_vectors(offset, classes, EDGE)
        c = tl.where(column < REST // 2, column, (skip + length)[:, None] + column - REST // 2)
        return tl.zeros_like(skip), c, tl.where(column < REST // 2, column < skip[:, None], c < classes)
    else:
        c = BLOCK + column
        return tl.zeros(offset.shape, tl.int32), c, c < multiple(classes, CLASS_VEC)


@triton.jit
def tile_pointers(ptr, offset, column, s_class, WIDE: tl.constexpr, ROW_VEC: tl.constexpr):
    """Pointers to the columns of the rows that start at `offset`, [ROWS, BLOCK]."""
    if WIDE:
        column = column.to(tl.int64)
    return (ptr + offset)[:, None] + column * multiple(s_class, ROW_VEC)


@triton.jit
def load_at_index(ptr, offset, t, s_class, valid, WIDE: tl.constexpr, ACC: tl.constexpr):
    """Logit at the class index t of each row."""
    if WIDE:
        t = t.to(tl.int64)
    return tl.load(ptr + offset + t * s_class, mask=valid, other=0.0).to(ACC)


@triton.jit
def load_logits(
    ptr,
    offset,
    column,
    s_class,
    live,
    counted,
    inside,
    WIDE: tl.constexpr,
    ROW_VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    """Logits as ACC, and the mask of those that count; -inf outside the row and for ignored rows, which are not read.

    Where neighbours in memory are rows, one access takes several, and ignored ones can only be blanked.
    """
    pointers = tile_pointers(ptr, offset, column, s_class, WIDE, ROW_VEC)
    mask = counted[:, None] & inside
    if ROW_VEC == 1:
        z = tl.load(pointers, mask=mask, other=float("-inf")).to(ACC)
    else:
        z = tl.load(pointers, mask=live[:, None] & inside, other=float("-inf")).to(ACC)
        z = tl.where(mask, z, float("-inf"))
    return z, mask


@triton.jit
def class_index(target_ptr, row, live, ignore_index, classes):
    """Class index, mask of the rows that are not ignored, mask of those whose index is a class.

    The index is 0 where it is no class, so that nothing out of bounds is read or written for it.
    """
    t = tl.load(target_ptr + row, mask=live, other=0).to(tl.int64)
    counted = live & (t != ignore_index)
    valid = counted & (t >= 0) & (t < classes)
    return tl.where(valid, t, 0).to(tl.int32), counted, valid


@triton.jit
def index_mass(weight_ptr, t, counted, valid, smoothing, SMOOTH: tl.constexpr, ACC: tl.constexpr):
    """The point mass of each row: 0 if it is ignored; NaN where the target is no class, so that the row's loss and
    gradient are."""
    w = tl.where(valid, 1.0, 0.0).to(ACC)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + t, mask=valid, other=0.0).to(ACC)
    return tl.where(valid, point_mass(w, smoothing, SMOOTH, ACC), tl.where(counted, float("nan"), 0.0))


@triton.jit
def tile_mass(
    q_ptr,
    q_offset,
    q_class,
    weight_ptr,
    column,
    skip,
    mask,
    smoothing,
    classes,
    SMOOTH: tl.constexpr,
    WIDE: tl.constexpr,
    ROW_VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    """Dense target mass of the classes skip + column, [ROWS, BLOCK], 0 outside `mask`."""
    w = tl.where(mask, 1.0, 0.0).to(ACC)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + skip[:, None] + column, mask=mask, other=0.0).to(ACC)
    q = None
    if q_ptr is not None:
        q = tl.load(tile_pointers(q_ptr, q_offset, column, q_class, WIDE, ROW_VEC), mask=mask, other=0.0).to(ACC)
    return tl.where(mask, dense_mass(w, q, smoothing, classes, SMOOTH, ACC), 0.0)


@triton.jit
def scaled_mass(b, t, point, column, scale):
    """scale * (target mass of the columns), [ROWS, BLOCK].

    b is its dense part, t the column that the point mass stands at; either may be None.
    """
    if t is None:
        return b * scale[:, None]
    else:
        at_index = tl.where(column == t[:, None], (point * scale)[:, None], 0.0)
        if b is None:
            return at_index
        else:
            return b * scale[:, None] + at_index


@triton.jit
def store_gradient(ptr, offset, column, s_class, live, inside, gradient, WIDE: tl.constexpr, ROW_VEC: tl.constexpr):
    tl.store(
        tile_pointers(ptr, offset, column, s_class, WIDE, ROW_VEC),
        gradient.to(ptr.dtype.element_ty),
        mask=live[:, None] & inside,
    )


@triton.jit
def rows_weight(target_ptr, weight_ptr, row, mask, ignore_index, classes, ACC: tl.constexpr):
    """What each row counts for in a mean: 1 or its target's weight; 0 if it is ignored or its target is no class."""
    t = tl.load(target_ptr + row, mask=mask, other=-1).to(tl.int64)
    valid = mask & (t != ignore_index) & (t >= 0) & (t < classes)
    if weight_ptr is None:
        return valid.to(ACC)
    else:
        return tl.load(weight_ptr + t, mask=valid, other=0.0).to(ACC)


@triton.jit
def normalizer(
    normalizer_ptr,
    divisor,
    target_ptr,
    weight_ptr,
    rows,
    ignore_index,
    classes,
    PARTS: tl.constexpr,
    COUNT: tl.constexpr,
    ACC: tl.constexpr,
):
    """What the mean divides by: the sum of PARTS partial sums, or of the weights of at most COUNT rows, which are
    added up here, or `divisor` where the host knows it."""
    if normalizer_ptr is not None:
        return tl.sum(tl.load(normalizer_ptr + tl.arange(0, PARTS)), 0)
    elif COUNT > 0:
        row = tl.arange(0, COUNT)
        return tl.sum(rows_weight(target_ptr, weight_ptr, row, row < rows, ignore_index, classes, ACC), 0)
    else:
        return tl.full((), divisor, ACC)


@triton.jit
def was_expected(upstream_ptr, expected_ptr, seen_ptr, ACC: tl.constexpr):
    """Whether the upstream gradient is the expected one; notes it."""
    upstream = tl.load(upstream_ptr).to(ACC)
    if tl.program_id(0) == 0:
        tl.store(seen_ptr, upstream)
    return upstream == tl.load(expected_ptr)


@triton.jit
def row_scale(upstream_ptr, normalizer, row, counted, PER_ROW: tl.constexpr, ACC: tl.constexpr):
    """Upstream gradient over the normaliser, one number for each row; 0 if it is ignored."""
    if PER_ROW:
        scale = tl.load(upstream_ptr + row, mask=counted, other=0.0).to(ACC)
    else:
        scale = tl.full(row.shape, 1.0, ACC) * tl.load(upstream_ptr).to(ACC)
    return tl.where(counted, scale / normalizer, 0.0)


@triton.jit
def store_loss(loss_ptr, tile, loss, row, live, counted, PER_ROW: tl.constexpr):
    """One loss for each row, or the sum over the rows of the tile; 0 for ignored rows."""
    loss = tl.where(counted, loss, 0.0)
    if PER_ROW:
        tl.store(loss_ptr + row, loss, mask=live)
    else:
        tl.store(loss_ptr + tile, tl.sum(loss, 0))
