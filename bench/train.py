"""Train the same model with torch.nn.CrossEntropyLoss and with xent_ext.CrossEntropyLoss, side by side.

Two copies of one model get the same batches in turn, so that whatever else the machine does falls on both.
At the end: both loss curves, the time of a step, the time and the memory of the loss, a plot and a JSON file.
The exit status is 1 when the two losses disagree.

How it is measured. In each step the loss's own backward is run apart from the model's: the logits are
detached, the loss gives their gradient, and the model's backward starts from it. The times are medians over
the steps after the first few. The memory is what the loss holds at most, forward and backward together,
beyond the logits, in its first call on the first batch; the gradient of the logits is part of it.
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

# The first steps pay for caches, compilation and memory pools.
WARM_UP = 5


@dataclass
class Side:
    """One of the two runs: its own copy of the model, and what was observed of it."""

    criterion: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    times: list[dict[str, float]] = field(default_factory=list)  # milliseconds, one dict for each step


def add_arguments(parser):
    parser.add_argument("--task", choices=TASKS, default="lm", help="what to train (default: %(default)s)")
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
    """Train both sides; return all that the report needs, ready for JSON."""
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
        "parameters": sum(parameter.numel() for parameter in sides["torch.nn"].model.parameters()),
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
    for name, make_loss in LOSSES.items():
        own = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(own.parameters(), lr=task.rate)
        sides[name] = Side(make_loss(**task.loss_options), own, optimizer)
    return sides


def first_calls(sides: dict[str, Side], batch, device) -> dict:
    """Both losses on the same logits: how much memory each takes, and how far their results are apart.

    These are the first calls, so that buffers which an implementation keeps for later calls are counted.
    """
    inputs, target = batch
    with torch.no_grad():
        logits = sides["torch.nn"].model(inputs)
    logits.requires_grad_()

    def forward_and_backward(side):
        loss = side.criterion(logits, target)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    results, peaks = {}, {}
    for name, side in sides.items():
        results[name], peaks[name] = machine.peak_memory(partial(forward_and_backward, side), device)
    (our_loss, our_gradient), (their_loss, their_gradient) = results["xent_ext"], results["torch.nn"]
    return {
        "logits": list(logits.shape),
        "peak_bytes": peaks,
        # The curves alone would hide a gradient of a wrong scale: AdamW divides it out.
        "difference": {
            "first_loss": relative_difference(our_loss, their_loss),
            "first_gradient": relative_difference(our_gradient, their_gradient),
        },
    }


def train(sides: dict[str, Side], task, steps: int, clock):
    order = list(sides.values())
    with tqdm(range(steps), desc="Training both", unit="step") as progress:
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
    (gradient,) = torch.autograd.grad(loss, logits)
    after_loss = clock.mark()
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
    return {**medians, "loss_peak_bytes": peak_bytes, "metrics": task.evaluate(side.model)}


def speed_up(summary: dict, what: str) -> float:
    return summary["torch.nn"][what] / summary["xent_ext"][what]


# How much the results of two right implementations may differ, as a part of the largest value.
TOLERANCE = {
    # On the same logits float32 results differ by rounding: 1e-5 is about a hundred roundings.
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
    ours, theirs = (torch.tensor(sides[name].losses) for name in ("xent_ext", "torch.nn"))
    return relative_difference(ours, theirs)


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
