"""Why a call runs as it does: `xent_ext.explain`."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn._reduction import get_enum

from . import autograd, backends, cpu_own, dispatch, linear, linear_call, reference
from .autograd import Held
from .call import Arguments, Options, prepare
from .linear_call import LinearArguments
from .plan import Traffic


@dataclass(frozen=True, repr=False)
class Explanation:
    """What `explain` returns, in words where it is shown or printed.

    The traffic is None where PyTorch's own or the plain formula takes the call. What is held from forward to backward
    is said as things are now, with the hooks that are active and the gradients that wait, and for an upstream gradient
    that is foreseen; it is None in a graph, and for the layer with its loss.
    """

    implementation: str  # "triton", "cpu", "torch" or "plain"
    reason: str
    traffic: Traffic | None = None
    held: Held | None = None

    def __repr__(self) -> str:
        lines = [f"implementation  {self.implementation}: {self.reason}"]
        if self.traffic:
            t = self.traffic
            numbers = ", ".join(f"{name} {value}" for name, value in t.numbers.items())
            lines += [
                f"schedule        {t.schedule}: {numbers}",
                f"bytes           {t.bytes_read:,} read, {t.bytes_written:,} written",
                f"memory          {t.memory:,} bytes, the gradient included",
            ]
            if t.sent:
                lines.append(
                    f"collective      summaries gathered: {t.sent:,} bytes sent to each rank, {t.received:,} received"
                )
        if self.held:
            count = "" if self.held.bytes is None else f"{self.held.bytes:,} bytes: "
            lines.append(f"held            {count}{self.held.what}")
        return "\n".join(lines)


def explain(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **options: Any,
) -> Explanation:
    """How `cross_entropy` would run this call, without running it: an `Explanation`, which says it where it is shown.

    Nothing is printed: in a script that is `print(xent_ext.explain(...))`.

    Takes the arguments of `xent_ext.cross_entropy` and raises its errors, but those for class indices out of range. Of
    a `DTensor` it takes a shard, and with a `process_group` this rank's slice, without a word to the others; in a
    compiled graph calls may run otherwise (see `xent_ext.ops`).
    The numbers count a gradient if `input` requires one (and gradients are enabled); bytes are those of the tensors,
    each counted as often as a schedule walks over it. On a GPU whose clusters have not been used yet, long rows make
    this try them on a few rows, as the call itself would.
    """
    if dispatch.is_distributed(input):
        raise TypeError("explain takes the tensors of one shard, not a DTensor: input.to_local(), ...")
    arguments = Arguments(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    given = Options.that_differ(**options)
    problem, tensors = prepare(arguments, Options(**given) if given else None)
    tensors = dispatch.plain(tensors)
    name, reason = dispatch.route(tensors, problem, bool(given))
    traffic = None
    if name in ("triton", "cpu"):
        want_gradient = torch.is_grad_enabled() and input.requires_grad
        traffic = backends.implementation_of(problem, tensors.input).traffic(problem, tensors, want_gradient)
    held = None if torch.compiler.is_compiling() else held_by(name, problem, tensors)
    return Explanation(name, reason, traffic, held)


def held_by(name, problem, tensors):
    """`Held`, by who takes the call."""
    if name in ("triton", "cpu"):
        implementation = backends.implementation_of(problem, tensors.input)
        return autograd.Loss(implementation, problem, tensors).held(tensors.input)
    return held_by_operators(name, problem, tensors)


def held_by_operators(name, problem, tensors):
    """`Held` where autograd records PyTorch's operators: what these save, for tensors without data."""
    what = {"torch": "what PyTorch's own saves", "plain": "what the plain formula saves"}[name]
    if dispatch.unsupported_here() or not all(t is None or is_plain(t) for t in tensors):
        return Held(None, what)
    is_small = dispatch.is_small(*tensors[:2], problem.reduction, problem.label_smoothing)
    saved = []
    with FakeTensorMode(), saved_tensors_hooks(saved.append, lambda _: None):
        given = tensors._make([None if t is None else without_data(t) for t in tensors])
        run(name, problem, given, is_small)
    if not saved:
        return Held(0, "no gradient is wanted")
    arguments = [storage_of(t) for t in given if t is not None]
    sizes = {storage_of(t): t.untyped_storage().nbytes() for t in saved}
    return Held(sum(size for storage, size in sizes.items() if storage not in arguments), what)


def is_plain(t):
    return type(t) in dispatch.PLAIN and t.layout is torch.strided


def storage_of(t):
    return t.untyped_storage()._cdata


def without_data(t):
    # PyTorch's meta functions take no uint8 as the index that its own loss takes.
    dtype = torch.int64 if t.dtype == torch.uint8 else t.dtype
    return torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=t.device, requires_grad=t.requires_grad)


def run(name, problem, tensors, is_small):
    """A call by PyTorch's operators, but for its reduction, which may ask for values on the host."""
    if name == "plain":
        return reference.compute(dataclasses.replace(problem, reduction="none"), tensors)
    given, ignore_index, label_smoothing = tensors[:3], problem.ignore_index, problem.label_smoothing
    if not is_small:
        return dispatch.pytorch(Arguments(*given, None, ignore_index, None, "none", label_smoothing))
    way = cpu_own.way(*given, get_enum(problem.reduction), label_smoothing)
    return way(*given, cpu_own.NONE, ignore_index, label_smoothing)


def explain_linear(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    options: Any = None,
    chunk_rows: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
    max_counted_rows: int | None = None,
    **others: Any,
) -> Explanation:
    """`explain` for `linear_cross_entropy`: its chunks, its matrix products, bytes and memory.

    Takes the arguments of `xent_ext.linear_cross_entropy` and raises its errors, but those for class indices out of
    range. All rows are taken to count. Bytes are those that products and losses read and write of tensors, each as
    often as a chunk does; what a product reads again to multiply it depends on the BLAS.
    """
    arguments = LinearArguments(
        input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options,
        chunk_rows, accumulate_dtype, max_counted_rows,
    )  # fmt: skip
    if "inplace" in others:
        raise TypeError("explain_linear() got an unexpected keyword argument 'inplace'")
    rows = linear_call.rows_of(arguments, Options(**others))
    if rows is None:
        return Explanation("torch", "all logits are made, for a weight (C, d1, ..., D), a DTensor or a sparse tensor")
    name, reason = rows.route()
    return Explanation(name, reason, None if name == "torch" else linear.traffic(rows.call, rows.tensors, rows.layer))
