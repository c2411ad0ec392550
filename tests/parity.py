"""The loss and its gradients beside PyTorch's own and beside the truth.

`check` makes the same call through both. The results must have the same dtypes, shapes, and NaN and infinities in the
same places; everywhere else ours must be no further from the truth than

    FACTOR * (how far PyTorch's own is) + FLOOR[dtype] * (the dtype's epsilon) * (the magnitude of what was added up)

Distances are the largest in each row, so that a row of small gradients is not judged by one of large gradients.
Upstream gradients are random: one of ones hides a gradient that ignores them. The truth is the definition in
`xent_ext.reference`, written out in NumPy with gradients derived by hand, in float64, or for float64 in NumPy's long
double (PyTorch's own float64 gradient is rounded too, by up to 35 epsilons).
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import xent_ext

# Ours does in another order what PyTorch's does, so that in a given row either may be the lucky one.
FACTOR = 2
# Half precision is computed in float32 and rounded once. The others round at each step: the sum of the exponentials,
# the factor made of it, the product with the exponential, the difference from the target mass.
FLOOR = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 4, torch.float64: 4}

DTYPES = tuple(FLOOR)
REDUCTIONS = ("none", "mean", "sum")
SHAPES = ((5,), (7, 5), (3, 5, 4), (2, 5, 3, 2), (2, 5, 2, 3, 2))


def class_axis(shape):
    return 0 if len(shape) == 1 else 1


def make(
    shape,
    dtype=torch.float32,
    *,
    probabilities=False,
    weighted=False,
    ignored=0.0,
    ignore_index=-100,
    spread=3.0,
    seed=0,
    device="cpu",
):
    """Logits, target and weight (or None). `ignored` is the share of class indices that are `ignore_index`."""
    generator = torch.Generator().manual_seed(seed)
    axis = class_axis(shape)
    classes, batch = shape[axis], shape[:axis] + shape[axis + 1 :]
    input = spread * torch.randn(shape, generator=generator)
    if probabilities:
        target = torch.randn(shape, generator=generator).softmax(axis).to(dtype)
    else:
        target = torch.randint(classes, batch, generator=generator)
        target[torch.rand(batch, generator=generator) < ignored] = ignore_index
    weight = torch.rand(classes, generator=generator).to(device, dtype) if weighted else None
    return input.to(device, dtype), target.to(device), weight


def relaid(tensor, *, order=None, step=1, padding=0, repeated=()):
    """The values of `tensor` in other memory, with poison around them.

    Dimensions lie in memory in this order, outermost first; along each, every `step`-th index is taken from
    `padding` on. Along `repeated` dimensions all indices share the memory, and the values, of the first.
    """
    shape, dims = tensor.shape, range(tensor.dim())
    order = order or tuple(dims)
    sizes = [1 if d in repeated else step * shape[d] + padding for d in order]
    poison = -(2**40) if tensor.dtype == torch.int64 else 255 if tensor.dtype == torch.uint8 else float("nan")
    memory = torch.full(sizes, poison, dtype=tensor.dtype, device=tensor.device)
    whole = memory.permute([order.index(d) for d in dims])
    view = whole[tuple(slice(None) if d in repeated else slice(padding, None, step) for d in dims)]
    return view.copy_(tensor[tuple(slice(1) if d in repeated else slice(None) for d in dims)]).expand(shape)


def check(input, target, weight=None, *, wanted=("input",), function=xent_ext.cross_entropy, **options):
    """Assert that `function` is as good as F.cross_entropy, in the loss and in the gradients for `wanted`."""
    tensors = {"input": input, "target": target, "weight": weight}
    legible = {**tensors, "input": without_ignored(input, target, options.get("ignore_index", -100))}
    theirs, upstream = outcome(F.cross_entropy, legible, wanted, options)
    ours, _ = outcome(function, tensors, wanted, options)
    true = truth(**tensors, upstream=upstream, **options)
    for name, their in theirs.items():
        assert_as_good(f"{name} with {options}", ours[name], their, true[name])


def without_ignored(input, target, ignore_index):
    """Logits with 0 in ignored rows: ours are not to look there, PyTorch's makes NaN of NaN and infinities there."""
    if input.shape == target.shape:
        return input
    axis = class_axis(input.shape)
    batch = input.shape[:axis] + input.shape[axis + 1 :]
    return input.masked_fill((target == ignore_index).reshape(batch).unsqueeze(axis), 0)


