"""What autograd is told of the last linear layer with its loss, and what compiled graphs hold of it.

For "mean" and "sum" the forward pass makes the gradients for the upstream gradient that is expected. They are small,
those of the layer's input and weight: whatever comes instead, backward multiplies them by the ratio. What is no
multiple of them is made in backward, from the logits again: for "none", for gradients of statistics, and where hooks on
saved tensors, as a checkpoint's, or other losses that wait for their backward say that nothing is to be made ahead.

In a graph there are two operators, of which the first makes the gradients for an upstream gradient of 1:

    linear_forward    the loss, the statistics, and what `linear.Made` holds of what is needed
    linear_backward   the gradients, from the logits again
"""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch._C._autograd import _get_current_graph_task_keep_graph, _top_saved_tensors_default_hooks

from . import linear, ops, parallel, reference
from .ahead import MOST_AHEAD, ahead_on
from .autograd import divisor
from .expectation import Expectation, expectation_of, first_expected
from .gradients import OF_FORMULA, by_formula, flat, must_be_plain, resolved, sample_weight_gradient, upstream_of
from .layout import classes_here
from .linear import Call, Gradients, Made
from .problem import Layer, Tensors, Upstream
from .reference import accumulation_dtype

# So many numbers of a gradient are widened at a time, where it is multiplied by a factor of a wider dtype.
PART = 1 << 24
TENSORS, GIVEN = len(Tensors._fields), len(Tensors._fields) + len(Layer._fields)


def loss(owner, call, tensors, layer):
    """The loss and a sequence of statistics, recorded for autograd where a tensor asks for it."""
    if torch.compiler.is_compiling():
        return torch.ops.xent_ext.linear_forward(*arguments(call, tensors, layer))[:2]
    if not any(call.needed):
        return linear.forward(call, tensors, layer, None)[:2]
    expectation = expectation_for(call.problem, tensors.input.device) if owner is None else expectation_of(owner)
    found = LinearCrossEntropy.apply(call, expectation, *tensors, *layer)
    return (found[0], found[1:]) if call.problem.stats else (found, ())


@functools.lru_cache(maxsize=256)
def expectation_for(problem, device):
    """That of all calls without a module, with the same options on the same device."""
    return Expectation()


class LinearCrossEntropy(torch.autograd.Function):
    """The layer and the loss, whose gradients may be made in the forward pass."""

    @staticmethod
    def forward(ctx, call, expectation, *given):
        tensors, layer = Tensors(*given[:TENSORS]), Layer(*given[TENSORS:])
        # None is let go of: to make it anew takes all products, and it is smaller than the logits that nobody holds.
        ahead = expected = None
        if not call.problem.ranks:  # all of which must do the same, whatever waits on one of their devices
            ahead = ahead_on(layer.weight if call.needed.weight else tensors.input, beside=MOST_AHEAD)
        if is_ahead(call, tensors, expectation) and (ahead is None or ahead.has_room()):
            expected = divisor(expectation.get(tensors.input, call.problem))
        loss, stats, made = linear.forward(call, tensors, layer, expected)
        if ahead is not None:
            ahead.note(made.gradients.weight)
        ctx.save_for_backward(*given, made.losses, made.summary, *made.gradients)
        ctx.of_call = call, expectation, expected, ahead
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*flat(call.problem, stats))
        return (loss, *stats) if stats else loss

    @staticmethod
    def backward(ctx, loss, *stats):
        call, expectation, expected, ahead = ctx.of_call
        upstream, saved = upstream_of(call.problem, loss, stats), ctx.saved_tensors
        tensors, layer = Tensors(*saved[:TENSORS]), Layer(*saved[TENSORS:GIVEN])
        losses, summary, *made = saved[GIVEN:]
        made = Made(Gradients(*made), losses, summary)
        if ahead is not None:
            ahead.took(made.gradients.weight)
        traced = torch.compiler.is_compiling()
        found = gradients(call, tensors, layer, made, upstream, expected, traced)
        is_number = loss is not None and call.problem.reduction != "none"
        if is_number and not (traced or must_be_plain(upstream)):
            factor = loss.to(accumulation_dtype(call.problem.dtype)).detach()
            expectation.note(torch.stack((factor, torch.zeros_like(factor))), tensors.input, call.problem)
        return None, None, *in_order(found)


