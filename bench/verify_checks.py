"""How the cases of `verify` are examined: functions of (case, device, found), of which each case names one."""

import contextlib
import functools
from dataclasses import replace

import torch
import torch.nn.functional as F

import xent_ext
from xent_ext import backends

from . import overhead
from . import verify_calls as calls
from .guard import Guard
from .verify_cases import Case
from .verify_errors import Found, LeftOut


def loss(case: Case, device, found: Found):
    """The results beside PyTorch's own and the truth, the same bits twice, and nothing written elsewhere."""
    given = calls.inputs(case, device)
    with forcing(case):
        planned(case, given, found)
        first, second = calls.ours(case, given, found), calls.ours(case, given, found)
    for one, other in zip(first, second, strict=True):
        found.same("in a second run", one, other)
    for results in zip(first, calls.theirs(case, given), calls.truth(case, given), strict=True):
        found.close(*results)


def second_device(case: Case, device, found: Found):
    """`loss` on a device that is not the current one."""
    loss(case, torch.device(device.type, 1), found)


def second_backward(case: Case, device, found: Found):
    """Several backward passes of one forward pass."""
    given = calls.inputs(case, device)
    calls.forget()
    leaves = {"input": given["input"].detach().requires_grad_()}
    results = {"loss": xent_ext.cross_entropy(**given | leaves)}
    for factor, *expected in zip(case.upstreams, calls.theirs(case, given), calls.truth(case, given), strict=True):
        found.close(results | calls.gradients(results, leaves, factor, retain_graph=True), *expected)


def out_of_range(case: Case, device, found: Found):
    """Rows whose class does not exist are NaN, in loss and gradient, and the others as if these were not there."""
    given = calls.inputs(case, device)
    missing = calls.with_missing_classes(given)
    if device.type == "cpu" and backends.BACKEND != "triton":
        return raises_index_error(missing, found)
    with forcing(case):
        planned(case, given, found)
        (results,) = calls.ours(case, missing, found)
    for name, values in results.items():
        if not values[: calls.MISSING].isnan().all():
            found.problem(f"{name}: not NaN for a class out of range")
    of_good_rows = [{name: values[calls.MISSING :] for name, values in each.items()}
                    for each in (results, *calls.theirs(case, given), *calls.truth(case, given))]  # fmt: skip
    found.close(*of_good_rows)


def raises_index_error(given: dict, found: Found):
    try:
        xent_ext.cross_entropy(**given)
        found.problem("no IndexError for a class out of range")
    except IndexError:
        pass


def layer(case: Case, device, found: Found):
    """The last linear layer with its loss, beside F.linear with PyTorch's loss or the plain formula."""
    given = calls.inputs_of_layer(case, device)
    (first,), (second,) = (calls.ours(case, given, found, xent_ext.linear_cross_entropy) for _ in range(2))
    found.same("in a second run", first, second)
    found.plan = xent_ext.explain_linear(**given, **case.options).implementation
    by_logits = functools.partial(calls.from_logits, calls.plain if case.trains else F.cross_entropy)
    results = first, *calls.theirs(case, given, by_logits), *calls.truth(case, given, by_logits)
    found.close(*map(as_one_row, results))


def as_one_row(results: dict) -> dict:
    """Gradients are sums of products, of which any can be small by chance."""
    return {name: values.reshape(1, -1) for name, values in results.items()}


# What is forced


def forcing(case: Case):
    """Inside, calls have the schedule and launch numbers that the case forces, if it does."""
    if not (case.schedule or case.tuning):
        return contextlib.nullcontext()
    from . import candidate  # which needs Triton

    return candidate.used(candidate.forced(case.schedule, **case.tuning))


