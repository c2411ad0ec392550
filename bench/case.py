"""One case of the measurements: its inputs, the check of what a peer returns, its memory, the timing of its calls.

All that touches tensors is here, and runs in processes that do nothing else (see bench/workers.py).
"""

import functools
import itertools
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import machine
from .peer import Case
from .peers import OURS, PEERS

LOGIT_SCALE = 3.0  # standard deviation: the largest of 32,000 logits is then 12 above the mean, as in a trained model


class Pass(NamedTuple):
    """What a call does and which part of it is timed: `first` to `last` of the marks before and after its halves."""

    first: int
    last: int
    reads_and_writes: int | None  # of all the logits, at least; None where an implementation may move nothing
    gradient: bool = True
    backward: bool = True
    factors: tuple[float, ...] = (1.0,)  # what the loss is scaled by, and so the upstream gradient that it receives


PASSES = {
    "full": Pass(0, 2, 2, factors=(1.0, 0.5)),
    "fwd": Pass(0, 1, 1, backward=False),
    # What made the gradient in the forward pass has nothing left to do.
    "bwd": Pass(1, 2, None, factors=(1.0, 0.5)),
    "nograd": Pass(0, 1, 1, gradient=False, backward=False),
}


def step(mode: str, function, logits, target, factor: float, mark=lambda: None):
    """Loss, gradient (or None) and three marks, made before, between and after the two halves of a training step."""
    todo = PASSES[mode]
    with torch.set_grad_enabled(todo.gradient):
        marks = [mark()]
        loss, gradient = function(logits, target), None
        marks.append(mark())
        if todo.backward:
            # As in a training loop, which scales the loss only where there is something to scale by. Not
            # loss.backward(): to store a gradient in .grad may copy it, which logits made by a model are spared.
            (gradient,) = torch.autograd.grad(loss if factor == 1 else loss * factor, logits)
        marks.append(mark())
    return loss, gradient, marks


