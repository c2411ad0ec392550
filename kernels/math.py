"""The formula, once, as Triton helpers that every schedule shares.

For a row with logits z and target mass b (one number per class, xent_ext/reference.py says which),

    m = max z,  s = sum exp(z - m),  mass = sum b,  dot = sum b * (z - m),  lse = m + log(s)
    row loss      = mass * log(s) - dot  (+ z_loss * lse^2)
    row gradient  = (mass (+ 2 z_loss * lse)) / s * exp(z - m) - b

`dot` is taken relative to m, so that logits with a large common offset lose nothing. Tiles are [ROWS, BLOCK];
whatever belongs to a row is [ROWS]. The mass b has a *dense* part, one number for each class (probability
targets, label smoothing), and a *point* part at the class index; either may be absent.

A row's summary is (m, s, mass, dot, spread, total, cross, best), mass and dot those of the dense part; for statistics

    spread = sum exp(z - m) * (z - m),  total = sum q,  cross = sum q * (z - m)

and `best`, which stands for the first class of the largest logit. Those that are not used are compiled away.
"""

import triton
import triton.language as tl


@triton.jit
def scalar(value, ACC: tl.constexpr):
    """A kernel argument as a tensor of type ACC (the interpreter hands floats over as Python's)."""
    return tl.full((), value, ACC)


@triton.jit
def origin(m):
    """What exponents are taken relative to: the maximum, or 0 where every logit is -inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def exponentials(z, m):
    """exp(z - m), in [0, 1]; 0 for logits of -inf; NaN where the row holds +inf or NaN."""
    return tl.exp(z - origin(m)[:, None])


@triton.jit
def dense_mass(w, q, smoothing, classes, SMOOTH: tl.constexpr, ACC: tl.constexpr):
    """w * ((1 - smoothing) * q + smoothing / C); q is None for class-index targets, whose q is the point part."""
    b = w
    if q is not None:
        b = w * q
    if SMOOTH:
        eps = scalar(smoothing, ACC)
        uniform = w * (eps / classes)
        b = uniform if q is None else b * (1 - eps) + uniform
    return b


@triton.jit
def point_mass(w, smoothing, SMOOTH: tl.constexpr, ACC: tl.constexpr):
    """(1 - smoothing) * w at the class index."""
    if SMOOTH:
        w = w * (1 - scalar(smoothing, ACC))
    return w


@triton.jit
def softcapped(x, softcap, ACC: tl.constexpr):
    """softcap * tanh(x / softcap), to full precision near 0, too: from the exponential, and there from the series."""
    y = x / softcap
    e = tl.exp(-2.0 * tl.abs(y))
    far = (1.0 - e) / (1.0 + e)
    y2 = y * y
    series = 2.0 / 15.0 + y2 * (-17.0 / 315.0 + y2 * (62.0 / 2835.0 + y2 * (-1382.0 / 155925.0)))
    near = y + y * y2 * (-1.0 / 3.0 + y2 * series)
    NEAR: tl.constexpr = 0.25 if ACC == tl.float32 else 0.02
    return softcap * tl.where(tl.abs(y) < NEAR, near, tl.where(y < 0, -far, far))


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


@triton.jit
def merge(
    m1, s1, mass1, dot1, spread1, total1, cross1, best1, m2, s2, mass2, dot2, spread2, total2, cross2, best2, classes,
    STATS: tl.constexpr,
):  # fmt: skip
    """The summary of two parts of a row. A part whose logits are all -inf has m = -inf and s = 0."""
    m = tl.maximum(m1, m2)
    o = origin(m)
    down1, down2 = origin(m1) - o, origin(m2) - o
    e1, e2 = tl.exp(m1 - o), tl.exp(m2 - o)
    s = s1 * e1 + s2 * e2
    dot = (dot1 + mass1 * down1) + (dot2 + mass2 * down2)
    if STATS:
        spread1 = e1 * (spread1 + s1 * down1) + e2 * (spread2 + s2 * down2)
        cross1 = (cross1 + total1 * down1) + (cross2 + total2 * down2)
        total1 += total2
        smallest = tl.minimum(best1, best2)
        best1 = tl.where((smallest < classes) | (m1 == m2), smallest, tl.where(m1 > m2, best1, best2))
    return m, s, mass1 + mass2, dot, spread1, total1, cross1, best1


@triton.jit
def merge_all(m, s, mass, dot, spread, total, cross, best, classes, STATS: tl.constexpr):
    """The summary of each row from those of its parts, [ROWS, parts]; see `merge`."""
    whole = tl.max(m, 1)
    o = origin(whole)[:, None]
    down = origin(m) - o
    e = tl.exp(m - o)
    dot = tl.sum(dot + mass * down, 1)
    if STATS:
        spread = e * (spread + s * down)
        cross = cross + total * down
        best = tl.where((best < classes) | (m == whole[:, None]), best, 2 * classes)
    s, mass, total = tl.sum(s * e, 1), tl.sum(mass, 1), tl.sum(total, 1)
    return whole, s, mass, dot, tl.sum(spread, 1), total, tl.sum(cross, 1), tl.min(best, 1)


@triton.jit
def row_loss(m, s, mass, dot, z_loss_ptr):
    loss = mass * tl.log(s) - dot
    if z_loss_ptr is not None:
        lse = m + tl.log(s)
        loss += tl.load(z_loss_ptr) * lse * lse
    return loss


@triton.jit
def gradient_mass(m, s, mass, z_loss_ptr):
    """What p is multiplied by in the gradient of the row loss."""
    if z_loss_ptr is not None:
        mass += 2 * tl.load(z_loss_ptr) * (m + tl.log(s))
    return mass


@triton.jit
def row_factor(s, mass, counted):
    """What exp(z - m) is multiplied by in the gradient, for a mass that is scaled already; 0 for ignored rows."""
    return tl.where(counted, mass / s, 0.0)


@triton.jit
def row_gradient(e, factor, minus_b):
    """The gradient of a tile, times a scale that `factor` ([ROWS], `row_factor`) and -b ([ROWS, BLOCK]) have in it."""
    return e * factor[:, None] + minus_b


@triton.jit
def entropy(s, spread):
    """- sum p log p"""
    return tl.log(s) - spread / s


@triton.jit
def entropy_gradient(e, z, m, s, spread, upstream):
    """upstream * - p * (log p + entropy), where a class with p = 0 has none."""
    excess = z - (origin(m) + spread / s)[:, None]
    return tl.where(e == 0, 0.0, -e * excess * (upstream / s)[:, None])
