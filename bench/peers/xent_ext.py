"""xent_ext.cross_entropy, as it is called.

Includes its argument checks and its choice of an implementation, of which few logits on a CPU get PyTorch's own.

Moves what xent_ext.explain says of the schedule that takes the call or, where that is PyTorch's own, what torch_eager
does, or torch_eager_float where few logits in half precision are computed in float32.
"""

import torch

import xent_ext
from xent_ext import cpu_own

from ..peer import Moved, Peer
from . import torch_eager, torch_eager_float


def moved(case):
    logits = torch.empty(case.shape, dtype=getattr(torch, case.dtype), device=case.device, requires_grad=True)
    target = torch.zeros(case.shape[:1] + case.shape[2:], dtype=torch.int64, device=case.device)
    traffic = xent_ext.explain(logits, target).traffic
    if traffic is None:
        in_float32 = logits.is_cpu and cpu_own.way(logits, target, None, cpu_own.MEAN, 0.0) is cpu_own.in_float32
        return (torch_eager_float if in_float32 else torch_eager).PEER.moved(case)
    return Moved(traffic.bytes_read, traffic.bytes_written, traffic.memory, traffic.schedule)


PEER = Peer(load=lambda: xent_ext.cross_entropy, moved=moved, images=True)
