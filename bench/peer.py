"""What an adapter in bench/peers/ says of the implementation that it stands for."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """What is measured: logits, random class targets, the mean loss, and which part of a training step is timed."""

    suite: str
    what: str
    shape: tuple[int, ...]
    dtype: str
    mode: str  # one of bench.case.PASSES
    device: str

    @property
    def logits_bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.shape[1]


@dataclass(frozen=True)
class Moved:
    """Bytes that the forward and backward of a case must move, and the most that they hold beside the logits."""

    read: float
    written: float
    peak: float
    schedule: str = ""  # where an implementation has several


def copies(case: Case, read: float, written: float, peak: float) -> Moved:
    """`Moved` in copies of the logits. What has one number for each row is left out."""
    return Moved(*(number * case.logits_bytes for number in (read, written, peak)))


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """How to get it, and what it takes.

    `load()` returns its function, or raises whatever says why the implementation cannot run here.
    """

    load: Callable[[], Callable]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")

    def load_for(self, case):
        """The function, or an error that says why it does not take the case."""
        if reason := self.refusal(case):
            raise NotImplementedError(reason)
        return self.load()

    def refusal(self, case) -> str | None:
        """Why the implementation does not take the case, or None."""
        device = torch.device(case.device).type
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device}"
        if case.dtype not in self.dtypes:
            return f"is for {', '.join(self.dtypes)}, not for {case.dtype}"
        return None


@dataclass(frozen=True, kw_only=True)
class Peer(Implementation):
    """An implementation of the loss of logits: a function of (logits, target) with the mean loss as its result.

    `moved` is the model of its forward and backward, with an upstream gradient of 1, as the adapter's docstring derives
    it; a row that is read again at once is counted once, as caches hold it.
    """

    moved: Callable[[Case], Moved]
    images: bool = False  # takes (N, C, d1, ...) too
    writes_logits: bool = False  # they must be fresh for each call

    def refusal(self, case: Case) -> str | None:
        if len(case.shape) > 2 and not self.images:
            return super().refusal(case) or "takes (N, C) only"
        return super().refusal(case)


def named(module: str, name: str):
    """An attribute of a module that nothing here depends on: it is looked for only when it is asked for."""
    return getattr(importlib.import_module(module), name)
