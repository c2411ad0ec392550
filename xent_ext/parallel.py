"""Classes on several devices: each rank of a process group has a slice of them.

Each rank summarises the rows of its slice (`xent_ext.summary`); one all-gather brings the summaries of all to each; and
from these every rank makes the same loss and statistics, to the bit, and the gradient of its own slice. Backward has
nothing to tell the others. This is the streaming schedule with the parts of a row on several devices: the logits are
read twice and their gradient is written once, and of each row four numbers go to every other rank, a fifth with class
weights, four more with statistics.

The setup here is to `autograd` what that of any implementation is. Those of the implementations know nothing of other
ranks but how many there are: they make summaries, and go on from those of all.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from . import backends, reference
from .layout import batch_shape, class_axis, visible
from .problem import Kept, Problem, Tensors, Wanted
from .reference import accumulation_dtype
from .summary import base_of, fields_of


class Slice(NamedTuple):
    """Which of all classes these are: the fields of `Problem` that say so."""

    num_classes: int
    class_start: int = 0
    group: str = ""
    ranks: int = 0
    rank: int = 0


def slice_of(options, columns):
    """The `Slice` that the options ask for of logits with so many columns."""
    group, start, classes = options.process_group, options.class_start, options.num_classes
    if group is None:
        if classes is not None and classes > columns:
            raise ValueError(
                f"num_classes must be at most the number of columns of input, {columns}, without a process_group, "
                f"got {classes}"
            )
        return Slice(0 if classes == columns or classes is None else classes)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError("process_group must be a group that this process is in")
    if start is None:
        start, most = rank * columns, ranks * columns
        classes = most if classes is None else classes
        if classes > most:
            raise ValueError(
                f"num_classes must be at most {ranks} slices of {columns} columns, {most}, got {classes}; slices of "
                "several sizes need class_start"
            )
    return Slice(classes, start, group.group_name, ranks, rank)


def setup_for(problem, tensors, wanted):
    """`Setup` for a call whose problem has a group."""
    acc = accumulation_dtype(problem.dtype)
    if problem.reduction == "mean":  # its normaliser is settled here
        tensors = Tensors(*tensors)._replace(normalizer=torch.empty((), dtype=acc, device=tensors[0].device))
    make = backends.implementation_for(tensors[0]).setup_for
    return Setup(problem, wanted, make(of_implementation(problem), tensors, wanted._replace(losses=True)))


def of_implementation(problem):
    """What an implementation is asked for: whether a prediction is correct is found here, from the class predicted."""
    if "correct" not in problem.stats:
        return problem
    stats = {*problem.stats, "predicted"} - {"correct"}
    return dataclasses.replace(problem, stats=tuple(name for name in reference.STATS if name in stats))


def new_summary(problem, tensors):
    """Memory for the summary of each row, (fields, rows)."""
    fields = fields_of(problem, tensors.weight is not None)
    rows = math.prod(batch_shape(visible(problem, tensors.input).shape))
    return torch.empty(len(fields), rows, dtype=accumulation_dtype(problem.dtype), device=tensors.input.device)


class Setup(NamedTuple):
    """The two passes of all calls that are alike."""

    problem: Problem
    wanted: Wanted
    local: Any  # the implementation's, for the logits that are here

    def forward(self, tensors, expected):
        """The loss, the statistics and what `backward` needs; with one all-gather."""
        return self.finish_started(self.start(tensors), expected)

    def summary(self, tensors):
        """That of each row of this slice, (fields, rows)."""
        problem = self.problem
        fields, base = fields_of(problem, tensors.weight is not None), len(base_of(problem))
        packed = new_summary(problem, tensors)
        self.local.summarise(self.given(tensors), packed[:base])
        if "weight" in fields:
            packed[base].copy_(weights_here(problem, tensors))
        if "true" in fields:
            most, true = largest(tensors.target)
            packed[base].copy_(most)
            packed[base + 1].copy_(true + problem.class_start)
        return packed

    def finish(self, tensors, gathered, expected):
        """The rest of `forward`, from the summaries of all ranks, (ranks, fields, rows)."""
        problem = self.problem
        rows = batch_shape(visible(problem, tensors.input).shape)
        tensors = with_normalizer(problem, tensors, gathered, rows)
        normalizer = tensors.normalizer
        loss, stats, kept = self.local.forward(self.given(tensors), expected, gathered)
        kept = Kept(*kept)
        if problem.reduction != "none":  # added up in the same order on every rank, whatever plan each has
            _, counted = row_weights(problem, tensors, gathered, rows)
            loss = reference.reduced(
                kept.losses, None, counted, tensors.sample_weight, normalizer, problem.reduction, problem.on_all_ignored
            ).to(problem.dtype)
        losses = kept.losses if self.wanted.losses else None
        kept = kept._replace(losses=losses, normalizer=normalizer, summary=gathered)
        return loss, self.statistics(tensors, gathered, stats), tuple(kept)

    def backward(self, tensors, kept, upstream, expected):
        """As that of any setup; without a collective."""
        tensors = Tensors(*tensors)._replace(normalizer=kept.normalizer)
        return self.local.backward(self.given(tensors), kept, upstream, expected)

    def start(self, tensors):
        """Start what `forward` does, up to the gather; `finish_started` ends it."""
        tensors = Tensors(*tensors)
        return tensors, start_gathering(self.summary(tensors), self.problem)

    def finish_started(self, started, expected):
        tensors, gathering = started
        return self.finish(tensors, wait_for(gathering, self.problem), expected)

    def given(self, tensors):
        """The tensors as autograd gives them to a setup."""
        return tensors[: max(place for place, tensor in enumerate(tensors) if tensor is not None) + 1]

    def statistics(self, tensors, gathered, found):
        """Those that are asked for, of those that the implementation found."""
        found = dict(zip(self.local.problem.stats, found, strict=True))
        if "correct" in self.problem.stats:
            found["correct"] = self.correct(tensors.target, gathered, found["predicted"])
        return tuple(found[name] for name in self.problem.stats)

    def correct(self, target, gathered, predicted):
        if self.problem.probabilities:
            most, true = gathered[:, -2], gathered[:, -1]
            first = torch.where(most == most.amax(0), true, torch.inf).amin(0)
            return predicted == first.long().view_as(predicted)
        target = target.long().view_as(predicted)
        return (predicted == target) & (target != self.problem.ignore_index)


def row_weights(problem, tensors, gathered, shape):
    """`reference.row_weights`, in which the weight of a row's class comes from the rank that has it."""
    like = gathered.new_ones(shape)
    weights, counted = reference.row_weights(problem, tensors._replace(weight=None), like)
    fields = fields_of(problem, tensors.weight is not None)
    if "weight" in fields:
        weights = torch.where(counted, gathered[:, fields.index("weight")].sum(0).view(shape), 0.0)
    return like if weights is None else weights, counted