def is_ahead(call, tensors, expectation):
    """Whether gradients may be made in the forward pass."""
    if call.is_deferred or not call.wanted.gradient:
        return False
    # Hooks copy what is saved elsewhere, or throw it away.
    if _top_saved_tensors_default_hooks(False) is not None:
        return False
    # Gradients for 1 may be too small for float16 to hold; those for the scale of automatic mixed precision are not.
    return call.dtype != torch.float16 or expectation.has_seen(tensors.input, call.problem)


def gradients(call, tensors, layer, made, upstream, expected, in_graph):
    """`Gradients` for these upstream gradients, of what was made for the one `expected`, if any."""
    if upstream.loss is None and not upstream.has_stats():
        return Gradients()
    problem = call.problem
    if not torch.compiler.is_dynamo_compiling() and must_be_plain(upstream):
        if problem.ranks:
            raise NotImplementedError(f"classes of several ranks have no gradient {OF_FORMULA}")
        return differentiable(call, tensors, layer, upstream)
    upstream = resolved(upstream)
    if not call.wanted.gradient:
        found = Gradients()
    elif expected is None or upstream.loss is None or upstream.has_stats():
        found = (again_in_graph if in_graph else linear.backward)(call, tensors, layer, upstream, made.summary)
    else:
        factor = upstream.loss.to(expected.dtype) / expected[0]
        found = made.gradients.each(times, factor) if in_graph else multiplied(made.gradients, factor)
    if call.needed.sample_weight and upstream.loss is not None:
        weight = sample_weight_gradient(problem, tensors, made.losses, upstream.loss, made.summary)
        found = found._replace(sample_weight=weight)
    if problem.ranks and found.input is not None:  # to which the classes of all ranks add
        sum_up = parallel.sum_over_ranks if in_graph else parallel.sum_over_ranks_
        found = found._replace(input=sum_up(found.input, problem))
    return found


def multiplied(made, factor):
    """The gradients times a factor: in their place, unless the graph is kept for more."""
    keep = _get_current_graph_task_keep_graph()
    if factor.is_cpu and factor.item() == 1:
        return made.each(torch.clone) if keep else made
    return made.each(times if keep else times_, factor)


def times(gradient, factor):
    return times_(gradient.clone(), factor)


def times_(gradient, factor):
    """Multiply a gradient by a 0-dim factor of a wider dtype, it may be, without rounding that before."""
    if gradient.dtype == factor.dtype or not gradient.is_cuda:
        return gradient.mul_(factor)
    for part in gradient.view(-1).split(PART):
        part.copy_(part.to(factor.dtype) * factor)
    return gradient


def differentiable(call, tensors, layer, upstream):
    """`Gradients` by the plain formula, which can be differentiated again."""

    def compute(*given):
        tensors, layer = Tensors(*given[:TENSORS]), Layer(*given[TENSORS:])
        problem = dataclasses.replace(call.problem, num_classes=0)  # there are logits of no others
        return reference.compute(problem, tensors._replace(input=logits_of(call, tensors, layer)))

    found = by_formula(call.problem, compute, (*tensors, *layer), in_order(call.needed), upstream)
    return out_of_order(found)


def logits_of(call, tensors, layer):
    """All logits but those of padding. Of ignored rows they are those of 0, whatever the input holds."""
    x = tensors.input.to(call.dtype)
    if not call.problem.probabilities:
        x = torch.where((tensors.target != call.problem.ignore_index).unsqueeze(1), x, 0.0)
    classes = classes_here(call.problem, layer.weight.shape[0])
    return F.linear(x, *[each if each is None else each[:classes].to(call.dtype) for each in layer])


def in_order(found):
    """`Gradients` in the order of `Tensors` and `Layer`."""
    given = Tensors(found.input, None, sample_weight=found.sample_weight, logit_scale=found.logit_scale)
    return *given, found.weight, found.bias


def out_of_order(found):
    tensors = Tensors(*found[:TENSORS])
    return Gradients(tensors.input, tensors.sample_weight, tensors.logit_scale, *found[TENSORS:])


# --- In graphs

_OF_CALL = "ScalarType product, int? chunk_rows, ScalarType? accumulate, int? most, bool[] needed"
_LAYER = "Tensor linear_weight, Tensor? linear_bias"


def arguments(call, tensors, layer):
    """A call as the operators take it."""
    of_call = call.dtype, call.chunk_rows, call.accumulate_dtype, call.max_counted_rows
    return *ops.arguments(call.problem, tensors), *layer, *of_call, [bool(need) for need in call.needed]


