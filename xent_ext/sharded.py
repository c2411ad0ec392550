"""`DTensor` logits: the fused loss of each shard of the batch, where it is. Imported when there are any."""

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from . import reference
from .functional import Options, describe, fused, statistics
from .layout import batch_shape, class_axis, visible


def cross_entropy(owner, options, *arguments):
    """`functional.fused` for a `DTensor` of logits that is replicated or sharded on the batch, with such results.

    A sum or a mean is `Partial` over the shards, each of which divides by the normaliser of all. The other tensors are
    redistributed: to where the rows of the input are, or to everywhere.
    """
    input, target, weight, _, ignore_index, _, _, label_smoothing = arguments
    options = options or Options()
    problem, _ = describe(options, *arguments)
    check(problem, options, input, target, weight)
    mesh, of_input = input.device_mesh, input.placements
    of_rows = [by_row(input, placement) for placement in of_input]
    everywhere = [Replicate() for _ in of_input]
    summed = [Partial() if placement.is_shard() else placement for placement in of_input]
    shape = batch_shape(visible(problem, input).shape)
    stride = torch.empty(shape, device="meta").stride()

    def local(tensor, placements, of_gradient=None):
        if not isinstance(tensor, DTensor):
            return tensor
        return tensor.redistribute(placements=placements).to_local(grad_placements=of_gradient)

    def whole(rows):
        return DTensor.from_local(rows, mesh, of_rows, run_check=False, shape=shape, stride=stride)

    arguments = (
        input.to_local(),
        local(target, of_input if problem.probabilities else of_rows),
        local(weight, everywhere, summed),
        None,
        ignore_index,
        None,
        problem.reduction,
        label_smoothing,
    )
    here = options._replace(
        sample_weight=local(options.sample_weight, of_rows),
        normalizer=local(options.normalizer, everywhere),
        logit_scale=local(options.logit_scale, everywhere, summed),
        return_stats=problem.stats,
    )
    if problem.reduction == "mean" and options.normalizer is None:
        own = DTensor.from_local(normalizer(here, *arguments), mesh, summed, run_check=False)
        here = here._replace(normalizer=local(own, everywhere))
    found = fused(owner, here, *arguments)
    loss, stats = found if problem.stats else (found, None)
    loss = whole(loss) if problem.reduction == "none" else DTensor.from_local(loss, mesh, summed, run_check=False)
    if not options.return_stats:
        return loss
    stats = {name: whole(getattr(stats, name)) for name in problem.stats}
    return loss, statistics(options.return_stats, problem, target, stats)


def by_row(input, placement):
    """The placement of rows, of a dimension less, whose logits have this one."""
    after_class = placement.is_shard() and placement.dim > class_axis(input.shape)
    return Shard(placement.dim - 1) if after_class else placement


def normalizer(options, *arguments):
    """What the mean of these rows divides by: the sum of their weights."""
    problem, tensors = describe(options, *arguments)
    ones = torch.ones(
        batch_shape(visible(problem, tensors.input).shape),
        dtype=reference.accumulation_dtype(problem.dtype),
        device=tensors.input.device,
    )
    weights, counted = reference.row_weights(problem, tensors, ones)
    losses = ones if weights is None else weights
    return reference.reduced(losses, weights, counted, tensors.sample_weight, None, "sum", problem.on_all_ignored)


def check(problem, options, input, target, weight):
    """Raise for what has no loss of shards."""
    batch = {0} if problem.shift else set(range(input.dim())) - {class_axis(input.shape)}
    for placement in input.placements:
        if not placement.is_replicate() and not (type(placement) is Shard and placement.dim in batch):
            raise NotImplementedError(
                f"input must be replicated or sharded on its batch dimensions, {sorted(batch)} of shape "
                f"{tuple(input.shape)}, got {placement}; call input.redistribute(placements=...) before, or "
                "torch.nn.functional.cross_entropy, which takes logits sharded on the classes"
            )
    tensors = {"target": target, "weight": weight, **options._asdict()}
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor) and getattr(value, "device_mesh", None) != input.device_mesh:
            raise RuntimeError(f"{name} must be a DTensor on the mesh of input, got {type(value).__name__}")
    f = options.sample_weight
    if f is not None and f.requires_grad and problem.reduction == "mean" and options.normalizer is None:
        raise NotImplementedError(
            "sample_weight must not require grad with reduction='mean' over DTensor logits: give a normalizer"
        )
