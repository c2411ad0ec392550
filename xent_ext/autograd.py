"""The custom autograd Function: what is saved, what backward returns.

An implementation is a module with a function that makes a setup for all calls that are alike (see `cpu`, and `problem`
for what goes in and out):

    setup = setup_for(problem, tensors, wanted)
    made = setup.forward(tensors, expected)
    gradient, slope, seen = setup.backward(tensors, made, upstream, expected)

Forward makes the gradient for the upstream gradient of the loss that is expected: the one that the last backward saw,
at first 1; and for none of the statistics. That is right for `loss.backward()`, and from the second step on for
`(loss / k).backward()` and for the constant scale of automatic mixed precision. Backward compares, and makes the
gradient again where it was wrong.

`made` in backward is forward's, without `loss` and `stats`; its `gradient` and `slope` are None where they were not
made or went to autograd before. `seen` is the upstream gradient to expect the next time, or None for no news.

The gradients with respect to `sample_weight` and `logit_scale` are sums over rows, taken here: of the row losses, and
of the slopes.

With `inplace` the gradient takes the memory of the logits. It can then not be made again: backward multiplies it by
the upstream gradient over the one that was expected, and hands it out once.
"""

import dataclasses
import functools
import weakref

import torch

from . import reference
from .problem import Made, Tensors, Upstream, Wanted


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
    return input.device, torch._C._cuda_getCurrentRawStream(input.device.index)


def expectation_of(owner):
    """That of a module."""
    found = _expectations.get(owner)
    return _expectations.setdefault(owner, Expectation()) if found is None else found


# Beside the modules, not in them: a copied or pickled module is what torch.nn.CrossEntropyLoss would be.
_expectations = weakref.WeakKeyDictionary()


@functools.lru_cache(maxsize=256)
def shared_expectation(problem, device):
    """That of all calls without a module, with the same options on the same device."""
    return Expectation()


def is_batched(upstream):
    """Whether they stand for many upstream gradients: under torch.func, or `is_grads_batched=True`, an older vmap."""
    if torch._C._are_functorch_transforms_active():
        return True
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return any([legacy(up) for up in upstream if up is not None])


class Loss:
    """All losses that are alike but for the values in their tensors: what they have besides these."""

    def __init__(self, implementation, problem, tensors):
        needed = Tensors(*[tensor is not None and tensor.requires_grad for tensor in tensors])
        self.recorded = torch.is_grad_enabled() and any(needed)
        if problem.inplace and not (self.recorded and needed.input):
            problem = dataclasses.replace(problem, inplace=False)
        self.problem = problem
        self.setup = implementation.setup_for(problem, tensors, wanted(needed) if self.recorded else Wanted())
        self.expectation = shared_expectation(problem, tensors.input.device)  # of calls without a module
        self.only_input = not (needed.sample_weight or needed.logit_scale)

    def __call__(self, owner, tensors):
        """The loss and a sequence of statistics, recorded for autograd where a tensor asks for it."""
        if not self.recorded:
            return self.setup.forward(tensors, None)[:2]
        expectation = self.expectation if owner is None else expectation_of(owner)
        loss, *stats = record(self, expectation, *tensors)
        if self.problem.inplace:
            Overwritten.apply(tensors.input)
            loss.grad_fn.version = tensors.input._version
        return loss, stats


class CrossEntropy(torch.autograd.Function):
    """Cross entropy whose gradient with respect to the input was made during the forward pass.

    It goes to autograd once: autograd may keep it as `.grad` and add into it, so another backward
    (`retain_graph=True`) makes it anew.
    """

    @staticmethod
    def forward(ctx, loss, expectation, *tensors):
        problem, tensors = loss.problem, Tensors(*tensors)
        expected = expectation.get(tensors.input)
        if problem.inplace:
            expected = divisor(expected)
        made = loss.setup.forward(tensors, expected)
        saved = tensors._replace(input=None) if problem.inplace else tensors
        ctx.save_for_backward(*saved, made.losses, made.normalizer, made.summary)
        ctx.call, ctx.expectation, ctx.expected = loss, expectation, expected
        ctx.made, ctx.slope = made.gradient, made.slope
        ctx.set_materialize_grads(False)
        if made.stats:
            ctx.mark_non_differentiable(*flat(problem, made.stats))
        return made.loss, *made.stats

    @staticmethod
    def backward(ctx, loss, *stats):
        problem, setup = ctx.call.problem, ctx.call.setup
        upstream = upstream_of(problem, loss, stats)
        if loss is None and not upstream.has_stats():
            return NO_GRADIENTS
        *tensors, losses, normalizer, summary = ctx.saved_tensors
        tensors = Tensors(*tensors)
        plain = must_be_plain(upstream)
        if problem.inplace:
            refuse(ctx, plain, upstream)
        needed = ctx.needs_input_grad[2:]
        if plain:
            return None, None, *differentiable_gradients(problem, tensors, Tensors(*needed), upstream)
        gradient = slope = None
        if setup.wanted.gradient:
            made = Made(None, (), ctx.made, ctx.slope, losses, normalizer, summary)
            ctx.made = ctx.slope = None
            gradient, slope, seen = setup.backward(tensors, made, upstream, ctx.expected)
            if seen is not None:
                ctx.expectation.note(seen, gradient)
        if ctx.call.only_input:
            return None, None, gradient, *NO_GRADIENTS[3:]
        return None, None, *gradients(problem, tensors, Tensors(*needed), gradient, slope, losses, upstream)


