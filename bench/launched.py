"""A GPU's path without one: tensors on the CPU, and launches that do nothing, or no more than Triton's part of them."""

import contextlib
from unittest import mock

from xent_ext import backends, dispatch


class NoDriver:
    """In the place of Triton's driver: a device with a stream, where launches do nothing."""

    @staticmethod
    def get_current_device():
        return 0

    @staticmethod
    def get_current_stream(device):
        return 0

    @staticmethod
    def launch(*arguments):
        pass


def compiled_by_nobody(kernel, grid):
    return lambda *arguments, **options: None


def launched_by_nobody(launch, kernel):
    """What `Launch` keeps of compiled code, of none."""
    launch.driver, launch.code, launch.run = NoDriver, (None,) * 5, NoDriver.launch


def forget():
    """Calls with launches that do nothing are not to be found outside, and others not inside."""
    from xent_ext.kernels import implementation

    implementation.setup.cache_clear()
    dispatch.forget()


@contextlib.contextmanager
def by_nobody():
    """Inside, CPU tensors take the Triton path by the plan for an H100, and launching a kernel does nothing."""
    from triton.runtime import KernelInterface
    from xent_ext.kernels import device, implementation, launch

    def gpu(index):  # not a Mock: to call one takes longer than much of what is timed
        return device.INTERPRETED

    def work(device, plan):
        return True

    with (
        mock.patch.object(KernelInterface, "__getitem__", compiled_by_nobody),
        mock.patch.object(launch.Launch, "keep", launched_by_nobody),
        mock.patch.multiple(backends, BACKEND="triton", CHECK=False),
        mock.patch.multiple(implementation, device_properties=gpu, clusters_work=work),
    ):
        forget()
        yield
    forget()


@contextlib.contextmanager
def by_triton():
    """Inside, CPU tensors take the Triton path, and Triton's launcher runs up to the call of the driver."""
    from xent_ext.kernels import implementation

    from . import offline  # these need Triton

    def work(device, plan):
        return True

    with (
        mock.patch("triton.backends.nvidia.driver.PyKernelArg", dict),  # made with the functions in C, which need CUDA
        mock.patch.dict(vars(offline.triton.runtime.driver)),  # puts back whatever driver was active
        mock.patch.multiple(backends, BACKEND="triton", CHECK=False),
        mock.patch.multiple(implementation, clusters_work=work),
    ):
        offline.triton.runtime.driver.set_active(offline.driver_that_launches_nothing("cuda", 90))
        offline.forget()
        yield
    offline.forget()
