"""Train the same model with torch.nn.CrossEntropyLoss and with xent_ext.CrossEntropyLoss, side by side.

Copies of one model get the same batches in turn, so that whatever else the machine does falls on all of them.
At the end: the loss curves, the time of a step, the time and the memory of the loss, a plot and a JSON file.
The exit status is 1 when the losses disagree.

How it is measured. In each step the loss's own backward is run apart from the model's: the logits are
detached, the loss gives their gradient, and the model's backward starts from it. The times are medians over
the steps after the first few. The memory is what the loss holds at most, forward and backward together,
beyond the logits, in its first call on the first batch; the gradient of the logits is part of it.

With --linear the last layer of the language model is with the loss: torch.nn.Linear before either loss, and
xent_ext.LinearCrossEntropyLoss. Time and memory are of both, beyond the layer's input, and the gradients of the
layer's weight and bias are part of it.
"""

import argparse
import copy
import statistics
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

import xent_ext

from . import machine, report
from .tasks import TASKS
from .train_report import text

LOSSES = {
    "torch.nn": torch.nn.CrossEntropyLoss,
    "xent_ext": xent_ext.CrossEntropyLoss,
}


class LayerThenLoss(nn.Module):
    def __init__(self, linear: nn.Linear, loss: nn.Module):
        super().__init__()
        self.linear, self.loss = linear, loss

    def forward(self, input, target):
        return self.loss(self.linear(input), target)


def layer_with_loss(linear: nn.Linear) -> nn.Module:
    fused = xent_ext.LinearCrossEntropyLoss(linear.in_features, linear.out_features, bias=True)
    fused.linear = linear
    return fused


# For a task whose last layer is with the loss: of that layer.
LAYER_LOSSES = {
    "torch.nn": lambda linear: LayerThenLoss(linear, torch.nn.CrossEntropyLoss()),
    "xent_ext": lambda linear: LayerThenLoss(linear, xent_ext.CrossEntropyLoss()),
    "xent_ext, with the layer": layer_with_loss,
}

# The first steps pay for caches, compilation and memory pools.
WARM_UP = 5


@dataclass
class Side:
    """One of the runs: its own copy of the model, and what was observed of it."""

    criterion: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    times: list[dict[str, float]] = field(default_factory=list)  # milliseconds, one dict for each step

    @property
    def whole(self) -> nn.Module:
        """What makes logits: the model, and its last layer where that is with the loss."""
        layer = getattr(self.criterion, "linear", None)
        return self.model if layer is None else nn.Sequential(self.model, layer)


def add_arguments(parser):
    parser.add_argument("--task", choices=TASKS, default="lm", help="what to train (default: %(default)s)")
    parser.add_argument(
        "--linear", dest="task", action="store_const", const="lm-linear", help="the same as --task lm-linear"
    )
    parser.add_argument("--steps", type=positive, help="training steps (default: enough for the task)")
    parser.add_argument("--seed", type=int, default=0, help="of the model and of the batches")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    report.add_out(parser)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def run(args) -> int:
    result = compare(args.task, args.steps, args.seed, machine.pick_device(args.device))
    print(text(result))
    print("Written:", *report.write(result, args.out, result["task"]))
    return 0 if result["agreement"]["agree"] else 1


def compare(task_name: str, steps: int | None, seed: int, device: torch.device) -> dict:
    """Train all sides; return all that the report needs, ready for JSON."""
    print(f"Preparing {task_name} on {device} ...", flush=True)
    begun = report.begin("train", device)
    task = TASKS[task_name](seed, device)
    steps = task.steps if steps is None else steps
    sides = make_sides(task, seed, device)
    first = first_calls(sides, task.batch(), device)
    train(sides, task, steps, machine.Clock(device))
    summary = {name: summarize(side, first["peak_bytes"][name], task) for name, side in sides.items()}
    return begun | {
        "task": task_name,
        "description": type(task).__doc__,
        "method": __doc__,
        "seed": seed,
        "steps": steps,
        "warm_up": warm_up(steps),
        "logits": first["logits"],
        "parameters": sum(parameter.numel() for parameter in sides["torch.nn"].whole.parameters()),
        "memory_method": machine.MEMORY_METHOD[device.type],
        "losses": {name: side.losses for name, side in sides.items()},
        "times_ms": {name: side.times for name, side in sides.items()},
        "summary": summary,
        "speed_up": {part: speed_up(summary, f"{part}_ms") for part in ("step", "loss")},
        "agreement": agreement(first["difference"] | {"curves": curve_difference(sides)}),
    }


