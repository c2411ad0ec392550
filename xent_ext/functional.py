"""The public functions: arguments, defaults, docstrings."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn._reduction import get_enum
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic

from . import autograd, checks, cpu_own, dispatch, ops, reference
from .layout import batch_shape
from .problem import CrossEntropyStats, Problem, Tensors

# Kept here, so that what stands under this name later does not matter.
_torch_cross_entropy = F.cross_entropy
_REDUCTIONS = {name: get_enum(name) for name in ("none", "mean", "sum")}


class Options(NamedTuple):
    """The options for training, as they are given."""

    dtype: torch.dtype | None = None
    logit_scale: float | torch.Tensor = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    sample_weight: torch.Tensor | None = None
    normalizer: float | torch.Tensor | None = None
    on_all_ignored: str = "nan"
    inplace: bool = False
    return_stats: bool | Sequence[str] = False
    shift: bool = False

    @classmethod
    def that_differ(cls, **options):
        """Those of the options that are not what they are by default, as a dictionary."""
        defaults = cls._field_defaults
        return {
            name: value
            for name, value in options.items()
            if name not in defaults or isinstance(value, torch.Tensor) or value != defaults[name]
        }


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
    logit_scale: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sample_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    on_all_ignored: str = "nan",
    inplace: bool = False,
    return_stats: bool | Sequence[str] = False,
    shift: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]:
    r"""`torch.nn.functional.cross_entropy`, with the gradient made while the logits are read for the loss.

    For a row with logits x, target mass b and log-probabilities :math:`\log p = \operatorname{log\_softmax}(z)`, where
    z is x without options for training, the loss is :math:`-\sum_c b_c \log p_c`; `xent_ext.reference` gives b for each
    kind of target and option.

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

    Options for training, all by keyword:
        dtype: compute and return the loss as if the logits had been cast to this dtype, at least as wide as theirs.
            The gradient has the logits' own dtype.
        logit_scale: s in z = s x, an inverse temperature (Hinton et al., 2015): a number, or a 0-dim tensor, which may
            require a gradient (CLIP; Radford et al., 2021).
        softcap: k > 0 in z = k tanh(s x / k) (Gemma 2; Gemma Team, 2024).
        z_loss: each row that is not ignored has z_loss * lse^2 more, where lse = log sum_c exp z_c (PaLM; Chowdhery et
            al., 2022). Reduced as the loss is.
        sample_weight: a factor f for each row's loss, z-loss included, of any real dtype; in the shape of `target` (of
            its batch, for probabilities). "mean" divides by the sum of f times the targets' weights over the rows not
            ignored (for probabilities: by the sum of f). May require a gradient.
        normalizer: what "mean" divides by in place of that: a number or a 0-dim tensor, which stays on the device, such
            as the number of targets in all the batches of an accumulated gradient. No gradient flows to it.
        on_all_ignored: "nan", or "zero": a loss and gradient of 0 where "mean" would divide by 0, as it does where all
            rows are ignored.
        inplace: the gradient takes the memory of the logits, where they require one. What autograd saved of the logits
            before, and whatever uses them later (or what they are a view of), then raises RuntimeError in backward, as
            do a second backward, `create_graph=True` and a gradient of a statistic. An upstream gradient other than the
            expected one (see README) multiplies the gradient that was stored, in the logits' dtype: one rounding more,
            and in float16 what underflowed stays 0. Compiled graphs, and calls that take the plain formula
            (see `explain`), keep the logits.
        return_stats: True, or names of `CrossEntropyStats`: return (loss, stats), from the same pass. Gradients flow
            through `logprob`, `lse` and `entropy`; the backward that has any makes the gradient from the logits again.
        shift: for causal language models: logits (B, T, V) and target (B, T), or probabilities (B, T, V), not shifted:
            position t predicts target t + 1. The loss and the statistics have rows (B, T - 1); `sample_weight` (B, T)
            goes with the target, so that its first column is not used. The logits are not copied, and the gradient of
            their last position is 0.

    Returns:
        The loss, of the input's dtype (for probabilities: promoted with the target's and weight's; under
        autocast: float32; `dtype` stands for the input's). With `return_stats` a pair of that and a
        `CrossEntropyStats`.

    Raises:
        What PyTorch raises for the same arguments, by type, with messages that name the argument. A class index
        out of range raises IndexError on a CPU; on a GPU the row's loss and gradient are NaN, unless
        XENT_EXT_CHECK=1 asks for the IndexError there too, at the price of a synchronisation.

    Where the logits are saved for backward, changing them in place before it raises RuntimeError.

    Logits that are a `DTensor`, replicated or sharded on the batch, have a loss and gradients that are; each shard is
    computed where it is. The other tensors must be of the same mesh, in any placement. "mean" divides by the normaliser
    of all shards, for which one number is reduced over them. Logits in another placement, such as sharded on the
    classes, raise NotImplementedError.
    """
    if (  # written out: few logits take few microseconds
        dtype is softcap is sample_weight is normalizer is None
        and inplace is return_stats is shift is False
        and type(logit_scale) is type(z_loss) is float
        and logit_scale == 1.0
        and z_loss == 0.0
        and on_all_ignored == "nan"
    ):
        options = None
    else:
        options = Options(
            dtype, logit_scale, softcap, z_loss, sample_weight, normalizer, on_all_ignored, inplace, return_stats, shift
        )
    return fused(None, options, input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


# TorchScript, which knows neither arguments by keyword alone nor autograd functions, compiles this in its place.
cross_entropy.__prepare_scriptable__ = lambda: _torch_cross_entropy


def fused(owner, options, input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing):
    """`cross_entropy`, for the module `owner` or for none, with `Options` or None."""
    arguments = (input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    if not dispatch.RECENT and torch.compiler.is_compiling():
        return pytorch(*arguments) if options is None else outside_graphs(owner, options, *arguments)
    if dispatch.is_distributed(input) and dispatch.BACKEND != "torch":
        from . import sharded  # which imports torch.distributed.tensor

        return sharded.cross_entropy(owner, options, *arguments)
    if options is not None:
        return with_options(owner, options, *arguments)
    if torch.compiler.is_compiling():
        if any(isinstance(tensor, torch.Tensor) and dispatch.has_unknown_size(tensor) for tensor in (input, target)):
            return pytorch(*arguments)
        name, _, problem, tensors = prepare(None, *arguments)
        return pytorch(*arguments) if name == "torch" else ops.loss(problem, tensors)[0]
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(cross_entropy, (input, target, weight), *arguments)
    if dispatch.is_small(input, target, reduction):
        try:
            if size_average is reduce is None and reduction in _REDUCTIONS:
                # All that F.cross_entropy does, without another call: few logits take few microseconds.
                return cpu_own.cross_entropy(
                    input, target, weight, _REDUCTIONS[reduction], ignore_index, label_smoothing
                )
            return pytorch(*arguments)
        except Exception:
            prepare(None, *arguments, check_values=True)  # raises the same, said more clearly
            raise
    name, problem = checked(*arguments)
    if name == "torch":
        return pytorch(*arguments)
    return run(owner, name, problem, Tensors(input, target, weight))[0]


def pytorch(*arguments):
    """F.cross_entropy as it was when this was imported; on a CPU with sums of half precision in float32."""
    if dispatch.BACKEND == "torch":
        return _torch_cross_entropy(*arguments)
    return cpu_own.pytorch(_torch_cross_entropy, *arguments)


# Breaks a graph that can't have it, which goes on after it.
outside_graphs = fused if dispatch.RECENT else torch.compiler.disable(fused)


def with_options(owner, options, *arguments):
    """`fused`, where some option for training is given."""
    relevant = (*arguments[:3], options.sample_weight, options.normalizer, options.logit_scale)
    if has_torch_function(relevant):
        return handle_torch_function(cross_entropy, relevant, *arguments, **options._asdict())
    name, _, problem, tensors = prepare(options, *arguments)
    if torch.compiler.is_compiling():
        loss, stats = (reference.compute if name == "plain" else ops.loss)(problem, tensors)
    else:
        try:
            loss, stats = reference.compute(problem, tensors) if name == "plain" else run(owner, name, problem, tensors)
        except Exception:
            prepare(options, *arguments, check_values=True)  # the plain formula does not say which class index is wrong
            raise
    if not options.return_stats:
        return loss
    return loss, statistics(options.return_stats, problem, tensors.target, dict(zip(problem.stats, stats, strict=True)))


def run(owner, name, problem, tensors):
    """The loss, and a tuple of `problem.stats`, by the implementation `name`."""
    expectation = autograd.expectation(owner, problem, tensors.input.device)
    return autograd.apply(dispatch.implementation(name), problem, tensors, expectation)


def statistics(names, problem, target, found):
    """`CrossEntropyStats` with those that are asked for, of those found by row."""
    names = checks.stat_names(names)
    if "accuracy" in names:
        correct = found["correct"]
        counted = correct.numel() if problem.probabilities else (target.long() != problem.ignore_index).sum()
        found["accuracy"] = correct.sum() / counted
    return CrossEntropyStats(**{name: found[name] for name in names})


def checked(*arguments):
    """The name of a call's implementation, and its Problem. Calls without options that are alike are checked once."""
    key = signature(*arguments)
    if key not in _checked:
        name, _, problem, _ = prepare(None, *arguments)
        if key is None:
            return name, problem
        if len(_checked) >= _MOST_CHECKED:
            _checked.clear()
        _checked[key] = name, problem
    return _checked[key]


