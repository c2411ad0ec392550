"""PyTorch's own, as it is."""

import torch.nn.functional as F

INCLUDES = "torch.nn.functional.cross_entropy, called as most training scripts do"


def load():
    return F.cross_entropy
