"""The loss on a CPU: PyTorch operators over blocks of rows that stay in cache.

The logits are read from memory once and the gradient is written once; all between happens in a block: in `cpu_plain`
for the options that PyTorch has, in `cpu_options` for those for training.

What belongs to a row is computed for all rows at once where it can be: an operator costs its dispatch for every
block.
"""

import itertools
from typing import NamedTuple

import torch

from . import checks, cpu_options, cpu_plain, cpu_slices, memory
from .expectation import MOST_MISSES, compared
from .layout import arrange_call, batch_shape, gradient_memory, visible
from .plan import Traffic
from .problem import NUMBERS, Problem, Tensors, Upstream, Wanted, number
from .reference import accumulation_dtype

# Bytes of logits, in the dtype they are computed in, of one block, with one thread or two: large enough that an
# operator on it outweighs its dispatch (13 us for all of a block) and its hand-over to the other threads, small enough
# for the last-level cache. More threads have more cache, and want more to share: up to this many times as much.
BLOCK_BYTES = 4 << 20
MOST_SHARES = 8


def forward(problem, tensors, wanted, expected):
    """The loss, statistics, and for `backward` the gradient for the upstream gradient that is `expected`, if any.

    The gradient is made now where the reduction is "mean" or "sum", and a gradient is wanted.
    """
    rows = Rows(problem, tensors)
    now = problem.reduction != "none"
    factor, misses = (None, 0) if expected is None else expected
    makes_gradient = wanted.gradient and now and expected is not None and misses < MOST_MISSES
    gradient = rows.gradient_memory() if makes_gradient else None
    losses, stats, slope = rows.walk(gradient, Upstream(factor), wanted.slope and makes_gradient, problem.stats)
    weighted = losses if rows.sample_weight is None else losses * rows.sample_weight
    loss = (weighted.sum() / rows.normalizer()).to(problem.dtype) if now else rows.in_batch(weighted, problem.dtype)
    kept = gradient, slope, rows.in_batch(losses) if wanted.losses else None
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
    if problem.inplace and ahead:
        factor = upstream.loss.to(accumulation_dtype(problem.dtype)) / expected[0]
        return kept.gradient.mul_(factor), None if kept.slope is None else kept.slope * factor, seen
    rows = Rows(problem, tensors)
    gradient = kept.gradient if ahead else rows.gradient_memory()
    if problem.ranks:
        walk = cpu_slices.SliceWalk(rows, kept.summary)
        _, _, slope = walk.walk(rows.to_write(gradient), upstream, wanted.slope)
    else:
        _, _, slope = rows.walk(gradient, upstream, wanted.slope)
    return gradient, slope, seen


class Setup(NamedTuple):
    """The two passes of all calls that are alike."""

    problem: Problem
    wanted: Wanted

    def forward(self, tensors, expected):
        return forward(self.problem, Tensors(*tensors), self.wanted, expected)

    def backward(self, tensors, kept, upstream, expected):
        return backward(self.problem, Tensors(*tensors), self.wanted, kept, upstream, expected)


def setup_for(problem, tensors, wanted):
    return (SliceSetup if problem.ranks else Setup)(problem, wanted)