def inputs(case: Case, sets: int):
    """Random logits and targets; the same in every process, so that all peers get the same."""
    generator = torch.Generator(case.device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    batch, classes, *rest = case.shape
    for _ in range(sets):
        logits = torch.empty(case.shape, dtype=dtype, device=case.device).normal_(std=LOGIT_SCALE, generator=generator)
        target = torch.randint(classes, (batch, *rest), device=case.device, generator=generator)
        yield logits.requires_grad_(PASSES[case.mode].gradient), target


def load(case: Case, name: str):
    return PEERS[name].load_for(case)


def absence(error: Exception) -> dict:
    """What is shown in the place of a peer that something stopped: a missing package, too little memory, a bug."""
    reason = f"{error}" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {error}"
    return {"status": "absent", "reason": reason.strip().partition("\n")[0]}


# The check


def check(case: Case, names: list[str]) -> dict[str, dict]:
    """For each peer: is it "right", "wrong" or "absent"; its errors, those allowed, and its peak memory."""
    logits, target = next(inputs(case, 1))
    truth = Truth(logits, target)
    return {name: check_peer(case, name, logits, target, truth) for name in names}


def check_peer(case: Case, name: str, logits, target, truth) -> dict:
    worst = {}
    try:
        function = load(case, name)
        peak = peak_bytes(case, name, function, own(name, logits), target)
        for factor in PASSES[case.mode].factors:
            loss, gradient, _ = step(case.mode, function, own(name, logits), target, factor)
            for what, error in truth.errors(loss, gradient, factor).items():
                worst[what] = max(error, worst.get(what, error))
            del loss, gradient
    except Exception as error:
        return absence(error)
    return verdict(worst, truth.allowed) | {"peak_bytes": peak}


def verdict(errors: dict[str, float], allowed: dict[str, float]) -> dict:
    # At least one error is over what is allowed; written so that NaN is, too.
    wrong = not all(error <= allowed[what] for what, error in errors.items())
    return {"status": "wrong" if wrong else "right", "errors": errors, "allowed": allowed}


def own(name: str, logits):
    """The logits, or a copy of them where the peer writes over them."""
    return logits.detach().clone().requires_grad_(logits.requires_grad) if PEERS[name].writes_logits else logits


def peak_bytes(case: Case, name: str, function, logits, target) -> int:
    """The most memory that a call holds, beyond its arguments.

    That is the first call, so that buffers which xent_ext keeps for later calls are counted; but for the others the
    second, so that compiling and tuning are not.
    """
    work = functools.partial(step, case.mode, function, logits, target, PASSES[case.mode].factors[0])
    if name != OURS:
        work()
    return machine.peak_memory(work, logits.device)[1]


class Truth:
    """Loss and gradient in float64, and how far results in the logits' dtype may be from them.

    PyTorch's own keeps log-probabilities in the logits' dtype. Rounding one by at most half an `eps` of it changes
    the probability, and the gradient with it, by as large a part. Rounding the result adds to that, and so do
    vectorised exponentials in float32, which PyTorch itself has off by up to 6e-6.
    """

    EXPONENTIALS = 1e-5

    def __init__(self, logits, target):
        self.loss, self.gradient, largest = self.exact(logits.detach().double(), target)
        limits = torch.finfo(logits.dtype)
        rounding = limits.eps * (largest / 2 + 1) + self.EXPONENTIALS
        underflow = limits.smallest_normal * limits.eps  # the smallest number above 0: float16 has few below 1e-5
        sizes = self.gradient.abs()
        self.allowed = {
            "loss": rounding,
            "gradient, mean": rounding + underflow / sizes.mean().item(),
            "gradient, largest": rounding + underflow / sizes.max().item(),
        }

    def exact(self, logits, target):
        """Loss, gradient, and the largest of the log-probabilities, without their sign."""
        loss = F.cross_entropy(logits.requires_grad_(), target)
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            return loss, gradient, (logits.logsumexp(1) - logits.amin(1)).max().item()

    def errors(self, loss, gradient, factor=1.0) -> dict[str, float]:
        """Relative errors: of the loss and, where there is a gradient, of its values' mean and of their largest."""
        found = {"loss": relative(loss.detach().double() - self.loss, self.loss, torch.mean)}
        if gradient is not None:
            difference = gradient.double() / factor - self.gradient
            found["gradient, mean"] = relative(difference, self.gradient, torch.mean)
            found["gradient, largest"] = relative(difference, self.gradient, torch.max)
        return found


def relative(difference, truth, summary) -> float:
    return (summary(difference.abs()) / summary(truth.abs())).item()


# The timing

MOST_QUEUED = 32  # calls that a GPU may be behind: else the time that a block takes is not known


def repeated(call, clock, seconds: float) -> list[float]:
    """Call for so long, but at least once; milliseconds between the two marks that each call returns."""
    marks = []
    end = time.perf_counter() + seconds
    while not marks or time.perf_counter() < end:
        marks.append(call())
        if len(marks) % MOST_QUEUED == 0:
            clock.wait()
    clock.wait()
    return [clock.milliseconds(*pair) for pair in marks]


class Timed:
    """A function of (logits, target) with its inputs, ready to be called."""

    def __init__(self, case: Case, name: str, function, sets: int, on_host=False):
        self.case, self.name, self.function = case, name, function
        self.clock = machine.Clock(torch.device(case.device), on_host)
        self.inputs = itertools.cycle([self.prepared(*pair) for pair in shared_inputs(case, sets)])

    def prepared(self, logits, target):
        """What a call gets, and the logits to start it from."""
        return own(self.name, logits), target, logits

    def calls(self, factor: float, seconds: float) -> list[float]:
        return repeated(functools.partial(self.call, factor), self.clock, seconds)

    def call(self, factor: float) -> tuple:
        """The first and the last mark of one call."""
        todo = PASSES[self.case.mode]
        logits, target, fresh = next(self.inputs)
        loss, gradient, marks = step(self.case.mode, self.function, logits, target, factor, self.clock.mark)
        # Freed as in a training step, which is a part of what an allocation costs.
        del loss, gradient
        if todo.last == 2:
            marks[2] = self.clock.mark()
        if logits is not fresh:
            with torch.no_grad():
                logits.copy_(fresh)
        return marks[todo.first], marks[todo.last]


@functools.lru_cache(maxsize=1)
def shared_inputs(case: Case, sets: int) -> list:
    return list(inputs(case, sets))


_timed: dict[str, Timed] = {}  # what this process keeps between its blocks of calls


def prepare(case: Case, name: str, sets: int, on_host=False):
    timed = _timed[name] = Timed(case, name, load(case, name), sets, on_host)
    for factor in PASSES[case.mode].factors:
        timed.calls(factor, 0)


def block(name: str, factor: float, seconds: float) -> list[float]:
    """Milliseconds of each call of a block, after some to warm up: another peer ran in between."""
    _timed[name].calls(factor, seconds / 10)
    return _timed[name].calls(factor, seconds)


COPIES = 20


def copy_bandwidth(device: str, cache_bytes: int) -> float:
    """Bytes per second, read and written, of PyTorch's copy of a tensor much larger than the cache; the median."""
    clock = machine.Clock(torch.device(device))
    source = torch.ones(max(8 * cache_bytes, 256 << 20), dtype=torch.uint8, device=device)
    to = torch.zeros_like(source)
    marks = []
    for _ in range(COPIES):
        start = clock.mark()
        to.copy_(source)
        marks.append((start, clock.mark()))
    clock.wait()
    return 2 * source.numel() / statistics.median(1e-3 * clock.milliseconds(*pair) for pair in marks)
