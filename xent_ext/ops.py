"""What compiled graphs hold in place of autograd's Function: the loss as operators of `torch.library`.

    forward     the loss, and a list of the statistics that are asked for
    backward    a list of the gradients that are needed; for that of `sample_weight` the row losses, of which it is made
    summary     that of each row, where other ranks have more of its classes (see `xent_ext.parallel`)
    rescaled    the gradient of a call with `inplace` that was made outside graphs, for compiled autograd

A compiler settles before anything runs which operator owns which memory. It can't be told that the gradient made in the
forward pass is the one to hand over if, and only if, the upstream gradient turns out to be the one that was expected.
So here `backward` makes the gradient, for whatever upstream gradient comes, and only the logits are kept until then.
Nor is anything done in place: with `inplace`, too, the logits stay what they are.

Between `summary` and `forward` a graph has the collective itself, which a compiler can let overlap with other work.
What it gathers goes to `forward` as one more tensor, without a gradient, and is kept for `backward`.

The fake kernels say which shapes come out, and look at no size: a graph holds for every batch size.
"""

import dataclasses

import torch
from torch import Tensor

from . import agreement, backends, checks, parallel
from .gradients import (
    check_version,
    differentiable_gradients,
    flat,
    forward_pass,
    made_for,
    must_be_plain,
    sample_weight_gradient,
    upstream_of,
    wanted,
)
from .layout import batch_shape, gradient_stride, visible
from .problem import NUMBERS, Problem, Tensors, Upstream, Wanted, scalar
from .reference import accumulation_dtype, stat_dtype

_TYPES: dict = {bool: "bool", str: "str", int: "SymInt", float: "float", torch.dtype: "ScalarType", tuple: "str[]"}
_TYPES |= {Tensor: "Tensor", Tensor | None: "Tensor?"}
OPTIONS = {
    field.name: field.type for field in dataclasses.fields(Problem) if field.name not in (*Tensors._fields, "inplace")
}
CALL, UPSTREAM = (
    ", ".join(f"{_TYPES[type_]} {name}" for name, type_ in fields.items())
    for fields in (Tensors.__annotations__ | OPTIONS, Upstream.__annotations__)
)


def loss(problem, tensors):
    """The loss in a graph, and a list of statistics."""
    given = arguments(problem, tensors)
    if problem.ranks:
        with torch.no_grad():
            started = parallel.start_gathering(torch.ops.xent_ext.summary(*given), problem)
            gathered = parallel.wait_for(started, problem)
        given = arguments(problem, tensors._replace(gathered=gathered))
    return torch.ops.xent_ext.forward(*given)


def arguments(problem, tensors):
    """A call as the operators take it: with tensors for `NUMBERS`."""
    dtype, device = accumulation_dtype(problem.dtype), tensors.input.device
    for name in NUMBERS:
        value = getattr(problem, name)
        if value != getattr(Problem, name):
            tensors = tensors._replace(**{name: scalar(value, dtype, device)})
    return *tensors, *(getattr(problem, name) for name in OPTIONS)


def call(arguments):
    """What `arguments` was made from."""
    count = len(Tensors._fields)
    options = dict(zip(OPTIONS, arguments[count:], strict=True))
    return Problem(**{**options, "stats": tuple(options["stats"])}), Tensors(*arguments[:count])


@torch.library.custom_op("xent_ext::summary", mutates_args=(), schema=f"({CALL}) -> Tensor")
def summary(*arguments):
    problem, tensors = call(arguments)
    if backends.CHECK:
        agreement.check(parallel.group_of(problem), call, arguments)
    return parallel.setup_for(problem, tensors, Wanted()).summary(tensors)


@summary.register_fake
def _(*arguments):
    return parallel.new_summary(*call(arguments))


