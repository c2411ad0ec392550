"""Time the loss beside the other implementations of it that are found here.

How it is measured. Every case - a shape, a dtype, a pass - is measured in fresh processes; on a CPU every
implementation has its own there. The C library's allocator keeps freed memory or hands it back to the system
depending on what the process allocated before, and memory handed back must be faulted in anew, page by page, which
can take longer than the loss itself: no shape and no implementation must leave that to the next. On a GPU, whose
memory PyTorch keeps, they share a process and its inputs. The implementations take turns, A B C C B A and so on, so
that whatever else the machine does falls on all of them; only one works at a time, and each turn starts with calls
that are not counted. Threads are fixed; clock rates are written down as they are found.

Logits are normal with standard deviation 3, targets uniform, the same for all. Several sets of them are used in turn:
as many as exceed the last cache (L2 on a GPU) twice, but at least 2 and at most 16. An implementation that writes
over its logits gets fresh ones for each call; they are copied back between the timed parts.

Passes: `full` is forward and backward, the allocation of the gradient and its release included; `fwd` is the forward
pass of logits that require a gradient; `bwd` is the backward pass alone, after a forward pass that is not timed;
`nograd` is the forward pass under torch.no_grad(). Where a gradient is made in the forward pass, `fwd` and `bwd` say
little by themselves. `full` and `bwd` are measured with an upstream gradient of 1 and with one of 0.5, as gradient
accumulation has, each in the steady state of a training loop. Times are medians and quartiles of single calls, by the
wall clock on a CPU and by CUDA events on a GPU.

GB/s counts what any implementation must move, not what one does move: the logits once and, for `full`, the gradient
once. It is set against the machine's own copy of a large tensor: `roofline` is the time that such a copy takes for as
many bytes. More than 100% of it means that caches helped. The ratio is the fastest right baseline's median over that
of xent_ext.

Before it is timed, every implementation's loss and gradient are checked against float64, in the same passes and with
the same upstream gradients; a wrong one is shown as WRONG, with its errors, and not ranked, an absent one with the
reason. The exit status is 1 when xent_ext is either. Peak memory is what a call holds at most
beyond its arguments, the gradient included, as `python -m bench memory` measures it.
"""

import math
import statistics
import time
from contextlib import ExitStack, contextmanager
from itertools import product

from tqdm import tqdm

from . import machine, report
from .case import PASSES, absence, block, check, copy_bandwidth, prepare
from .peer import Case
from .peers import ABOUT, OURS, PEERS
from .run_report import text
from .shapes import SUITES, chosen
from .workers import fresh_process, in_fresh_process

ROUNDS = 6  # turns of each implementation
MOST_SETS = 16
DTYPES = ("float32", "bfloat16", "float16")
# A case is left out where one call would take longer than this many seconds, which only CPUs do. PyTorch's own moves
# six copies of the logits at least, and on CPUs took about twice as long as copying as much would.
LONGEST_CALL = 0.3
COPIES_IN_A_CALL = 12


