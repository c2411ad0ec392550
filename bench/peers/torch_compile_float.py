"""torch.compile of F.cross_entropy(logits.float(), target), as many training scripts do with half precision.

Includes what torch_compile's does. For float32 it would be torch_compile itself.

Moves what torch_compile does: the compiler fuses both conversions into the loops that read and write.
"""

import torch
import torch.nn.functional as F

from ..peer import Peer, copies


def loss(logits, target):
    return F.cross_entropy(logits.float(), target)


PEER = Peer(
    load=lambda: torch.compile(loss, dynamic=False),
    moved=lambda case: copies(case, 2, 1, 1),
    dtypes=("bfloat16", "float16"),
    images=True,
)
