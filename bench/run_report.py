"""What a side-by-side says at its end: tables and a plot."""

import statistics
from itertools import groupby

from matplotlib.figure import Figure

from .machine import one_line
from .peers import OURS
from .report import head, mebibytes, ratio, size, table


def text(result: dict) -> str:
    parts = [
        f"{head(result)}; copy bandwidth {result['copy_bytes_per_second'] / 1e9:.1f} GB/s",
        *(rows_text(*group) for group in grouped(result["rows"])),
        *notes(result),
        *(headline(*group) for group in grouped(result["rows"])),
    ]
    return "\n\n".join(part for part in parts if part)


def grouped(rows: list[dict]):
    """((pass, dtype), rows) in the order of the run."""
    for key, group in groupby(rows, lambda row: (row["pass"], row["dtype"])):
        yield key, list(group)


def headline(key: tuple[str, str], rows: list[dict]) -> str:
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    if not ratios:
        return ""
    spread = f"{min(ratios):.2f}x to {max(ratios):.2f}x, median {statistics.median(ratios):.2f}x"
    return f"{' '.join(key)}: {OURS} beside the BEST right baseline of each of {len(ratios)} cases: {spread}"


def rows_text(key: tuple[str, str], rows: list[dict]) -> str:
    names = [name for name in rows[0]["peers"] if any(row["peers"][name]["status"] != "absent" for row in rows)]
    header = [
        "",
        "logits",
        "upstream",
        *(f"{name}, ms" for name in names),
        "roofline, ms",
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


def cells(row: dict, names: list[str]) -> list[str]:
    ours = row["peers"][OURS]
    best = "" if row["ratio"] is None else row["best_baseline"]
    roofline = "" if row["roofline_ms"] is None else f"{row['roofline_ms']:.4g}"
    rates = ["", ""]
    if "share_of_copy" in ours:
        rates = [f"{ours['bytes_per_second'] / 1e9:.2f}", f"{ours['share_of_copy']:.0%}"]
    peak = mebibytes(ours["peak_bytes"]) if "peak_bytes" in ours else ""
    return [*(timing(row["peers"][name]) for name in names), roofline, *rates, peak, best, ratio_text(row)]


def ratio_text(row: dict) -> str:
    return "" if row["ratio"] is None else ratio(row["ratio"], 1)


def timing(peer: dict) -> str:
    if "median_ms" not in peer:
        return peer["status"].upper()
    median, (low, high) = peer["median_ms"], peer["quartiles_ms"]
    return f"{median:.4g} ({low:.4g}-{high:.4g})"


def notes(result: dict) -> list[str]:
    """What was wrong or absent and why, what was not measured, what varied."""
    return [
        "\n".join(wrong(result["rows"])),
        "\n".join(absent(result["rows"])),
        "\n".join(left_out(case) for case in result["left_out"]),
        noise(result["rows"]),
    ]


WIDE = 0.25  # of the median, between the quartiles


def noise(rows: list[dict]) -> str:
    """Says so where single calls took very different times."""
    timed = [peer for row in rows for peer in row["peers"].values() if "median_ms" in peer]
    wide = sum(peer["quartiles_ms"][1] - peer["quartiles_ms"][0] > WIDE * peer["median_ms"] for peer in timed)
    if not wide:
        return ""
    return (
        f"{wide} of {len(timed)} medians have quartiles that are more than {WIDE:.0%} of them apart: read those as "
        "sizes, or measure again while the machine does nothing else."
    )


def wrong(rows: list[dict]):
    """A line for each wrong peer and case; rows that differ in the upstream gradient share theirs."""
    for row in rows:
        for name, peer in row["peers"].items():
            if peer["status"] == "wrong" and row["upstream"] == 1:
                errors = (f"{what} {error:.1e} (allowed {peer['allowed'][what]:.1e})" for what, error in
                          peer["errors"].items())  # fmt: skip
                yield f"WRONG: {name} at {case_name(row)}, relative errors: {', '.join(errors)}"


def absent(rows: list[dict]):
    """A line for each peer and reason, with the case where there is only one."""
    where: dict = {}
    for row in rows:
        for name, peer in row["peers"].items():
            if peer["status"] == "absent":
                where.setdefault((name, peer["reason"]), {})[case_name(row)] = None
    for (name, reason), cases in where.items():
        yield f"ABSENT: {name} at {next(iter(cases)) if len(cases) == 1 else f'{len(cases)} cases'}: {reason}"


def case_name(row: dict) -> str:
    return f"{size(row)} {row['dtype']} {row['pass']}"


def left_out(case: dict) -> str:
    return f"Left out: {case['what']}, {case_name(case)}: {case['reason']}"


def figure(result: dict) -> Figure:
    """For each pass and dtype: left the ratio of each row, right its share of the machine's copy bandwidth."""
    panels = [(key, [row for row in rows if row["ratio"] is not None]) for key, rows in grouped(result["rows"])]
    heights = [len(rows) + 2 for _, rows in panels] or [1]
    drawn = Figure(figsize=(13, 1.5 + 0.3 * sum(heights)), layout="constrained")
    drawn.suptitle(f"{OURS} beside the best of the others, on {result['device']}")
    drawn.supxlabel(one_line(result["machine"]), fontsize=6)
    axes = drawn.subplots(len(heights), 2, height_ratios=heights, width_ratios=(3, 2), squeeze=False)
    for (left, right), (key, rows) in zip(axes, panels, strict=False):
        plot_ratios(left, key, rows)
        plot_shares(right, rows)
    return drawn


def plot_ratios(axes, key: tuple[str, str], rows: list[dict]):
    names = [f"{size(row)}, upstream {row['upstream']:g}" for row in rows]
    places = range(len(rows))
    colors = ["tab:green" if row["ratio"] >= 1 else "tab:red" for row in rows]
    bars = axes.barh(places, [row["ratio"] - 1 for row in rows], left=1, color=colors)
    labels = [f"{ratio_text(row)} of {row['best_baseline']}" for row in rows]
    axes.bar_label(bars, labels, padding=3, fontsize=7)
    axes.margins(x=0.4)  # room for the labels
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.set(title=" ".join(key), xlabel="times as fast (the best baseline's median over ours)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")


def plot_shares(axes, rows: list[dict]):
    for name, style in ((OURS, "o"), (None, "x")):
        peers = [(place, row["peers"][name or row["best_baseline"]]) for place, row in enumerate(rows)]
        points = [(peer["share_of_copy"], place) for place, peer in peers if "share_of_copy" in peer]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), style, label=name or "the best baseline")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set(title="share of copy bandwidth", xscale="log", xlabel="least bytes by time, over a copy's")
    axes.legend(fontsize=7)
