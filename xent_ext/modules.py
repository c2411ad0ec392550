"""Loss modules."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import dispatch, functional, linear_call
from .call import Arguments, Options
from .linear_call import LinearArguments


def options_of_module(logit_scale: Any, **options: Any) -> dict[str, Any]:
    """Those of a module's options that differ from their defaults, by name."""
    if isinstance(logit_scale, Tensor):
        raise TypeError("logit_scale of a module must be a number; pass a tensor to forward, by keyword")
    return Options.that_differ(logit_scale=logit_scale, **options)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` with a fused forward and backward, and options for training.

    Arguments, attributes, `state_dict`, `repr` and pickling are the base class's. The options are those of
    `xent_ext.cross_entropy`, which see for shapes, dtypes and errors too; what changes from call to call is an argument
    of `forward`: `sample_weight`, `normalizer`, and a `logit_scale` in place of the module's, which must be a number.
    `extra_repr()`, and so the `repr`, says which options differ from their defaults.

    A call gives a pair with `return_stats`. To a type checker a call of any module is `Any`, and `forward` is what it
    is without: the base class's, which a subclass may replace by one with the keywords that it needs.
    """

    # Those that differ, by name, under a name that leaves `options` to subclasses. An attribute of the module itself
    # only where there are any, as its pickle is the base class's.
    _xent_ext_options: dict[str, Any] | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        on_all_ignored: str = "nan",
        inplace: bool = False,
        return_stats: bool | Sequence[str] = False,
        shift: bool = False,
        process_group: Any = None,
        class_start: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        options = options_of_module(
            dtype=dtype,
            logit_scale=logit_scale,
            softcap=softcap,
            z_loss=z_loss,
            on_all_ignored=on_all_ignored,
            inplace=inplace,
            return_stats=return_stats,
            shift=shift,
            process_group=process_group,
            class_start=class_start,
            num_classes=num_classes,
        )
        if options:
            self._xent_ext_options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in (self._xent_ext_options or {}).items())

    def __prepare_scriptable__(self) -> torch.nn.CrossEntropyLoss:
        """What TorchScript compiles in its place: PyTorch's own."""
        if self._xent_ext_options:
            raise RuntimeError(f"TorchScript has no options for training, got {self.extra_repr()}")
        module = torch.nn.CrossEntropyLoss(
            self.weight, ignore_index=self.ignore_index, reduction=self.reduction, label_smoothing=self.label_smoothing
        )
        return module.train(self.training)

    if TYPE_CHECKING:

        def forward(self, input: Tensor, target: Tensor, *args: Any, **options: Any) -> Tensor: ...

    else:

        def forward(
            self,
            input: Tensor,
            target: Tensor,
            *,
            sample_weight: Tensor | None = None,
            normalizer: float | Tensor | None = None,
            logit_scale: float | Tensor | None = None,
        ):
            options = None
            given = self._xent_ext_options
            weight, reduction, label_smoothing = self.weight, self.reduction, self.label_smoothing
            if given or not sample_weight is normalizer is logit_scale is None:
                options = Options(**given or {})._replace(sample_weight=sample_weight, normalizer=normalizer)
                if logit_scale is not None:
                    options = options._replace(logit_scale=logit_scale)
            else:
                small = dispatch.small(input, target, weight, None, self.ignore_index, None, reduction, label_smoothing)
                if small is not None:
                    return small
            arguments = Arguments(input, target, weight, None, self.ignore_index, None, reduction, label_smoothing)
            if functional.is_overridden(arguments, options):
                return functional.overridden(arguments, options)
            return dispatch.general(self, arguments, options)


if TYPE_CHECKING or not hasattr(torch.nn, "LinearCrossEntropyLoss"):

    class _LinearCrossEntropyLoss(torch.nn.Module):
        """What `torch.nn.LinearCrossEntropyLoss` is made of, for a PyTorch without one."""

        def __init__(
            self,
            in_features: int,
            num_classes: int,
            *,
            out_features: tuple[int, ...] = (),
            bias: bool = False,
            device: Any = None,
            dtype: torch.dtype | None = None,
            reduction: str = "mean",
            weight: Tensor | None = None,
            ignore_index: int | None = None,
            label_smoothing: float = 0.0,
            options: Any = None,
        ) -> None:
            super().__init__()
            if weight is not None and weight.shape != (num_classes,):
                raise RuntimeError(f"weight must have shape {(num_classes,)}, got {tuple(weight.shape)}")
            if not 0 <= label_smoothing <= 1:
                raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
            self.num_classes, self.out_features, self.reduction = num_classes, out_features, reduction
            self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
            self.register_buffer("weight", weight)
            outputs = math.prod(out_features, start=num_classes)
            self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

        def extra_repr(self) -> str:
            return (
                f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
                f"out_features={self.out_features}, bias={self.linear.bias is not None}, reduction={self.reduction}, "
                f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, options={self.options}"
            )

else:
    _LinearCrossEntropyLoss = torch.nn.LinearCrossEntropyLoss


class LinearCrossEntropyLoss(_LinearCrossEntropyLoss):
    """`torch.nn.LinearCrossEntropyLoss`: the last linear layer, `self.linear`, and the loss of its outputs.

    Arguments, attributes and `state_dict` are the base class's (of a PyTorch before 2.13, which has none, they are the
    same): `device` and `dtype` are the layer's, and `loss_dtype` is what `dtype` is to `linear_cross_entropy`. The
    other options are those of that function, which see for shapes, dtypes and errors too; what changes from call to
    call is an argument of `forward`: `sample_weight`, `normalizer`, and a `logit_scale` in place of the module's.

    For a head whose weight is another layer's too, as a tied embedding's: `loss.linear.weight = embedding.weight`.
    """

    _xent_ext_options: dict[str, Any] | None = None
    _xent_ext_chunks: dict[str, Any] | None = None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        loss_dtype: torch.dtype | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        on_all_ignored: str = "nan",
        return_stats: bool | Sequence[str] = False,
        shift: bool = False,
        chunk_rows: int | None = None,
        accumulate_dtype: torch.dtype | None = None,
        max_counted_rows: int | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            out_features=out_features,
            bias=bias,
            device=device,
            dtype=dtype,
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        self._xent_ext_options = options_of_module(
            logit_scale,
            dtype=loss_dtype,
            softcap=softcap,
            z_loss=z_loss,
            on_all_ignored=on_all_ignored,
            return_stats=return_stats,
            shift=shift,
        )
        chunks = {
            "chunk_rows": chunk_rows,
            "accumulate_dtype": accumulate_dtype,
            "max_counted_rows": max_counted_rows,
        }
        self._xent_ext_chunks = {name: value for name, value in chunks.items() if value is not None}

    def extra_repr(self) -> str:
        given = {**(self._xent_ext_options or {}), **(self._xent_ext_chunks or {})}
        if "dtype" in given:
            given["loss_dtype"] = given.pop("dtype")
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in given.items())])

    if TYPE_CHECKING:

        def forward(self, input: Tensor, target: Tensor, *args: Any, **options: Any) -> Tensor: ...

    else:

        def forward(
            self,
            input: Tensor,
            target: Tensor,
            *,
            sample_weight: Tensor | None = None,
            normalizer: float | Tensor | None = None,
            logit_scale: float | Tensor | None = None,
        ):
            options = Options(**self._xent_ext_options or {})
            options = options._replace(sample_weight=sample_weight, normalizer=normalizer)
            if logit_scale is not None:
                options = options._replace(logit_scale=logit_scale)
            weight, bias = self.linear.weight, self.linear.bias
            if self.out_features:
                weight = weight.reshape(self.num_classes, *self.out_features, self.linear.in_features)
                bias = None if bias is None else bias.reshape(self.num_classes, *self.out_features)
            arguments = LinearArguments(
                input, weight, target, bias, self.weight, self.reduction, self.ignore_index, self.label_smoothing,
                self.options, **self._xent_ext_chunks or {},
            )  # fmt: skip
            if functional.is_layer_overridden(arguments, options):
                return functional.layer_overridden(arguments, options)
            return linear_call.linear_cross_entropy(self, arguments, options)
