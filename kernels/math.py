"""The formula, once, as Triton helpers that every schedule shares.

For a row with logits z and target mass b (one number per class, xent_ext/reference.py says which),

    m = max z,  s = sum exp(z - m),  mass = sum b,  dot = sum b * (z - m)
    row loss      = mass * log(s) - dot
    row gradient  = (mass / s) * exp(z - m) - b

`dot` is taken relative to m, so that logits with a large common offset lose nothing. Tiles are [ROWS, BLOCK];
whatever belongs to a row is [ROWS]. The mass b has a *dense* part, one number for each class (probability
targets, label smoothing), and a *point* part at the class index; either may be absent.
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
def dense_dot(b, z, m, inside):
    """sum b * (z - m) over the classes `inside` the row. A b of 0 at a logit of -inf gives NaN, as PyTorch does."""
    return tl.sum(tl.where(inside, b * (z - origin(m)[:, None]), 0.0), 1)


@triton.jit
def point_dot(b, z, m):
    return b * (z - origin(m))


@triton.jit
def merge(m1, s1, mass1, dot1, m2, s2, mass2, dot2):
    """The summary of two parts of a row. A part whose logits are all -inf has m = -inf and s = 0."""
    m = tl.maximum(m1, m2)
    o = origin(m)
    s = s1 * tl.exp(m1 - o) + s2 * tl.exp(m2 - o)
    dot = (dot1 + mass1 * (origin(m1) - o)) + (dot2 + mass2 * (origin(m2) - o))
    return m, s, mass1 + mass2, dot


@triton.jit
def merge_all(m, s, mass, dot):
    """The summary of each row from those of its parts, [ROWS, parts]; see `merge`."""
    whole = tl.max(m, 1)
    o = origin(whole)[:, None]
    s = tl.sum(s * tl.exp(m - o), 1)
    dot = tl.sum(dot + mass * (origin(m) - o), 1)
    return whole, s, tl.sum(mass, 1), dot


@triton.jit
def row_loss(s, mass, dot):
    return mass * tl.log(s) - dot


@triton.jit
def row_factor(s, mass, scale, counted):
    """What exp(z - m) is multiplied by in the gradient: scale * mass / s, and 0 for ignored rows."""
    return tl.where(counted, mass * scale / s, 0.0)


@triton.jit
def row_gradient(e, factor, b):
    """The gradient of a tile, times a scale that `factor` ([ROWS], `row_factor`) and b ([ROWS, BLOCK]) hold already."""
    return e * factor[:, None] - b
