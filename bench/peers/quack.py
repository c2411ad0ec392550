"""quack's cross_entropy (package quack-kernels), not in place, as its default is.

Includes the operators that take the mean of its row losses. Takes (N, C) on NVIDIA GPUs, and is compiled for each C.

Moves 2 + 1 copies of the logits: forward reads them, backward reads them and writes the gradient, which is all that
is held.
"""

from ..peer import Peer, copies, named

PEER = Peer(
    load=lambda: named("quack.cross_entropy", "cross_entropy"),
    moved=lambda case: copies(case, 2, 1, 1),
    devices=("cuda",),
)