_checked = {}  # by signature
_MOST_CHECKED = 1024


def signature(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing):
    """All that the outcome of `prepare` depends on, or None for calls where it would be too much."""
    tensors = (input, target) if weight is None else (input, target, weight)
    if (
        not size_average is reduce is None
        or not (type(reduction) is str and type(ignore_index) is int and type(label_smoothing) is float)
        or any(type(tensor) not in dispatch.PLAIN for tensor in tensors)
        or dispatch.CHECK
        or dispatch.unsupported_here()
    ):
        return None
    return (
        reduction, ignore_index, label_smoothing,
        dispatch.BACKEND, torch.is_grad_enabled(), dispatch.is_autocast(input),
        *[(t.shape, t.dtype, t.device, t.layout, t.requires_grad, t.is_neg()) for t in tensors],
    )  # fmt: skip


def prepare(options, *arguments, check_values=False):
    """Check a call's arguments; return the name of its implementation, the reason for it, Problem and Tensors."""
    problem, tensors = describe(options, *arguments)
    name, reason = dispatch.route(tensors, problem.reduction, options is not None)
    check_values = check_values or (dispatch.CHECK and name != "torch" and not torch.compiler.is_compiling())
    if check_values:
        checks.bad_class(problem, tensors)
    return name, reason, problem, tensors