def add_arguments(parser):
    parser.add_argument("--suite", nargs="+", choices=[*SUITES, "all"], default=["all"], help="shapes (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="(default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument(
        "--pass", nargs="+", dest="modes", choices=PASSES, default=["full"], help="what to time (default: full)"
    )
    add_peers(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help=f"for the timed calls of a case; at least {ROUNDS} calls each are made (default: %(default)s)",
    )
    report.add_out(parser)


def add_peers(parser, peers=PEERS):
    parser.add_argument(
        "--peers", nargs="+", choices=[name for name in peers if name != OURS], help="baselines (default: all)"
    )


def with_ours(names: list[str] | None, peers=PEERS) -> list[str]:
    return [OURS, *(names or (name for name in peers if name != OURS))]


def run(args) -> int:
    device = machine.pick_device(args.device)
    result = compare(chosen(args.suite), dtypes(args, device), args.modes, with_ours(args.peers), device, args.seconds)
    print(text(result))
    print("Written:", *report.write(result, args.out))
    return 0 if all(row["peers"][OURS]["status"] == "right" for row in result["rows"]) else 1


def dtypes(args, device) -> list[str]:
    return args.dtype or ["float32" if device.type == "cpu" else "bfloat16"]


def compare(suites, dtypes, modes, peers, device, seconds, until=math.inf, tell=lambda result: None) -> dict:
    """Measure all cases that fit; return all that the report needs, ready for JSON.

    No case begins after `until`; after each `tell` is called with the result so far.
    """
    cache = machine.last_cache_bytes(device)
    copy = in_fresh_process(copy_bandwidth, str(device), cache)
    free = machine.free_memory(device)
    cases = [
        Case(suite, shape.what, shape.size, dtype, mode, str(device))
        for mode, dtype, (suite, shape) in product(modes, dtypes, suites)
    ]
    reasons = {case: too_large(case, peers, cache, copy, free) for case in cases}
    result = report.begin("run", device) | {
        "cache_bytes": cache,
        "copy_bytes_per_second": copy,
        "free_bytes": free,
        "left_out": [left_out(case, reason) for case, reason in reasons.items() if reason],
        "method": __doc__,
        "seconds": seconds,
        "about": {name: ABOUT[name] for name in peers},
        "rows": [],
    }
    with tqdm([case for case in cases if not reasons[case]], desc="Measuring", unit="case") as progress:
        for case in progress:
            progress.set_postfix_str(f"{case.shape} {case.dtype} {case.mode}")
            if time.monotonic() > until:
                result["left_out"].append(left_out(case, "its time was up"))
                continue
            rows = measure(case, peers, seconds, rotating_sets(case, cache))
            for row in rows:
                add_rates(row, copy)
            result["rows"] += rows
            tell(result)
    result["clocks_after"] = machine.clocks()
    return result


def left_out(case: Case, reason: str) -> dict:
    return {"what": case.what, "shape": case.shape, "dtype": case.dtype, "pass": case.mode, "reason": reason}


def rotating_sets(case: Case, cache: int) -> int:
    return min(max(math.ceil(2 * cache / case.logits_bytes), 2), MOST_SETS)


def too_large(case: Case, peers, cache: int, copy: float, free: int) -> str | None:
    """Why the case is not measured on this machine, or None."""
    needed, seconds = memory_needed(case, peers, cache), COPIES_IN_A_CALL * case.logits_bytes / copy
    if needed > free:
        return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    if seconds > LONGEST_CALL:
        return f"one call would take about {seconds:.1f} seconds, the limit is {LONGEST_CALL}"
    return None


def memory_needed(case: Case, peers, cache: int) -> int:
    """Bytes, roughly: five tensors in float64 for the check or, while peers are timed, their inputs and theirs."""
    peers = [name for name in peers if PEERS[name].refusal(case) is None]
    wide = 4 * case.logits_bytes // case.itemsize
    check = 5 * 2 * wide
    sets = rotating_sets(case, cache) * case.logits_bytes
    if case.device == "cpu":
        return max(check, len(peers) * (sets + 2 * wide))
    # Inputs are shared, and copied for those that write over them; what PyTorch keeps is for the largest.
    return max(check, (1 + sum(PEERS[name].writes_logits for name in peers)) * sets + 4 * wide)


def measure(case: Case, peers: list[str], seconds: float, sets: int, on_host=False) -> list[dict]:
    """One row for each upstream factor."""
    try:
        checked = in_fresh_process(check, case, peers)
        right = [name for name in peers if checked[name]["status"] == "right"]
        times = take_turns(case, right, seconds, sets, on_host)
    except Exception as error:
        # One case that fails, for want of memory say, must not take the others' results with it.
        checked, times = {name: absence(error) for name in peers}, {}
    return [
        {
            "suite": case.suite,
            "what": case.what,
            "shape": case.shape,
            "dtype": case.dtype,
            "pass": case.mode,
            "upstream": factor,
            "bytes": least_bytes(case),
            "input_sets": sets,
            "peers": {name: checked[name] | summarize(times.get((name, factor))) for name in peers},
        }
        for factor in PASSES[case.mode].factors
    ]


def least_bytes(case: Case) -> int | None:
    """What any implementation must move: logits once, gradient once. Targets are not counted."""
    times = PASSES[case.mode].reads_and_writes
    return None if times is None else times * case.logits_bytes


def take_turns(case: Case, peers, seconds: float, sets: int, on_host=False) -> dict[tuple[str, float], list[float]]:
    """Milliseconds of each call, by peer and upstream factor."""
    factors = PASSES[case.mode].factors
    share = seconds / (ROUNDS * max(len(peers), 1) * len(factors))
    times = {pair: [] for pair in product(peers, factors)}
    with prepared(peers, case, prepare, sets, on_host) as processes:
        for factor, name in product(factors, turns(peers)):
            times[name, factor] += processes[name].submit(block, name, factor, share).result()
    return times


@contextmanager
def prepared(peers, case, prepare, *arguments):
    """The processes of peers, by name, after `prepare(case, name, *arguments)` in each; on a GPU they share one."""
    with ExitStack() as stack:
        shared = None if case.device == "cpu" else stack.enter_context(fresh_process())
        processes = {name: shared or stack.enter_context(fresh_process()) for name in peers}
        for ready in [process.submit(prepare, case, name, *arguments) for name, process in processes.items()]:
            ready.result()
        yield processes


def turns(peers):
    """A B C C B A and so on, `ROUNDS` turns of each."""
    order = list(peers)
    for _ in range(ROUNDS):
        yield from order
        order = order[::-1]


def summarize(times: list[float] | None) -> dict:
    if times is None:
        return {}
    low, median, high = statistics.quantiles(times, method="inclusive")
    return {"median_ms": median, "quartiles_ms": [low, high], "calls": len(times)}


def add_rates(row: dict, copy: float):
    """Bytes per second for each peer that was timed, the roofline, the best baseline, and the ratio to it."""
    timed = {name: peer for name, peer in row["peers"].items() if "median_ms" in peer}
    row["roofline_ms"] = None if row["bytes"] is None else 1e3 * row["bytes"] / copy
    for peer in timed.values():
        if row["bytes"] is not None:
            peer["bytes_per_second"] = 1e3 * row["bytes"] / peer["median_ms"]
            peer["share_of_copy"] = peer["bytes_per_second"] / copy
    add_ratio(row)


def add_ratio(row: dict):
    medians = {name: peer["median_ms"] for name, peer in row["peers"].items() if "median_ms" in peer}
    ours = medians.pop(OURS, None)
    row["best_baseline"] = min(medians, key=medians.get, default=None)
    row["ratio"] = medians[row["best_baseline"]] / ours if ours and medians else None
