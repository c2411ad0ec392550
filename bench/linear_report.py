"""What a measurement of the last layer with its loss says at its end: a table for each case, and a plot."""

from matplotlib.figure import Figure

from .linear_peers import FIRST, OURS
from .machine import one_line
from .report import head, mebibytes, table
from .run_report import absent, case_name, left_out, noise, timing, wrong

HEADER = ["", "ms (quartiles)", f"of {FIRST}", "of the best", "MiB", "error: loss", "input", "weight"]


def text(result: dict) -> str:
    rows = result["rows"]
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in result["operations_per_second"].items())
    parts = [
        f"{head(result)}; matrix products, 10^9 operations a second: {rates}",
        *map(row_text, rows),
        "\n".join(wrong(rows)),
        "\n".join(absent(rows)),
        "\n".join(map(left_out, result["left_out"])),
        noise(rows),
        "\n".join(map(headline, rows)),
    ]
    return "\n\n".join(part for part in parts if part)


def row_text(row: dict) -> str:
    body = [[name, *cells(peer)] for name, peer in row["peers"].items() if peer["status"] != "absent"]
    floor = f"the gradients alone take {mebibytes(row['floor_bytes'])} MiB"
    return f"{row['what']}: {case_name(row)}; {floor}\n{table(HEADER, body)}"


def cells(peer: dict) -> list[str]:
    errors = (peer["errors"].get(what) for what in ("loss", "input", "weight"))
    return [
        timing(peer),
        *(share(peer, what) for what in ("of_first", "of_best")),
        mebibytes(peer["peak_bytes"]),
        *("" if error is None else f"{error:.1e}" for error in errors),
    ]


def share(peer: dict, what: str) -> str:
    return f"{peer[what]:.2f}" if what in peer else ""


def headline(row: dict) -> str:
    peers, ours = row["peers"], row["peers"][OURS]
    if "median_ms" not in ours:
        return f"{case_name(row)}: {OURS} is {ours['status'].upper()}"
    others = {name: peers.get(name, {}) for name in (FIRST, row["best_baseline"])}
    parts = [
        f"{ours['median_ms'] / peer['median_ms']:.2f} of {name}'s time, {mebibytes(ours['peak_bytes'])} MiB for its "
        f"{mebibytes(peer['peak_bytes'])}"
        for name, peer in others.items()
        if "median_ms" in peer
    ]
    return f"{case_name(row)}: {OURS} takes {'; '.join(parts)}"


def figure(result: dict) -> Figure:
    drawn = bars(result, "ms", lambda peer: peer.get("median_ms", 0), "MiB; the line: the gradients alone")
    drawn.suptitle(f"The last layer with its loss, on {result['device']}")
    return drawn


def bars(result: dict, time_label: str, time, memory_label: str) -> Figure:
    """A row of two panels for each case: left the times, right the memory, with its floor."""
    rows = result["rows"]
    names = [[name for name, peer in row["peers"].items() if "peak_bytes" in peer] for row in rows]
    heights = [len(each) + 2 for each in names] or [1]
    drawn = Figure(figsize=(12, 1 + 0.3 * sum(heights)), layout="constrained")
    drawn.supxlabel(one_line(result["machine"]), fontsize=6)
    axes = drawn.subplots(len(heights), 2, height_ratios=heights, sharey="row", squeeze=False)
    for (left, right), row, shown in zip(axes, rows, names, strict=False):
        peers = [row["peers"][name] for name in shown]
        colors = ["tab:green" if name == OURS else "tab:gray" for name in shown]
        left.barh(shown, [time(peer) for peer in peers], color=colors)
        left.set(xlabel=time_label if row is rows[-1] else "")
        left.set_title(case_name(row), fontsize=8, loc="left")
        right.barh(shown, [peer["peak_bytes"] / 2**20 for peer in peers], color=colors)
        right.axvline(row["floor_bytes"] / 2**20, color="black", linewidth=1)
        right.set(xlabel=memory_label if row is rows[-1] else "")
        left.tick_params(labelsize=7)
        right.tick_params(labelsize=7)
        left.invert_yaxis()
    return drawn
