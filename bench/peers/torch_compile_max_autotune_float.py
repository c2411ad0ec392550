"""torch.compile of F.cross_entropy(logits.float(), target) with mode="max-autotune-no-cudagraphs".

Includes what torch_compile_float's does, and not the search. For GPUs and half precision alone, as
torch_compile_max_autotune and torch_compile_float say.

Moves what torch_compile does.
"""

import torch

from ..peer import Peer, copies
from .torch_compile_float import loss

PEER = Peer(
    load=lambda: torch.compile(loss, dynamic=False, mode="max-autotune-no-cudagraphs"),
    moved=lambda case: copies(case, 2, 1, 1),
    devices=("cuda",),
    dtypes=("bfloat16", "float16"),
    images=True,
)
