"""The last linear layer and the loss of its outputs, in chunks of rows: of the logits there is one chunk at a time.

For each chunk, in one buffer, the BLAS makes the logits z = x W^T + bias; the implementation of the loss, kernels or
blocks on a CPU, reads them and puts their gradient g in their place; and the BLAS makes g W, the gradient of these rows
of x, and g^T x, which is added to that of W. These are three products, as a layer and a loss apart have. Gradients for
other upstream gradients than a multiple of what was expected need the logits again, which is a fourth.

A row that is ignored takes no part in any product.
"""

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, checks, memory, parallel, plan, reference
from .gradients import made_for
from .layout import classes_here
from .problem import Kept, Layer, Problem, Tensors, Wanted
from .reference import accumulation_dtype

# So many classes of a chunk's gradient are widened at a time, where its product is wanted in a wider dtype on a CPU.
CLASSES_WIDENED = 2048
# So many rows of it, where it is summed in a wider dtype on a CPU: half the time of all rows of a chunk.
ROWS_WIDENED = 16


class Gradients(NamedTuple):
    """What of a call has a gradient, as bools; or the gradients, each None or in the shape of what it is of."""

    input: bool | Tensor | None = None
    sample_weight: bool | Tensor | None = None
    logit_scale: bool | Tensor | None = None
    weight: bool | Tensor | None = None
    bias: bool | Tensor | None = None

    def has_products(self):
        return self.input or self.weight or self.bias

    def each(self, function, *arguments):
        """What the function makes of each that there is."""
        return self._make([None if each is None else function(each, *arguments) for each in self])


