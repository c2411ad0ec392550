"""From torch tensors to kernel launches; the only module that knows both.

Nothing here reads a value from the device: normalisers, losses and decisions stay there. The one exception is the check
of clusters, once for each process.
"""

import contextlib
import dataclasses
import functools
import math
import operator
import os
import warnings

import torch
import triton
import triton.language as tl

from ..dispatch import release
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
    shipped,
    vectors,
    waiting,
)
from ..problem import NUMBERS, Made, Problem, Tensors, Wanted, number
from ..reference import accumulation_dtype
from ..tuning import TuningFile
from .gradient import gradient as gradient_kernel
from .gradient import rescale
from .normalizer import normalizer_parts, sum_parts
from .resident import resident as resident_kernel
from .streaming import streaming as streaming_kernel

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

# The order in which the kernels store the statistics that are floating point numbers.
FLOATING_STATS = ("logprob", "lse", "entropy", "max_prob")
# The tensors that the rows of a mean are counted by.
COUNTED = ("target_ptr", "weight_ptr", "sample_weight_ptr")

# Products and sums in one instruction, whatever Triton does by default.
FUSED = {"enable_fp_fusion": True}

# Forces a schedule, for measurements.
SCHEDULE = os.environ.get("XENT_EXT_SCHEDULE")
if SCHEDULE not in (None, *SCHEDULES):
    raise ValueError(f"XENT_EXT_SCHEDULE must be one of {', '.join(SCHEDULES)}, got {SCHEDULE!r}")

# Launch numbers for one device, in place of those that the plan ships with.
TUNING = TuningFile.read(os.environ["XENT_EXT_TUNING"]) if "XENT_EXT_TUNING" in os.environ else None

# Triton's interpreter needs no GPU; plans are then those of the card that most people train on.
INTERPRETED = Device(backend="cuda", arch=90, lanes=32, processors=132, l2_bytes=L2_BYTES[90])


@functools.lru_cache
def device_properties(index):
    """What the plan needs to know of the device `index`, as Triton's active driver sees it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return dataclasses.replace(INTERPRETED, tuning=tuning(INTERPRETED, device_name(index)))
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(index)
    processors = properties["multiprocessor_count"]
    return Device(
        target.backend,
        target.arch,
        target.warp_size,
        processors,
        l2_bytes(target, index),
        largest_cluster(target),
        tuning(target, device_name(index)),
    )


def device_name(index):
    """What a file of launch numbers calls the device."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter"
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(index)
    return f"a driver for {triton.runtime.driver.active.get_current_target().arch}"


def tuning(target, name):
    """The numbers of the file, if there is one, or the shipped ones."""
    numbers = shipped(target.backend, target.arch)
    return numbers if TUNING is None else TUNING.override(numbers, name)


def l2_bytes(target, index):
    """Bytes of the last level of cache, from PyTorch where it sees the device."""
    if target.arch in L2_BYTES or not torch.cuda.is_available():
        return L2_BYTES.get(target.arch, min(L2_BYTES.values()))
    return torch.cuda.get_device_properties(index).L2_cache_size


def largest_cluster(target):
    """Programs of the largest portable cluster, where the GPU has clusters and Triton compiles reductions over them."""
    return 16 if target.backend == "cuda" and target.arch >= 90 and release(triton.__version__) >= (3, 9) else 1


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
                Setup(problem, signatures(tensors), plan=plan).forward(tensors, Wanted(gradient=True), None)
                for plan in (clustered, streamed)
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
        return setup_for(problem, tensors).forward(tensors, wanted, expected)


def backward(problem, tensors, wanted, made, upstream, expected):
    """The gradient for `upstream`, the slopes that belong to it, and what to expect the next time.

    `made.gradient` is that for `expected`. It is returned as it is where the device finds that `upstream` is the same,
    and is otherwise overwritten with the right one. None: the gradient is made in a new tensor.
    """
    with on_device(made.gradient if problem.inplace else tensors.input):
        if problem.inplace:
            return rescaled(problem, made, upstream.loss, expected)
        setup = setup_for(problem, tensors)
        if setup is not made.setup:
            # Hooks on saved tensors brought one back in other strides, say: what is left of forward does not fit.
            made = setup.forward(tensors, wanted, expected)
        return setup.backward(tensors, wanted, made, upstream, expected)


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
        ACC=TRITON_DTYPE[acc], num_warps=walk.num_warps, **FUSED,
    )  # fmt: skip
    slope = None if made.slope is None else made.slope * (upstream.to(acc) / expected)
    return made.gradient, slope, seen


