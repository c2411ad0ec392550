"""The custom autograd Function: what is saved, what backward returns.

An implementation is a module with two functions, `forward` and `backward` (see `cpu` and `kernels.launch`):

    loss, made, normalizer, summary = forward(problem, input, target, weight, want_gradient)
    gradient = backward(problem, input, target, weight, made, normalizer, summary, upstream)
"""

import torch

from . import reference


def apply(implementation, problem, input, target, weight):
    """The loss through `implementation`, recorded for autograd if the input asks for it."""
    if torch.is_grad_enabled() and input.requires_grad:
        return CrossEntropy.apply(input, target, weight, problem, implementation)
    return implementation.forward(problem, input, target, weight, False)[0]


class CrossEntropy(torch.autograd.Function):
    """Cross entropy whose gradient with respect to the input was made during the forward pass.

    The gradient for an upstream gradient of 1 goes to autograd once: autograd may keep it as `.grad` and add into
    it, so another backward (`retain_graph=True`) makes it anew.
    """

    @staticmethod
    def forward(ctx, input, target, weight, problem, implementation):
        loss, made, normalizer, summary = implementation.forward(problem, input, target, weight, True)
        ctx.save_for_backward(input, target, weight, made, normalizer, summary)
        ctx.problem, ctx.implementation, ctx.handed_out = problem, implementation, False
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if upstream is None:
            return None, None, None, None, None
        input, target, weight, made, normalizer, summary = ctx.saved_tensors
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            gradient = differentiable_gradient(ctx.problem, input, target, weight, upstream)
        else:
            if ctx.handed_out:
                made = None
            ctx.handed_out = True
            gradient = ctx.implementation.backward(
                ctx.problem, input, target, weight, made, normalizer, summary, upstream
            )
        return gradient, None, None, None, None


def differentiable_gradient(problem, input, target, weight, upstream):
    """The gradient by the plain formula: for `create_graph=True` and for upstream gradients under vmap."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = input if input.requires_grad else input.detach().requires_grad_()
        loss = reference.cross_entropy(
            x,
            target,
            weight,
            ignore_index=problem.ignore_index,
            reduction=problem.reduction,
            label_smoothing=problem.label_smoothing,
            dtype=problem.dtype,
        )
        (gradient,) = torch.autograd.grad(loss, x, upstream, create_graph=create_graph)
    return gradient
