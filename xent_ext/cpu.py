"""The loss on a CPU: PyTorch operators over blocks of rows that stay in cache.

The logits are read from memory once and the gradient is written once; all between happens in a block. The
formula is `xent_ext.reference`'s in the form of kernels/math.py, with m the maximum of a row's logits z:

    e = exp(z - m),  s = sum e,  mass = sum b,  dot = sum b * (z - m)
    row loss = mass * log(s) - dot,   row gradient = mass * e / s - b
"""

import torch

from . import checks
from .layout import arrange, batch_shape, class_axis
from .reference import accumulation_dtype

# Bytes of logits, in the dtype they are computed in, of one block: large enough that an operator on it outweighs
# its dispatch and its hand-over to the other threads, small enough that it stays in cache with its gradient.
BLOCK_BYTES = 2 << 20
# From this width on torch.softmax, which takes row by row, beats an exponential and a sum by block.
SOFTMAX_WIDTH = 64


def forward(problem, input, target, weight, want_gradient):
    """The loss, and its gradient for an upstream gradient of 1 where the reduction is "mean" or "sum"."""
    if not problem.probabilities:
        checks.bad_target(target, input.shape[class_axis(input.shape)], problem.ignore_index)
    rows = Rows(problem, input, target, weight)
    gradient = torch.empty_like(rows.input) if want_gradient and problem.reduction != "none" else None
    losses = torch.zeros(rows.layout.rows, dtype=rows.acc)
    rows.walk(losses, gradient, None)
    if problem.reduction == "none":
        loss = losses.view(batch_shape(input.shape))
    else:
        loss = losses.sum() / rows.normalizer()
    return loss.to(problem.dtype), gradient, None, None


def backward(problem, input, target, weight, made, normalizer, summary, upstream):
    """The gradient for `upstream`: `made`, if that is the one for an upstream gradient of 1 and so is this."""
    if made is not None and upstream == 1:
        return made
    rows = Rows(problem, input, target, weight)
    gradient = torch.empty_like(rows.input) if made is None else made
    rows.walk(None, gradient, upstream)
    return gradient


def blocks(shape, row_bytes):
    """Index pairs that cut (outer, inner) rows into blocks: some outers, or a part of one."""
    outer, inner = shape
    count = max(BLOCK_BYTES // row_bytes, 1)
    if inner > count:
        for o in range(outer):
            for i in range(0, inner, count):
                yield slice(o, o + 1), slice(i, i + count)
    else:
        for o in range(0, outer, count // inner):
            yield slice(o, o + count // inner), slice(None)


class Rows:
    """The rows of one call, (outer, inner), and their logits, (outer, inner, class)."""

    def __init__(self, problem, input, target, weight):
        self.problem = problem
        self.acc = accumulation_dtype(problem.dtype)
        self.input, q, self.layout = arrange(input, target if problem.probabilities else None)
        self.shape = (self.layout.outer, self.layout.inner)
        self.x = self.by_class(self.input, 0)
        self.weight = None if weight is None else weight.to(self.acc)
        self.ignored = self.point = self.index = self.q = None
        if problem.probabilities:
            self.q = self.by_class(q, 2)
        else:
            self.read_index(target)
        self.dense = problem.probabilities or problem.label_smoothing > 0

    def by_class(self, tensor, which):
        """A tensor of the input's shape as (outer, inner, class); `which` of the layout's strides it has."""
        shape = (*self.shape, self.layout.classes)
        return tensor.as_strided(shape, self.layout.strides[which], tensor.storage_offset())

    def by_row(self, tensor):
        """A tensor with one value for each row as (outer, inner)."""
        flat = tensor.reshape(-1)
        return flat.as_strided(
            self.shape,
            [s * flat.stride(0) for s in (self.layout.row_outer, self.layout.row_inner)],
            flat.storage_offset(),
        )

    def read_index(self, target):
        """Class indices; mask of the ignored rows, or None if there are none; mass at the index, (1 - eps) * w_t."""
        index = self.by_row(target).long()
        ignored = index == self.problem.ignore_index
        if ignored.any():
            self.ignored = ignored
            index = index.masked_fill(ignored, 0)
        self.index = index.unsqueeze(-1)
        self.point = torch.ones(self.shape, dtype=self.acc) if self.weight is None else self.weight[index]
        if self.ignored is not None:
            self.point.masked_fill_(ignored, 0)

    def normalizer(self):
        if self.problem.reduction != "mean":
            return 1.0
        return float(self.layout.rows) if self.problem.probabilities else self.point.sum()

    def walk(self, losses, gradient, upstream):
        """Fill `losses`, one for each row, and `gradient`; either may be None. `upstream` of None is 1."""
        scale = torch.ones((), dtype=self.acc) if upstream is None else upstream.to(self.acc)
        scale = (self.by_row(scale) if scale.dim() else scale).div(self.normalizer()).expand(self.shape)
        losses = None if losses is None else self.by_row(losses)
        g = None if gradient is None else self.by_class(gradient, 1)
        for part in blocks(self.shape, self.layout.classes * self.acc.itemsize):
            if self.ignored is not None and self.ignored[part].all():
                if g is not None:
                    g[part] = 0
                continue
            loss = self.block(part, None if g is None else g[part], scale[part])
            if losses is not None:
                losses[part] = loss

    def block(self, part, g, scale):
        """Losses of a block of rows; their gradient times `scale` is written to g, unless that is None."""
        x = self.x[part].to(self.acc)
        e = g if g is not None and g.dtype == self.acc else torch.empty_like(x)
        m = x.amax(-1)
        m.masked_fill_(m == -torch.inf, 0)
        ignored = None if self.ignored is None else self.ignored[part]

        mass = dot = 0
        if not self.problem.probabilities:
            index = self.index[part]
            point = self.point[part] * (1 - self.problem.label_smoothing)
            mass, dot = point, point * (x.gather(-1, index).squeeze(-1) - m)
        if self.dense:
            torch.sub(x, m.unsqueeze(-1), out=e)
            b = self.dense_mass(part)
            mass = mass + b.expand(e.shape).sum(-1)
            dot = dot + (b * e.sum(-1) if b.dim() == 0 else (b * e).sum(-1))
        s, total = self.exponentials(x, m, e)

        if g is not None:
            e.mul_((mass * scale / total).unsqueeze(-1))
            if self.dense:
                e.addcmul_(b, scale.unsqueeze(-1), value=-1)
            if not self.problem.probabilities:
                e.scatter_add_(-1, index, (point * -scale).unsqueeze(-1))
            if ignored is not None:
                e.masked_fill_(ignored.unsqueeze(-1), 0)
            if e is not g:
                g.copy_(e)
        loss = mass * s.log() - dot
        return loss if ignored is None else loss.masked_fill_(ignored, 0)

    def exponentials(self, x, m, e):
        """Write exp(x - m) times total / s to e; returns s and total. Where `dense`, e already holds x - m."""
        if not self.dense and x.shape[-1] >= SOFTMAX_WIDTH:
            torch.softmax(x, -1, out=e)
            return 1 / e.amax(-1), 1
        if not self.dense:
            torch.sub(x, m.unsqueeze(-1), out=e)
        s = e.exp_().sum(-1)
        return s, s

    def dense_mass(self, part):
        """The part of the target mass that every class has, as (), (C) or (outer, inner, C)."""
        eps = self.problem.label_smoothing
        b = torch.tensor(eps / self.layout.classes, dtype=self.acc)
        if self.problem.probabilities:
            b = b + (1 - eps) * self.q[part].to(self.acc)
        return b if self.weight is None else b * self.weight
