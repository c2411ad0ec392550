"""From torch tensors to kernel launches; the only module that knows both.

Nothing here reads a value from the device: normalisers, losses and decisions stay there. The one exception is the check
of clusters, once for each process.
"""

import contextlib
import dataclasses
import functools
import math
import os
import warnings

import torch
import triton
import triton.language as tl

from ..layout import arrange_call, batch_shape, class_axis, contiguous, gradient_memory, layout, visible
from ..plan import (
    FEW_ROWS,
    L2_BYTES,
    PORTABLE_CLUSTER,
    REDUCTION,
    SCHEDULES,
    Device,
    Traffic,
    gradient_plan,
    is_wide,
    parts,
    plan,
    vectors,
    waiting,
)
from ..problem import Made, Problem, Tensors, Wanted
from ..reference import accumulation_dtype
from .gradient import gradient as gradient_kernel
from .gradient import rescale
from .normalizer import normalizer_parts, sum_parts
from .resident import resident as resident_kernel
from .streaming import streaming as streaming_kernel

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

# The order in which the kernels store the statistics that are floating point numbers.
FLOATING_STATS = ("logprob", "lse", "entropy", "max_prob")
NO_RESULTS = {"loss_ptr": None, "row_losses_ptr": None, "stats_ptr": None, "predicted_ptr": None}

# Forces a schedule, for measurements.
SCHEDULE = os.environ.get("XENT_EXT_SCHEDULE")
if SCHEDULE not in (None, *SCHEDULES):
    raise ValueError(f"XENT_EXT_SCHEDULE must be one of {', '.join(SCHEDULES)}, got {SCHEDULE!r}")

# Triton's interpreter needs no GPU; plans are then those of the card that most people train on.
INTERPRETED = Device(backend="cuda", arch=90, lanes=32, processors=132, l2_bytes=L2_BYTES[90])


@functools.lru_cache
def device_properties(index):
    """What the plan needs to know of the device `index`, as Triton's active driver sees it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETED
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(index)
    processors = properties["multiprocessor_count"]
    return Device(
        target.backend, target.arch, target.warp_size, processors, l2_bytes(target, index), largest_cluster(target)
    )


def l2_bytes(target, index):
    """Bytes of the last level of cache, from PyTorch where it sees the device."""
    if target.arch in L2_BYTES or not torch.cuda.is_available():
        return L2_BYTES.get(target.arch, min(L2_BYTES.values()))
    return torch.cuda.get_device_properties(index).L2_cache_size


def largest_cluster(target):
    """Programs of the largest portable cluster, where the GPU has clusters and Triton compiles reductions over them."""
    triton_version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return 16 if target.backend == "cuda" and target.arch >= 90 and triton_version >= (3, 9) else 1


def clusters_work(device, plan):
    """Whether a plan's clusters can be used; while a CUDA graph is captured, only if that is known already."""
    key = (device, plan.block, plan.num_warps, plan.num_ctas)
    if key not in _checked:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        _checked[key] = check_clusters(device, plan)
    return _checked[key]


_checked = {}


def check_clusters(device, plan):
    """Whether the plan's clusters give the loss and gradient that `streaming` gives, on a few rows.

    Run once for each process, by the first call that would use them; waits for the device.
    """
    classes = plan.block - 36
    input = (torch.arange(3 * classes, device=device) * 7919 % 10007).div(1000.0).view(3, classes)
    tensors = Tensors(input, torch.tensor([0, -100, classes - 1], device=device))
    problem = Problem(False, "sum", -100, 0.0, torch.float32)
    clustered = dataclasses.replace(plan, programs=3, rest=0, edge=0)
    block = plan.block // plan.num_ctas
    streamed = dataclasses.replace(clustered, schedule="streaming", block=block, num_ctas=1, at_once=3)
    try:
        with on_device(input):
            found, expected = (
                Call(problem, tensors, p).forward(Wanted(gradient=True), None) for p in (clustered, streamed)
            )
        torch.testing.assert_close((found.loss, found.gradient), (expected.loss, expected.gradient))
    except Exception as error:  # whatever the compiler, the driver or the comparison makes of it
        warnings.warn(
            f"xent_ext streams long rows on {device}, as clusters of {plan.num_ctas} fail: {error}", stacklevel=2
        )
        return False
    return True


def forward(problem, tensors, wanted, expected):
    """The loss, its gradient for the upstream gradient that is `expected` (None: 1), and what `backward` needs besides.

    The gradient is made now for "mean" and "sum"; with "none" it waits for the upstream gradient.
    """
    with on_device(tensors.input):
        return Call(problem, tensors).forward(wanted, expected)


