"""`DTensor` logits: the fused loss of each shard of the batch, where it is. Imported when there are any."""

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from . import dispatch, reference
from .functional import Options, describe, fused, statistics
from .layout import batch_shape, class_axis, visible


def cross_entropy(owner, options, *arguments):
    """`functional.fused` for a `DTensor` of logits that is replicated or sharded on the batch, with such results.

    A sum or a mean is `Partial` over the shards, each of which divides by the normaliser of all. The other tensors are
    redistributed: to where the rows of the logits are, or to everywhere.
    """
    input, target, weight, _, ignore_index, _, _, label_smoothing = arguments
    options = options or Options()
    problem, _ = describe(options, *arguments)
    check(problem, options, input, target, weight)
    shards = Shards(problem, input)
    target_here = local(target, shards.logits if problem.probabilities else shards.rows)
    weight_here = local(weight, shards.everywhere, shards.summed)
    arguments = (
        input.to_local(),
        target_here,
        weight_here,
        None,
        ignore_index,
        None,
        problem.reduction,
        label_smoothing,
    )
    here = options._replace(
        sample_weight=local(options.sample_weight, shards.rows),
        normalizer=local(options.normalizer, shards.everywhere),
        logit_scale=local(options.logit_scale, shards.everywhere, shards.summed),
        return_stats=problem.stats,
    )
    if problem.reduction == "mean" and options.normalizer is None:
        here = here._replace(normalizer=local(shards.total(normalizer(here, *arguments)), shards.everywhere))
    found = fused(owner, here, *arguments)
    loss, stats = found if problem.stats else (found, None)
    loss = shards.whole(loss) if problem.reduction == "none" else shards.total(loss)
    if not options.return_stats:
        return loss
    stats = {name: shards.whole(getattr(stats, name)) for name in problem.stats}
    return loss, statistics(options.return_stats, problem, target, stats)


class Shards:
    """Where the tensors of a call are: placements on the mesh of its logits."""

    def __init__(self, problem, input):
        self.mesh, self.logits = input.device_mesh, input.placements
        self.shape = batch_shape(visible(problem, input).shape)
        axis = class_axis(input.shape)
        self.rows = [Shard(p.dim - 1) if p.is_shard() and p.dim > axis else p for p in self.logits]
        self.everywhere = [Replicate() for _ in self.logits]
        self.summed = [Partial() if p.is_shard() else p for p in self.logits]  # a part from each shard

    def whole(self, rows):
        """What each has of its rows, as one tensor."""
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(rows, self.mesh, self.rows, run_check=False, shape=self.shape, stride=stride)

    def total(self, part):
        """The sum of what each has."""
        return DTensor.from_local(part, self.mesh, self.summed, run_check=False)


def local(value, placements, of_gradient=None):
    """What is here of a tensor in these placements, and of its gradient in those; numbers are everywhere."""
    if not isinstance(value, DTensor):
        return value
    return value.redistribute(placements=placements).to_local(grad_placements=of_gradient)


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
    if not dispatch.RECENT:
        raise NotImplementedError(
            f"DTensor logits need PyTorch 2.12 or newer, got {torch.__version__}; call "
            "torch.nn.functional.cross_entropy, or give input.to_local()"
        )
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
