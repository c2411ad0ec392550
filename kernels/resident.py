"""Schedule `resident`: whole rows in the registers of one program, each logit read once."""

import triton
import triton.language as tl

from .math import dense_dot, exponentials, point_dot, row_factor, row_gradient, row_loss
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


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def resident(
    x_ptr,
    target_ptr,  # class indices, or None
    q_ptr,  # class probabilities, or None
    weight_ptr,  # None: all ones
    normalizer_ptr,  # None: the rows are counted here, or `divisor` is the normaliser
    upstream_ptr,
    expected_ptr,  # the upstream gradient that grad_ptr holds the gradient for already; None: it holds nothing
    seen_ptr,  # where the upstream gradient is noted, for the next step to expect
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
    outer, first, row, live = program_rows(tl.program_id(0), inner, row_outer, row_inner, ROWS, ROW_VEC)
    x_row = row_offsets(outer, first, x_outer, x_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
    q_row = row_offsets(outer, first, q_outer, q_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
    g_row = row_offsets(outer, first, g_outer, g_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
    skip, column, inside = body_columns(x_row, 0, classes, BLOCK, EDGE, CLASS_VEC)
    x_body = multiple(x_row + skip, EDGE)
    q_body = multiple(q_row + skip, EDGE)
    g_body = multiple(g_row + skip, EDGE)
    if REST > 0:
        rest_skip, rest, rest_inside = rest_columns(x_row, classes, BLOCK, REST, EDGE, CLASS_VEC)

    DENSE: tl.constexpr = SMOOTH or q_ptr is not None
    t = None
    if q_ptr is None:
        t, counted, valid = class_index(target_ptr, row, live, ignore_index, classes)
        point = index_mass(weight_ptr, t, counted, valid, smoothing, SMOOTH, ACC)
    else:
        counted = live
        point = tl.zeros((ROWS,), ACC)

    loss = tl.zeros((ROWS,), ACC)
    g = tl.zeros((ROWS, BLOCK), ACC)
    if REST > 0:
        g_rest = tl.zeros((ROWS, REST), ACC)
    if tl.max(counted.to(tl.int32), 0) > 0:
        z, mask = load_logits(x_ptr, x_body, column, x_class, live, counted, inside, WIDE, ROW_VEC, ACC)
        m = tl.max(z, 1)
        if REST > 0:
            z_rest, rest_mask = load_logits(x_ptr, x_row, rest, x_class, live, counted, rest_inside, WIDE, ROW_VEC, ACC)
            m = tl.maximum(m, tl.max(z_rest, 1))
        e = exponentials(z, m)
        s = tl.sum(e, 1)
        if REST > 0:
            e_rest = exponentials(z_rest, m)
            s += tl.sum(e_rest, 1)

        mass = point
        dot = tl.zeros((ROWS,), ACC)
        b = None
        b_rest = None
        if q_ptr is None:
            dot = point_dot(point, load_at_index(x_ptr, x_row, t, x_class, valid, WIDE, ACC), m)
        if DENSE:
            b = tile_mass(
                q_ptr, q_body, q_class, weight_ptr, column, skip, mask, smoothing, classes, SMOOTH, WIDE, ROW_VEC, ACC
            )
            mass += tl.sum(b, 1)
            dot += dense_dot(b, z, m, mask)
            if REST > 0:
                b_rest = tile_mass(
                    q_ptr, q_row, q_class, weight_ptr, rest, rest_skip, rest_mask, smoothing, classes, SMOOTH, WIDE,
                    ROW_VEC, ACC,
                )  # fmt: skip
                mass += tl.sum(b_rest, 1)
                dot += dense_dot(b_rest, z_rest, m, rest_mask)

        loss = row_loss(s, mass, dot)
        if grad_ptr is not None:
            total = normalizer(
                normalizer_ptr, divisor, target_ptr, weight_ptr, rows, ignore_index, classes, PARTS, COUNT, ACC
            )
            scale = row_scale(upstream_ptr, total, row, counted, PER_ROW, ACC)
            factor = row_factor(s, mass, scale, counted)
            t_body = None if t is None else t - skip
            g = row_gradient(e, factor, scaled_mass(b, t_body, point, column, scale))
            if REST > 0:
                g_rest = row_gradient(e_rest, factor, scaled_mass(b_rest, t, point, rest, scale))

    if loss_ptr is not None:
        store_loss(loss_ptr, tl.program_id(0), loss, row, live, counted, PER_ROW)
    if grad_ptr is not None:
        store_gradient(grad_ptr, g_body, column, g_class, live, inside, g, WIDE, ROW_VEC)
        if REST > 0:
            store_gradient(grad_ptr, g_row, rest, g_class, live, rest_inside, g_rest, WIDE, ROW_VEC)
