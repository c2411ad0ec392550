"""Measure what a call costs the CPU, whatever the size of the logits: Python, dispatch and launches.

Logits are (4, 10), so that nothing is computed for long; the time is that of the CPU by the wall clock, on a GPU too,
where work is only queued. Everything else is as in `python -m bench run`: fresh processes, turns, a check against
float64 before the timing, medians and quartiles.

A GPU's path costs the same Python without one: `xent_ext, launches stubbed` is xent_ext with tensors on the CPU, its
Triton path chosen, and each launch of a kernel replaced by a function that does nothing, timed after the others, in
turns with torch.nn.functional.cross_entropy in one process with one thread: beside its time is the ratio of the two.
`xent_ext, Triton's launcher` has what Triton does for a launch in Python, too, up to the function in C that reads the
arguments and calls the driver. No result is computed that could be checked.

`graph`, on a GPU, is a CUDA graph in which forward and backward were captured, of PyTorch's loss and of this one: the
time by the wall clock from a replay to its end, what the GPU takes for its kernels included.
"""

import functools
import statistics

import torch
import torch.nn.functional as F
from tqdm import tqdm

import xent_ext

from . import launched, machine, report
from .case import Timed, Truth, absence, inputs, load, repeated, step, verdict
from .overhead_report import text
from .peer import Case
from .peers import ABOUT, OURS
from .run import ROUNDS, add_peers, add_ratio, measure, summarize, with_ours
from .workers import in_fresh_process

SHAPE = (4, 10)
MODES = ("nograd", "fwd", "full")
SETS = 2
STUBBED, LAUNCHER = "xent_ext, launches stubbed", "xent_ext, Triton's launcher"
WITHOUT_GPU = {STUBBED: launched.by_nobody, LAUNCHER: launched.by_triton}
EAGER = "torch_eager"


def add_arguments(parser):
    add_peers(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seconds", type=float, default=4.0, help="for the calls of a pass (default: %(default)s)")
    report.add_out(parser)


def run(args) -> int:
    device = machine.pick_device(args.device)
    result = compare(with_ours(args.peers), device, args.seconds)
    print(text(result))
    print("Written:", *report.write(result, args.out))
    return 0 if all(row["peers"][OURS]["status"] == "right" for row in result["rows"]) else 1


def compare(peers, device, seconds: float, modes=MODES, stubs=tuple(WITHOUT_GPU)) -> dict:
    """Measure every pass; return all that the report needs, ready for JSON."""
    result = report.begin("overhead", device) | {
        "method": __doc__,
        "about": {name: ABOUT[name] for name in peers} | dict.fromkeys(stubs, "see the method"),
        "rows": [],
    }
    for mode in tqdm(modes, "Measuring", unit="pass"):
        case = Case("overhead", "tiny logits", SHAPE, "float32", mode, str(device))
        rows = measure(case, peers, seconds, SETS, on_host=True)
        for row in rows:
            add_ratio(row)
            for name in stubs:
                row["peers"][name] = without_gpu(name, case, row["upstream"], seconds / (len(peers) * len(rows)))
        result["rows"] += rows
    if device.type == "cuda":
        result["rows"].append(in_graphs(result["about"], rows[0] | {"pass": "graph"}, case, seconds))
    return result


def without_gpu(name: str, case: Case, factor: float, seconds: float) -> dict:
    try:
        ours, eager = in_fresh_process(calls_without_gpu, name, case, factor, seconds)
        over_eager = statistics.median(ours) / statistics.median(eager)
        return {"status": "unchecked", "over_eager": over_eager} | summarize(ours)
    except Exception as error:
        return absence(error)


def calls_without_gpu(name: str, case: Case, factor: float, seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds of each call, of xent_ext's and of PyTorch's own."""
    torch.set_num_threads(1)
    on_cpu = Case(case.suite, case.what, case.shape, case.dtype, case.mode, "cpu")
    with WITHOUT_GPU[name]():
        both = [
            Timed(on_cpu, OURS, xent_ext.cross_entropy, SETS, on_host=True),
            Timed(on_cpu, EAGER, F.cross_entropy, SETS, on_host=True),
        ]
        times = [], []
        for _ in range(ROUNDS):
            for timed, found in zip(both, times, strict=True):
                timed.calls(factor, seconds / ROUNDS / 10)
                found += timed.calls(factor, seconds / ROUNDS)
    return times


# In CUDA graphs

CAPTURED = (OURS, EAGER)
WARM_UP = 3  # calls before a capture, in which kernels are compiled


def in_graphs(names, row: dict, case: Case, seconds: float) -> dict:
    """The row of `graph`, like that of another pass."""
    try:
        found = in_fresh_process(replays, case, seconds / len(CAPTURED))
    except Exception as error:
        found = dict.fromkeys(CAPTURED, absence(error))
    row["peers"] = {name: found.get(name, {"status": "absent", "reason": "is not captured"}) for name in names}
    add_ratio(row)
    return row


def replays(case: Case, seconds: float) -> dict[str, dict]:
    """For each that is captured: whether what it computes is right, and the times of its replays, in turns."""
    logits, target = next(inputs(case, 1))
    graphs = {name: captured(functools.partial(step, case.mode, load(case, name), logits, target, 1.0))
              for name in CAPTURED}  # fmt: skip
    truth = Truth(logits, target)
    clock, times = machine.Clock(logits.device, on_host=True), {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, (graph, _) in graphs.items():
            replay = functools.partial(replayed, graph, clock)
            repeated(replay, clock, seconds / ROUNDS / 10)
            times[name] += repeated(replay, clock, seconds / ROUNDS)
    return {
        name: verdict(truth.errors(loss, gradient, 1.0), truth.allowed) | summarize(times[name])
        for name, (_, (loss, gradient, _)) in graphs.items()
    }


def captured(work) -> tuple:
    """A CUDA graph of some work, and its results, which a replay makes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


def replayed(graph, clock: machine.Clock) -> tuple:
    start = clock.mark()
    graph.replay()
    clock.wait()
    return start, clock.mark()
