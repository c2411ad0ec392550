"""What `F.cross_entropy` would raise, raised before any launch.

Every check raises the exception type that PyTorch raises for the same call, with a message that names the
argument, what it was and what was expected, and that keeps PyTorch's own words where its tests look for them.
Apart from `bad_target`, and options that are given as tensors, nothing here reads data or waits for a device.

Where one call is wrong in several ways, PyTorch's order decides which type is raised, so the order of the
tests below matters wherever neighbouring types differ. Only that the options come before the tensors is this
module's own. Meta tensors are held to the same rules, although PyTorch's own meta functions skip some of
them: the computation they stand for would fail.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor
from torch._C._autograd import CreationMeta, _get_creation_meta
from torch.autograd.function import BackwardCFunction
from torch.nn import _reduction
from torch.nn.modules._functions import BackwardHookFunction

from .layout import batch_shape, class_axis, visible
from .problem import CrossEntropyStats

_NUMPY_SCALARS: tuple[type, ...]
try:
    from numpy import bool_, number

    _NUMPY_SCALARS = (bool_, number)
except ImportError:
    _NUMPY_SCALARS = ()

_REDUCTIONS = ("none", "mean", "sum")  # in the order of PyTorch's enumeration
_LOGITS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INDICES = (torch.int64, torch.uint8)
_STATS = tuple(field.name for field in fields(CrossEntropyStats))
_ORIGINS = {  # of views that can't be changed in place
    CreationMeta.IN_CUSTOM_FUNCTION: "by a custom function",
    CreationMeta.MULTI_OUTPUT_NODE: "by split, chunk or unbind",
    CreationMeta.NO_GRAD_MODE: "under no_grad",
    CreationMeta.INFERENCE_MODE: "in inference mode",
}
_INT64 = torch.iinfo(torch.int64)
_INT64_MIN, _INT64_MAX = _INT64.min, _INT64.max


def reduction_name(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction that the three arguments ask for: "none", "mean" or "sum".

    The legacy `size_average` and `reduce` override `reduction`, with PyTorch's deprecation warning.
    Raises ValueError for a `reduction` that PyTorch does not know.
    """
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_string(size_average, reduce)
    if type(reduction) is str and reduction in _REDUCTIONS:
        return reduction
    try:
        return _REDUCTIONS[_reduction.get_enum(reduction)]  # warns for "elementwise_mean"
    except ValueError:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}") from None


def integer_ignore_index(ignore_index) -> int:
    """`ignore_index` as an int.

    Takes an int, a one-element integer tensor, a NumPy integer, or anything with `__index__`, but no bool.
    Raises TypeError for other types, ValueError where int64 cannot hold the value.
    """
    if type(ignore_index) is not int:
        ignore_index = _index(ignore_index)
    if not _INT64_MIN <= ignore_index <= _INT64_MAX:
        raise ValueError(f"ignore_index must fit in int64, got {ignore_index}")
    return ignore_index


def _index(value):
    if isinstance(value, torch.SymInt):
        return value
    message = f"ignore_index must be an int, got {_described(value)}"
    if isinstance(value, bool):
        raise TypeError(message)
    try:
        index = operator.index(value)
    except TypeError:
        raise TypeError(message) from None
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        raise RuntimeError(message)
    return index


def smoothing_value(label_smoothing) -> float:
    """`label_smoothing` as a float in [0, 1]; negative values and NaN mean no smoothing, as in PyTorch.

    Takes a float, an int, a bool, a NumPy scalar, or a 0-d tensor that does not require grad.
    Raises TypeError for other types, RuntimeError above 1.
    """
    if type(label_smoothing) is not float:
        label_smoothing = _float(label_smoothing)
    if label_smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
    return label_smoothing if label_smoothing > 0.0 else 0.0


def _float(value) -> float:
    if isinstance(value, Tensor):
        accepted = value.dim() == 0 and not value.requires_grad
    else:
        accepted = isinstance(value, (float, int, torch.SymFloat, torch.SymInt, *_NUMPY_SCALARS))
    if not accepted:
        raise TypeError(f"label_smoothing must be a float, got {_described(value)}")
    return float(value)


