"""Loss modules."""

import weakref

import torch

from .autograd import Expectation
from .functional import fused


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` with a fused forward and backward.

    Arguments, attributes, `state_dict`, `repr` and pickling are the base class's; see
    `xent_ext.cross_entropy` for shapes, dtypes and errors.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input, target)
        expectation = _expectations.setdefault(self, Expectation())
        return fused(
            expectation, input, target, self.weight, None, self.ignore_index, None, self.reduction, self.label_smoothing
        )


# Beside the modules, not in them: a copied or pickled module is what torch.nn.CrossEntropyLoss would be.
_expectations = weakref.WeakKeyDictionary()
