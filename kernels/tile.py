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

from .math import (
    best_of,
    dense_dot,
    dense_mass,
    entropy,
    entropy_gradient,
    gradient_mass,
    origin,
    point_mass,
    row_factor,
    row_gradient,
    row_loss,
    softcapped,
    spread_of,
)


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
def transformed(x, logit_scale_ptr, softcap_ptr, ACC: tl.constexpr):
    """z, of which the loss is the softmax cross entropy."""
    if logit_scale_ptr is not None:
        x = x * tl.load(logit_scale_ptr)
    if softcap_ptr is not None:
        x = softcapped(x, tl.load(softcap_ptr), ACC)
    return x


@triton.jit
def through_transform(g, x, z, mask, logit_scale_ptr, softcap_ptr, SLOPE: tl.constexpr):
    """From the gradient with respect to z to that with respect to x, and each row's slope (see xent_ext.problem)."""
    if softcap_ptr is not None:
        y = z / tl.load(softcap_ptr)
        g = tl.where(mask, g * (1.0 - y * y), 0.0)
    slope = tl.zeros((g.shape[0],), g.dtype)
    if SLOPE:
        slope = tl.sum(tl.where(mask & (g != 0), g * x, 0.0), 1)
    if logit_scale_ptr is not None:
        g = g * tl.load(logit_scale_ptr)
    return g, slope


@triton.jit
def load_at_index(ptr, offset, t, s_class, valid, logit_scale_ptr, softcap_ptr, WIDE: tl.constexpr, ACC: tl.constexpr):
    """z at the class index t of each row."""
    if WIDE:
        t = t.to(tl.int64)
    x = tl.load(ptr + offset + t * s_class, mask=valid, other=0.0).to(ACC)
    return transformed(x, logit_scale_ptr, softcap_ptr, ACC)


@triton.jit
def load_logits(
    ptr,
    offset,
    column,
    s_class,
    live,
    counted,
    inside,
    logit_scale_ptr,
    softcap_ptr,
    WIDE: tl.constexpr,
    ROW_VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    """Logits as ACC, z, and the mask of those that count; -inf outside the row and for ignored rows.

    Ignored rows are not read but where neighbours in memory are rows: one access takes several, which are blanked.
    """
    pointers = tile_pointers(ptr, offset, column, s_class, WIDE, ROW_VEC)
    mask = counted[:, None] & inside
    if ROW_VEC == 1:
        x = tl.load(pointers, mask=mask, other=float("-inf")).to(ACC)
    else:
        some = live.to(tl.int32) * tl.max(counted.to(tl.int32), 0) > 0
        x = tl.load(pointers, mask=some[:, None] & inside, other=float("-inf")).to(ACC)
        x = tl.where(mask, x, float("-inf"))
    z = x
    if logit_scale_ptr is not None or softcap_ptr is not None:
        z = tl.where(mask, transformed(x, logit_scale_ptr, softcap_ptr, ACC), float("-inf"))
    return x, z, mask


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
def load_probabilities(
    q_ptr, offset, column, q_class, mask, WIDE: tl.constexpr, ROW_VEC: tl.constexpr, ACC: tl.constexpr
):
    """Probabilities of the columns, [ROWS, BLOCK], 0 outside `mask`."""
    return tl.load(tile_pointers(q_ptr, offset, column, q_class, WIDE, ROW_VEC), mask=mask, other=0.0).to(ACC)


@triton.jit
def tile_mass(q, weight_ptr, column, skip, mask, smoothing, classes, SMOOTH: tl.constexpr, ACC: tl.constexpr):
    """Dense target mass of the classes skip + column, [ROWS, BLOCK], 0 outside `mask`; q is None for class indices."""
    w = tl.where(mask, 1.0, 0.0).to(ACC)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + skip[:, None] + column, mask=mask, other=0.0).to(ACC)
    return tl.where(mask, dense_mass(w, q, smoothing, classes, SMOOTH, ACC), 0.0)


@triton.jit
def summarised(e, z, b, q, m, mask, column, skip, classes, ENTROPY: tl.constexpr, PREDICT: tl.constexpr):
    """What a tile adds to its rows' summaries, which are relative to m (see math.py)."""
    mass = tl.zeros(m.shape, m.dtype)
    dot, spread, total, cross = mass, mass, mass, mass
    best = tl.zeros(m.shape, tl.int32)
    if b is not None:
        mass = tl.sum(b, 1)
        dot = dense_dot(b, z, m, mask)
    if ENTROPY:
        spread = spread_of(e, z, m)
    if q is not None:
        total = tl.sum(q, 1)
        cross = dense_dot(q, z, m, mask)
    if PREDICT:
        best = best_of(z, m, skip[:, None] + column, classes)
    return tl.sum(e, 1), mass, dot, spread, total, cross, best


