"""torch.compile(torch.nn.functional.cross_entropy, dynamic=False): PyTorch's own, compiled for each shape.

Includes its guards, not its compilation. Takes all dtypes and layouts; on a CPU it needs a C++ compiler when it runs.

Moves 2 + 1 copies of the logits: forward reads them for the sums, and again while they are cached, and keeps two
numbers a row; backward reads them and writes the gradient, which is all that is held.
"""

import torch
import torch.nn.functional as F

from ..peer import Peer, copies

PEER = Peer(
    load=lambda: torch.compile(F.cross_entropy, dynamic=False), moved=lambda case: copies(case, 2, 1, 1), images=True
)
