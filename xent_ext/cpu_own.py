"""PyTorch's own loss on a CPU: which calls it takes, and how it is right in half precision.

PyTorch's own is a few operators over all logits, this package's are many over blocks of them. So PyTorch's is the
faster one for few logits, and without a gradient as long as the memory of its log-probabilities is not mapped anew.
"""

import torch

from .layout import class_axis
from .memory import MAPPED
from .reference import result_dtype

# --- In half precision

HALF = (torch.float16, torch.bfloat16)
NONE, MEAN, SUM = (torch.nn._reduction.get_enum(name) for name in ("none", "mean", "sum"))
# PyTorch's mean of four rows is no further from float64 than 0.6 epsilons, where one rounding is 0.5; of 8 it is 1.0.
FEW_ROWS = 4
# Of fewer classes PyTorch's softmax takes up to ten times as long in half precision as in float32 and casts.
FEW_CLASSES = 64


def cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing):
    """`torch._C._nn.cross_entropy_loss`, but that it sums in float32 what is in half precision.

    PyTorch's adds up row losses in half precision, and counts the rows in it: of 65505 rows in float16 the mean is NaN,
    and its gradient 0. Smoothing adds up all classes in it, too.
    """
    function = torch._C._nn.cross_entropy_loss
    if input.dtype not in HALF or torch.is_autocast_enabled("cpu"):
        return function(input, target, weight, reduction, ignore_index, label_smoothing)
    classes = input.shape[class_axis(input.shape)]
    dense = label_smoothing > 0 or target.is_floating_point()
    if not dense and (input.numel() <= FEW_ROWS * classes or (reduction == NONE and classes >= FEW_CLASSES)):
        return function(input, target, weight, reduction, ignore_index, label_smoothing)
    if dense or classes < FEW_CLASSES:
        return widened(input, target, weight, reduction, ignore_index, label_smoothing)
    losses = function(input, target, weight, NONE, ignore_index, label_smoothing)
    if reduction == SUM:
        return losses.sum()  # which PyTorch adds up in float32
    counted = target.long() != ignore_index
    if weight is None and counted.all():
        return losses.mean()  # and this as well
    normalizer = counted.sum() if weight is None else weight.float()[target.long()[counted]].sum()
    return (losses.sum(dtype=torch.float32) / normalizer).to(losses.dtype)


def widened(input, target, weight, reduction, ignore_index, label_smoothing):
    """The loss of half precision, computed in float32 and rounded once. Also in graphs and under `torch.func`."""
    dtype = result_dtype(input, target, weight)
    if target.dtype in HALF:
        target = target.float()
    if weight is not None and (weight.dtype == input.dtype or target.is_floating_point()):  # else PyTorch raises
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return torch._C._nn.cross_entropy_loss(input.float(), target, weight, reduction, ignore_index, label_smoothing).to(
        dtype
    )