@triton.jit
def store_gradient(ptr, offset, column, s_class, live, inside, gradient, WIDE: tl.constexpr, ROW_VEC: tl.constexpr):
    tl.store(
        tile_pointers(ptr, offset, column, s_class, WIDE, ROW_VEC),
        gradient.to(ptr.dtype.element_ty),
        mask=live[:, None] & inside,
    )


@triton.jit
def rows_weight(target_ptr, weight_ptr, sample_weight_ptr, row, mask, ignore_index, classes, ACC: tl.constexpr):
    """What each row counts for in a mean: 1 or its target's weight, times its sample weight.

    0 if it is ignored or its target is no class. `target_ptr` is None for probabilities.
    """
    w = mask.to(ACC)
    if target_ptr is not None:
        t = tl.load(target_ptr + row, mask=mask, other=-1).to(tl.int64)
        mask = mask & (t != ignore_index) & (t >= 0) & (t < classes)
        w = mask.to(ACC)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + t, mask=mask, other=0.0).to(ACC)
    if sample_weight_ptr is not None:
        w *= tl.load(sample_weight_ptr + row, mask=mask, other=0.0)
    return w


@triton.jit
def normalizer(
    normalizer_ptr,
    divisor,
    target_ptr,
    weight_ptr,
    sample_weight_ptr,
    rows,
    ignore_index,
    classes,
    PARTS: tl.constexpr,
    COUNT: tl.constexpr,
    NOT_ZERO: tl.constexpr,
    ACC: tl.constexpr,
):
    """What the mean divides by: the sum of PARTS partial sums, or of the weights of at most COUNT rows, which are
    added up here, or `divisor` where the host knows it. Infinity in place of 0 if NOT_ZERO."""
    if normalizer_ptr is not None:
        total = tl.sum(tl.load(normalizer_ptr + tl.arange(0, PARTS)), 0)
    elif COUNT > 0:
        row = tl.arange(0, COUNT)
        weights = rows_weight(target_ptr, weight_ptr, sample_weight_ptr, row, row < rows, ignore_index, classes, ACC)
        total = tl.sum(weights, 0)
    else:
        total = tl.full((), divisor, ACC)
    if NOT_ZERO:
        total = tl.where(total == 0, float("inf"), total)
    return total


@triton.jit
def share_of(items):
    """How many of the items this program does, of n programs: that of its own number, and every n-th after it."""
    return tl.cdiv(items - tl.program_id(0), tl.num_programs(0))


@triton.jit
def was_expected(upstream_ptr, expected_ptr, seen_ptr, ACC: tl.constexpr):
    """Whether the upstream gradient is the expected one; notes it."""
    upstream = tl.load(upstream_ptr).to(ACC)
    if tl.program_id(0) == 0:
        tl.store(seen_ptr, upstream)
    return upstream == tl.load(expected_ptr)


@triton.jit
def loss_weight(sample_weight_ptr, row, counted, ACC: tl.constexpr):
    """The factor of each row's loss; 0 if it is ignored."""
    if sample_weight_ptr is None:
        return tl.where(counted, 1.0, 0.0).to(ACC)
    else:
        return tl.load(sample_weight_ptr + row, mask=counted, other=0.0)


@triton.jit
def row_scale(upstream_ptr, normalizer, weight, row, counted, PER_ROW: tl.constexpr, ACC: tl.constexpr):
    """Upstream gradient times the row's weight over the normaliser, one number for each row; 0 if it is ignored."""
    if PER_ROW:
        scale = tl.load(upstream_ptr + row, mask=counted, other=0.0).to(ACC)
    else:
        scale = tl.full(row.shape, 1.0, ACC) * tl.load(upstream_ptr).to(ACC)
    return tl.where(counted, scale * weight / normalizer, 0.0)


