"""The options that PyTorch has, on a CPU: by its softmax, or its log-softmax, of a block of rows.

Either is one operator, and faster than `torch.exp` alone. With a gradient and class indices the block becomes p, of
which the loss is -log p_t and the gradient p less one at t: by PyTorch's softmax, or, where that is slow, by exp2.
Without a gradient, and where all classes have target mass, it becomes log p, which is summed with the masses.

A block's classes are in memory where those operators want them: last, (outer, inner, class), or before the rows,
(outer, class, inner). Either way a row's target is one place in the block as a flat array, which index_select and
scatter_add find in half the time that gather and scatter take along a dimension.
"""

import math

import torch

from .memory import buffer

# A row of fewer classes does not fill a vector register, and PyTorch's softmax of such rows takes 12 to 20 ns a logit
# (0.9 from 16 floats on, with AVX-512). To bring a block of them into the order (class, row) and back takes 0.5 to 1.1,
# and the softmax of that 0.5 to 0.7.
FEW_CLASSES = 16
# Rows of so many bytes are brought into another order class by class: of 2 floats in 0.25 ns a logit, of 10 in 0.45,
# where PyTorch's quick way takes 1.7 and 0.6.
MOST_BY_CLASS = 48
# PyTorch's softmax of a shorter row takes 0.6 to 1.5 ns a logit, its log-softmax and exp2 of that 0.6 to 1.0. Of
# classes before the rows it takes 0.64, and `less_maximum` with exp2 and a sum 0.43.
LONG_ROW = 64
LOG2_E = math.log2(math.e)


def walk(rows, g, scale):
    """Row losses, (outer, inner), before `sample_weight`.

    The gradient is written to g, (outer, inner, class), unless that is None. `scale` is then the upstream gradient over
    the normaliser, 0-dim or (outer, inner).
    """
    order, scale = Order(rows), None if g is None else rows.finite_if_ignored(scale)
    return rows.cleared_((walk_dense if rows.dense else walk_indices)(rows, order, g, scale))


def walk_indices(rows, order, g, scale):
    """`walk` for class indices alone, whose losses and gradient are those of weight 1 times the rows' weights."""
    logp = torch.empty(rows.shape, dtype=rows.acc)
    function = torch.log_softmax if g is None else order.function()
    sums = torch.empty(rows.shape, dtype=rows.acc) if function is less_maximum else None
    minus_one = torch.tensor(-1, dtype=rows.acc)
    for x, to, ignored, index, found, s, f, weights in rows.by_block(g, rows.index, logp, sums, scale, rows.weights):
        block = order.made(function, x, to)
        places = order.places(index)
        torch.index_select(block.view(-1), 0, places, out=found.view(-1))
        if to is None:
            continue
        f, at_index = f if weights is None else f * weights, minus_one
        if function is torch.softmax:
            log_of_(found, block, x, index)
        else:
            exp_(block)
        if s is not None:  # the block is p times s
            torch.sum(block, order.axis, out=s)
            f, at_index = f / s, -s
        add(block, places, at_index)
        order.store_times(block, f, to)
        clear_ignored(to, ignored, found if s is None else s)
    if sums is not None:
        logp.sub_(sums.log_())
    return logp.neg_() if rows.weights is None else logp.neg_().mul_(rows.weights)


def log_of_(p_t, p, x, index):
    """log p of the targets in place of p: from the logits, where one is so small that it lost digits, or is 0."""
    if p_t.amin() >= torch.finfo(p.dtype).max ** -0.75:
        p_t.log_()
    else:
        x_t = x.gather(2, index.unsqueeze(2)).squeeze(2).to(p.dtype)
        torch.sub(x_t, x.amax(2), out=p_t).add_(p.amax(2).log_())


def exp_(block):
    """e to the power of each value, in its place, in 0.2 ns for each: `torch.exp` takes 0.6, or 12 where it is 0."""
    return block.mul_(LOG2_E).exp2_()


def less_maximum(x, axis, out):
    """x less its largest value along a dimension: log p, but for the logarithm of the sum of its exponentials."""
    return torch.sub(x, x.amax(axis, keepdim=True), out=out)


def walk_dense(rows, order, g, scale):
    """`walk` for probabilities and for smoothed class indices."""
    losses = torch.empty(rows.shape, dtype=rows.acc)
    point = rows.point_mass()
    tensors = (rows.q, rows.index, losses, scale, rows.counted, point)
    for x, to, ignored, q, index, loss, f, counted, at_index in rows.by_block(g, *tensors):
        logp = order.made(torch.log_softmax, x, None)
        b = order.dense_mass(q)
        loss.copy_(order.summed(logp, b))
        if index is not None:
            places = order.places(index)
            loss.addcmul_(logp.view(-1).index_select(0, places).view(loss.shape), at_index)
        if to is None:
            continue
        f = f if counted is None else f * counted
        upstream = torch.mul(b.expand(logp.shape), -order.by_row(f), out=buffer(logp.shape, logp.dtype, "mass"))
        if index is not None:
            add(upstream, places, -at_index * f)
        block = order.memory(logp, to, "scratch")
        torch._log_softmax_backward_data(upstream, logp, order.axis, logp.dtype, out=block)
        order.store(block, to)
        clear_ignored(to, ignored, loss)
    return losses.neg_()


def add(block, places, values):
    """Add values by row, or one for all rows, at their places in a block as a flat array."""
    block.view(-1).scatter_add_(0, places, values.reshape(-1) if values.dim() else values.expand(places.shape))


def clear_ignored(g, ignored, found):
    """Ignored rows have the factor 0, and a gradient of 0 but where their logits make NaN, and NaN of what is found."""
    if ignored is not None and found.sum().isnan():
        g.masked_fill_(ignored.unsqueeze(-1), 0)


