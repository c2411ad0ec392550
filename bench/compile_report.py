"""What compiling costs: tables and a plot."""

import statistics
from collections import Counter

from matplotlib.figure import Figure

from .machine import one_line
from .report import head, table


def text(result: dict) -> str:
    return "\n\n".join(
        [head(result), runs(result["rows"]), *map(in_turn, result["in_turn"]), variants(result["variants"])]
    )


def runs(rows: list[dict]) -> str:
    header = ["", "call", "target", "kernels, with their seconds", "compiled twice", "seconds", "cached"]
    body = [
        [row["what"], row["call"], row["target"], kernels(row["compiled"]), ", ".join(row["compiled_twice"]) or "none",
         f"{row['seconds']:.2f}", f"{row['seconds_cached']:.2f}"]
        for row in rows
    ]  # fmt: skip
    title = "CPU seconds of the first step, in a process that compiles its kernels and in one that finds them cached"
    return f"{title}\n{table(header, body)}"


def in_turn(calls: dict) -> str:
    body = [[call["what"], call["call"], kernels(call["compiled"])] for call in calls["calls"]]
    title = f"Calls of one process, in turn, for {calls['target']}"
    return f"{title}\n{table(['', 'call', 'compiled besides, with seconds'], body)}"


def variants(targets: list[dict]) -> str:
    """Of each kernel, for each target."""
    rows = []
    for of_target in targets:
        compiled = [each for call in of_target["calls"] for each in call["compiled"]]
        for name in dict.fromkeys(each["kernel"] for each in compiled):
            taken = sorted(each["seconds"] for each in compiled if each["kernel"] == name)
            spread = [f"{number:.2f}" for number in (taken[0], statistics.median(taken), taken[-1], sum(taken))]
            rows.append([name, of_target["target"], f"{len(taken)}", *spread])
    title = "CPU seconds of each kernel of every variant that python -m bench kernels shows, in one process"
    return f"{title}\n{table(['kernel', 'target', 'variants', 'least', 'median', 'most', 'all'], rows)}"


def kernels(compiled: list[dict]) -> str:
    counts = Counter(each["kernel"] for each in compiled)
    return ", ".join(f"{count} {name} {seconds(compiled, name):.2f}" for name, count in counts.items()) or "nothing"


def seconds(compiled: list[dict], kernel: str) -> float:
    return sum(each["seconds"] for each in compiled if each["kernel"] == kernel)


def figure(result: dict) -> Figure:
    """For each run of each target the seconds of its kernels, one after another."""
    rows = result["rows"]
    drawn = Figure(figsize=(11, 2 + 0.3 * len(rows)), layout="constrained")
    drawn.suptitle("What the first step of a run compiles")
    drawn.supxlabel(one_line(result["machine"]), fontsize=6)
    axes = drawn.subplots()
    ends = [0.0] * len(rows)
    for name in dict.fromkeys(each["kernel"] for row in rows for each in row["compiled"]):
        lengths = [seconds(row["compiled"], name) for row in rows]
        axes.barh(range(len(rows)), lengths, 0.7, ends, label=name)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    axes.set_yticks(range(len(rows)), [f"{row['what']}, {row['target']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="seconds of the CPU")
    axes.legend(fontsize=7)
    return drawn
