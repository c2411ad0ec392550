"""`DTensor` logits: the fused loss of each shard of the batch or of the classes, where it is.

Imported when there are any.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from . import parallel, reference
from .backends import RECENT
from .call import Arguments, Options, prepare, problem_of, statistics, stats_by_row
from .layout import batch_shape, class_axis, visible
from .reference import accumulation_dtype


class Shards:
    """A call with a `DTensor` of logits, sharded on the batch or the classes or not, and the call that is made of it.

    `arguments` and `options` are those of the shard that is here; `whole` makes its results those of all. A sum or a
    mean is `Partial` over shards of the batch, each of which divides by the normaliser of all. Shards of the classes
    have the same results: they are ranks of a process group to the call here. The other tensors are redistributed: to
    where the rows, or the classes, of the logits are, or to everywhere.
    """

    def __init__(self, arguments, options):
        self.given, self.options_given = arguments, options or Options()
        self.problem = problem = problem_of(arguments, self.options_given)
        check(problem, self.options_given, arguments)
        self.shape = batch_shape(visible(problem, torch.empty(arguments.input.shape, device="meta")).shape)
        self.place(arguments.input.device_mesh, arguments.input.placements, axis_of_classes(problem, arguments.input))
        self.arguments = self.arguments_here()
        self.options = self.options_here(arguments.input.shape[axis_of_classes(problem, arguments.input)])
        self.settle_normalizer(*prepare(self.arguments, self.options))

    def place(self, mesh, logits, axis):
        """Where the tensors are on the mesh, whose logits are in these placements and have their classes at `axis`."""
        self.mesh, self.logits, one = mesh, logits, Replicate()
        self.classes = next((d for d, p in enumerate(logits) if p.is_shard(axis)), None)  # dimension of the mesh
        of_rows = [one if d == self.classes else p for d, p in enumerate(logits)]
        self.rows = [Shard(p.dim - 1) if p.is_shard() and p.dim > axis else p for p in of_rows]
        self.everywhere = [one for _ in logits]
        self.by_class = [Shard(0) if d == self.classes else one for d, _ in enumerate(logits)]
        self.summed = [Partial() if p.is_shard() else p for p in of_rows]  # a part from each shard of the batch
        self.parts = [Partial() if p.is_shard() else p for p in logits]  # and of the classes

    def settle_normalizer(self, problem, tensors):
        """What a mean divides by where the batch is in shards, of these here and of all."""
        if (
            problem.reduction != "mean"
            or tensors.normalizer is not None
            or not any(p.is_partial() for p in self.summed)
        ):
            return
        if tensors.sample_weight is not None and tensors.sample_weight.requires_grad:
            raise NotImplementedError(
                "sample_weight must not require grad with reduction='mean' over shards of the batch: give a normalizer"
            )
        found, of_classes = normalizer(problem, tensors)
        total = DTensor.from_local(found, self.mesh, self.parts if of_classes else self.summed, run_check=False)
        self.options = self.options._replace(normalizer=local(total, self.everywhere))

    def arguments_here(self):
        given, problem = self.given, self.problem
        return Arguments(
            input=given.input.to_local(),
            target=self.placed(given.target, self.logits if problem.probabilities else self.rows),
            weight=self.placed(given.weight, self.by_class, self.summed),
            ignore_index=given.ignore_index,
            reduction=problem.reduction,
            label_smoothing=given.label_smoothing,
        )

    def options_here(self, classes):
        """Those of the call here, where there are so many classes in all."""
        given = self.options_given
        return given._replace(
            sample_weight=self.placed(given.sample_weight, self.rows),
            normalizer=self.placed(given.normalizer, self.everywhere),
            logit_scale=self.placed(given.logit_scale, self.everywhere, self.parts),
            return_stats=stats_by_row(given.return_stats),
            **self.slice_here(classes),
        )

    def slice_here(self, classes):
        """Which of the classes are here, as options."""
        if self.classes is None:
            return {}
        group = self.mesh.get_group(self.classes)
        # As `torch.chunk` has them. What DTensor says of offsets is no number in a graph.
        start = min(dist.get_rank(group) * -(-classes // dist.get_world_size(group)), classes)
        classes = self.options_given.num_classes or classes
        return {"process_group": group, "class_start": start, "num_classes": classes}

    def placed(self, value, placements, of_gradient=None):
        """What is here of a tensor in these placements; a plain one is the same everywhere."""
        if isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
            value = DTensor.from_local(value, self.mesh, self.everywhere, run_check=False)
        return local(value, placements, of_gradient)

    def whole(self, found):
        """The loss of all shards, and statistics if there are any, from what was found here."""
        loss, stats = found if self.problem.stats else (found, None)
        loss = self.of_rows(loss) if self.problem.reduction == "none" else self.total(loss)
        if not self.options_given.return_stats:
            return loss
        stats = {name: self.of_rows(getattr(stats, name)) for name in self.problem.stats}
        target = self.given.target[:, 1:] if self.options_given.shift else self.given.target
        return loss, statistics(self.options_given.return_stats, self.problem, target, stats)

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


def has_shards_of_classes(input):
    return any(placement.is_shard(class_axis(input.shape)) for placement in input.placements)


def axis_of_classes(problem, input):
    return 2 if problem.shift else class_axis(input.shape)


def normalizer(problem, tensors):
    """What the mean of these rows divides by, the sum of their weights; whether other ranks' classes add to it."""
    ones = torch.ones(rows_of(problem, tensors), dtype=accumulation_dtype(problem.dtype), device=tensors.input.device)
    if not problem.ranks:
        return reference.mean_normalizer(problem, tensors, ones), False
    return parallel.normalizer_here(problem, tensors, ones)


def rows_of(problem, tensors):
    """The shape of the rows."""
    if not problem.probabilities:
        return tensors.target.shape if tensors.input.dim() > 1 else ()
    return batch_shape(tensors.target.shape)


def check(problem, options, arguments):
    """Raise for what has no loss of shards."""
    input = arguments.input
    if not RECENT:
        raise NotImplementedError(
            f"DTensor logits need PyTorch 2.12 or newer, got {torch.__version__}; call "
            "torch.nn.functional.cross_entropy, or give input.to_local()"
        )
    axis = axis_of_classes(problem, input)
    batch = {0} if problem.shift else set(range(input.dim())) - {axis}
    for placement in input.placements:
        if not placement.is_replicate() and not (type(placement) is Shard and placement.dim in {*batch, axis}):
            raise NotImplementedError(
                f"input must be replicated or sharded on its batch dimensions, {sorted(batch)} of shape "
                f"{tuple(input.shape)}, or its classes, got {placement}; call input.redistribute(placements=...) before"
            )
    if sum(placement.is_shard(axis) for placement in input.placements) > 1:
        raise NotImplementedError(
            f"the classes of input must be sharded on one dimension of its mesh, got {input.placements}"
        )
    if options.process_group is not None:
        raise ValueError("process_group is for plain tensors: a DTensor says where its classes are")
    has_shards_of_batch = any(placement.is_shard() and placement.dim in batch for placement in input.placements)
    tensors = {"target": arguments.target, "weight": arguments.weight, **options._asdict()}
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor) or getattr(value, "device_mesh", None) == input.device_mesh:
            continue
        if has_shards_of_batch or isinstance(value, DTensor):
            raise RuntimeError(f"{name} must be a DTensor on the mesh of input, got {type(value).__name__}")
