"""torch.nn.functional.cross_entropy(logits.float(), target), as many training scripts do with half precision.

Includes the copy in float32 and, backward, the gradient's way back. For float32 it would be torch_eager itself.

Moves what torch_eager does with 4 bytes a logit; besides, the logits are read and their copy is written, the
gradient is read and written in their dtype. The three that are held at once are of float32.
"""

import torch.nn.functional as F

from ..peer import Moved, Peer


def moved(case):
    wide = case.logits_bytes * 4 / case.itemsize
    return Moved(4 * wide + case.logits_bytes, 4 * wide + case.logits_bytes, 3 * wide)


PEER = Peer(
    load=lambda: lambda logits, target: F.cross_entropy(logits.float(), target),
    moved=moved,
    dtypes=("bfloat16", "float16"),
    images=True,
)
