"""Schedule `resident`: whole rows in the registers of one program, each logit read once."""

import triton
import triton.language as tl

from .math import exponentials, point_dot
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
    summarised,
    tile_gradient,
    tile_mass,
    was_expected,
)

# From this width on a thread holds several vectors of a row.
WIDE_TILE = tl.constexpr(1024)


@triton.jit(do_not_specialize=["ignore_index", "rows", "tiles"])
def resident(
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
    TURNS: tl.constexpr,  # there are fewer programs than tiles
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
    count = 1  # a constant: no loop is compiled
    if TURNS:
        count = share_of(tiles)
    for i in range(count):
        tile = tl.program_id(0) + i * tl.num_programs(0)
        outer, first, row, live = program_rows(tile, inner, row_outer, row_inner, ROWS, ROW_VEC)
        x_row = row_offsets(outer, first, x_outer, x_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
        q_row = row_offsets(outer, first, q_outer, q_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
        g_row = row_offsets(outer, first, g_outer, g_inner, ROWS, WIDE, CLASS_VEC, ROW_VEC)
        skip, column, inside = body_columns(x_row, 0, classes, BLOCK, EDGE, CLASS_VEC)
        x_body = multiple(x_row + skip, EDGE)
        q_body = multiple(q_row + skip, EDGE)
        g_body = multiple(g_row + skip, EDGE)
        if REST > 0:
            rest_skip, rest, rest_inside = rest_columns(x_row, classes, BLOCK, REST, EDGE, CLASS_VEC)
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
        if q_ptr is None and loss_ptr is not None:
            z_t = load_at_index(x_ptr, x_row, t, x_class, valid, logit_scale_ptr, softcap_ptr, WIDE, ACC)
        x, z, mask = load_logits(
            x_ptr, x_body, column, x_class, live, counted, inside, logit_scale_ptr, softcap_ptr, WIDE, ROW_VEC, ACC
        )
        m = tl.max(z, 1)
        if REST > 0:
            x_rest, z_rest, rest_mask = load_logits(
                x_ptr,
                x_row,
                rest,
                x_class,
                live,
                counted,
                rest_inside,
                logit_scale_ptr,
                softcap_ptr,
                WIDE,
                ROW_VEC,
                ACC,
            )
            m = tl.maximum(m, tl.max(z_rest, 1))

        PREDICT: tl.constexpr = predicted_ptr is not None
        e = exponentials(z, m)
        b = None
        q = None
        if q_ptr is not None:
            q = load_probabilities(q_ptr, q_body, column, q_class, mask, WIDE, ROW_VEC, ACC)
        if SMOOTH or q_ptr is not None:
            b = tile_mass(q, weight_ptr, column, skip, mask, smoothing, classes, SMOOTH, ACC)
        s, mass, dot, spread, total, cross, best = summarised(
            e, z, b, q, m, mask, column, skip, classes, ENTROPY, PREDICT
        )
        if REST > 0:
            e_rest = exponentials(z_rest, m)
            b_rest = None
            q_rest = None
            if q_ptr is not None:
                q_rest = load_probabilities(q_ptr, q_row, rest, q_class, rest_mask, WIDE, ROW_VEC, ACC)
            if SMOOTH or q_ptr is not None:
                b_rest = tile_mass(q_rest, weight_ptr, rest, rest_skip, rest_mask, smoothing, classes, SMOOTH, ACC)
            s_rest, mass_rest, dot_rest, spread_rest, total_rest, cross_rest, best_rest = summarised(
                e_rest, z_rest, b_rest, q_rest, m, rest_mask, rest, rest_skip, classes, ENTROPY, PREDICT
            )
            s += s_rest
            mass += mass_rest
            dot += dot_rest
            spread += spread_rest
            total += total_rest
            cross += cross_rest
            best = tl.minimum(best, best_rest)
        mass += point

        if loss_ptr is not None:
            if q_ptr is None:
                dot += point_dot(point, z_t, m)
            store_results(
                loss_ptr, row_losses_ptr, stats_ptr, predicted_ptr, z_loss_ptr, tile, rows, row, live, counted,
                weight, z_t, m, s, mass, dot, spread, total, cross, best, classes, PER_ROW, ENTROPY,
            )  # fmt: skip
        if grad_ptr is not None:
            total_weight = normalizer(
                normalizer_ptr, divisor, target_ptr, weight_ptr, sample_weight_ptr, rows, ignore_index, classes, PARTS,
                COUNT, NOT_ZERO, ACC,
            )  # fmt: skip
            scale = row_scale(upstream_ptr, total_weight, weight, row, counted, PER_ROW, ACC)
            factor, of_point, of_logprob, of_entropy = row_factors(
                m, s, mass, total, point, scale, z_loss_ptr, stats_upstream_ptr, rows, row, counted, q_ptr is None
            )
            t_body = None if t is None else t - skip
            VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth if BLOCK >= WIDE_TILE else 1
            g, slope = tile_gradient(
                x, z, e, b, q, m, s, spread, scale, factor, of_point, of_logprob, of_entropy, t_body, column, mask,
                logit_scale_ptr, softcap_ptr, stats_upstream_ptr, VEC, ENTROPY, slope_ptr is not None,
            )  # fmt: skip
            store_gradient(grad_ptr, g_body, column, g_class, live, inside, g, WIDE, ROW_VEC)
            if REST > 0:
                g_rest, slope_rest = tile_gradient(
                    x_rest, z_rest, e_rest, b_rest, q_rest, m, s, spread, scale, factor, of_point, of_logprob,
                    of_entropy, t, rest, rest_mask, logit_scale_ptr, softcap_ptr, stats_upstream_ptr,
                    1 if EDGE > 0 else VEC, ENTROPY,
                    slope_ptr is not None,
                )  # fmt: skip
                store_gradient(grad_ptr, g_row, rest, g_class, live, rest_inside, g_rest, WIDE, ROW_VEC)
                slope += slope_rest
            if slope_ptr is not None:
                tl.store(slope_ptr + row, tl.where(counted, slope, 0.0), mask=live)