def backward(problem, tensors, wanted, made, upstream, expected):
    """The gradient for `upstream`, the slopes that belong to it, and what to expect the next time.

    `made.gradient` is that for `expected`. It is returned as it is where the device finds that `upstream` is the same,
    and is otherwise overwritten with the right one. None: the gradient is made in a new tensor.
    """
    with on_device(made.gradient if problem.inplace else tensors.input):
        if problem.inplace:
            return rescaled(problem, made, upstream.loss, expected)
        return Call(problem, tensors).backward(wanted, made, upstream, expected)


def rescaled(problem, made, upstream, expected):
    """`backward` where the logits are gone: gradient and slopes times `upstream` over `expected`."""
    acc = accumulation_dtype(problem.dtype)
    gradient = visible(problem, made.gradient)
    expected = one(acc, gradient.device) if expected is None else expected
    seen = torch.empty_like(expected)
    strides = gradient.stride()
    seen_as = layout(gradient.shape, strides, strides)
    itemsize = gradient.element_size()
    device = device_properties(gradient.device.index or 0)
    walk = gradient_plan(seen_as, plan(seen_as, itemsize, acc.itemsize, device, schedule="streaming"))
    class_vec, row_vec = vectors(seen_as, itemsize)
    outer, inner, by_class = seen_as.strides[0]
    rescale[(waiting(walk, acc.itemsize, device),)](
        gradient, upstream, expected, seen, walk.programs, seen_as.inner, seen_as.classes, outer, inner, by_class,
        ROWS=walk.rows, BLOCK=walk.block, WIDE=is_wide(seen_as, walk), CLASS_VEC=class_vec, ROW_VEC=row_vec,
        ACC=TRITON_DTYPE[acc], num_warps=walk.num_warps,
    )  # fmt: skip
    slope = None if made.slope is None else made.slope * (upstream.to(acc) / expected)
    return made.gradient, slope, seen


def traffic(problem, tensors, want_gradient):
    """What a call moves and allocates, forward and backward, without running it."""
    call = Call(problem, tensors)
    plan, rows = call.plan, call.layout.rows
    input, target = tensors.input, tensors.target
    logits, acc = rows * call.layout.classes * input.element_size(), call.acc.itemsize
    deferred = want_gradient and problem.reduction == "none"
    summary = math.prod(call.summary_shape) * acc if call.summarised(want_gradient) else 0
    # A streamed or split row is read again for its gradient, and so is every row whose gradient is deferred.
    walks = 2 if want_gradient and (deferred or plan.schedule != "resident") else 1
    losses = rows * problem.dtype.itemsize if problem.reduction == "none" else plan.programs * acc
    stats = len(problem.stats) * rows * acc
    gradient = input.numel() * input.element_size() if want_gradient else 0
    copies = sum(
        new.numel() * new.element_size()
        for new, old in ((call.x, input), (call.q, target), (call.target, target), (call.weight, tensors.weight))
        if new is not None and new.data_ptr() != old.data_ptr()
    )
    reads = walks * (logits + target.numel() * target.element_size()) + summary + copies
    new = summary + losses + stats + copies
    numbers = {
        "ROWS": plan.rows,
        "BLOCK": plan.block,
        "REST": plan.rest,
        "EDGE": plan.edge,
        "SPLITS": plan.splits,
        "num_warps": plan.num_warps,
        "num_ctas": plan.num_ctas,
        "programs": plan.programs,
    }
    memory = new + (0 if problem.inplace else gradient)
    return Traffic(plan.schedule, numbers, bytes_read=reads, bytes_written=new + gradient, memory=memory)


