"""One case of the last linear layer with its loss: its inputs, the check of what a peer returns, the timing of calls.

As in bench/case.py, all that touches tensors is here, and runs in processes that do nothing else.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import machine
from .case import LOGIT_SCALE, absence, relative, repeated, verdict
from .linear_peers import OURS, PEERS, LayerCase

IGNORED = -100


class Layer(NamedTuple):
    input: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    upstream: torch.Tensor | None  # of each row's loss, for "none"


@functools.lru_cache(maxsize=1)  # on a GPU all peers of a process share it
def layer_of(case: LayerCase) -> Layer:
    """The same in every process, so that all peers get the same."""
    rows, features, classes = case.shape
    todo = case.todo
    on = {"device": case.device, "generator": torch.Generator(case.device).manual_seed(0)}

    def normal(*shape, std):
        made = torch.empty(shape, dtype=getattr(torch, case.dtype), device=case.device)
        return made.normal_(std=std, generator=on["generator"]).requires_grad_(todo.gradient)

    target = torch.randint(classes, (rows,), **on)
    target[torch.randperm(rows, **on)[: round(todo.ignored * rows)]] = IGNORED
    # Eighths, which all dtypes hold as they are.
    upstream = torch.randint(1, 9, (rows,), **on) / 8 if todo.reduction == "none" else None
    weight = normal(classes, features, std=LOGIT_SCALE / features**0.5)
    return Layer(normal(rows, features, std=1.0), weight, target, upstream)


def step(todo, function, layer: Layer):
    """The loss, and the gradients of input and weight where the case has any."""
    with torch.set_grad_enabled(todo.gradient):
        loss = function(*layer[:3], todo.reduction)
    if not todo.gradient:
        return loss, ()
    upstream = None if layer.upstream is None else layer.upstream.to(loss.dtype)
    # Not loss.backward(): to store a gradient in .grad may copy it.
    return loss, torch.autograd.grad(loss, layer[:2], upstream)


# The check


def check(case: LayerCase, names: list[str]) -> dict[str, dict]:
    """For each peer: is it "right", "wrong" or "absent"; its errors, those allowed, and its peak memory."""
    truth = Truth(case)
    return {name: check_peer(case, name, truth) for name in names}


def check_peer(case: LayerCase, name: str, truth) -> dict:
    """Peak memory is that of our first call, in which buffers are kept; of others the second, as they may compile."""
    try:
        work = functools.partial(step, case.todo, PEERS[name].load_for(case), layer_of(case))
        if name != OURS:
            work()
        found, peak = machine.peak_memory(work, torch.device(case.device))
        errors = truth.errors(*found)
    except Exception as error:
        return absence(error)
    return verdict(errors, truth.allowed) | {"peak_bytes": peak}


class Truth:
    """Loss and gradients in float64, and how far results in the layer's dtype may be from them.

    A loss may be off by one `eps` of the dtype, in which the logits are, and each gradient, whose logits' gradient is
    rounded, too, by two; and by what vectorised exponentials in float32 are (see bench.case.Truth).
    """

    EXPONENTIALS = 1e-5
    ROWS = 1024  # whose logits there are at a time

    def __init__(self, case: LayerCase):
        todo, layer = case.todo, layer_of(case)
        exact = [each.detach().double().requires_grad_(todo.gradient) for each in layer[:2]]
        counted = layer.target != IGNORED
        upstream = 1 / counted.sum().double() if layer.upstream is None else layer.upstream.double()
        upstream = upstream.expand(counted.shape)
        chunks = [slice(first, first + self.ROWS) for first in range(0, len(counted), self.ROWS)]
        self.loss = torch.cat([self.losses(exact, layer.target, upstream, rows) for rows in chunks])
        if todo.reduction == "mean":
            self.loss = (self.loss * upstream).sum()
        self.gradients = [each.grad for each in exact if todo.gradient]
        eps = torch.finfo(layer.input.dtype).eps
        self.allowed = {
            "loss": eps + self.EXPONENTIALS,
            "input": 2 * eps + self.EXPONENTIALS,
            "weight": 2 * eps + self.EXPONENTIALS,
        }

    @staticmethod
    def losses(exact, target, upstream, rows):
        """Of these rows; their gradients are added to those of the others."""
        input, weight = exact
        losses = F.cross_entropy(F.linear(input[rows], weight), target[rows], reduction="none", ignore_index=IGNORED)
        if losses.requires_grad:
            losses.backward(upstream[rows])
        return losses.detach()

    def errors(self, loss, gradients) -> dict[str, float]:
        """Relative errors: of the loss, of rows the mean, and of each gradient by its norm."""
        found = {"loss": relative(loss.detach().double() - self.loss, self.loss, torch.mean)}
        for what, gradient, exact in zip(("input", "weight"), gradients, self.gradients, strict=False):
            found[what] = relative(gradient.double() - exact, exact, torch.linalg.vector_norm)
        return found


# The timing


class Timed:
    """A peer with its inputs, ready to be called."""

    def __init__(self, case: LayerCase, name: str):
        self.todo, self.function, self.layer = case.todo, PEERS[name].load_for(case), layer_of(case)
        self.clock = machine.Clock(torch.device(case.device))

    def calls(self, seconds: float) -> list[float]:
        return repeated(self.call, self.clock, seconds)

    def call(self) -> tuple:
        start = self.clock.mark()
        step(self.todo, self.function, self.layer)  # whose results are freed at once, as in a training step
        return start, self.clock.mark()


_timed: dict[str, Timed] = {}  # what this process keeps between its blocks of calls


def prepare(case: LayerCase, name: str):
    timed = _timed[name] = Timed(case, name)
    timed.calls(0)


def block(name: str, seconds: float) -> list[float]:
    """Milliseconds of each call of a block; not of the first, before which another peer ran, where there are others."""
    times = _timed[name].calls(seconds)
    return times[1:] or times


PRODUCTS = 5


def product_rate(device: str, dtype: str) -> float:
    """Operations per second of a matrix product, about: the fastest of a few."""
    clock = machine.Clock(torch.device(device))
    rows, features, classes = 512, 1024, 8192
    a = torch.ones(rows, features, dtype=getattr(torch, dtype), device=device)
    b = torch.ones(classes, features, dtype=a.dtype, device=device)
    marks = []
    for _ in range(PRODUCTS):
        start = clock.mark()
        F.linear(a, b)
        marks.append((start, clock.mark()))
    clock.wait()
    return 2 * rows * features * classes / min(1e-3 * clock.milliseconds(*pair) for pair in marks)
