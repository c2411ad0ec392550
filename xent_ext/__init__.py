"""Fused softmax cross-entropy for PyTorch: a drop-in for torch.nn.CrossEntropyLoss.

functional, modules    the public functions, and the modules
integrate, deferred    the loss under `F.cross_entropy`; models of Transformers without logits: `patch_lm_head`, and the
                       tensor that stands for logits
explain                why a call runs as it does
dispatch, backends     who takes a call; what the environment asks for
call, checks, problem  a call's arguments, checked, and what they ask for
autograd, ops          what is saved, and what backward returns; the operators in compiled graphs
gradients              what both make gradients of
expectation, ahead     for which upstream gradient, and how many, gradients are made ahead
linear, linear_call, linear_autograd
                       the last layer with its loss: in chunks; a call, checked; autograd's Function, and operators
parallel, summary, agreement
                       classes on several devices: one all-gather; what is sent of a row; whether the ranks' calls fit
sharded, sharded_layer shards of the batch and of the classes, as `DTensor`: of the logits, and of the last layer
reference              the specification, in plain PyTorch
cpu, cpu_plain, cpu_options, cpu_slices
                       the CPU implementation: its rows; PyTorch's options; options for training; slices of the classes
cpu_own, memory        what PyTorch's own takes on a CPU, in float32; memory on a CPU
plan, tuning, layout   launch numbers, and those of a file; tensors as (outer, inner, class)
kernels                the Triton kernels: the folder kernels/ of a checkout

README.md in this folder is the guide: options, recipes, how it works.
"""

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
