"""The GPU that kernels are launched on: what plans need to know of it, and numbers in its memory."""

import dataclasses
import functools
import os

import torch
import triton
from triton import knobs

from ..backends import is_capturing, release
from ..plan import L2_BYTES, Device, shipped
from ..tuning import TuningFile

# Launch numbers for one device, in place of those that the plan ships with.
TUNING = TuningFile.read(os.environ["XENT_EXT_TUNING"]) if "XENT_EXT_TUNING" in os.environ else None

# Triton's interpreter needs no GPU; plans are then those of the card that most people train on.
INTERPRETED = Device(backend="cuda", arch=90, lanes=32, processors=132, l2_bytes=L2_BYTES[90])


@functools.lru_cache
def device_properties(index):
    """What the plan needs to know of the device `index`, as Triton's active driver sees it."""
    if knobs.runtime.interpret:
        return dataclasses.replace(INTERPRETED, tuning=tuning(INTERPRETED, device_name(index)))
    driver = active_driver()
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(index)
    return Device(
        backend=target.backend,
        arch=target.arch,
        lanes=target.warp_size,
        processors=properties["multiprocessor_count"],
        l2_bytes=l2_bytes(target, index),
        cluster=largest_cluster(target),
        tuning=tuning(target, device_name(index)),
    )


def active_driver():
    """Triton's, which is made when it is first asked for, where there is anything to run on."""
    try:
        driver = triton.runtime.driver.active
        driver.get_current_target()  # older Tritons look for one only when it is asked something
        return driver
    except RuntimeError as error:
        if torch.cuda.is_available():
            raise
        raise RuntimeError(
            "XENT_EXT_BACKEND=triton gives the kernels tensors on the CPU, where Triton has no driver: "
            "set TRITON_INTERPRET=1, before the program starts, for its interpreter"
        ) from error


def device_name(index):
    """What a file of launch numbers calls the device."""
    if knobs.runtime.interpret:
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
    """Programs of the largest cluster, where the GPU has clusters and Triton compiles reductions over them."""
    return 16 if target.backend == "cuda" and target.arch >= 90 and release(triton.__version__) >= (3, 9) else 1


def constant(value, dtype, device):
    """A number on the device: kernels take options from memory, so that None has no code and no number its own."""
    if device.type != "cuda":
        return kept_constant(value, dtype, device, None)
    if is_capturing():
        # The memory and the value are the graph's: nothing else may rely on them.
        return torch.full((), value, dtype=dtype, device=device)
    # Written and read by one stream, so that nothing needs to wait for it.
    return kept_constant(value, dtype, device, torch._C._cuda_getCurrentRawStream(device.index))


@functools.lru_cache(maxsize=256)
def kept_constant(value, dtype, device, stream):
    return torch.full((), value, dtype=dtype, device=device)
