"""The custom autograd Function: what is saved, what backward returns.

An implementation is a module with a function that makes a setup for all calls that are alike (see `cpu`, and `problem`
for what goes in and out):

    setup = setup_for(problem, tensors, wanted)
    loss, stats, kept = setup.forward(tensors, expected)
    gradient, slope, seen = setup.backward(tensors, kept, upstream, expected)

Forward makes the gradient for the upstream gradient of the loss that is expected (None: it leaves it to backward): the
one that the last backward saw, at first 1; and for none of the statistics. That is right for `loss.backward()`, and
from the second step on for `(loss / k).backward()` and for the constant scale of automatic mixed precision. Backward
compares, and makes the gradient again where it was wrong.

`tensors` are the first of `Tensors`, up to the last that is given; and what forward makes for backward, `kept`, are the
first of `Kept`, up to the last that there can be. Backward is given `Kept`, but without the `gradient` that went to
autograd before. `seen` is the upstream gradient to expect the next time, or None for no news.

The gradients with respect to `sample_weight` and `logit_scale` are sums over rows, taken here: of the row losses, and
of the slopes.

With `inplace` the gradient takes the memory of the logits. It can then not be made again: backward multiplies it by
the upstream gradient over the one that was expected, and hands it out once.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch._C._autograd import _get_current_graph_task_keep_graph, _top_saved_tensors_default_hooks

from . import ops
from .ahead import ahead_on
from .expectation import expectation_of, shared_expectation
from .gradients import (
    OF_FORMULA,
    check_version,
    differentiable_gradients,
    flat,
    must_be_plain,
    resolved,
    sample_weight_gradient,
    upstream_of,
    wanted,
)
from .problem import Kept, Tensors, Wanted


class Held(NamedTuple):
    """What a call holds from its forward to its backward, besides its other arguments and a few numbers by row."""

    bytes: int | None  # None where nobody can tell beforehand
    what: str


class Loss:
    """All losses that are alike but for the values in their tensors: what they have besides these."""

    def __init__(self, implementation, problem, tensors):
        needed = Tensors(*[tensor is not None and tensor.requires_grad for tensor in tensors])
        self.recorded = torch.is_grad_enabled() and any(needed)
        if problem.inplace and not (self.recorded and needed.input):
            problem = dataclasses.replace(problem, inplace=False)
        self.problem, self.implementation = problem, implementation
        self.given = max(place for place, tensor in enumerate(tensors) if tensor is not None) + 1
        self.setup = implementation.setup_for(problem, tensors, wanted(needed) if self.recorded else Wanted())
        self.expectation = shared_expectation(problem, tensors.input.device)  # of calls without a module
        self.per_row = problem.reduction == "none"
        self.ahead = ahead_on(tensors.input) if self.setup.wanted.gradient else None
        self.only_input = not (needed.sample_weight or needed.logit_scale)
        self.no_gradients, self.no_others = (None,) * (2 + self.given), (None,) * (self.given - 1)

    def __call__(self, owner, tensors):
        """The loss and a sequence of statistics, recorded for autograd where a tensor asks for it.

        `tensors` begin as `Tensors`: what comes after the last that is given does not matter.
        """
        tensors = tensors[: self.given]
        if not self.recorded:
            return self.setup.forward(tensors, None)[:2]
        expectation = self.expectation if owner is None else expectation_of(owner)
        found = record(self, expectation, *tensors)
        loss, stats = (found[0], found[1:]) if self.problem.stats else (found, ())
        if self.problem.inplace:
            Overwritten.apply(tensors[0])
            loss.grad_fn.version = tensors[0]._version
        return loss, stats

    def why_later(self):
        """Why the gradient is left to backward; None if it is made ahead, as it is where nothing speaks against it."""
        if self.per_row:
            return "each row has an upstream gradient of its own"
        if self.ahead is not None and not self.ahead.has_room():
            return "those of other losses wait for their backward"
        # Hooks copy what is saved elsewhere, or throw it away: nothing of the logits' size is made for them.
        if _top_saved_tensors_default_hooks(False) is not None:
            return "hooks on saved tensors are active"
        return None

    def held(self, logits):
        """`Held`, as things are now."""
        size = logits.numel() * logits.element_size()
        if not self.recorded:
            return Held(0, "no gradient is wanted")
        if self.problem.inplace:
            return Held(size, "the gradient, in the place of the logits")
        if not self.setup.wanted.gradient:
            return Held(size, "the logits")
        if reason := self.why_later():
            return Held(size, f"the logits; their gradient is left to backward, as {reason}")
        return Held(2 * size, "the logits and their gradient, made ahead")


class CrossEntropy(torch.autograd.Function):
    """Cross entropy whose gradient with respect to the input was made during the forward pass.

    It goes to autograd once: autograd may keep it as `.grad` and add into it, so another backward
    (`retain_graph=True`) makes it anew.
    """

    @staticmethod
    def forward(ctx, call, expectation, *tensors):
        setup, problem = call.setup, call.problem
        expected = None
        if problem.inplace:
            expected = divisor(expectation.get(tensors[0], problem))
        elif call.why_later() is None:
            expected = expectation.get(tensors[0], problem)
        loss, stats, kept = setup.forward(tensors, expected)
        overwritten = None
        if problem.inplace:  # the gradient has the memory of the logits, and their version
            overwritten, *others = kept
            tensors, kept = (None, *tensors[1:]), (None, *others)
        elif call.ahead is not None:
            call.ahead.note(kept[0])
        ctx.save_for_backward(*tensors, *kept)
        ctx.of_call = call, expectation, expected, overwritten, place_of(tensors[0])
        ctx.set_materialize_grads(False)
        if not stats:
            return loss
        ctx.mark_non_differentiable(*flat(problem, stats))
        return loss, *stats

    @staticmethod
    def backward(ctx, loss, *stats):
        call, expectation, expected, overwritten, where = ctx.of_call
        problem, setup = call.problem, call.setup
        upstream = upstream_of(problem, loss, stats)
        if loss is None and not upstream.has_stats():
            return call.no_gradients
        if torch.compiler.is_dynamo_compiling():
            return None, None, *gradients_in_graph(ctx, upstream)
        saved = ctx.saved_tensors
        tensors = saved[: call.given]
        plain = must_be_plain(upstream)
        if problem.inplace:
            refuse(plain, upstream, overwritten)
            check_version(overwritten, ctx.version)
        if plain:
            needed = ctx.needs_input_grad[2:]
            return None, None, *differentiable_gradients(problem, tensors, needed, upstream)
        if stats or loss.is_neg() or loss._is_zerotensor():
            upstream = resolved(upstream)
        gradient, *others = saved[call.given :]
        if call.ahead is not None and not call.ahead.took(gradient):
            gradient = None
        if expected is None:  # it went to autograd already
            gradient = None
        keeps_graph = _get_current_graph_task_keep_graph()
        if keeps_graph and gradient is not None:  # whoever gets it may change it, which says nothing of what is saved
            gradient = gradient.data
        kept = Kept(overwritten if gradient is None else gradient, *others)
        if keeps_graph or problem.inplace:
            ctx.of_call = call, expectation, None, None, where
        if place_of(tensors[0]) != where:
            tensors = resolved(Tensors(*tensors))
            setup, kept = refitted(call, tensors, kept, expected)
        gradient = slope = None
        if setup.wanted.gradient:
            gradient, slope, seen = setup.backward(tensors, kept, upstream, expected)
            if seen is not None:
                expectation.note(seen, gradient, problem)
        if call.only_input:
            return None, None, gradient, *call.no_others
        needed = Tensors(*ctx.needs_input_grad[2:])
        found = gradients(problem, Tensors(*tensors), needed, gradient, slope, kept, upstream)
        return None, None, *found[: call.given]


def place_of(logits):
    """Where the logits are, if they are not gone: elsewhere if hooks on what is saved brought others."""
    return None if logits is None else logits.data_ptr()


def refitted(call, tensors, kept, expected):
    """Setup and `Kept` for tensors that hooks on saved tensors brought back elsewhere: in other strides, it may be."""
    setup = call.implementation.setup_for(call.problem, tensors, call.setup.wanted)
    if setup != call.setup and call.problem.ranks:  # the summaries of all ranks do fit
        kept = kept._replace(gradient=None, slope=None)
    elif setup != call.setup and not call.problem.inplace:  # what is left of forward does not fit
        _, _, kept = setup.forward(tensors, expected)
        kept = Kept(*kept)
    return setup, kept


# torch.autograd.Function.apply without what it does for tensors under torch.func, which never come here.
record = super(torch.autograd.Function, CrossEntropy).apply


def gradients(problem, tensors, needed, gradient, slope, kept, upstream):
    """The gradients of all tensors, as `Tensors`."""
    weight = None
    if needed.sample_weight and upstream.loss is not None:
        weight = sample_weight_gradient(problem, tensors, kept.losses, upstream.loss, kept.summary)
    return Tensors(
        gradient if needed.input else None,
        None,
        sample_weight=weight,
        logit_scale=slope.sum() if needed.logit_scale else None,
    )


def gradients_in_graph(ctx, upstream):
    """The gradients of the tensors given, as compiled autograd has them in its graph: made anew (see `ops`)."""
    call, _, expected, overwritten, _ = ctx.of_call
    problem, needed = call.problem, Tensors(*ctx.needs_input_grad[2:])
    tensors, kept = ctx.saved_tensors[: call.given], Kept(None, *ctx.saved_tensors[call.given + 1 :])
    if not problem.inplace:
        given = Tensors(*tensors)._replace(gathered=kept.summary if problem.ranks else None)
        return ops.gradients(ops.arguments(problem, given), needed, upstream)[: call.given]
    refuse(False, upstream, overwritten)
    factor = upstream.loss.to(expected.dtype) / expected[0]
    gradient = torch.ops.xent_ext.rescaled(overwritten, ctx.version, factor)
    slope = None if kept.slope is None else kept.slope * factor
    return gradients(problem, Tensors(*tensors), needed, gradient, slope, kept, upstream)[: call.given]


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
    """What the gradient can be made for and divided by again: 1 in place of 0, infinity and NaN; as if never missed."""
    factor, misses = expected
    return torch.stack((torch.where(factor.isfinite() & (factor != 0), factor, 1), torch.zeros_like(misses)))


def refuse(plain, upstream, overwritten):
    """Raise RuntimeError where the logits would be needed, but were overwritten."""
    reason = None
    if plain:
        reason = OF_FORMULA
    elif upstream.has_stats():
        reason = "for the gradient of a statistic"
    elif overwritten is None:
        reason = "to go through backward a second time"
    if reason:
        raise RuntimeError(f"cross_entropy(..., inplace=True) does not keep the logits, which are needed {reason}")
