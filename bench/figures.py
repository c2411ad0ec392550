"""Draw the pictures of the READMEs: a row's way through each schedule of the kernels, and what a training step holds.

What is held is a model: the tensors of each stage of a step, of the first layer of `python -m bench linear`. The peaks
that were measured, of that command's committed result, are drawn as lines.
"""

import json
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from xent_ext.plan import chunk_rows

OUT = Path("bench/figures")
RESULT = Path("bench/results/cpu/linear.json")
MIB = 2**20


def add_arguments(parser):
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the pictures (default: %(default)s)")
    parser.add_argument("--result", type=Path, default=RESULT, help="of `linear` (default: %(default)s)")


def run(args) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = {"schedules": schedules(), "memory": memory(json.loads(args.result.read_text())["rows"][0])}
    for name, figure in drawn.items():
        figure.savefig(args.out / f"{name}.png", dpi=160)
    print("Written:", *(args.out / f"{name}.png" for name in drawn))
    return 0


# --- A row's way through each schedule


class Step(NamedTuple):
    """What is done with some classes of a row, as shares of it, from one time to another."""

    kind: str
    first: float
    last: float
    start: float
    end: float


READ, AGAIN = "logits read from memory", "read again, from L2"
HELD, SUMMARY, WRITTEN = "held in registers", "summary", "gradient written"
KINDS = {READ: "#3b76af", AGAIN: "#a9c8e4", HELD: "#eceff1", SUMMARY: "#ef9234", WRITTEN: "#519d3e"}
SHORT = 0.35  # what a summary takes of the time of a reading


def blocks(count: int) -> list[tuple[float, float]]:
    """(first, last) of equal parts of a row."""
    return [(part / count, (part + 1) / count) for part in range(count)]


def resident() -> list[Step]:
    """The row is held while its summary is made."""
    return [
        Step(READ, 0, 1, 0, 1),
        Step(HELD, 0, 1, 1, 3),
        Step(SUMMARY, 0, 1, 2 - SHORT / 2, 2 + SHORT / 2),
        Step(WRITTEN, 0, 1, 3, 4),
    ]


def streaming(count=6) -> list[Step]:
    """One program: block by block, and back."""
    walk = [Step(READ, *block, turn / 2, turn / 2 + 0.5) for turn, block in enumerate(blocks(count))]
    turning = walk[-1].end + SHORT
    back = []
    for turn, block in enumerate(reversed(blocks(count))):
        start = turning + turn
        back += [Step(AGAIN, *block, start, start + 0.5), Step(WRITTEN, *block, start + 0.5, start + 1)]
    return [*walk, Step(SUMMARY, 0, 1, walk[-1].end, turning), *back]


def split(programs=4, turns=3) -> list[Step]:
    """Programs summarise their parts at the same time; then there is a program for each block."""
    walk = [
        Step(READ, *block, number % turns / 2, number % turns / 2 + 0.5)
        for number, block in enumerate(blocks(programs * turns))
    ]
    end = turns / 2
    left = [Step(SUMMARY, *part, end, end + SHORT) for part in blocks(programs)]
    return walk + left + second_launch(end + SHORT + 1.4, programs * turns)


def deferred() -> list[Step]:
    """The forward pass of any schedule leaves a summary; backward has a program for each block."""
    return [Step(READ, 0, 1, 0, 1), Step(SUMMARY, 0, 1, 1, 1 + SHORT), *second_launch(3 + SHORT, 6)]


def second_launch(start: float, count: int) -> list[Step]:
    return [
        step
        for block in blocks(count)
        for step in (Step(READ, *block, start, start + 1), Step(WRITTEN, *block, start + 1, start + 2))
    ]


# The name of each, what it is, its steps, and what stands between its launches.
SCHEDULES = {
    "resident": ("one program, or a cluster", resident(), ""),
    "streaming": ("one program, there and back", streaming(), ""),
    "split": ("several programs, then a second kernel", split(), "second\nlaunch"),
    "gradient": ("left to backward, from a summary", deferred(), "until\nbackward"),
}


def copies(steps: list[Step], *kinds: str) -> float:
    """How often the row is read, or written."""
    return sum(step.last - step.first for step in steps if step.kind in kinds)


