"""Compare two results of the same command: what takes longer, or more memory, in the second than in the first.

Rows that both have, by shape, dtype, pass and upstream gradient, are compared for the peers that are named. The exit
status is 1 when a median time or a peak memory grew by more than the ratio, or when a peer that was measured in the
first is missing, wrong or absent in the second, and 2 when there is nothing to compare. Times of different machines,
or of a machine that did something else, compare those: so the machines and their load are printed.
"""

import argparse
import json
import sys
from pathlib import Path

from .machine import one_line
from .peers import OURS, PEERS
from .report import ratio, size, table

KEY = ("what", "shape", "dtype", "pass", "upstream")
MEASURED = {"median_ms": "time", "peak_bytes": "memory"}


def add_arguments(parser):
    parser.add_argument("first", type=Path, metavar="A.json")
    parser.add_argument("second", type=Path, metavar="B.json")
    parser.add_argument(
        "--ratio", type=at_least_one, default=1.1, help="by which B may be above A (default: %(default)s)"
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[OURS], help="(default: %(default)s)")


def at_least_one(text: str) -> float:
    number = float(text)
    if not number >= 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def run(args) -> int:
    results = [json.loads(path.read_text()) for path in (args.first, args.second)]
    for path, result in zip((args.first, args.second), results, strict=True):
        if not isinstance(result, dict) or "rows" not in result:
            print(f"{path} is no result of run, memory, traffic, overhead or linear", file=sys.stderr)
            return 2
        print(f"{path}: {one_line(result['machine'])}; load {result['load_before']:.2f}")
    pairs = list(common(*(measured(result, args.peers) for result in results)))
    if not pairs:
        print(f"nothing to compare: no row of {args.first} has a number of {', '.join(args.peers)}", file=sys.stderr)
        return 2
    print(changes(pairs, args.ratio))
    worse = sum(exceeds(a, b, args.ratio) for _, a, b in pairs)
    print(f"{worse} of {len(pairs)} numbers grew by more than {args.ratio:g}x, or are gone")
    return 1 if worse else 0


def measured(result: dict, peers: list[str]) -> dict[tuple, float]:
    """Every number of these peers, by row, peer and kind; a peer that is not right has none."""
    return {
        (*(json.dumps(row.get(key)) for key in KEY), name, kind): row["peers"][name][kind]
        for row in result["rows"]
        for name in peers
        for kind in MEASURED
        if kind in row["peers"].get(name, {}) and row["peers"][name].get("status") != "wrong"
    }


def common(first: dict, second: dict):
    """(key, number, number or None) of all that the first has."""
    for key, number in first.items():
        yield key, number, second.get(key)


def exceeds(a: float, b: float | None, limit: float) -> bool:
    return b is None or not b <= a * limit  # written so that NaN does


def changes(pairs: list, limit: float) -> str:
    """A table of all numbers, the worst first."""
    growth = sorted(pairs, key=lambda pair: -float("inf") if pair[2] is None else -pair[2] / max(pair[1], 1e-12))
    rows = [
        [*described(key), f"{a:.5g}", "gone" if b is None else f"{b:.5g}",
         "" if b is None or a == 0 else ratio(b, a), "WORSE" if exceeds(a, b, limit) else ""]
        for key, a, b in growth
    ]  # fmt: skip
    return table(["", "logits", "", "pass", "upstream", "peer", "", "A", "B", "B / A", ""], rows)


def described(key: tuple) -> list[str]:
    what, shape, dtype, mode, upstream = map(json.loads, key[: len(KEY)])
    name, kind = key[len(KEY) :]
    return [
        what,
        size({"shape": shape}),
        dtype,
        mode,
        "" if upstream is None else f"{upstream:g}",
        name,
        MEASURED[kind],
    ]