def planned(case: Case, given: dict, found: Found):
    """Note who takes the call, and whether that is what was forced."""
    tensors = calls.in_guard(case, given, Guard())
    tensors |= {name: tensors[name].requires_grad_() for name in case.gradients}
    try:
        # Logits that are a leaf may not be overwritten.
        explained = xent_ext.explain(**tensors, **calls.without(calls.options_of(case), "inplace"))
    except ValueError as error:
        raise LeftOut(f"on this device {error}") from error
    traffic = explained.traffic
    found.plan = explained.implementation + ("" if traffic is None else f", {described(traffic)}")
    if case.schedule and (traffic is None or traffic.schedule != case.schedule):
        found.problem(f"{found.plan} took a call for which {case.schedule} was forced")


def described(traffic) -> str:
    cluster = traffic.numbers.get("num_ctas", 1)
    return traffic.schedule + (f" in clusters of {cluster}" if cluster > 1 else "")


# On a GPU alone


def compiled(case: Case, device, found: Found):
    """The loss in a graph of PyTorch's compiler."""
    given = calls.inputs(case, device)
    (results,) = calls.outcomes(torch.compile(xent_ext.cross_entropy, dynamic=False), case, given, {})
    found.close(results, *calls.theirs(case, given), *calls.truth(case, given))


def step(tensors: dict, upstream) -> dict:
    """Loss and gradient of a call without options, whose logits are a leaf."""
    result = xent_ext.cross_entropy(**tensors)
    return {"loss": result.detach(), "gradient of input": torch.autograd.grad(result, tensors["input"], upstream)[0]}


def leaf_in_guard(case: Case, device, guard: Guard) -> dict:
    tensors = calls.in_guard(case, calls.inputs(case, device), guard)
    return tensors | {"input": tensors["input"].requires_grad_()}


def cuda_graph(case: Case, device, found: Found):
    """A captured step gives the bits of an eager one, for whatever lies in its arguments when it is replayed."""
    calls.forget()
    guard, upstream = Guard(), torch.ones((), dtype=getattr(torch, case.dtype), device=device)
    tensors = leaf_in_guard(case, device, guard)
    with guard.allocations():
        graph, results = overhead.captured(functools.partial(step, tensors, upstream))
    values = calls.inputs(case, device)
    for factor in (1.0, 0.25, 1.0):
        refill(tensors, values)
        upstream.fill_(factor)
        graph.replay()
        with_factor = replace(case, upstreams=(factor,))
        found.close(results, *calls.theirs(with_factor, values), *calls.truth(with_factor, values))
        found.same("in a CUDA graph", step(tensors, upstream), results)
        values = {name: of_rows.flip(0) for name, of_rows in values.items()}
    found.within_zones(guard)


def refill(tensors: dict, values: dict):
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


def two_streams(case: Case, device, found: Found):
    """Steps on two streams at once give what they give one after another."""
    calls.forget()
    guards, streams = (Guard(), Guard()), (torch.cuda.Stream(), torch.cuda.Stream())
    upstreams = [torch.full((), factor, dtype=getattr(torch, case.dtype), device=device) for factor in (0.5, 4.0)]
    steps = [
        functools.partial(step, leaf_in_guard(case, device, guard), upstream)
        for guard, upstream in zip(guards, upstreams, strict=True)
    ]
    alone = [each() for each in steps]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    together = []
    for _ in range(5):
        for stream, guard, each in zip(streams, guards, steps, strict=True):
            with torch.cuda.stream(stream), guard.allocations():
                together.append(each())
    torch.cuda.synchronize(device)
    for number, results in enumerate(together):
        found.same("on one of two streams", alone[number % 2], results)
    for guard in guards:
        found.unharmed(guard)


# Under a sanitizer


def call_alone(case: Case, device, found: Found):
    """A call and nothing else, of tensors without guard zones, for a tool that knows where each ends."""
    is_layer = case.check == "layer"
    given = (calls.inputs_of_layer if is_layer else calls.inputs)(case, device)
    if case.check == "out_of_range":
        given = calls.with_missing_classes(given)
    tensors = calls.in_guard(case, given, Guard(zone=0))
    function = xent_ext.linear_cross_entropy if is_layer else xent_ext.cross_entropy
    with forcing(case):
        calls.outcomes(function, case, tensors, calls.options_of(case))
