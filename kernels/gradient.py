"""Schedule `gradient`: from the saved summary of each row, every logit read once.

It makes deferred gradients and, after the parts of split rows were summarised, the loss as well.
"""

import triton
import triton.language as tl

from .math import exponentials, merge_all, point_dot
from .tile import (
    body_columns,
    class_index,
    index_mass,
    load_at_index,
    load_logits,
    load_probabilities,
    loss_weight,
    multiple,
    normalizer,
    program_rows,
    rest_columns,
    row_factors,
    row_offsets,
    row_scale,
    share_of,
    store_gradient,
    store_results,
    tile_gradient,
    tile_mass,
    tile_pointers,
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
    logit_scale_ptr,
    softcap_ptr,
    stats_upstream_ptr,
    column,
    skip,
    t,
    m,
    s,
    spread,
    scale,
    factor,
    of_point,
    of_logprob,
    of_entropy,
    live,
    counted,
    inside,
    smoothing,
    classes,
    SMOOTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
    ROW_VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    """Read the logits of the classes skip + column, write their gradient, return the slope that they add.

    Ignored rows get zeros and are not read.
    """
    x, z, mask = load_logits(
        x_ptr, x_offset, column, x_class, live, counted, inside, logit_scale_ptr, softcap_ptr, WIDE, ROW_VEC, ACC
    )
    b = None
    q = None
    if q_ptr is not None:
        q = load_probabilities(q_ptr, q_offset, column, q_class, mask, WIDE, ROW_VEC, ACC)
    if SMOOTH or q_ptr is not None:
        b = tile_mass(q, weight_ptr, column, skip, mask, smoothing, classes, SMOOTH, ACC)
    t_column = None if t is None else t - skip
    VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    g, slope = tile_gradient(
        x, z, exponentials(z, m), b, q, m, s, spread, scale, factor, of_point, of_logprob, of_entropy, t_column, column,
        mask, logit_scale_ptr, softcap_ptr, stats_upstream_ptr, VEC, ENTROPY, SLOPE,
    )  # fmt: skip
    store_gradient(grad_ptr, g_offset, column, g_class, live, inside, g, WIDE, ROW_VEC)
    return slope


@triton.jit
def store_summary(
    summary_ptr, rows, row, part, m, s, mass, dot, spread, total, cross, best, mask, STATS: tl.constexpr,
    SPLITS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A part's summary of each row (see math.py). The tensor is [8 with STATS, else 4; rows; SPLITS]."""
    count = rows * SPLITS
    summary_ptr += row * SPLITS + part
    tl.store(summary_ptr, m, mask=mask)
    tl.store(summary_ptr + count, s, mask=mask)
    tl.store(summary_ptr + 2 * count, mass, mask=mask)
    tl.store(summary_ptr + 3 * count, dot, mask=mask)
    if STATS:
        tl.store(summary_ptr + 4 * count, spread, mask=mask)
        tl.store(summary_ptr + 5 * count, total, mask=mask)
        tl.store(summary_ptr + 6 * count, cross, mask=mask)
        # Its bits, as float32 does not have all integers.
        best = best if ACC == tl.float32 else best.to(tl.int64)
        tl.store(summary_ptr + 7 * count, best.to(ACC, bitcast=True), mask=mask)


@triton.jit
def load_summary(summary_ptr, rows, row, mask, classes, STATS: tl.constexpr, SPLITS: tl.constexpr, ACC: tl.constexpr):
    """The summary of each row, of all its parts."""
    count = rows * SPLITS
    summary_ptr += row[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    mask = mask[:, None]
    m = tl.load(summary_ptr, mask=mask, other=0.0)
    s = tl.load(summary_ptr + count, mask=mask, other=1.0)
    mass = tl.load(summary_ptr + 2 * count, mask=mask, other=0.0)
    dot = tl.load(summary_ptr + 3 * count, mask=mask, other=0.0)
    spread = tl.zeros_like(m)
    total, cross = spread, spread
    best = tl.zeros(m.shape, tl.int32)
    if STATS:
        spread = tl.load(summary_ptr + 4 * count, mask=mask, other=0.0)
        total = tl.load(summary_ptr + 5 * count, mask=mask, other=0.0)
        cross = tl.load(summary_ptr + 6 * count, mask=mask, other=0.0)
        bits = tl.load(summary_ptr + 7 * count, mask=mask, other=0.0)
        best = bits.to(tl.int32 if ACC == tl.float32 else tl.int64, bitcast=True).to(tl.int32)
    return merge_all(m, s, mass, dot, spread, total, cross, best, classes, STATS)


@triton.jit(do_not_specialize=["ignore_index", "rows", "tiles"])
def gradient(
    x_ptr,
    target_ptr,  # class indices, or None
    q_ptr,  # class probabilities, or None
    weight_ptr,  # None: all ones
    sample_weight_ptr,  # None: all ones
    logit_scale_ptr,  # None: 1
    softcap_ptr,  # None: no cap
    z_loss_ptr,  # None: 0
    normalizer_ptr,  # None: the rows are counted here, or `divisor` is the normaliser
    upstream_ptr,
    stats_upstream_ptr,  # None: no gradient came of a statistic
    expected_ptr,  # the upstream gradient that grad_ptr holds the gradient for already; None: it holds nothing
    seen_ptr,  # where the upstream gradient is noted, for the next step to expect
    summary_ptr,
    loss_ptr,  # None: no results wanted
    row_losses_ptr,  # None: not wanted; and so those that follow
    stats_ptr,
    predicted_ptr,
    grad_ptr,
    slope_ptr,
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
    ENTROPY: tl.constexpr,  # the entropy, or its gradient, is wanted
    PER_ROW: tl.constexpr,  # losses and upstream gradients are one for each row
    PARTS: tl.constexpr,
    COUNT: tl.constexpr,
    NOT_ZERO: tl.constexpr,
    TURNS: tl.constexpr,  # there are fewer programs than blocks of tiles
    STATS: tl.constexpr,
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
    count = 1  # a constant: no loop is compiled
    if TURNS:
        count = share_of(tiles * blocks)
    for i in range(count):
        item = tl.program_id(0) + i * tl.num_programs(0)
        tile = item // blocks
        block = item % blocks
        outer, first, row, live = program_rows(tile, inner, row_outer, row_inner, ROWS, ROW_VEC)
        x_row = row_offsets(outer, first, x_outer, x_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
        t = None
        if q_ptr is None:
            t, counted, valid = class_index(target_ptr, row, live, ignore_index, classes)
            point = index_mass(weight_ptr, t, counted, valid, smoothing, SMOOTH, ACC)
        else:
            counted = live
            point = tl.zeros((ROWS,), ACC)
        weight = loss_weight(sample_weight_ptr, row, counted, ACC)
        m, s, mass, dot, spread, total, cross, best = load_summary(
            summary_ptr, rows, row, counted, classes, STATS, SPLITS, ACC
        )
        mass += point

        if loss_ptr is not None:
            z_t = None
            if q_ptr is None:
                z_t = load_at_index(x_ptr, x_row, t, x_class, valid, logit_scale_ptr, softcap_ptr, WIDE, ACC)
                dot += point_dot(point, z_t, m)
            if block == 0:
                store_results(
                    loss_ptr, row_losses_ptr, stats_ptr, predicted_ptr, z_loss_ptr, tile, rows, row, live, counted,
                    weight, z_t, m, s, mass, dot, spread, total, cross, best, classes, PER_ROW, ENTROPY,
                )  # fmt: skip
        if grad_ptr is not None:
            q_row = row_offsets(outer, first, q_outer, q_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
            g_row = row_offsets(outer, first, g_outer, g_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
            total_weight = normalizer(
                normalizer_ptr, divisor, target_ptr, weight_ptr, sample_weight_ptr, rows, ignore_index, classes, PARTS,
                COUNT, NOT_ZERO, ACC,
            )  # fmt: skip
            scale = row_scale(upstream_ptr, total_weight, weight, row, counted, PER_ROW, ACC)
            factor, of_point, of_logprob, of_entropy = row_factors(
                m, s, mass, total, point, scale, z_loss_ptr, stats_upstream_ptr, rows, row, counted, q_ptr is None
            )
            skip, column, inside = body_columns(x_row, block * BLOCK, classes, BLOCK, EDGE, CLASS_VEC)
            slope = piece_gradient(
                x_ptr, multiple(x_row + skip, EDGE), x_class, q_ptr, multiple(q_row + skip, EDGE), q_class,
                grad_ptr, multiple(g_row + skip, EDGE), g_class, weight_ptr, logit_scale_ptr, softcap_ptr,
                stats_upstream_ptr, column, skip, t, m, s, spread, scale, factor, of_point, of_logprob, of_entropy,
                live, counted, inside, smoothing, classes, SMOOTH, ENTROPY, slope_ptr is not None, WIDE, ROW_VEC, ACC,
            )  # fmt: skip
            if REST > 0:
                if block == 0:
                    rest_skip, rest, rest_inside = rest_columns(x_row, classes, BLOCK, REST, EDGE, CLASS_VEC)
                    slope += piece_gradient(
                        x_ptr, x_row, x_class, q_ptr, q_row, q_class, grad_ptr, g_row, g_class, weight_ptr,
                        logit_scale_ptr, softcap_ptr, stats_upstream_ptr, rest, rest_skip, t, m, s, spread, scale,
                        factor, of_point, of_logprob, of_entropy, live, counted, rest_inside, smoothing, classes,
                        SMOOTH, ENTROPY, slope_ptr is not None, WIDE, ROW_VEC, ACC,
                    )  # fmt: skip
            if slope_ptr is not None:
                tl.store(slope_ptr + row * blocks + block, tl.where(counted, slope, 0.0), mask=live)


@triton.jit(do_not_specialize=["items"])
def rescale(
    grad_ptr,
    upstream_ptr,
    expected_ptr,
    seen_ptr,
    items,
    inner,
    classes,
    g_outer,
    g_inner,
    g_class,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    CLASS_VEC: tl.constexpr,
    ROW_VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    """Multiply the gradient that was made for the expected upstream gradient by what came over that."""
    if was_expected(upstream_ptr, expected_ptr, seen_ptr, ACC):
        return
    blocks = tl.cdiv(classes, BLOCK)
    factor = tl.load(upstream_ptr).to(ACC) / tl.load(expected_ptr)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        outer, first, _, live = program_rows(item // blocks, inner, 0, 0, ROWS, ROW_VEC)
        g_row = row_offsets(outer, first, g_outer, g_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
        _, column, inside = body_columns(g_row, (item % blocks) * BLOCK, classes, BLOCK, 0, CLASS_VEC)
        pointers = tile_pointers(grad_ptr, g_row, column, g_class, WIDE, ROW_VEC)
        g = tl.load(pointers, mask=live[:, None] & inside, other=0.0).to(ACC)
        store_gradient(grad_ptr, g_row, column, g_class, live, inside, g * factor, WIDE, ROW_VEC)
