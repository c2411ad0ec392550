"""PyTorch's own loss on a CPU: which calls it takes, and how it is right in half precision.

PyTorch's own is a few operators over all logits, this package's are many over blocks of them. So PyTorch's is the
faster one for few logits, and without a gradient as long as the memory of its log-probabilities is not mapped anew.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch._C import _is_any_autocast_enabled

from .cpu_plain import FEW_CLASSES
from .layout import class_axis
from .memory import MAPPED
from .reference import result_dtype

HALF = (torch.bfloat16, torch.float16)


# --- Which calls it takes


class Least(NamedTuple):
    """From how many logits of a kind on blocks are faster, with one thread; None: where memory is mapped."""

    gradient: int | None  # of class indices, made in the forward pass
    dense: int | None  # of probabilities, or with smoothing
    forward: int | None = None  # without a gradient
    dense_forward: int | None = None
    deferred: int | None = None  # made in backward, of row losses, from logits that are read again


M = 1 << 20
FEW = Least(M >> 5, M >> 5, M >> 6, M >> 5, M >> 3)
# By where the classes are and how many: in float32 or float64, in bfloat16, and in float16. Measured by `python -m
# bench cpu_sizes` with one thread on an AMD EPYC (Zen 5), in a process that keeps what PyTorch frees, and gradients of
# class indices in float32 with two threads, too. In a fresh process PyTorch's time doubles from about a million logits
# on, whose memory is given back and faulted in again: blocks would be faster there, but not in all processes.
LEAST = {
    # PyTorch's softmax of a row that is shorter than a vector register takes ten times as long.
    "few": (FEW, FEW, FEW),
    "short": (Least(6 * M, 8 * M), Least(4 * M, 4 * M, 4 * M, 4 * M), Least(4 * M, 4 * M, 4 * M, 4 * M)),
    "medium": (Least(3 * M, 8 * M), Least(4 * M, 8 * M, 4 * M), Least(4 * M, 3 * M, 4 * M, 3 * M)),
    "long": (Least(2 * M, 4 * M), Least(8 * M, None), Least(8 * M, 2 * M, None, 2 * M)),
    # Such logits are copied to where their classes are last, by PyTorch's own in one piece.
    "columns": (Least(M >> 1, None), Least(None, None), Least(None, 8 * M)),
    "strided few": (Least(2 * M, None), Least(M >> 1, None, M >> 1), Least(M >> 1, 2 * M, M >> 1, 3 * M)),
    "strided short": (Least(2 * M, 3 * M), Least(M, 6 * M, 2 * M), Least(M >> 1, 2 * M, M >> 1, 4 * M)),
    # Blocks of so many strided classes are parts of an image, and must be copied.
    "strided": (Least(2 * M, 4 * M), Least(4 * M, None), Least(4 * M, 2 * M)),
    "strided long": (Least(4 * M, None), Least(None, None), Least(None, 4 * M)),
}
PLACE = {dtype: place for place, dtype in enumerate(HALF, 1)}
# What is smaller PyTorch's own takes, whatever else there is to a call: of few classes, and of more.
ALWAYS, ALWAYS_OF_MORE = M >> 6, M >> 2
# Of so many strided classes a block has less than a cache line of each, and others read the same line again.
MOST_STRIDED = 1 << 14


def takes(input, target, reduction, label_smoothing):
    """Whether PyTorch's own is faster for these logits on the CPU; the arguments need not be valid."""
    size = input.numel()
    if input.layout is not torch.strided:
        return False
    shape = input.shape
    axis = class_axis(shape)
    classes = shape[axis]
    if size < ALWAYS_OF_MORE and classes >= FEW_CLASSES:
        return True
    dense = label_smoothing != 0 or (isinstance(target, torch.Tensor) and target.is_floating_point())
    if not (torch.is_grad_enabled() and input.requires_grad):
        column = "dense_forward" if dense else "forward"
    elif reduction == "none":
        column = "deferred"
    else:
        column = "dense" if dense else "gradient"
    where = "last" if input.stride(axis) == 1 else "columns"
    if len(shape) > 2:
        where = "strided"  # to which PyTorch copies such logits
    return size < least_for_blocks(where, classes, input.dtype, torch.get_num_threads(), column)