def traffic(problem, tensors, want_gradient):
    """What a call moves and allocates, forward and backward, without running it."""
    x, _, layout = arrange_call(problem, tensors)
    acc, input, target = accumulation_dtype(problem.dtype), tensors.input, tensors.target
    block = min(rows_per_block(layout, acc), layout.rows)
    logits = layout.rows * layout.classes * input.element_size()
    gradient = input.numel() * input.element_size() if want_gradient else 0
    copies = 0 if x.data_ptr() == input.data_ptr() else logits
    dense = want_gradient and (problem.probabilities or problem.label_smoothing > 0)
    per_row, of_slice = problem.reduction == "none", problem.ranks > 0
    buffers = dense + (not want_gradient or per_row or of_slice or input.dtype != acc or dense)
    buffers += (problem.softcap is not None) + ("entropy" in problem.stats)
    kept = buffers * block * layout.classes * acc.itemsize
    values = (2 + len(problem.stats)) * layout.rows * acc.itemsize
    walks = 2 if want_gradient and (per_row or of_slice) else 1
    return Traffic(
        schedule="blocks of rows",
        numbers={"rows": block, "blocks": -(-layout.rows // block)},
        bytes_read=walks * (logits + target.numel() * target.element_size()) + copies,
        bytes_written=gradient + copies,
        memory=(0 if problem.inplace else gradient) + copies + kept + values,
    )


def rows_per_block(layout, acc):
    size = BLOCK_BYTES * min(max(torch.get_num_threads() // 2, 1), MOST_SHARES)
    # Of few or of strided classes every row is gone over again and again: the smaller a block, the nearer its cache.
    # But what has fewer than 32768 elements PyTorch gives to one thread, such as one of ten classes to be copied.
    if layout.classes < cpu_plain.FEW_CLASSES:
        size = size * 3 // 8
    elif layout.strides[0][2] != 1:
        size //= 2
    return max(size // (max(layout.classes, 1) * acc.itemsize), 1)


class SliceSetup(NamedTuple):
    """The passes over a slice of the classes, of which other ranks have the rest (see `xent_ext.parallel`)."""

    problem: Problem
    wanted: Wanted

    def summarise(self, tensors, packed):
        """Write the summary of each row to `packed`, (fields, rows)."""
        cpu_slices.SliceWalk(Rows(self.problem, Tensors(*tensors))).summarise(packed)

    def forward(self, tensors, expected, gathered):
        """`Setup.forward`, with the summaries of all ranks, (ranks, fields, rows).

        The loss is that of each row for "none", else None: the row losses are among what is kept.
        """
        rows, stats = Rows(self.problem, Tensors(*tensors)), self.problem.stats
        gradient, factor = None, None
        if self.wanted.gradient and expected is not None and self.problem.reduction != "none":
            factor, misses = expected
            gradient = rows.gradient_memory() if misses < MOST_MISSES else None
        walk = cpu_slices.SliceWalk(rows, gathered)
        losses, stats, slope = walk.walk(rows.to_write(gradient), Upstream(factor), self.wanted.slope, stats)
        loss = None
        if self.problem.reduction == "none":
            weighted = losses if rows.sample_weight is None else losses * rows.sample_weight
            loss = rows.in_batch(weighted, self.problem.dtype)
        return loss, tuple(rows.in_batch(each) for each in stats), (gradient, slope, rows.in_batch(losses))

    def backward(self, tensors, kept, upstream, expected):
        return backward(self.problem, Tensors(*tensors), self.wanted, kept, upstream, expected)


def without_negative(index):
    """Some class indices in a buffer, with 0 for negative ones: a copy of all would be faulted in anew."""
    return torch.clamp(index, min=0, out=memory.buffer(index.shape, index.dtype, "index"))


class Rows:
    """The rows of one call, (outer, inner), and their logits, (outer, inner, class)."""

    def __init__(self, problem, tensors):
        self.problem, self.tensors = problem, tensors
        self.acc = accumulation_dtype(problem.dtype)
        self.input, q, self.layout = arrange_call(problem, tensors)
        self.shape = (self.layout.outer, self.layout.inner)
        self.rows_per_block = rows_per_block(self.layout, self.acc)
        self.classes = problem.num_classes if problem.ranks else self.layout.classes  # those of other ranks included
        self.weight = None if tensors.weight is None else tensors.weight.to(self.acc)
        self.x = self.by_class(self.input, 0)
        self.q = self.index = self.here = self.ignored = self.counted = self.weights = self.sample_weight = None
        self.has_negative = False  # of the ignored rows, to be overlooked: see `blocks`
        if problem.probabilities:
            self.q = self.by_class(q, 2)
        else:
            self.read_index(self.by_row(tensors.target).long())
        if tensors.sample_weight is not None:
            self.sample_weight = self.by_row(tensors.sample_weight)
            if self.ignored is not None:
                self.sample_weight = self.sample_weight.masked_fill(self.ignored, 0)
        self.scale, self.softcap, self.z_loss = (number(name, problem, tensors) for name in NUMBERS)
        self.scaled = tensors.logit_scale is not None or problem.logit_scale != 1
        self.dense = problem.probabilities or problem.label_smoothing > 0
        self.plain = not (self.scaled or self.softcap or self.z_loss or problem.stats or problem.inplace)

    def gradient_memory(self):
        return gradient_memory(self.problem, self.tensors.input, self.input, memory.empty_like)

    def to_write(self, gradient):
        """A gradient, or None, as (outer, inner, class)."""
        return None if gradient is None else self.by_class(visible(self.problem, gradient), 1)

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
        """Class indices; mask of the ignored rows, or None if there are none; the rows' weights, or None if all are 1.

        IndexError for an index that is no class.
        """
        low, high = (value.item() for value in torch.aminmax(index))
        if low <= self.problem.ignore_index <= high:
            self.ignored = index == self.problem.ignore_index
            counted = ~self.ignored
            self.counted = counted.to(self.acc)
            if self.problem.ignore_index < 0 and (index < 0).count_nonzero() == self.ignored.count_nonzero():
                low, self.has_negative = 0, True
            else:  # a product: to fill, or to choose, by a mask that no one foresees takes three times as long
                index = index * counted
                low, high = (value.item() for value in torch.aminmax(index))
        if low < 0 or high >= self.classes:
            checks.bad_class(self.problem, self.tensors)  # raises
        self.index = index
        if self.problem.ranks:
            self.index, self.has_negative = self.of_slice(index), False
        self.weights = self.counted if self.weight is None or not self.layout.classes else self.weights_of_index()

    def weights_of_index(self):
        """The rows' weights, (outer, inner)."""
        weights = torch.empty(self.shape, dtype=self.acc)
        for index, some in zip(*map(self.blocks, (self.index, weights)), strict=True):
            torch.index_select(self.weight, 0, index.reshape(-1), out=some.view(-1))
        return self.cleared_(weights)

    def of_slice(self, index):
        """Class indices among the classes that are here, 0 where they are not; notes which are."""
        index = index - self.problem.class_start
        here = (index >= 0) & (index < self.layout.classes)
        self.here = here.to(self.acc)
        return index * here

    def normalizer(self):
        """What the sum of the row losses is divided by."""
        if self.problem.reduction != "mean":
            return 1.0
        normalizer, f, weights = self.tensors.normalizer, self.sample_weight, self.weights
        if normalizer is None and f is None:
            normalizer = float(self.layout.rows) if weights is None else weights.sum()
        elif normalizer is None:
            normalizer = f.sum() if weights is None else (f * weights).sum()
        if self.problem.on_all_ignored == "zero" and normalizer == 0:
            return torch.inf
        return normalizer

    def upstream_scale(self, upstream):
        """The upstream gradient of the loss over the normaliser, for each row or, 0-dim, for all."""
        scale = self.of_rows(upstream).to(self.acc) / self.normalizer()
        return scale if self.sample_weight is None else scale * self.sample_weight

    def finite_if_ignored(self, scale):
        """A scale whose product with the weights of ignored rows, 0, is 0."""
        if self.ignored is None or (scale.dim() == 0 and scale.isfinite()):
            return scale
        return scale.expand(self.shape).masked_fill(self.ignored, 0)

    def point_mass(self):
        """The mass at each row's class index beside the dense mass, (outer, inner) or 0-dim."""
        point = torch.tensor(1 - self.problem.label_smoothing, dtype=self.acc)
        if self.here is not None:
            point = point * self.here
        return point if self.weights is None else self.weights * point

    def smoothing_mass(self):
        """The mass that smoothing gives to every class, (class) or 0-dim."""
        mass = torch.tensor(self.problem.label_smoothing / self.classes, dtype=self.acc)
        return mass if self.weight is None else mass * self.weight

    def smoothed(self, q, out=None):
        """Probabilities that are smoothed."""
        eps = self.problem.label_smoothing
        return torch.add(torch.tensor(eps / self.classes, dtype=self.acc), q, alpha=1 - eps, out=out)

    def cleared_(self, values, value=0):
        """Values by row, which are changed, or None: with this one in ignored rows."""
        if self.ignored is None or values is None:
            return values
        if value == 0 and values.is_floating_point():
            values.mul_(self.counted)
            if not values.sum().isnan():  # as it is where an ignored row's is no number, or infinite
                return values
        return values.masked_fill_(self.ignored, value)

    def block_shape(self):
        """(outer, inner, class) of the largest block."""
        outer, inner, _ = next(iter(self.blocks(self.x))).shape
        return outer, inner, self.layout.classes

    def by_block(self, g, *tensors):
        """For each block its logits, its gradient to be written or None, its ignored rows, its pieces of the tensors.

        A block of ignored rows alone is left out, so that its logits are not read; its gradient is written here.
        """
        for x, to, ignored, *rest in zip(*map(self.blocks, (self.x, g, self.ignored, *tensors)), strict=False):
            if ignored is None or not ignored[0, 0] or not ignored.all():
                yield x, to, ignored, *rest
            elif to is not None:
                to.zero_()

    def blocks(self, tensor, dim=0):
        """The pieces of a tensor (..., outer, inner, ...), with outer at `dim`, for one block each.

        A block is some outers, or a part of one. What is one for all rows, or None, is there for every block. Class
        indices are all of classes: in an ignored row of the first.
        """
        if tensor is self.index and self.has_negative:
            return map(without_negative, self.pieces(tensor, dim))
        return self.pieces(tensor, dim)

    def pieces(self, tensor, dim):
        if tensor is None or not tensor.dim():
            return itertools.repeat(tensor)
        outer, inner = self.shape
        rows = self.rows_per_block
        if outer * inner <= rows:
            return (tensor,)
        if inner <= rows:
            return tensor.split(rows // inner, dim)
        return [piece for one in tensor.split(1, dim) for piece in one.split(rows, dim + 1)]

    def walk(self, gradient, upstream, with_slope=False, stats=()):
        """Row losses, the statistics `stats` and, if wanted, slopes, all (outer, inner) or None.

        The gradient for `upstream` is written, if one is wanted.
        """
        g = self.to_write(gradient)
        if not self.plain or upstream.has_stats() or with_slope:
            return cpu_options.walk(self, g, upstream, with_slope, stats)
        return cpu_plain.walk(self, g, None if g is None else self.upstream_scale(upstream.loss)), (), None
