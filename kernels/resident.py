"""Schedule `resident`: whole rows in the registers of one program, each logit read once."""

import triton
import triton.language as tl

from .math import dense_dot, exponentials, point_dot, row_gradient, row_loss
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
    tile_pointers,
    was_expected,
)


@triton.jit(do_not_specialize=["ignore_index"])
def resident(
    x_ptr,
    target_ptr,  # class indices, or None
    q_ptr,  # class probabilities, or None
    weight_ptr,  # None: all ones
    normalizer_ptr,  # None: `divisor` is the normaliser
    upstream_ptr,
    expected_ptr,  # the upstream gradient that grad_ptr holds the gradient for already; None: it holds nothing
    seen_ptr,  # where the upstream gradient is noted, for the next step to expect
    loss_ptr,  # None: no loss wanted
    grad_ptr,  # None: no gradient wanted
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    CLASS_VEC: tl.constexpr,
    ROW_VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    if expected_ptr is not None:
        if was_expected(upstream_ptr, expected_ptr, seen_ptr, ACC):
            return
    outer, first, row, live = program_rows(tl.program_id(0), inner, row_outer, row_inner, ROWS, ROW_VEC)
    c = tl.arange(0, BLOCK)
    inside = class_mask(c, classes, CLASS_VEC)[None, :]
    t = None
    point = None
    q_rows = None
    if q_ptr is None:
        t, counted, valid = class_index(target_ptr, row, live, ignore_index, classes)
        point = index_mass(weight_ptr, t, valid, smoothing, SMOOTH, ACC)
    else:
        counted = live
        q_rows = row_pointers(q_ptr, outer, first, q_outer, q_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)

    loss = tl.zeros((ROWS,), ACC)
    g = tl.zeros((ROWS, BLOCK), ACC)
    if tl.max(counted.to(tl.int32), 0) > 0:
        x_rows = row_pointers(x_ptr, outer, first, x_outer, x_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
        z, mask = load_logits(x_rows, c, x_class, live, counted, inside, WIDE, ROW_VEC, ACC)
        m = tl.max(z, 1)
        e = exponentials(z, m)
        s = tl.sum(e, 1)

        b = tile_mass(
            q_rows, weight_ptr, q_class, c, t, point, mask, smoothing, classes, SMOOTH, WIDE, CLASS_VEC, ROW_VEC, ACC
        )
        if SMOOTH or q_ptr is not None:
            mass = tl.sum(b, 1)
            dot = dense_dot(b, z, m, mask)
        else:
            z_t = load_at_index(x_rows, t, x_class, valid, WIDE, ACC)
            mass = point
            dot = point_dot(point, z_t, m)

        loss = row_loss(s, mass, dot)
        if grad_ptr is not None:
            scale = row_scale(upstream_ptr, normalizer_ptr, divisor, row, counted, PER_ROW, PARTS, ACC)
            g = tl.where(mask, row_gradient(e, b, s, mass, scale), 0.0)

    if loss_ptr is not None:
        store_loss(loss_ptr, loss, row, live, counted, PER_ROW)
    if grad_ptr is not None:
        g_rows = row_pointers(grad_ptr, outer, first, g_outer, g_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
        tl.store(
            tile_pointers(g_rows, c, g_class, WIDE, ROW_VEC),
            g.to(grad_ptr.dtype.element_ty),
            mask=live[:, None] & inside,
        )