def make_sides(task, seed: int, device: torch.device) -> dict[str, Side]:
    torch.manual_seed(seed)
    model = task.model().to(device)
    sides = {}
    with_layer = task.layer_is_with_the_loss
    for name, make_loss in (LAYER_LOSSES if with_layer else LOSSES).items():
        own = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(own.parameters(), lr=task.rate)
        options = {"linear": own.take_last_layer()} if with_layer else task.loss_options
        sides[name] = Side(make_loss(**options), own, optimizer)
    return sides


def first_calls(sides: dict[str, Side], batch, device) -> dict:
    """All losses on the same input: how much memory each takes, and how far their results are apart.

    These are the first calls, so that buffers which an implementation keeps for later calls are counted.
    """
    inputs, target = batch
    with torch.no_grad():
        logits = sides["torch.nn"].model(inputs)
        shape = sides["torch.nn"].whole(inputs).shape
    logits.requires_grad_()

    def forward_and_backward(side):
        loss = side.criterion(logits, target)
        return loss.detach(), torch.autograd.grad(loss, [logits, *side.criterion.parameters()])

    results, peaks = {}, {}
    for name, side in sides.items():
        results[name], peaks[name] = machine.peak_memory(partial(forward_and_backward, side), device)
    losses, gradients = zip(*results.values(), strict=True)
    return {
        "logits": list(shape),
        "peak_bytes": peaks,
        # The curves alone would hide a gradient of a wrong scale: AdamW divides it out.
        "difference": {
            "first_loss": largest_difference(losses),
            "first_gradient": max_of(largest_difference(each) for each in zip(*gradients, strict=True)),
        },
    }


def train(sides: dict[str, Side], task, steps: int, clock):
    order = list(sides.values())
    with tqdm(range(steps), desc="Training", unit="step") as progress:
        for _ in progress:
            inputs, target = task.batch()
            for side in order:
                train_step(side, inputs, target, clock)
            # Whoever goes second finds warmer caches: take turns.
            order.reverse()
            progress.set_postfix({name: f"{side.losses[-1]:.4f}" for name, side in sides.items()}, refresh=False)


def train_step(side: Side, inputs, target, clock):
    start = clock.mark()
    output = side.model(inputs)
    logits = output.detach().requires_grad_()
    before_loss = clock.mark()
    loss = side.criterion(logits, target)
    between = clock.mark()
    # Not loss.backward(): storing a gradient in .grad may copy it, which a real training step does not do.
    of_layer = list(side.criterion.parameters())
    gradient, *gradients = torch.autograd.grad(loss, [logits, *of_layer])
    after_loss = clock.mark()
    for parameter, found in zip(of_layer, gradients, strict=True):
        parameter.grad = found
    output.backward(gradient)
    side.optimizer.step()
    side.optimizer.zero_grad()
    end = clock.mark()
    clock.wait()
    side.losses.append(loss.item())
    side.times.append(
        {
            "step": clock.milliseconds(start, end),
            "loss_forward": clock.milliseconds(before_loss, between),
            "loss_backward": clock.milliseconds(between, after_loss),
            "loss": clock.milliseconds(before_loss, after_loss),
        }
    )


def warm_up(steps: int) -> int:
    return min(WARM_UP, steps - 1)


def summarize(side: Side, peak_bytes: int, task) -> dict:
    timed = side.times[warm_up(len(side.times)) :]
    medians = {f"{part}_ms": statistics.median(times[part] for times in timed) for part in timed[0]}
    return {**medians, "loss_peak_bytes": peak_bytes, "metrics": task.evaluate(side.whole)}


def speed_up(summary: dict, what: str) -> float:
    """How many times as fast the last is as the first."""
    first, *_, last = summary.values()
    return first[what] / last[what]


# How much the results of two right implementations may differ, as a part of the largest value.
TOLERANCE = {
    # On the same input float32 results differ by rounding: 1e-5 is about a hundred roundings.
    "first_loss": 1e-5,
    "first_gradient": 1e-5,
    # Training may amplify the rounding. PyTorch beside PyTorch with a random error of one or two roundings
    # in every value of the gradient ended up to 5e-6 apart, over all three tasks; GPUs, which add in any
    # order, and longer runs need room above that.
    "curves": 1e-3,
}


def agreement(difference: dict[str, float]) -> dict:
    # Written so that NaN, which is below no tolerance, does not pass.
    agree = all(difference[what] <= TOLERANCE[what] for what in TOLERANCE)
    return {"difference": difference, "tolerance": TOLERANCE, "agree": agree}


def curve_difference(sides: dict[str, Side]) -> float:
    return largest_difference([torch.tensor(side.losses) for side in sides.values()])


def largest_difference(results) -> float:
    """Of each from the first, relative to its largest value."""
    first, *others = results
    return max_of((other - first).abs().max() / first.abs().max() for other in others)


def max_of(differences) -> float:
    """NaN where one is."""
    return torch.tensor(list(differences)).max().item()
