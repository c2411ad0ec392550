"""flash-attention's CrossEntropyLoss (package flash-attn), not in place, as its default is.

Includes the launches that take the mean of its row losses. Takes (N, C) on GPUs.

Moves 2 + 1 copies of the logits: forward reads them, backward reads them and writes the gradient, which is all that
is held.
"""

from ..peer import Peer, copies, named

PEER = Peer(
    load=lambda: named("flash_attn.losses.cross_entropy", "CrossEntropyLoss")(),
    moved=lambda case: copies(case, 2, 1, 1),
    devices=("cuda",),
)