def schedules() -> Figure:
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    for number, (axes, name) in enumerate(zip(figure.subplots(1, len(SCHEDULES), sharey=True), SCHEDULES, strict=True)):
        what, steps, between = SCHEDULES[name]
        for step in steps:
            draw_step(axes, step)
        read, written = round(copies(steps, READ, AGAIN)), round(copies(steps, WRITTEN))
        axes.set_title(f"{name}\n", fontsize=10, fontweight="bold")
        axes.text(0.5, 1.02, what, transform=axes.transAxes, ha="center", fontsize=9)
        if between:
            axes.text(middle_of_gap(steps), 0.5, between, ha="center", va="center", fontsize=8, color="#555555")
        end = max(step.end for step in steps)
        axes.set(xlim=(-0.03 * end, 1.03 * end), ylim=(1.02, -0.02), xticks=[])
        axes.set_xlabel(f"time →\n{read} read + {written} written")
        axes.set_yticks([0, 1], ["0", "C"])
        axes.tick_params(length=0)
        if not number:
            axes.set_ylabel("classes of a row", labelpad=-4)
        axes.spines[:].set_visible(False)
    handles = [Patch(facecolor=color, edgecolor="#999999", label=kind) for kind, color in KINDS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def draw_step(axes, step: Step):
    corner, width, height = (step.start, step.first), step.end - step.start, step.last - step.first
    axes.add_patch(Rectangle(corner, width, height, facecolor=KINDS[step.kind], edgecolor="white", linewidth=0.8))


def middle_of_gap(steps: list[Step]) -> float:
    """Of the time between a summary and what comes after it."""
    end = max(step.end for step in steps if step.kind == SUMMARY)
    return (end + min(step.start for step in steps if step.start >= end)) / 2


# --- What a step holds


STAGES = ("layer\n", "loss\n", "kept\n", "loss\n", "layer\n")
PASSES = {0.5: "forward", 3.5: "backward"}  # in the middle of its stages
TENSORS = {
    "logits": "#3b76af",
    "their log-softmax": "#a9c8e4",
    "gradient of the log-softmax": "#f5c08b",
    "gradient of the logits": "#ef9234",
    "gradients of weight and input": "#519d3e",
}


def held(rows: int, features: int, classes: int, itemsize: int = 4) -> dict[str, tuple[str, list[tuple]]]:
    """For each peer of `linear` what it is called, and the bytes of TENSORS at each of STAGES, beyond the arguments."""
    all_logits, layer = rows * classes * itemsize, (rows + classes) * features * itemsize
    chunk = chunk_rows(rows, features, classes, itemsize, on_cpu=True, with_weight=True) * classes * itemsize
    last = (0, 0, 0, all_logits, layer)
    return {
        "torch_eager": (
            "F.linear, F.cross_entropy",
            [
                (all_logits, 0, 0, 0, 0),
                (all_logits, all_logits, 0, 0, 0),
                (0, all_logits, 0, 0, 0),
                (0, all_logits, all_logits, all_logits, 0),
                last,
            ],
        ),
        "with_our_loss": (
            "F.linear, xent_ext.cross_entropy",
            [(all_logits, 0, 0, 0, 0), *[(all_logits, 0, 0, all_logits, 0)] * 3, last],
        ),
        "xent_ext": (
            "xent_ext.linear_cross_entropy",
            [(0, 0, 0, 0, 0), (chunk, 0, 0, 0, layer), *[(0, 0, 0, 0, layer)] * 3],
        ),
    }


def memory(row: dict) -> Figure:
    """The stages of each, of a row of a result of `linear`."""
    modelled = held(*row["shape"])
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    for axes, (peer, (name, stages)) in zip(
        figure.subplots(1, len(modelled), sharey=True), modelled.items(), strict=True
    ):
        draw_stages(axes, stages)
        peak = row["peers"][peer]["peak_bytes"] / MIB
        axes.axhline(peak, color="#b3261e", linewidth=1, linestyle="--")
        axes.annotate(
            f"measured peak: {peak:.0f} MiB", (4.5, peak), xytext=(0, 3), textcoords="offset points", ha="right",
            fontsize=9, color="#b3261e",
        )  # fmt: skip
        axes.set_title(name, fontsize=10, fontweight="bold")
        axes.set_xticks(range(len(STAGES)), STAGES, fontsize=9)
        for place, name in PASSES.items():
            axes.annotate(name, (place, 0), xytext=(0, -17), textcoords="offset points", ha="center", va="top")
        axes.tick_params(length=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.axes[0].set(ylabel="MiB beyond the arguments", ylim=(0, 1.1 * figure.axes[0].dataLim.y1))
    handles = [Patch(facecolor=color, label=tensor) for tensor, color in TENSORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    rows, features, classes = row["shape"]
    figure.suptitle(
        f"The last layer and its loss: {rows} rows, {features} features, {classes} classes, float32", fontsize=10
    )
    return figure


def draw_stages(axes, stages: list[tuple]):
    for place, bytes_of in enumerate(stages):
        bottom = 0
        for count, color in zip(bytes_of, TENSORS.values(), strict=True):
            axes.bar(place, count / MIB, 0.92, bottom, color=color, edgecolor="white", linewidth=0.8 if count else 0)
            bottom += count / MIB
