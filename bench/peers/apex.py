"""apex's SoftmaxCrossEntropyLoss (apex.contrib.xentropy, built with its CUDA extensions).

Includes the mean of its row losses, which are in float32 as half_to_float=True asks, and its wait for the device
when backward reads the smoothing back. Its padding index is -100, PyTorch's, in place of 0. Takes (N, C) on GPUs.

Moves 2 + 1 copies of the logits: forward reads them, backward reads them and writes the gradient, which is all that
is held.
"""

import torch

from ..peer import Peer, copies, named


def load():
    apply = named("apex.contrib.xentropy", "SoftmaxCrossEntropyLoss").apply

    def loss(logits, target):
        return apply(logits, target, 0.0, -100, logits.dtype != torch.float32).mean()

    return loss


PEER = Peer(load=load, moved=lambda case: copies(case, 2, 1, 1), devices=("cuda",))
