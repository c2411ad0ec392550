"""The plan of calls that are alike, and the kernels that they launch, with their numbers."""

import functools

import torch

from ..layout import arrange_call, visible
from ..plan import (
    counted_by_all,
    counting,
    gradient_plan,
    is_wide,
    next_power_of_2,
    parts,
    plan,
    reduction,
    vectors,
    waiting,
)
from ..problem import Tensors
from ..reference import accumulation_dtype
from .arguments import Constants
from .gradient import gradient as gradient_kernel
from .gradient import rescale
from .launch import Launch
from .normalizer import normalizer_parts, sum_parts
from .resident import resident as resident_kernel
from .streaming import streaming as streaming_kernel


def signatures(tensors):
    """What is known of each tensor: shape, strides, dtype, device, and where it starts, modulo 16 bytes."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16) for t in tensors])


def stand_in(signature):
    """A tensor without data."""
    if signature is None:
        return None
    shape, strides, dtype, *_ = signature
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


class Launches:
    """Layout, plan and launches for all calls that differ in nothing but the values in their tensors."""

    def __init__(self, problem, signatures, device, schedule=None, planned=None):
        self.problem, self.device = problem, device
        tensors = Tensors(*map(stand_in, signatures))
        x, q, self.layout = arrange_call(problem, tensors)
        self.itemsize, self.acc = x.element_size(), accumulation_dtype(problem.dtype)
        self.per_row = problem.reduction == "none"
        # Whether the normaliser is the number, or weight, of the rows that are not ignored.
        self.counts_rows = (
            problem.reduction == "mean"
            and tensors.normalizer is None
            and not (problem.probabilities and tensors.sample_weight is None)
        )
        # Beside each logit a thread keeps its target mass, or what the gradient needs of it besides.
        self.keeps_mass = bool(
            problem.probabilities
            or problem.label_smoothing > 0
            or problem.softcap
            or problem.stats
            or tensors.softcap is not None
            or tensors.logit_scale is not None
        )
        # Which of the first four tensors are copied before they are read.
        self.copied = (
            x.stride() != visible(problem, tensors.input).stride(),
            not tensors.target.is_contiguous() if q is None else q.stride() != tensors.target.stride(),
            *[tensor is not None and not tensor.is_contiguous() for tensor in tensors[2:4]],
        )
        starts = [start for _, _, _, _, start in signatures[:2]]
        self.aligned = not starts[0] or self.copied[0]  # copies are
        if q is not None:
            self.aligned &= not starts[1] or self.copied[1]
        self.plan = planned or self.usual_plan(schedule)
        # Whether one program has all rows, and makes the loss itself.
        self.whole = self.plan.schedule == "resident" and self.plan.programs == 1 and not self.per_row

    def usual_plan(self, schedule):
        if self.problem.inplace and schedule in (None, "split"):
            # Programs that share a row would overwrite logits that others have still to read.
            schedule = self.planned(None).schedule.replace("split", "streaming")
        return self.planned(schedule)

    def planned(self, schedule):
        return plan(self.layout, self.itemsize, self.acc.itemsize, self.device, self.keeps_mass, self.aligned, schedule)

    # Over the logits, each with the same of its tensors in all calls

    @functools.cached_property
    def walk(self):
        """The loss, or the summaries of rows that are split."""
        plan = self.plan
        if plan.schedule == "resident":
            return self.launch(resident_kernel, plan, plan.programs, WHOLE=self.whole)
        return self.launch(streaming_kernel, plan, min(plan.programs * plan.splits, plan.at_once))

    @functools.cached_property
    def ends(self):
        """The loss of split rows, from their summaries."""
        return self.launch(gradient_kernel, self.plan, self.plan.programs)

    walk_with_gradient = functools.cached_property(walk.func)

    @functools.cached_property
    def ends_with_gradient(self):
        plan = gradient_plan(self.layout, self.plan)
        return self.launch(gradient_kernel, plan, plan.programs)

    @functools.cached_property
    def again(self):
        """The gradient, if it is not the expected one already: few programs, which mostly have nothing to do."""
        kernel, plan = self.of_gradient()
        programs = waiting(plan, self.acc.itemsize, self.device)
        return self.launch(kernel, plan, programs, TURNS=programs < plan.programs)

    @functools.lru_cache  # noqa: B019 (it lives as long as the few of these objects that are kept)
    def deferred(self, *given):
        """The gradient, for upstream gradients of which these are given."""
        kernel, plan = self.of_gradient()
        return self.launch(kernel, plan, plan.programs)

    @functools.cached_property
    def rescale(self):
        """The gradient times a factor, if that is not 1."""
        layout, itemsize = self.layout, self.itemsize
        walk = gradient_plan(layout, plan(layout, itemsize, self.acc.itemsize, self.device, schedule="streaming"))
        class_vec, row_vec = vectors(layout, itemsize)
        constants = Constants(
            BLOCK=walk.block, DOUBLE=self.acc == torch.float64, ROWS=walk.rows, WIDE=is_wide(layout, walk),
            CLASS_VEC=class_vec, ROW_VEC=row_vec,
        )  # fmt: skip
        programs = waiting(walk, self.acc.itemsize, self.device)
        return Launch(rescale, programs, walk.programs, constants, num_warps=walk.num_warps)

    def of_gradient(self):
        """The kernel that makes a gradient by itself, from a summary of each row where rows are not resident."""
        if self.plan.schedule == "resident":
            return resident_kernel, self.plan
        return gradient_kernel, gradient_plan(self.layout, self.plan)

    def launch(self, kernel, plan, programs, **constants):
        constants = self.constants(plan)._replace(**constants)
        numbers = self.layout.rows, self.plan.programs, self.problem.ignore_index
        options = {"num_warps": plan.num_warps, "num_ctas": plan.num_ctas}
        # A loop over tiles takes more registers, and spilled some.
        if plan.registers and not constants.TURNS and self.device.backend == "cuda":
            options["maxnreg"] = plan.registers
        return Launch(kernel, programs, *numbers, constants, **options)

    # The normaliser, and the final sum

    @functools.cached_property
    def count(self):
        """The normaliser's only or partial sums; None where there are few rows, or where it is known already."""
        if not self.counts_rows or self.counted_by_all():
            return None
        programs, span = counting(self.layout)
        numbers = self.layout.rows, span, self.problem.ignore_index
        return self.reduction(normalizer_parts, programs, span, numbers)

    @functools.cached_property
    def partial_sums(self):
        """None where one program sums the losses."""
        programs, span = parts(self.plan.programs)
        return self.sum_of(programs, self.plan.programs, span) if programs > 1 else None

    @functools.cached_property
    def sum(self):
        programs, _ = parts(self.plan.programs)
        losses = self.plan.programs if programs == 1 else programs
        return self.sum_of(1, losses, losses, **self.mean)

    def counted_by_all(self):
        """Up to how many rows every program counts that needs their number; 0 where they are counted before."""
        return next_power_of_2(self.layout.rows) if self.whole else counted_by_all(self.layout)

    def sum_of(self, programs, losses, span, **mean):
        """Sums of so many losses each, by so many programs."""
        numbers = losses, span, self.layout.rows, self.problem.ignore_index
        return self.reduction(sum_parts, programs, span, numbers, **mean)

    def reduction(self, kernel, programs, span, numbers, **mean):
        block, num_warps = reduction(span, self.device)
        constants = Constants(BLOCK=block, DOUBLE=self.acc == torch.float64, **mean)
        return Launch(kernel, programs, *numbers, constants, num_warps=num_warps)

    # Constants

    @functools.cached_property
    def mean(self):
        """Those that say what the normaliser is."""
        return {
            "MEAN": self.problem.reduction == "mean",
            "PARTS": self.count.programs if self.count else 1,
            "COUNT": self.counted_by_all() if self.counts_rows else 0,
            "NOT_ZERO": self.problem.on_all_ignored == "zero",
        }

    def constants(self, plan):
        problem, layout = self.problem, self.layout
        class_vec, row_vec = vectors(layout, self.itemsize)
        if plan.edge:
            class_vec = 1  # what divides the rows does not matter
        return Constants(
            BLOCK=plan.block, DOUBLE=self.acc == torch.float64, ROWS=plan.rows, REST=plan.rest, EDGE=plan.edge,
            WIDE=is_wide(layout, plan), CLASS_VEC=class_vec, ROW_VEC=row_vec, SPLITS=self.plan.splits,
            PER_ROW=self.per_row, DENSE=problem.probabilities or problem.label_smoothing > 0,
            ENTROPY="entropy" in problem.stats, PREDICT=not {"predicted", "correct"}.isdisjoint(problem.stats),
            STATS=bool(problem.stats), **self.mean,
        )  # fmt: skip
