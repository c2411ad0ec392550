"""The calls of the cases of `verify`: their tensors, and what we, PyTorch and float64 make of them."""

import dataclasses

import torch
import torch.nn.functional as F

import xent_ext
from xent_ext import call, dispatch, expectation, memory, reference

from . import case as case_module
from . import peer
from .guard import Guard
from .verify_cases import Case
from .verify_errors import Found


def inputs(case: Case, device) -> dict:
    """Logits, target, and the other tensors of a call, by the names of its arguments."""
    batch, classes, *rest = case.shape if not case.options.get("shift") else transposed(case.shape)
    of_logits = peer.Case("verify", "", (batch, classes, *rest), case.dtype, "nograd", str(device))
    logits, target = next(case_module.inputs(of_logits, 1))
    draw = Draw(device)
    given = {"input": logits, "target": target_of(case, logits, target, draw)}
    made = {
        "weight": lambda: draw.uniform(classes).to(logits.dtype),
        "sample_weight": lambda: draw.uniform(*target.shape),
        "logit_scale": lambda: draw.uniform(),
        "normalizer": lambda: 1000 * draw.uniform(),
    }
    given |= {name: made[name]() for name in case.tensors}
    if case.options.get("shift"):
        given["input"] = logits.transpose(1, 2).contiguous()
    if case.layout == "repeated":
        given["input"] = logits[:1].expand_as(logits)
    if case.layout == "no batch":
        given |= {"input": logits[0], "target": given["target"][0]}
    return given


def transposed(shape):
    """(B, C, T) for the logits (B, T, C) of a call with `shift`."""
    return shape[0], shape[2], shape[1]


class Draw:
    """Random numbers on a device, the same in every run."""

    def __init__(self, device):
        self.on = {"device": device, "generator": torch.Generator(device).manual_seed(1)}

    def uniform(self, *shape):
        """Neither 0 nor large: in [0.1, 1.1)."""
        return torch.rand(shape, **self.on) + 0.1

    def normal(self, *shape):
        return torch.randn(shape, **self.on)


def target_of(case: Case, logits, target, draw: Draw):
    if case.target == "probabilities":
        return draw.normal(*logits.shape).softmax(1).to(logits.dtype)
    ignored = draw.uniform(*target.shape) < case.ignored + 0.1
    return target.masked_fill(ignored, -100) if case.target == "class" else target.to(torch.uint8)


LAYOUTS = {  # of logits (N, C): their strides, and the element of their memory at which they start
    "transposed": lambda n, c: ((1, n), 0),
    "padded": lambda n, c: ((c + 3, 1), 0),
    "stepped": lambda n, c: ((2 * c, 2), 0),
    "repeated": lambda n, c: ((0, 1), 0),
    "unaligned": lambda n, c: ((c, 1), 1),
}


def in_guard(case: Case, given: dict, guard: Guard) -> dict:
    """The tensors of a call, each in a buffer of its own; the logits laid out as the case asks."""
    stride, first = LAYOUTS.get(case.layout, lambda *shape: (None, 0))(*given["input"].shape[:2])
    return {
        name: guard.copy(values, stride, first) if name == "input" else guard.copy(values)
        for name, values in given.items()
    }


def options_of(case: Case) -> dict:
    options = dict(case.options)
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    return options


class Copied(torch.autograd.Function):
    """Logits that a model made, not a leaf: they may be overwritten."""

    @staticmethod
    def forward(ctx, leaf):
        return torch.empty_like(leaf).copy_(leaf)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def outcomes(function, case: Case, tensors: dict, options: dict) -> list[dict]:
    """For each upstream gradient: what the function returns, and the gradients, by name."""
    return [outcome(function, case, tensors, options, factor) for factor in case.upstreams]


def outcome(function, case: Case, tensors: dict, options: dict, factor: float) -> dict:
    leaves = {name: tensors[name].detach().requires_grad_() for name in case.gradients}
    given = tensors | leaves
    if options.get("inplace"):
        given["input"] = Copied.apply(given["input"])
    results = named(function(**given, **options))
    found = {name: values.detach() for name, values in results.items()}
    if leaves:
        found |= gradients(results, leaves, factor)
    return found