class Order:
    """The order of memory in which a call's blocks are computed; `axis` is their classes' dimension."""

    def __init__(self, rows):
        self.rows, self.acc = rows, rows.acc
        _, inner_stride, class_stride = rows.layout.strides[0]
        strided = rows.layout.inner > 1 and class_stride != 1 and inner_stride < class_stride
        # Down a column PyTorch's backward adds up one after the other, which rounds more than it does along a row:
        # there it goes where PyTorch itself would take rows.
        strided = strided and not (rows.dense and rows.input.dim() <= 2)
        self.axis = 1 if strided or rows.layout.classes < FEW_CLASSES else 2
        if rows.index is not None:
            self.first = self.first_places(*rows.block_shape())
        if rows.dense:
            self.smoothing, self.weight = self.of_classes(rows.smoothing_mass()), self.of_classes(rows.weight)

    def first_places(self, outer, inner, classes):
        """For each row where its first class is in a block as a flat array."""
        step = 1 if self.axis == 1 else classes
        within = torch.arange(0, inner * step, step).unsqueeze(0)
        return within if outer == 1 else within + torch.arange(outer).mul_(inner * classes).unsqueeze(1)

    def of_classes(self, values):
        """Values by class, one for all, or None, to be combined with a block."""
        return values.unsqueeze(1) if self.axis == 1 and values is not None and values.dim() else values

    def places(self, index):
        """Where the rows' classes of these indices are in a block as a flat array."""
        outer, inner = index.shape
        return torch.add(self.first[:outer, :inner], index, alpha=inner if self.axis == 1 else 1).view(-1)

    def ordered(self, tensor):
        """(outer, inner, class) as a block has it."""
        return tensor.transpose(1, 2) if self.axis == 1 else tensor

    def by_row(self, values):
        """Values by row, or one for all, to be combined with a block."""
        return values.unsqueeze(self.axis) if values.dim() else values

    def is_across(self, tensor):
        """Whether a block has the rows innermost in memory where this, in its order, has the classes."""
        return self.axis == 1 and tensor.stride(1) < tensor.stride(2)

    def function(self):
        """What makes the block of a gradient: p, log p or, where `less_maximum` is quicker, without the sum."""
        if self.axis == 1 and self.rows.layout.classes >= FEW_CLASSES:
            return less_maximum
        return torch.log_softmax if self.rows.layout.classes < LONG_ROW else torch.softmax

    def made(self, function, x, g):
        """A contiguous block that a function makes of x: in the gradient's place, if it is such a block."""
        # A softmax does not have x in the block itself: in place it takes up to twice the time.
        x = self.ordered(x) if function is less_maximum and x.dtype == self.acc else self.loaded(x, "scratch")
        return function(x, self.axis, out=self.memory(x, g, "block"))

    def memory(self, like, g, name):
        """Where a block can be made: in its gradient, if that is contiguous in order and dtype, or in a buffer."""
        to = None if g is None else self.ordered(g)
        if to is not None and to.dtype == self.acc and to.is_contiguous():
            return to
        return buffer(like.shape, self.acc, name)

    def loaded(self, x, name):
        """x as a contiguous block in the dtype that is computed in: as it is, or in the buffer of this name."""
        x = self.ordered(x)
        if x.dtype == self.acc and x.is_contiguous():
            return x
        if not self.is_across(x):
            return buffer(x.shape, self.acc, name).copy_(x)
        if x.dtype != self.acc:
            x = copy_across(x, buffer(x.shape, x.dtype, "narrow"))
            return buffer(x.shape, self.acc, name).copy_(x)
        return copy_across(x, buffer(x.shape, self.acc, name))

    def store(self, block, g):
        """Write a block to its gradient, where it is not there."""
        to = self.ordered(g)
        if self.is_across(to):
            if block.dtype != g.dtype:
                block = buffer(block.shape, g.dtype, "narrow").copy_(block)
            copy_across(self.ordered(block), g)
        elif block.data_ptr() != to.data_ptr():
            to.copy_(block)

    def store_times(self, block, factor, g):
        """Write a block times a factor for each row, or one for all, to its gradient."""
        to = self.ordered(g)
        if block.dtype == to.dtype and not self.is_across(to):
            torch.mul(block, self.by_row(factor), out=to)
        else:
            self.store(block.mul_(self.by_row(factor)), g)

    def dense_mass(self, q):
        """The mass that every class has beside the point mass, to be combined with a block."""
        if q is None:
            return self.smoothing
        q = self.loaded(q, "mass")
        mass = buffer(q.shape, self.acc, "mass")
        if self.rows.problem.label_smoothing > 0:
            q = self.rows.smoothed(q, out=mass)
        return q if self.weight is None else torch.mul(q, self.weight, out=mass)

    def summed(self, block, b):
        """Sums by row of the block's values, each times its class's dense mass."""
        if b.dim() == 0:
            return block.sum(self.axis).mul_(b)
        return torch.mul(block, b, out=buffer(block.shape, block.dtype, "scratch")).sum(self.axis)


def copy_across(source, to):
    """Copy to contiguous memory in another order."""
    few = 1 if to.shape[1] < to.shape[2] else 2
    if to.shape[few] * to.element_size() <= MOST_BY_CLASS:
        for one, other in zip(to.unbind(few), source.unbind(few), strict=True):
            one.copy_(other)
    elif to[0].numel() < 3600:
        to.copy_(source)
    else:  # PyTorch has a quick way for two dimensions of 60 x 60 or more
        for one, other in zip(to, source, strict=True):
            one.copy_(other)
    return to
