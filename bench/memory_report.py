"""What a measurement of memory says at its end: a table and a plot."""

from matplotlib.figure import Figure

from .machine import one_line
from .report import head, mebibytes, size, table


def text(result: dict) -> str:
    names = measured(result)
    header = ["", "logits", "", "", "MiB", *(f"{name}, MiB (copies)" for name in names)]
    rows = [
        [row["what"], size(row), row["dtype"], row["pass"], mebibytes(row["logits_bytes"]),
         *(peak(row, name) for name in names)]
        for row in result["rows"]
    ]  # fmt: skip
    title = "The most that is held at one time, and that in copies of the logits"
    return "\n\n".join([head(result), f"{title}\n{table(header, rows)}", *absent(result)])


def measured(result: dict) -> list[str]:
    """The peers that any row has a number of."""
    return [name for name in result["about"] if any("peak_bytes" in row["peers"][name] for row in result["rows"])]


def peak(row: dict, name: str) -> str:
    held = row["peers"][name].get("peak_bytes")
    return "absent" if held is None else f"{mebibytes(held)} ({held / row['logits_bytes']:.2f})"


def absent(result: dict) -> list[str]:
    reasons = {
        (name, peer["reason"]): None
        for row in result["rows"]
        for name, peer in row["peers"].items()
        if "reason" in peer
    }
    return ["\n".join(f"ABSENT: {name}: {reason}" for name, reason in reasons)] if reasons else []


def figure(result: dict) -> Figure:
    """A group of bars for each row, in copies of the logits."""
    names, rows = measured(result), result["rows"]
    drawn = Figure(figsize=(11, 2 + 0.7 * len(rows)), layout="constrained")
    drawn.suptitle(f"Peak memory of the loss, gradient included, on {result['device']}")
    drawn.supxlabel(one_line(result["machine"]), fontsize=6)
    axes = drawn.subplots()
    height = 0.8 / max(len(names), 1)
    for number, name in enumerate(names):
        held = [row["peers"][name].get("peak_bytes", 0) / row["logits_bytes"] for row in rows]
        axes.barh([place + number * height for place in range(len(rows))], held, height, label=name)
    labels = [f"{size(row)} {row['dtype']} {row['pass']}" for row in rows]
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="copies of the logits")
    axes.legend(fontsize=7)
    return drawn
