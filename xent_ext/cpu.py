"""The loss on a CPU: PyTorch operators over blocks of rows that stay in cache.

The logits are read from memory once and the gradient is written once; all between happens in a block. The
formula is `xent_ext.reference`'s in the form of kernels/math.py, with m the maximum of a row's logits z:

    e = exp(z - m),  s = sum e,  mass = sum b,  dot = sum b * (z - m)
    row loss = mass * log(s) - dot,   row gradient = mass * e / s - b

With a z-loss, lse = m + log(s), the loss has z_loss * lse^2 more and the mass of the gradient 2 * z_loss * lse. What
turns logits into z, and gradients of statistics, add operators to a block only where they are asked for.

What belongs to a row is computed for all rows at once where it can be: an operator costs its dispatch for every
block.
"""

import itertools
import threading
from typing import NamedTuple

import torch

from . import checks
from .expectation import MOST_MISSES, compared
from .layout import arrange_call, batch_shape, gradient_memory, visible
from .plan import Traffic
from .problem import NUMBERS, Kept, Problem, Tensors, Upstream, Wanted, number
from .reference import accumulation_dtype

# Bytes of logits, in the dtype they are computed in, of one block: large enough that an operator on it outweighs its
# dispatch and its hand-over to the other threads, small enough for the last-level cache.
BLOCK_BYTES = 4 << 20
# From this width on torch.softmax, which takes row by row, beats a difference, an exponential and a sum by block.
SOFTMAX_WIDTH = 64
# Stands for z - m = -inf in the entropy, where its exponential is 0 in float64 too, and so is the product with this.
LOWEST = -1e4


def forward(problem, tensors, wanted, expected):
    """The loss, statistics, and for `backward` the gradient for the upstream gradient that is `expected`, if any.

    The gradient is made now where the reduction is "mean" or "sum", and a gradient is wanted.
    """
    checks.bad_class(problem, tensors)
    rows = Rows(problem, tensors)
    now = problem.reduction != "none"
    factor, misses = (None, 0) if expected is None else expected
    makes_gradient = wanted.gradient and now and expected is not None and misses < MOST_MISSES
    gradient = rows.gradient_memory() if makes_gradient else None
    losses, stats, slope = rows.walk(gradient, Upstream(factor), wanted.slope and makes_gradient, problem.stats)
    weighted = losses if rows.sample_weight is None else losses * rows.sample_weight
    loss = (weighted.sum() / rows.normalizer()).to(problem.dtype) if now else rows.in_batch(weighted, problem.dtype)
    kept = Kept(gradient, slope, losses=rows.in_batch(losses) if wanted.losses else None)
    return loss, tuple(rows.in_batch(values) for values in stats), kept


def backward(problem, tensors, wanted, kept, upstream, expected):
    """The gradient for `upstream`, the slopes that belong to it, and what to expect the next time.

    That is `kept.gradient`, the gradient for `expected`, as it is where `upstream` is the same; or else overwritten.
    """
    was_expected, seen = False, None
    if expected is not None and upstream.loss is not None and problem.reduction != "none":
        was_expected, seen = compared(upstream.loss, expected)
    ahead = kept.gradient is not None
    if ahead and was_expected and not upstream.has_stats():
        return kept.gradient, kept.slope, seen
    if problem.inplace:
        factor = upstream.loss.to(accumulation_dtype(problem.dtype)) / expected[0]
        return kept.gradient.mul_(factor), None if kept.slope is None else kept.slope * factor, seen
    rows = Rows(problem, tensors)
    gradient = kept.gradient if ahead else rows.gradient_memory()
    _, _, slope = rows.walk(gradient, upstream, wanted.slope)
    return gradient, slope, seen


class Setup(NamedTuple):
    """The two passes of all calls that are alike."""

    problem: Problem
    wanted: Wanted
    keeps: int = 3  # how many of `Kept`'s first fields there can be

    def forward(self, tensors, expected):
        return forward(self.problem, Tensors(*tensors), self.wanted, expected)

    def backward(self, tensors, kept, upstream, expected):
        return backward(self.problem, Tensors(*tensors), self.wanted, kept, upstream, expected)


