"""What the traffic models say: tables and a plot."""

from matplotlib.figure import Figure

from .machine import one_line
from .memory_report import absent, measured
from .report import head, mebibytes, size, table


def text(result: dict) -> str:
    copy = result["copy_bytes_per_second"]
    parts = [f"{head(result)}; copy bandwidth {copy / 1e9:.1f} GB/s", modelled(result, copy), *absent(result)]
    if result["planned"]:
        parts.append(planned(result["planned"]))
    return "\n\n".join(parts)


def modelled(result: dict, copy: float) -> str:
    header = ["", "logits", "", "", "schedule", "read", "written", "least ms", "MiB, model", "MiB, measured", ""]
    rows = [
        [row["what"], size(row), row["dtype"], name, peer["schedule"], *in_copies(peer, row["logits_bytes"]),
         f"{1e3 * (peer['bytes_read'] + peer['bytes_written']) / copy:.4g}",
         mebibytes(peer["modelled_peak_bytes"]), mebibytes(peer["peak_bytes"]),
         "as modelled" if peer["agrees"] else "DIFFERENT"]
        for row in result["rows"]
        for name, peer in row["peers"].items()
        if "agrees" in peer
    ]  # fmt: skip
    return f"Forward and backward: read and written in copies of the logits, peak memory\n{table(header, rows)}"


def planned(rows: list[dict]) -> str:
    header = ["", "logits", "", "target", "schedule", "read", "written", "MiB"]
    body = [
        [row["what"], size(row), row["dtype"], row["target"], row["schedule"], *in_copies(row, row["logits_bytes"]),
         mebibytes(row["peak_bytes"])]
        for row in rows
    ]  # fmt: skip
    title = (
        "What xent_ext plans for GPUs: not measured; what a schedule reads twice, it reads from L2 where that is large"
    )
    return f"{title}\n{table(header, body)}"


def in_copies(moved: dict, logits_bytes: int) -> list[str]:
    return [f"{moved[key] / logits_bytes:.2f}" for key in ("bytes_read", "bytes_written")]


def figure(result: dict) -> Figure:
    """For each shape: what each peer reads and writes, in copies of the logits."""
    names, rows = measured(result), result["rows"]
    drawn = Figure(figsize=(11, 2 + 0.6 * len(rows)), layout="constrained")
    drawn.suptitle(f"What the loss must move, forward and backward (model), on {result['device']}")
    drawn.supxlabel(one_line(result["machine"]), fontsize=6)
    axes = drawn.subplots()
    height = 0.8 / max(len(names), 1)
    for number, name in enumerate(names):
        moved = [
            (row["peers"][name].get("bytes_read", 0) + row["peers"][name].get("bytes_written", 0)) / row["logits_bytes"]
            for row in rows
        ]
        axes.barh([place + number * height for place in range(len(rows))], moved, height, label=name)
    labels = [f"{size(row)} {row['dtype']}" for row in rows]
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="copies of the logits, read and written")
    axes.legend(fontsize=7)
    return drawn
