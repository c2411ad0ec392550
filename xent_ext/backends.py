"""What the loss can run on, and what the environment asks for.

`XENT_EXT_BACKEND`, read when the package is imported: `torch` gives every call to PyTorch, `triton` gives CPU tensors
to the Triton kernels too (under Triton's interpreter, or a driver that runs on the CPU). `XENT_EXT_CHECK=1` has class
indices checked on every device, at the price of a synchronisation (`SWITCH` has other words for 1 and 0).
"""

import functools
import importlib
import importlib.util
import os

import torch

BACKENDS = ("auto", "triton", "torch")
BACKEND = os.environ.get("XENT_EXT_BACKEND", "auto")
if BACKEND not in BACKENDS:
    raise ValueError(f"XENT_EXT_BACKEND must be one of {', '.join(BACKENDS)}, got {BACKEND!r}")

SWITCH = {"0": False, "false": False, "no": False, "off": False, "1": True, "true": True, "yes": True, "on": True}


def switch(name):
    """Whether a variable of the environment is on."""
    value = os.environ.get(name, "0")
    if value.lower() not in SWITCH:
        raise ValueError(f"{name} must be one of {', '.join(SWITCH)}, got {value!r}")
    return SWITCH[value.lower()]


CHECK = switch("XENT_EXT_CHECK")

HAS_TRITON = importlib.util.find_spec("triton") is not None  # found here: PyTorch's compiler can't trace the search


def release(version):
    """(major, minor) of a package's version."""
    return tuple(int(part) for part in version.split(".")[:2])


# Before 2.12 PyTorch's compiler can't trace what is decided in `dispatch` and `call`: it fails at frozen dataclasses,
# and at the questions whether there is autocast and whether sizes depend on data. And before it, the gradients of a
# DTensor's shards were found wrong; which release mended them is not known.
RECENT = release(torch.__version__) >= (2, 12)


@functools.cache
def implementation(name):
    """The module with `setup_for` and `traffic`; Triton is imported when a call first needs it."""
    return importlib.import_module({"cpu": "xent_ext.cpu", "triton": "xent_ext.kernels.implementation"}[name])


def implementation_for(input):
    """The module for these logits, where `dispatch.route` has let the call pass."""
    return implementation("triton" if input.is_cuda or BACKEND == "triton" else "cpu")


def is_capturing():
    """Whether a CUDA graph is captured: memory that is allocated now is the graph's, and nothing is computed yet."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
