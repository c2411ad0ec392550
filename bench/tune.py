"""Search the launch numbers of xent_ext for this GPU, and write them to a file that XENT_EXT_TUNING can name.

The numbers are those of `Tuning` in xent_ext/plan.py, with the choices that stand there. One is changed at a time, and
the candidate takes turns with the best numbers so far in every case whose plan it changes, over and over until no
change helps. A call is loss and gradient with an upstream gradient of 1, its inputs and its clock are those of `python
-m bench run`. A candidate is kept where the geometric mean of its times is shorter by at least 1% and by 3.5 standard
errors of the rounds' means, about one in 150 by mere chance. Before it is timed, its loss and gradient are checked
against float64 and its compiled kernels for register spills; candidates that are wrong, spill or cannot run are
skipped, with the reason.

What is searched is the mean loss of class indices without options, for the shapes and dtypes given. Other calls share
the numbers, unmeasured, and nothing has looked whether their kernels spill.

Without a GPU nothing can be searched: the command prints what the plan chooses with the shipped numbers.
"""

import dataclasses
import json
import sys
from pathlib import Path

from xent_ext import backends
from xent_ext.plan import CHOICES

from . import machine, report, search, traffic
from .case import absence
from .peer import Case
from .peers import OURS
from .run import DTYPES, memory_needed, rotating_sets
from .shapes import SUITES, at_least_two, chosen


def add_arguments(parser):
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument("--suite", nargs="+", choices=[*SUITES, "all"], default=["all"], help="shapes (default: all)")
    shapes.add_argument(
        "--shapes", nargs="+", type=at_least_two, metavar="NxC", help="such as 4096x1000 or 8x19x512x512"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="(default: bfloat16)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.35,
        help="for the timed calls of each candidate in each case (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=report.OUT / "tuning.json", help="(default: %(default)s)")


def run(args) -> int:
    if not backends.HAS_TRITON:
        print("Triton is not installed: there are no kernels to tune.", file=sys.stderr)
        return 1
    device = machine.pick_device("auto")
    sizes = dict.fromkeys(args.shapes or (shape.size for _, shape in chosen(args.suite)))
    cases = [Case("tune", "", size, dtype, "full", str(device)) for dtype in args.dtype for size in sizes]
    if device.type == "cpu" and backends.BACKEND != "triton":
        print(shipped_plans(cases))
        print("\nNothing was searched: PyTorch sees no GPU, and which numbers are fastest only a GPU can say.")
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = tune(cases, device, args.seconds)
    print(text(result))
    if not result["cases"]:
        print("No case can be measured: nothing is written.", file=sys.stderr)
        return 1
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Written: {args.out}; it is used where XENT_EXT_TUNING names it.")
    return 0


# With a GPU


def tune(cases: list[Case], device, seconds: float, choices=CHOICES) -> dict:
    """Search these choices; return what a tuning file holds, with all that its numbers depend on."""
    from xent_ext.kernels.device import device_name, device_properties

    from . import candidate  # these need Triton

    name, start = device_name(0), device_properties(0).tuning
    cache, free = machine.last_cache_bytes(device), machine.free_memory(device)
    measure = candidate.Measure(seconds, lambda case: rotating_sets(case, cache))
    result = {"device": name, "tuning": {}, "machine": machine.describe(), "clocks_before": machine.clocks()}
    print(f"Tuning for {name}, from numbers that are {start.source}: {len(cases)} cases.", flush=True)
    left_out = {case: reason for case in cases if (reason := unmeasurable(case, start, measure, cache, free))}
    cases = [case for case in cases if case not in left_out]
    best, trials = search.search(start, choices, cases, candidate.plan, measure, tell)
    best = dataclasses.replace(best, source=f"measured on {name}")
    return result | {
        "tuning": dataclasses.asdict(best),
        "clocks_after": machine.clocks(),
        "method": __doc__,
        "seconds": seconds,
        "cases": [before_and_after(case, start, best, candidate.plan, measure) for case in cases],
        "trials": [dataclasses.asdict(trial) | {"kept": trial.kept} for trial in trials],
        "left_out": [{"shape": case.shape, "dtype": case.dtype, "reason": left_out[case]} for case in left_out],
    }


def unmeasurable(case: Case, start, measure, cache: int, free: int) -> str | None:
    """Why a case is left out, or None: too little memory, or whatever the first numbers meet."""
    # Unlike those of `run`, its check and its timing share a process.
    needed = memory_needed(case, [OURS], cache) + rotating_sets(case, cache) * case.logits_bytes
    if needed > free:
        return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    try:
        measure(start, case)
    except Exception as error:
        return absence(error)["reason"]
    return None


def before_and_after(case: Case, start, best, plan, measure) -> dict:
    seconds = search.medians((start, best), case, measure)
    return {
        "shape": case.shape,
        "dtype": case.dtype,
        "before": plan(start, case) | {"median_ms": 1e3 * seconds[start]},
        "after": plan(best, case) | {"median_ms": 1e3 * seconds[best]},
    }


def tell(trial: search.Trial):
    what = f"{trial.name} = {trial.value}, {trial.cases} cases"
    if trial.skipped:
        print(f"{what}: skipped, {trial.skipped}", flush=True)
    else:
        outcome = "kept" if trial.kept else "not kept"
        print(f"{what}: saves {trial.gain:.1%}, noise {trial.noise:.1%}: {outcome}", flush=True)


def text(result: dict) -> str:
    header = ["logits", "dtype", "before", "after", "before, ms", "after, ms", "ratio"]
    body = [
        [report.size(row), row["dtype"], *(tile(row[when]) for when in ("before", "after")),
         *(f"{row[when]['median_ms']:.4g}" for when in ("before", "after")),
         report.ratio(row["before"]["median_ms"], row["after"]["median_ms"])]
        for row in result["cases"]
    ]  # fmt: skip
    left_out = [f"Left out: {report.size(row)} {row['dtype']}: {row['reason']}" for row in result["left_out"]]
    changes = [f"{name} = {value}" for name, value in result["tuning"].items()]
    return "\n".join(["", machine.one_line(result["machine"]), report.table(header, body), *left_out, *changes])


def tile(plan: dict) -> str:
    """Schedule, rows x classes of a tile, programs x warps that share it."""
    numbers = plan["numbers"]
    rest = f"+{numbers['REST']}" if numbers["REST"] else ""
    shared = f"{numbers['num_ctas']} x {numbers['num_warps']}"
    return f"{plan['schedule']} {numbers['ROWS']} x {numbers['BLOCK']}{rest}, {shared}"


# Without one

COUNTS = ("programs", "SPLITS", "at_once")


def shipped_plans(cases: list[Case]) -> str:
    """For each target the plan of every case, by the numbers that the package ships with."""
    from xent_ext.kernels.device import device_properties

    from . import kernels, offline  # these need Triton

    header = ["logits", "dtype", "schedule, rows x classes, programs x warps", "tiles", "splits", "programs at once"]
    tables = []
    for target, gpu in kernels.TARGETS.items():
        with offline.target(*gpu):
            source = device_properties(0).tuning.source
            plans = [(case, traffic.plan(case.shape, case.dtype)) for case in cases]
        body = [
            ["x".join(map(str, case.shape)), case.dtype, tile(plan), *(str(plan["numbers"][key]) for key in COUNTS)]
            for case, plan in plans
        ]
        tables.append(f"{target}: the shipped numbers, {source}\n{report.table(header, body)}")
    return "\n\n".join(tables)
