"""Fused softmax cross-entropy for PyTorch."""

from .functional import cross_entropy
from .modules import CrossEntropyLoss

__version__ = "0.1.0"

__all__ = ["CrossEntropyLoss", "cross_entropy"]
