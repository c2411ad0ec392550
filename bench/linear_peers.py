"""Who is compared of the last linear layer with its loss: functions of (input, weight, target, reduction).

Each `load` says what its numbers include and what it cannot do. Those of other packages are written from their public
interfaces, and need a GPU.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

import xent_ext

from .peer import Implementation, named

OURS, FIRST = "xent_ext", "torch_eager"


class Variant(NamedTuple):
    reduction: str = "mean"
    ignored: float = 0.0  # this share of the rows
    gradient: bool = True


VARIANTS = {
    "mean": Variant(),
    "half ignored": Variant(ignored=0.5),
    "none": Variant(reduction="none"),
    "no gradient": Variant(gradient=False),
}


@dataclass(frozen=True)
class LayerCase:
    """What is measured: a layer's input and weight, random class targets, and a variant of the loss."""

    what: str
    shape: tuple[int, int, int]  # rows, features, classes
    dtype: str
    variant: str  # one of VARIANTS
    device: str

    @property
    def todo(self) -> Variant:
        return VARIANTS[self.variant]

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def layer_size(self) -> int:
        """How many numbers input and weight have, and so their gradients."""
        rows, features, classes = self.shape
        return (rows + classes) * features

    @property
    def floor_bytes(self) -> int:
        """What any implementation must hold beyond its arguments: the gradients."""
        return self.layer_size * self.itemsize if self.todo.gradient else 0

    @property
    def operations(self) -> int:
        """Those of the matrix products that any implementation makes."""
        return (6 if self.todo.gradient else 2) * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class LayerPeer(Implementation):
    reductions: tuple[str, ...] = ("mean", "none")
    chunk_rows: int | None = None  # where the rows of a chunk are set

    def refusal(self, case: LayerCase) -> str | None:
        if reason := super().refusal(case):
            return reason
        if case.todo.reduction not in self.reductions:
            return f"has no reduction {case.todo.reduction!r}"
        if self.chunk_rows is not None and self.chunk_rows >= case.shape[0]:
            return f"would take all of {case.shape[0]} rows in one chunk"
        return None


def ours() -> Callable:
    """xent_ext.linear_cross_entropy, as it is called. Includes its argument checks."""

    def loss(input, weight, target, reduction):
        return xent_ext.linear_cross_entropy(input, weight, target, reduction=reduction)

    return loss


def with_our_loss() -> Callable:
    """xent_ext.cross_entropy of F.linear's logits: what the loss of logits alone gains."""

    def loss(input, weight, target, reduction):
        return xent_ext.cross_entropy(F.linear(input, weight), target, reduction=reduction)

    return loss


def eager(input, weight, target, reduction):
    return F.cross_entropy(F.linear(input, weight), target, reduction=reduction)


def torch_eager() -> Callable:
    """F.cross_entropy of F.linear's logits, as most training scripts do."""
    return eager


def torch_compile() -> Callable:
    """torch.compile of torch_eager, with dynamic=False. Includes its guards, not its compilation."""
    return torch.compile(eager, dynamic=False)


def torch_chunked(rows: int | None = None) -> Callable:
    """F.linear_cross_entropy (PyTorch 2.13) with options: the defaults, or chunks of as many rows as the name says."""
    fused, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

    def loss(input, weight, target, reduction):
        return fused(input, weight, target, reduction=reduction, options=options)

    return loss


def liger() -> Callable:
    """Liger-Kernel's liger_fused_linear_cross_entropy (package liger-kernel): its Triton kernels, so for GPUs.

    Includes its waits for the device, where it reads the number of targets back.
    """
    fused = named("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")

    def loss(input, weight, target, reduction):
        return fused(input, weight, target, reduction=reduction)

    return loss


def cut_cross_entropy() -> Callable:
    """Apple's linear_cross_entropy (package cut-cross-entropy), at its defaults: small probabilities have no gradient.

    Includes the sort of the classes that it skips by. For GPUs and half precision, as its backward asks.
    """
    fused = named("cut_cross_entropy", "linear_cross_entropy")

    def loss(input, weight, target, reduction):
        return fused(input, weight, target, reduction=reduction)

    return loss


def quack() -> Callable:
    """quack's chunked_linear_cross_entropy (package quack-kernels), 4096 rows a chunk, as its default is.

    Includes what is left of the last chunk for backward, not the search of its products' tiles. For NVIDIA's GPUs from
    sm_90 on and half precision, mean and sum alone.
    """
    fused = named("quack.linear_cross_entropy", "chunked_linear_cross_entropy")

    def loss(input, weight, target, reduction):
        return fused(input, weight, target, reduction=reduction)

    return loss


def chunked_by(rows: int) -> LayerPeer:
    return LayerPeer(load=functools.partial(torch_chunked, rows), chunk_rows=rows)


PEERS = {
    FIRST: LayerPeer(load=torch_eager),
    "torch_compile": LayerPeer(load=torch_compile),
    "torch_chunked": LayerPeer(load=torch_chunked),
    "torch_chunked_512": chunked_by(512),
    "torch_chunked_1024": chunked_by(1024),
    "torch_chunked_2048": chunked_by(2048),
    "liger": LayerPeer(load=liger, devices=("cuda",)),
    "cut_cross_entropy": LayerPeer(load=cut_cross_entropy, devices=("cuda",), dtypes=("bfloat16",)),
    "quack": LayerPeer(load=quack, devices=("cuda",), dtypes=("bfloat16",), reductions=("mean",)),
    "with_our_loss": LayerPeer(load=with_our_loss),
    OURS: LayerPeer(load=ours),
}


def about(name: str) -> str:
    load = PEERS[name].load
    return " ".join(getattr(load, "func", load).__doc__.split())
