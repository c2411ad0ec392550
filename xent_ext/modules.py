"""Loss modules."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import dispatch, functional
from .call import Arguments, Options


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
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        if isinstance(logit_scale, Tensor):
            raise TypeError("logit_scale of a module must be a number; pass a tensor to forward, by keyword")
        options = Options.that_differ(
            dtype=dtype,
            logit_scale=logit_scale,
            softcap=softcap,
            z_loss=z_loss,
            on_all_ignored=on_all_ignored,
            inplace=inplace,
            return_stats=return_stats,
            shift=shift,
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
            if given or not sample_weight is normalizer is logit_scale is None:
                options = Options(**given or {})._replace(sample_weight=sample_weight, normalizer=normalizer)
                if logit_scale is not None:
                    options = options._replace(logit_scale=logit_scale)
            arguments = Arguments(
                input, target, self.weight, None, self.ignore_index, None, self.reduction, self.label_smoothing
            )
            if functional.is_overridden(arguments, options):
                return functional.overridden(arguments, options)
            return dispatch.cross_entropy(self, arguments, options)
