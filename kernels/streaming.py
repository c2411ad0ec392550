"""Schedule `streaming`: one program loops over rows that are too long to hold.

The first pass keeps an online summary (Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018).
The second, where a gradient is wanted, walks the blocks backward: what was read last, and is still in cache, is
read again first.
"""

import triton
import triton.language as tl

from .gradient import block_gradient, store_summary
from .math import dense_dot, exponentials, merge, point_dot, row_loss
from .tile import (
    class_index,
    class_mask,
    index_mass,
    load_at_index,
    load_logits,
    program_rows,
    row_pointers,
    row_scale,
    store_loss,
    tile_mass,
)


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def streaming(
    x_ptr,
    target_ptr,  # class indices, or None
    q_ptr,  # class probabilities, or None
    weight_ptr,  # None: all ones
    normalizer_ptr,  # None: `divisor` is the normaliser
    upstream_ptr,
    summary_ptr,  # None: no gradient will be made later
    loss_ptr,
    grad_ptr,  # None: no gradient wanted now
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
    PER_ROW: tl.constexpr,  # losses are one for each row
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    CLASS_VEC: tl.constexpr,
    ROW_VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    outer, first, row, live = program_rows(tl.program_id(0), inner, row_outer, row_inner, ROWS, ROW_VEC)
    x_rows = row_pointers(x_ptr, outer, first, x_outer, x_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
    t = None
    point = None
    q_rows = None
    if q_ptr is None:
        t, counted, valid = class_index(target_ptr, row, live, ignore_index, classes)
        point = index_mass(weight_ptr, t, valid, smoothing, SMOOTH, ACC)
    else:
        counted = live
        q_rows = row_pointers(q_ptr, outer, first, q_outer, q_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)

    m = tl.full((ROWS,), float("-inf"), ACC)
    s = tl.zeros((ROWS,), ACC)
    mass = tl.zeros((ROWS,), ACC)
    dot = tl.zeros((ROWS,), ACC)
    # No trip at all where every row of the program is ignored.
    end = tl.where(tl.max(counted.to(tl.int32), 0) > 0, classes, 0)
    for start in range(0, end, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = class_mask(c, classes, CLASS_VEC)[None, :]
        z, mask = load_logits(x_rows, c, x_class, live, counted, inside, WIDE, ROW_VEC, ACC)
        m_block = tl.max(z, 1)
        s_block = tl.sum(exponentials(z, m_block), 1)
        mass_block = tl.zeros((ROWS,), ACC)
        dot_block = tl.zeros((ROWS,), ACC)
        if SMOOTH or q_ptr is not None:
            b = tile_mass(
                q_rows,
                weight_ptr,
                q_class,
                c,
                t,
                point,
                mask,
                smoothing,
                classes,
                SMOOTH,
                WIDE,
                CLASS_VEC,
                ROW_VEC,
                ACC,
            )
            mass_block = tl.sum(b, 1)
            dot_block = dense_dot(b, z, m_block, mask)
        m, s, mass, dot = merge(m, s, mass, dot, m_block, s_block, mass_block, dot_block)
    if not SMOOTH and q_ptr is None:
        z_t = load_at_index(x_rows, t, x_class, valid, WIDE, ACC)
        mass = point
        dot = point_dot(point, z_t, m)

    store_loss(loss_ptr, row_loss(s, mass, dot), row, live, counted, PER_ROW)
    if summary_ptr is not None:
        store_summary(summary_ptr, rows, row, m, s, mass, counted)
    if grad_ptr is not None:
        scale = row_scale(upstream_ptr, normalizer_ptr, divisor, row, counted, PER_ROW, PARTS, ACC)
        g_rows = row_pointers(grad_ptr, outer, first, g_outer, g_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
        blocks = tl.cdiv(classes, BLOCK)
        for k in range(blocks):
            c = (blocks - 1 - k) * BLOCK + tl.arange(0, BLOCK)
            block_gradient(
                x_rows,
                q_rows,
                g_rows,
                weight_ptr,
                x_class,
                q_class,
                g_class,
                c,
                t,
                point,
                m,
                s,
                mass,
                scale,
                live,
                counted,
                smoothing,
                classes,
                SMOOTH,
                WIDE,
                CLASS_VEC,
                ROW_VEC,
                ACC,
            )
