"""What is made of whole rows: losses and statistics, and the gradient."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import expectation
from .math import (
    Summary,
    entropy,
    entropy_gradient,
    exponentials,
    gradient_mass,
    log_sum,
    origin,
    point_dot,
    row_loss,
    widened,
)
from .pieces import store
from .rows import Rows, load_rows, store_rows

MOST_MISSES = tl.constexpr(expectation.MOST_MISSES)
# From this width on a thread holds several vectors of a row.
SEVERAL_VECTORS = tl.constexpr(1024)


class Factors(NamedTuple):
    """What a row's gradient is made of."""

    m: Any  # exponents are relative to it
    mean: Any  # of z
    e: Any  # the factor of exp(z - m)
    b: Any  # of - b
    point: Any  # of - [c == target]
    q: Any
    entropy: Any  # of the entropy's gradient


@triton.jit
def with_point(row, rows):
    """The summary of rows, with their point mass."""
    mass, dot = row.mass + rows.point, row.dot + point_dot(rows.point, rows.z, row.m)
    return Summary(
        m=row.m, s=row.s, mass=mass, dot=dot, spread=row.spread, total=row.total, cross=row.cross, best=row.best
    )


@triton.jit
def store_results(results, given, rows, row, total, K):
    """What is wanted of the rows' summary; 0 for ignored rows, and a predicted class of -1.

    The loss is one for each row, or the sum over the rows of the tile; that over `total` where there is one tile.
    """
    loss = tl.where(rows.counted, row_loss(row, given.z_loss), 0.0)
    store_rows(results.row_losses, rows, loss)
    loss = tl.where(rows.counted, loss * rows.weight, 0.0)
    if K.PER_ROW:
        store_rows(results.loss, rows, loss)
    elif K.WHOLE:
        tl.store(results.loss, (tl.sum(loss, 0) / total).to(results.loss.dtype.element_ty))
    else:
        tl.store(results.loss + rows.tile, tl.sum(loss, 0))
    if given.target.indices is None:
        logprob = row.cross - row.total * tl.log(row.s)
    else:
        logprob = rows.z - origin(row.m) - tl.log(row.s)
    store_rows(results.logprob, rows, logprob)
    store_rows(results.lse, rows, log_sum(row))
    store_rows(results.entropy, rows, entropy(row))
    store_rows(results.max_prob, rows, 1 / row.s)
    if results.predicted is not None:
        best = tl.where(rows.counted, row.best % given.target.classes, -1)
        tl.store(results.predicted + rows.number, best.to(tl.int64), mask=rows.live)


@triton.jit
def was_expected(gradient, K):
    """Whether the gradient is there, for this upstream gradient; notes what to expect the next time."""
    upstream = widened(tl.load(gradient.upstream.loss), K)
    misses = tl.load(gradient.expected + 1)
    same = upstream == tl.load(gradient.expected)
    if tl.program_id(0) == 0:
        tl.store(gradient.seen, upstream)
        tl.store(gradient.seen + 1, tl.where(same, 0.0, tl.minimum(misses + 1, MOST_MISSES)))
    return same & (misses < MOST_MISSES)


@triton.jit
def rows_to_store(rows, gradient):
    """The rows whose gradient is made: none of them ahead of a backward that is not foreseen."""
    if gradient.expected is not None and gradient.seen is None:
        foreseen = (tl.load(gradient.expected + 1) < MOST_MISSES).to(tl.int32)
        live = rows.live.to(tl.int32) * foreseen > 0  # (by & the interpreter joins no mask with one number)
        counted = rows.counted.to(tl.int32) * foreseen > 0
        rows = Rows(
            tile=rows.tile, outer=rows.outer, inner=rows.inner, skip=rows.skip, number=rows.number, live=live,
            counted=counted, target=rows.target, point=rows.point, z=rows.z, weight=rows.weight,
            smoothing=rows.smoothing,
        )  # fmt: skip
    return rows


@triton.jit
def factors_of(gradient, given, rows, row, total, K):
    """What the rows' gradient is made of, over the normaliser `total`; 0 for ignored rows."""
    upstream = gradient.upstream
    scale = load_rows(upstream.loss, rows) if K.PER_ROW else tl.load(upstream.loss)
    scale = tl.where(rows.counted, widened(scale, K) * rows.weight / total, 0.0)
    mass = scale * gradient_mass(row, given.z_loss)
    point = scale * rows.point
    q, of_entropy = tl.zeros_like(scale), tl.zeros_like(scale)
    if upstream.lse is not None:
        mass += load_rows(upstream.lse, rows)
    if upstream.logprob is not None:
        q = load_rows(upstream.logprob, rows)
        if given.target.indices is None:
            mass -= q * row.total
        else:
            mass -= q
            point -= q
    if upstream.entropy is not None:
        of_entropy = load_rows(upstream.entropy, rows) / row.s
    e = tl.where(rows.counted, mass / row.s, 0.0)
    mean = origin(row.m) + row.spread / row.s
    return Factors(m=row.m, mean=mean, e=e, b=scale, point=point, q=q, entropy=of_entropy)


@triton.jit
def gradient_by_z(upstream, given, rows, piece, factors, K):
    """The gradient of a piece with respect to z."""
    e = exponentials(piece.z, factors.m)
    minus_b = tl.zeros((1, 1), e.dtype)
    if given.target.indices is not None:
        VEC: tl.constexpr = 128 // given.logits.ptr.dtype.element_ty.primitive_bitwidth
        minus_b = at_column(piece.columns.number, rows.target - rows.skip, -factors.point, VEC)
    if K.DENSE:
        minus_b -= piece.b * factors.b[:, None]
    if given.target.probabilities is not None and upstream.logprob is not None:
        minus_b += piece.q * factors.q[:, None]
    g = e * factors.e[:, None] + minus_b
    if upstream.entropy is not None:
        g += entropy_gradient(e, piece.z, factors.mean, factors.entropy)
    return g


@triton.jit
def store_gradient(gradient, given, rows, piece, factors, K):
    """Write the gradient of a piece; return the slope that it adds to each row. Ignored rows get zeros."""
    g = gradient_by_z(gradient.upstream, given, rows, piece, factors, K)
    if given.transform.softcap is not None:
        y = piece.z / tl.load(given.transform.softcap)
        g = tl.where(piece.mask, g * (1.0 - y * y), 0.0)
    slope = tl.zeros_like(factors.m)
    if gradient.slope is not None:
        slope = tl.sum(tl.where(piece.mask & (g != 0), g * piece.x, 0.0), 1)
    if given.transform.logit_scale is not None:
        g = g * tl.load(given.transform.logit_scale)
    store(gradient.view, rows, piece.columns, g, K)
    return slope


@triton.jit
def at_column(column, t, value, VEC: tl.constexpr):
    """`value` in column t of each row, 0 elsewhere.

    Where a thread holds several vectors of VEC columns of a row, two comparisons take half the instructions of one for
    each column: one with a place in a vector, which is the same for all of them, and one for each vector.
    """
    t, value = t[:, None], value[:, None]
    if column.shape[1] < SEVERAL_VECTORS:
        return tl.where(column == t, value, 0.0)
    else:
        in_vector = tl.where(column % VEC == t % VEC, value, 0.0)
        return tl.where(column // VEC == t // VEC, in_vector, 0.0)