@triton.jit
def row_factors(
    m,
    s,
    mass,
    total,
    point,
    scale,
    z_loss_ptr,
    stats_upstream_ptr,
    rows,
    row,
    counted,
    POINT: tl.constexpr,  # the target is a class index
):
    """What `tile_gradient` multiplies by: exp(z - m), [c == t], q, the entropy's gradient; one number for each row."""
    mass = scale * gradient_mass(m, s, mass, z_loss_ptr)
    point = point * scale
    logprob = tl.zeros(m.shape, m.dtype)
    of_entropy = logprob
    if stats_upstream_ptr is not None:
        # [3, rows]: the upstream gradients of logprob, lse and entropy.
        logprob = tl.load(stats_upstream_ptr + row, mask=counted, other=0.0)
        mass += tl.load(stats_upstream_ptr + rows + row, mask=counted, other=0.0)
        of_entropy = tl.load(stats_upstream_ptr + 2 * rows + row, mask=counted, other=0.0)
        if POINT:
            mass -= logprob
            point -= logprob
        else:
            mass -= logprob * total
    return row_factor(s, mass, counted), point, logprob, of_entropy


@triton.jit
def at_column(column, t, value, VEC: tl.constexpr):
    """`value` in column t of each row, 0 elsewhere.

    Where a thread holds several vectors of VEC columns of a row, two comparisons take half the instructions of one for
    each column: one with a place in a vector, which is the same for all of them, and one for each vector.
    """
    t, value = t[:, None], value[:, None]
    in_vector = tl.where(column % VEC == t % VEC, value, 0.0)
    return tl.where(column // VEC == t // VEC, in_vector, 0.0)


@triton.jit
def tile_gradient(
    x,
    z,
    e,
    b,
    q,
    m,
    s,
    spread,
    scale,
    factor,
    point,
    of_logprob,
    of_entropy,
    t,
    column,
    mask,
    logit_scale_ptr,
    softcap_ptr,
    stats_upstream_ptr,
    VEC: tl.constexpr,
    ENTROPY: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Gradient of a tile, [ROWS, BLOCK], and the slope that it adds to its rows.

    b, the dense mass, q and t, the column that the point mass stands at, may be None.
    """
    minus_b = tl.zeros((1, 1), m.dtype)
    if t is not None:
        minus_b = at_column(column, t, -point, VEC)
    if b is not None:
        minus_b -= b * scale[:, None]
    if stats_upstream_ptr is not None:
        if q is not None:
            minus_b += q * of_logprob[:, None]
    g = row_gradient(e, factor, minus_b)
    if stats_upstream_ptr is not None:
        if ENTROPY:
            g += entropy_gradient(e, z, m, s, spread, of_entropy)
    return through_transform(g, x, z, mask, logit_scale_ptr, softcap_ptr, SLOPE)


@triton.jit
def store_results(
    loss_ptr,
    row_losses_ptr,
    stats_ptr,
    predicted_ptr,
    z_loss_ptr,
    tile,
    rows,
    row,
    live,
    counted,
    weight,
    z_t,
    m,
    s,
    mass,
    dot,
    spread,
    total,
    cross,
    best,
    classes,
    PER_ROW: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """What is wanted of a row's summary; 0 for ignored rows, and a predicted class of -1.

    The loss is one for each row, or the sum over the rows of the tile. `z_t` is z at the class index; None for
    probabilities.
    """
    loss = tl.where(counted, row_loss(m, s, mass, dot, z_loss_ptr), 0.0)
    if row_losses_ptr is not None:
        tl.store(row_losses_ptr + row, loss, mask=live)
    loss = tl.where(counted, loss * weight, 0.0)
    if PER_ROW:
        tl.store(loss_ptr + row, loss, mask=live)
    else:
        tl.store(loss_ptr + tile, tl.sum(loss, 0))
    if stats_ptr is not None:
        # [4, rows]: logprob, lse, entropy, max_prob.
        if z_t is None:  # noqa: SIM108 (a conditional expression would compile both)
            logprob = cross - total * tl.log(s)
        else:
            logprob = z_t - origin(m) - tl.log(s)
        tl.store(stats_ptr + row, tl.where(counted, logprob, 0.0), mask=live)
        tl.store(stats_ptr + rows + row, tl.where(counted, m + tl.log(s), 0.0), mask=live)
        if ENTROPY:
            tl.store(stats_ptr + 2 * rows + row, tl.where(counted, entropy(s, spread), 0.0), mask=live)
        tl.store(stats_ptr + 3 * rows + row, tl.where(counted, 1 / s, 0.0), mask=live)
    if predicted_ptr is not None:
        tl.store(predicted_ptr + row, tl.where(counted, best % classes, -1).to(tl.int64), mask=live)
