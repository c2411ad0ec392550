"""From the tensors of a call to launches, for all calls that are alike."""

import contextlib
import math

import torch

from ..layout import batch_shape, class_axis, gradient_memory, visible
from ..plan import Traffic
from ..problem import NUMBERS, Problem, Tensors, Upstream, number
from .device import constant
from .launches import Launches

FLOATING_STATS = ("logprob", "lse", "entropy", "max_prob")

# What kernels are given (see arguments.py), as tuples without names, which take less time to make.
NO_OPTIONS = None, (None, None), None  # smoothing, `Transform`, z-loss
NO_WEIGHTS = (None,) * 2
NO_RESULTS = (None,) * 7
NO_STATS = (None,) * 6  # of `Results`: all but the losses
NO_GRADIENT = None, None, (None,) * 4, None, None, None


class Setup:
    """The two passes of all calls that differ in nothing but the values in their tensors. It keeps none of these."""

    def __init__(self, problem, wanted, signatures, device, schedule=None, planned=None):
        self.problem, self.wanted = problem, wanted
        self.launches = launches = Launches(problem, signatures, device, schedule, planned)
        self.plan, self.layout, self.acc, self.per_row = launches.plan, launches.layout, launches.acc, launches.per_row
        tensors = Tensors(*signatures)
        shape, _, _, self.device, _ = tensors.input
        self.gpu = self.device.index if self.device.type == "cuda" else None
        self.batch = batch_shape(visible(problem, torch.empty(shape, device="meta")).shape)
        self.x_strides, self.g_strides, self.q_strides = self.layout.strides
        self.classes = self.layout.classes
        # Which classes these are, of how many.
        self.slice = (problem.class_start, problem.num_classes) if problem.ranks else (None, None)
        self.numbers = self.layout.inner, self.layout.row_outer, self.layout.row_inner
        self.has_options = problem.label_smoothing > 0 or any(
            getattr(tensors, name) is not None or getattr(problem, name) != getattr(Problem, name) for name in NUMBERS
        )
        # Whether the kernels read the tensors as they are.
        self.reads_all = not problem.is_partial and not any(launches.copied)
        self.makes_gradient = wanted.gradient and not self.per_row
        # Whether the forward pass leaves a summary of each row: split rows have their loss from it, too.
        self.summarised = self.plan.splits > 1 or (wanted.gradient and self.plan.schedule != "resident")
        # How many of `Kept`'s first fields there can be.
        can_be = True, wanted.slope, wanted.losses, launches.count or tensors.normalizer, self.summarised
        self.keeps = max(place for place, there in enumerate(can_be, 1) if there)
        self.only_loss = not (problem.stats or wanted.losses)
        # One number for each row or tile, or the loss itself. (`empty_like` is the quickest way to memory.)
        shape = self.batch if self.per_row else () if launches.whole else (self.plan.programs,)
        dtype = problem.dtype if self.per_row or launches.whole else self.acc
        self.like_losses = torch.empty((), dtype=dtype, device=self.device).expand(shape)
        self.like_loss = torch.empty((), dtype=problem.dtype, device=self.device)

    def on_gpu(self):
        """Where kernels are to be launched."""
        return contextlib.nullcontext() if self.gpu is None else torch.cuda.device(self.device)

    # What is given

    def given(self, tensors):
        """`Given`: a call's tensors, copied where no kernel could read them as they are."""
        input, target, weight, sample_weight = (tensors + NO_WEIGHTS)[:4]
        if not self.reads_all:
            input, target, weight, sample_weight = self.readable(tensors)
        smoothing, transform, z_loss = self.options(tensors) if self.has_options else NO_OPTIONS
        q = None
        if self.problem.probabilities:
            target, q = None, (target, *self.q_strides)
        target = target, q, weight, sample_weight, smoothing, self.classes, *self.slice
        return (input, *self.x_strides), target, transform, z_loss, *self.numbers

    def readable(self, tensors):
        """The first four, those copied that are not in the order that they are read in."""
        seen = visible(self.problem, tensors[0]), *Tensors(*tensors)[1:4]
        return [
            tensor.contiguous() if copied else tensor for tensor, copied in zip(seen, self.launches.copied, strict=True)
        ]

    def options(self, tensors):
        """Those that are numbers: the smoothing, the transform and the factor of the z-loss."""
        tensors = Tensors(*tensors)
        smoothing = self.number(self.problem.label_smoothing, 0.0)
        *transform, z_loss = [
            self.number(number(name, self.problem, tensors), getattr(Problem, name)) for name in NUMBERS
        ]
        return smoothing, tuple(transform), z_loss

    def number(self, value, neutral):
        """An option's number on the device; None where it changes nothing."""
        if isinstance(value, torch.Tensor):
            return value
        return None if value == neutral else constant(value, self.acc, self.device)

    # Memory

    def new(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.acc, device=self.device)

    def new_gradient(self, tensors, given):
        if self.reads_all and not self.problem.inplace:
            return torch.empty_like(tensors[0])
        (logits, *_), *_ = given
        return gradient_memory(self.problem, tensors[0], logits)

    def new_slope(self):
        """One number for each row, or for each tile that makes a gradient (see `streaming`); autograd adds them."""
        if self.plan.schedule == "resident":
            return self.new(self.layout.rows)
        blocks = -(-self.layout.classes // self.plan.block)
        return torch.zeros(blocks, self.layout.rows, dtype=self.acc, device=self.device)

    @property
    def summary_shape(self):
        """Of the summaries that the kernels here leave."""
        return self.plan.splits, self.launches.fields, self.layout.rows

    def new_results(self):
        """`Results`"""
        losses = torch.empty_like(self.like_losses)
        if self.only_loss:
            return losses, *NO_STATS
        stats = self.problem.stats
        predicts = "predicted" in stats or "correct" in stats
        return (
            losses,
            self.new(*self.batch) if self.wanted.losses else None,
            *[self.new(*self.batch) if name in stats else None for name in FLOATING_STATS],
            self.new(*self.batch, dtype=torch.int64) if predicts else None,
        )

    # The two passes

    def forward(self, tensors, expected):
        """The loss, statistics, and what `backward` needs.

        The gradient is made now for "mean" and "sum", if an upstream gradient is `expected`; it waits for that else.
        """
        if self.gpu is not None and self.gpu != torch.cuda.current_device():  # where kernels would be launched
            with torch.cuda.device(self.device):
                return self.forward(tensors, expected)
        launches, given = self.launches, self.given(tensors)
        normalizer = self.normalizer(tensors, given)
        memory = slope = None
        gradient, walk, ends = NO_GRADIENT, launches.walk, launches.ends
        if self.makes_gradient and expected is not None:
            walk, ends = launches.walk_with_gradient, launches.ends_with_gradient
            memory = self.new_gradient(tensors, given)
            slope = self.new_slope() if self.wanted.slope else None
            gradient = self.view(memory), slope, (expected, None, None, None), normalizer, expected, None
        elif launches.whole:  # one program divides by it
            gradient = *NO_GRADIENT[:3], normalizer, None, None
        results = self.new_results()
        summary = self.new(*self.summary_shape) if self.summarised else None
        if self.plan.schedule == "resident":
            walk(given, results, gradient)
        elif self.plan.splits == 1:
            walk(given, results, gradient, summary)
        else:
            launches.walk(given, results, NO_GRADIENT, summary)
            ends(given, results, gradient, summary)
        loss = results[0]
        if not (self.per_row or launches.whole):
            loss = self.total(loss, given, normalizer)
        stats = self.statistics(tensors[1], *results[2:]) if self.problem.stats else ()
        return loss, stats, (memory, slope, results[1], normalizer, summary)[: self.keeps]

    def backward(self, tensors, kept, upstream, expected):
        """The gradient for `upstream`, the slopes that belong to it, and what to expect the next time.

        `kept.gradient` is that for `expected`. It is returned as it is where the device finds that `upstream` is the
        same, and is otherwise overwritten with the right one. None: the gradient is made in a new tensor.
        """
        if self.gpu is not None and self.gpu != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self.backward(tensors, kept, upstream, expected)
        if self.problem.inplace and kept.gradient is not None:
            return self.rescaled(kept, upstream.loss, expected)
        given = self.given(tensors)
        memory, slope, seen = kept.gradient, kept.slope, None
        has_stats = bool(self.problem.stats) and upstream.has_stats()
        if memory is None:
            memory = self.new_gradient(tensors, given)
            slope = self.new_slope() if self.wanted.slope else None
        if self.per_row or has_stats or upstream.loss is None:
            upstream = Upstream(self.of_loss(upstream.loss), *map(self.by_row_number, upstream[1:]))
        if kept.gradient is None or has_stats:
            launch, expected = self.launches.deferred(*[up is None for up in upstream]), None
        else:
            launch = self.launches.again
            seen = torch.empty_like(expected)
        gradient = self.view(memory), slope, upstream, kept.normalizer, expected, seen
        if self.plan.schedule == "resident":
            launch(given, NO_RESULTS, gradient)
        else:
            launch(given, NO_RESULTS, gradient, kept.summary)
        return memory, slope, seen

    def rescaled(self, kept, upstream, expected):
        """`backward` where the logits are gone: gradient and slopes times `upstream` over `expected`."""
        seen = torch.empty_like(expected)
        view = self.view(kept.gradient)
        given = view, (None, None, None, None, None, self.classes, None, None), *NO_OPTIONS[1:], *self.numbers
        self.launches.rescale(given, (view, None, Upstream(upstream), None, expected, seen))
        slope = None if kept.slope is None else kept.slope * (upstream.to(self.acc) / expected[0])
        return kept.gradient, slope, seen

    def view(self, memory):
        """`View`: what of the gradient is that of the rows."""
        return visible(self.problem, memory) if self.problem.is_partial else memory, *self.g_strides

    def of_loss(self, upstream):
        """The loss's upstream gradient: one number, or with "none" one for each row."""
        if upstream is None:
            upstream = constant(0.0, self.problem.dtype, self.device)
        if self.per_row and not upstream.dim():
            upstream = upstream.expand(self.layout.rows)
        return aligned(upstream) if self.per_row else upstream

    def by_row_number(self, upstream):
        """A statistic's upstream gradient, if it has one, in the order of row numbers."""
        return None if upstream is None else aligned(upstream.to(self.acc).reshape(-1))

    def statistics(self, target, *found):
        """Those that are asked for, in the shape of the rows."""
        found = dict(zip((*FLOATING_STATS, "predicted"), found, strict=True))
        if "correct" in self.problem.stats:
            found["correct"] = self.correct(target, found["predicted"])
        return tuple([found[name] for name in self.problem.stats])

    def correct(self, target, predicted):
        if self.problem.probabilities:
            return predicted == target.argmax(class_axis(target.shape))
        target = target.long().view_as(predicted)
        return (predicted == target) & (target != self.problem.ignore_index)

    # The normaliser, and the final sum

    def normalizer(self, tensors, given):
        """Its only or its partial sums; None where there are few rows, or where it is their number."""
        count = self.launches.count
        if count is None:
            return tensors[4] if len(tensors) > 4 else None
        parts = self.new(count.programs)
        count(given[1], parts)
        return parts

    def total(self, losses, given, normalizer):
        """The sum of the tiles' losses over the normaliser, 0-dim, in the loss's dtype."""
        _, target, *_ = given
        partial_sums = self.launches.partial_sums
        if partial_sums is not None:
            partial = self.new(partial_sums.programs)
            partial_sums(target, losses, None, partial)
            losses = partial
        out = torch.empty_like(self.like_loss)
        self.launches.sum(target, losses, normalizer, out)
        return out

    def traffic(self, tensors):
        """What a call moves and allocates, forward and backward, without running it."""
        plan, acc, rows = self.plan, self.acc.itemsize, self.layout.rows
        input, target = tensors.input, tensors.target
        logits = rows * self.layout.classes * input.element_size()
        summary = math.prod(self.summary_shape) * acc if self.summarised else 0
        # A streamed or split row is read again for its gradient, and so is every row whose gradient is deferred.
        walks = 2 if self.wanted.gradient and (self.per_row or plan.schedule != "resident") else 1
        stats = len(self.problem.stats) * rows * acc
        gradient = input.numel() * input.element_size() if self.wanted.gradient else 0
        copies = sum(
            tensor.numel() * tensor.element_size()
            for tensor, copied in zip(tensors, self.launches.copied, strict=False)
            if copied
        )
        reads = walks * (logits + target.numel() * target.element_size()) + summary + copies
        new = summary + self.like_losses.numel() * self.like_losses.element_size() + stats + copies
        numbers = {
            "ROWS": plan.rows,
            "BLOCK": plan.block,
            "REST": plan.rest,
            "EDGE": plan.edge,
            "SPLITS": plan.splits,
            "num_warps": plan.num_warps,
            "num_ctas": plan.num_ctas,
            "programs": plan.programs,
            "at_once": plan.at_once or plan.programs,
        }
        memory = new + (0 if self.problem.inplace else gradient)
        return Traffic(plan.schedule, numbers, bytes_read=reads, bytes_written=new + gradient, memory=memory)


def aligned(rows):
    """Numbers of rows as kept code takes them: one after another, from 16 bytes on."""
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows
