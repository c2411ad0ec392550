"""What a call asks for, once its arguments are checked, and what passes between autograd and an implementation."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """The options of one loss, validated and with defaults filled in: all that is not tensors."""

    probabilities: bool  # targets are class probabilities
    reduction: str  # "none", "mean" or "sum"
    ignore_index: int
    label_smoothing: float  # in [0, 1]
    dtype: torch.dtype  # of the loss
    logit_scale: float = 1.0  # the default where it is a tensor, as are all `NUMBERS`
    softcap: float | None = None
    z_loss: float = 0.0
    on_all_ignored: str = "nan"  # or "zero": where `mean` would divide by 0 it divides by infinity
    shift: bool = False  # the input is (B, T, C), and its rows are those of `layout.visible`
    inplace: bool = False  # the gradient takes the memory of the input
    stats: tuple = ()  # names of `reference.STATS`, in that order
    num_classes: int = 0  # of all ranks, where the input may have columns beyond them, or a part of them; 0: its own
    class_start: int = 0  # which of them the input's first column is
    group: str = ""  # the name of the process group whose ranks have the other classes (see `xent_ext.parallel`)
    ranks: int = 0  # how many they are with this one, which is the
    rank: int = 0  # so-manieth; 0 and 0 where there is no group

    @property
    def is_partial(self):
        """Whether some of the input may take no part (see `layout.visible`)."""
        return self.shift or self.num_classes > 0


class Tensors(NamedTuple):
    """The tensors of a call. Those from `sample_weight` on are of the dtype that the loss is computed in."""

    input: Tensor
    target: Tensor  # class indices, or probabilities of the shape of the visible input
    weight: Tensor | None = None  # (C)
    sample_weight: Tensor | None = None  # in the shape of the rows
    normalizer: Tensor | None = None  # 0-dim
    logit_scale: Tensor | None = None  # 0-dim
    softcap: Tensor | None = None  # 0-dim, as is z_loss: in compiled graphs
    z_loss: Tensor | None = None
    gathered: Tensor | None = None  # the summaries of all ranks: in compiled graphs, once they are there


class Layer(NamedTuple):
    """The last linear layer, whose outputs are the logits. `Tensors.input` is then its input, (rows, features)."""

    weight: Tensor  # (classes, features)
    bias: Tensor | None = None  # (classes)


# Options that are numbers of `Problem` or 0-dim tensors of `Tensors`.
NUMBERS = ("logit_scale", "softcap", "z_loss")


def number(name, problem, tensors):
    """One of `NUMBERS`: the tensor, if there is one."""
    tensor = getattr(tensors, name)
    return getattr(problem, name) if tensor is None else tensor


def scalar(value, dtype, device):
    """A number as a 0-dim tensor."""
    if torch.compiler.is_compiling():
        # A number that is given to `torch.full`, or to an operator, is a constant: each would have its own graph.
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), value, dtype=dtype, device=device)


class Wanted(NamedTuple):
    """What is to be made besides the loss and the statistics."""

    gradient: bool = False  # with respect to the input
    slope: bool = False  # for the gradient with respect to `logit_scale`; only with `gradient`
    losses: bool = False  # for the gradient with respect to `sample_weight`


class Kept(NamedTuple):
    """What the forward pass makes for backward. Values for each row are in the shape of the rows."""

    gradient: Tensor | None = None  # of the shape of the input; for the upstream gradient that was expected
    slope: Tensor | None = None  # made with `gradient`: for each row, in any shape, sum_c dL/dz_c * dz_c/dlogit_scale
    losses: Tensor | None = None  # row losses before `sample_weight` and the reduction
    normalizer: Tensor | None = None  # the implementation's own, as is the summary
    summary: Tensor | None = None


class Upstream(NamedTuple):
    """The gradients that come into backward: None where nothing came of an output."""

    loss: Tensor | None = None
    logprob: Tensor | None = None  # these in the shape of the rows
    lse: Tensor | None = None
    entropy: Tensor | None = None

    def has_stats(self):
        return not self.logprob is self.lse is self.entropy is None


@dataclass(frozen=True)
class CrossEntropyStats:
    """What `cross_entropy(..., return_stats=...)` says of each row besides its loss; None where it was not asked for.

    All are of the distribution p = softmax(z) that the loss sees: after `logit_scale` and `softcap`. They have the
    shape of the rows, the floating ones the dtype that the loss is computed in (float32 for half precision). Gradients
    flow through `logprob`, `lse` and `entropy`. An ignored row's logits are not read: its values are 0, False and, for
    `predicted`, -1.
    """

    # `Any` stands for None: whoever asked for a statistic need not tell a type checker that it is there.
    logprob: Tensor | Any = None  # log p_t; for probabilities q sum_c q_c log p_c
    lse: Tensor | Any = None  # log sum_c exp z_c
    entropy: Tensor | Any = None  # - sum_c p_c log p_c
    max_prob: Tensor | Any = None  # the largest p_c
    predicted: Tensor | Any = None  # its class, int64; the first of several
    correct: Tensor | Any = None  # whether that is t; for probabilities the first class of the largest q_c
    accuracy: Tensor | Any = None  # 0-dim: the share of correct rows among those not ignored; NaN if there are none
