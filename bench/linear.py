"""Time the last linear layer with its loss, and measure its peak memory, beside what else there is for both together.

How it is measured is as in `python -m bench run`: every case in fresh processes, on a CPU every implementation in its
own, on a GPU in one; the implementations take turns, A B C C B A and so on. Input and weight are the same in each call:
they exceed most caches, and the products take much longer than to read them. Logits are normal with standard deviation
3, targets uniform, there is no bias. Of a turn's calls the first is not counted where there are several; on a CPU most
have one, of seconds. Times are medians and quartiles of single calls, forward and backward, with the gradients of input
and weight and their release.

Variants, of the first shape: the mean loss; half of the rows, by chance, ignored; reduction "none" with another
upstream gradient for each row; the mean loss under torch.no_grad().

Each implementation is checked against float64 before it is timed. Errors are relative: of the loss (of "none" the mean
over the rows), and of each gradient the norm of the difference. Allowed are one eps of the dtype for the loss, two for
a gradient, and 1e-5; what is off by more is shown as WRONG, with its errors and its memory, and neither timed nor
ranked. What is absent is shown with the reason. The exit status is 1 when xent_ext is either.

Peak memory is what a call holds at most beyond its arguments, the gradients included, as `python -m bench memory`
measures it; its floor are the gradients alone. Memory that xent_ext keeps for its next call is counted.

A case is left out where it takes more memory than is free, or where a call would take long by the rate of a matrix
product that is measured first.
"""

from collections.abc import Iterable

from tqdm import tqdm

from . import machine, report
from .case import absence
from .linear_case import Truth, block, check, prepare, product_rate
from .linear_peers import FIRST, OURS, PEERS, VARIANTS, LayerCase, about
from .linear_report import text
from .run import ROUNDS, add_peers, dtypes, prepared, summarize, turns, with_ours
from .shapes import LAYERS, Shape, three
from .workers import in_fresh_process

# float16 is left out: gradients of a mean over so many rows underflow without a loss scale.
DTYPES = ("float32", "bfloat16")
# Seconds, of the products alone. Those of the first two shapes took 2.3 on two cores, and 11 when these had other work.
LONGEST_CALL = 20.0


def add_arguments(parser):
    parser.add_argument(
        "--shapes", nargs="+", type=three, metavar="NxDxC", help="rows, features, classes (default: of models)"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="(default: float32 on a CPU, bfloat16 on a GPU)")
    add_peers(parser, PEERS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help=f"for the timed calls of a case; at least {ROUNDS} calls each are made (default: %(default)s)",
    )
    report.add_out(parser)


def run(args) -> int:
    device = machine.pick_device(args.device)
    shapes = [Shape("as given", shape) for shape in args.shapes] if args.shapes else LAYERS
    result = compare(shapes, dtypes(args, device), with_ours(args.peers, PEERS), device, args.seconds)
    print(text(result))
    print("Written:", *report.write(result, args.out))
    return 0 if all(row["peers"][OURS]["status"] == "right" for row in result["rows"]) else 1


def compare(shapes, dtypes, peers, device, seconds: float) -> dict:
    """Measure all cases that fit; return all that the report needs, ready for JSON."""
    rates = {dtype: in_fresh_process(product_rate, str(device), dtype) for dtype in dtypes}
    free = machine.free_memory(device)
    reasons = {case: too_large(case, peers, rates[case.dtype], free) for case in cases(shapes, dtypes, device)}
    result = report.begin("linear", device) | {
        "operations_per_second": rates,
        "free_bytes": free,
        "left_out": [described(case) | {"reason": reason} for case, reason in reasons.items() if reason],
        "method": __doc__,
        "seconds": seconds,
        "about": {name: about(name) for name in peers},
        "rows": [],
    }
    with tqdm([case for case in reasons if not reasons[case]], desc="Measuring", unit="case") as progress:
        for case in progress:
            progress.set_postfix_str(f"{case.shape} {case.dtype} {case.variant}")
            result["rows"].append(measure(case, peers, seconds))
    result["clocks_after"] = machine.clocks()
    return result


def cases(shapes, dtypes, device) -> Iterable[LayerCase]:
    for dtype in dtypes:
        for shape in shapes:
            for variant in VARIANTS if shape is shapes[0] else ("mean",):
                yield LayerCase(shape.what, shape.size, dtype, variant, str(device))


def described(case: LayerCase) -> dict:
    return {"what": case.what, "shape": case.shape, "dtype": case.dtype, "pass": case.variant}


def too_large(case: LayerCase, peers, rate: float, free: int) -> str | None:
    """Why the case is not measured on this machine, or None."""
    needed, seconds = memory_needed(case, peers), case.operations / rate
    if needed > free:
        return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    if seconds > LONGEST_CALL:
        return f"the products of one call would take about {seconds:.1f} seconds, the limit is {LONGEST_CALL}"
    return None


def memory_needed(case: LayerCase, peers) -> int:
    """Bytes, roughly: the check in float64, or every process's inputs; and what a call allocates.

    On a GPU that is what a call in chunks does: whoever makes all logits may be absent there, for want of memory.
    """
    rows, _, classes = case.shape
    on_cpu = case.device == "cpu"
    exact = 3 * 8 * (case.layer_size + min(rows, Truth.ROWS) * classes)
    call = case.itemsize * (2 * case.layer_size + 4 * (rows if on_cpu else min(rows, Truth.ROWS)) * classes)
    inputs = case.itemsize * case.layer_size
    return max(exact + inputs, (len(peers) if on_cpu else 1) * inputs) + call


def measure(case: LayerCase, peers: list[str], seconds: float) -> dict:
    try:
        checked = in_fresh_process(check, case, peers)
        times = take_turns(case, [name for name in peers if checked[name]["status"] == "right"], seconds)
    except Exception as error:
        # One case that fails, for want of memory say, must not take the others' results with it.
        checked, times = {name: absence(error) for name in peers}, {}
    found = {name: checked[name] | summarize(times.get(name)) for name in peers}
    shares = {"best_baseline": add_shares(found)}
    return described(case) | {"upstream": 1.0, "floor_bytes": case.floor_bytes, "peers": found} | shares


def take_turns(case: LayerCase, peers: list[str], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, by peer."""
    share = seconds / (ROUNDS * max(len(peers), 1))
    times = {name: [] for name in peers}
    with prepared(peers, case, prepare) as processes:
        for name in turns(peers):
            times[name] += processes[name].submit(block, name, share).result()
    return times


def add_shares(peers: dict[str, dict]) -> str | None:
    """Each median as a share of the first's, and of that of the best right baseline, whose name is returned."""
    timed = {name: peer for name, peer in peers.items() if "median_ms" in peer}
    best = min((name for name in timed if name != OURS), key=lambda name: timed[name]["median_ms"], default=None)
    for peer in timed.values():
        if FIRST in timed:
            peer["of_first"] = peer["median_ms"] / timed[FIRST]["median_ms"]
        if best is not None:
            peer["of_best"] = peer["median_ms"] / timed[best]["median_ms"]
    return best
