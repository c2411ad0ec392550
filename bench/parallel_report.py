"""What a measurement of classes on several processes says at its end: a table for each number of them, and a plot."""

from collections import Counter

from matplotlib.figure import Figure

from .linear_report import bars
from .parallel_peers import FIRST, OURS
from .report import head, mebibytes, ratio, size, table
from .run_report import absent, case_name, left_out, noise, timing, wrong

HEADER = ["", "CPU ms: least", "median (quartiles)", "clock ms (quartiles)", "MiB", "MiB sent", "collectives", "logits"]


def text(result: dict) -> str:
    rows = result["rows"]
    parts = [
        head(result),
        *map(row_text, rows),
        "\n".join(wrong(rows)),
        "\n".join(absent(rows)),
        "\n".join(map(left_out, result["left_out"])),
        noise(rows),
        "\n".join(filter(None, map(headline, rows))),
        planned_text(result),
    ]
    return "\n\n".join(part for part in parts if part)


def row_text(row: dict) -> str:
    body = [[name, *cells(peer)] for name, peer in row["peers"].items() if peer["status"] != "absent"]
    floor = f"a slice takes {mebibytes(row['floor_bytes'])} MiB, and so does its gradient"
    sent = "as explain says" if row["agrees"] else f"DIFFERENT from what explain says, {row['explained']['received']}"
    return f"{row['what']}: {case_name(row)}; {floor}; what {OURS} sends is {sent}\n{table(HEADER, body)}"


def cells(peer: dict) -> list[str]:
    """Of a wrong one there are no times."""
    cpu = peer.get("cpu")
    return [
        f"{cpu['least_ms']:.4g}" if cpu else peer["status"].upper(),
        timing(cpu) if cpu else "",
        timing(peer) if cpu else "",
        mebibytes(peer["peak_bytes"]),
        f"{sent(peer) / 2**20:.3f}",
        ", ".join(f"{count} {kind}" for kind, count in Counter(each["kind"] for each in peer["collectives"]).items()),
        "intact" if peer["intact"] else "CHANGED",
    ]


def sent(peer: dict) -> float:
    """Bytes that a rank sends in a call, and receives."""
    return sum(each["sent"] for each in peer.get("collectives", ()))


def headline(row: dict) -> str:
    ours, other = row["peers"][OURS], row["peers"].get(FIRST, {})
    if "cpu" not in ours:
        return f"{case_name(row)}: {OURS} is {ours['status'].upper()}"
    if "cpu" not in other:
        return ""
    least = ratio(other["cpu"]["least_ms"], ours["cpu"]["least_ms"])
    clock = ratio(other["median_ms"], ours["median_ms"])
    return (
        f"{case_name(row)}: {OURS} is {least} as fast as {FIRST} by the least CPU time, {clock} by the clock, and "
        f"holds {mebibytes(ours['peak_bytes'])} MiB for its {mebibytes(other['peak_bytes'])}"
    )


def planned_text(result: dict) -> str:
    """Ranks and classes, what a rank holds and sends, and what it reads and writes of its slice."""
    rows = result["planned"]
    targets = list(rows[0]["plans"])
    header = ["logits", "ranks", "bytes a row", "MiB sent", "measured", "MiB: logits", "the call", "measured",
              "of that summaries", *(f"read, written: {target}" for target in targets)]  # fmt: skip
    body = [[*planned_cells(row, measured(row, result)), *(walks(row["plans"][target]) for target in targets)]
            for row in rows]  # fmt: skip
    title = (
        "Computed, of one rank: a row's summary goes to each of the others; nothing of this ran but what was measured"
    )
    return f"{title}\n{table(header, body)}"


def planned_cells(row: dict, peer: dict) -> list[str]:
    plan, rows = row["plans"]["cpu"], row["shape"][0]
    return [
        f"{size(row)} {row['dtype']}",
        str(row["ranks"]),
        f"{plan['sent'] / rows:g}",
        f"{plan['received'] / 2**20:.3f}",
        f"{sent(peer) / 2**20:.3f}" if peer else "",
        mebibytes(plan["logits_bytes"]),
        mebibytes(plan["peak_bytes"]),
        mebibytes(peer["peak_bytes"]) if peer else "",
        mebibytes(row["ranks"] * plan["sent"]),
    ]


def measured(row: dict, result: dict) -> dict:
    """What was measured of xent_ext for the same case, if that was."""
    same = ("ranks", "shape", "dtype")
    for other in result["rows"]:
        if all(other[key] == row[key] for key in same) and "peak_bytes" in other["peers"][OURS]:
            return other["peers"][OURS]
    return {}


def walks(plan: dict) -> str:
    return ", ".join(f"{plan[key] / plan['logits_bytes']:.2f}" for key in ("bytes_read", "bytes_written"))


def figure(result: dict) -> Figure:
    time = "least ms of a rank's CPU"
    drawn = bars(result, time, lambda peer: peer.get("cpu", {}).get("least_ms", 0), "MiB; the line: the gradient alone")
    drawn.suptitle(f"Classes that several processes share, on {result['device']}")
    return drawn