def call_of(arguments):
    """What `arguments` was made from."""
    *of_loss, weight, bias, dtype, chunk_rows, accumulate_dtype, most, needed = arguments
    problem, tensors = ops.call(of_loss)
    call = Call(problem, Gradients(*needed), dtype, chunk_rows, accumulate_dtype, most)
    return call, tensors, Layer(weight, bias)


@torch.library.custom_op(
    "xent_ext::linear_forward",
    mutates_args=(),
    schema=f"({ops.CALL}, {_LAYER}, {_OF_CALL}) -> (Tensor, Tensor[], Tensor[])",
)
def linear_forward(*arguments):
    call, tensors, layer = call_of(arguments)
    dtype = accumulation_dtype(call.problem.dtype)
    expected = first_expected(tensors.input.device, dtype) if is_ahead_in_graph(call) else None
    loss, stats, made = linear.forward(call, tensors, layer, expected)
    return loss, list(stats), [each for each in (made.losses, made.summary, *made.gradients) if each is not None]


def is_ahead_in_graph(call):
    """Whether the forward pass makes gradients: in float16 those for 1 may be too small to hold."""
    return not call.is_deferred and call.dtype != torch.float16 and call.wanted.gradient


@linear_forward.register_fake
def _(*arguments):
    call, tensors, layer = call_of(arguments)
    rows, acc = tensors.input.shape[0], accumulation_dtype(call.problem.dtype)
    loss = tensors.input.new_empty((rows,) if call.problem.reduction == "none" else (), dtype=call.problem.dtype)
    stats = [tensors.input.new_empty(rows, dtype=reference.stat_dtype(name, acc)) for name in call.problem.stats]
    by_row = [tensors.input.new_empty(rows, dtype=acc)] if call.needed.sample_weight else []
    if call.problem.ranks:
        fields = len(parallel.fields_of(call.problem, tensors.weight is not None))
        by_row.append(tensors.input.new_empty(call.problem.ranks, fields, rows, dtype=acc))
    return loss, stats, by_row + (fake_gradients(call, tensors, layer) if is_ahead_in_graph(call) else [])


def fake_gradients(call, tensors, layer):
    of = Gradients(tensors.input, None, tensors.logit_scale, *layer)
    return [torch.empty_like(each) for each, need in zip(of, call.needed, strict=True) if need and each is not None]


@torch.library.custom_op(
    "xent_ext::linear_backward",
    mutates_args=(),
    schema=f"(Tensor? summary, {ops.UPSTREAM}, {ops.CALL}, {_LAYER}, {_OF_CALL}) -> Tensor[]",
)
def linear_backward(summary, *arguments):
    count = len(Upstream._fields)
    found = linear.backward(*call_of(arguments[count:]), Upstream(*arguments[:count]), summary)
    return [each for each in found if each is not None]


@linear_backward.register_fake
def _(summary, *arguments):
    return fake_gradients(*call_of(arguments[len(Upstream._fields) :]))


def again_in_graph(call, tensors, layer, upstream, summary):
    """`linear.backward`, as an operator."""
    found = torch.ops.xent_ext.linear_backward(summary, *upstream, *arguments(call, tensors, layer))
    return named(call.needed._replace(sample_weight=False), found)


def named(needed, found):
    """`Gradients` from a list of those that are needed."""
    found = iter(found)
    return Gradients(*[next(found) if need else None for need in needed])


def save(ctx, inputs, output):
    _, stats, made = output
    ctx.call, tensors, layer = call_of(inputs)
    ctx.save_for_backward(*tensors, *layer, *made)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*flat(ctx.call.problem, stats), *made)


def differentiate(ctx, loss, stats, _):
    call, saved = ctx.call, ctx.saved_tensors
    tensors, layer, made = Tensors(*saved[:TENSORS]), Layer(*saved[TENSORS:GIVEN]), list(saved[GIVEN:])
    losses = made.pop(0) if call.needed.sample_weight else None
    summary = made.pop(0) if call.problem.ranks else None
    expected, found = None, Gradients()
    if is_ahead_in_graph(call):
        expected = first_expected(tensors.input.device, accumulation_dtype(call.problem.dtype))
        found = named(call.needed._replace(sample_weight=False), made)
    upstream = upstream_of(call.problem, loss, stats)
    found = in_order(gradients(call, tensors, layer, Made(found, losses, summary), upstream, expected, in_graph=True))
    options = [[] if getattr(call.problem, name) == () else None for name in ops.OPTIONS]  # it may be a list of tensors
    return *found[:TENSORS], *options, *found[TENSORS:], None, None, None, None, None


linear_forward.register_autograd(differentiate, setup_context=save)
