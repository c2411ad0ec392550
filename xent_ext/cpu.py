"""The loss on a CPU: PyTorch operators over blocks of rows that stay in cache.

The logits are read from memory once and the gradient is written once; all between happens in a block. The
formula is `xent_ext.reference`'s in the form of kernels/math.py, with m the maximum of a row's logits z:

    e = exp(z - m),  s = sum e,  mass = sum b,  dot = sum b * (z - m)
    row loss = mass * log(s) - dot,   row gradient = mass * e / s - b

What belongs to a row is computed for all rows at once where it can be: an operator costs its dispatch for every
block.
"""

import itertools
import threading
from typing import NamedTuple

import torch

from . import checks
from .layout import arrange, batch_shape, class_axis
from .plan import Traffic
from .reference import accumulation_dtype

# Bytes of logits, in the dtype they are computed in, of one block: large enough that an operator on it outweighs its
# dispatch and its hand-over to the other threads, small enough for the last-level cache.
BLOCK_BYTES = 4 << 20
# From this width on torch.softmax, which takes row by row, beats a difference, an exponential and a sum by block.
SOFTMAX_WIDTH = 64


def forward(problem, input, target, weight, want_gradient, expected):
    """The loss, and its gradient for the upstream gradient that is `expected` (None: 1).

    The gradient is made now where the reduction is "mean" or "sum", and a gradient is wanted.
    """
    if not problem.probabilities:
        checks.bad_target(target, input.shape[class_axis(input.shape)], problem.ignore_index)
    rows = Rows(problem, input, target, weight)
    gradient = torch.empty_like(rows.input) if want_gradient and problem.reduction != "none" else None
    losses = rows.walk(gradient, expected)
    if problem.reduction == "none":
        loss = torch.empty(batch_shape(input.shape), dtype=problem.dtype)
        rows.by_row(loss).copy_(losses)
        return loss, None, None, None
    return (losses.sum() / rows.normalizer()).to(problem.dtype), gradient, None, None


def backward(problem, input, target, weight, made, normalizer, summary, upstream, expected):
    """The gradient for `upstream`, and what to expect the next time.

    That is `made`, the gradient for `expected`, as it is where `upstream` is the same; or else overwritten.
    """
    seen = None if made is None else upstream.clone()
    if made is not None and upstream == (1 if expected is None else expected):
        return made, seen
    rows = Rows(problem, input, target, weight)
    gradient = torch.empty_like(rows.input) if made is None else made
    rows.walk(gradient, upstream)
    return gradient, seen