def with_normalizer(problem, tensors, gathered, shape):
    """The tensors with what a mean over rows of this shape divides by."""
    if problem.reduction != "mean" or tensors.normalizer is not None:
        return tensors
    weights, counted = row_weights(problem, tensors, gathered, shape)
    total = reference.reduced(weights, weights, counted, tensors.sample_weight, None, "sum", "nan")
    return tensors._replace(normalizer=total)


def weights_here(problem, tensors):
    """The weight of each row's class where that is in this slice, else 0; (rows)."""
    weight, index = tensors.weight, tensors.target.long().reshape(-1) - problem.class_start
    if not weight.numel():
        return weight.new_zeros(index.shape)
    here = (index >= 0) & (index < weight.numel())
    return torch.where(here, weight.index_select(0, index.clamp(0, weight.numel() - 1)), 0)


def normalizer_here(problem, tensors, ones):
    """The sum of the weights of all rows, or of those rows whose class is here; and whether it is that."""
    if tensors.weight is None or problem.probabilities:
        return reference.mean_normalizer(problem, tensors._replace(weight=None), ones), False
    _, counted = reference.row_weights(problem, tensors._replace(weight=None), ones)
    weights = torch.where(counted, weights_here(problem, tensors).view(ones.shape).to(ones.dtype), 0.0)
    return reference.reduced(weights, weights, counted, tensors.sample_weight, None, "sum", "nan"), True


def largest(q):
    """The largest of each row's probabilities, and its column, the first of several; (rows)."""
    axis = class_axis(q.shape)
    if not q.shape[axis]:
        none = q.new_zeros(batch_shape(q.shape)).reshape(-1)
        return none - torch.inf, none
    most, column = q.max(axis)
    return most.reshape(-1), column.reshape(-1)


def sum_over_ranks(tensor, problem):
    """The sum of what all ranks have."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(tensor, "sum", problem.group))


def sum_over_ranks_(tensor, problem):
    """The same in its place."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce_(tensor, "sum", problem.group))


def group_of(problem):
    """The process group of the ranks that share the classes."""
    return dist.distributed_c10d._resolve_process_group(problem.group)


def start_gathering(packed, problem):
    """Start to gather the summaries of all ranks; their memory."""
    return torch.ops._c10d_functional.all_gather_into_tensor(packed, problem.ranks, problem.group)


def wait_for(gathered, problem):
    """The summaries of all ranks, (ranks, fields, rows), in the order of ranks."""
    gathered = torch.ops._c10d_functional.wait_tensor(gathered)
    return gathered.view(problem.ranks, -1, gathered.shape[1])


def traffic(problem, tensors, want_gradient):
    """What a call moves and allocates, forward and backward, without running it."""
    setup = setup_for(problem, tensors, Wanted(want_gradient))
    found = backends.implementation_for(tensors.input).traffic(setup.local.problem, tensors, want_gradient)
    return with_collective(found, problem, tensors, math.prod(batch_shape(visible(problem, tensors.input).shape)))


def with_collective(traffic, problem, tensors, rows):
    """`Traffic` with what is sent of so many rows, and held of what all ranks sent."""
    mine = rows * len(fields_of(problem, tensors.weight is not None)) * accumulation_dtype(problem.dtype).itemsize
    return dataclasses.replace(
        traffic, sent=mine, received=(problem.ranks - 1) * mine, memory=traffic.memory + problem.ranks * mine
    )
