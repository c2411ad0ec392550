"""The formula, once, as Triton helpers that every schedule shares.

For a row with logits z and target mass b (one number per class, xent_ext/reference.py says which),

    m = max z,  s = sum exp(z - m),  mass = sum b,  dot = sum b * (z - m),  lse = m + log(s)
    row loss      = mass * log(s) - dot  (+ z_loss * lse^2)
    row gradient  = (mass (+ 2 z_loss * lse)) / s * exp(z - m) - b

`dot` is taken relative to m, so that logits with a large common offset lose nothing. Tiles are [ROWS, BLOCK];
whatever belongs to a row is [ROWS]. The mass b has a *dense* part, one number for each class (probability
targets, label smoothing), and a *point* part at the class index; either may be absent.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Summary(NamedTuple):
    """What a row, or a part of it, comes to; what is not wanted of it is zero, and compiled away."""

    m: Any
    s: Any
    mass: Any
    dot: Any
    spread: Any  # sum exp(z - m) * (z - m)
    total: Any  # sum q, the probabilities
    cross: Any  # sum q * (z - m)
    best: Any  # stands for the first class of the largest logit (see `best_of`)


@triton.jit
def widened(x, K):
    """x in the type that everything is computed in."""
    return x.to(tl.float64 if K.DOUBLE else tl.float32)


@triton.jit
def origin(m):
    """What exponents are taken relative to: the maximum, or 0 where every logit is -inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def exponentials(z, m):
    """exp(z - m), in [0, 1]; 0 for logits of -inf; NaN where the row holds +inf or NaN."""
    return tl.exp(z - origin(m)[:, None])


@triton.jit
def dense_mass(w, q, smoothing, target, classes):
    """w * ((1 - smoothing) * q + smoothing / C), less what is the point part: (1 - smoothing) * q of class indices."""
    if target.probabilities is None:
        return w * (smoothing / classes)
    elif target.smoothing is None:
        return w * q
    else:
        return w * q * (1 - smoothing) + w * (smoothing / classes)


@triton.jit
def point_mass(w, smoothing):
    """(1 - smoothing) * w at the class index."""
    return w * (1 - smoothing)


@triton.jit
def softcapped(x, softcap):
    """softcap * tanh(x / softcap), to full precision near 0, too: from the exponential, and there from the series."""
    y = x / softcap
    e = tl.exp(-2.0 * tl.abs(y))
    far = (1.0 - e) / (1.0 + e)
    y2 = y * y
    series = 2.0 / 15.0 + y2 * (-17.0 / 315.0 + y2 * (62.0 / 2835.0 + y2 * (-1382.0 / 155925.0)))
    near = y + y * y2 * (-1.0 / 3.0 + y2 * series)
    NEAR: tl.constexpr = 0.25 if x.dtype == tl.float32 else 0.02
    return softcap * tl.where(tl.abs(y) < NEAR, near, tl.where(y < 0, -far, far))


# Sums over the classes, relative to m


@triton.jit
def dense_dot(b, z, m, inside):
    """sum b * (z - m) over the classes `inside` the row. A b of 0 at a logit of -inf gives NaN, as PyTorch does."""
    return tl.sum(tl.where(inside, b * (z - origin(m)[:, None]), 0.0), 1)


@triton.jit
def point_dot(b, z, m):
    return b * (z - origin(m))


@triton.jit
def spread_of(e, z, m):
    """sum e * (z - m), where a class with e = 0 adds 0."""
    return tl.sum(tl.where(e == 0, 0.0, e * (z - origin(m)[:, None])), 1)


@triton.jit
def best_of(z, m, c, classes):
    """Stands for the first class of the largest logit, and of the first NaN if there is one, as torch.argmax has it.

    A class c that holds the maximum is c + classes, one that holds NaN is c: the smallest wins.
    """
    return tl.min(tl.where(z != z, c, tl.where(z == m[:, None], c + classes, 2 * classes)), 1)


# Summaries


@triton.jit
def nothing(like, classes):
    """The summary of no logits at all."""
    zero = tl.zeros_like(like)
    return Summary(
        m=zero - float("inf"), s=zero, mass=zero, dot=zero, spread=zero, total=zero, cross=zero,
        best=zero.to(tl.int32) + 2 * classes,
    )  # fmt: skip


@triton.jit
def relative_to(m, a, classes, K):
    """The summary a, relative to m instead of a.m, which is no larger. Where all logits are -inf, s is 0."""
    o = origin(m)
    down = origin(a.m) - o
    e = tl.exp(a.m - o)
    dot, spread, cross, best = a.dot, a.spread, a.cross, a.best
    if K.DENSE:
        dot += a.mass * down
    if K.STATS:
        spread = e * (spread + a.s * down)
        cross += a.total * down
        best = tl.where((best < classes) | (a.m == m), best, 2 * classes)
    return Summary(m=m, s=a.s * e, mass=a.mass, dot=dot, spread=spread, total=a.total, cross=cross, best=best)


@triton.jit
def joined(a, b):
    """The summary of two parts of a row whose summaries are relative to the same m."""
    return Summary(
        m=a.m,
        s=a.s + b.s,
        mass=a.mass + b.mass,
        dot=a.dot + b.dot,
        spread=a.spread + b.spread,
        total=a.total + b.total,
        cross=a.cross + b.cross,
        best=tl.minimum(a.best, b.best),
    )


@triton.jit
def merge(a, b, classes, K):
    """The summary of two parts of a row."""
    m = tl.maximum(a.m, b.m)
    return joined(relative_to(m, a, classes, K), relative_to(m, b, classes, K))


@triton.jit
def merge_all(parts, classes, K):
    """The summary of each row from those of its parts, [ROWS, parts]."""
    m = tl.max(parts.m, 1)
    a = relative_to(m[:, None], parts, classes, K)
    return Summary(
        m=m,
        s=tl.sum(a.s, 1),
        mass=tl.sum(a.mass, 1),
        dot=tl.sum(a.dot, 1),
        spread=tl.sum(a.spread, 1),
        total=tl.sum(a.total, 1),
        cross=tl.sum(a.cross, 1),
        best=tl.min(a.best, 1),
    )


# What becomes of a row's summary


@triton.jit
def log_sum(row):
    """log sum exp z"""
    return row.m + tl.log(row.s)


@triton.jit
def row_loss(row, z_loss):
    loss = row.mass * tl.log(row.s) - row.dot
    if z_loss is not None:
        lse = log_sum(row)
        loss += tl.load(z_loss) * lse * lse
    return loss


@triton.jit
def gradient_mass(row, z_loss):
    """What p is multiplied by in the gradient of the row loss."""
    mass = row.mass
    if z_loss is not None:
        mass += 2 * tl.load(z_loss) * log_sum(row)
    return mass


@triton.jit
def entropy(row):
    """- sum p log p"""
    return tl.log(row.s) - row.spread / row.s


@triton.jit
def entropy_gradient(e, z, mean, factor):
    """factor * - e * (z - mean), where a class with e = 0 has none.

    With 1 / s for the factor and the mean of z under p this is the gradient of the entropy.
    """
    return tl.where(e == 0, 0.0, -e * (z - mean[:, None]) * factor[:, None])
