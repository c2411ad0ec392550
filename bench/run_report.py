"""What a side-by-side says at its end: tables, a plot, a JSON file."""

import json
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

from .machine import one_line
from .peers import OURS
from .report import ratio, table


def text(result: dict) -> str:
    head = (
        f"\nMachine: {one_line(result['machine'])}\n"
        f"On {result['device']}; load before the start {result['load_before']:.2f}; "
        f"copy bandwidth {result['copy_bytes_per_second'] / 1e9:.1f} GB/s"
    )
    parts = [head, *(rows_text(*group) for group in grouped(result["rows"])), *notes(result), result["method"].strip()]
    return "\n\n".join(part for part in parts if part)


def grouped(rows: list[dict]):
    """((pass, dtype), rows) in the order of the run."""
    for key, group in groupby(rows, lambda row: (row["pass"], row["dtype"])):
        yield key, list(group)


def rows_text(key: tuple[str, str], rows: list[dict]) -> str:
    names = list(rows[0]["peers"])
    header = [
        "",
        "logits",
        "upstream",
        *(f"{name}, ms" for name in names),
        "GB/s",
        "of copy",
        "MiB",
        "best is",
        "ratio",
    ]
    body = [[label(row), size(row), f"{row['upstream']:g}", *cells(row, names)] for row in rows]
    title = f"{' '.join(key)}: median (quartiles); GB/s, share of copy bandwidth and peak MiB are those of {OURS}"
    return f"{title}\n{table(header, body)}"


def label(row: dict) -> str:
    return f"{row['suite']}: {row['what']}"


def size(row: dict) -> str:
    return " x ".join(map(str, row["shape"]))


def cells(row: dict, names: list[str]) -> list[str]:
    ours = row["peers"][OURS]
    best = "" if row["ratio"] is None else row["best_baseline"]
    rates = ["", "", ""]
    if "median_ms" in ours:
        rates = [f"{ours['bytes_per_second'] / 1e9:.2f}", f"{ours['share_of_copy']:.0%}"]
        rates.append(f"{ours['peak_bytes'] / 2**20:.2f}")
    return [*(timing(row["peers"][name]) for name in names), *rates, best, ratio_text(row)]


def ratio_text(row: dict) -> str:
    return "" if row["ratio"] is None else ratio(row["ratio"], 1)


def timing(peer: dict) -> str:
    if "median_ms" not in peer:
        return peer["status"].upper()
    median, (low, high) = peer["median_ms"], peer["quartiles_ms"]
    return f"{median:.4g} ({low:.4g}-{high:.4g})"


def notes(result: dict) -> list[str]:
    """What the numbers include, what was wrong or absent and why, what did not fit."""
    parts = ["\n".join(f"{name}: {what}" for name, what in result["includes"].items())]
    problems = [problem(name, row) for row in result["rows"] for name in row["peers"]]
    parts.append("\n".join(dict.fromkeys(filter(None, problems))))
    parts.append("\n".join(left_out(case, result["free_bytes"]) for case in result["left_out"]))
    return parts


def problem(name: str, row: dict) -> str | None:
    peer = row["peers"][name]
    where = f"{name} at {size(row)} {row['dtype']} {row['pass']}"
    if peer["status"] == "absent":
        return f"ABSENT: {where}: {peer['reason']}"
    if peer["status"] == "wrong":
        errors = (f"{what} {error:.1e} (allowed {peer['allowed'][what]:.1e})" for what, error in peer["errors"].items())
        return f"WRONG: {where}, relative errors: {', '.join(errors)}"
    return None


def left_out(case: dict, free: int) -> str:
    return (
        f"Left out: {case['what']}, {size(case)} {case['dtype']}: "
        f"needs about {case['needs'] / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    )


def write(result: dict, folder: Path) -> list[str]:
    """Write the JSON and the plot; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"run.{ending}" for ending in ("json", "png")]
    paths[0].write_text(json.dumps(result, indent=1) + "\n")
    plot(result).savefig(paths[1], dpi=120)
    return [str(path) for path in paths]


def plot(result: dict) -> Figure:
    """One panel for each pass and dtype: a bar for each shape and upstream gradient, as long as the ratio."""
    panels = [(key, [row for row in rows if row["ratio"] is not None]) for key, rows in grouped(result["rows"])]
    heights = [len(rows) + 2 for _, rows in panels] or [1]
    figure = Figure(figsize=(10, 1.5 + 0.3 * sum(heights)), layout="constrained")
    figure.suptitle(f"{OURS} beside the best of the others, on {result['device']}")
    figure.supxlabel(one_line(result["machine"]), fontsize=6)
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, (key, rows) in zip(axes, panels, strict=False):
        plot_ratios(panel, key, rows)
    return figure


def plot_ratios(axes, key: tuple[str, str], rows: list[dict]):
    names = [f"{size(row)}, upstream {row['upstream']:g}" for row in rows]
    places = range(len(rows))
    colors = ["tab:green" if row["ratio"] >= 1 else "tab:red" for row in rows]
    bars = axes.barh(places, [row["ratio"] for row in rows], color=colors)
    labels = [f"{ratio_text(row)} of {row['best_baseline']}" for row in rows]
    axes.bar_label(bars, labels, label_type="center", color="white", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set(title=" ".join(key), xlabel="times as fast (the best baseline's median over ours)")
