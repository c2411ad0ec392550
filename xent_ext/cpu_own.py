"""PyTorch's own loss on a CPU: which calls it takes, and how it is right in half precision.

PyTorch's own is a few operators over all logits, this package's are many over blocks of them. So PyTorch's is the
faster one for few logits, and without a gradient as long as the memory of its log-probabilities is not mapped anew.
"""

import torch

from .layout import class_axis
from .memory import MAPPED
from .reference import result_dtype

HALF = (torch.float16, torch.bfloat16)


# --- Which calls it takes

# From so many logits on blocks take a call with a gradient: by where its classes are and how many, in float32 or float64
# and in half precision. Measured on two cores of an AMD EPYC (Zen 5) by `python -m bench cpu_sizes`, which gives the
# most favourable state of PyTorch's memory, and in fresh processes, where PyTorch's memory is given back to the system
# and faulted in again from about a million logits on: there its time doubles.
FROM = {
    # A row shorter than a vector register takes PyTorch's softmax ten times as long.
    "few": (1 << 15, 1 << 15),
    "short": (1 << 20, 1 << 21),
    "long": (1 << 20, 3 << 20),
    "strided": (1 << 21, 1 << 21),
    # Of many strided classes the blocks are parts of an image, which are copied.
    "strided long": (1 << 21, 1 << 23),
}
FEW, SHORT = 16, 64  # below so many classes they are few, or a row is short
DENSE = 1 << 21  # with probabilities blocks take as many operators as PyTorch: not below this


def takes(input, target):
    """Whether PyTorch's own is faster for these logits on the CPU; the arguments need not be valid."""
    size = input.numel()
    if size < FROM["few"][0]:
        return True
    if input.layout is not torch.strided:
        return False
    gradient = torch.is_grad_enabled() and input.requires_grad
    dense = isinstance(target, torch.Tensor) and target.is_floating_point()
    return size < least_for_blocks(input.shape, input.stride(), input.dtype, gradient, dense)


def least_for_blocks(shape, stride, dtype, gradient, dense):
    """From how many logits of this kind on blocks are faster, the target class indices or, if `dense`, probabilities."""
    axis = class_axis(shape)
    kind = kind_of(shape[axis], stride[axis])
    if not gradient and kind != "few":
        return MAPPED // dtype.itemsize
    least = FROM[kind][dtype.itemsize == 2]
    return max(least, DENSE) if dense and kind != "few" else least


def kind_of(classes, class_stride):
    if class_stride != 1:
        return "strided" if classes < SHORT else "strided long"
    return "few" if classes < FEW else "short" if classes < SHORT else "long"


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
