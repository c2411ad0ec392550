"""Measure from how many logits on blocks beat PyTorch's own on a CPU: the table of `xent_ext/cpu_own.py`.

For each kind of logits, in sizes that double, PyTorch's own and blocks take turns, and the least time of each counts:
with one thread in CPU seconds, which other processes disturb little, with more by the wall clock, for which the machine
should be quiet. A number of the table is the least size from which on blocks are no slower, for any of the numbers of
classes tried. In half precision PyTorch's own is what the package makes of it.
"""

import itertools
import json
import time
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import xent_ext
from xent_ext import cpu_own, dispatch, memory

from . import machine, report

# Numbers of classes by where they are. Strided ones are those of images of 64 x 64 pixels.
CLASSES = {
    "last": (2, 10, 15, 16, 19, 50, 64, 129, 200, 300, 1000, 32000),
    "columns": (40, 150, 1000),
    "strided": (2, 3, 10, 19, 50, 150, 600, 3000),
}
PIXELS = (64, 64)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = [1 << n for n in range(13, 25)]
SURE = 1.1  # larger sizes need no trial where blocks are that much faster at two sizes
ENOUGH = 0.99  # what is measured to be as fast may be this


def add_arguments(parser):
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each measurement (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file for all ratios")


def run(args) -> int:
    result = measure(args.threads, args.seconds)
    print(text(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(threads: list[int], seconds: float) -> dict:
    """The ratios of all sizes that were tried; ready for JSON."""
    before = torch.get_num_threads()
    torch.empty(memory.MAPPED - 4096, dtype=torch.uint8)  # freed at once: the C library keeps what is no larger
    rows = []
    try:
        for case in tqdm(list(cases(threads)), "Measuring", unit="case"):
            torch.set_num_threads(case["threads"])
            rows.append(case | {"ratios": ratios(case, seconds)})
    finally:
        torch.set_num_threads(before)
    return {"machine": machine.describe(), "method": __doc__, "rows": rows}


def cases(threads):
    for where, counts in CLASSES.items():
        for classes, count, dtype, gradient, dense in itertools.product(
            counts, threads, DTYPES, (True, False), (False, True)
        ):
            yield {
                "threads": count, "kind": cpu_own.kind(where, classes), "where": where, "dtype": dtype,
                "gradient": gradient, "dense": dense, "classes": classes,
            }  # fmt: skip


def ratios(case: dict, seconds: float) -> dict[int, float]:
    """PyTorch's time over that of blocks, by number of logits."""
    found = {}
    for size in SIZES:
        if size < 4 * case["classes"] or (
            case["where"] == "strided" and size < PIXELS[0] * PIXELS[1] * case["classes"]
        ):
            continue
        logits, target = inputs(case, size)
        found[logits.numel()] = ratio(logits, target, case["threads"], seconds)
        if len(found) > 1 and all(ratio > SURE for ratio in list(found.values())[-2:]):
            break
    return found


def ratio(logits, target, threads: int, seconds: float) -> float:
    """PyTorch's least time over that of blocks, of turns that last so long together, or of three."""
    clock = time.process_time if threads == 1 else time.perf_counter
    best = {pytorch: float("inf"), xent_ext.cross_entropy: float("inf")}
    end, turns = time.perf_counter() + seconds, 0
    with mock.patch.object(dispatch, "is_small", never):
        while turns < 3 or time.perf_counter() < end:
            turns += 1
            for function in best:
                best[function] = min(best[function], timed(function, logits, target, clock))
    return best[pytorch] / best[xent_ext.cross_entropy]


def inputs(case: dict, size: int):
    rows = size // case["classes"]
    shape = (rows, case["classes"])
    if case["where"] == "strided":
        shape = (rows // (PIXELS[0] * PIXELS[1]), case["classes"], *PIXELS)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(DTYPES[case["dtype"]])
    if case["where"] == "columns":
        logits = logits.t().contiguous().t()
    if case["dense"]:
        target = torch.randn(shape, generator=generator).softmax(1).to(logits.dtype)
    else:
        target = torch.randint(case["classes"], (shape[0], *shape[2:]), generator=generator)
    return logits.requires_grad_(case["gradient"]), target


def pytorch(logits, target):
    return cpu_own.cross_entropy(logits, target, None, cpu_own.MEAN, -100, 0.0)


def never(*_):  # not a Mock: to call one takes longer than much of what is timed
    return False


def timed(function, logits, target, clock, at_least: float = 0.002) -> float:
    """Seconds of a call, of as many as last long enough to be timed."""
    calls, start = 0, clock()
    while True:
        step(function, logits, target)
        calls += 1
        if (spent := clock() - start) > at_least:
            return spent / calls


def step(function, logits, target):
    with torch.set_grad_enabled(logits.requires_grad):
        loss = function(logits, target)
    if logits.requires_grad:
        torch.autograd.grad(loss, logits)


def crossing(rows: list[dict]) -> int | None:
    """The least size from which on blocks are as fast for all numbers of classes, or None."""
    slower = [size for row in rows for size, ratio in row["ratios"].items() if ratio < ENOUGH]
    sizes = sorted({size for row in rows for size in row["ratios"]})
    return next((size for size in sizes if size > max(slower, default=0)), None)


def text(result: dict) -> str:
    keys = ("threads", "kind", "dtype", "gradient", "dense")
    groups = {}
    for row in result["rows"]:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    header = [*keys, "blocks from", *(f"2^{size.bit_length() - 1}" for size in SIZES)]
    body = [[*map(str, group), str(crossing(rows)), *worst_by_size(rows)] for group, rows in groups.items()]
    return report.table(header, body)


def worst_by_size(rows: list[dict]) -> list[str]:
    """The least ratio of any number of classes, for sizes up to each of `SIZES`."""
    cells = []
    for size in SIZES:
        found = [ratio for row in rows for tried, ratio in row["ratios"].items() if size / 2 < tried <= size]
        cells.append(f"{min(found):.2f}" if found else "")
    return cells
