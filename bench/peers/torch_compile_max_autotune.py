"""torch.compile of F.cross_entropy with mode="max-autotune-no-cudagraphs": the fastest of several configurations.

Includes what torch_compile's does, and not the search. On a CPU the mode concerns matrix products alone, of which this
loss has none, so that it would be torch_compile itself.

Moves what torch_compile does.
"""

import torch
import torch.nn.functional as F

from ..peer import Peer, copies

PEER = Peer(
    load=lambda: torch.compile(F.cross_entropy, dynamic=False, mode="max-autotune-no-cudagraphs"),
    moved=lambda case: copies(case, 2, 1, 1),
    devices=("cuda",),
    images=True,
)
