"""A call as it comes, `Arguments` and `Options`, and what it asks for, checked: `Problem` and `Tensors`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import checks, parallel, reference
from .layout import batch_shape, class_axis, of_classes
from .problem import CrossEntropyStats, Problem, Tensors, scalar


class Arguments(NamedTuple):
    """What `torch.nn.functional.cross_entropy` takes, in its order."""

    input: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None = None
    size_average: bool | None = None
    ignore_index: int = -100
    reduce: bool | None = None
    reduction: str = "mean"
    label_smoothing: float = 0.0


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
    process_group: Any = None  # a torch.distributed.ProcessGroup
    class_start: int | None = None
    num_classes: int | None = None

    @classmethod
    def that_differ(cls, **options):
        """Those of the options that are not what they are by default, as a dictionary."""
        defaults = cls._field_defaults
        return {
            name: value
            for name, value in options.items()
            if name not in defaults or isinstance(value, torch.Tensor) or value != defaults[name]
        }


def prepare(arguments, options):
    """Check a call, and return what it asks for as Problem and Tensors."""
    problem = problem_of(arguments, options)
    return problem, tensors_of(problem, arguments, options)


def problem_of(arguments, options):
    """What a call asks for, once all of it is checked that PyTorch would check, but for the values of its tensors."""
    input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing = arguments
    reduction = checks.reduction_name(size_average, reduce, reduction)
    ignore_index = checks.integer_ignore_index(ignore_index)
    label_smoothing = checks.smoothing_value(label_smoothing)
    dtype, sample_weight, seen, is_slice = None, None, input, False
    if options is not None:
        checks.check_options(options, reduction)
        dtype, sample_weight, is_slice = options.dtype, options.sample_weight, options.process_group is not None
        if options.shift:
            checks.check_shift(input, target, sample_weight)
            seen, target, sample_weight = shifted(input, target, sample_weight)
    autocast = isinstance(input, torch.Tensor) and is_autocast(input)
    checks.check_tensors(
        seen, target, weight, ignore_index, label_smoothing, autocast=autocast, dtype=dtype, is_slice=is_slice
    )
    if options is not None:
        checks.check_option_tensors(options, input, seen, target, sample_weight)
    problem = Problem(
        probabilities=seen.shape == target.shape,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        dtype=reference.result_dtype(seen, target, weight, autocast, dtype),
    )
    return problem if options is None else with_options(problem, options, seen.shape[class_axis(seen.shape)])


def with_options(problem, options, columns):
    there = (
        {} if options.process_group is options.num_classes is None else parallel.slice_of(options, columns)._asdict()
    )
    return dataclasses.replace(
        problem,
        **there,
        logit_scale=1.0 if isinstance(options.logit_scale, torch.Tensor) else float(options.logit_scale),
        softcap=None if options.softcap is None else float(options.softcap),
        z_loss=float(options.z_loss),
        on_all_ignored=options.on_all_ignored,
        shift=options.shift,
        inplace=options.inplace,
        stats=stats_by_row(options.return_stats),
    )


def stats_by_row(return_stats):
    """The statistics of rows that are needed for those that are asked for."""
    names = checks.stat_names(return_stats)
    return tuple(name for name in reference.STATS if name in names or (name == "correct" and "accuracy" in names))


def tensors_of(problem, arguments, options):
    """The tensors of a call that was checked."""
    input, target, weight, *_ = arguments
    if options is None:
        return Tensors(input, target, weight)
    acc, device = reference.accumulation_dtype(problem.dtype), input.device
    sample_weight, normalizer, scale = options.sample_weight, options.normalizer, options.logit_scale
    shape = input.shape
    if problem.shift:
        seen, target, sample_weight = shifted(input, target, sample_weight)
        shape = seen.shape
    if problem.num_classes:
        target = of_classes(problem, target) if problem.probabilities else target
        weight = None if weight is None else of_classes(problem, weight)
    if sample_weight is not None:
        sample_weight = sample_weight.reshape(batch_shape(shape)).to(acc)
    if normalizer is not None:
        is_tensor = isinstance(normalizer, torch.Tensor)
        normalizer = normalizer.to(acc) if is_tensor else scalar(normalizer, acc, device)
    scale = scale.to(acc) if isinstance(scale, torch.Tensor) else None
    return Tensors(input, target, weight, sample_weight, normalizer, scale)


def shifted(input, target, sample_weight):
    """The logits of all positions but the last, (B, C, T - 1), with what belongs to the position after each."""
    target = target[:, 1:]
    if target.dim() == input.dim():
        target = target.transpose(1, 2)
    return input[:, :-1].transpose(1, 2), target, None if sample_weight is None else sample_weight[:, 1:]


def is_autocast(input):
    device = input.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def statistics(names, problem, target, found):
    """`CrossEntropyStats` with those that are asked for, of those found by row."""
    names = checks.stat_names(names)
    if "accuracy" in names:
        correct = found["correct"]
        counted = correct.numel() if problem.probabilities else (target.long() != problem.ignore_index).sum()
        found["accuracy"] = correct.sum() / counted
    return CrossEntropyStats(**{name: found[name] for name in names})
