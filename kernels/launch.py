"""From torch tensors to kernel launches; the only module that knows both.

Nothing here reads a value from the device: normalisers, losses and decisions stay there. The one exception is the check
of clusters, once for each process.
"""

import contextlib
import dataclasses
import functools
import os
import warnings

import torch
import triton
import triton.language as tl

from ..layout import arrange, batch_shape
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
)
from ..problem import Problem
from ..reference import accumulation_dtype
from .gradient import gradient as gradient_kernel
from .normalizer import normalizer_parts, sum_parts
from .resident import resident as resident_kernel
from .streaming import streaming as streaming_kernel

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

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
    target = torch.tensor([0, -100, classes - 1], device=device)
    problem = Problem(False, "sum", -100, 0.0, torch.float32)
    clustered = dataclasses.replace(plan, programs=3, rest=0, edge=0)
    block = plan.block // plan.num_ctas
    streamed = dataclasses.replace(clustered, schedule="streaming", block=block, num_ctas=1, at_once=3)
    try:
        with on_device(input):
            found, expected = (
                run(Call(problem, input, target, None, p), True, None)[:2] for p in (clustered, streamed)
            )
        torch.testing.assert_close(found, expected)
    except Exception as error:  # whatever the compiler, the driver or the comparison makes of it
        warnings.warn(
            f"xent_ext streams long rows on {device}, as clusters of {plan.num_ctas} fail: {error}", stacklevel=2
        )
        return False
    return True


def forward(problem, input, target, weight, want_gradient, expected):
    """The loss, its gradient for the upstream gradient that is `expected` (or None), and what `backward` needs besides.

    The gradient is made now for "mean" and "sum"; with "none" it waits for the upstream gradient. `expected` is a 0-dim
    tensor that an earlier `backward` returned; None stands for 1.
    """
    with on_device(input):
        return run(Call(problem, input, target, weight), want_gradient, expected)


def run(call, want_gradient, expected):
    """See `forward`."""
    per_row = call.problem.reduction == "none"
    normalizer = call.normalizer()
    made = torch.empty_like(call.input) if want_gradient and not per_row else None
    summary = call.new(4, call.layout.rows, call.plan.splits) if call.summarised(want_gradient) else None
    if per_row:
        losses = loss = call.new(*batch_shape(call.input.shape), dtype=call.problem.dtype)
    else:
        losses = call.new(call.plan.programs)
    call.losses(losses, made, normalizer, summary, None if made is None else call.factor(expected))
    if not per_row:
        loss = call.total(losses, normalizer)
    return loss, made, normalizer, summary


def backward(problem, input, target, weight, made, normalizer, summary, upstream, expected):
    """The gradient for `upstream`, a 0-dim tensor or one number for each row; and what to expect the next time.

    `made` is the gradient for `expected`. It is returned as it is where the device finds that `upstream` is the same,
    and is otherwise overwritten with the right one. None: the gradient is made in a new tensor.
    """
    call = Call(problem, input, target, weight)
    with on_device(input):
        upstream = upstream.contiguous()
        if made is None:
            gradient, seen = torch.empty_like(call.input), None
            call.gradient(gradient, normalizer, summary, upstream, None, None)
        else:
            gradient, seen = made, call.new()
            call.gradient(gradient, normalizer, summary, upstream, call.factor(expected), seen)
    return gradient, seen


