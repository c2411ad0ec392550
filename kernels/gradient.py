"""Schedule `gradient`: the gradient from the saved summary of each row, every logit read once."""

import triton
import triton.language as tl

from .math import exponentials, row_gradient
from .tile import (
    class_index,
    class_mask,
    index_mass,
    load_logits,
    program_rows,
    row_pointers,
    row_scale,
    tile_mass,
    tile_pointers,
    was_expected,
)


@triton.jit
def block_gradient(
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
    SMOOTH: tl.constexpr,
    WIDE: tl.constexpr,
    CLASS_VEC: tl.constexpr,
    ROW_VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    """Read the logits of the classes c and write their gradient. Ignored rows are not read and get zeros."""
    inside = class_mask(c, classes, CLASS_VEC)[None, :]
    z, mask = load_logits(x_rows, c, x_class, live, counted, inside, WIDE, ROW_VEC, ACC)
    b = tile_mass(
        q_rows, weight_ptr, q_class, c, t, point, mask, smoothing, classes, SMOOTH, WIDE, CLASS_VEC, ROW_VEC, ACC
    )
    g = tl.where(mask, row_gradient(exponentials(z, m), b, s, mass, scale), 0.0)
    tl.store(
        tile_pointers(g_rows, c, g_class, WIDE, ROW_VEC), g.to(g_rows.dtype.element_ty), mask=live[:, None] & inside
    )


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
    WIDE: tl.constexpr,
    CLASS_VEC: tl.constexpr,
    ROW_VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    if expected_ptr is not None:
        if was_expected(upstream_ptr, expected_ptr, seen_ptr, ACC):
            return
    blocks = tl.cdiv(classes, BLOCK)
    pid = tl.program_id(0)
    outer, first, row, live = program_rows(pid // blocks, inner, row_outer, row_inner, ROWS, ROW_VEC)
    c = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    t = None
    point = None
    q_rows = None
    if q_ptr is None:
        t, counted, valid = class_index(target_ptr, row, live, ignore_index, classes)
        point = index_mass(weight_ptr, t, valid, smoothing, SMOOTH, ACC)
    else:
        counted = live
        q_rows = row_pointers(q_ptr, outer, first, q_outer, q_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
    m, s, mass = load_summary(summary_ptr, rows, row, counted)
    scale = row_scale(upstream_ptr, normalizer_ptr, divisor, row, counted, PER_ROW, PARTS, ACC)
    block_gradient(
        row_pointers(x_ptr, outer, first, x_outer, x_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC),
        q_rows,
        row_pointers(grad_ptr, outer, first, g_outer, g_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC),
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
