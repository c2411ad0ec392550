"""The last linear layer with its loss: from a call as it comes to who takes it."""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import agreement, backends, call, checks, dispatch, linear_autograd, memory, plan
from .call import Arguments, Options
from .linear import Call, Gradients
from .problem import CrossEntropyStats, Layer
from .reference import accumulation_dtype


class LinearArguments(NamedTuple):
    """What `torch.nn.functional.linear_cross_entropy` takes, in its order, and how the layer is computed."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None = None
    weight: Tensor | None = None
    reduction: str = "mean"
    ignore_index: int | None = -100
    label_smoothing: float = 0.0
    options: Any = None
    chunk_rows: int | None = None
    accumulate_dtype: torch.dtype | None = None
    max_counted_rows: int | None = None


def linear_cross_entropy(owner, arguments, options):
    """The loss of `LinearArguments` and `Options`, for the module `owner` or for none; with `return_stats` a pair."""
    if torch.compiler.is_compiling() and not backends.RECENT:
        return outside_graphs(owner, arguments, options)
    if backends.RECENT and any(map(dispatch.is_distributed, arguments[:2])) and arguments.linear_weight.dim() == 2:
        return of_shards(owner, arguments, options)
    if backends.CHECK and options.process_group is not None:
        agreement.check(options.process_group, lambda: rows_of(arguments, options).of_loss())
    rows = rows_of(arguments, options)
    if rows is None:
        return of_whole_logits(owner, arguments, options)
    name, _ = rows.route()
    if name == "torch":
        return rows.unfused(owner)
    return rows.whole(*linear_autograd.loss(owner, rows.call, rows.tensors, rows.layer))


# Breaks a graph that can't have it, which goes on after it.
outside_graphs = linear_cross_entropy if backends.RECENT else torch.compiler.disable(linear_cross_entropy)


def of_shards(owner, arguments, options):
    from . import sharded_layer  # which imports torch.distributed.tensor

    shards = sharded_layer.LayerShards(with_torch_options(arguments), options, rows_of)
    return shards.whole(linear_cross_entropy(owner, shards.arguments, shards.options))


def rows_of(arguments, options):
    """The `Rows` of a call, whose layer is checked; None for those that only whole logits are right for."""
    arguments = with_torch_options(arguments)
    dtype = dtype_of_products(arguments.input)
    checks.check_layer(arguments, dtype, is_cast(arguments.input))
    if arguments.linear_weight.dim() > 2 or any(map(makes_whole_logits, arguments[:3])):
        if options.process_group is not None or options.num_classes is not None:
            raise NotImplementedError(
                "process_group and num_classes need plain tensors, a linear_weight (C, D), and in a graph known sizes"
            )
        return None
    return Rows(arguments, options, dtype)


def makes_whole_logits(tensor):
    """Whether rows can't be taken from it: of a `DTensor`, a sparse tensor, or one of any size in a graph."""
    unknown = torch.compiler.is_compiling() and dispatch.has_unknown_size(tensor)
    return unknown or dispatch.is_distributed(tensor) or tensor.layout is not torch.strided


def with_torch_options(arguments):
    """With what `torch.nn.LinearCrossEntropyOptions` ask for, where nothing else does."""
    options = arguments.options
    if options is None:
        return arguments
    return arguments._replace(
        options=None,
        chunk_rows=arguments.chunk_rows or options.batch_chunk_size,
        accumulate_dtype=arguments.accumulate_dtype or options.acc_dtype,
    )


def dtype_of_products(input):
    """The dtype that the layer is computed in, as `F.linear` has it: under autocast another than the tensors'."""
    return torch.get_autocast_dtype(input.device.type) if is_cast(input) else getattr(input, "dtype", None)


def is_cast(input):
    """Whether autocast says what dtype a layer with this input is computed in."""
    return isinstance(input, Tensor) and call.is_autocast(input) and input.dtype != torch.float64