def traffic(problem, input, target, weight, want_gradient):
    """What a call moves and allocates, forward and backward, without running it."""
    x, _, layout = arrange(input, target if problem.probabilities else None)
    acc = accumulation_dtype(problem.dtype)
    block = min(rows_per_block(layout, acc), layout.rows)
    logits = input.numel() * input.element_size()
    gradient = logits if want_gradient else 0
    copies = 0 if x is input else logits
    buffered = not want_gradient or problem.reduction == "none" or input.dtype != acc
    kept = block * layout.classes * acc.itemsize if buffered else 0
    values = len(RowValues._fields) * layout.rows * acc.itemsize
    walks = 2 if want_gradient and problem.reduction == "none" else 1
    return Traffic(
        schedule="blocks of rows",
        numbers={"rows": block, "blocks": -(-layout.rows // block)},
        bytes_read=walks * (logits + target.numel() * target.element_size()) + copies,
        bytes_written=gradient + copies,
        memory=gradient + copies + kept + values,
    )


def rows_per_block(layout, acc):
    return max(BLOCK_BYTES // (layout.classes * acc.itemsize), 1)


_kept = threading.local()


def buffer(like, dtype):
    """Memory of the shape and order of `like`, a block of logits, kept for the thread's next block and next call.

    The system's allocator hands memory of this size back at once, and to fault it in again costs more than to use it.
    """
    size = like.numel() * dtype.itemsize
    memory = getattr(_kept, "memory", None)
    if memory is None or memory.numel() < size:
        memory = _kept.memory = torch.empty(size, dtype=torch.uint8)
    _, inner, classes = like.shape
    order = (inner * classes, 1, inner) if like.stride(1) < like.stride(2) else (inner * classes, classes, 1)
    return memory[:size].view(dtype).as_strided(like.shape, order)


def gather(x, index, out):
    """x[..., index] by row: PyTorch's gather is quick where the dimension is not the last."""
    torch.gather(x.transpose(1, 2), 1, index.unsqueeze(1), out=out.unsqueeze(1))


class RowValues(NamedTuple):
    """One number for each row of a call, or of a block."""

    scale: torch.Tensor  # upstream gradient over the normaliser
    point: torch.Tensor  # mass at the class index beside the dense mass; 0 for probabilities
    z: torch.Tensor  # logit, or probability, at the class index
    m: torch.Tensor
    s: torch.Tensor
    mass: torch.Tensor
    dot: torch.Tensor


class Rows:
    """The rows of one call, (outer, inner), and their logits, (outer, inner, class)."""

    def __init__(self, problem, input, target, weight):
        self.problem = problem
        self.acc = accumulation_dtype(problem.dtype)
        self.input, q, self.layout = arrange(input, target if problem.probabilities else None)
        self.shape = (self.layout.outer, self.layout.inner)
        self.weight = None if weight is None else weight.to(self.acc)
        self.x = self.by_class(self.input, 0)
        self.q = self.index = self.ignored = self.weights = None
        if problem.probabilities:
            self.q = self.by_class(q, 2)
        else:
            self.read_index(self.by_row(target).long())
        self.dense = problem.probabilities or problem.label_smoothing > 0
        self.by_softmax = not self.dense and self.layout.classes >= SOFTMAX_WIDTH

    def by_class(self, tensor, which):
        """A tensor of the input's shape as (outer, inner, class); `which` of the layout's strides it has."""
        shape = (*self.shape, self.layout.classes)
        return tensor.as_strided(shape, self.layout.strides[which], tensor.storage_offset())

    def by_row(self, tensor):
        """A tensor with one value for each row as (outer, inner)."""
        flat = tensor.reshape(-1)
        steps = [s * flat.stride(0) for s in (self.layout.row_outer, self.layout.row_inner)]
        return flat.as_strided(self.shape, steps, flat.storage_offset())

    def read_index(self, index):
        """Class indices; mask of the ignored rows, or None if there are none; weight of each row's class."""
        ignored = index == self.problem.ignore_index
        if ignored.any():
            self.ignored = ignored
            index = index.masked_fill(ignored, 0)
        self.index = index
        self.weights = torch.ones(self.shape, dtype=self.acc) if self.weight is None else self.weight[index]
        if self.ignored is not None:
            self.weights.masked_fill_(ignored, 0)

    def normalizer(self):
        if self.problem.reduction != "mean":
            return 1.0
        return float(self.layout.rows) if self.problem.probabilities else self.weights.sum()

    def blocks(self, tensor, dim=0):
        """The pieces of a tensor (..., outer, inner, ...), with outer at `dim`, for one block each.

        A block is some outers, or a part of one.
        """
        if tensor is None:
            return itertools.repeat(None)
        outer, inner = self.shape
        rows = rows_per_block(self.layout, self.acc)
        if outer * inner <= rows:
            return (tensor,)
        if inner <= rows:
            return tensor.split(rows // inner, dim)
        return [piece for one in tensor.split(1, dim) for piece in one.split(rows, dim + 1)]

    def walk(self, gradient, upstream):
        """Row losses, (outer, inner). The gradient times `upstream` (None: 1) is written, if one is wanted."""
        g = None if gradient is None else self.by_class(gradient, 1)
        values = torch.empty((len(RowValues._fields), *self.shape), dtype=self.acc)
        row = RowValues(*values.unbind())
        row.scale.copy_(1 if upstream is None else self.by_row(upstream) if upstream.dim() else upstream)
        row.scale.div_(self.normalizer())
        row.point.copy_(0 if self.q is not None else self.weights * (1 - self.problem.label_smoothing))
        row.mass.copy_(row.point)
        pieces = [self.blocks(tensor) for tensor in (self.x, g, self.q, self.index, self.ignored)]
        for *tensors, block in zip(*pieces, self.blocks(values, 1), strict=False):
            self.block(*tensors, RowValues(*block.unbind()))
        losses = row.mass * row.s.log() - row.dot
        if self.by_softmax:
            self.correct_unlikely(losses, row)
        return losses if self.ignored is None else losses.masked_fill_(self.ignored, 0)

    def block(self, x, g, q, index, ignored, row):
        """Fill in the values of a block's rows; write their gradient to g, unless that is None."""
        if ignored is not None and ignored.all():
            if g is not None:
                g.zero_()
            return
        # Half precision is widened into the buffer, and replaced there by its exponentials.
        e = g if g is not None and x.dtype == self.acc else buffer(x, self.acc)
        if x.dtype != self.acc:
            x = e.copy_(x)
        if self.by_softmax:
            b, total = None, self.softmax(x, e, index, row)
        else:
            b, total = self.exponentials(x, e, q, index, row)
        if g is None:
            return
        e.mul_((row.mass * row.scale / total).unsqueeze(-1))
        if b is not None:
            e.addcmul_(b, row.scale.unsqueeze(-1), value=-1)
        if index is not None:
            e.transpose(1, 2).scatter_add_(1, index.unsqueeze(1), (row.point * -row.scale).unsqueeze(1))
        if ignored is not None:
            e.masked_fill_(ignored.unsqueeze(-1), 0)
        if e is not g:
            g.copy_(e)

    def softmax(self, x, e, index, row):
        """Write p to e, and to the row s = 1 / p_t, as if the logit at the index were the maximum; returns sum p."""
        torch.softmax(x, -1, out=e)
        gather(e, index, out=row.z)
        torch.reciprocal(row.z, out=row.s)
        row.dot.zero_()
        return 1

    def correct_unlikely(self, losses, row):
        """Losses of the rows whose p_t is so small that it lost digits, or is 0, from their logits."""
        unlikely = row.s > torch.finfo(self.acc).max ** 0.75
        if self.ignored is not None:
            unlikely &= ~self.ignored
        for rows in unlikely.nonzero().split(rows_per_block(self.layout, self.acc)):
            at = rows.unbind(1)
            logp = self.x[at].to(self.acc).log_softmax(-1)
            losses[at] = row.mass[at] * -logp.gather(1, self.index[at].unsqueeze(1)).squeeze(1)

    def exponentials(self, x, e, q, index, row):
        """Write exp(z - m) to e, and mass, s and dot to the row; returns the dense mass, or None, and s."""
        torch.amax(x, -1, out=row.m)
        if index is not None:
            gather(x, index, out=row.z)
            torch.mul(row.point, row.z - row.m, out=row.dot)
        torch.sub(x, row.m.unsqueeze(-1), out=e)
        b = None
        if self.dense:
            b = self.dense_mass(q)
            row.mass.add_(b.expand(e.shape).sum(-1))
            dot = b * e.sum(-1) if b.dim() == 0 else (b * e).sum(-1)
            row.dot.copy_(dot if index is None else dot.add_(row.dot))
        return b, torch.sum(e.exp_(), -1, out=row.s)

    def dense_mass(self, q):
        """The mass that every class has beside the point mass, as (), (C) or (outer, inner, C)."""
        eps = self.problem.label_smoothing
        b = torch.tensor(eps / self.layout.classes, dtype=self.acc)
        if q is not None:
            b = b + (1 - eps) * q.to(self.acc)
        return b if self.weight is None else b * self.weight
