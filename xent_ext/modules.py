"""Loss modules."""

from collections.abc import Sequence

import torch

from . import dispatch, functional
from .call import Arguments, Options
from .problem import CrossEntropyStats


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` with a fused forward and backward, and options for training.

    Arguments, attributes, `state_dict`, `repr` and pickling are the base class's. The options are those of
    `xent_ext.cross_entropy`, which see for shapes, dtypes and errors too; what changes from call to call is an argument
    of `forward`: `sample_weight`, `normalizer`, and a `logit_scale` in place of the module's, which must be a number.

    Attributes:
        options: the options for training that differ from their defaults, by name; None without any.
    """

    options = None  # an attribute of the module itself only where there are any, as its pickle is the base class's

    def __init__(
        self,
        weight: torch.Tensor | None = None,
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
        if isinstance(logit_scale, torch.Tensor):
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
            self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in (self.options or {}).items())

    def __prepare_scriptable__(self) -> torch.nn.CrossEntropyLoss:
        """What TorchScript compiles in its place: PyTorch's own."""
        if self.options:
            raise RuntimeError(f"TorchScript has no options for training, got {self.extra_repr()}")
        module = torch.nn.CrossEntropyLoss(
            self.weight, ignore_index=self.ignore_index, reduction=self.reduction, label_smoothing=self.label_smoothing
        )
        return module.train(self.training)

    def forward(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        *,
        sample_weight: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
        logit_scale: float | torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]:
        options = None
        if self.options or not sample_weight is normalizer is logit_scale is None:
            options = Options(**self.options or {})._replace(sample_weight=sample_weight, normalizer=normalizer)
            if logit_scale is not None:
                options = options._replace(logit_scale=logit_scale)
        arguments = Arguments(
            input, target, self.weight, None, self.ignore_index, None, self.reduction, self.label_smoothing
        )
        if functional.is_overridden(arguments, options):
            return functional.overridden(arguments, options)
        return dispatch.cross_entropy(self, arguments, options)
