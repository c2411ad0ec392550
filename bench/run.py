"""Time xent_ext.cross_entropy beside the other implementations of the loss that are found here.

How it is measured. Every case - a shape, a dtype, a pass - is measured in fresh processes, and there every
implementation in its own. The C library's allocator keeps freed memory or hands it back to the system
depending on what the process allocated before, and memory handed back must be faulted in anew, page by page,
which can take longer than the loss itself: no shape and no implementation must leave that to the next. The
processes take turns, A B C C B A and so on, so that whatever else the machine does falls on all of them; only
one works at a time, and each turn starts with calls that are not counted. Threads are fixed.

Logits are normal with standard deviation 3, targets uniform, the same for all. Several sets of them are used
in turn: as many as exceed the last cache twice, but at least 2 and at most 16.

Passes: `full` is forward and backward, the allocation of the gradient and its release included, and once with
an upstream gradient of 1 and once with one of 0.5, as gradient accumulation has; `fwd` is the forward pass of
logits that require a gradient; `nograd` that under torch.no_grad(). Times are medians and quartiles of single
calls, by the wall clock on a CPU and by CUDA events on a GPU.

GB/s counts what any implementation must move, not what one does move: the logits once and, for `full`, the
gradient once. It is set against the machine's own copy of a large tensor; more than 100% means that caches
helped. The ratio is the fastest right baseline's median over that of xent_ext.

Before it is timed, every implementation's loss and gradient are checked against float64; a wrong one is shown as
wrong and not timed, an absent one with the reason. The exit status is 1 when xent_ext is either. Peak memory is
that of the first call beyond the logits, the gradient included.
"""

import math
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from . import machine, run_report
from .case import PASSES, Case, block, check, copy_bandwidth, prepare
from .peers import OURS, PEERS
from .shapes import SUITES, shapes

ROUNDS = 10  # turns of each implementation
MOST_SETS = 16


def add_arguments(parser):
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="shapes (default: all)")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32"], help="(default: float32)"
    )
    parser.add_argument(
        "--pass", nargs="+", dest="modes", choices=PASSES, default=["full"], help="what to time (default: full)"
    )
    parser.add_argument(
        "--peers", nargs="+", choices=[name for name in PEERS if name != OURS], help="baselines (default: all)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help=f"for the timed calls of a case; at least {ROUNDS} calls each are made (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("xent_ext_run"), help="folder of the plot and the JSON (%(default)s)"
    )


def run(args) -> int:
    device = machine.pick_device(args.device)
    peers = [OURS, *(args.peers or (name for name in PEERS if name != OURS))]
    result = compare(args.suite, args.dtype, args.modes, peers, device, args.seconds)
    print(run_report.text(result))
    print("Written:", *run_report.write(result, args.out))
    return 0 if all(row["peers"][OURS]["status"] == "right" for row in result["rows"]) else 1


def compare(suites, dtypes, modes, peers, device, seconds) -> dict:
    """Measure all cases that fit; return all that the report needs, ready for JSON."""
    cache = machine.last_cache_bytes(device)
    free = machine.free_memory(device)
    cases = [
        Case(suite, shape.what, shape.size, dtype, mode, str(device))
        for mode, dtype, (suite, shape) in product(modes, dtypes, shapes(suites, device.type))
    ]
    fitting = [case for case in cases if memory_needed(case, peers, cache) <= free]
    result = {
        "machine": machine.describe(),
        "device": str(device),
        "load_before": os.getloadavg()[0],
        "cache_bytes": cache,
        "copy_bytes_per_second": in_fresh_process(copy_bandwidth, str(device), cache),
        "free_bytes": free,
        "left_out": [
            {"what": case.what, "shape": case.shape, "dtype": case.dtype, "needs": memory_needed(case, peers, cache)}
            for case in cases
            if case not in fitting
        ],
        "method": __doc__,
        "seconds": seconds,
        "includes": {name: PEERS[name].INCLUDES for name in peers},
        "rows": [],
    }
    with tqdm(fitting, desc="Measuring", unit="case") as progress:
        for case in progress:
            progress.set_postfix_str(f"{case.shape} {case.dtype} {case.mode}")
            result["rows"] += measure(case, peers, seconds, rotating_sets(case, cache))
    for row in result["rows"]:
        add_rates(row, result["copy_bytes_per_second"])
    return result


def rotating_sets(case: Case, cache: int) -> int:
    return min(max(math.ceil(2 * cache / case.logits_bytes), 2), MOST_SETS)


def memory_needed(case: Case, peers, cache: int) -> int:
    """Bytes, roughly: five tensors in float64 for the check or, while it is timed, two in float32 beside the inputs."""
    check = 5 * 8 * math.prod(case.shape)
    timing = len(peers) * (rotating_sets(case, cache) * case.logits_bytes + 2 * 4 * math.prod(case.shape))
    return max(check, timing)


def fresh_process() -> ProcessPoolExecutor:
    threads = torch.get_num_threads()
    return ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,))


def in_fresh_process(function, *args):
    with fresh_process() as process:
        return process.submit(function, *args).result()


def measure(case: Case, peers: list[str], seconds: float, sets: int) -> list[dict]:
    """One row for each upstream factor."""
    try:
        checked = in_fresh_process(check, case, peers)
        right = [name for name in peers if checked[name]["status"] == "right"]
        times = take_turns(case, right, seconds, sets)
    except Exception as error:
        # One case that fails, for want of memory say, must not take the others' results with it.
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        checked, times = {name: {"status": "absent", "reason": reason} for name in peers}, {}
    return [
        {
            "suite": case.suite,
            "what": case.what,
            "shape": case.shape,
            "dtype": case.dtype,
            "pass": case.mode,
            "upstream": factor,
            "bytes": case.least_bytes,
            "input_sets": sets,
            "peers": {name: checked[name] | summarize(times.get((name, factor))) for name in peers},
        }
        for factor in PASSES[case.mode].factors
    ]


def take_turns(case: Case, peers: list[str], seconds: float, sets: int) -> dict[tuple[str, float], list[float]]:
    """Milliseconds of each call, by peer and upstream factor."""
    factors = PASSES[case.mode].factors
    share = seconds / (ROUNDS * max(len(peers), 1) * len(factors))
    times = {pair: [] for pair in product(peers, factors)}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(fresh_process()) for name in peers}
        for ready in [process.submit(prepare, case, name, sets) for name, process in processes.items()]:
            ready.result()
        for factor in factors:
            order = list(peers)
            for _ in range(ROUNDS):
                for name in order:
                    times[name, factor] += processes[name].submit(block, name, factor, share).result()
                order.reverse()
    return times


def summarize(times: list[float] | None) -> dict:
    if times is None:
        return {}
    low, median, high = statistics.quantiles(times, method="inclusive")
    return {"median_ms": median, "quartiles_ms": [low, high], "calls": len(times)}


def add_rates(row: dict, copy: float):
    """Bytes per second for each peer that was timed, the best baseline, and the ratio to it."""
    timed = {name: peer for name, peer in row["peers"].items() if "median_ms" in peer}
    for peer in timed.values():
        peer["bytes_per_second"] = 1e3 * row["bytes"] / peer["median_ms"]
        peer["share_of_copy"] = peer["bytes_per_second"] / copy
    medians = {name: peer["median_ms"] for name, peer in timed.items()}
    ours = medians.pop(OURS, None)
    row["best_baseline"] = min(medians, key=medians.get, default=None)
    row["ratio"] = medians[row["best_baseline"]] / ours if ours and medians else None
