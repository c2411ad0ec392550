"""What gradients are made of, outside graphs and in them: for autograd's Function, and for the operators."""

import dataclasses

import torch
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor

from . import backends, parallel, reference
from .problem import Kept, Tensors, Upstream, Wanted
from .reference import accumulation_dtype

OF_FORMULA = "for create_graph=True or batched gradients"  # which the plain formula has


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


def resolved(tensors):
    """`Upstream` or `Tensors` whose memory holds their values, which is what kernels read.

    That of a negative view holds the opposite; zeros that autograd made for itself have none.
    """
    for tensor in tensors:
        if tensor is not None and (tensor.is_neg() or tensor._is_zerotensor()):
            return tensors._make([None if each is None else each.clone() for each in tensors])
    return tensors


def is_batched(upstream):
    """Whether they stand for many upstream gradients: under torch.func, or `is_grads_batched=True`, an older vmap."""
    if _are_functorch_transforms_active():
        return True
    for up in upstream:  # noqa: SIM110 (any() would take as long as much of a small backward)
        if up is not None and is_legacy_batchedtensor(up):
            return True
    return False


def must_be_plain(upstream):
    """Whether the gradient is to be differentiated again, or is batched, as only that of the plain formula can be.

    Not for compiled autograd, which refuses both, and can't trace the question.
    """
    return torch.is_grad_enabled() or is_batched(upstream)


def forward_pass(problem, tensors, wanted, expected):
    """The setup for a call, with what its forward pass finds: where there are other ranks, from `gathered`."""
    setup = backends.implementation_of(problem, tensors.input).setup_for(problem, tensors, wanted)
    gathered, tensors = tensors.gathered, tensors._replace(gathered=None)
    found = setup.finish(tensors, gathered, expected) if problem.ranks else setup.forward(tensors, expected)
    loss, stats, kept = found
    return setup, loss, stats, Kept(*kept)


def made_for(upstream, problem, tensors, wanted):
    """`Kept` of the forward pass, with gradient and slope for these upstream gradients."""
    if upstream.has_stats() and wanted.gradient:
        setup, _, _, kept = forward_pass(problem, tensors, wanted, None)
        gradient, slope, _ = setup.backward(tensors, kept, upstream, None)
        return kept._replace(gradient=gradient, slope=slope)
    # A forward that expects this upstream gradient makes normaliser and gradient in one pass.
    expected = upstream.loss.to(accumulation_dtype(problem.dtype))
    if not problem.ranks:  # whose statistics are in what was gathered
        problem = dataclasses.replace(problem, stats=())
    if problem.reduction == "none":
        # The gradient of row losses with an upstream gradient each is that of their sum, weighted by these.
        factor = expected if tensors.sample_weight is None else expected * tensors.sample_weight
        problem, tensors = dataclasses.replace(problem, reduction="sum"), tensors._replace(sample_weight=factor)
        expected = expected.new_ones(())
    expected = torch.stack((expected, torch.zeros_like(expected)))
    return forward_pass(problem, tensors, wanted, expected)[-1]


def sample_weight_gradient(problem, tensors, losses, upstream, gathered=None):
    """The row losses times `upstream`; over the normaliser for a mean, less what they add to that.

    `gathered` are the summaries of all ranks, where there are others.
    """
    f, upstream = tensors.sample_weight, upstream.to(losses.dtype)
    if problem.ranks:
        weights, counted = parallel.row_weights(problem, tensors, gathered, losses.shape)
    else:
        weights, counted = reference.row_weights(problem, tensors, losses)
    if problem.reduction == "mean":
        normalizer = tensors.normalizer
        if normalizer is None:
            weights = torch.ones_like(losses) if weights is None else weights
            f = f if counted is None else torch.where(counted, f, 0.0)
            normalizer = reference.mean_divisor((f * weights).sum(), problem.on_all_ignored)
            losses = losses - weights * ((f * losses).sum() / normalizer)
        upstream = upstream / reference.mean_divisor(normalizer, problem.on_all_ignored)
    found = upstream * losses
    return found if counted is None else torch.where(counted, found, 0.0)


def differentiable_gradients(problem, tensors, needed, upstream):
    """The gradients of a loss that are needed, None for the others, by the plain formula."""
    if problem.ranks:
        raise NotImplementedError(f"classes of several ranks have no gradient {OF_FORMULA}")
    return by_formula(problem, lambda *given: reference.compute(problem, Tensors(*given)), tensors, needed, upstream)


def by_formula(problem, compute, tensors, needed, upstream):
    """The gradients of those tensors that need one, None for the others, where `compute` makes loss and statistics.

    That is for `create_graph=True` and for upstream gradients under vmap.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [
            tensor.detach().requires_grad_() if need and not tensor.requires_grad else tensor
            for tensor, need in zip(tensors, needed, strict=True)
        ]
        loss, stats = compute(*inputs)
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
    return [next(found) if need else None for need in needed]


def check_version(overwritten, version):
    """Raise RuntimeError where the gradient was overwritten that took the place of the logits."""
    if overwritten._version != version:
        raise RuntimeError(
            "the logits have been modified by an inplace operation since cross_entropy(..., inplace=True) put their "
            "gradient in their place"
        )
