"""The Triton kernels as an implementation of the loss: a setup for each kind of call.

Nothing here reads a value from the device: normalisers, losses and decisions stay there. The one exception is the check
of clusters, once for each process.
"""

import dataclasses
import functools
import os
import warnings

import torch

from ..backends import is_capturing
from ..expectation import first_expected
from ..plan import PORTABLE_CLUSTER, SCHEDULES
from ..problem import Problem, Tensors, Wanted
from .device import device_properties
from .launches import signatures
from .setup import Setup
from .slices import SliceSetup

# Forces a schedule, for measurements.
SCHEDULE = os.environ.get("XENT_EXT_SCHEDULE")
if SCHEDULE not in (None, *SCHEDULES):
    raise ValueError(f"XENT_EXT_SCHEDULE must be one of {', '.join(SCHEDULES)}, got {SCHEDULE!r}")


def setup_for(problem, tensors, wanted):
    """The `Setup` for a call, with clusters only where they work."""
    where, known = tensors.input.device, signatures(tensors)
    device = device_properties(where.index or 0)
    found = setup(problem, wanted, known, device, SCHEDULE)
    while found.plan.num_ctas > 1 and not clusters_work(where, found.plan):
        smaller = PORTABLE_CLUSTER if found.plan.num_ctas > PORTABLE_CLUSTER else 1
        device = dataclasses.replace(device, cluster=smaller)
        found = setup(problem, wanted, known, device, SCHEDULE)
    return found


@functools.lru_cache(maxsize=1024)
def setup(problem, wanted, signatures, device, schedule):
    kind = SliceSetup if problem.ranks else Setup
    return kind(problem, wanted, signatures, device, schedule)


def traffic(problem, tensors, want_gradient):
    """What a call moves and allocates, forward and backward, without running it."""
    return setup_for(problem, tensors, Wanted(want_gradient)).traffic(tensors)


def forget():
    """For those who change what plans are made of."""
    device_properties.cache_clear()
    setup.cache_clear()


def clusters_work(device, plan):
    """Whether a plan's clusters can be used; while a CUDA graph is captured, only if that is known already."""
    key = (device, plan.block, plan.num_warps, plan.num_ctas)
    if key not in _checked:
        if device.type == "cuda" and is_capturing():
            return False
        _checked[key] = check_clusters(device, plan)
    return _checked[key]


_checked = {}


alike = functools.partial(torch.allclose, rtol=1.3e-6, atol=1e-5)  # float32, as torch.testing has it


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
    properties, one = device_properties(device.index or 0), first_expected(device, torch.float32)
    try:
        (loss, _, (gradient, *_)), (expected_loss, _, (expected, *_)) = (
            Setup(problem, Wanted(gradient=True), signatures(tensors), properties, planned=each).forward(tensors, one)
            for each in (clustered, streamed)
        )
        # Not by torch.testing, whose import takes longer than to compile a kernel.
        if not (alike(loss, expected_loss) and alike(gradient, expected)):
            raise ArithmeticError("they give another result")
    except Exception as error:  # whatever the compiler, the driver or the comparison makes of it
        warnings.warn(
            f"xent_ext streams long rows on {device}, as clusters of {plan.num_ctas} fail: {error}", stacklevel=2
        )
        return False
    return True