def traffic(problem, tensors, want_gradient):
    """What a call moves and allocates, forward and backward, without running it."""
    setup = setup_for(problem, tensors)
    plan, rows = setup.plan, setup.layout.rows
    input, target = tensors.input, tensors.target
    logits, acc = rows * setup.layout.classes * input.element_size(), setup.acc.itemsize
    deferred = want_gradient and problem.reduction == "none"
    summary = math.prod(setup.summary_shape) * acc if setup.summarised(want_gradient) else 0
    # A streamed or split row is read again for its gradient, and so is every row whose gradient is deferred.
    walks = 2 if want_gradient and (deferred or plan.schedule != "resident") else 1
    losses = rows * problem.dtype.itemsize if problem.reduction == "none" else plan.programs * acc
    stats = len(problem.stats) * rows * acc
    gradient = input.numel() * input.element_size() if want_gradient else 0
    given = setup.given(tensors)
    copies = sum(
        new.numel() * new.element_size()
        for new, old in (
            (given["x_ptr"], input),
            (given["q_ptr"], target),
            (given["target_ptr"], target),
            (given["weight_ptr"], tensors.weight),
        )
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
        "at_once": plan.at_once or plan.programs,
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
    """Kernels are launched on the current device, which is the tensor's inside."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


class Launch:
    """A kernel with its grid and all of its arguments that are not tensors, to be launched again and again.

    Each time that Triton launches a kernel it finds the compiled code anew, by the types and the divisibility of all
    arguments, which takes longer than many a kernel. Here the numbers stay, so that code compiled for an NVIDIA GPU is
    kept by the rest: which tensors there are, their dtypes and their alignment. (For an AMD GPU the sizes of storages
    matter, too; and the interpreter compiles nothing.)
    """

    def __init__(self, kernel, programs, **numbers):
        self.kernel, self.grid = kernel, (programs, 1, 1)
        self.arguments = dict.fromkeys(kernel.arg_names) | numbers | FUSED  # a tensor that is not given is None
        self.compiled = {}

    def __call__(self, **tensors):
        arguments = self.arguments | tensors
        key = tuple([(name, t.dtype, t.data_ptr() % 16) for name, t in tensors.items() if t is not None])
        if key in self.compiled:
            run, taken = self.compiled[key]
            run(*taken(arguments))
            return
        code = self.kernel[self.grid](**arguments)
        if is_reusable(code):
            # Which arguments compiled code takes, all or only those that are not constant, depends on Triton's version.
            self.compiled[key] = code[self.grid], operator.itemgetter(*code.src.signature)


def is_reusable(code):
    """Whether a launch gave code for an NVIDIA GPU."""
    return isinstance(code, triton.compiler.CompiledKernel) and code.metadata.target.backend == "cuda"


def signatures(tensors):
    """What a setup knows of each tensor: shape, strides, dtype, device, and whether it starts on 16 bytes."""
    return tuple(
        [None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16 == 0) for t in tensors]
    )


def stand_in(signature):
    """A tensor without data."""
    if signature is None:
        return None
    shape, strides, dtype, *_ = signature
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def setup_for(problem, tensors):
    """The setup for a call, with clusters only where they work."""
    where, known = tensors.input.device, signatures(tensors)
    device = device_properties(where.index or 0)
    found = setup(problem, known, device, SCHEDULE)
    while found.plan.num_ctas > 1 and not clusters_work(where, found.plan):
        smaller = PORTABLE_CLUSTER if found.plan.num_ctas > PORTABLE_CLUSTER else 1
        device = dataclasses.replace(device, cluster=smaller)
        found = setup(problem, known, device, SCHEDULE)
    return found


@functools.lru_cache(maxsize=1024)
def setup(problem, signatures, device, schedule):
    return Setup(problem, signatures, device, schedule)


class Setup:
    """Layout, plan and launches for all calls that differ in nothing but the values in their tensors.

    It keeps no tensor: `given` are those of a call, by their names in the kernels.
    """

    def __init__(self, problem, signatures, device=None, schedule=None, plan=None):
        self.problem = problem
        self.acc = accumulation_dtype(problem.dtype)
        self.device = signatures[0][3]
        tensors = Tensors(*map(stand_in, signatures))
        x, q, self.layout = arrange_call(problem, tensors)
        self.x_stride, self.q_stride = x.stride(), None if q is None else q.stride()
        self.itemsize = x.element_size()
        self.batch = batch_shape(x.shape)
        self.has_floating_stats = not {*FLOATING_STATS}.isdisjoint(problem.stats)
        self.predicts = not {"predicted", "correct"}.isdisjoint(problem.stats)
        # Whether the normaliser is the number, or weight, of the rows that are not ignored.
        self.counts_rows = (
            problem.reduction == "mean"
            and tensors.normalizer is None
            and not (problem.probabilities and tensors.sample_weight is None)
        )
        # Beside each logit a thread keeps its target mass, or what the gradient needs of it besides.
        self.dense = bool(
            problem.probabilities
            or problem.label_smoothing > 0
            or problem.softcap
            or problem.stats
            or tensors.softcap is not None
            or tensors.logit_scale is not None
        )
        read = ((x, visible(problem, tensors.input), signatures[0]), (q, tensors.target, signatures[1]))
        self.aligned = all(
            new is None or new.stride() != old.stride() or is_aligned  # copies are
            for new, old, (*_, is_aligned) in read
        )
        self.plan = plan or self.usual_plan(device, schedule)

    def usual_plan(self, device, schedule):
        if self.problem.inplace and schedule in (None, "split"):
            # Programs that share a row would overwrite logits that others have still to read.
            schedule = self.planned(device, None).schedule.replace("split", "streaming")
        return self.planned(device, schedule)

    def planned(self, device, schedule):
        return plan(self.layout, self.itemsize, self.acc.itemsize, device, self.dense, self.aligned, schedule)

    # What is given, and what is allocated

    def given(self, tensors):
        """A call's tensors, copied where no kernel could read them as they are."""
        problem = self.problem
        x, q, target = visible(problem, tensors.input), None, None
        if problem.probabilities:
            q = tensors.target if tensors.target.stride() == self.q_stride else tensors.target.contiguous()
        else:
            target = tensors.target.contiguous()
        return {
            "x_ptr": x if x.stride() == self.x_stride else x.contiguous(),
            "q_ptr": q,
            "target_ptr": target,
            "weight_ptr": contiguous(tensors.weight),
            "sample_weight_ptr": contiguous(tensors.sample_weight),
            **{f"{name}_ptr": self.number(name, tensors) for name in NUMBERS},
        }

    def number(self, name, tensors):
        """One of `NUMBERS` on the device; None where it changes nothing."""
        value = number(name, self.problem, tensors)
        if isinstance(value, torch.Tensor):
            return value
        return None if value == getattr(Problem, name) else constant(value, self.acc, self.device)

    def factor(self, expected):
        """The upstream gradient that is expected, on the device."""
        return one(self.acc, self.device) if expected is None else expected

    def new(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.acc, device=self.device)

    def new_slope(self):
        """One number for each row, or for each tile that makes a gradient (see `streaming`); autograd adds them."""
        if self.plan.schedule == "resident":
            return self.new(self.layout.rows)
        blocks = -(-self.layout.classes // self.plan.block)
        return torch.zeros(self.layout.rows, blocks, dtype=self.acc, device=self.device)

    def summarised(self, want_gradient):
        """Whether the forward pass leaves a summary of each row: split rows have their loss from it, too."""
        return self.plan.splits > 1 or (want_gradient and self.plan.schedule != "resident")

    @property
    def summary_shape(self):
        return 8 if self.problem.stats else 4, self.layout.rows, self.plan.splits

    # The two passes

    def forward(self, tensors, wanted, expected):
        problem, given = self.problem, self.given(tensors)
        now = wanted.gradient and problem.reduction != "none"
        normalizer = self.normalizer(tensors, given)
        memory = gradient_memory(problem, tensors.input, given["x_ptr"]) if now else None
        slope = self.new_slope() if now and wanted.slope else None
        summary = self.new(*self.summary_shape) if self.summarised(wanted.gradient) else None
        row_losses = self.new(*self.batch) if wanted.losses else None
        stats = self.new(4, self.layout.rows) if self.has_floating_stats else None
        predicted = self.new(*self.batch, dtype=torch.int64) if self.predicts else None
        per_row = problem.reduction == "none"
        losses = self.new(*self.batch, dtype=problem.dtype) if per_row else self.new(self.plan.programs)
        results = {
            "loss_ptr": losses, "row_losses_ptr": row_losses, "stats_ptr": stats, "predicted_ptr": predicted,
        }  # fmt: skip
        gradient = self.of_gradient(memory, slope, normalizer, self.factor(expected) if now else None)
        self.walk(given, results, gradient, summary)
        return Made(
            loss=losses if per_row else self.total(losses, given, normalizer),
            stats=self.statistics(tensors.target, stats, predicted),
            gradient=memory,
            slope=slope,
            losses=row_losses,
            normalizer=normalizer,
            summary=summary,
            setup=self,
        )

    def walk(self, given, results, gradient, summary):
        """Row losses, or one sum for each tile, and statistics; and the gradient for a scalar upstream gradient."""
        if self.plan.schedule == "resident":
            self.resident(**given, **results, **gradient)
        elif self.plan.splits == 1:
            self.streaming(**given, **results, **gradient, summary_ptr=summary)
        else:
            self.streaming(**given, **results, summary_ptr=summary)
            finish = self.ends if gradient["grad_ptr"] is None else self.gradient
            finish(**given, **results, **gradient, summary_ptr=summary)

    def backward(self, tensors, wanted, made, upstream, expected):
        given = self.given(tensors)
        ahead = made.gradient is not None
        memory = made.gradient if ahead else gradient_memory(self.problem, tensors.input, given["x_ptr"])
        slope = made.slope if ahead else None
        if wanted.slope and slope is None:
            slope = self.new_slope()
        gradient = self.of_gradient(memory, slope, made.normalizer, self.of_loss(upstream.loss))
        if made.summary is not None:
            gradient["summary_ptr"] = made.summary
        seen = None
        launch = self.resident if self.plan.schedule == "resident" else self.gradient
        if upstream.has_stats():
            gradient["stats_upstream_ptr"] = torch.stack([self.by_row_number(up) for up in upstream[1:]])
        elif ahead:
            expected = self.factor(expected)
            seen = torch.empty_like(expected)
            gradient |= {"expected_ptr": expected, "seen_ptr": seen}
            launch = self.gradient_again
        launch(**given, **gradient)
        return memory, slope, seen

    def of_gradient(self, memory, slope, normalizer, upstream):
        """What the gradient takes and where it goes."""
        return {
            "grad_ptr": None if memory is None else visible(self.problem, memory),
            "slope_ptr": slope,
            "normalizer_ptr": normalizer,
            "upstream_ptr": upstream,
        }

    def of_loss(self, upstream):
        """The loss's upstream gradient: one number, or with "none" one for each row."""
        if upstream is None:
            upstream = constant(0.0, self.acc, self.device)
        if self.problem.reduction == "none" and not upstream.dim():
            upstream = upstream.expand(self.layout.rows)
        return upstream.contiguous()

    def by_row_number(self, upstream):
        """A statistic's upstream gradient, zeros if it has none, in the order of row numbers."""
        if upstream is None:
            return torch.zeros(self.layout.rows, dtype=self.acc, device=self.device)
        return upstream.to(self.acc).reshape(-1)

    def statistics(self, target, stats, predicted):
        """Those that are asked for, in the shape of the rows."""
        if not self.problem.stats:
            return ()
        found = {"predicted": predicted}
        if stats is not None:
            found |= {name: row.view(self.batch) for name, row in zip(FLOATING_STATS, stats.unbind(), strict=True)}
        if "correct" in self.problem.stats:
            found["correct"] = self.correct(target, predicted)
        return tuple(found[name] for name in self.problem.stats)

    def correct(self, target, predicted):
        if self.problem.probabilities:
            return predicted == target.argmax(class_axis(target.shape))
        target = target.long().view_as(predicted)
        return (predicted == target) & (target != self.problem.ignore_index)

    # The normaliser, and the final sum

    def normalizer(self, tensors, given):
        """Its only or its partial sums; None where there are few rows, or where `divisor` is the normaliser."""
        if self.normalizer_parts is None:
            return tensors.normalizer
        out = self.new(self.normalizer_parts.grid[0])
        self.normalizer_parts(parts_ptr=out, **{name: given[name] for name in COUNTED})
        return out

    def total(self, losses, given, normalizer):
        """The sum of the tiles' losses over the normaliser, 0-dim, in the loss's dtype."""
        if self.partial_sums is not None:
            partial = self.new(self.partial_sums.grid[0])
            self.partial_sums(losses_ptr=losses, out_ptr=partial)
            losses = partial
        out = self.new(dtype=self.problem.dtype)
        self.sum(losses_ptr=losses, out_ptr=out, normalizer_ptr=normalizer, **{name: given[name] for name in COUNTED})
        return out

    # The launches

    @functools.cached_property
    def normalizer_parts(self):
        if not self.counts_rows or self.layout.rows <= FEW_ROWS:
            return None
        count, span = parts(self.layout.rows)
        return Launch(normalizer_parts, count, span=span, **self.counted, **REDUCTION)

    @functools.cached_property
    def partial_sums(self):
        """None where one program sums the losses."""
        count, span = parts(self.plan.programs)
        undivided = {"divisor": 1.0, "PARTS": 1, "COUNT": 0, "NOT_ZERO": False}
        return self.sum_of(self.plan.programs, count, span, undivided) if count > 1 else None

    @functools.cached_property
    def sum(self):
        count, _ = parts(self.plan.programs)
        losses = self.plan.programs if count == 1 else count
        return self.sum_of(losses, 1, losses, self.divided)

    def sum_of(self, losses, programs, span, divided):
        return Launch(sum_parts, programs, count=losses, span=span, **self.counted, **divided, **REDUCTION)

    @functools.cached_property
    def resident(self):
        return Launch(resident_kernel, self.plan.programs, **self.numbers(self.plan), TURNS=False)

    @functools.cached_property
    def streaming(self):
        plan = self.plan
        programs = min(plan.programs * plan.splits, plan.at_once)
        return Launch(streaming_kernel, programs, **self.numbers(plan), **self.of_summary)

    @functools.cached_property
    def ends(self):
        """The results of split rows, without a gradient."""
        return Launch(gradient_kernel, self.plan.programs, **self.numbers(self.plan), **self.of_summary, TURNS=False)

    @functools.cached_property
    def gradient(self):
        """From a summary of each row, with the results of those that are split."""
        after = gradient_plan(self.layout, self.plan)
        return Launch(gradient_kernel, after.programs, **self.numbers(after), **self.of_summary, TURNS=False)

    @functools.cached_property
    def gradient_again(self):
        """The gradient, if it is not the expected one already: few programs, which mostly have nothing to do."""
        kernel, plan, numbers = resident_kernel, self.plan, {}
        if plan.schedule != "resident":
            kernel, plan, numbers = gradient_kernel, gradient_plan(self.layout, plan), self.of_summary
        programs = waiting(plan, self.acc.itemsize, device_properties(self.device.index or 0))
        return Launch(kernel, programs, **self.numbers(plan), **numbers, TURNS=programs < plan.programs)

    # Their numbers

    @property
    def counted(self):
        """What the rows are counted by."""
        return {
            "rows": self.layout.rows, "ignore_index": self.problem.ignore_index, "classes": self.layout.classes,
            "ACC": TRITON_DTYPE[self.acc],
        }  # fmt: skip

    @property
    def divided(self):
        """What the kernels that divide by the normaliser take, besides `counted`."""
        mean = self.problem.reduction == "mean" and self.problem.probabilities
        parts = self.normalizer_parts
        return {
            "divisor": float(self.layout.rows) if mean else 1.0,  # the normaliser where the host knows it
            "PARTS": parts.grid[0] if parts else 1,
            "COUNT": FEW_ROWS if self.counts_rows and parts is None else 0,
            "NOT_ZERO": self.problem.on_all_ignored == "zero",
        }  # fmt: skip

    @property
    def of_summary(self):
        return {"STATS": bool(self.problem.stats), "SPLITS": self.plan.splits}

    def numbers(self, plan):
        """What the schedules' kernels have in common."""
        problem, layout = self.problem, self.layout
        x, g, q = layout.strides
        class_vec, row_vec = vectors(layout, self.itemsize)
        if plan.edge:
            class_vec = 1  # what divides the rows does not matter
        return {
            **self.counted, **self.divided,
            "tiles": self.plan.programs, "inner": layout.inner,
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