def check_tensors(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    *,
    autocast: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise what `F.cross_entropy` raises for these tensors, whatever the values in them.

    `input` is (C), (N, C) or (N, C, d1, ...) in float16, bfloat16, float32 or float64. A `target` of exactly
    that shape holds class probabilities, in any floating point dtype; any other `target` holds class indices,
    () or (1,), (N), or (N, d1, ...), in int64, or in uint8 up to (N). `weight` is (C,): with class indices of
    the input's dtype and without grad, with probabilities of any dtype that promotes. `ignore_index` and
    `label_smoothing` come from `integer_ignore_index` and `smoothing_value`. `autocast` says that autocast is
    on for the input's device, and so that float16, bfloat16 and float32 count as one dtype. `dtype`, if there is
    one, is what the logits are computed in: a weight of either dtype will do.

    Raises TypeError for what is not a tensor, NotImplementedError for the dtype of `input`, ValueError for
    the batch size of `target`, IndexError for a 0-d `input`, RuntimeError for almost everything else.

    Two things are settled here that PyTorch leaves to the reduction and the smoothing. A weight whose shape
    is not (C,) is always refused, though some others with C elements pass there for (N, C, d1, ...). uint8
    indices are always accepted with a weight, and for an empty (N, C, d1, ...), which it sometimes refuses.
    """
    for name, value in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(value, Tensor) and not (name == "weight" and value is None):
            raise TypeError(f"{name} must be a Tensor, got {_described(value)}")
    if input.shape == target.shape:
        _check_probabilities(input, target, weight, ignore_index, label_smoothing, autocast)
    else:
        _check_indices(input, target, weight, label_smoothing, autocast, dtype)


def _check_probabilities(input, target, weight, ignore_index, label_smoothing, autocast):
    if not target.is_floating_point():
        raise RuntimeError(
            f"Expected floating point type for target with class probabilities, got {target.dtype}; "
            f"a target of the input's shape, {tuple(input.shape)}, holds probabilities. Where it is one-hot, "
            "pass target.float()"
        )
    if ignore_index >= 0:
        raise RuntimeError(
            f"ignore_index is not supported for floating point target: expected a negative one, which has "
            f"no effect, got {ignore_index}"
        )
    _check_weight_shape(input, weight)
    if input.numel():  # PyTorch lets empty logits of any dtype pass
        _check_logits_dtype(input, autocast)
    _check_devices(input, target, weight)
    _check_promotion(input, target, weight, label_smoothing, autocast)


def _check_promotion(input, target, weight, label_smoothing, autocast):
    """One-byte floats neither promote nor multiply."""
    target_dtype = _computed_dtype(target, autocast)
    if label_smoothing > 0.0 and _is_float8(target_dtype):
        raise NotImplementedError(f"target must not be {target.dtype} with label_smoothing")
    try:
        product = torch.promote_types(_computed_dtype(input, autocast), target_dtype)
        if weight is not None:
            product = torch.promote_types(product, _computed_dtype(weight, autocast))
    except RuntimeError as error:
        dtypes = f"input {input.dtype}, target {target.dtype}"
        if weight is not None:
            dtypes += f", weight {weight.dtype}"
        raise RuntimeError(f"the dtypes must promote to a common one, got {dtypes}: {error}") from None
    if _is_float8(product):
        raise _logits_dtype_error(input)


def _check_indices(input, target, weight, label_smoothing, autocast, dtype):
    classes = _classes(input)
    rank = input.dim()
    if input.numel():  # PyTorch looks at the dtype of empty logits later
        _check_logits_dtype(input, autocast)
    batch = target.shape[0] if target.dim() else 0
    if rank > 1 and batch != input.shape[0]:
        raise ValueError(
            f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({batch}): "
            f"{_expected_target_shape(input, target)}"
        )
    _check_devices(input, target, weight)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("weight must not require grad where target holds class indices; detach it")
    if target.dtype not in _INDICES:
        raise RuntimeError(
            f"expected target dtype to be Long or Byte, but got {target.dtype}; a target of another shape "
            f"than the input's holds class indices: {tuple(target.shape)} is not {tuple(input.shape)}. Where they are "
            "whole numbers, pass target.long()"
        )
    _check_index_shape(input, target)
    _check_weight_shape(input, weight)
    if classes == 0 and rank not in (1, 2, 4) and target.numel():
        raise RuntimeError(f"input has no classes: expected C > 0 in (N, C, ...), got {tuple(input.shape)}")
    _check_logits_dtype(input, autocast)
    if rank > 2 and target.dtype == torch.uint8 and target.numel():
        raise RuntimeError(f"target must be int64 for an input of shape {tuple(input.shape)}, got uint8")
    if weight is not None and _computed_dtype(weight, autocast) not in (_computed_dtype(input, autocast), dtype):
        raise RuntimeError(
            f"weight must have the dtype of input, {input.dtype}, where target holds class indices, got {weight.dtype}"
        )
    if label_smoothing > 0.0 and rank == 1 and target.dim() == 1:
        raise RuntimeError("target must have shape () for a 1-D input with label_smoothing, got (1,)")


def _check_index_shape(input, target):
    """The shape of class indices whose batch size is right. PyTorch has three types for this."""
    rank = input.dim()
    kind = None
    if rank == 1:
        if target.dim() > 1:
            kind = RuntimeError
        elif target.numel() != 1:
            kind = ValueError
    elif target.dim() == 0:  # passes for 0 where the batch is empty
        kind = IndexError if rank == 2 else RuntimeError
    elif target.shape[1:] != input.shape[2:]:
        kind = RuntimeError
    if kind:
        raise kind(_expected_target_shape(input, target))


def _expected_target_shape(input, target) -> str:
    shape = tuple(input.shape)
    indices = "() or (1,)" if len(shape) == 1 else shape[:1] + shape[2:]
    return (
        f"Expected target size {indices} for class indices, or {shape} for class probabilities, "
        f"with an input of shape {shape}, got {tuple(target.shape)}{_advice(input, target)}"
    )


def _advice(input, target) -> str:
    """What to do about the shapes that are most often mistaken for right ones."""
    shape, given = tuple(input.shape), tuple(target.shape)
    rank = len(shape)
    classes_last = ". Classes must be dimension 1 of input; where they are its last, pass "
    if rank > 2 and given == shape[:-1]:
        moved = "transpose(1, 2)" if rank == 3 else "movedim(-1, 1)"
        return f"{classes_last}input.{moved}, or input.flatten(0, {rank - 2}) with target.flatten()"
    if rank > 2 and given == (math.prod(shape[:-1]),):
        return f"{classes_last}input.flatten(0, {rank - 2})"
    if rank > 2 and given == (shape[0], 1, *shape[2:]):
        return ". Pass target.squeeze(1)"
    if rank == 2 and target.numel() == shape[0]:
        return ". Pass target.flatten()"
    return ""


def _check_weight_shape(input, weight):
    classes = _classes(input)
    if weight is not None and tuple(weight.shape) != (classes,):
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes or no classes but got weight "
            f"tensor of shape: {tuple(weight.shape)}; expected ({classes},) for an input of shape "
            f"{tuple(input.shape)}"
        )


def _check_logits_dtype(input, autocast):
    if _computed_dtype(input, autocast) not in _LOGITS:
        raise _logits_dtype_error(input)


def _logits_dtype_error(input):
    return NotImplementedError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")


def _check_devices(input, target, weight):
    device = input.device
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != device:
            raise RuntimeError(f"{name} must be on the device of input, {device}, got {tensor.device}")


def _classes(input) -> int:
    if input.dim() == 0:
        raise IndexError("input must have shape (C), (N, C) or (N, C, d1, ...), got ()")
    return input.shape[0 if input.dim() == 1 else 1]


def _computed_dtype(tensor, autocast) -> torch.dtype:
    """The dtype that autocast lets the operation see: it makes float32 of all floats but float64."""
    if autocast and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return torch.float32
    return tensor.dtype


def _is_float8(dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def _described(value) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return type(value).__name__


# --- Options for training


def check_options(options, reduction):
    """Raise TypeError or ValueError for options that no tensors could make right."""
    if options.dtype is not None:
        if not isinstance(options.dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {_described(options.dtype)}")
        if options.dtype not in _LOGITS:
            raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, got {options.dtype}")
    for name in ("logit_scale", "softcap", "z_loss", "normalizer"):
        value = getattr(options, name)
        if isinstance(value, Tensor) and name in ("logit_scale", "normalizer"):
            continue
        if value is not None or name in ("logit_scale", "z_loss"):
            _check_number(name, value)
    if options.softcap is not None and options.softcap <= 0:
        raise ValueError(f"softcap must be positive, or None for no cap, got {options.softcap}")
    if options.z_loss < 0:
        raise ValueError(f"z_loss must not be negative, got {options.z_loss}")
    if options.on_all_ignored not in ("nan", "zero"):
        raise ValueError(f"on_all_ignored must be 'nan' or 'zero', got {options.on_all_ignored!r}")
    for name in ("inplace", "shift"):
        if not isinstance(getattr(options, name), bool):
            raise TypeError(f"{name} must be a bool, got {_described(getattr(options, name))}")
    stat_names(options.return_stats)
    if options.normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer is what reduction='mean' divides by, got reduction={reduction!r}")
    if options.inplace and reduction == "none":
        raise ValueError("inplace=True is for reduction='mean' and 'sum': the gradient for 'none' is made in backward")


def _check_number(name, value):
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (float, int, *_NUMPY_SCALARS)):
        or_tensor = " or a 0-dim tensor" if name in ("logit_scale", "normalizer") else ""
        raise TypeError(f"{name} must be a number{or_tensor}, got {_described(value)}")
    if not -math.inf < value < math.inf:  # a graph's symbolic numbers can be compared, but not given to isfinite
        raise ValueError(f"{name} must be finite, got {value}")


def stat_names(return_stats) -> tuple:
    """The statistics that `return_stats` asks for: all, none, or those named."""
    if isinstance(return_stats, bool):
        return _STATS if return_stats else ()
    if not isinstance(return_stats, Sequence) or isinstance(return_stats, (str, bytes)):
        raise TypeError(f"return_stats must be a bool or a sequence of names, got {_described(return_stats)}")
    for name in return_stats:
        if name not in _STATS:
            raise ValueError(f"return_stats may name {', '.join(_STATS)}, got {name!r}")
    return tuple(return_stats)


def check_shift(input, target, sample_weight, classes=None):
    """Raise RuntimeError unless the logits are (B, T, C) and what goes with them has their positions.

    With `classes`, `input` is that of the last layer, (B, T, D).
    """
    for name, value in (("input", input), ("target", target), ("sample_weight", sample_weight)):
        if not isinstance(value, Tensor) and not (name == "sample_weight" and value is None):
            raise TypeError(f"{name} must be a Tensor, got {_described(value)}")
    shape, last = tuple(input.shape), "C" if classes is None else "D"
    if len(shape) != 3 or not shape[1]:
        raise RuntimeError(f"input must have shape (B, T, {last}), with T of at least 1, with shift=True, got {shape}")
    logits = shape if classes is None else (*shape[:2], classes)
    if tuple(target.shape) not in (shape[:2], logits):
        classes_first = classes is None and tuple(target.shape) == (shape[0], shape[2])
        raise RuntimeError(
            f"target must have shape {shape[:2]} for class indices, or {logits} for class probabilities, with "
            f"shift=True and an input of shape {shape}, got {tuple(target.shape)}"
            + classes_first
            * ". Classes must be the last dimension of input; pass input.transpose(1, 2)"
        )
    if sample_weight is not None and tuple(sample_weight.shape) != shape[:2]:
        raise RuntimeError(
            f"sample_weight must have shape {shape[:2]} with shift=True and an input of shape {shape}, "
            f"got {tuple(sample_weight.shape)}"
        )


def check_option_tensors(options, input, seen, target, sample_weight):
    """Raise for options that are wrong with these tensors, of which check_tensors has nothing to say.

    `seen` are the logits whose rows take part; `target` and `sample_weight` are those of these rows.
    """
    if options.dtype is not None and torch.promote_types(input.dtype, options.dtype) != options.dtype:
        raise ValueError(f"dtype must hold every value of an input of {input.dtype}, got {options.dtype}")
    for name in ("sample_weight", "normalizer", "logit_scale"):
        value = getattr(options, name)
        if isinstance(value, Tensor):
            if value.device != input.device:
                raise RuntimeError(f"{name} must be on the device of input, {input.device}, got {value.device}")
            if value.is_complex():
                raise TypeError(f"{name} must be real, got {value.dtype}")
            if name != "sample_weight" and value.dim():
                raise RuntimeError(f"{name} must be a number or a 0-dim tensor, got shape {tuple(value.shape)}")
    if isinstance(options.normalizer, Tensor) and options.normalizer.requires_grad:
        raise RuntimeError("normalizer must not require grad: no gradient flows to it")
    if sample_weight is not None:
        _check_sample_weight(sample_weight, seen, target)
    # A graph overwrites nothing, and can't ask about views.
    if options.inplace and not torch.compiler.is_compiling() and torch.is_grad_enabled() and input.requires_grad:
        _check_inplace(input)


def _check_sample_weight(sample_weight, seen, target):
    if not isinstance(sample_weight, Tensor):
        raise TypeError(f"sample_weight must be a Tensor, got {_described(sample_weight)}")
    batch = tuple(batch_shape(seen.shape)) if seen.shape == target.shape else tuple(target.shape)
    if tuple(sample_weight.shape) != batch:
        raise RuntimeError(
            f"sample_weight must have one factor for each row, shape {batch}, got {tuple(sample_weight.shape)}"
        )


def _check_inplace(input):
    """Raise what autograd would once the logits are overwritten."""
    if input._is_view() and (origin := _origin_of_view(input)):
        raise RuntimeError(f"inplace=True can't overwrite a view that was made {origin}")
    if any(tensor is not None and tensor.is_leaf for tensor in (input, input._base)):  # a leaf may be a view of data
        raise RuntimeError("inplace=True would overwrite a leaf that requires grad: input must be a computed tensor")
    if any(tensor is not None and tensor.retains_grad for tensor in (input, input._base)):
        # Autograd would wait for the gradient of the new values. A hook in its place crashes where the input is a view.
        raise RuntimeError("inplace=True leaves no gradient for retain_grad() of input, or of what it is a view of")
    end = 1  # beyond the last element that the dimensions so far reach
    for stride, size in sorted(zip(input.stride(), input.shape, strict=True)):
        if size > 1 and stride < end:
            raise RuntimeError(
                f"inplace=True needs an input whose elements do not share memory, got shape {tuple(input.shape)} with "
                f"strides {input.stride()}"
            )
        end += (size - 1) * stride


def _origin_of_view(input):
    """How a view was made that autograd lets nobody change in place; None for all others."""
    meta = _get_creation_meta(input)
    if meta == CreationMeta.IN_CUSTOM_FUNCTION and _is_behind_hook(input.grad_fn):
        return "for a full backward hook of a module, which gets and gives views: remove the hook, or clone the logits"
    return _ORIGINS.get(meta)


def _is_behind_hook(node):
    """Whether the custom function that a view is of is that of `register_full_backward_hook`."""
    while node is not None and not isinstance(node, BackwardCFunction):
        node = node.next_functions[0][0] if node.next_functions else None
    return getattr(node, "_forward_cls", None) is BackwardHookFunction


# --- The last linear layer


def check_layer(arguments, dtype, autocast):
    """Raise for a layer whose logits could not be computed, with `dtype` for its products, as `autocast` has it or not.

    `arguments` are input (*, D), linear_weight (C, D) or, for one loss in each of several positions, (C, d1, ..., D),
    linear_bias (C) or (C, d1, ...), and the numbers of the computation.
    """
    input, weight, bias = arguments.input, arguments.linear_weight, arguments.linear_bias
    for name in ("input", "linear_weight", "target", "linear_bias"):
        value = getattr(arguments, name)
        if not isinstance(value, Tensor) and not (name == "linear_bias" and value is None):
            raise TypeError(f"{name} must be a Tensor, got {_described(value)}")
    if input.dim() < 1:
        raise RuntimeError("input must have shape (*, D), with any number of leading dimensions, got ()")
    if input.dtype not in _LOGITS:
        raise _logits_dtype_error(input)
    if weight.dim() < 2:
        raise RuntimeError(f"linear_weight must have shape (C, D) or (C, d1, ..., D), got {tuple(weight.shape)}")
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"input and linear_weight must have equal last dimensions, got {tuple(input.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if weight.dim() > 2 and input.dim() != 2:
        raise RuntimeError(
            f"input must have shape (N, D) with linear_weight {tuple(weight.shape)}, got {tuple(input.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise RuntimeError(f"linear_bias must have shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}")
    for name in ("linear_weight", "linear_bias"):
        value = getattr(arguments, name)
        if value is not None and value.device != input.device:
            raise RuntimeError(f"{name} must be on the device of input, {input.device}, got {value.device}")
        if value is not None and not autocast and value.dtype != input.dtype:
            raise RuntimeError(f"{name} must have the dtype of input, {input.dtype}, got {value.dtype}")
    _check_numbers_of_chunks(arguments, dtype)


def _check_numbers_of_chunks(arguments, dtype):
    for name in ("chunk_rows", "max_counted_rows"):
        value = getattr(arguments, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))):
            raise TypeError(f"{name} must be an int or None, got {_described(value)}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    total = arguments.accumulate_dtype
    if total is not None and total not in _LOGITS:
        raise ValueError(f"accumulate_dtype must be a floating point dtype or None, got {total!r}")
    if total is not None and torch.promote_types(total, dtype) != total:
        raise ValueError(f"accumulate_dtype must hold every value of {dtype}, got {total}")


def check_targets_of_rows(input, classes, target, sample_weight):
    """Raise unless there is a target, and a factor if there are any, for each row of a layer's input, (*, D)."""
    batch = tuple(input.shape[:-1])
    shape = tuple(target.shape)
    if shape not in (batch, (*batch, classes)) and not (batch == () and shape == (1,)):
        kind = ValueError if len(batch) == 1 and shape[:1] != batch else RuntimeError
        raise kind(
            f"Expected target size {batch} for class indices, or {(*batch, classes)} for class probabilities, with an "
            f"input of shape {tuple(input.shape)}, got {shape}"
        )
    if isinstance(sample_weight, Tensor) and tuple(sample_weight.shape) != batch:
        raise RuntimeError(
            f"sample_weight must have one factor for each row, shape {batch}, got {tuple(sample_weight.shape)}"
        )


def bad_class(problem, tensors):
    """`bad_target` for a call with class indices."""
    if not problem.probabilities:
        shape = visible(problem, tensors.input).shape
        bad_target(tensors.target, shape[class_axis(shape)], problem.ignore_index)


def bad_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError for the first class index that is neither in [0, classes) nor `ignore_index`.

    `target` holds class indices of any shape, in int64 or uint8. This reads them, so on a GPU it waits, once. For a
    uint8 index of 128 or more PyTorch prints a raw byte and fails with UnicodeDecodeError; this does not.
    """
    if not target.numel():
        return
    if target.is_cpu:  # two numbers, for which nothing waits here, spare most calls the rest
        low, high = torch.aminmax(target)
        if low.item() >= 0 and high.item() < classes:
            return
    values = target.long()  # a uint8 tensor would wrap the number that it is compared with
    bad = values < 0
    bad |= values >= classes
    bad &= values != ignore_index
    if bad.any().item():
        row = bad.nonzero()[0].tolist()
        value = values[tuple(row)].item()
        raise IndexError(
            f"Target {value} is out of bounds. target{row or ''} is {value}; expected a class index in "
            f"[0, {classes}) or ignore_index, {ignore_index}"
        )
