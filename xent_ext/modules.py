"""Loss modules."""

import torch

from .functional import fused


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` with a fused forward and backward.

    Arguments, attributes, `state_dict`, `repr` and pickling are the base class's; see
    `xent_ext.cross_entropy` for shapes, dtypes and errors.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return fused(
            self, input, target, self.weight, None, self.ignore_index, None, self.reduction, self.label_smoothing
        )
