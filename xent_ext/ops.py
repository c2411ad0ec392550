"""What compiled graphs hold in place of autograd's Function: the loss as operators of `torch.library`.

    forward     the loss
    backward    the gradient

A compiler settles before anything runs which operator owns which memory. It can't be told that the gradient made in the
forward pass is the one to hand over if, and only if, the upstream gradient turns out to be the one that was expected.
So here `backward` makes the gradient, for whatever upstream gradient comes, and only the logits are kept until then.

The fake kernels say which shapes come out, and look at no size: a graph holds for every batch size.
"""

from dataclasses import MISSING, fields

import torch

from . import autograd, checks, dispatch
from .layout import batch_shape, class_axis, gradient_stride
from .problem import Problem, Tensors, Upstream, Wanted
from .reference import accumulation_dtype

# The options of PyTorch's loss have no default; those for training are left to the plain formula in a graph.
_NAMES = tuple(field.name for field in fields(Problem) if field.default is MISSING)
_SCHEMA_TYPES = {bool: "bool", str: "str", int: "int", float: "float", torch.dtype: "ScalarType"}
_OPTIONS = ", ".join(f"{_SCHEMA_TYPES[field.type]} {field.name}" for field in fields(Problem) if field.name in _NAMES)
_TENSORS = "Tensor input, Tensor target, Tensor? weight"


def loss(problem, tensors):
    """The loss in a graph."""
    return torch.ops.xent_ext.forward(*arguments(problem, tensors))


def arguments(problem, tensors):
    """What the operators take, one by one."""
    return (*tensors[:3], *(getattr(problem, name) for name in _NAMES))


@torch.library.custom_op("xent_ext::forward", mutates_args=(), schema=f"({_TENSORS}, {_OPTIONS}) -> Tensor")
def forward(input, target, weight, *values):
    problem = Problem(*values)
    if dispatch.CHECK and not problem.probabilities:
        checks.bad_target(target, input.shape[class_axis(input.shape)], problem.ignore_index)
    implementation = dispatch.implementation_for(input)
    return implementation.forward(problem, Tensors(input, target, weight), Wanted(), None).loss


@forward.register_fake
def _(input, target, weight, *values):
    problem = Problem(*values)
    shape = batch_shape(input.shape) if problem.reduction == "none" else ()
    return input.new_empty(shape, dtype=problem.dtype)


@torch.library.custom_op(
    "xent_ext::backward", mutates_args=(), schema=f"(Tensor upstream, {_TENSORS}, {_OPTIONS}) -> Tensor"
)
def backward(upstream, input, target, weight, *values):
    problem, tensors, wanted = Problem(*values), Tensors(input, target, weight), Wanted(gradient=True)
    implementation = dispatch.implementation_for(input)
    if problem.reduction == "none":
        # What forward leaves for this has a size that no fake kernel knows, so that it is made here.
        made = implementation.forward(problem, tensors, wanted, None)
        gradient, _, _ = implementation.backward(problem, tensors, wanted, made, Upstream(upstream), None)
    else:
        # A forward that expects this upstream gradient makes normaliser and gradient in one pass.
        expected = upstream.to(accumulation_dtype(problem.dtype))
        gradient = implementation.forward(problem, tensors, wanted, expected).gradient
    # Logits that had to be copied have a gradient in the copy's order, but what is compiled counts on one.
    return gradient if gradient.stride() == gradient_stride(input) else torch.empty_like(input).copy_(gradient)


@backward.register_fake
def _(upstream, input, target, weight, *values):
    return torch.empty_like(input)


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.values = inputs[3:]


def differentiate(ctx, upstream):
    if torch.is_grad_enabled() or autograd.is_batched(upstream):
        needed = Tensors(*(name == "input" for name in Tensors._fields))
        gradient = autograd.differentiable_gradients(
            Problem(*ctx.values), Tensors(*ctx.saved_tensors), needed, Upstream(upstream)
        ).input
    else:
        gradient = torch.ops.xent_ext.backward(upstream, *ctx.saved_tensors, *ctx.values)
    return gradient, None, None, *(None for _ in ctx.values)


forward.register_autograd(differentiate, setup_context=save)
