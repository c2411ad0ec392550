"""The public functions: arguments, defaults, docstrings."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import dispatch, linear_call
from .call import Arguments, Options
from .linear_call import LinearArguments
from .problem import CrossEntropyStats


# What a call returns hangs on `return_stats`, and so its type does. A bool that no type checker knows gives either.
# fmt: off
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = ..., size_average: bool | None = ...,
    ignore_index: int = ..., reduce: bool | None = ..., reduction: str = ..., label_smoothing: float = ..., *,
    dtype: torch.dtype | None = ..., logit_scale: float | Tensor = ..., softcap: float | None = ...,
    z_loss: float = ..., sample_weight: Tensor | None = ..., normalizer: float | Tensor | None = ...,
    on_all_ignored: str = ..., inplace: bool = ..., return_stats: Literal[False] = ..., shift: bool = ...,
    process_group: Any = ..., class_start: int | None = ..., num_classes: int | None = ...,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = ..., size_average: bool | None = ...,
    ignore_index: int = ..., reduce: bool | None = ..., reduction: str = ..., label_smoothing: float = ..., *,
    dtype: torch.dtype | None = ..., logit_scale: float | Tensor = ..., softcap: float | None = ...,
    z_loss: float = ..., sample_weight: Tensor | None = ..., normalizer: float | Tensor | None = ...,
    on_all_ignored: str = ..., inplace: bool = ..., return_stats: Literal[True] | Sequence[str], shift: bool = ...,
    process_group: Any = ..., class_start: int | None = ..., num_classes: int | None = ...,
) -> tuple[Tensor, CrossEntropyStats]: ...
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = ..., size_average: bool | None = ...,
    ignore_index: int = ..., reduce: bool | None = ..., reduction: str = ..., label_smoothing: float = ..., *,
    dtype: torch.dtype | None = ..., logit_scale: float | Tensor = ..., softcap: float | None = ...,
    z_loss: float = ..., sample_weight: Tensor | None = ..., normalizer: float | Tensor | None = ...,
    on_all_ignored: str = ..., inplace: bool = ..., return_stats: bool | Sequence[str], shift: bool = ...,
    process_group: Any = ..., class_start: int | None = ..., num_classes: int | None = ...,
) -> Tensor | tuple[Tensor, CrossEntropyStats]: ...
# fmt: on
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    on_all_ignored: str = "nan",
    inplace: bool = False,
    return_stats: bool | Sequence[str] = False,
    shift: bool = False,
    process_group: Any = None,
    class_start: int | None = None,
    num_classes: int | None = None,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
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
        inplace: the gradient takes the memory of the logits, where they require one. Logits that autograd lets nobody
            change, or whose gradient `retain_grad()` wants, raise RuntimeError at once. What autograd saved of them
            before, and whatever uses them later (or what they are a view of), then raises RuntimeError in backward, as
            do a second backward, `create_graph=True` and a gradient of a statistic. An upstream gradient other than the
            expected one (see `xent_ext.autograd`) multiplies the gradient that was stored, in the logits' dtype: one
            rounding more, and in float16 what underflowed stays 0. Compiled graphs, and calls that take the plain
            formula (see `explain`), keep the logits.
        return_stats: True, or a sequence of names of `CrossEntropyStats`: return (loss, stats), from the same pass.
            Gradients flow through `logprob`, `lse` and `entropy`; the backward that has any makes the gradient from the
            logits again.
        shift: for causal language models: logits (B, T, V) and target (B, T), or probabilities (B, T, V), not shifted:
            position t predicts target t + 1. The loss and the statistics have rows (B, T - 1); `sample_weight` (B, T)
            goes with the target, so that its first column is not used. The logits are not copied, and the gradient of
            their last position is 0.
        num_classes: how many classes there are where the input has more columns, such as 50257 of 50304. Columns from
            there on are padding: they take no part, and their gradient is 0. `weight` and probabilities have the
            columns of the input.
        process_group: a `torch.distributed.ProcessGroup` whose ranks share the classes. `input` is then this rank's
            slice of them, as are `weight` and a target of probabilities; all else is the same on every rank, a class
            index stands for one of all classes, and every rank calls this at once. The loss and the statistics are
            equal on all ranks to the bit, and the gradient is that of this rank's slice, without a collective in
            backward. Each rank's gradient of `logit_scale` is the share of its slice, to be added up.
        class_start: which class the first column of this rank's slice is, for slices of any sizes, empty ones too; then
            `num_classes` is that of all ranks. Without it they are of equal size, in the order of the ranks.

    Returns:
        The loss, of the input's dtype (for probabilities: promoted with the target's and weight's; under
        autocast: float32; `dtype` stands for the input's). With `return_stats` a pair of that and a
        `CrossEntropyStats`.

    Raises:
        What PyTorch raises for the same arguments, by type, with messages that name the argument. A class index
        out of range raises IndexError on a CPU; on a GPU the row's loss and gradient are NaN, unless
        XENT_EXT_CHECK=1 asks for the IndexError there too, at the price of a synchronisation.

    Where the logits are saved for backward, changing them in place before it raises RuntimeError.

    Logits that are a `DTensor`, replicated, sharded on the batch or, on one dimension of the mesh, on the classes, have
    a loss and gradients that are; each shard is computed where it is. The other tensors must be of the same mesh, in
    any placement; without shards of the batch they may be plain, and the same everywhere. "mean" divides by the
    normaliser of all shards of the batch, for which one number is reduced over them. Logits in another placement raise
    NotImplementedError.
    """
    if (  # written out: few logits take few microseconds
        dtype is softcap is sample_weight is normalizer is None
        and process_group is class_start is num_classes is None
        and inplace is return_stats is shift is False
        and type(logit_scale) is type(z_loss) is float
        and logit_scale == 1.0
        and z_loss == 0.0
        and on_all_ignored == "nan"
    ):
        options = None
        small = dispatch.small(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        if small is not None:
            return small
    else:
        options = Options(
            dtype, logit_scale, softcap, z_loss, sample_weight, normalizer, on_all_ignored, inplace, return_stats,
            shift, process_group, class_start, num_classes,
        )  # fmt: skip
    arguments = Arguments(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    if is_overridden(arguments, options):
        return overridden(arguments, options)
    return dispatch.general(None, arguments, options)


# TorchScript, which knows neither arguments by keyword alone nor autograd functions, compiles this in its place.
cross_entropy.__prepare_scriptable__ = lambda: dispatch.torch_cross_entropy  # type: ignore[attr-defined]


def is_overridden(arguments, options):
    """Whether `__torch_function__` of one of the tensors, or a mode, is to be asked."""
    tensors = arguments.input, arguments.target, arguments.weight  # no slice, which PyTorch 2.8 can't trace
    if options is not None:
        return has_torch_function((*tensors, options.sample_weight, options.normalizer, options.logit_scale))
    return has_torch_function(tensors) and not torch.compiler.is_compiling()


def overridden(arguments, options):
    """What that gives."""
    tensors, options = (
        (arguments.input, arguments.target, arguments.weight),
        {} if options is None else options._asdict(),
    )
    return handle_torch_function(cross_entropy, (*tensors, *options.values()), *arguments, **options)


# fmt: off
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    weight: Tensor | None = ..., reduction: str = ..., ignore_index: int | None = ..., label_smoothing: float = ...,
    options: Any = ..., dtype: torch.dtype | None = ..., logit_scale: float | Tensor = ...,
    softcap: float | None = ..., z_loss: float = ..., sample_weight: Tensor | None = ...,
    normalizer: float | Tensor | None = ..., on_all_ignored: str = ..., return_stats: Literal[False] = ...,
    shift: bool = ..., chunk_rows: int | None = ..., accumulate_dtype: torch.dtype | None = ...,
    max_counted_rows: int | None = ..., process_group: Any = ..., class_start: int | None = ...,
    num_classes: int | None = ...,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    weight: Tensor | None = ..., reduction: str = ..., ignore_index: int | None = ..., label_smoothing: float = ...,
    options: Any = ..., dtype: torch.dtype | None = ..., logit_scale: float | Tensor = ...,
    softcap: float | None = ..., z_loss: float = ..., sample_weight: Tensor | None = ...,
    normalizer: float | Tensor | None = ..., on_all_ignored: str = ..., return_stats: Literal[True] | Sequence[str],
    shift: bool = ..., chunk_rows: int | None = ..., accumulate_dtype: torch.dtype | None = ...,
    max_counted_rows: int | None = ..., process_group: Any = ..., class_start: int | None = ...,
    num_classes: int | None = ...,
) -> tuple[Tensor, CrossEntropyStats]: ...
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    weight: Tensor | None = ..., reduction: str = ..., ignore_index: int | None = ..., label_smoothing: float = ...,
    options: Any = ..., dtype: torch.dtype | None = ..., logit_scale: float | Tensor = ...,
    softcap: float | None = ..., z_loss: float = ..., sample_weight: Tensor | None = ...,
    normalizer: float | Tensor | None = ..., on_all_ignored: str = ..., return_stats: bool | Sequence[str],
    shift: bool = ..., chunk_rows: int | None = ..., accumulate_dtype: torch.dtype | None = ...,
    max_counted_rows: int | None = ..., process_group: Any = ..., class_start: int | None = ...,
    num_classes: int | None = ...,
) -> Tensor | tuple[Tensor, CrossEntropyStats]: ...
# fmt: on
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    options: Any = None,
    dtype: torch.dtype | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    on_all_ignored: str = "nan",
    return_stats: bool | Sequence[str] = False,
    shift: bool = False,
    chunk_rows: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
    max_counted_rows: int | None = None,
    process_group: Any = None,
    class_start: int | None = None,
    num_classes: int | None = None,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    r"""`cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)`, without the logits of all rows.

    The logits are made, and their gradient is multiplied, for some rows at a time in one buffer. Loss and gradients are
    those of the two functions, but that the loss of half precision is float32, as it is computed, and that a row which
    is ignored takes no part, whatever its input holds.

    Args:
        input: (D) or (*, D), with any number of leading dimensions; float16, bfloat16, float32 or float64.
        linear_weight: (C, D), of the input's dtype; under autocast either has any of those. (C, d1, ..., D) with an
            input of (N, D), for d1 x ... losses of each row: then all logits are made.
        target: class indices (*), or class probabilities (*, C).
        linear_bias: (C), or (C, d1, ...).
        weight, reduction, ignore_index, label_smoothing: as in `cross_entropy`; an `ignore_index` of None is -100.
        options: a `torch.nn.LinearCrossEntropyOptions`, whose `batch_chunk_size` and `acc_dtype` stand for `chunk_rows`
            and `accumulate_dtype`; its other fields choose among algorithms of PyTorch's.
        dtype, logit_scale, softcap, z_loss, sample_weight, normalizer, on_all_ignored, return_stats: as in
            `cross_entropy`; `sample_weight` is (*), and the loss has `dtype`, or else float32, or float64 of float64.
        shift: input (B, T, D) and target (B, T) or (B, T, C), not shifted: position t predicts target t + 1.
        chunk_rows: of how many rows there are logits at a time. By default as many as take half of the memory of the
            weight's gradient, and at least 256 on a CPU and 1024 on a GPU (see `xent_ext.plan.chunk_rows`); logits of
            up to 16 MiB are made at once, unless on a CPU chunks take less time: where many of their rows are ignored,
            or the weight's gradient is large.
        accumulate_dtype: the dtype in which the weight's gradient is added up over the chunks: by default its own with
            up to four chunks, or else float32 for half precision. In half precision each chunk rounds the sum once
            more; float32 takes a copy of the weight in it, and on a CPU the time of one product in float32.
        max_counted_rows: a bound for the number of rows that are not ignored. On a GPU, which does not tell their
            number without being waited for, only that many are computed; should more count, the loss is NaN. On a CPU
            it is checked (ValueError), as it is on a GPU with XENT_EXT_CHECK=1.
        process_group, class_start, num_classes: as in `cross_entropy`: `linear_weight`, `linear_bias`, `weight` and
            probabilities are this rank's slice of the classes, or have rows of padding; the input is the same on every
            rank. Backward adds the input's gradient up over the ranks, and nothing else is collective there.

    Returns:
        The loss, of shape (*) for "none"; with `return_stats` a pair of that and a `CrossEntropyStats`.

    Raises:
        RuntimeError for shapes, dtypes and devices that do not go together, and what `cross_entropy` raises.

    "mean" and "sum" make the gradients in the forward pass, by three matrix products in all; backward multiplies them
    by the upstream gradient. "none", gradients of statistics, and a forward pass under hooks on saved tensors (as in a
    checkpoint) take a fourth product, which makes the logits again in backward. `create_graph=True`, `torch.func`, and
    a `target` or `weight` that require a gradient make all logits, as the two functions do.

    Memory beyond the arguments: the gradients, and chunk_rows * C logits, thrice for gradients of statistics. Without a
    gradient: the logits alone.

    Of a `DTensor` input and `linear_weight` each rank computes what is there: along a dimension of the mesh either the
    input is in shards of its batch, and the weight is gathered if it is sharded; or there is all of the input, and the
    weight may be in shards of its classes. Other tensors are redistributed to that.
    """
    given = Options(
        dtype, logit_scale, softcap, z_loss, sample_weight, normalizer, on_all_ignored, False, return_stats, shift,
        process_group, class_start, num_classes,
    )  # fmt: skip
    arguments = LinearArguments(
        input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options,
        chunk_rows, accumulate_dtype, max_counted_rows,
    )  # fmt: skip
    if is_layer_overridden(arguments, given):
        return layer_overridden(arguments, given)
    return linear_call.linear_cross_entropy(None, arguments, given)


def is_layer_overridden(arguments, options):
    """`is_overridden` for `linear_cross_entropy`."""
    tensors = arguments.input, arguments.linear_weight, arguments.target, arguments.linear_bias, arguments.weight
    given = options.sample_weight, options.normalizer, options.logit_scale
    return has_torch_function((*tensors, *given)) and not torch.compiler.is_compiling()


def layer_overridden(arguments, options):
    """What that gives."""
    input, linear_weight, target, *_ = arguments
    given = arguments._asdict() | options._asdict()
    for name in ("input", "linear_weight", "target", "inplace"):
        given.pop(name)
    tensors = [value for value in (*arguments, *options) if isinstance(value, Tensor)]
    return handle_torch_function(linear_cross_entropy, tensors, input, linear_weight, target, **given)