NO_GRADIENTS = (None,) * (2 + len(Tensors._fields))

# torch.autograd.Function.apply without what it does for tensors under torch.func, which never come here.
record = super(torch.autograd.Function, CrossEntropy).apply


def wanted(needed):
    """What the forward pass is to make for the gradients that are needed, `Tensors` of bools."""
    return Wanted(gradient=needed.input or needed.logit_scale, slope=needed.logit_scale, losses=needed.sample_weight)


def flat(problem, stats):
    """Those of the statistics that have no gradient."""
    return [value for name, value in zip(problem.stats, stats, strict=True) if name not in Upstream._fields]


def upstream_of(problem, loss, stats):
    """The gradients that come of the loss and of each of the statistics, as `Upstream`."""
    if not stats:
        return Upstream(loss)
    return Upstream(
        loss, **{name: up for name, up in zip(problem.stats, stats, strict=True) if name in Upstream._fields}
    )


def must_be_plain(upstream):
    """Whether the gradient is to be differentiated again, or is batched, as only that of the plain formula can be."""
    return torch.is_grad_enabled() or is_batched(upstream)


def gradients(problem, tensors, needed, gradient, slope, losses, upstream):
    """The gradients of all tensors, as `Tensors`."""
    weight = None
    if needed.sample_weight and upstream.loss is not None:
        weight = sample_weight_gradient(problem, tensors, losses, upstream.loss)
    return Tensors(
        gradient if needed.input else None,
        None,
        sample_weight=weight,
        logit_scale=slope.sum() if needed.logit_scale else None,
    )


def sample_weight_gradient(problem, tensors, losses, upstream):
    with torch.enable_grad():
        f = tensors.sample_weight.detach().requires_grad_()
        weights, counted = reference.row_weights(problem, tensors, losses)
        loss = reference.reduced(
            losses, weights, counted, f, tensors.normalizer, problem.reduction, problem.on_all_ignored
        )
        return torch.autograd.grad(loss.to(problem.dtype), f, upstream)[0]


def differentiable_gradients(problem, tensors, needed, upstream):
    """The gradients by the plain formula: for `create_graph=True` and for upstream gradients under vmap."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = Tensors(
            *(
                tensor.detach().requires_grad_() if need and not tensor.requires_grad else tensor
                for tensor, need in zip(tensors, needed, strict=True)
            )
        )
        loss, stats = reference.compute(problem, inputs)
        outputs = {"loss": loss, **dict(zip(problem.stats, stats, strict=True))}
        wanted = [name for name, up in upstream._asdict().items() if up is not None]
        found = iter(
            torch.autograd.grad(
                [outputs[name] for name in wanted],
                [tensor for tensor, need in zip(inputs, needed, strict=True) if need],
                [getattr(upstream, name) for name in wanted],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return Tensors(*(next(found) if need else None for need in needed))


# --- In place


class Overwritten(torch.autograd.Function):
    """Tells autograd that the logits are no longer what they were: what uses them from now on has no gradient."""

    @staticmethod
    def forward(ctx, input):
        ctx.mark_dirty(input)
        return input

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError(
            "the logits were used after cross_entropy(..., inplace=True) put their gradient in their place"
        )


def divisor(expected):
    """What the gradient can be made for and divided by again: 1 (None) in place of 0, infinity and NaN."""
    if expected is None:
        return None
    return torch.where(expected.isfinite() & (expected != 0), expected, 1)


def refuse(ctx, plain, upstream):
    """Raise RuntimeError where the logits would be needed, but were overwritten, or their gradient was."""
    reason = None
    if plain:
        reason = "for create_graph=True or batched gradients"
    elif upstream.has_stats():
        reason = "for the gradient of a statistic"
    elif ctx.made is None:
        reason = "to go through backward a second time"
    if reason:
        raise RuntimeError(f"cross_entropy(..., inplace=True) does not keep the logits, which are needed {reason}")
    if ctx.made._version != ctx.version:
        raise RuntimeError(
            "the logits have been modified by an inplace operation since cross_entropy(..., inplace=True) put their "
            "gradient in their place"
        )
