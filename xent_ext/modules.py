"""Loss modules."""

import torch

from .functional import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` with a fused forward and backward.

    Arguments, attributes, `state_dict`, `repr` and pickling are the base class's; see
    `xent_ext.cross_entropy` for shapes, dtypes and errors.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
