"""PyTorch's own loss on a CPU: which calls it takes, and how it is right in half precision.

PyTorch's own is a few operators over all logits, this package's are many over blocks of them. So PyTorch's is the
faster one for few logits, and without a gradient as long as the memory of its log-probabilities is not mapped anew.
"""

import functools
from typing import NamedTuple

import torch

from .layout import class_axis
from .memory import MAPPED
from .reference import result_dtype

HALF = (torch.float16, torch.bfloat16)


# --- Which calls it takes


class Least(NamedTuple):
    """From how many logits of a kind on blocks are faster, with one thread; None: where memory is mapped."""

    gradient: int | None  # of class indices, made in the forward pass
    dense: int | None  # of probabilities
    forward: int | None = None  # without a gradient
    dense_forward: int | None = None
    deferred: int | None = None  # made in backward, of row losses, from logits that are read again


M = 1 << 20
# By where the classes are and how many: in float32 or float64, and in half precision. Measured by `python -m bench
# cpu_sizes` on an AMD EPYC (Zen 5), whose process keeps what PyTorch frees. In a fresh one PyTorch's time doubles from
# about a million logits on, whose memory is given back and faulted in again: it decides where the two are close.
LEAST = {
    # PyTorch's softmax of a row that is shorter than a vector register takes ten times as long.
    "few": (Least(M >> 5, M >> 5, M >> 6, M >> 5, M >> 4),) * 2,
    "short": (Least(4 * M, 8 * M), Least(4 * M, 4 * M, 4 * M, 4 * M)),
    "long": (Least(M, 4 * M), Least(4 * M, 2 * M, None, 4 * M)),
    "strided few": (Least(M, 4 * M), Least(M >> 2, 2 * M, M >> 2, 4 * M)),
    "strided": (Least(2 * M, 4 * M), Least(4 * M, 2 * M, 2 * M, 4 * M)),
    # Blocks of many strided classes are parts of an image, and must be copied.
    "strided long": (Least(3 * M, 4 * M), Least(8 * M, 4 * M, None, 8 * M)),
}
ALWAYS = M >> 6  # the least of them: PyTorch's own takes what is smaller


def takes(input, target, reduction):
    """Whether PyTorch's own is faster for these logits on the CPU; the arguments need not be valid."""
    size = input.numel()
    if size < ALWAYS:
        return True
    if input.layout is not torch.strided:
        return False
    shape = input.shape
    axis = class_axis(shape)
    dense = isinstance(target, torch.Tensor) and target.is_floating_point()
    if not (torch.is_grad_enabled() and input.requires_grad):
        column = "dense_forward" if dense else "forward"
    elif reduction == "none":
        column = "deferred"
    else:
        column = "dense" if dense else "gradient"
    # Logits of more dimensions PyTorch copies to where it has their classes strided.
    strided = len(shape) > 2 or input.stride(axis) != 1
    return size < least_for_blocks(shape[axis], strided, input.dtype, torch.get_num_threads(), column)


@functools.lru_cache(maxsize=1024)  # small calls wait for this
def least_for_blocks(classes, strided, dtype, threads, column):
    """From how many logits of this kind on blocks are faster, for what a column of `LEAST` says.

    The time that belongs to a call or a block is one thread's, while the others wait: more threads need more logits.
    But memory that PyTorch has mapped anew costs more than that.
    """
    least = getattr(LEAST[kind(classes, strided)][dtype.itemsize == 2], column)
    mapped = MAPPED // dtype.itemsize
    return mapped if least is None else min(least * threads, mapped)


def kind(classes, strided):
    """A key of `LEAST`, for logits with so many classes."""
    if strided:
        return "strided few" if classes < 8 else "strided" if classes < 64 else "strided long"
    return "few" if classes < 16 else "short" if classes < 256 else "long"


# --- In half precision

NONE, MEAN, SUM = (torch.nn._reduction.get_enum(name) for name in ("none", "mean", "sum"))
# Of fewer classes, last in memory, PyTorch's softmax takes up to ten times as long in half precision as in float32,
# casts included.
FEW_CLASSES = 64


def cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing):
    """`torch._C._nn.cross_entropy_loss`, but that sums of half precision are made in float32, and rounded once.

    PyTorch's adds up row losses in half precision, and counts the rows in it: of 65505 rows in float16 the mean is NaN,
    and the gradient 0. With smoothing it adds up all classes in it. Takes tensors on the CPU, valid or not.
    """
    function = torch._C._nn.cross_entropy_loss
    arguments = (input, target, weight, reduction, ignore_index, label_smoothing)
    if not is_half(input):
        return function(*arguments)
    axis = class_axis(input.shape)
    classes = input.shape[axis]
    if label_smoothing > 0 or target.is_floating_point():
        return in_float32(function, *arguments)
    if input.numel() == classes:  # one row, of which nothing is added up
        return function(*arguments)
    if classes < FEW_CLASSES and input.stride(axis) == 1:
        return in_float32(function, *arguments)
    losses = function(input, target, weight, NONE, ignore_index, label_smoothing)
    if reduction == NONE:
        return losses
    if reduction == SUM:
        return losses.sum()  # PyTorch makes sums and means themselves in float32
    counted = target.long() != ignore_index
    if weight is None and counted.all():
        return losses.mean()
    normalizer = counted.sum() if weight is None else weight.float()[target.long()[counted]].sum()
    return (losses.sum(dtype=torch.float32) / normalizer).to(losses.dtype)


def pytorch(function, input, target, weight, *options):
    """`function`, F.cross_entropy as it was, but in float32 for half precision on a CPU. For calls of any kind."""
    if isinstance(input, torch.Tensor) and input.is_cpu and is_half(input):
        return in_float32(function, input, target, weight, *options)
    return function(input, target, weight, *options)


def is_half(input):
    """Whether PyTorch would compute in half precision: not under autocast."""
    return input.dtype in HALF and not torch.is_autocast_enabled("cpu")


def in_float32(function, input, target, weight, *options):
    """A loss computed in float32, in the dtype that it has in half precision."""
    if weight is not None and weight.dtype != input.dtype and not target.is_floating_point():
        return function(input, target, weight, *options)  # which raises
    dtype = result_dtype(input, target, weight)
    target, weight = (
        tensor.float() if tensor is not None and tensor.dtype in HALF else tensor for tensor in (target, weight)
    )
    return function(input.float(), target, weight, *options).to(dtype)
