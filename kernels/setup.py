"""From the tensors of a call to launches, for all calls that are alike."""

import math

import torch

from ..layout import batch_shape, class_axis, contiguous, gradient_memory, visible
from ..plan import Traffic
from ..problem import NUMBERS, Made, Problem, Tensors, Upstream, Wanted, number
from .arguments import Given, Gradient, Results, Target, Transform, View
from .device import constant
from .launches import Launches, signatures

FLOATING_STATS = ("logprob", "lse", "entropy", "max_prob")
NO_TARGET, NO_TRANSFORM = Target(None, None, None, None, None), Transform(None, None)
NO_RESULTS = Results(None, None, None, None, None, None, None)
NO_GRADIENT = Gradient(None, None, Upstream(), None, None, None)


class Setup:
    """The two passes of all calls that differ in nothing but the values in their tensors. It keeps none of these."""

    def __init__(self, problem, wanted, signatures, device, schedule=None, planned=None):
        self.problem, self.wanted, self.signatures = problem, wanted, signatures
        self.launches = launches = Launches(problem, signatures, device, schedule, planned)
        self.plan, self.layout, self.acc, self.per_row = launches.plan, launches.layout, launches.acc, launches.per_row
        (self.shape, _, _, self.device, _), *_ = signatures
        self.gpu = self.device.index if self.device.type == "cuda" else None
        self.batch = batch_shape(visible(problem, torch.empty(self.shape, device="meta")).shape)
        self.x_view, self.g_view, self.q_view = self.layout.strides
        self.numbers = self.layout.inner, self.layout.classes, self.layout.row_outer, self.layout.row_inner
        self.has_numbers = any(
            place is not None or getattr(problem, name) != getattr(Problem, name)
            for name, place in zip(NUMBERS, signatures[-len(NUMBERS) :], strict=True)
        )
        self.makes_gradient = wanted.gradient and not self.per_row
        # Whether the forward pass leaves a summary of each row: split rows have their loss from it, too.
        self.summarised = self.plan.splits > 1 or (wanted.gradient and self.plan.schedule != "resident")
        self.loss_shape = self.batch if self.per_row else () if launches.whole else (self.plan.programs,)
        self.loss_dtype = problem.dtype if self.per_row or launches.whole else self.acc

    # What is given

    def given(self, tensors):
        """A call's tensors, copied where no kernel could read them as they are."""
        x, index, q = visible(self.problem, tensors.input), tensors.target, None
        if x.stride() != self.launches.x_stride:
            x = x.contiguous()
        if self.problem.probabilities:
            q = View(index if index.stride() == self.launches.q_stride else index.contiguous(), *self.q_view)
            index = None
        smoothing = self.number(self.problem.label_smoothing, 0.0)
        target = Target(contiguous(index), q, contiguous(tensors.weight), contiguous(tensors.sample_weight), smoothing)
        transform, z_loss = NO_TRANSFORM, None
        if self.has_numbers:
            *numbers, z_loss = [
                self.number(number(name, self.problem, tensors), getattr(Problem, name)) for name in NUMBERS
            ]
            transform = Transform(*numbers)
        return Given(View(x, *self.x_view), target, transform, z_loss, *self.numbers)

    def number(self, value, neutral):
        """An option's number on the device; None where it changes nothing."""
        if isinstance(value, torch.Tensor):
            return value
        return None if value == neutral else constant(value, self.acc, self.device)

    # Memory

    def new(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.acc, device=self.device)

    def new_gradient(self, tensors, given):
        return gradient_memory(self.problem, tensors.input, given.logits.ptr)

    def new_slope(self):
        """One number for each row, or for each tile that makes a gradient (see `streaming`); autograd adds them."""
        if not self.wanted.slope:
            return None
        if self.plan.schedule == "resident":
            return self.new(self.layout.rows)
        blocks = -(-self.layout.classes // self.plan.block)
        return torch.zeros(blocks, self.layout.rows, dtype=self.acc, device=self.device)

    @property
    def summary_shape(self):
        return 8 if self.problem.stats else 4, self.layout.rows, self.plan.splits

    def new_results(self):
        losses = self.new(*self.loss_shape, dtype=self.loss_dtype)
        stats = self.problem.stats
        if not stats and not self.wanted.losses:
            return Results(losses, None, None, None, None, None, None)
        predicts = "predicted" in stats or "correct" in stats
        return Results(
            losses,
            self.new(*self.batch) if self.wanted.losses else None,
            *[self.new(*self.batch) if name in stats else None for name in FLOATING_STATS],
            self.new(*self.batch, dtype=torch.int64) if predicts else None,
        )

    # The two passes

    def forward(self, tensors, expected):
        """The loss, its gradient for the upstream gradient that is `expected` (None: 1), and what `backward` needs.

        The gradient is made now for "mean" and "sum"; with "none" it waits for the upstream gradient.
        """
        if self.gpu is not None and self.gpu != torch.cuda.current_device():  # where kernels would be launched
            with torch.cuda.device(self.device):
                return self.forward(tensors, expected)
        launches, given = self.launches, self.given(tensors)
        normalizer = self.normalizer(tensors, given)
        memory = slope = None
        gradient = NO_GRADIENT
        if self.makes_gradient:
            memory, slope = self.new_gradient(tensors, given), self.new_slope()
            upstream = Upstream(self.one() if expected is None else expected)
            gradient = Gradient(self.view(memory), slope, upstream, normalizer, None, None)
        elif launches.whole:
            gradient = Gradient(None, None, NO_GRADIENT.upstream, normalizer, None, None)
        results = self.new_results()
        summary = self.new(*self.summary_shape) if self.summarised else None
        if self.plan.schedule == "resident":
            launches.walk(given, results, gradient)
        elif self.plan.splits == 1:
            launches.walk(given, results, gradient, summary)
        else:
            launches.walk(given, results, NO_GRADIENT, summary)
            (launches.ends_with_gradient if self.makes_gradient else launches.ends)(given, results, gradient, summary)
        loss = results.loss if self.per_row or launches.whole else self.total(results.loss, given, normalizer)
        stats = self.statistics(tensors.target, results) if self.problem.stats else ()
        return Made(loss, stats, memory, slope, results.row_losses, normalizer, summary)

    def backward(self, tensors, made, upstream, expected):
        """The gradient for `upstream`, the slopes that belong to it, and what to expect the next time.

        `made.gradient` is that for `expected`. It is returned as it is where the device finds that `upstream` is the
        same, and is otherwise overwritten with the right one. None: the gradient is made in a new tensor.
        """
        if self.gpu is not None and self.gpu != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self.backward(tensors, made, upstream, expected)
        if self.problem.inplace:
            return self.rescaled(made, upstream.loss, expected)
        given = self.given(tensors)
        memory, slope, seen, has_stats = made.gradient, made.slope, None, upstream.has_stats()
        if memory is None:
            memory, slope = self.new_gradient(tensors, given), self.new_slope()
        if self.per_row or has_stats or upstream.loss is None:
            upstream = Upstream(self.of_loss(upstream.loss), *map(self.by_row_number, upstream[1:]))
        if made.gradient is None or has_stats:
            launch, expected = self.launches.deferred(*[up is None for up in upstream]), None
        else:
            launch, expected = self.launches.again, self.one() if expected is None else expected
            seen = torch.empty_like(expected)
        gradient = Gradient(self.view(memory), slope, upstream, made.normalizer, expected, seen)
        if self.plan.schedule == "resident":
            launch(given, NO_RESULTS, gradient)
        else:
            launch(given, NO_RESULTS, gradient, made.summary)
        return memory, slope, seen

    def rescaled(self, made, upstream, expected):
        """`backward` where the logits are gone: gradient and slopes times `upstream` over `expected`."""
        expected = self.one() if expected is None else expected
        seen = torch.empty_like(expected)
        view = self.view(made.gradient)
        given = Given(view, NO_TARGET, NO_TRANSFORM, None, *self.numbers)
        self.launches.rescale(given, Gradient(view, None, Upstream(upstream), None, expected, seen))
        slope = None if made.slope is None else made.slope * (upstream.to(self.acc) / expected)
        return made.gradient, slope, seen

    def one(self):
        return constant(1.0, self.acc, self.device)

    def view(self, memory):
        """What of the gradient is that of the rows."""
        return View(visible(self.problem, memory), *self.g_view)

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

    def statistics(self, target, results):
        """Those that are asked for, in the shape of the rows."""
        return tuple(
            [
                self.correct(target, results.predicted) if name == "correct" else getattr(results, name)
                for name in self.problem.stats
            ]
        )

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
            return tensors.normalizer
        parts = self.new(count.programs)
        count(given.target, parts)
        return parts

    def total(self, losses, given, normalizer):
        """The sum of the tiles' losses over the normaliser, 0-dim, in the loss's dtype."""
        partial_sums = self.launches.partial_sums
        if partial_sums is not None:
            partial = self.new(partial_sums.programs)
            partial_sums(given.target, losses, None, partial)
            losses = partial
        out = self.new(dtype=self.problem.dtype)
        self.launches.sum(given.target, losses, normalizer, out)
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
        given = self.given(tensors)
        copies = sum(
            new.numel() * new.element_size()
            for new, old in (
                (given.logits.ptr, input),
                (given.target.probabilities and given.target.probabilities.ptr, target),
                (given.target.indices, target),
                (given.target.weight, tensors.weight),
            )
            if new is not None and new.data_ptr() != old.data_ptr()
        )
        reads = walks * (logits + target.numel() * target.element_size()) + summary + copies
        new = summary + math.prod(self.loss_shape) * self.loss_dtype.itemsize + stats + copies
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
