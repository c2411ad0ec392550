"""What a training run says at its end: tables and a plot."""

from matplotlib.figure import Figure

from .machine import one_line
from .report import ratio, table

CURVE_ROWS = 11


def text(result: dict) -> str:
    head = (
        f"\nTask {result['task']}: {result['description']}\n"
        f"{result['parameters']:,} parameters, logits {tuple(result['logits'])}, {result['steps']} steps, "
        f"seed {result['seed']}, on {result['device']}\n"
        f"Machine: {one_line(result['machine'])}"
    )
    return "\n\n".join([head, curves(result), measures(result), verdict(result)])


def curves(result: dict) -> str:
    """The loss curves at a few steps, always with the first and the last; the last curve's difference to the first."""
    names, losses = list(result["losses"]), result["losses"].values()
    last = result["steps"] - 1
    steps = sorted({round(row * last / (CURVE_ROWS - 1)) for row in range(CURVE_ROWS)})
    rows = []
    for step in steps:
        first, *_, latest = found = [curve[step] for curve in losses]
        rows.append([str(step + 1), *(f"{loss:.6f}" for loss in found), f"{latest - first:+.1e}"])
    return table(["loss at step", *names, "difference"], rows)


def measures(result: dict) -> str:
    names, sides = zip(*result["summary"].items(), strict=True)
    rows = [
        [label, *(f"{side[key]:.3f}" for side in sides), ratio(sides[0][key], sides[-1][key])]
        for label, key in (
            ("step, ms", "step_ms"),
            ("the loss, ms", "loss_ms"),
            ("  its forward", "loss_forward_ms"),
            ("  its backward", "loss_backward_ms"),
        )
    ]
    peaks = [side["loss_peak_bytes"] / 2**20 for side in sides]
    rows.append(["peak memory of the loss, MiB", *(f"{peak:.2f}" for peak in peaks), ratio(peaks[0], peaks[-1])])
    rows += [[name, *(f"{side['metrics'][name]:.4f}" for side in sides), ""] for name in sides[0]["metrics"]]
    timed = result["steps"] - result["warm_up"]
    notes = (
        f"Times: medians of {timed} steps, taken in turn, after {result['warm_up']} to warm up.\n"
        f"Memory: {result['memory_method']};\n"
        "forward and backward together, with the gradients."
    )
    return table(["", *names, f"{names[0]} / {names[-1]}"], rows) + "\n" + notes


def verdict(result: dict) -> str:
    difference, tolerance = result["agreement"]["difference"], result["agreement"]["tolerance"]
    labels = {
        "first_loss": "loss on the same input",
        "first_gradient": "gradients on the same input",
        "curves": "loss curves",
    }
    rows = [[labels[what], f"{difference[what]:.1e}", f"{tolerance[what]:.1e}"] for what in difference]
    speed_up = result["speed_up"]
    ending = "The losses agree." if result["agreement"]["agree"] else "THE LOSSES DO NOT AGREE."
    return (
        f"{table(['largest relative difference', 'found', 'allowed'], rows)}\n{ending}\n"
        f"Speed-up: the loss {speed_up['loss']:.2f}x, the whole step {speed_up['step']:.2f}x."
    )


def figure(result: dict) -> Figure:
    """Left the loss curves, right where the time of a step goes."""
    drawn = Figure(figsize=(11, 4.5), layout="constrained")
    drawn.suptitle(f"{result['task']}, logits {tuple(result['logits'])}")
    drawn.supxlabel(one_line(result["machine"]), fontsize=6)
    loss_axes, time_axes = drawn.subplots(1, 2, width_ratios=(3, 2))
    plot_curves(loss_axes, result["losses"])
    plot_times(time_axes, result["summary"])
    return drawn


def plot_curves(axes, losses: dict):
    # The curves lie on each other: the first is thick and the others thin, so that all are seen.
    styles = (
        {"linewidth": 4, "alpha": 0.4},
        {"linewidth": 1.2, "linestyle": "--"},
        {"linewidth": 1.2, "linestyle": ":", "color": "black"},
    )
    for (name, curve), style in zip(losses.items(), styles, strict=False):
        axes.plot(range(1, len(curve) + 1), curve, label=name, **style)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()


def plot_times(axes, summary: dict):
    parts = {
        "loss, forward": [side["loss_forward_ms"] for side in summary.values()],
        "loss, backward": [side["loss_backward_ms"] for side in summary.values()],
        "the rest": [side["step_ms"] - side["loss_forward_ms"] - side["loss_backward_ms"] for side in summary.values()],
    }
    below = [0.0] * len(summary)
    for label, heights in parts.items():
        axes.bar(list(summary), heights, bottom=below, label=label)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set(ylabel="median milliseconds of a step")
    axes.margins(y=0.2)  # room for the legend above the bars
    axes.legend(loc="upper center", ncols=len(parts), fontsize="small")