def constant(value, dtype, device):
    """A number on the device: kernels take options from memory, so that None has no code and no number its own."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # The memory and the value are the graph's: nothing else may rely on them.
        return torch.full((), value, dtype=dtype, device=device)
    return kept_constant(value, dtype, device)


@functools.lru_cache(maxsize=256)
def kept_constant(value, dtype, device):
    return torch.full((), value, dtype=dtype, device=device)


def one(dtype, device):
    return constant(1.0, dtype, device)


def on_device(tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


class Call:
    """One call's tensors, their layout and plan, and the kernels launched with them."""

    def __init__(self, problem, tensors, plan=None):
        self.problem, self.tensors = problem, tensors
        self.acc = accumulation_dtype(problem.dtype)
        self.device = tensors.input.device
        self.x, self.q, self.layout = arrange_call(problem, tensors)
        self.weight = contiguous(tensors.weight)
        self.sample_weight = contiguous(tensors.sample_weight)
        self.target = None if problem.probabilities else tensors.target.contiguous()
        self.plan = plan or self.usual_plan()

    def usual_plan(self):
        """The plan for the input's device, with clusters only where they work."""
        problem, device = self.problem, device_properties(self.device.index or 0)
        # Beside each logit a thread then keeps its target mass, or what the gradient needs of it besides.
        dense = bool(
            problem.probabilities
            or problem.label_smoothing > 0
            or problem.softcap
            or problem.stats
            or self.tensors.logit_scale is not None
        )
        aligned = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in (self.x, self.q))
        schedule = SCHEDULE
        if problem.inplace and schedule in (None, "split"):
            # Programs that share a row would overwrite logits that others have still to read.
            schedule = self.found(device, dense, aligned, None).schedule.replace("split", "streaming")
        found = self.found(device, dense, aligned, schedule)
        while found.num_ctas > 1 and not clusters_work(self.device, found):
            smaller = PORTABLE_CLUSTER if found.num_ctas > PORTABLE_CLUSTER else 1
            device = dataclasses.replace(device, cluster=smaller)
            found = self.found(device, dense, aligned, schedule)
        return found

    def found(self, device, dense, aligned, schedule):
        return planned(self.layout, self.x.element_size(), self.acc.itemsize, device, dense, aligned, schedule)

    # What is allocated

    def new(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.acc, device=self.device)

    def new_by_row(self, dtype=None):
        return self.new(*batch_shape(visible(self.problem, self.tensors.input).shape), dtype=dtype)

    def gradient_memory(self):
        return gradient_memory(self.problem, self.tensors.input, self.x)

    def new_slope(self):
        """One number for each row, or for each tile that makes a gradient (see `streaming`); autograd adds them."""
        if self.plan.schedule == "resident":
            return self.new(self.layout.rows)
        blocks = -(-self.layout.classes // self.plan.block)
        return torch.zeros(self.layout.rows, blocks, dtype=self.acc, device=self.device)

    def summarised(self, want_gradient):
        """Whether the forward pass leaves a summary of each row: split rows have their loss from it, too."""
        return self.plan.splits > 1 or (want_gradient and self.plan.schedule == "streaming")

    @property
    def summary_shape(self):
        return 8 if self.problem.stats else 4, self.layout.rows, self.plan.splits

    # The two passes

    def forward(self, wanted, expected):
        problem = self.problem
        now = wanted.gradient and problem.reduction != "none"
        normalizer = self.normalizer()
        memory = self.gradient_memory() if now else None
        slope = self.new_slope() if now and wanted.slope else None
        summary = self.new(*self.summary_shape) if self.summarised(wanted.gradient) else None
        row_losses = self.new_by_row() if wanted.losses else None
        floating = bool({"logprob", "lse", "entropy", "max_prob"} & set(problem.stats))
        stats = self.new(4, self.layout.rows) if floating else None
        predicted = self.new_by_row(torch.int64) if {"predicted", "correct"} & set(problem.stats) else None
        per_row = problem.reduction == "none"
        losses = self.new_by_row(problem.dtype) if per_row else self.new(self.plan.programs)
        results = {
            "loss_ptr": losses, "row_losses_ptr": row_losses, "stats_ptr": stats, "predicted_ptr": predicted,
        }  # fmt: skip
        self.walk(results, memory, slope, normalizer, summary, self.factor(expected) if now else None)
        return Made(
            loss=losses if per_row else self.total(losses, normalizer),
            stats=self.statistics(stats, predicted),
            gradient=memory,
            slope=slope,
            losses=row_losses,
            normalizer=normalizer,
            summary=summary,
        )

    def backward(self, wanted, made, upstream, expected):
        ahead = made.gradient is not None
        memory = made.gradient if ahead else self.gradient_memory()
        slope = made.slope if ahead else None
        if wanted.slope and slope is None:
            slope = self.new_slope()
        of_loss = constant(0.0, self.acc, self.device) if upstream.loss is None else upstream.loss
        of_loss = (
            of_loss.expand(self.layout.rows) if self.problem.reduction == "none" and not of_loss.dim() else of_loss
        )
        of_loss = of_loss.contiguous()
        seen = of_stats = None
        expects = None
        if upstream.has_stats():
            of_stats = torch.stack([self.by_row_number(up) for up in upstream[1:]])
        elif ahead:
            seen, expects = self.new(), self.factor(expected)
        self.remake(memory, slope, made, of_loss, of_stats, expects, seen)
        return memory, slope, seen

    def by_row_number(self, upstream):
        """A statistic's upstream gradient, zeros if it has none, in the order of row numbers."""
        if upstream is None:
            return torch.zeros(self.layout.rows, dtype=self.acc, device=self.device)
        return upstream.to(self.acc).reshape(-1)

    def factor(self, expected):
        """The upstream gradient that is expected, on the device."""
        return one(self.acc, self.device) if expected is None else expected

    def statistics(self, stats, predicted):
        """Those that are asked for, in the shape of the rows."""
        if not self.problem.stats:
            return ()
        like = batch_shape(visible(self.problem, self.tensors.input).shape)
        found = {"predicted": predicted}
        if stats is not None:
            found |= {name: row.view(like) for name, row in zip(FLOATING_STATS, stats.unbind(), strict=True)}
        if "correct" in self.problem.stats:
            found["correct"] = self.correct(predicted)
        return tuple(found[name] for name in self.problem.stats)

    def correct(self, predicted):
        if self.problem.probabilities:
            return predicted == self.tensors.target.argmax(class_axis(self.tensors.target.shape))
        target = self.target.long().view_as(predicted)
        return (predicted == target) & (target != self.problem.ignore_index)

    # The normaliser

    @property
    def divisor(self):
        """The normaliser where the host knows it: 1, or the number of rows for a mean over probabilities."""
        mean = self.problem.reduction == "mean" and self.problem.probabilities
        return float(self.layout.rows) if mean else 1.0

    @property
    def counts_rows(self):
        """Whether the normaliser is the number, or weight, of the rows that are not ignored."""
        if self.problem.reduction != "mean" or self.tensors.normalizer is not None:
            return False
        return not self.problem.probabilities or self.sample_weight is not None

    def normalizer(self):
        """Its only or its partial sums; None where there are few rows, or where `divisor` is the normaliser."""
        if self.problem.reduction == "mean" and self.tensors.normalizer is not None:
            return self.tensors.normalizer
        if not self.counts_rows or self.layout.rows <= FEW_ROWS:
            return None
        count, span = parts(self.layout.rows)
        out = self.new(count)
        normalizer_parts[(count,)](parts_ptr=out, span=span, **self.counted(), **REDUCTION)
        return out

    def counted(self):
        """What the rows are counted by."""
        return {
            "target_ptr": self.target, "weight_ptr": self.weight, "sample_weight_ptr": self.sample_weight,
            "rows": self.layout.rows, "ignore_index": self.problem.ignore_index, "classes": self.layout.classes,
            "ACC": TRITON_DTYPE[self.acc],
        }  # fmt: skip

    def divided(self, normalizer):
        """What the kernels that divide by the normaliser take, besides `counted`."""
        return {
            "normalizer_ptr": normalizer, "divisor": self.divisor,
            "PARTS": 1 if normalizer is None else normalizer.numel(),
            "COUNT": FEW_ROWS if self.counts_rows and normalizer is None else 0,
            "NOT_ZERO": self.problem.on_all_ignored == "zero",
        }  # fmt: skip

    def total(self, losses, normalizer):
        """The sum of the tiles' losses over the normaliser, 0-dim, in the loss's dtype."""
        count, span = parts(losses.numel())
        if count > 1:
            partial = self.new(count)
            undivided = {"normalizer_ptr": None, "divisor": 1.0, "PARTS": 1, "COUNT": 0, "NOT_ZERO": False}
            self.sum_parts(losses, partial, span, undivided)
            losses = partial
        out = self.new(dtype=self.problem.dtype)
        self.sum_parts(losses, out, losses.numel(), self.divided(normalizer))
        return out

    def sum_parts(self, losses, out, span, divided):
        sum_parts[(out.numel(),)](
            losses_ptr=losses, out_ptr=out, count=losses.numel(), span=span, **self.counted(), **divided, **REDUCTION
        )

    # The walks over the logits

    def walk(self, results, memory, slope, normalizer, summary, upstream):
        """Row losses, or one sum for each tile, and statistics; and the gradient for the scalar `upstream`."""
        plan = self.plan
        if plan.schedule == "resident":
            shared = self.arguments(plan, memory, slope, normalizer, upstream)
            resident_kernel[(plan.programs,)](
                **shared, **results, TURNS=False, expected_ptr=None, seen_ptr=None, stats_upstream_ptr=None
            )
            return
        ends = plan.splits == 1
        walk = self.arguments(plan, memory if ends else None, slope if ends else None, normalizer, upstream)
        streaming_kernel[(min(plan.programs * plan.splits, plan.at_once),)](
            **walk,
            **results,
            summary_ptr=summary,
            STATS=bool(self.problem.stats),
            SPLITS=plan.splits,
        )
        if not ends:
            self.from_summary(results, memory, slope, normalizer, summary, upstream, None, None, None)

    def remake(self, memory, slope, made, upstream, of_stats, expected, seen):
        """The gradient for `upstream` and `of_stats`; nothing, if that is `expected`. Notes `upstream` in `seen`."""
        if self.plan.schedule == "resident":
            shared = self.arguments(self.plan, memory, slope, made.normalizer, upstream)
            programs = self.programs(self.plan, expected)
            resident_kernel[(programs,)](
                **shared,
                **NO_RESULTS,
                TURNS=programs < self.plan.programs,
                expected_ptr=expected,
                seen_ptr=seen,
                stats_upstream_ptr=of_stats,
            )
        else:
            self.from_summary(
                NO_RESULTS, memory, slope, made.normalizer, made.summary, upstream, of_stats, expected, seen
            )

    def from_summary(self, results, memory, slope, normalizer, summary, upstream, of_stats, expected, seen):
        """What is wanted of results and gradient of streamed or split rows."""
        after = gradient_plan(self.layout, self.plan)
        programs = self.plan.programs if memory is None else self.programs(after, expected)
        gradient_kernel[(programs,)](
            **self.arguments(after, memory, slope, normalizer, upstream), **results, expected_ptr=expected,
            TURNS=memory is not None and programs < after.programs, seen_ptr=seen, stats_upstream_ptr=of_stats, summary_ptr=summary, STATS=bool(self.problem.stats),
            SPLITS=after.splits,
        )  # fmt: skip

    def programs(self, plan, expected):
        """Of a pass that makes a gradient; few, if it may be the expected one already."""
        if expected is None:
            return plan.programs
        return waiting(plan, self.acc.itemsize, device_properties(self.device.index or 0))

    def option(self, value):
        return None if value is None else constant(value, self.acc, self.device)

    def arguments(self, plan, memory, slope, normalizer, upstream):
        """What the schedules' kernels have in common."""
        problem = self.problem
        scale = self.tensors.logit_scale
        if scale is None and problem.logit_scale != 1:
            scale = self.option(problem.logit_scale)
        return {
            **self.counted(), **self.divided(normalizer), **numbers(problem, self.layout, plan, self.x.element_size()),
            "x_ptr": self.x, "q_ptr": self.q, "upstream_ptr": upstream, "tiles": self.plan.programs,
            "logit_scale_ptr": scale, "softcap_ptr": self.option(problem.softcap),
            "z_loss_ptr": self.option(problem.z_loss or None),
            "grad_ptr": None if memory is None else visible(problem, memory), "slope_ptr": slope,
        }  # fmt: skip


# Calls of the same shapes and options have the same numbers, and look them up.
planned = functools.lru_cache(maxsize=1024)(plan)


@functools.lru_cache(maxsize=1024)
def numbers(problem, layout, plan, itemsize):
    """Those of a kernel's arguments that are no tensors."""
    x, g, q = layout.strides
    class_vec, row_vec = vectors(layout, itemsize)
    if plan.edge:
        class_vec = 1  # what divides the rows does not matter
    return {
        "inner": layout.inner,
        "x_outer": x[0], "x_inner": x[1], "x_class": x[2],
        "q_outer": q[0], "q_inner": q[1], "q_class": q[2],
        "g_outer": g[0], "g_inner": g[1], "g_class": g[2],
        "row_outer": layout.row_outer, "row_inner": layout.row_inner,
        "smoothing": problem.label_smoothing, "SMOOTH": problem.label_smoothing > 0,
        "ENTROPY": "entropy" in problem.stats, "PER_ROW": problem.reduction == "none",
        "WIDE": is_wide(layout, plan), "CLASS_VEC": class_vec, "ROW_VEC": row_vec,
        "ROWS": plan.rows, "BLOCK": plan.block, "REST": plan.rest, "EDGE": plan.edge,
        "num_warps": plan.num_warps, "num_ctas": plan.num_ctas,
    }  # fmt: skip
