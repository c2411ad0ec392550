"""What `python -m bench verify` says at its end: tables, a plot, and whether anything was wrong."""

from collections import Counter

from matplotlib.figure import Figure

from .machine import one_line
from .peers import OURS
from .report import head, ratio, size, table
from .run_report import absent, ratio_text, timing, wrong
from .tune import tile

NOT_MEASURED = "-"


def text(result: dict) -> str:
    timed = [*result["fast"], *result["host"]]
    parts = [last_line(result), head(result), problems(result["cases"]), "\n".join([*wrong(timed), *absent(timed)]),
             right(result["cases"]), fast(result), planned(result), host(result["host"]), undone(result)]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def count(result: dict) -> Counter:
    """How many cases are right, wrong and left out; what was timed was checked before."""
    timed = [row["peers"][OURS]["status"] for row in [*result["fast"], *result["host"]]]
    return Counter([row["status"] for row in result["cases"]] + [status for status in timed if status == "wrong"])


def last_line(result: dict) -> str:
    """Right or wrong, and of how much."""
    found = count(result)
    of = f"{found['right']} of {found['right'] + found['wrong']} cases are right"
    left_out = f", {found['left out']} were left out" if found["left out"] else ""
    verdict = "WRONG" if found["wrong"] else "RIGHT" if found["right"] else "NOTHING WAS EXAMINED"
    on = result["machine"]["gpu"] or "no GPU"
    return f"{verdict}: {of}{left_out} (xent_ext {result['machine']['xent_ext']}, {on})"


def right(rows: list[dict]) -> str:
    header = ["case", "on", "", "taken by", "error by PyTorch's", "seconds"]
    body = [
        [row["name"], row["where"], verdict(row), row["plan"] or NOT_MEASURED, error(row), f"{row['seconds']:.1f}"]
        for row in rows
    ]
    return f"Right? The largest error over PyTorch's own; up to 2 is right\n{table(header, body)}"


def verdict(row: dict) -> str:
    return row["status"] if row["status"] == "right" else row["status"].upper()


def error(row: dict) -> str:
    return f"{max(row['ratios'].values()):.2f}" if row["ratios"] else NOT_MEASURED


def problems(rows: list[dict]) -> str:
    said = [(row, verdict(row), problem) for row in rows for problem in row["problems"]]
    said += [(row, "WARNING", warning) for row in rows for warning in row["warnings"]]
    return "\n".join(f"{what}: {row['name']} ({row['where']}): {text.strip()}" for row, what, text in said)


def fast(result: dict) -> str:
    """One line for each shape, of those rows whose upstream gradient is 1."""
    rows = [row for row in result["fast"] if row["upstream"] == 1]
    if not rows:
        return ""
    names = [name for name in rows[0]["peers"] if any("median_ms" in row["peers"][name] for row in rows)]
    header = ["logits", *(f"{name}, ms" for name in names), "GB/s", "of copy", "best is", "ratio", "modelled, ms"]
    body = [
        [size(row), *(timing(row["peers"][name]) for name in names), *rates(row["peers"][OURS]),
         row["best_baseline"] or NOT_MEASURED, ratio_text(row) or NOT_MEASURED, modelled(row)]
        for row in rows
    ]  # fmt: skip
    title = (
        f"Fast? Forward and backward in {rows[0]['dtype']}, with launches: median (quartiles). "
        f"A copy moves {result['copy_bytes_per_second'] / 1e9:.0f} GB/s.\n"
        "The last column is modelled, not measured; with it how many times as long was measured."
    )
    return f"{title}\n{table(header, body)}"


def rates(ours: dict) -> list[str]:
    if "share_of_copy" not in ours:
        return [NOT_MEASURED] * 2
    return [f"{ours['bytes_per_second'] / 1e9:.0f}", f"{ours['share_of_copy']:.0%}"]


def modelled(row: dict) -> str:
    time, ours = row["modelled_ms"], row["peers"][OURS]
    if time is None:
        return NOT_MEASURED
    return f"{time:.4g}" + (f" ({ratio(ours['median_ms'], time)})" if "median_ms" in ours else "")


def planned(result: dict) -> str:
    rows = [row for row in result["planned"] if "plans" in row]
    if not rows:
        return ""
    header = ["logits", "chosen", "ms", "fastest", "ms", "slower by", "of plans"]
    body = [[size(row), *chosen(row), tile(row["plans"][0]), f"{row['plans'][0]['median_ms']:.4g}", slower(row),
             str(len(row["plans"]))] for row in rows]  # fmt: skip
    numbers = ", ".join(f"{name} = {value}" for name, value in result["tuned"].items()) or "none of those tried"
    title = "Well planned? Schedule, rows x classes of a tile, programs x warps that share it"
    return f"{title}\n{table(header, body)}\n\n`python -m bench tune` would change: {numbers} (see tuning.json)"


def chosen(row: dict) -> list[str]:
    if row["chosen"] is None:
        return ["could not be used", NOT_MEASURED]
    plan = row["plans"][row["chosen"]]
    return [tile(plan), f"{plan['median_ms']:.4g}"]


def slower(row: dict) -> str:
    return NOT_MEASURED if row["slower"] is None else f"{row['slower']:.1%}"


def host(rows: list[dict]) -> str:
    if not rows:
        return ""
    names = list(rows[0]["peers"])
    header = ["", "upstream", *(f"{name}, ms" for name in names)]
    body = [[row["pass"], f"{row['upstream']:g}", *(timing(row["peers"][name]) for name in names)] for row in rows]
    return f"The host: a call of {size(rows[0])} logits by the wall clock, median (quartiles)\n{table(header, body)}"


def undone(result: dict) -> str:
    left_out = [f"{size(row)}: {row['left_out']}" for row in result["planned"] if "left_out" in row]
    return "\n".join(f"Not done: {reason}" for reason in [*result["undone"], *left_out])


def figure(result: dict) -> Figure:
    """The error of each case, and below it the times of the shapes, where there are any."""
    rows = [row for row in result["fast"] if row["upstream"] == 1]
    examined = [row for row in result["cases"] if row["ratios"]]
    drawn = Figure(figsize=(11, 2.5 + 0.16 * len(examined) + 0.4 * len(rows)), layout="constrained")
    drawn.suptitle(last_line(result))
    drawn.supxlabel(one_line(result["machine"]), fontsize=6)
    heights = [len(examined) + 2, 2.5 * len(rows)] if rows else [1]
    axes = drawn.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    plot_errors(axes[0], examined)
    if rows:
        plot_times(axes[1], rows)
    return drawn


def plot_errors(axes, rows: list[dict]):
    errors = [max(row["ratios"].values()) for row in rows]
    colors = ["tab:red" if row["status"] == "wrong" else "tab:green" for row in rows]
    axes.barh(range(len(rows)), errors, color=colors)
    axes.set_yticks(range(len(rows)), [f"{row['name']} ({row['where']})" for row in rows], fontsize=6)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.axvline(2, color="black", linewidth=1)
    axes.set(xlabel="largest error over PyTorch's own; right up to 2")


def plot_times(axes, rows: list[dict]):
    """For each shape the share of the copy bandwidth of everyone that was timed."""
    names = [name for name in rows[0]["peers"] if any("share_of_copy" in row["peers"][name] for row in rows)]
    for name in names:
        points = [(row["peers"][name]["share_of_copy"], place) for place, row in enumerate(rows)
                  if "share_of_copy" in row["peers"][name]]  # fmt: skip
        axes.plot(*zip(*points, strict=True), "o" if name == OURS else "x", label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [size(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel="least bytes by time, over a copy's", xscale="log")
    axes.legend(fontsize=7)
