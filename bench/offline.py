"""Compile the package's kernels for a GPU that need not be there.

    with offline.target("cuda", 90) as launches:
        loss = xent_ext.cross_entropy(logits, classes)  # tensors on the CPU

Inside, Triton takes that GPU for its active one and CPU tensors go to the Triton kernels, by the plan for that GPU.
A launch compiles and returns: nothing is loaded or run, and no tensor is read or written.
"""

import contextlib
import itertools
from dataclasses import dataclass
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime.errors import OutOfResources
from xent_ext.kernels import device, implementation, launch

from xent_ext import backends, dispatch

# What the plan and Triton ask of a device, by architecture: A100, H100, B200, MI300X.
PROPERTIES = {
    80: {"multiprocessor_count": 108, "max_shared_mem": 163 * 1024},
    90: {"multiprocessor_count": 132, "max_shared_mem": 227 * 1024},
    100: {"multiprocessor_count": 148, "max_shared_mem": 227 * 1024},
    "gfx942": {"multiprocessor_count": 304, "max_shared_mem": 64 * 1024},
}


@dataclass(frozen=True)
class Launch:
    """What one launch would have run."""

    kernel: triton.compiler.CompiledKernel
    arguments: dict  # by their names, with Triton's options

    @property
    def name(self):
        return self.kernel.metadata.name


class Driver:
    """As much of a Triton driver as compiling needs."""

    # Triton keeps kernels in memory by the number of their device: each driver is a device of its own.
    numbers = itertools.count()

    def __init__(self, backend, arch):
        self.gpu = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
        self.number = next(self.numbers)
        self.utils = self

    def get_current_target(self):
        return self.gpu

    def get_current_device(self):
        return self.number

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return PROPERTIES[self.gpu.arch]


def driver_that_launches_nothing(backend, arch):
    """A driver with Triton's own launcher for the GPU, which ends where the driver in C would be called."""
    from triton.backends.nvidia.driver import CudaLauncher

    class Launching(Driver):
        launcher_cls = CudaLauncher

        def load_binary(self, *arguments):
            registers, spills, threads = 32, 0, 1024
            return "module", "function", registers, spills, threads

        def unload_module(self, module):
            pass

        def build_signature_metadata(self, signature):
            return b""

        def launch(self, *arguments):
            pass

    return Launching(backend, arch)


@contextlib.contextmanager
def target(backend, arch):
    """Compile for this GPU; yields the list of launches, which grows."""
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 replaces Triton's compiler by its interpreter: unset it to compile")
    launches = []
    compile_and_run = JITFunction.run

    def compile_only(function, *args, grid, warmup, **kwargs):
        kernel = compile_and_run(function, *args, grid=grid, warmup=True, **kwargs)
        limit = PROPERTIES[arch]["max_shared_mem"]
        if kernel.metadata.shared > limit:
            raise OutOfResources(kernel.metadata.shared, limit, "shared memory")
        launches.append(Launch(kernel, dict(zip(function.arg_names, args, strict=False)) | kwargs))
        return kernel

    with (
        mock.patch.dict(vars(triton.runtime.driver)),  # puts back whatever driver was active
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.multiple(backends, BACKEND="triton", CHECK=False),
        mock.patch.object(implementation, "clusters_work", return_value=True),  # it would run them to see
        mock.patch.object(launch, "is_reusable", return_value=False),  # for every launch is to come by here
        mock.patch.object(device, "TUNING", None),  # which is for a device that is there
    ):
        triton.runtime.driver.set_active(Driver(backend, arch))
        forget()
        try:
            yield launches
        finally:
            forget()


def forget():
    """What was found for one driver is not for another."""
    implementation.forget()
    dispatch.forget()
