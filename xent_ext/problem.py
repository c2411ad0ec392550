"""What a call asks for, once its arguments are checked: the part that is not tensors."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """The options of one loss, validated and with PyTorch's defaults filled in."""

    probabilities: bool  # targets are class probabilities
    reduction: str  # "none", "mean" or "sum"
    ignore_index: int
    label_smoothing: float  # in [0, 1]
    dtype: torch.dtype  # of the loss
