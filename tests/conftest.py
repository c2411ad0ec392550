"""Fixtures that choose which implementation a test runs."""

import os
import sys
import types

import pytest
import torch

# Where there is no GPU, Triton's kernels run in its interpreter, which Triton asks for when it is imported. Where it
# is imported already, someone has made a driver active for it.
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("parity")

from xent_ext import backends, cpu, dispatch, expectation, memory  # noqa: E402

TORCH = backends.release(torch.__version__)
current_corners = pytest.mark.skipif(
    TORCH < (2, 12), reason="older PyTorch takes other calls than the present one, and raises other types for the rest"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """On problems this small several threads only wait for one another, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_expected():
    """Each test's first upstream gradient is expected to be 1."""
    expectation.shared_expectation.cache_clear()
    dispatch.forget()


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """Each test's first gradient has memory of its own."""
    monkeypatch.setattr(memory, "_kept", memory.Kept())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request):
    return request.param


class Calls(list):
    """The problems that an implementation was given."""

    def watch(self, monkeypatch, module):
        forward = module.Setup.forward

        def watched(setup, *args):
            self.append(setup.problem)
            return forward(setup, *args)

        monkeypatch.setattr(module.Setup, "forward", watched)
        return self


@pytest.fixture
def cpu_blocks(monkeypatch):
    """`xent_ext.cpu` takes every call that it can, however small. Returns its calls."""
    monkeypatch.setattr(backends, "BACKEND", "auto")
    monkeypatch.setattr(backends, "CHECK", False)
    monkeypatch.setattr(dispatch, "is_small", lambda *_: False)
    return Calls().watch(monkeypatch, cpu)


@pytest.fixture
def many_blocks(cpu_blocks, monkeypatch):
    """Like `cpu_blocks`, in blocks of 256 bytes: a few rows, or one."""
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 256)
    return cpu_blocks


def patch_the_language_once(monkeypatch):
    """Have Triton's interpreter patch all of `triton.language` for a kernel, and leave it to the functions it calls.

    It patches what a function sees again for each call of one, which is more than half of the time it takes.
    """
    from triton import language
    from triton.runtime import interpreter

    def call(function, *args, **kwargs):
        return function.rewrite()(*args, **kwargs)

    patch, all_of_it = interpreter._patch_lang, types.SimpleNamespace(__globals__=vars(language) | {"tl": language})
    monkeypatch.setattr(interpreter, "_patch_lang", lambda kernel: patch(all_of_it))
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture
def triton_backend(monkeypatch):
    """The Triton kernels take every call that they can, on every device. Returns their calls."""
    implementation = pytest.importorskip("xent_ext.kernels.implementation", exc_type=ImportError)
    implementation.forget()  # tests change the numbers that plans are made of
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_the_language_once(monkeypatch)
    monkeypatch.setattr(backends, "BACKEND", "triton")
    monkeypatch.setattr(backends, "CHECK", False)
    return Calls().watch(monkeypatch, implementation)


@pytest.fixture
def fused(request, device):
    """The device's own implementation takes every call that it can. Returns its calls."""
    return request.getfixturevalue("cpu_blocks" if device == "cpu" else "triton_backend")
