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
from ..plan import REDUCTION, Device, Traffic, gradient_plan, is_wide, parts, plan, vectors
from ..problem import Problem
from ..reference import accumulation_dtype
from .gradient import gradient as gradient_kernel
from .normalizer import normalizer_parts, sum_parts
from .resident import resident as resident_kernel
from .streaming import streaming as streaming_kernel

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

# Triton's interpreter needs no GPU; plans are then those of the card that most people train on.
INTERPRETED = Device(backend="cuda", arch=90, lanes=32, processors=132)


@functools.lru_cache
def device_properties(index):
    """What the plan needs to know of the device `index`, as Triton's active driver sees it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETED
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(index)
    return Device(
        target.backend, target.arch, target.warp_size, properties["multiprocessor_count"], largest_cluster(target)
    )


def largest_cluster(target):
    """Programs of the largest portable cluster, where the GPU has clusters and Triton compiles reductions over them."""
    triton_version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return 8 if target.backend == "cuda" and target.arch >= 90 and triton_version >= (3, 9) else 1


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
    clustered = dataclasses.replace(plan, programs=3)
    streamed = dataclasses.replace(clustered, schedule="streaming", block=plan.block // plan.num_ctas, num_ctas=1)
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
    summary = call.new(3, call.layout.rows) if want_gradient and call.plan.schedule == "streaming" else None
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
    summary = 3 * rows * acc if want_gradient and plan.schedule == "streaming" else 0
    # A streamed row is read again for its gradient, and so is every row whose gradient is deferred.
    walks = 2 if want_gradient and (deferred or plan.schedule == "streaming") else 1
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
            plan, self.layout, self.input.element_size(), self.acc.itemsize, dense=dense, aligned=aligned
        )
        found = usual(device)
        if found.num_ctas > 1 and not clusters_work(self.input.device, found):
            found = usual(dataclasses.replace(device, cluster=1))
        return found

    def new(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.acc, device=self.input.device)

    @property
    def divisor(self):
        """The normaliser where the host knows it: 1, or the number of rows for a mean over probabilities."""
        mean = self.problem.reduction == "mean" and self.problem.probabilities
        return float(self.layout.rows) if mean else 1.0

    def normalizer(self):
        """Partial sums of the rows' weights, or None where `divisor` is the normaliser."""
        if self.problem.reduction != "mean" or self.problem.probabilities:
            return None
        count, span = parts(self.layout.rows)
        out = self.new(count)
        normalizer_parts[(count,)](
            self.target, self.weight, out, self.layout.rows, span, self.problem.ignore_index,
            self.layout.classes, ACC=TRITON_DTYPE[self.acc], **REDUCTION,
        )  # fmt: skip
        return out

    def factor(self, expected):
        """The upstream gradient that is expected, on the device."""
        return one(self.acc, self.input.device) if expected is None else expected

    def losses(self, losses, gradient, normalizer, summary, upstream):
        """Row losses, or one sum for each program; and the gradient for the scalar `upstream`."""
        shared = self.arguments(self.plan, gradient, normalizer, upstream)
        if self.plan.schedule == "resident":
            resident_kernel[(self.plan.programs,)](**shared, expected_ptr=None, seen_ptr=None, loss_ptr=losses)
        else:
            streaming_kernel[(self.plan.programs,)](
                **shared, summary_ptr=summary, loss_ptr=losses, rows=self.layout.rows
            )

    def gradient(self, gradient, normalizer, summary, upstream, expected, seen):
        """The gradient for `upstream`; nothing, if that is `expected`. Notes `upstream` in `seen`."""
        known = {"expected_ptr": expected, "seen_ptr": seen}
        if self.plan.schedule == "resident":
            shared = self.arguments(self.plan, gradient, normalizer, upstream)
            resident_kernel[(self.plan.programs,)](**shared, **known, loss_ptr=None)
        else:
            deferred = gradient_plan(self.layout, self.plan)
            shared = self.arguments(deferred, gradient, normalizer, upstream)
            gradient_kernel[(deferred.programs,)](**shared, **known, summary_ptr=summary, rows=self.layout.rows)

    def total(self, losses, normalizer):
        """The sum of the programs' losses over the normaliser, 0-dim, in the loss's dtype."""
        count, span = parts(losses.numel())
        if count > 1:
            partial = self.new(count)
            self.sum_parts(losses, None, partial, count, span, 1.0)
            losses = partial
        out = self.new(dtype=self.problem.dtype)
        self.sum_parts(losses, normalizer, out, 1, losses.numel(), self.divisor)
        return out

    def sum_parts(self, losses, normalizer, out, programs, span, divisor):
        sum_parts[(programs,)](
            losses, normalizer, out, losses.numel(), span, divisor,
            PARTS=1 if normalizer is None else normalizer.numel(), ACC=TRITON_DTYPE[self.acc], **REDUCTION,
        )  # fmt: skip

    def arguments(self, plan, gradient, normalizer, upstream):
        """What the schedules' kernels have in common."""
        problem, layout = self.problem, self.layout
        x, g, q = layout.strides
        class_vec, row_vec = vectors(layout, self.input.element_size())
        return {
            "x_ptr": self.input, "target_ptr": self.target, "q_ptr": self.q, "weight_ptr": self.weight,
            "normalizer_ptr": normalizer, "upstream_ptr": upstream, "grad_ptr": gradient,
            "inner": layout.inner, "classes": layout.classes,
            "x_outer": x[0], "x_inner": x[1], "x_class": x[2],
            "q_outer": q[0], "q_inner": q[1], "q_class": q[2],
            "g_outer": g[0], "g_inner": g[1], "g_class": g[2],
            "row_outer": layout.row_outer, "row_inner": layout.row_inner,
            "ignore_index": problem.ignore_index, "smoothing": problem.label_smoothing, "divisor": self.divisor,
            "SMOOTH": problem.label_smoothing > 0, "PER_ROW": problem.reduction == "none",
            "PARTS": 1 if normalizer is None else normalizer.numel(),
            "WIDE": is_wide(layout, plan), "CLASS_VEC": class_vec, "ROW_VEC": row_vec,
            "ACC": TRITON_DTYPE[self.acc],
            "ROWS": plan.rows, "BLOCK": plan.block, "REST": plan.rest, "EDGE": plan.edge,
            "num_warps": plan.num_warps, "num_ctas": plan.num_ctas,
        }  # fmt: skip
