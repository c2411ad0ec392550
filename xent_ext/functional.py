"""The public functions: arguments, defaults, docstrings."""

import torch
import torch.nn.functional as F
from torch.nn._reduction import get_enum
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import autograd, checks, dispatch, reference
from .layout import class_axis
from .problem import Problem

# Kept here, so that what stands under this name later does not matter.
_torch_cross_entropy = F.cross_entropy
_REDUCTIONS = {name: get_enum(name) for name in ("none", "mean", "sum")}


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    r"""`torch.nn.functional.cross_entropy`, with the gradient made while the logits are read for the loss.

    For a row with logits x, target mass b and log-probabilities :math:`\log p = \operatorname{log\_softmax}(x)`
    the loss is :math:`-\sum_c b_c \log p_c`; `xent_ext.reference` gives b for each kind of target and option.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, ..., dk); float16, bfloat16, float32 or float64; any
            strides. Only logits whose batch dimensions merge to more than two strided ones are copied.
        target: class indices in [0, C), int64 (or uint8 for (C) and (N, C)), of shape (), (N) or
            (N, d1, ..., dk); or class probabilities, floating point, of the input's shape.
        weight: (C), a factor for each class, of the input's dtype (for probabilities: any floating dtype).
        size_average, reduce: deprecated, as in PyTorch; they override `reduction`.
        ignore_index: rows with this target have loss 0 and gradient 0, and their logits are not read.
        reduction: "none": one loss for each row, in the shape of the batch; "sum": their sum; "mean": that
            over the sum of the targets' weights of the rows not ignored (for probabilities: the number of
            rows).
        label_smoothing: eps in [0, 1]: this share of each target is spread evenly over the classes.

    Returns:
        The loss, of the input's dtype (for probabilities: promoted with the target's and weight's; under
        autocast: float32).

    Raises:
        What PyTorch raises for the same arguments, by type, with messages that name the argument. A class index
        out of range raises IndexError on a CPU; on a GPU the row's loss and gradient are NaN, unless
        XENT_EXT_CHECK=1 asks for the IndexError there too, at the price of a synchronisation.

    Where the logits are saved for backward, changing them in place before it raises RuntimeError.
    """
    return fused(None, input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def fused(owner, input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing):
    """`cross_entropy`, for the module `owner` or for none."""
    arguments = (input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    if torch.compiler.is_compiling():
        return _torch_cross_entropy(*arguments)
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(cross_entropy, (input, target, weight), *arguments)
    if dispatch.is_small(input):
        try:
            if size_average is reduce is None and reduction in _REDUCTIONS:
                # All that F.cross_entropy does, without another call: few logits take few microseconds.
                return torch._C._nn.cross_entropy_loss(
                    input, target, weight, _REDUCTIONS[reduction], ignore_index, label_smoothing
                )
            return _torch_cross_entropy(*arguments)
        except Exception:
            prepare(*arguments, check_values=True)  # raises the same, said more clearly
            raise
    name, _, problem = prepare(*arguments)
    if name == "torch":
        return _torch_cross_entropy(*arguments)
    expectation = autograd.expectation(owner, problem, input.device)
    return autograd.apply(dispatch.implementation(name), problem, input, target, weight, expectation)


def prepare(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, check_values=False):
    """Check a call's arguments; return the name of its implementation, the reason for it, and its Problem."""
    reduction = checks.reduction_name(size_average, reduce, reduction)
    ignore_index = checks.integer_ignore_index(ignore_index)
    label_smoothing = checks.smoothing_value(label_smoothing)
    autocast = isinstance(input, torch.Tensor) and dispatch.is_autocast(input)
    checks.check_tensors(input, target, weight, ignore_index, label_smoothing, autocast=autocast)
    problem = Problem(
        probabilities=input.shape == target.shape,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        dtype=reference.result_dtype(input, target, weight, autocast),
    )
    name, reason = dispatch.route(input, target, weight)
    if not problem.probabilities and (check_values or (dispatch.CHECK and name != "torch")):
        checks.bad_target(target, input.shape[class_axis(input.shape)], ignore_index)
    return name, reason, problem