@torch.library.custom_op("xent_ext::forward", mutates_args=(), schema=f"({CALL}) -> (Tensor, Tensor[])")
def forward(*arguments):
    problem, tensors = call(arguments)
    if backends.CHECK:
        checks.bad_class(problem, tensors)
    _, loss, stats, _ = forward_pass(problem, tensors, Wanted(), None)
    return loss, [stat.clone() for stat in stats]  # what an operator returns must not share memory


@forward.register_fake
def _(*arguments):
    problem, tensors = call(arguments)
    rows = batch_shape(visible(problem, tensors.input).shape)

    def new(shape, dtype):
        return tensors.input.new_empty(shape, dtype=dtype)

    loss = new(rows if problem.reduction == "none" else (), problem.dtype)
    return loss, [new(rows, stat_dtype(name, accumulation_dtype(problem.dtype))) for name in problem.stats]


@torch.library.custom_op(
    "xent_ext::backward", mutates_args=(), schema=f"({UPSTREAM}, {CALL}, bool[] needed) -> Tensor[]"
)
def backward(*arguments):
    count = len(Upstream._fields)
    upstream, (problem, tensors), needed = Upstream(*arguments[:count]), call(arguments[count:-1]), arguments[-1]
    needed = Tensors(*needed)
    made = made_for(upstream, problem, tensors, wanted(needed))
    slope = None if made.slope is None else made.slope.sum()
    found = Tensors(made.gradient, None, sample_weight=made.losses, logit_scale=slope)
    return [in_order_of(*both) for *both, need in zip(tensors, found, needed, strict=True) if need]


def in_order_of(tensor, gradient):
    """The gradient with the strides that what is compiled counts on: that of logits that were copied has others."""
    return gradient if gradient.stride() == gradient_stride(tensor) else torch.empty_like(tensor).copy_(gradient)


@backward.register_fake
def _(*arguments):
    _, tensors = call(arguments[len(Upstream._fields) : -1])
    return [torch.empty_like(tensor) for tensor, need in zip(tensors, arguments[-1], strict=True) if need]


@torch.library.custom_op(
    "xent_ext::rescaled", mutates_args=(), schema="(Tensor overwritten, int version, Tensor factor) -> Tensor"
)
def rescaled(overwritten, version, factor):
    """The gradient that took the place of the logits in a call outside graphs, times a factor, in memory of its own."""
    check_version(overwritten, version)
    return overwritten * factor


@rescaled.register_fake
def _(overwritten, version, factor):
    return torch.empty_like(overwritten)


def save(ctx, inputs, output):
    count = len(Tensors._fields)
    ctx.save_for_backward(*inputs[:count])
    ctx.options = inputs[count:]
    ctx.set_materialize_grads(False)
    problem, _ = call(inputs)
    ctx.mark_non_differentiable(*flat(problem, output[1]))


def differentiate(ctx, loss, stats):
    inputs = *ctx.saved_tensors, *ctx.options
    problem, tensors = call(inputs)
    needed = Tensors(*ctx.needs_input_grad[: len(tensors)])
    found = gradients(inputs, needed, upstream_of(problem, loss, stats))
    return *found, *([] if value == [] else None for value in ctx.options)  # an empty list may be one of tensors


def gradients(inputs, needed, upstream):
    """`Tensors` of the gradients that are needed of a call, given as `arguments`; None for the others."""
    problem, tensors = call(inputs)
    needed = needed._replace(sample_weight=needed.sample_weight and upstream.loss is not None)
    if not any(needed) or not any(up is not None for up in upstream):
        return Tensors(None, None)
    if not torch.compiler.is_dynamo_compiling() and must_be_plain(upstream):
        return Tensors(*differentiable_gradients(problem, tensors, needed, upstream))
    found = iter(torch.ops.xent_ext.backward(*upstream, *inputs, list(needed)))
    found = Tensors(*(next(found) if need else None for need in needed))
    if needed.sample_weight:
        weight = sample_weight_gradient(problem, tensors, found.sample_weight, upstream.loss, tensors.gathered)
        found = found._replace(sample_weight=weight)
    return found


forward.register_autograd(differentiate, setup_context=save)