def named(returned) -> dict:
    """The loss, and the statistics where there are any."""
    if isinstance(returned, torch.Tensor):
        return {"loss": returned}
    loss, stats = returned
    return {"loss": loss} | {name: value for name, value in vars(stats).items() if value is not None}


def gradients(results: dict, leaves: dict, factor: float, **options) -> dict:
    """Those of the loss and of all statistics that have any, by upstream gradients that differ from row to row."""
    with_gradient = [values for values in results.values() if values.requires_grad]
    upstreams = [upstream_of(values, factor) for values in with_gradient]
    found = torch.autograd.grad(with_gradient, list(leaves.values()), upstreams, **options)
    return {f"gradient of {name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def upstream_of(values, factor: float):
    """Eighths, which every dtype has as they are; 1 for a loss that is one number."""
    rows = torch.arange(values.numel(), device=values.device).remainder(8).add(1).div(8) if values.dim() else 1.0
    return factor * (torch.ones_like(values) * (rows.view(values.shape) if values.dim() else rows)).to(values.dtype)


def ours(case: Case, given: dict, found: Found, function=xent_ext.cross_entropy) -> list[dict]:
    """Our own results of a call in guard zones, as a new process would have them."""
    forget()
    guard = Guard()
    tensors = in_guard(case, given, guard)
    with guard.allocations():
        results = outcomes(function, case, tensors, options_of(case))
    found.unharmed(guard)
    return results


def forget():
    """What was seen of earlier calls."""
    expectation.shared_expectation.cache_clear()
    dispatch.forget()
    memory.forget()


def theirs(case: Case, given: dict, function=None) -> list[dict]:
    """PyTorch's own: its loss, or the plain formula for what its loss does not have."""
    options = options_of(case)
    options.pop("inplace", None)
    return outcomes(function or (plain if case.trains else F.cross_entropy), case, given, options)


def truth(case: Case, given: dict, function=None) -> list[dict]:
    """The same in float64."""
    wide = {name: values.double() if values.is_floating_point() else values for name, values in given.items()}
    return theirs(dataclasses.replace(case, options=without(case.options, "dtype")), wide, function)


def without(options: dict, name: str) -> dict:
    return {key: value for key, value in options.items() if key != name}


def plain(input, target, weight=None, reduction="mean", label_smoothing=0.0, **options):
    """The specification, xent_ext.reference, for arguments as xent_ext.cross_entropy takes them."""
    arguments = call.Arguments(input, target, weight, reduction=reduction, label_smoothing=label_smoothing)
    options = call.Options(**options)
    problem, tensors = call.prepare(arguments, options)
    return dispatch.with_statistics(problem, tensors, options, *reference.compute(problem, tensors))


MISSING = 3  # rows


def with_missing_classes(given: dict) -> dict:
    """The same, but in the first rows a class beyond the last, one before the first, and one far away."""
    target = given["target"].clone()
    target[:MISSING] = torch.tensor([given["input"].shape[1], -1, 2**40], device=target.device)
    return given | {"target": target}


# The last linear layer


def inputs_of_layer(case: Case, device) -> dict:
    rows, features, classes = case.shape
    given = inputs(dataclasses.replace(case, shape=(rows, classes), tensors=()), device)
    draw, dtype = Draw(device), given["input"].dtype
    made = {
        "linear_bias": lambda: draw.normal(classes).to(dtype),
        "weight": lambda: draw.uniform(classes).to(dtype),
        "sample_weight": lambda: draw.uniform(rows),
    }
    return {
        "input": draw.normal(rows, features).to(dtype),
        "linear_weight": (case_module.LOGIT_SCALE * features**-0.5 * draw.normal(classes, features)).to(dtype),
        "target": given["target"],
        **{name: made[name]() for name in case.tensors},
    }


def from_logits(function, input, linear_weight, target, linear_bias=None, chunk_rows=None, **options):
    logits = F.linear(input, linear_weight, linear_bias)
    return function(logits.to(reference.accumulation_dtype(logits.dtype)), target, **options)