class Rows:
    """A call with a layer (classes, features), checked, with all that is by row in one dimension.

    What the loss asks of its logits is asked of a stand-in, which has their shape and next to no memory.
    """

    def __init__(self, arguments, options, dtype):
        self.names = checks.stat_names(options.return_stats)
        if options.shift:
            arguments, options = shifted(arguments, options)
        input, target, f = arguments.input, arguments.target, options.sample_weight
        classes, features = arguments.linear_weight.shape
        checks.check_targets_of_rows(input, classes, target, f)
        self.batch = input.shape[:-1]
        rows = math.prod(self.batch)  # torch.Size.numel would make a number of a dynamic size
        target = target.reshape(rows, classes) if target.shape == (*self.batch, classes) else target.reshape(-1)
        logits = input.new_empty((), dtype=dtype).expand(rows, classes)
        self.options = options._replace(
            dtype=options.dtype or accumulation_dtype(dtype),
            sample_weight=f.reshape(-1) if isinstance(f, Tensor) else f,
        )
        self.arguments = of_loss(arguments, logits, target)
        problem, tensors = call.prepare(self.arguments, self.options)
        self.tensors = tensors._replace(input=input.reshape(rows, features))
        self.layer = Layer(arguments.linear_weight, arguments.linear_bias)
        numbers = arguments.chunk_rows, arguments.accumulate_dtype, arguments.max_counted_rows
        self.call = Call(problem, self.needed(), dtype, *numbers)

    def needed(self):
        tensors = self.tensors
        given = Gradients(tensors.input, tensors.sample_weight, tensors.logit_scale, *self.layer)
        recorded = torch.is_grad_enabled()
        return Gradients(*[each is not None and recorded and each.requires_grad for each in given])

    def of_loss(self):
        """`Problem` and `Tensors` of the loss."""
        return self.call.problem, self.tensors._replace(input=self.arguments.input)

    def route(self):
        """(name of the implementation of the loss, or "torch" where the layer and the loss are apart; why)."""
        if not self.tensors.input.shape[-1]:
            return "torch", "the layer has no inputs"
        has_work = self.tensors.input.numel() > 0  # a slice of the classes may have no probabilities
        name, reason = dispatch.implementation_of((*self.tensors, *self.layer), has_work)
        if self.call.problem.ranks:
            dispatch.refuse_without_fused(name, reason)
        elif name != "torch" and self.is_small():
            return "torch", "logits of this size are made at once"
        return name, reason

    def is_small(self):
        """Whether chunks would save next to no memory, and take more time."""
        logits = self.arguments.input
        if torch.compiler.is_compiling() or self.call.chunk_rows is not None:
            return False
        if logits.numel() * logits.element_size() > plan.LEAST_CHUNK_BYTES:
            return False
        return not logits.is_cpu or not (self.has_large_gradient() or self.spares_products())

    def has_large_gradient(self):
        """Whether a gradient made in the forward pass is so large that its memory, as `memory` has it, saves time."""
        weight, call = self.layer.weight, self.call
        return call.needed.weight and not call.is_deferred and weight.numel() * weight.element_size() >= memory.MAPPED

    def spares_products(self):
        """Whether chunks, which leave out the rows that are ignored, would have much less to multiply."""
        problem, of_row = self.call.problem, self.layer.weight.numel()
        rows = self.tensors.input.shape[0]
        if problem.probabilities or rows * of_row < plan.LEAST_SPARED:
            return False
        counted = int((self.tensors.target != problem.ignore_index).sum())
        fourth = self.call.is_deferred and self.call.wanted.gradient  # product, which makes the logits again
        return (rows - (counted * 4 / 3 if fourth else counted)) * of_row >= plan.LEAST_SPARED

    def unfused(self, owner):
        """The layer, and then the loss."""
        logits = linear_autograd.logits_of(self.call, self.tensors, self.layer)
        arguments, options = self.arguments._replace(input=logits), self.options
        if options.num_classes is not None:  # of whose padding no logits are made
            arguments = arguments._replace(target=self.tensors.target, weight=self.tensors.weight)
            options = options._replace(num_classes=None)
        found = of_logits(owner, arguments, options)
        loss, stats = found if self.options.return_stats else (found, None)
        if stats is None:
            return self.by_row(loss)
        values = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
        return self.by_row(loss), CrossEntropyStats(**{name: self.by_row(value) for name, value in values.items()})

    def whole(self, loss, stats):
        """The loss, with its statistics where they are asked for."""
        if not self.names:
            return self.by_row(loss)
        found = {name: self.by_row(value) for name, value in zip(self.call.problem.stats, stats, strict=True)}
        return self.by_row(loss), call.statistics(self.names, self.call.problem, self.tensors.target, found)

    def by_row(self, values):
        """In the shape of the rows, if this is by row."""
        return values if values is None or not values.dim() else values.reshape(self.batch)


def of_loss(arguments, logits, target):
    """The `Arguments` of the loss."""
    ignore_index = -100 if arguments.ignore_index is None else arguments.ignore_index
    return Arguments(
        logits, target, arguments.weight, None, ignore_index, None, arguments.reduction, arguments.label_smoothing
    )


def shifted(arguments, options):
    """Without the last position of the input, and the first of what belongs to the position after it."""
    input, target, f = arguments.input, arguments.target, options.sample_weight
    checks.check_shift(input, target, f, classes=arguments.linear_weight.shape[0])
    return (
        arguments._replace(input=input[:, :-1], target=target[:, 1:]),
        options._replace(sample_weight=None if f is None else f[:, 1:], shift=False),
    )


def of_whole_logits(owner, arguments, options):
    """The layer, and then the loss, where rows can't be taken, or a row has several losses."""
    weight, bias = arguments.linear_weight, arguments.linear_bias
    if weight.dim() > 2:
        logits = F.linear(arguments.input, weight.flatten(0, -2), None if bias is None else bias.flatten())
        logits = logits.unflatten(-1, weight.shape[:-1])
    else:
        logits = F.linear(arguments.input, weight, bias)
    target = arguments.target
    if weight.dim() == 2 and logits.dim() > 2 and not options.shift:
        target = target.movedim(-1, 1) if target.shape == logits.shape else target
        logits = logits.movedim(-1, 1)
    options = options._replace(dtype=options.dtype or accumulation_dtype(logits.dtype))
    return of_logits(owner, of_loss(arguments, logits, target), options)


def of_logits(owner, arguments, options):
    """`cross_entropy`, as a plain call where nothing but a dtype is asked for, which is quicker."""
    if Options.that_differ(**options._asdict()) == {"dtype": options.dtype}:
        arguments, options = in_dtype(arguments, options.dtype), None
    return dispatch.cross_entropy(owner, arguments, options)


def in_dtype(arguments, dtype):
    """With logits of this dtype, and class weights where they must have that of the logits."""
    weight = arguments.weight
    if weight is not None and not arguments.target.is_floating_point():
        weight = weight.to(dtype)
    return arguments._replace(input=arguments.input.to(dtype), weight=weight)
