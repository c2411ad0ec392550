"""Who is compared where ranks share the classes: functions of (logits, target, mesh), each rank with its slice.

They make loss and gradient both, as one of them needs a context around the two. Each says what its numbers include.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

import xent_ext

from .peer import Implementation

OURS, FIRST, ALONE = "xent_ext", "loss_parallel", "slice_alone"


@dataclass(frozen=True)
class SlicedCase:
    """What is measured: the mean loss of logits whose classes so many ranks share, in slices of equal size."""

    shape: tuple[int, int]  # of the logits of all ranks
    dtype: str
    ranks: int
    device: str

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[1] // self.ranks

    @property
    def slice_bytes(self) -> int:
        return self.rows * self.columns * getattr(torch, self.dtype).itemsize


def ours(logits, target, mesh):
    """xent_ext.cross_entropy with the group. Includes its argument checks."""
    return both(xent_ext.cross_entropy(logits, target, process_group=mesh.get_group()), logits)


def ours_of_dtensor(logits, target, mesh):
    """The same of a DTensor of the slices. Includes what DTensor takes, as the next two do."""
    return both(xent_ext.cross_entropy(of_slices(logits, mesh), target), logits)


def torch_loss_parallel(logits, target, mesh):
    """F.cross_entropy in torch.distributed.tensor.parallel.loss_parallel, forward and backward, as documented."""
    with loss_parallel():
        return both(F.cross_entropy(of_slices(logits, mesh), target), logits)


def gathered(logits, target, mesh):
    """F.cross_entropy of the logits of all ranks, which full_tensor() of a DTensor gathers to each."""
    return both(F.cross_entropy(of_slices(logits, mesh).full_tensor(), target), logits)


def slice_alone(logits, target, mesh):
    """xent_ext.cross_entropy of a slice as if it were all: not the loss that is wanted, but what cannot be saved."""
    return both(xent_ext.cross_entropy(logits, target % logits.shape[1]), logits)


def both(loss, logits):
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def of_slices(logits, mesh):
    return DTensor.from_local(logits, mesh, [Shard(1)], run_check=False)


def peer(function: Callable) -> Implementation:
    return Implementation(load=lambda: function)


FUNCTIONS = {
    FIRST: torch_loss_parallel,
    "gathered": gathered,
    OURS: ours,
    "xent_ext_dtensor": ours_of_dtensor,
    ALONE: slice_alone,
}
PEERS = {name: peer(function) for name, function in FUNCTIONS.items()}


def about(name: str) -> str:
    return " ".join(FUNCTIONS[name].__doc__.split())