def traffic(problem, input, target, weight, want_gradient):
    """What a call moves and allocates, forward and backward, without running it."""
    call = Call(problem, input, target, weight)
    plan, rows = call.plan, call.layout.rows
    logits, acc = input.numel() * input.element_size(), call.acc.itemsize
    deferred = want_gradient and problem.reduction == "none"
    summary = 4 * rows * plan.splits * acc if call.summarised(want_gradient) else 0
    # A streamed or split row is read again for its gradient, and so is every row whose gradient is deferred.
    walks = 2 if want_gradient and (deferred or plan.schedule != "resident") else 1
    losses = rows * problem.dtype.itemsize if problem.reduction == "none" else plan.programs * acc
    gradient = logits if want_gradient else 0
    copies = sum(
        new.numel() * new.element_size()
        for new, old in ((call.input, input), (call.q, target), (call.target, target), (call.weight, weight))
        if new is not None and new is not old
    )
    reads = walks * (logits + target.numel() * target.element_size()) + summary + copies
    new = gradient + summary + losses + copies
    numbers = {
        "ROWS": plan.rows,
        "BLOCK": plan.block,
        "num_warps": plan.num_warps,
        "num_ctas": plan.num_ctas,
        "REST": plan.rest,
        "EDGE": plan.edge,
        "SPLITS": plan.splits,
        "programs": plan.programs,
    }
    return Traffic(plan.schedule, numbers, bytes_read=reads, bytes_written=new, memory=new)


@functools.lru_cache
def one(dtype, device):
    return torch.ones((), dtype=dtype, device=device)


