"""Schedules `streaming` and `split`: programs loop over rows that are too long to hold.

The first walk keeps an online summary (Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018).
The second, where a gradient is wanted, goes backward: what was read last, and is still in cache, is read again first.
With few rows each is split over SPLITS programs, which only summarise their parts; `gradient` does the rest.
"""

import triton
import triton.language as tl

from .gradient import piece_gradient, store_summary
from .math import dense_dot, exponentials, merge, point_dot, row_factor, row_loss
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
    store_loss,
    tile_mass,
)

PART = tl.constexpr(64)  # parts start at multiples of this many classes: whole vectors


@triton.jit
def piece_summary(
    x_ptr,
    x_offset,
    x_class,
    q_ptr,
    q_offset,
    q_class,
    weight_ptr,
    column,
    skip,
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
    """Read the logits of the classes skip + column; return m, s and, of the dense target mass, mass and dot."""
    z, mask = load_logits(x_ptr, x_offset, column, x_class, live, counted, inside, WIDE, ROW_VEC, ACC)
    m = tl.max(z, 1)
    s = tl.sum(exponentials(z, m), 1)
    mass = tl.zeros(m.shape, ACC)
    dot = tl.zeros(m.shape, ACC)
    if SMOOTH or q_ptr is not None:
        b = tile_mass(
            q_ptr, q_offset, q_class, weight_ptr, column, skip, mask, smoothing, classes, SMOOTH, WIDE, ROW_VEC, ACC
        )
        mass = tl.sum(b, 1)
        dot = dense_dot(b, z, m, mask)
    return m, s, mass, dot


@triton.jit(do_not_specialize=["ignore_index", "rows", "tiles"])
def streaming(
    x_ptr,
    target_ptr,  # class indices, or None
    q_ptr,  # class probabilities, or None
    weight_ptr,  # None: all ones
    normalizer_ptr,  # None: the rows are counted here, or `divisor` is the normaliser
    upstream_ptr,
    summary_ptr,  # None: no gradient will be made later
    loss_ptr,
    grad_ptr,  # None: no gradient wanted now
    rows: tl.int64,
    tiles,
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
    PER_ROW: tl.constexpr,  # losses are one for each row
    PARTS: tl.constexpr,
    COUNT: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,  # 0: the row has no second piece
    EDGE: tl.constexpr,
    WIDE: tl.constexpr,
    CLASS_VEC: tl.constexpr,
    ROW_VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    for item in range(tl.program_id(0), tiles * SPLITS, tl.num_programs(0)):
        tile = item // SPLITS
        part = item % SPLITS
        outer, first, row, live = program_rows(tile, inner, row_outer, row_inner, ROWS, ROW_VEC)
        x_row = row_offsets(outer, first, x_outer, x_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
        q_row = row_offsets(outer, first, q_outer, q_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
        t = None
        if q_ptr is None:
            t, counted, valid = class_index(target_ptr, row, live, ignore_index, classes)
            point = index_mass(weight_ptr, t, counted, valid, smoothing, SMOOTH, ACC)
        else:
            counted = live
            point = tl.zeros((ROWS,), ACC)

        m = tl.full((ROWS,), float("-inf"), ACC)
        s = tl.zeros((ROWS,), ACC)
        mass = tl.zeros((ROWS,), ACC)
        dot = tl.zeros((ROWS,), ACC)
        if REST > 0:
            rest_skip, rest, rest_inside = rest_columns(x_row, classes, BLOCK, REST, EDGE, CLASS_VEC)
            rest_inside = tl.where(part == 0, rest_inside, False)
            m, s, mass, dot = piece_summary(
                x_ptr, x_row, x_class, q_ptr, q_row, q_class, weight_ptr, rest, rest_skip, live, counted, rest_inside,
                smoothing, classes, SMOOTH, WIDE, ROW_VEC, ACC,
            )  # fmt: skip
        # No trip at all where every row of the program is ignored.
        span = tl.cdiv(classes, SPLITS * PART) * PART
        end = tl.where(tl.max(counted.to(tl.int32), 0) > 0, tl.minimum((part + 1) * span, classes), 0)
        for start in range(part * span, end, BLOCK):
            skip, column, inside = body_columns(x_row, start, classes, BLOCK, EDGE, CLASS_VEC)
            if SPLITS > 1:
                inside = inside & (column < (part + 1) * span)
            m_block, s_block, mass_block, dot_block = piece_summary(
                x_ptr, multiple(x_row + skip, EDGE), x_class, q_ptr, multiple(q_row + skip, EDGE), q_class, weight_ptr,
                column, skip, live, counted, inside, smoothing, classes, SMOOTH, WIDE, ROW_VEC, ACC,
            )  # fmt: skip
            m, s, mass, dot = merge(m, s, mass, dot, m_block, s_block, mass_block, dot_block)
        if summary_ptr is not None:
            store_summary(summary_ptr, rows, row, part, m, s, mass, dot, counted, SPLITS)
        if SPLITS == 1:
            if q_ptr is None:
                mass += point
                dot += point_dot(point, load_at_index(x_ptr, x_row, t, x_class, valid, WIDE, ACC), m)
            store_loss(loss_ptr, tile, row_loss(s, mass, dot), row, live, counted, PER_ROW)
        if grad_ptr is not None:
            g_row = row_offsets(outer, first, g_outer, g_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
            total = normalizer(
                normalizer_ptr, divisor, target_ptr, weight_ptr, rows, ignore_index, classes, PARTS, COUNT, ACC
            )
            scale = row_scale(upstream_ptr, total, row, counted, PER_ROW, ACC)
            factor = row_factor(s, mass, scale, counted)
            blocks = tl.cdiv(classes, BLOCK)
            for k in range(blocks):
                start = (blocks - 1 - k) * BLOCK
                skip, column, inside = body_columns(x_row, start, classes, BLOCK, EDGE, CLASS_VEC)
                piece_gradient(
                    x_ptr, multiple(x_row + skip, EDGE), x_class, q_ptr, multiple(q_row + skip, EDGE), q_class,
                    grad_ptr, multiple(g_row + skip, EDGE), g_class, weight_ptr, column, skip, t, point,
                    m, factor, scale, live, counted, inside, smoothing, classes, SMOOTH, WIDE, ROW_VEC, ACC,
                )  # fmt: skip
            if REST > 0:
                piece_gradient(
                    x_ptr, x_row, x_class, q_ptr, q_row, q_class, grad_ptr, g_row, g_class, weight_ptr, rest, rest_skip,
                    t, point, m, factor, scale, live, counted, rest_inside, smoothing, classes, SMOOTH, WIDE, ROW_VEC,
                    ACC,
                )  # fmt: skip
