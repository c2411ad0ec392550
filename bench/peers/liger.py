"""Liger-Kernel's liger_cross_entropy (package liger-kernel).

Includes its waits for the device: it reads the number of targets back, and compares the upstream gradient. Forward
writes the gradient over the logits, so that each call gets fresh ones, copied back outside of the time. Takes (N, C)
on GPUs; under torch.no_grad() it needs logits that require no gradient to leave them as they are.

Moves 1 + 1 copies of the logits, a row's second reading coming from a cache; any upstream gradient but 1 reads and
writes the gradient once more. Nothing of the logits' size is allocated.
"""

from ..peer import Peer, copies, named

PEER = Peer(
    load=lambda: named("liger_kernel.transformers.functional", "liger_cross_entropy"),
    moved=lambda case: copies(case, 1, 1, 0),
    devices=("cuda",),
    writes_logits=True,
)