def on_device(tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


class Call:
    """One call's tensors, their layout and plan, and the kernels launched with them."""

    def __init__(self, problem, input, target, weight, plan=None):
        self.problem = problem
        self.acc = accumulation_dtype(problem.dtype)
        self.weight = None if weight is None else weight.contiguous()
        self.input, self.q, self.layout = arrange(input, target if problem.probabilities else None)
        self.target = None if problem.probabilities else target.contiguous()
        self.plan = plan or self.usual_plan()

    def usual_plan(self):
        """The plan for the input's device, with clusters only where they work."""
        device = device_properties(self.input.device.index or 0)
        dense = self.problem.probabilities or self.problem.label_smoothing > 0
        aligned = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in (self.input, self.q))
        usual = functools.partial(
            plan,
            self.layout,
            self.input.element_size(),
            self.acc.itemsize,
            dense=dense,
            aligned=aligned,
            schedule=SCHEDULE,
        )
        found = usual(device)
        while found.num_ctas > 1 and not clusters_work(self.input.device, found):
            smaller = PORTABLE_CLUSTER if found.num_ctas > PORTABLE_CLUSTER else 1
            found = usual(dataclasses.replace(device, cluster=smaller))
        return found

    def summarised(self, want_gradient):
        """Whether the forward pass leaves a summary of each row: split rows have their loss from it, too."""
        return self.plan.splits > 1 or (want_gradient and self.plan.schedule == "streaming")

    def new(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.acc, device=self.input.device)

    @property
    def divisor(self):
        """The normaliser where the host knows it: 1, or the number of rows for a mean over probabilities."""
        mean = self.problem.reduction == "mean" and self.problem.probabilities
        return float(self.layout.rows) if mean else 1.0

    @property
    def counts_rows(self):
        """Whether the normaliser is the number, or weight, of the rows that are not ignored."""
        return self.problem.reduction == "mean" and not self.problem.probabilities

    def normalizer(self):
        """Partial sums of the rows' weights; None where there are few, or where `divisor` is the normaliser."""
        if not self.counts_rows or self.layout.rows <= FEW_ROWS:
            return None
        count, span = parts(self.layout.rows)
        out = self.new(count)
        normalizer_parts[(count,)](parts_ptr=out, span=span, **self.counted(), **REDUCTION)
        return out

    def counted(self):
        """What the rows are counted by."""
        return {
            "target_ptr": self.target, "weight_ptr": self.weight, "rows": self.layout.rows,
            "ignore_index": self.problem.ignore_index, "classes": self.layout.classes, "ACC": TRITON_DTYPE[self.acc],
        }  # fmt: skip

    def divided(self, normalizer):
        """What the kernels that divide by the normaliser take, besides `counted`."""
        return {
            "normalizer_ptr": normalizer, "divisor": self.divisor,
            "PARTS": 1 if normalizer is None else normalizer.numel(),
            "COUNT": FEW_ROWS if self.counts_rows and normalizer is None else 0,
        }  # fmt: skip

    def factor(self, expected):
        """The upstream gradient that is expected, on the device."""
        return one(self.acc, self.input.device) if expected is None else expected

    def losses(self, losses, gradient, normalizer, summary, upstream):
        """Row losses, or one sum for each tile; and the gradient for the scalar `upstream`."""
        plan = self.plan
        if plan.schedule == "resident":
            shared = self.arguments(plan, gradient, normalizer, upstream)
            resident_kernel[(plan.programs,)](**shared, expected_ptr=None, seen_ptr=None, loss_ptr=losses)
            return
        walk = self.arguments(plan, gradient if plan.splits == 1 else None, normalizer, upstream)
        streaming_kernel[(min(plan.programs * plan.splits, plan.at_once),)](
            **walk, summary_ptr=summary, loss_ptr=losses, tiles=plan.programs, SPLITS=plan.splits
        )
        if plan.splits > 1:
            self.from_summary(losses, gradient, normalizer, summary, upstream, None, None)

    def gradient(self, gradient, normalizer, summary, upstream, expected, seen):
        """The gradient for `upstream`; nothing, if that is `expected`. Notes `upstream` in `seen`."""
        if self.plan.schedule == "resident":
            shared = self.arguments(self.plan, gradient, normalizer, upstream)
            resident_kernel[(self.plan.programs,)](**shared, expected_ptr=expected, seen_ptr=seen, loss_ptr=None)
        else:
            self.from_summary(None, gradient, normalizer, summary, upstream, expected, seen)

    def from_summary(self, losses, gradient, normalizer, summary, upstream, expected, seen):
        """What is wanted of losses and gradient of streamed or split rows."""
        after = gradient_plan(self.layout, self.plan)
        gradient_kernel[(self.plan.programs if gradient is None else after.programs,)](
            **self.arguments(after, gradient, normalizer, upstream), expected_ptr=expected, seen_ptr=seen,
            summary_ptr=summary, loss_ptr=losses, SPLITS=after.splits,
        )  # fmt: skip

    def total(self, losses, normalizer):
        """The sum of the tiles' losses over the normaliser, 0-dim, in the loss's dtype."""
        count, span = parts(losses.numel())
        if count > 1:
            partial = self.new(count)
            self.sum_parts(losses, partial, span, {"normalizer_ptr": None, "divisor": 1.0, "PARTS": 1, "COUNT": 0})
            losses = partial
        out = self.new(dtype=self.problem.dtype)
        self.sum_parts(losses, out, losses.numel(), self.divided(normalizer))
        return out

    def sum_parts(self, losses, out, span, divided):
        sum_parts[(out.numel(),)](
            losses_ptr=losses, out_ptr=out, count=losses.numel(), span=span, **self.counted(), **divided, **REDUCTION
        )

    def arguments(self, plan, gradient, normalizer, upstream):
        """What the schedules' kernels have in common."""
        problem, layout = self.problem, self.layout
        x, g, q = layout.strides
        class_vec, row_vec = vectors(layout, self.input.element_size())
        return {
            **self.counted(), **self.divided(normalizer),
            "x_ptr": self.input, "q_ptr": self.q, "upstream_ptr": upstream, "grad_ptr": gradient,
            "inner": layout.inner,
            "x_outer": x[0], "x_inner": x[1], "x_class": x[2],
            "q_outer": q[0], "q_inner": q[1], "q_class": q[2],
            "g_outer": g[0], "g_inner": g[1], "g_class": g[2],
            "row_outer": layout.row_outer, "row_inner": layout.row_inner,
            "smoothing": problem.label_smoothing,
            "SMOOTH": problem.label_smoothing > 0, "PER_ROW": problem.reduction == "none",
            "WIDE": is_wide(layout, plan), "CLASS_VEC": class_vec, "ROW_VEC": row_vec,
            "ROWS": plan.rows, "BLOCK": plan.block, "REST": plan.rest, "EDGE": plan.edge,
            "num_warps": plan.num_warps, "num_ctas": plan.num_ctas,
        }  # fmt: skip