def setup_for(problem, tensors, wanted):
    return Setup(problem, wanted)


def traffic(problem, tensors, want_gradient):
    """What a call moves and allocates, forward and backward, without running it."""
    x, _, layout = arrange_call(problem, tensors)
    acc, input, target = accumulation_dtype(problem.dtype), tensors.input, tensors.target
    block = min(rows_per_block(layout, acc), layout.rows)
    logits = layout.rows * layout.classes * input.element_size()
    gradient = input.numel() * input.element_size() if want_gradient else 0
    copies = 0 if x.data_ptr() == input.data_ptr() else logits
    buffers = not want_gradient or problem.reduction == "none" or input.dtype != acc
    buffers += (problem.softcap is not None) + ("entropy" in problem.stats)
    kept = buffers * block * layout.classes * acc.itemsize
    values = (len(RowValues._fields) + len(problem.stats)) * layout.rows * acc.itemsize
    walks = 2 if want_gradient and problem.reduction == "none" else 1
    return Traffic(
        schedule="blocks of rows",
        numbers={"rows": block, "blocks": -(-layout.rows // block)},
        bytes_read=walks * (logits + target.numel() * target.element_size()) + copies,
        bytes_written=gradient + copies,
        memory=(0 if problem.inplace else gradient) + copies + kept + values,
    )


def rows_per_block(layout, acc):
    return max(BLOCK_BYTES // (layout.classes * acc.itemsize), 1)


_kept = threading.local()


def buffer(like, dtype, name="memory"):
    """Memory of the shape and order of `like`, a block of logits, kept for the thread's next block and next call.

    The system's allocator hands memory of this size back at once, and to fault it in again costs more than to use it.
    There is one for each `name`.
    """
    size = like.numel() * dtype.itemsize
    memory = getattr(_kept, name, None)
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8)
        setattr(_kept, name, memory)
    _, inner, classes = like.shape
    order = (inner * classes, 1, inner) if like.stride(1) < like.stride(2) else (inner * classes, classes, 1)
    return memory[:size].view(dtype).as_strided(like.shape, order)


def gather(x, index, out):
    """x[..., index] by row: PyTorch's gather is quick where the dimension is not the last."""
    torch.gather(x.transpose(1, 2), 1, index.unsqueeze(1), out=out.unsqueeze(1))


def all_ignored(ignored, g):
    """Whether all rows of a block are, so that its logits need no reading; their gradient, if there is one, is kept."""
    if ignored is None or not ignored.all():
        return False
    if g is not None:
        g.zero_()
    return True


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

    def __init__(self, problem, tensors):
        self.problem, self.tensors = problem, tensors
        self.acc = accumulation_dtype(problem.dtype)
        self.input, q, self.layout = arrange_call(problem, tensors)
        self.shape = (self.layout.outer, self.layout.inner)
        self.weight = None if tensors.weight is None else tensors.weight.to(self.acc)
        self.x = self.by_class(self.input, 0)
        self.q = self.index = self.ignored = self.weights = self.sample_weight = None
        if problem.probabilities:
            self.q = self.by_class(q, 2)
        else:
            self.read_index(self.by_row(tensors.target).long())
        if tensors.sample_weight is not None:
            f = self.by_row(tensors.sample_weight)
            self.sample_weight = f if self.ignored is None else f.masked_fill(self.ignored, 0)
        self.scale, self.softcap, self.z_loss = (number(name, problem, tensors) for name in NUMBERS)
        self.scaled = tensors.logit_scale is not None or problem.logit_scale != 1
        self.dense = problem.probabilities or problem.label_smoothing > 0
        special = self.scaled or self.softcap or self.z_loss or problem.stats or problem.inplace
        self.by_softmax = not self.dense and self.layout.classes >= SOFTMAX_WIDTH and not special

    def gradient_memory(self):
        return gradient_memory(self.problem, self.tensors.input, self.input)

    def by_class(self, tensor, which):
        """A tensor of the visible input's shape as (outer, inner, class); `which` of the layout's strides it has."""
        shape = (*self.shape, self.layout.classes)
        return tensor.as_strided(shape, self.layout.strides[which], tensor.storage_offset())

    def by_row(self, tensor):
        """A tensor with one value for each row as (outer, inner)."""
        flat = tensor.reshape(-1)
        steps = [s * flat.stride(0) for s in (self.layout.row_outer, self.layout.row_inner)]
        return flat.as_strided(self.shape, steps, flat.storage_offset())

    def of_rows(self, tensor):
        """A tensor with one value for each row as (outer, inner), or a 0-dim one for all."""
        return self.by_row(tensor) if tensor.dim() else tensor

    def in_batch(self, values, dtype=None):
        """Values by row, (outer, inner), in the shape of the batch."""
        batch = torch.empty(batch_shape(visible(self.problem, self.tensors.input).shape), dtype=dtype or values.dtype)
        self.by_row(batch).copy_(values)
        return batch

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
        """What the sum of the row losses is divided by."""
        if self.problem.reduction != "mean":
            return 1.0
        normalizer, f = self.tensors.normalizer, self.sample_weight
        if normalizer is None and f is None:
            normalizer = float(self.layout.rows) if self.problem.probabilities else self.weights.sum()
        elif normalizer is None:
            normalizer = f.sum() if self.problem.probabilities else (f * self.weights).sum()
        if self.problem.on_all_ignored == "zero" and normalizer == 0:
            return torch.inf
        return normalizer

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

    def walk(self, gradient, upstream, with_slope=False, stats=()):
        """Row losses, the statistics `stats` and, if wanted, slopes, all (outer, inner) or None.

        The gradient for `upstream` is written, if one is wanted.
        """
        g = None if gradient is None else self.by_class(visible(self.problem, gradient), 1)
        values = torch.empty((len(RowValues._fields), *self.shape), dtype=self.acc)
        row = RowValues(*values.unbind())
        row.scale.copy_(0 if upstream.loss is None else self.of_rows(upstream.loss))
        row.scale.div_(self.normalizer())
        if self.sample_weight is not None:
            row.scale.mul_(self.sample_weight)
        row.point.copy_(0 if self.q is not None else self.weights * (1 - self.problem.label_smoothing))
        row.mass.copy_(row.point)
        extras = self.extras(upstream, with_slope, stats)
        if self.by_softmax:
            losses = self.walk_by_softmax(g, row)
        else:
            pieces = [self.blocks(tensor) for tensor in (self.x, g, self.q, self.index, self.ignored)]
            extra_pieces = zip(*map(self.blocks, extras.values()), strict=True) if extras else itertools.repeat(())
            for *tensors, block, more in zip(*pieces, self.blocks(values, 1), extra_pieces, strict=False):
                self.block(*tensors, RowValues(*block.unbind()), dict(zip(extras, more, strict=True)))
            losses = row.mass * row.s.log() - row.dot
        if self.z_loss:
            losses.add_(self.lse(row).square_(), alpha=self.z_loss)
        found = [self.stat(name, row, extras) for name in stats]
        return self.blanked(losses), found, self.blanked(extras.get("slope"))

    def extras(self, upstream, with_slope, stats):
        """What options ask a block to fill in, or to read, for each row; by name."""

        def empty(dtype=self.acc):
            return torch.empty(self.shape, dtype=dtype)

        found = {
            f"{name}_upstream": self.by_row(up.to(self.acc))
            for name, up in upstream._asdict().items()
            if name != "loss" and up is not None
        }
        if with_slope:
            found["slope"] = empty()
        if "entropy" in stats:
            found["entropy"] = empty()
        if "logprob" in stats and self.q is not None:
            found["logprob"] = empty()
        if "predicted" in stats or "correct" in stats:
            found["predicted"] = empty(torch.int64)
        if "correct" in stats:
            found["true"] = self.index if self.q is None else empty(torch.int64)
        return found

    def stat(self, name, row, extras):
        """The statistic `name`, (outer, inner)."""
        if name == "lse":
            value = self.lse(row)
        elif name == "max_prob":
            value = row.s.reciprocal()
        elif name == "logprob" and self.q is None:
            value = row.z - row.m - row.s.log()
        elif name == "correct":
            value = extras["predicted"] == extras["true"]
        else:
            value = extras[name]
        return self.blanked(value, -1 if name == "predicted" else 0)

    @staticmethod
    def lse(row):
        return row.s.log() + row.m

    def blanked(self, values, value=0):
        """Values by row, or None, with this one in ignored rows."""
        return values if self.ignored is None or values is None else values.masked_fill(self.ignored, value)

    def walk_by_softmax(self, g, row):
        """Row losses from the probabilities p_t at the class indices, which go to row.z.

        The gradient, p - one_hot times one number for each row, is written to g, unless that is None. With so little
        to compute a block's operators count, and only what needs its logits is done by block.
        """
        pieces = [self.blocks(tensor) for tensor in (self.x, g, self.ignored, self.index, row.z, row.point * row.scale)]
        for x, to, ignored, index, p, factor in zip(*pieces, strict=False):
            if all_ignored(ignored, to):
                continue
            e = self.memory(x, to)
            torch.softmax(x if x.dtype == self.acc else e.copy_(x), -1, out=e)
            gather(e, index, out=p)
            if to is None:
                continue
            e.transpose(1, 2).scatter_(1, index.unsqueeze(1), -1, reduce="add")
            e.mul_(factor.unsqueeze(-1))
            if ignored is not None:
                e.masked_fill_(ignored.unsqueeze(-1), 0)
            if e is not to:
                to.copy_(e)
        losses = row.mass * -row.z.log()
        self.correct_unlikely(losses, row)
        return losses

    def memory(self, x, g):
        """Where a block's exponentials go: its gradient, or a buffer, in which half precision is widened before."""
        return g if g is not None and x.dtype == self.acc else buffer(x, self.acc)

    def block(self, x, g, q, index, ignored, row, more):
        """Fill in the values of a block's rows; write their gradient to g, unless that is None."""
        if all_ignored(ignored, g):
            return
        e = self.memory(x, g)
        given = x
        if "slope" in more and e is g and self.problem.inplace:  # which needs the logits when they are overwritten
            given = buffer(x, self.acc, "given").copy_(x)
        if x.dtype != self.acc:
            x = e.copy_(x)
        z, capped = self.transformed(x, e)
        b = self.exponentials(z, e, q, index, row, more)
        if g is None:
            return
        self.scale_by_mass(e, q, row, more)
        if b is not None:
            e.addcmul_(b, row.scale.unsqueeze(-1), value=-1)
        if index is not None:
            point = row.point * -row.scale
            if "logprob_upstream" in more:
                point += more["logprob_upstream"]
            e.transpose(1, 2).scatter_add_(1, index.unsqueeze(1), point.unsqueeze(1))
        elif "logprob_upstream" in more:
            e.addcmul_(q.to(self.acc), more["logprob_upstream"].unsqueeze(-1))
        if capped is not None:
            e.mul_(capped.square_().neg_().add_(1))
        if "slope" in more:
            torch.sum(e * given, -1, out=more["slope"])
        if self.scaled:
            e.mul_(self.scale)
        if ignored is not None:
            e.masked_fill_(ignored.unsqueeze(-1), 0)
        if e is not g:
            g.copy_(e)

    def transformed(self, x, e):
        """z, in e where it is not x, and z / softcap if there is a cap."""
        cap = self.softcap
        if cap is None:
            return torch.mul(x, self.scale, out=e) if self.scaled else x, None
        capped = torch.mul(x, self.scale / cap, out=buffer(x, self.acc, "capped")).tanh_()
        return torch.mul(capped, cap, out=e), capped

    def correct_unlikely(self, losses, row):
        """Losses of the rows whose p_t, in row.z, is so small that it lost digits, or is 0, from their logits."""
        unlikely = row.z < torch.finfo(self.acc).max ** -0.75
        if self.ignored is not None:
            unlikely &= ~self.ignored
        found = unlikely.nonzero()
        for rows in found.split(rows_per_block(self.layout, self.acc)) if len(found) else ():
            at = rows.unbind(1)
            logp = self.x[at].to(self.acc).log_softmax(-1)
            losses[at] = row.mass[at] * -logp.gather(1, self.index[at].unsqueeze(1)).squeeze(1)

    def exponentials(self, z, e, q, index, row, more):
        """Write exp(z - m) to e, and mass, s and dot to the row; returns the dense mass, or None."""
        if "predicted" in more:
            torch.max(z, -1, out=(row.m, more["predicted"]))
        else:
            torch.amax(z, -1, out=row.m)
        if index is not None:
            gather(z, index, out=row.z)
            torch.mul(row.point, row.z - row.m, out=row.dot)
        torch.sub(z, row.m.unsqueeze(-1), out=e)
        b = None
        if self.dense:
            b = self.dense_mass(q)
            row.mass.add_(b.expand(e.shape).sum(-1))
            dot = b * e.sum(-1) if b.dim() == 0 else (b * e).sum(-1)
            row.dot.copy_(dot if index is None else dot.add_(row.dot))
        if more:
            self.statistics(e, q, row, more)
        else:
            torch.sum(e.exp_(), -1, out=row.s)
        return b

    def statistics(self, e, q, row, more):
        """Turn z - m in e into its exponentials and sum them, filling in what is asked for besides."""
        if "logprob" in more:
            torch.sum(q.to(self.acc) * e, -1, out=more["logprob"])
        if "true" in more and q is not None:
            torch.argmax(q, -1, out=more["true"])
        with_entropy = "entropy" in more or "entropy_upstream" in more
        if with_entropy:
            distance = torch.clamp(e, min=LOWEST, out=buffer(e, self.acc, "distance"))
        torch.sum(e.exp_(), -1, out=row.s)
        if "logprob" in more:
            more["logprob"].sub_(q.to(self.acc).sum(-1) * row.s.log())
        if with_entropy:
            more["distance"], more["mean_distance"] = distance, (distance * e).sum(-1).div_(row.s)
        if "entropy" in more:
            torch.sub(row.s.log(), more["mean_distance"], out=more["entropy"])

    def scale_by_mass(self, e, q, row, more):
        """Multiply the exponentials by what the gradient has of each p, over their sum."""
        mass = row.mass * row.scale
        if self.z_loss:
            mass += 2 * self.z_loss * self.lse(row) * row.scale
        if "lse_upstream" in more:
            mass += more["lse_upstream"]
        if "logprob_upstream" in more:
            mass -= more["logprob_upstream"] * (1 if q is None else q.to(self.acc).sum(-1))
        if "entropy_upstream" not in more:
            e.mul_((mass / row.s).unsqueeze(-1))
            return
        # d entropy / dz_c = -p_c * (distance_c - mean_distance)
        up, distance = more["entropy_upstream"], more["distance"]
        mass += up * more["mean_distance"]
        e.mul_(distance.mul_((-up / row.s).unsqueeze(-1)).add_((mass / row.s).unsqueeze(-1)))

    def dense_mass(self, q):
        """The mass that every class has beside the point mass, as (), (C) or (outer, inner, C)."""
        eps = self.problem.label_smoothing
        b = torch.tensor(eps / self.layout.classes, dtype=self.acc)
        if q is not None:
            b = b + (1 - eps) * q.to(self.acc)
        return b if self.weight is None else b * self.weight