def outcome(function, tensors, wanted=("input",), options=(), upstream=None):
    """{"loss": the loss, and by name the wanted gradients}, and the upstream gradient: by default a random one."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in wanted}
    loss = function(**{**tensors, **leaves}, **dict(options))
    if upstream is None:
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss)
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream) if leaves else ()
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}, upstream


def assert_as_good(name, ours, theirs, true):
    assert ours.dtype == theirs.dtype, name
    assert ours.shape == theirs.shape, name
    overflown = overflows(theirs, true)
    for kind in (np.isnan, np.isposinf, np.isneginf):
        assert np.array_equal(kind(array(ours)), kind(array(theirs)) & ~overflown), (name, kind.__name__)
    error, their_error, unit = errors(ours, theirs, true)
    excess = error - (FACTOR * their_error + FLOOR[ours.dtype] * unit)
    worst = np.unravel_index(excess.argmax(), excess.shape) if excess.size else ()
    assert not (excess > 0).any(), (
        f"{name}, row {worst}: off by {error[worst]:.3g}, PyTorch's by {their_error[worst]:.3g}, "
        f"epsilon of the magnitude is {unit[worst]:.3g}"
    )


def overflows(theirs, true):
    """Where PyTorch's, which adds up in float16, is infinite but the truth is not: smoothing over many classes."""
    return (
        np.isinf(array(theirs)) & (theirs.dtype == torch.float16) & (abs(true.value) <= torch.finfo(theirs.dtype).max)
    )


def errors(ours, theirs, true):
    """For each row: the largest error of ours, the largest of theirs, and epsilon times the magnitude."""
    info = torch.finfo(ours.dtype)
    finite = np.isfinite(array(theirs))

    def largest(values, where):
        return np.where(where, values, 0).max(true.row, initial=0)

    with np.errstate(invalid="ignore"):
        return (
            largest(abs(array(ours) - true.value), finite | overflows(theirs, true)),
            largest(abs(array(theirs) - true.value), finite),
            info.eps * (largest(true.magnitude, np.isfinite(true.magnitude)) + info.smallest_normal),
        )


class Truth(NamedTuple):
    value: np.ndarray
    magnitude: np.ndarray  # of the terms that the value is the sum of
    row: tuple  # the axes along which a row extends


def array(tensor, dtype=np.float64):
    return tensor.detach().double().cpu().numpy().astype(dtype)


def truth(
    input, target, weight=None, *, upstream, ignore_index=-100, reduction="mean", label_smoothing=0.0
) -> dict[str, Truth]:
    """The loss and all its gradients as `xent_ext.reference` defines them. Not finite: as they happen to be."""
    tensors = [tensor for tensor in (input, target, weight) if tensor is not None]
    wide = np.longdouble if torch.float64 in [tensor.dtype for tensor in tensors] else np.float64
    axis, eps = class_axis(input.shape), wide(label_smoothing)

    def rows(tensor):
        return np.moveaxis(array(tensor, wide), axis, -1)

    z = rows(input)
    classes, batch = z.shape[-1], z.shape[:-1]
    w = np.ones(classes, wide) if weight is None else array(weight, wide)
    with np.errstate(all="ignore"):
        if input.shape == target.shape:
            counted, reached = np.ones(batch, bool), True
            q = (1 - eps) * rows(target) + eps / classes
            b = w * q
            normalizer = wide(counted.size)
        else:
            t = target.cpu().numpy().astype(np.int64).reshape(batch)
            counted = t != ignore_index
            hot = np.arange(classes) == t[..., None]
            reached = hot | (label_smoothing > 0)  # the classes that the row has to do with
            q = np.where(counted[..., None], (1 - eps) * hot + eps / classes, 0)
            b = np.where(reached, w * q, 0)
            normalizer = np.where(hot, w, 0).sum(where=counted[..., None])
        z = np.where(counted[..., None], z, 0)
        distance = z - z.max(-1, keepdims=True)
        e = np.exp(distance)
        s = e.sum(-1, keepdims=True)
        p, logp = e / s, distance - np.log(s)
        blur = 1 + abs(np.log(s)) + abs(distance)  # the magnitude of logp
        losses = -np.where(reached, b * logp, 0).sum(-1)
        about = np.where(reached, abs(b) * blur, 0).sum(-1)

        if reduction != "mean":
            normalizer = wide(1)
        k = array(upstream, wide).reshape(upstream.shape + (1,) * (len(batch) - upstream.dim())) / normalizer
        k = np.where(counted, k, 0)[..., None]
        mass = b.sum(-1, keepdims=True)
        if reduction != "none":
            losses, about = losses.sum() / normalizer, about.sum() / abs(normalizer)
        spectators = tuple(range(len(batch)))
        return {
            "loss": Truth(losses, about, ()),
            "input": Truth(*back(axis, k * (mass * p - b), abs(k) * (abs(mass) * p + abs(b))), (axis,)),
            "target": Truth(*back(axis, -k * (1 - eps) * w * logp, abs(k * (1 - eps) * w) * blur), (axis,)),
            "weight": Truth((-k * q * logp).sum(spectators), (abs(k * q) * blur).sum(spectators), (0,)),
        }


def back(axis, *arrays):
    """Arrays whose last dimension is the class, with the class at `axis`."""
    return [np.moveaxis(values, -1, axis) for values in arrays]


def made_ahead(loss):
    """The gradient that the forward pass made."""
    _, _, (_, gradient), *_ = loss.grad_fn.of_call
    return gradient


def expectation_of(loss):
    """The upstream gradient that it was made for."""
    _, _, (expected, _), *_ = loss.grad_fn.of_call
    return expected[0]
