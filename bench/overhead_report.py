"""What a measurement of the cost of calls says at its end: a table and a plot."""

from matplotlib.figure import Figure

from .machine import one_line
from .report import head, table
from .run_report import absent, wrong


def text(result: dict) -> str:
    names = timed(result)
    header = ["", "upstream", *(f"{name}, us" for name in names)]
    rows = [
        [row["pass"], f"{row['upstream']:g}", *(cell(row["peers"][name]) for name in names)] for row in result["rows"]
    ]
    problems = ["\n".join(wrong(result["rows"])), "\n".join(absent(result["rows"]))]
    title = "Microseconds of the CPU for a call: median (quartiles)"
    return "\n\n".join(part for part in [head(result), f"{title}\n{table(header, rows)}", *problems] if part)


def timed(result: dict) -> list[str]:
    return [name for name in result["about"] if any("median_ms" in row["peers"][name] for row in result["rows"])]


def cell(peer: dict) -> str:
    if "median_ms" not in peer:
        return peer["status"].upper()
    low, high = peer["quartiles_ms"]
    ratio = f", {peer['over_eager']:.2f}x torch_eager" if "over_eager" in peer else ""
    return f"{1e3 * peer['median_ms']:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f}){ratio}"


def figure(result: dict) -> Figure:
    """A group of bars for each pass."""
    names, rows = timed(result), result["rows"]
    drawn = Figure(figsize=(11, 4.5), layout="constrained")
    drawn.suptitle(f"What a call costs the CPU, logits on {result['device']}")
    drawn.supxlabel(one_line(result["machine"]), fontsize=6)
    axes = drawn.subplots()
    width = 0.8 / max(len(names), 1)
    for number, name in enumerate(names):
        heights = [1e3 * row["peers"][name].get("median_ms", 0) for row in rows]
        axes.bar([place + number * width for place in range(len(rows))], heights, width, label=name)
    labels = [f"{row['pass']}, upstream {row['upstream']:g}" for row in rows]
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(rows))], labels)
    axes.set(ylabel="median microseconds")
    axes.legend(fontsize=7)
    return drawn
