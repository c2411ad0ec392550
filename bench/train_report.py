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
    """Both loss curves at a few steps, always with the first and the last."""
    names, losses = list(result["losses"]), result["losses"].values()
    last = result["steps"] - 1
    steps = sorted({round(row * last / (CURVE_ROWS - 1)) for row in range(CURVE_ROWS)})
    rows = []
    for step in steps:
        a, b = (curve[step] for curve in losses)
        rows.append([str(step + 1), f"{a:.6f}", f"{b:.6f}", f"{b - a:+.1e}"])
    return table(["loss at step", *names, "difference"], rows)


def measures(result: dict) -> str:
    a, b = result["summary"].values()
    rows = [
        [label, f"{a[key]:.3f}", f"{b[key]:.3f}", ratio(a[key], b[key])]
        for label, key in (
            ("step, ms", "step_ms"),
            ("the loss, ms", "loss_ms"),
            ("  its forward", "loss_forward_ms"),
            ("  its backward", "loss_backward_ms"),
        )
    ]
    peaks = [side["loss_peak_bytes"] / 2**20 for side in (a, b)]
    rows.append(["peak memory of the loss, MiB", *(f"{peak:.2f}" for peak in peaks), ratio(*peaks)])
    rows += [[name, f"{a['metrics'][name]:.4f}", f"{b['metrics'][name]:.4f}", ""] for name in a["metrics"]]
    timed = result["steps"] - result["warm_up"]
    notes = (
        f"Times: medians of {timed} steps, taken in turn, after {result['warm_up']} to warm up.\n"
        f"Memory: {result['memory_method']};\n"
        "forward and backward together, with the gradient of the logits."
    )
    return table(["", *result["summary"], "torch.nn / xent_ext"], rows) + "\n" + notes


def verdict(result: dict) -> str:
    difference, tolerance = result["agreement"]["difference"], result["agreement"]["tolerance"]
    labels = {
        "first_loss": "loss on the same logits",
        "first_gradient": "gradient on the same logits",
        "curves": "loss curves",
    }
    rows = [[labels[what], f"{difference[what]:.1e}", f"{tolerance[what]:.1e}"] for what in difference]
    speed_up = result["speed_up"]
    ending = "The two losses agree." if result["agreement"]["agree"] else "THE TWO LOSSES DO NOT AGREE."
    return (
        f"{table(['largest relative difference', 'found', 'allowed'], rows)}\n{ending}\n"
        f"Speed-up: the loss {speed_up['loss']:.2f}x, the whole step {speed_up['step']:.2f}x."
    )


def figure(result: dict) -> Figure:
    """Left the two loss curves, right where the time of a step goes."""
    drawn = Figure(figsize=(11, 4.5), layout="constrained")
    drawn.suptitle(f"{result['task']}, logits {tuple(result['logits'])}")
    drawn.supxlabel(one_line(result["machine"]), fontsize=6)
    loss_axes, time_axes = drawn.subplots(1, 2, width_ratios=(3, 2))
    plot_curves(loss_axes, result["losses"])
    plot_times(time_axes, result["summary"])
    return drawn


def plot_curves(axes, losses: dict):
    # The curves lie on each other: the second is thin and dashed, so that both are seen.
    styles = ({"linewidth": 4, "alpha": 0.4}, {"linewidth": 1.2, "linestyle": "--"})
    for (name, curve), style in zip(losses.items(), styles, strict=True):
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
