"""One case of `python -m bench run`: what is called, how its results are checked, how its calls are timed.

All that touches tensors is here, and runs in processes that do nothing else; `bench.run` tells them what to do.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import machine
from .peers import PEERS

LOGIT_SCALE = 3.0  # standard deviation: the largest of 32,000 logits is then 12 above the mean, as in a trained model


class Pass(NamedTuple):
    """What one timed call does. The upstream factors are those of the gradient that the loss receives."""

    work: Callable
    reads_and_writes: int  # of all the logits, at least
    factors: tuple[float, ...] = (1.0,)


def full(function, logits, target, factor):
    loss = function(logits, target)
    # As in a training loop, which scales the loss only where there is something to scale by.
    (loss if factor == 1 else loss * factor).backward()
    return loss


def forward(function, logits, target, factor):
    return function(logits, target)


def no_grad(function, logits, target, factor):
    with torch.no_grad():
        return function(logits, target)


PASSES = {"full": Pass(full, 2, (1.0, 0.5)), "fwd": Pass(forward, 1), "nograd": Pass(no_grad, 1)}


@dataclass(frozen=True)
class Case:
    suite: str
    what: str
    shape: tuple[int, ...]
    dtype: str
    mode: str  # one of PASSES
    device: str

    @property
    def logits_bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    @property
    def least_bytes(self) -> int:
        """What any implementation must move: logits once, gradient once. Targets are not counted."""
        return PASSES[self.mode].reads_and_writes * self.logits_bytes


def inputs(case: Case, sets: int):
    """Random logits and targets; the same in every process, so that all peers get the same."""
    generator = torch.Generator(case.device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    batch, classes, *rest = case.shape
    for _ in range(sets):
        logits = torch.empty(case.shape, dtype=dtype, device=case.device).normal_(std=LOGIT_SCALE, generator=generator)
        target = torch.randint(classes, (batch, *rest), device=case.device, generator=generator)
        yield logits.requires_grad_(), target


# The check


def check(case: Case, names: list[str]) -> dict[str, dict]:
    """For each peer: is it "right", "wrong" or "absent"; its errors, those allowed, and its peak memory."""
    logits, target = next(inputs(case, 1))
    truth = Truth(logits, target)
    return {name: check_peer(case, name, logits, target, truth) for name in names}


def check_peer(case: Case, name: str, logits, target, truth) -> dict:
    worst, peaks = {}, []
    try:
        function = PEERS[name].load()
        for factor in PASSES[case.mode].factors:
            logits.grad = None
            work = partial(PASSES[case.mode].work, function, logits, target, factor)
            loss, peak = machine.peak_memory(work, logits.device)
            peaks.append(peak)
            for what, error in truth.errors(loss, logits.grad, factor).items():
                worst[what] = max(error, worst.get(what, error))
    except Exception as error:
        # Whatever stops a peer is shown in its place: a missing package or compiler, too little memory, a bug.
        return {"status": "absent", "reason": f"{type(error).__name__}: {error}".partition("\n")[0]}
    # At least one error is over what is allowed; written so that NaN is, too.
    wrong = not all(error <= truth.allowed[what] for what, error in worst.items())
    found = {"status": "wrong" if wrong else "right", "errors": worst, "allowed": truth.allowed}
    # The first call's: buffers that an implementation keeps for later calls are counted.
    return found | {"peak_bytes": peaks[0]}


class Truth:
    """Loss and gradient in float64, and how far results in the logits' dtype may be from them.

    PyTorch's own keeps log-probabilities in the logits' dtype. Rounding one by at most half an `eps` of it changes
    the probability, and the gradient with it, by as large a part. Rounding the result adds to that, and so do
    vectorised exponentials in float32, which PyTorch itself has off by up to 6e-6.
    """

    EXPONENTIALS = 1e-5

    def __init__(self, logits, target):
        exact = logits.detach().double().requires_grad_()
        self.loss = F.cross_entropy(exact, target)
        (self.gradient,) = torch.autograd.grad(self.loss, exact)
        limits = torch.finfo(logits.dtype)
        with torch.no_grad():
            largest = (exact.logsumexp(1) - exact.amin(1)).max().item()  # of the log-probabilities, without their sign
        rounding = limits.eps * (largest / 2 + 1) + self.EXPONENTIALS
        underflow = limits.smallest_normal * limits.eps  # the smallest number above 0: float16 has few below 1e-5
        sizes = self.gradient.abs()
        self.allowed = {
            "loss": rounding,
            "gradient, mean": rounding + underflow / sizes.mean().item(),
            "gradient, largest": rounding + underflow / sizes.max().item(),
        }

    def errors(self, loss, gradient, factor) -> dict[str, float]:
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


class Timed:
    """A peer with its inputs, ready to be called."""

    def __init__(self, case: Case, name: str, sets: int):
        self.work = partial(PASSES[case.mode].work, PEERS[name].load())
        self.clock = machine.Clock(torch.device(case.device))
        self.inputs = itertools.cycle(list(inputs(case, sets)))

    def calls(self, factor: float, seconds: float) -> list[float]:
        """Call for so long, but at least once; milliseconds of each call."""
        marks = []
        end = time.perf_counter() + seconds
        while not marks or time.perf_counter() < end:
            logits, target = next(self.inputs)
            start = self.clock.mark()
            self.work(logits, target, factor)
            logits.grad = None  # freed as in a training step, which is a part of what an allocation costs
            marks.append((start, self.clock.mark()))
        self.clock.wait()
        return [self.clock.milliseconds(*pair) for pair in marks]


_timed: dict[str, Timed] = {}  # what this process keeps between its blocks of calls


def prepare(case: Case, name: str, sets: int):
    timed = _timed[name] = Timed(case, name, sets)
    for factor in PASSES[case.mode].factors:
        timed.calls(factor, 0)


def block(name: str, factor: float, seconds: float) -> list[float]:
    """Milliseconds of each call of a block, after some to warm up: another process ran in between."""
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
