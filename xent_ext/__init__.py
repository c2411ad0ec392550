"""Fused softmax cross-entropy for PyTorch: a drop-in for torch.nn.CrossEntropyLoss."""

from .explain import Explanation, explain, explain_linear
from .functional import cross_entropy, linear_cross_entropy
from .integrate import install, installed, uninstall
from .modules import CrossEntropyLoss, LinearCrossEntropyLoss
from .problem import CrossEntropyStats

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "Explanation",
    "LinearCrossEntropyLoss",
    "cross_entropy",
    "explain",
    "explain_linear",
    "install",
    "installed",
    "linear_cross_entropy",
    "uninstall",
]