def describe(options, input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing):
    """Check a call's arguments, and return what it asks for as Problem and Tensors."""
    reduction = checks.reduction_name(size_average, reduce, reduction)
    ignore_index = checks.integer_ignore_index(ignore_index)
    label_smoothing = checks.smoothing_value(label_smoothing)
    if options is not None:
        checks.check_options(options, reduction)
    autocast = isinstance(input, torch.Tensor) and dispatch.is_autocast(input)
    dtype, seen, sample_weight = None, input, None
    if options is not None:
        dtype, sample_weight = options.dtype, options.sample_weight
        if options.shift:
            checks.check_shift(input, target, sample_weight)
            seen, target, sample_weight = shifted(input, target, sample_weight)
    checks.check_tensors(seen, target, weight, ignore_index, label_smoothing, autocast=autocast, dtype=dtype)
    problem = Problem(
        probabilities=seen.shape == target.shape,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        dtype=reference.result_dtype(seen, target, weight, autocast, dtype),
    )
    tensors = Tensors(input, target, weight)
    if options is None:
        return problem, tensors
    checks.check_option_tensors(options, input, seen, target, sample_weight)
    return with_options_filled_in(problem, tensors, options, batch_shape(seen.shape), sample_weight)


def shifted(input, target, sample_weight):
    """The logits of all positions but the last, (B, C, T - 1), with what belongs to the position after each."""
    target = target[:, 1:]
    if target.dim() == input.dim():
        target = target.transpose(1, 2)
    return input[:, :-1].transpose(1, 2), target, None if sample_weight is None else sample_weight[:, 1:]


def with_options_filled_in(problem, tensors, options, batch, sample_weight):
    acc, device = reference.accumulation_dtype(problem.dtype), tensors.input.device
    scale, normalizer = options.logit_scale, options.normalizer
    scale_is_tensor = isinstance(scale, torch.Tensor)
    if normalizer is not None and not isinstance(normalizer, torch.Tensor):
        normalizer = ops.scalar(normalizer, acc, device)
    names = checks.stat_names(options.return_stats)
    problem = dataclasses.replace(
        problem,
        logit_scale=1.0 if scale_is_tensor else float(scale),
        softcap=None if options.softcap is None else float(options.softcap),
        z_loss=float(options.z_loss),
        on_all_ignored=options.on_all_ignored,
        shift=options.shift,
        inplace=options.inplace,
        stats=tuple(name for name in reference.STATS if name in names or (name == "correct" and "accuracy" in names)),
    )
    tensors = tensors._replace(
        sample_weight=None if sample_weight is None else sample_weight.reshape(batch).to(acc),
        normalizer=None if normalizer is None else normalizer.to(acc),
        logit_scale=scale.to(acc) if scale_is_tensor else None,
    )
    return problem, tensors
