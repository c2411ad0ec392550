"""Schedule `gradient`: from the saved summary of each row, every logit read once.

It makes deferred gradients and, after the parts of split rows were summarised, the loss as well.
"""

import triton
import triton.language as tl

from .math import exponentials, merge_all, point_dot, row_factor, row_gradient, row_loss
from .tile import (
    body_columns,
    class_index,
    index_mass,
    load_at_index,
    load_logits,
    multiple,
    normalizer,
    program_rows,
    rest_columns,
    row_offsets,
    row_scale,
    scaled_mass,
    store_gradient,
    store_loss,
    tile_mass,
    was_expected,
)


@triton.jit
def piece_gradient(
    x_ptr,
    x_offset,
    x_class,
    q_ptr,
    q_offset,
    q_class,
    grad_ptr,
    g_offset,
    g_class,
    weight_ptr,
    column,
    skip,
    t,
    point,
    m,
    factor,
    scale,
    live,
    counted,
    inside,
    smoothing,
    classes,
    SMOOTH: tl.constexpr,
    WIDE: tl.constexpr,
    ROW_VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    """Read the logits of the classes skip + column, write their gradient. Ignored rows get zeros and are not read."""
    z, mask = load_logits(x_ptr, x_offset, column, x_class, live, counted, inside, WIDE, ROW_VEC, ACC)
    b = None
    if SMOOTH or q_ptr is not None:
        b = tile_mass(
            q_ptr, q_offset, q_class, weight_ptr, column, skip, mask, smoothing, classes, SMOOTH, WIDE, ROW_VEC, ACC
        )
    t_column = None if t is None else t - skip
    g = row_gradient(exponentials(z, m), factor, scaled_mass(b, t_column, point, column, scale))
    store_gradient(grad_ptr, g_offset, column, g_class, live, inside, g, WIDE, ROW_VEC)


@triton.jit
def store_summary(summary_ptr, rows, row, part, m, s, mass, dot, mask, SPLITS: tl.constexpr):
    """A part's summary of each row. The tensor is [4, rows, SPLITS]: m, s, and mass and dot of the dense mass."""
    count = rows * SPLITS
    summary_ptr += row * SPLITS + part
    tl.store(summary_ptr, m, mask=mask)
    tl.store(summary_ptr + count, s, mask=mask)
    tl.store(summary_ptr + 2 * count, mass, mask=mask)
    tl.store(summary_ptr + 3 * count, dot, mask=mask)


@triton.jit
def load_summary(summary_ptr, rows, row, mask, SPLITS: tl.constexpr):
    """The summary of each row, of all its parts."""
    count = rows * SPLITS
    summary_ptr += row[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    m = tl.load(summary_ptr, mask=mask[:, None], other=0.0)
    s = tl.load(summary_ptr + count, mask=mask[:, None], other=1.0)
    mass = tl.load(summary_ptr + 2 * count, mask=mask[:, None], other=0.0)
    dot = tl.load(summary_ptr + 3 * count, mask=mask[:, None], other=0.0)
    return merge_all(m, s, mass, dot)


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def gradient(
    x_ptr,
    target_ptr,  # class indices, or None
    q_ptr,  # class probabilities, or None
    weight_ptr,  # None: all ones
    normalizer_ptr,  # None: the rows are counted here, or `divisor` is the normaliser
    upstream_ptr,
    expected_ptr,  # the upstream gradient that grad_ptr holds the gradient for already; None: it holds nothing
    seen_ptr,  # where the upstream gradient is noted, for the next step to expect
    summary_ptr,
    loss_ptr,  # None: no loss wanted
    grad_ptr,  # None: no gradient wanted
    rows: tl.int64,
    inner,
    classes,
    x_outer,
    x_inner,
    x_class,
    q_outer,
    q_inner,
    q_class,
    g_outer,
    g_inner,
    g_class,
    row_outer,
    row_inner,
    ignore_index: tl.int64,
    smoothing: tl.float64,
    divisor: tl.float64,
    SMOOTH: tl.constexpr,
    PER_ROW: tl.constexpr,  # losses and upstream gradients are one for each row
    PARTS: tl.constexpr,
    COUNT: tl.constexpr,
    SPLITS: tl.constexpr,  # parts that the summary has of each row
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,  # 0: the row has no second piece
    EDGE: tl.constexpr,
    WIDE: tl.constexpr,
    CLASS_VEC: tl.constexpr,
    ROW_VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    if expected_ptr is not None:
        if was_expected(upstream_ptr, expected_ptr, seen_ptr, ACC):
            return
    blocks = 1 if grad_ptr is None else tl.cdiv(classes, BLOCK)
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    outer, first, row, live = program_rows(tile, inner, row_outer, row_inner, ROWS, ROW_VEC)
    x_row = row_offsets(outer, first, x_outer, x_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
    t = None
    if q_ptr is None:
        t, counted, valid = class_index(target_ptr, row, live, ignore_index, classes)
        point = index_mass(weight_ptr, t, counted, valid, smoothing, SMOOTH, ACC)
    else:
        counted = live
        point = tl.zeros((ROWS,), ACC)
    m, s, mass, dot = load_summary(summary_ptr, rows, row, counted, SPLITS)
    mass += point

    if loss_ptr is not None:
        if q_ptr is None:
            dot += point_dot(point, load_at_index(x_ptr, x_row, t, x_class, valid, WIDE, ACC), m)
        if block == 0:
            store_loss(loss_ptr, tile, row_loss(s, mass, dot), row, live, counted, PER_ROW)
    if grad_ptr is not None:
        q_row = row_offsets(outer, first, q_outer, q_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
        g_row = row_offsets(outer, first, g_outer, g_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
        total = normalizer(
            normalizer_ptr, divisor, target_ptr, weight_ptr, rows, ignore_index, classes, PARTS, COUNT, ACC
        )
        scale = row_scale(upstream_ptr, total, row, counted, PER_ROW, ACC)
        factor = row_factor(s, mass, scale, counted)
        skip, column, inside = body_columns(x_row, block * BLOCK, classes, BLOCK, EDGE, CLASS_VEC)
        piece_gradient(
            x_ptr, multiple(x_row + skip, EDGE), x_class, q_ptr, multiple(q_row + skip, EDGE), q_class,
            grad_ptr, multiple(g_row + skip, EDGE), g_class, weight_ptr, column, skip, t, point,
            m, factor, scale, live, counted, inside, smoothing, classes, SMOOTH, WIDE, ROW_VEC, ACC,
        )  # fmt: skip
        if REST > 0:
            if block == 0:
                rest_skip, rest, rest_inside = rest_columns(x_row, classes, BLOCK, REST, EDGE, CLASS_VEC)
                piece_gradient(
                    x_ptr, x_row, x_class, q_ptr, q_row, q_class, grad_ptr, g_row, g_class, weight_ptr, rest, rest_skip,
                    t, point, m, factor, scale, live, counted, rest_inside, smoothing, classes, SMOOTH, WIDE, ROW_VEC,
                    ACC,
                )  # fmt: skip
