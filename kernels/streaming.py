"""Schedules `streaming` and `split`: programs loop over rows that are too long to hold.

The first walk keeps an online summary (Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018).
The second, where a gradient is wanted, goes backward: what was read last, and is still in cache, is read again first.
With few rows each is split over SPLITS programs, which only summarise their parts; `gradient` does the rest.
"""

import triton
import triton.language as tl

from .gradient import piece_gradient, store_summary
from .math import exponentials, merge, point_dot
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
    store_results,
    summarised,
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
    logit_scale_ptr,
    softcap_ptr,
    column,
    skip,
    live,
    counted,
    inside,
    smoothing,
    classes,
    SMOOTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    PREDICT: tl.constexpr,
    WIDE: tl.constexpr,
    ROW_VEC: tl.constexpr,
    ACC: tl.constexpr,
):
    """Read the logits of the classes skip + column; return their rows' summary."""
    _, z, mask = load_logits(
        x_ptr, x_offset, column, x_class, live, counted, inside, logit_scale_ptr, softcap_ptr, WIDE, ROW_VEC, ACC
    )
    b = None
    q = None
    if q_ptr is not None:
        q = load_probabilities(q_ptr, q_offset, column, q_class, mask, WIDE, ROW_VEC, ACC)
    if SMOOTH or q_ptr is not None:
        b = tile_mass(q, weight_ptr, column, skip, mask, smoothing, classes, SMOOTH, ACC)
    m = tl.max(z, 1)
    s, mass, dot, spread, total, cross, best = summarised(
        exponentials(z, m), z, b, q, m, mask, column, skip, classes, ENTROPY, PREDICT
    )
    return m, s, mass, dot, spread, total, cross, best


@triton.jit(do_not_specialize=["ignore_index", "rows", "tiles"])
def streaming(
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
    summary_ptr,  # None: no gradient will be made later
    loss_ptr,
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
    STATS: tl.constexpr,
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
    PREDICT: tl.constexpr = predicted_ptr is not None
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
        weight = loss_weight(sample_weight_ptr, row, counted, ACC)
        # Before the sums over the rows, which all threads wait for: the gradient may take the memory of the logits.
        z_t = None
        if q_ptr is None and SPLITS == 1:
            z_t = load_at_index(x_ptr, x_row, t, x_class, valid, logit_scale_ptr, softcap_ptr, WIDE, ACC)

        m = tl.full((ROWS,), float("-inf"), ACC)
        s = tl.zeros((ROWS,), ACC)
        mass, dot, spread, total, cross = s, s, s, s, s
        best = tl.zeros((ROWS,), tl.int32) + 2 * classes
        if REST > 0:
            rest_skip, rest, rest_inside = rest_columns(x_row, classes, BLOCK, REST, EDGE, CLASS_VEC)
            rest_inside = rest_inside & (rest < tl.where(part == 0, classes, 0))
            m, s, mass, dot, spread, total, cross, best = piece_summary(
                x_ptr, x_row, x_class, q_ptr, q_row, q_class, weight_ptr, logit_scale_ptr, softcap_ptr, rest, rest_skip,
                live, counted, rest_inside, smoothing, classes, SMOOTH, ENTROPY, PREDICT, WIDE, ROW_VEC, ACC,
            )  # fmt: skip
        # No trip at all where every row of the program is ignored.
        span = tl.cdiv(classes, SPLITS * PART) * PART
        end = tl.where(tl.max(counted.to(tl.int32), 0) > 0, tl.minimum((part + 1) * span, classes), 0)
        for start in range(part * span, end, BLOCK):
            skip, column, inside = body_columns(x_row, start, classes, BLOCK, EDGE, CLASS_VEC)
            if SPLITS > 1:
                inside = inside & (column < (part + 1) * span)
            m2, s2, mass2, dot2, spread2, total2, cross2, best2 = piece_summary(
                x_ptr, multiple(x_row + skip, EDGE), x_class, q_ptr, multiple(q_row + skip, EDGE), q_class, weight_ptr,
                logit_scale_ptr, softcap_ptr, column, skip, live, counted, inside, smoothing, classes, SMOOTH, ENTROPY,
                PREDICT, WIDE, ROW_VEC, ACC,
            )  # fmt: skip
            m, s, mass, dot, spread, total, cross, best = merge(
                m,
                s,
                mass,
                dot,
                spread,
                total,
                cross,
                best,
                m2,
                s2,
                mass2,
                dot2,
                spread2,
                total2,
                cross2,
                best2,
                classes,
                STATS,
            )
        if summary_ptr is not None:
            store_summary(
                summary_ptr, rows, row, part, m, s, mass, dot, spread, total, cross, best, counted, STATS, SPLITS, ACC
            )
        mass += point
        if SPLITS == 1:
            if q_ptr is None:
                dot += point_dot(point, z_t, m)
            store_results(
                loss_ptr, row_losses_ptr, stats_ptr, predicted_ptr, z_loss_ptr, tile, rows, row, live, counted, weight,
                z_t, m, s, mass, dot, spread, total, cross, best, classes, PER_ROW, ENTROPY,
            )  # fmt: skip
        if grad_ptr is not None:
            g_row = row_offsets(outer, first, g_outer, g_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
            total_weight = normalizer(
                normalizer_ptr, divisor, target_ptr, weight_ptr, sample_weight_ptr, rows, ignore_index, classes, PARTS,
                COUNT, NOT_ZERO, ACC,
            )  # fmt: skip
            scale = row_scale(upstream_ptr, total_weight, weight, row, counted, PER_ROW, ACC)
            factor, of_point, of_logprob, of_entropy = row_factors(
                m, s, mass, total, point, scale, z_loss_ptr, None, rows, row, counted, q_ptr is None
            )
            slope = tl.zeros((ROWS,), ACC)
            blocks = tl.cdiv(classes, BLOCK)
            for k in range(blocks):
                start = (blocks - 1 - k) * BLOCK
                skip, column, inside = body_columns(x_row, start, classes, BLOCK, EDGE, CLASS_VEC)
                slope += piece_gradient(
                    x_ptr, multiple(x_row + skip, EDGE), x_class, q_ptr, multiple(q_row + skip, EDGE), q_class,
                    grad_ptr, multiple(g_row + skip, EDGE), g_class, weight_ptr, logit_scale_ptr, softcap_ptr,
                    None, column, skip, t, m, s, spread, scale, factor, of_point, of_logprob, of_entropy,
                    live, counted, inside, smoothing, classes, SMOOTH, ENTROPY, slope_ptr is not None, WIDE, ROW_VEC,
                    ACC,
                )  # fmt: skip
            if REST > 0:
                slope += piece_gradient(
                    x_ptr, x_row, x_class, q_ptr, q_row, q_class, grad_ptr, g_row, g_class, weight_ptr, logit_scale_ptr,
                    softcap_ptr, None, rest, rest_skip, t, m, s, spread, scale, factor, of_point,
                    of_logprob, of_entropy, live, counted, rest_inside, smoothing, classes, SMOOTH, ENTROPY,
                    slope_ptr is not None, WIDE, ROW_VEC, ACC,
                )  # fmt: skip
            if slope_ptr is not None:
                # [rows, blocks], as `gradient` has it; the other blocks are zero.
                tl.store(slope_ptr + row * blocks, tl.where(counted, slope, 0.0), mask=live)