@dataclass(frozen=True)
class Call:
    """What there is to a call besides its tensors."""

    problem: Problem  # the loss of logits (rows, classes)
    needed: Gradients
    dtype: torch.dtype  # of the logits, and of what is multiplied
    chunk_rows: int | None = None  # what the caller asks for
    accumulate_dtype: torch.dtype | None = None
    max_counted_rows: int | None = None

    @property
    def is_deferred(self):
        """Whether the gradients wait for backward, which makes the logits again."""
        return self.problem.reduction == "none"

    @property
    def wanted(self):
        """What of each chunk of logits is to be made."""
        slope = bool(self.needed.logit_scale)
        return Wanted(gradient=slope or bool(self.needed.has_products()), slope=slope, losses=self.needed.sample_weight)

    def rows_of_chunks(self, rows, layer):
        classes, features = layer.weight.shape
        if self.problem.ranks:  # the same on all of them, whose gathers must meet
            classes = -(-self.problem.num_classes // self.problem.ranks)
        if self.chunk_rows is not None:
            return max(min(self.chunk_rows, rows), 1)
        return plan.chunk_rows(
            rows, features, classes, self.dtype.itemsize, layer.weight.is_cpu, bool(self.needed.weight)
        )

    def total_dtype(self, rows, layer):
        """The dtype in which the weight's gradient is added up over the chunks."""
        if self.accumulate_dtype is not None:
            return self.accumulate_dtype
        few = -(-rows // self.rows_of_chunks(rows, layer)) <= plan.MOST_ROUNDED
        return self.dtype if few else accumulation_dtype(self.dtype)


class Made(NamedTuple):
    """What the forward pass makes: the gradients for the upstream gradient that was expected, and row losses."""

    gradients: Gradients
    losses: Tensor | None = None  # before `sample_weight` and the reduction
    summary: Tensor | None = None  # of each row, of all ranks that share the classes: (ranks, fields, rows)


# --- The two passes


def forward(call, tensors, layer, expected):
    """The loss, the statistics and `Made`.

    Gradients are made now if an upstream gradient is `expected`, a pair as in `xent_ext.expectation`.
    """
    problem, walk = call.problem, Walk(call, tensors, layer)
    wanted = call.wanted if expected is not None else Wanted(losses=call.wanted.losses)
    results = Results(walk, wanted.losses)
    sums = Sums(walk) if wanted.gradient else None
    inplace = walk.problem_of_chunk(inplace=wanted.gradient)
    losses = losses_of_slices if problem.ranks else losses_of_chunks
    for chunk, loss, stats, kept in losses(walk, inplace, wanted, expected):
        results.add(chunk, loss, stats, kept)
        if sums is not None:
            sums.add(chunk, kept)
    found = sums.gradients() if sums is not None else Gradients()
    made = Made(found, results.losses, results.summary)
    return results.loss().to(problem.dtype), tuple(results.stats.values()), made


def losses_of_chunks(walk, problem, wanted, expected):
    """For each chunk its loss, statistics and `Kept`."""
    for chunk in walk.chunks():
        loss, stats, kept = walk.setup_for(problem, chunk.tensors, wanted).forward(chunk.tensors, expected)
        yield chunk, loss, stats, Kept(*kept)


def losses_of_slices(walk, problem, wanted, expected):
    """The same where other ranks have other classes: a chunk's summaries travel while the next logits are made."""
    started = []
    for chunk in itertools.chain(walk.chunks(buffers=2), [None]):
        if chunk is not None:
            setup = walk.setup_for(problem, chunk.tensors, wanted)
            started.append((chunk, setup, setup.start(chunk.tensors)))
        if len(started) > 1 or (chunk is None and started):
            before, setup, summaries = started.pop(0)
            loss, stats, kept = setup.finish_started(summaries, expected)
            yield before, loss, stats, Kept(*kept)


def backward(call, tensors, layer, upstream, summary):
    """`Gradients` for these upstream gradients, but that of `sample_weight`: the logits are made again.

    `summary` is that of `Made`.
    """
    if call.problem.ranks:
        tensors = parallel.with_normalizer(call.problem, tensors, summary, tensors.target.shape[:1])
    walk = Walk(call, tensors, layer)
    sums, wanted = Sums(walk), call.wanted._replace(losses=False)
    problem = walk.problem_of_chunk(inplace=call.problem.ranks > 0 or not upstream.has_stats())
    for chunk in walk.chunks():
        here = upstream._make([chunk.of_rows(up) for up in upstream])
        if call.problem.ranks:
            setup = walk.setup_for(problem, chunk.tensors, wanted)
            kept = Kept(normalizer=chunk.tensors.normalizer, summary=summary[..., chunk.rows].contiguous())
            gradient, slope, _ = setup.backward(chunk.tensors, kept, here, None)
            sums.add(chunk, Kept(gradient, slope))
        else:
            sums.add(chunk, made_for(here, problem, chunk.tensors, wanted))
    return sums.gradients()


# --- What they walk over


class Chunk(NamedTuple):
    """Some rows of a call. `tensors` are theirs, with the logits as the input."""

    rows: slice | Tensor  # which of the call's
    input: Tensor  # of the layer
    tensors: Tensors

    def of_rows(self, values):
        """What of values by row belongs to these; a number belongs to all."""
        return values if values is None or not values.dim() else values[self.rows]

    def put(self, values, found):
        """Write what was found for these rows to the values of all."""
        if isinstance(self.rows, slice):
            values[self.rows].copy_(found)
        else:
            values.index_copy_(0, self.rows, found.to(values.dtype))


def is_read_freely(tensor):
    """Whether values of this tensor can be read without a wait for a device."""
    return tensor.is_cpu


class Walk:
    """A call's rows, chunk by chunk, and what is the same for all of them."""

    def __init__(self, call, tensors, layer):
        self.call, self.problem = call, call.problem
        self.given, self.device = layer, layer.weight.device
        self.classes = classes_here(call.problem, layer.weight.shape[0])
        self.layer = Layer(*[each if each is None else each[: self.classes].to(call.dtype) for each in layer])
        self.acc = accumulation_dtype(call.problem.dtype)
        self.counted = None if call.problem.probabilities else tensors.target != call.problem.ignore_index
        if call.problem.reduction == "mean" and tensors.normalizer is None:
            tensors = tensors._replace(normalizer=self.normalizer(tensors))
        self.tensors = tensors
        if is_read_freely(tensors.input) or backends.CHECK:
            self.check()
        self.index = self.index_of_counted()

    def new(self, *shape, dtype=None, fill=0):
        return torch.full(shape, fill, dtype=dtype or self.acc, device=self.device)

    def normalizer(self, tensors):
        """What the mean over all rows divides by."""
        ones = self.new(tensors.target.shape[0], fill=1)
        if not self.problem.ranks:
            return reference.mean_normalizer(self.problem, tensors, ones)
        here, is_part = parallel.normalizer_here(self.problem, tensors, ones)
        return parallel.sum_over_ranks(here, self.problem) if is_part else here

    def check(self):
        """Raise for class indices out of range, and for more rows than there are to be."""
        if self.counted is None:
            return
        classes = self.problem.num_classes or self.classes
        checks.bad_target(self.tensors.target, classes, self.problem.ignore_index)
        most, count = self.call.max_counted_rows, int(self.counted.sum())
        if most is not None and count > most:
            raise ValueError(f"max_counted_rows must be at least the number of rows that count, {count}, got {most}")

    def index_of_counted(self):
        """The rows that are computed, in order; None for all of them.

        On a CPU those that count. On a GPU, where their number is not known here, so many as there can be.
        """
        if self.counted is None:
            return None
        if is_read_freely(self.counted):
            index = self.counted.nonzero().squeeze(1)
            return None if index.numel() == self.counted.numel() else index
        most = self.call.max_counted_rows
        if most is None or most >= self.counted.numel():
            return None
        # uint8, as PyTorch sorts no bools on a GPU; stable, so that the rows keep their order.
        return torch.sort((~self.counted).to(torch.uint8), stable=True).indices[:most]

    @property
    def rows(self):
        """How many rows are computed."""
        return self.tensors.input.shape[0] if self.index is None else self.index.numel()

    def problem_of_chunk(self, inplace):
        """The loss of a chunk's logits: a part of the sum, over the normaliser of all rows for a mean."""
        classes = self.problem.num_classes if self.problem.ranks else 0  # a chunk has no columns of padding
        return replace(self.problem, dtype=self.acc, inplace=inplace, num_classes=classes)

    def setup_for(self, problem, tensors, wanted):
        return backends.implementation_of(problem, tensors.input).setup_for(problem, tensors, wanted)

    def chunks(self, buffers=1):
        """Each `Chunk`, in one of so many buffers by turns."""
        step = self.call.rows_of_chunks(self.rows, self.layer)
        made = [self.buffer(step) for _ in range(min(buffers, -(-self.rows // step)))]
        for first, buffer in zip(range(0, self.rows, step), itertools.cycle(made), strict=False):
            last = min(first + step, self.rows)
            rows = slice(first, last) if self.index is None else self.index[first:last]
            x = self.input_of(rows)
            logits = self.logits(x, buffer[: last - first])
            yield Chunk(rows, x, self.tensors_of(rows, logits))

    def buffer(self, rows):
        """Memory for the logits of so many rows."""
        buffer = torch.empty(rows, self.classes, dtype=self.call.dtype, device=self.device)
        if buffer.is_cpu:
            memory.on_huge_pages(buffer)
        return buffer

    def input_of(self, rows):
        """Those rows of the layer's input. Whatever an ignored one holds, it is 0 for the products."""
        x = self.tensors.input[rows].to(self.call.dtype)
        if self.counted is None or is_read_freely(x):  # all that are computed count
            return x
        return torch.where(self.counted[rows].unsqueeze(1), x, 0)

    def logits(self, x, out):
        if self.layer.bias is None:
            return torch.mm(x, self.layer.weight.t(), out=out)
        return torch.addmm(self.layer.bias, x, self.layer.weight.t(), out=out)

    def tensors_of(self, rows, logits):
        tensors = self.tensors
        f = tensors.sample_weight
        return tensors._replace(input=logits, target=tensors.target[rows], sample_weight=None if f is None else f[rows])


class Results:
    """The loss, and what there is by row."""

    def __init__(self, walk, with_losses):
        self.walk, problem = walk, walk.problem
        self.total = walk.new() if walk.index is None else self.of_missing(walk.counted.sum() > walk.rows)
        self.per_row = self.by_row(walk.acc) if problem.reduction == "none" else None
        self.losses = self.by_row(walk.acc) if with_losses else None
        self.summary = None
        if problem.ranks:
            fields = parallel.fields_of(problem, walk.tensors.weight is not None)
            self.summary = walk.new(problem.ranks, len(fields), walk.tensors.input.shape[0])
        self.stats = {name: self.by_row(reference.stat_dtype(name, walk.acc)) for name in problem.stats}

    @staticmethod
    def of_missing(missing):
        """0, and NaN where rows are missing: that count, but are beyond those that are computed."""
        return torch.where(missing, torch.nan, 0.0)

    def by_row(self, dtype):
        """Values for each row, as an ignored one has them."""
        walk = self.walk
        if dtype.is_floating_point and walk.index is not None:
            return self.of_missing(walk.counted).to(dtype)
        return walk.new(walk.tensors.input.shape[0], dtype=dtype, fill=-1 if dtype == torch.int64 else 0)

    def add(self, chunk, loss, stats, kept):
        """What was found for a chunk."""
        if self.per_row is None:
            self.total = self.total + loss
        else:
            chunk.put(self.per_row, loss)
        if self.losses is not None:
            chunk.put(self.losses, kept.losses)
        if self.summary is not None:
            self.summary[..., chunk.rows] = kept.summary
        for values, found in zip(self.stats.values(), stats, strict=True):
            chunk.put(values, found)

    def loss(self):
        if self.per_row is not None:
            return self.per_row
        if self.walk.rows:
            return self.total
        problem, normalizer = self.walk.problem, self.walk.tensors.normalizer  # of which it hangs whether 0 / 0 it is
        return reference.reduced(self.total, None, None, None, normalizer, problem.reduction, problem.on_all_ignored)


class Sums:
    """The gradients, as they grow chunk by chunk."""

    def __init__(self, walk):
        self.walk, needed, given = walk, walk.call.needed, walk.tensors.input
        self.input = self.weight = self.bias = self.slope = None
        if needed.input:
            self.input = torch.empty_like(given) if walk.index is None else torch.zeros_like(given)
        if needed.bias:
            self.bias = walk.new(walk.given.bias.shape[0], dtype=accumulation_dtype(walk.call.dtype))
        if needed.logit_scale:
            self.slope = walk.new()

    def add(self, chunk, kept):
        """Add the gradients of a chunk's rows."""
        needed, g = self.walk.call.needed, kept.gradient
        if needed.input:
            self.add_input(chunk, g)
        if needed.weight:
            self.add_weight(g, chunk.input)
        if needed.bias:
            add_sums(self.bias[: self.walk.classes], g)
        if needed.logit_scale:
            self.slope += kept.slope.sum()

    def add_input(self, chunk, g):
        weight = self.walk.layer.weight
        if isinstance(chunk.rows, slice) and self.input.dtype == g.dtype:
            torch.mm(g, weight, out=self.input[chunk.rows])
        else:
            made = g.new_empty(g.shape[0], weight.shape[1])
            chunk.put(self.input, torch.mm(g, weight, out=made))  # which autocast leaves alone

    def add_weight(self, g, x):
        """g^T x: the first chunk's is written, that of the others added."""
        beta = 1
        if self.weight is None:
            self.weight, beta = self.new_weight(), 0
        weight = self.weight[: self.walk.classes]
        if weight.dtype == g.dtype:
            weight.addmm_(g.t(), x, beta=beta)
        elif g.is_cuda:
            torch.addmm(weight, g.t(), x, out_dtype=weight.dtype, beta=beta, out=weight)
        else:
            add_widened(weight, g, x, beta)

    def new_weight(self):
        """Memory for the sum over the chunks of the weight's gradient; 0 where that is of padding."""
        total = self.walk.call.total_dtype(self.walk.rows, self.walk.layer)
        like = self.walk.given.weight
        kept = like.is_cpu and like.dtype == total
        weight = memory.empty_like(like) if kept else torch.empty_like(like, dtype=total)
        weight[self.walk.classes :].zero_()
        return weight

    def gradients(self):
        """`Gradients`, in the dtypes of the tensors."""
        weight, bias = self.walk.given
        if self.walk.call.needed.weight and self.weight is None:  # no row counts
            self.weight = torch.zeros_like(weight)
        return Gradients(
            input=self.input,
            logit_scale=self.slope,
            weight=None if self.weight is None else self.weight.to(weight.dtype),
            bias=None if self.bias is None else self.bias.to(bias.dtype),
        )


def add_sums(total, g):
    """total += the sums over the rows of g; on a CPU, which copies what it widens, of some rows at a time."""
    is_copied = g.is_cpu and g.dtype != total.dtype
    for part in g.split(ROWS_WIDENED) if is_copied else (g,):
        total += part.sum(0, dtype=total.dtype)


def add_widened(total, g, x, beta):
    """total = beta total + g^T x, multiplied in the wider dtype of `total`, on a CPU: some classes at a time."""
    x = x.to(total.dtype)
    for part, of_classes in zip(total.split(CLASSES_WIDENED), g.split(CLASSES_WIDENED, 1), strict=True):
        part.addmm_(of_classes.to(total.dtype).t(), x, beta=beta)


# --- What it costs


def traffic(call, tensors, layer):
    """`Traffic` of a call whose rows all count, forward and backward, without running it."""
    (rows, features), classes, item = tensors.input.shape, layer.weight.shape[0], call.dtype.itemsize
    step, needed = call.rows_of_chunks(rows, layer), call.needed
    chunks, total = -(-rows // step), call.total_dtype(rows, layer).itemsize
    inputs, weights, logits = rows * features * item, classes * features * item, rows * classes * item
    forwards = 2 if call.is_deferred and call.wanted.gradient else 1
    read = forwards * (inputs + chunks * weights + logits)
    written = (forwards + call.wanted.gradient) * logits
    if needed.input:
        read, written = read + logits + chunks * weights, written + inputs
    if needed.weight:
        sums = classes * features * total
        read, written = read + logits + inputs + (chunks - 1) * sums, written + chunks * sums
    given = Gradients(tensors.input, tensors.sample_weight, tensors.logit_scale, *layer)
    made = sum(each.numel() * each.element_size() for each, need in zip(given, needed, strict=True) if need)
    casts = sum(each.numel() * item for each in layer if each is not None and each.dtype != call.dtype)
    if needed.weight and total != layer.weight.element_size():
        casts += classes * features * total
    found = plan.Traffic(
        schedule="chunks of rows",
        numbers={"rows": step, "chunks": chunks, "products": forwards + bool(needed.input) + bool(needed.weight)},
        bytes_read=read,
        bytes_written=written,
        memory=made + casts + step * classes * item,
    )
    return parallel.with_collective(found, call.problem, tensors, rows) if call.problem.ranks else found
