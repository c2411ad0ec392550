"""Fused softmax cross-entropy for PyTorch: a drop-in for torch.nn.CrossEntropyLoss."""

from pathlib import Path

from .deferred import LmHeadPatch, patch_lm_head
from .explain import Explanation, explain, explain_linear
from .functional import cross_entropy, linear_cross_entropy
from .integrate import install, installed, uninstall
from .modules import CrossEntropyLoss, LinearCrossEntropyLoss
from .problem import CrossEntropyStats

# In a checkout, which may be imported as it is, the folder of the kernels lies beside this one.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[1]))

__version__ = "0.2.0"

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "Explanation",
    "LinearCrossEntropyLoss",
    "LmHeadPatch",
    "cross_entropy",
    "explain",
    "explain_linear",
    "install",
    "installed",
    "linear_cross_entropy",
    "patch_lm_head",
    "uninstall",
]