@functools.lru_cache(maxsize=1024)  # small calls wait for this
def least_for_blocks(where, classes, dtype, threads, column):
    """From how many logits of this kind on blocks are faster, for what a column of `LEAST` says.

    With two threads it is as many as with one. More of them have larger blocks (see `cpu.BLOCK_BYTES`), and so need as
    many times as many logits: that is reasoned, not measured. But memory that PyTorch has mapped anew costs more.
    """
    if where != "last" and classes >= MOST_STRIDED:
        return math.inf
    least = getattr(LEAST[kind(where, classes)][PLACE.get(dtype, 0)], column)
    mapped = MAPPED // dtype.itemsize
    return mapped if least is None else min(least * max(threads // 2, 1), mapped)


def kind(where, classes):
    """A key of `LEAST`, for logits whose so many classes are "last", in "columns" or otherwise "strided"."""
    if where == "strided":
        sizes = {8: "strided few", 32: "strided short", 1024: "strided"}
        return next((name for least, name in sizes.items() if classes < least), "strided long")
    if classes < FEW_CLASSES:
        return "few"
    if where == "columns":
        return where
    return "short" if classes < SHORT_ROW else "medium" if classes < MEDIUM_ROW else "long"


# --- In half precision

native = torch._C._nn.cross_entropy_loss  # what F.cross_entropy calls
NONE, MEAN, SUM = (torch.nn._reduction.get_enum(name) for name in ("none", "mean", "sum"))
# Of so few classes, last in memory, PyTorch's softmax takes up to ten times as long in half precision as in float32,
# casts included.
SHORT_ROW = 32
# Of so few it takes more where the logits are few enough to stay in cache: in float16 1.1 to 1.4 times as much.
MEDIUM_ROW = 256
# A mean of row losses adds some 6 us to a call, and as much in backward: more than to cast fewer logits.
FEW_LOGITS = 1 << 16


def cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing):
    """`native`, but that sums of half precision are made in float32, and rounded once.

    PyTorch's adds up row losses in half precision, and counts the rows in it: of 65505 rows in float16 the mean is NaN,
    and the gradient 0. Takes tensors on the CPU, valid or not.
    """
    function = way(input, target, weight, reduction, label_smoothing)
    return function(input, target, weight, reduction, ignore_index, label_smoothing)


def way(input, target, weight, reduction, label_smoothing):
    """The soonest of the functions that make a loss right: `native`, or in half precision `in_float32` or `by_row`."""
    if not is_half(input):
        return native
    of = way_of_probabilities if target.is_floating_point() else way_of_indices
    return of(input, target, weight, reduction, label_smoothing)


def way_of_indices(input, target, weight, reduction, label_smoothing):
    shape, size = input.shape, input.numel()
    axis = class_axis(shape)
    classes = shape[axis]
    if size == classes and label_smoothing == 0:
        return native  # one row, of which nothing is added up
    if classes < MEDIUM_ROW and size < 8 * FEW_LOGITS:
        return in_float32
    if is_short(input, axis) or (label_smoothing != 0 and input.dtype == torch.float16):
        return in_float32  # in float16 the sum over classes overflows
    least = 0 if reduction != MEAN else FEW_LOGITS if weight is None else 2 * FEW_LOGITS
    return by_row if size >= least else in_float32


def way_of_probabilities(input, target, weight, reduction, label_smoothing):
    alike = input.dtype == target.dtype and (weight is None or weight.dtype == input.dtype)
    if not alike or is_short(input, class_axis(input.shape)):
        return in_float32
    if input.dtype == torch.bfloat16:
        return native  # its one sum over rows and classes is made in float32
    # In float16 that sum overflows, with smoothing those over classes do, and the gradient of a small mass is 0.
    wants_gradient = torch.is_grad_enabled() and input.requires_grad
    return in_float32 if wants_gradient or label_smoothing != 0 or input.numel() < FEW_LOGITS else by_row


def is_short(input, axis):
    return input.shape[axis] < SHORT_ROW and input.stride(axis) == 1


def by_row(input, target, weight, reduction, ignore_index, label_smoothing):
    """Row losses as PyTorch's own makes them, and their sum or mean in float32."""
    losses = native(input, target, weight, NONE, ignore_index, label_smoothing)
    if reduction == NONE:
        return losses
    if reduction == SUM:
        return losses.sum()  # PyTorch makes sums and means themselves in float32
    if target.is_floating_point() or (weight is None and not has(target, ignore_index)):
        return losses.mean()
    return (losses.sum(dtype=torch.float32) / normalizer(target, weight, ignore_index)).to(losses.dtype)


def has(index, value):
    """Whether it can be there: what lies between the least and the largest."""
    low, high = torch.aminmax(index)
    return low.item() <= value <= high.item()


def normalizer(target, weight, ignore_index):
    """What a mean over class indices divides by, in float32."""
    counted = target != ignore_index
    if weight is None:
        return counted.sum()
    index = (target.long() * counted).reshape(-1)
    return torch.dot(weight.index_select(0, index).float(), counted.reshape(-1).float())


def in_float32(input, target, weight, *options, function=native):
    """A loss computed in float32, in the dtype that it has in half precision."""
    logits = input.contiguous().float()  # contiguous as its softmax will be: half as much is copied so
    if target.is_floating_point():
        loss = function(logits, widened(target), None if weight is None else widened(weight), *options)
        return loss.to(result_dtype(input, target, weight))
    if weight is not None:
        if weight.dtype != input.dtype:
            return function(input, target, weight, *options)  # which raises
        weight = weight.float()
    return function(logits, target, weight, *options).type_as(input)  # to(dtype) takes 0.4 us more


def widened(tensor):
    return tensor.float() if tensor.dtype in HALF else tensor


def pytorch(function, input, target, weight, *options):
    """`function`, F.cross_entropy as it was, but in float32 for half precision on a CPU. For calls of any kind."""
    if isinstance(input, torch.Tensor) and input.is_cpu and is_half(input):
        return in_float32(input, target, weight, *options, function=function)
    return function(input, target, weight, *options)


def is_half(input):
    """Whether PyTorch would compute in half precision: not under autocast."""
    return input.dtype in HALF and not (_is_any_autocast_enabled() and torch.is_autocast_enabled("cpu"))
