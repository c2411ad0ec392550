"""`DTensor` logits: the fused loss of each shard of the batch, where it is. Imported when there are any."""

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from . import reference
from .backends import RECENT
from .call import Arguments, Options, prepare, problem_of, statistics
from .layout import batch_shape, class_axis, visible


class Shards:
    """A call with a `DTensor` of logits, replicated or sharded on the batch, and the call that is made of it here.

    `arguments` and `options` are those of the shard that is here; `whole` makes its results those of all. A sum or a
    mean is `Partial` over the shards, each of which divides by the normaliser of all. The other tensors are
    redistributed: to where the rows of the logits are, or to everywhere.
    """

    def __init__(self, arguments, options):
        self.given, self.options_given = arguments, options or Options()
        self.problem = problem = problem_of(arguments, self.options_given)
        check(problem, self.options_given, arguments)
        self.place(arguments.input)
        self.arguments = self.arguments_here()
        self.options = self.options_here()
        if problem.reduction == "mean" and self.options.normalizer is None:
            total = self.total(normalizer(self.arguments, self.options))
            self.options = self.options._replace(normalizer=local(total, self.everywhere))

    def place(self, input):
        """Where the tensors are: placements on the mesh of the logits."""
        self.mesh, self.logits = input.device_mesh, input.placements
        self.shape = batch_shape(visible(self.problem, input).shape)
        axis = class_axis(input.shape)
        self.rows = [Shard(p.dim - 1) if p.is_shard() and p.dim > axis else p for p in self.logits]
        self.everywhere = [Replicate() for _ in self.logits]
        self.summed = [Partial() if p.is_shard() else p for p in self.logits]  # a part from each shard

    def arguments_here(self):
        given, problem = self.given, self.problem
        return Arguments(
            input=given.input.to_local(),
            target=local(given.target, self.logits if problem.probabilities else self.rows),
            weight=local(given.weight, self.everywhere, self.summed),
            ignore_index=given.ignore_index,
            reduction=problem.reduction,
            label_smoothing=given.label_smoothing,
        )

    def options_here(self):
        given = self.options_given
        return given._replace(
            sample_weight=local(given.sample_weight, self.rows),
            normalizer=local(given.normalizer, self.everywhere),
            logit_scale=local(given.logit_scale, self.everywhere, self.summed),
            return_stats=self.problem.stats,
        )

    def whole(self, found):
        """The loss of all shards, and statistics if there are any, from what was found here."""
        loss, stats = found if self.problem.stats else (found, None)
        loss = self.of_rows(loss) if self.problem.reduction == "none" else self.total(loss)
        if not self.options_given.return_stats:
            return loss
        stats = {name: self.of_rows(getattr(stats, name)) for name in self.problem.stats}
        return loss, statistics(self.options_given.return_stats, self.problem, self.given.target, stats)

    def of_rows(self, rows):
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


def normalizer(arguments, options):
    """What the mean of these rows divides by: the sum of their weights."""
    problem, tensors = prepare(arguments, options)
    ones = torch.ones(
        batch_shape(visible(problem, tensors.input).shape),
        dtype=reference.accumulation_dtype(problem.dtype),
        device=tensors.input.device,
    )
    return reference.mean_normalizer(problem, tensors, ones)


def check(problem, options, arguments):
    """Raise for what has no loss of shards."""
    input = arguments.input
    if not RECENT:
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
    tensors = {"target": arguments.target, "weight": arguments.weight, **options._asdict()}
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor) and getattr(value, "device_mesh", None) != input.device_mesh:
            raise RuntimeError(f"{name} must be a DTensor on the mesh of input, got {type(value).__name__}")
    f = options.sample_weight
    if f is not None and f.requires_grad and problem.reduction == "mean" and options.normalizer is None:
        raise NotImplementedError(
            "sample_weight must not require grad with reduction='mean' over DTensor logits: give a normalizer"
        )
