"""Schedule `gradient`: the gradient from the saved summary of each row, every logit read once."""

import triton
import triton.language as tl

from .math import exponentials, row_factor, row_gradient
from .tile import (
    body_columns,
    class_index,
    index_mass,
    load_logits,
    multiple,
    program_rows,
    rest_columns,
    row_offsets,
    row_scale,
    scaled_mass,
    store_gradient,
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
def store_summary(summary_ptr, rows, row, m, s, mass, mask):
    """The summary is [3, rows]: m, s and mass."""
    summary_ptr += row
    tl.store(summary_ptr, m, mask=mask)
    tl.store(summary_ptr + rows, s, mask=mask)
    tl.store(summary_ptr + 2 * rows, mass, mask=mask)


@triton.jit
def load_summary(summary_ptr, rows, row, mask):
    summary_ptr += row
    m = tl.load(summary_ptr, mask=mask, other=0.0)
    s = tl.load(summary_ptr + rows, mask=mask, other=1.0)
    mass = tl.load(summary_ptr + 2 * rows, mask=mask, other=0.0)
    return m, s, mass


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def gradient(
    x_ptr,
    target_ptr,  # class indices, or None
    q_ptr,  # class probabilities, or None
    weight_ptr,  # None: all ones
    normalizer_ptr,  # None: `divisor` is the normaliser
    upstream_ptr,
    expected_ptr,  # the upstream gradient that grad_ptr holds the gradient for already; None: it holds nothing
    seen_ptr,  # where the upstream gradient is noted, for the next step to expect
    summary_ptr,
    grad_ptr,
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
    PER_ROW: tl.constexpr,  # upstream gradients are one for each row
    PARTS: tl.constexpr,
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
    blocks = tl.cdiv(classes, BLOCK)
    block = tl.program_id(0) % blocks
    outer, first, row, live = program_rows(tl.program_id(0) // blocks, inner, row_outer, row_inner, ROWS, ROW_VEC)
    x_row = row_offsets(outer, first, x_outer, x_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
    q_row = row_offsets(outer, first, q_outer, q_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
    g_row = row_offsets(outer, first, g_outer, g_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
    t = None
    if q_ptr is None:
        t, counted, valid = class_index(target_ptr, row, live, ignore_index, classes)
        point = index_mass(weight_ptr, t, counted, valid, smoothing, SMOOTH, ACC)
    else:
        counted = live
        point = tl.zeros((ROWS,), ACC)
    m, s, mass = load_summary(summary_ptr, rows, row, counted)
    scale = row_scale(upstream_ptr, normalizer_ptr, divisor, row, counted, PER_ROW, PARTS, ACC)
    factor = row_factor(s, mass, scale, counted)
    skip, column, inside = body_columns(x_row, block * BLOCK, classes, BLOCK, EDGE, CLASS_VEC)
    piece_gradient(
        x_ptr, multiple(x_row + skip, EDGE), x_class, q_ptr, multiple(q_row + skip, EDGE), q_class,
        grad_ptr, multiple(g_row + skip, EDGE), g_class, weight_ptr, column, skip, t, point,
        m, factor, scale, live, counted, inside, smoothing, classes, SMOOTH, WIDE, ROW_VEC, ACC,
    )  # fmt: skip
    if REST > 0:
        if block == 0:
            start, rest, inside = rest_columns(x_row, classes, BLOCK, REST, EDGE, CLASS_VEC)
            piece_gradient(
                x_ptr, x_row, x_class, q_ptr, q_row, q_class, grad_ptr, g_row, g_class, weight_ptr, rest, start,
                t, point, m, factor, scale, live, counted, inside, smoothing, classes, SMOOTH, WIDE, ROW_VEC, ACC,
            )  # fmt: skip
