"""The custom autograd Function: what is saved, what backward returns.

An implementation is a module with two functions, `forward` and `backward` (see `cpu` and `kernels.launch`):

    loss, made, normalizer, summary = forward(problem, input, target, weight, want_gradient, expected)
    gradient, seen = backward(problem, input, target, weight, made, normalizer, summary, upstream, expected)

Forward makes the gradient for the upstream gradient that is expected: the one that the last backward saw, at first 1.
That is right for `loss.backward()`, and from the second step on for `(loss / k).backward()` and for the constant scale
of automatic mixed precision. Backward compares, and makes the gradient again where it was wrong.
"""

import functools
import weakref

import torch

from . import reference


class Expectation:
    """The upstream gradient that the next backward is expected to have: a 0-dim tensor, or None for 1.

    It stays on its device, and is for the CUDA stream that wrote it: another could read it too early. A captured CUDA
    graph can neither read what may be freed later nor leave what it allocated: it expects 1.
    """

    def __init__(self):
        self.upstream = self.queue = None

    def get(self, input):
        """What to expect for the gradient of `input`, which is to be made by the current stream."""
        return self.upstream if self.queue is not None and self.queue == queue(input) else None

    def note(self, seen, input):
        """Expect `seen` from now on; None changes nothing."""
        here = queue(input)
        if seen is not None and here is not None:
            self.upstream, self.queue = seen, here


def queue(input):
    """What does the work on `input` in order: its device, or on a GPU the current stream; None in a graph's capture."""
    if not input.is_cuda:
        return input.device
    if torch.cuda.is_current_stream_capturing():
        return None
    return input.device, torch.cuda.current_stream(input.device).cuda_stream


def expectation(owner, problem, device):
    """That of a module or, without one, of all calls with the same options on the same device."""
    if owner is None:
        return shared_expectation(problem, device)
    return _expectations.setdefault(owner, Expectation())


# Beside the modules, not in them: a copied or pickled module is what torch.nn.CrossEntropyLoss would be.
_expectations = weakref.WeakKeyDictionary()


@functools.lru_cache(maxsize=256)
def shared_expectation(problem, device):
    return Expectation()


def is_batched(upstream):
    """Whether this stands for many upstream gradients: under torch.func, or `is_grads_batched=True`, an older vmap."""
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(upstream)


def apply(implementation, problem, input, target, weight, expectation):
    """The loss through `implementation`, recorded for autograd if the input asks for it."""
    if torch.is_grad_enabled() and input.requires_grad:
        return CrossEntropy.apply(input, target, weight, problem, implementation, expectation)
    return implementation.forward(problem, input, target, weight, False, None)[0]


class CrossEntropy(torch.autograd.Function):
    """Cross entropy whose gradient with respect to the input was made during the forward pass.

    It goes to autograd once: autograd may keep it as `.grad` and add into it, so another backward
    (`retain_graph=True`) makes it anew.
    """

    @staticmethod
    def forward(ctx, input, target, weight, problem, implementation, expectation):
        ctx.expected = expectation.get(input)
        loss, made, normalizer, summary = implementation.forward(problem, input, target, weight, True, ctx.expected)
        ctx.save_for_backward(input, target, weight, normalizer, summary)
        ctx.made = made
        ctx.problem, ctx.implementation, ctx.expectation = problem, implementation, expectation
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if upstream is None:
            return (None,) * 6
        input, target, weight, normalizer, summary = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(upstream):
            gradient = differentiable_gradient(ctx.problem, input, target, weight, upstream)
        else:
            made, ctx.made = ctx.made, None
            gradient, seen = ctx.implementation.backward(
                ctx.problem, input, target, weight, made, normalizer, summary, upstream, ctx.expected
            )
            ctx.expectation.note(seen, input)
        return gradient, None, None, None, None, None


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
