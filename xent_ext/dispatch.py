"""Which implementation takes a call, and why.

    logits on                     implementation
    CUDA or ROCm GPU              Triton kernels (`xent_ext.kernels`)
    CPU                           `xent_ext.cpu`; PyTorch's own where that is faster, see `xent_ext.cpu_own`, and in
                                  compiled graphs
    anything else, and whatever   PyTorch's own `torch.nn.functional.cross_entropy`; with options for training the
    the implementations don't do  plain formula, `xent_ext.reference`

Before that, `xent_ext.sharded` makes of a `DTensor` the shard that is here.

`XENT_EXT_BACKEND`, read when the package is imported, overrides this: `torch` gives every call to PyTorch,
`triton` gives CPU tensors to the Triton kernels too (under Triton's interpreter, or a driver that runs on the
CPU). `XENT_EXT_CHECK=1` has class indices checked on every device, at the price of a synchronisation.
"""

import functools
import importlib
import importlib.util
import os

import torch
from torch.autograd import forward_ad

from . import cpu_own

BACKENDS = ("auto", "triton", "torch")
BACKEND = os.environ.get("XENT_EXT_BACKEND", "auto")
if BACKEND not in BACKENDS:
    raise ValueError(f"XENT_EXT_BACKEND must be one of {', '.join(BACKENDS)}, got {BACKEND!r}")

CHECK = os.environ.get("XENT_EXT_CHECK", "0") == "1"

HAS_TRITON = importlib.util.find_spec("triton") is not None  # found here: PyTorch's compiler can't trace the search

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PLAIN = (torch.Tensor, torch.nn.Parameter)


def release(version):
    """(major, minor) of a package's version."""
    return tuple(int(part) for part in version.split(".")[:2])


# Before 2.12 PyTorch's compiler can't trace what is decided here and in `functional`: it fails at frozen dataclasses,
# and at the questions whether there is autocast and whether sizes depend on data. And with 2.6 the gradients of a
# DTensor's shards were found wrong; which release mended them is not known.
RECENT = release(torch.__version__) >= (2, 12)

is_exporting = getattr(torch.compiler, "is_exporting", bool)  # new in PyTorch 2.7


@functools.cache
def implementation(name):
    """The module that implements `forward` and `backward`; Triton is imported when a call first needs it."""
    return importlib.import_module({"cpu": "xent_ext.cpu", "triton": "xent_ext.kernels.launch"}[name])


def implementation_for(input):
    """The module for these logits, where `route` has let the call pass."""
    return implementation("triton" if input.is_cuda or BACKEND == "triton" else "cpu")


def is_small(input, target, reduction):
    """Whether PyTorch's own is faster on a CPU, and takes the call before its arguments are looked at."""
    if BACKEND != "auto" or not isinstance(input, torch.Tensor) or not input.is_cpu:
        return False
    # The C++ loops that Inductor makes of PyTorch's formula are as fast or faster for all sizes.
    return torch.compiler.is_compiling() or cpu_own.takes(input, target, reduction)


def has_unknown_size(tensor):
    """Whether a size in a graph depends on data, as that of `logits[mask]` does: nothing can be asked about it."""
    return torch.fx.experimental.symbolic_shapes.has_free_unbacked_symbols(tensor)


def is_distributed(tensor):
    """Whether this is a `DTensor`."""
    module = None if type(tensor) in PLAIN else getattr(torch.distributed, "tensor", None)  # imported if there are any
    return module is not None and isinstance(tensor, module.DTensor)


def is_autocast(input):
    device = input.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def route(tensors, reduction, with_options):
    """(name of the implementation: "triton", "cpu", "torch" or, with options for training, "plain"; why)."""
    name, reason = supported_route(tensors, reduction, with_options)
    return ("plain" if with_options and name == "torch" else name), reason


def supported_route(tensors, reduction, with_options):
    """`route`, with "torch" for all that no implementation takes."""
    input = tensors.input
    if BACKEND == "torch":
        return "torch", "XENT_EXT_BACKEND=torch"
    if reason := unsupported(tensors):
        return "torch", reason
    if input.is_cuda or BACKEND == "triton":
        if not HAS_TRITON:
            return "torch", "Triton is not installed"
        return "triton", "the logits are on a GPU" if input.is_cuda else "XENT_EXT_BACKEND=triton"
    if input.device.type != "cpu":
        return "torch", f"no implementation for device type {input.device.type!r}"
    if (torch.compiler.is_compiling() or not with_options) and is_small(input, tensors.target, reduction):
        return (
            "torch",
            "few logits, or a compiled graph, on a CPU, where PyTorch's own is faster",
        )
    return "cpu", "the logits are on a CPU"


def unsupported(tensors):
    """Why neither the kernels nor the CPU implementation can take the call, or None."""
    traced = torch.compiler.is_compiling()  # an operator gets no negative views
    input, target, weight = tensors[:3]
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN:
            return f"tensor subclass {type(tensor).__name__}"
        if tensor.layout is not torch.strided:
            return f"layout {tensor.layout}"
        if not traced and tensor.is_neg():
            return "negative view"
        if tensor.dtype not in DTYPES and (tensor is not target or tensor.is_floating_point()):
            return f"dtype {tensor.dtype}"
    if input.numel() == 0 or target.numel() == 0:
        return "nothing to compute"
    if torch.is_grad_enabled() and (target.requires_grad or (weight is not None and weight.requires_grad)):
        return "a gradient with respect to the target or the weight is wanted"
    return unsupported_here()


def unsupported_here():
    """Why they can take no call now, whatever its tensors, or None."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():  # no mode sees into an operator
        return "a dispatch mode is active"
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    if is_exporting():
        return "torch.export makes a program that may run where this package is not"
    return None
