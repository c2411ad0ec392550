"""What the kernels are given: tuples of tensors, which to a kernel are pointers, and of the numbers that go with them.

A member that is None is not there, and no code is compiled for it. Triton before 3.7 can't compare with None a tuple
that holds a None itself, so a kernel asks that of members. Three numbers are arguments of their own, as Triton would
compile anew for those values of a member that are 1 or that 16 divides: `batch`, the number of rows, `tiles`, and
`ignore_index`. Options that are numbers are in memory: a Python float in a tuple would be a float32.
"""

from typing import Any, NamedTuple

from ..problem import Upstream

Pointer = Any  # a tensor outside kernels


class View(NamedTuple):
    """A tensor as (outer, inner, class), and its strides, in elements."""

    ptr: Pointer
    outer: int
    inner: int
    by_class: int


class Target(NamedTuple):
    """What the rows' targets are, and what they count for."""

    indices: Pointer | None  # of classes; None: probabilities
    probabilities: View | None
    weight: Pointer | None  # of each class; None: all ones
    sample_weight: Pointer | None  # of each row; None: all ones
    smoothing: Pointer | None  # None: 0
    classes: int


class Transform(NamedTuple):
    """From the logits to z, of which the loss is the softmax cross entropy."""

    logit_scale: Pointer | None  # None: 1
    softcap: Pointer | None  # None: no cap


class Given(NamedTuple):
    """What every pass over the logits reads. Row (o, i) has the number o * row_outer + i * row_inner."""

    logits: View
    target: Target
    transform: Transform
    z_loss: Pointer | None  # None: 0
    inner: int
    row_outer: int
    row_inner: int


class Results(NamedTuple):
    """Where what is wanted of the rows goes."""

    loss: Pointer | None  # of each row with PER_ROW, of all with WHOLE, else of each tile; None: nothing is wanted
    row_losses: Pointer | None  # before they are weighted
    logprob: Pointer | None
    lse: Pointer | None
    entropy: Pointer | None
    max_prob: Pointer | None
    predicted: Pointer | None


class Gradient(NamedTuple):
    """Where the gradient goes, and what it is multiplied by."""

    view: View | None  # None: no gradient is wanted
    slope: Pointer | None  # of each row (see xent_ext.problem)
    upstream: Upstream  # its `loss` is one for each row with PER_ROW, else one number
    normalizer: Pointer | None  # PARTS numbers, whose sum it is (see `divisor`)
    expected: Pointer | None  # the upstream gradient that it is made ahead for, or was, and misses (see expectation.py)
    seen: Pointer | None  # where both are noted for the next step to expect; None: the gradient is not there yet


class Constants(NamedTuple):
    """What is known when a kernel is compiled."""

    BLOCK: int  # classes of a tile's body; rows or losses that a reduction reads at a time
    DOUBLE: bool  # everything is computed in float64, else in float32
    ROWS: int = 1  # of a tile
    REST: int = 0  # classes of the tile's rest; 0: there is none
    EDGE: int = 0  # logits of a vector, where rows start at any element
    WIDE: bool = False  # offsets within a tile have 64 bits
    CLASS_VEC: int = 1
    ROW_VEC: int = 1
    SPLITS: int = 1  # programs that share a row, each with a part of it
    TURNS: bool = False  # there are fewer programs than tiles
    WHOLE: bool = False  # there is one tile, whose program makes the loss of the batch
    PER_ROW: bool = False  # losses and upstream gradients are one for each row
    DENSE: bool = False  # every class has a target mass of its own
    ENTROPY: bool = False  # it is wanted, or its gradient
    PREDICT: bool = False  # the class of the largest logit is wanted
    STATS: bool = False  # any statistic is wanted
    MEAN: bool = False  # the loss is divided by the normaliser, which is
    PARTS: int = 1  # the sum of so many parts, where there are any; else
    COUNT: int = 0  # the weight of the rows, at most so many; 0: their number
    NOT_ZERO: bool = False  # infinity in place of 0
