"""Launch numbers put to work: the plans that they give, the check of what they compute, and their times."""

import contextlib
import dataclasses
import functools
import statistics
from unittest import mock

from triton.runtime import JITFunction
from xent_ext.kernels import implementation

import xent_ext
from xent_ext import dispatch
from xent_ext.plan import Tuning

from . import assembly, traffic
from .case import Timed, check
from .peer import Case
from .peers import OURS
from .search import ROUNDS, Unusable


@dataclasses.dataclass(frozen=True)
class Forced(Tuning):
    """Launch numbers with the schedule that they are for, whatever the plan would choose."""

    schedule: str | None = None


def forced(schedule: str | None, **numbers) -> Forced:
    """The launch numbers in use, but for these, and a schedule."""
    usual = dataclasses.asdict(implementation.device_properties(0).tuning)
    return Forced(**usual | numbers | {"schedule": schedule})


@contextlib.contextmanager
def used(tuning):
    """Inside, calls are planned by these numbers."""
    device = dataclasses.replace(implementation.device_properties(0), tuning=tuning)
    schedule = getattr(tuning, "schedule", implementation.SCHEDULE)
    dispatch.forget()
    with mock.patch.multiple(implementation, device_properties=lambda index: device, SCHEDULE=schedule):
        yield
    dispatch.forget()


@functools.cache
def plan(tuning, case: Case) -> dict:
    """Schedule and launch numbers."""
    with used(tuning):
        planned = traffic.plan(case.shape, case.dtype, case.device)
    return {key: planned[key] for key in ("schedule", "numbers")}


class Measure:
    """Seconds of a call, loss and gradient: the median of those of one turn, after some to warm up."""

    def __init__(self, seconds: float, sets):
        self.seconds, self.sets = seconds / ROUNDS, sets

    def __call__(self, tuning, case: Case) -> float:
        with used(tuning):
            if reason := refusal(tuning, case):
                raise Unusable(reason)
            timed = ready(case, self.sets(case))
            timed.calls(1.0, self.seconds / 10)
            return 1e-3 * statistics.median(timed.calls(1.0, self.seconds))


@functools.lru_cache(maxsize=1)
def ready(case: Case, sets: int) -> Timed:
    return Timed(case, OURS, xent_ext.cross_entropy, sets)


@functools.cache
def refusal(tuning, case: Case) -> str | None:
    """Why these numbers are not for the case, or None: the loss and gradient against float64, and register spills."""
    with launched() as kernels:
        found = check(case, [OURS])[OURS]
    if found["status"] == "absent":
        return found["reason"]
    if found["status"] == "wrong":
        return "wrong: " + ", ".join(f"{what} off by {error:.1e}" for what, error in found["errors"].items())
    spilled = {kernel.metadata.name: bytes for kernel in kernels if (bytes := spill_bytes(kernel))}
    return "; ".join(f"{name} spills {bytes} bytes" for name, bytes in spilled.items()) or None


@contextlib.contextmanager
def launched():
    """The compiled kernels that are launched inside; none in Triton's interpreter, which compiles nothing."""
    kernels, run = [], JITFunction.run

    def noted(*args, **kwargs):
        kernels.append(run(*args, **kwargs))
        return kernels[-1]

    with mock.patch.object(JITFunction, "run", noted):
        yield kernels


@functools.cache
def spill_bytes(kernel) -> int:
    return assembly.resources(kernel)["spill_bytes"]
