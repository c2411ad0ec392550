"""Measure what a call costs the CPU, whatever the size of the logits: Python, dispatch and launches.

Logits are (4, 10), so that nothing is computed for long; the time is that of the CPU by the wall clock, on a GPU too,
where work is only queued. Everything else is as in `python -m bench run`: fresh processes, turns, a check against
float64 before the timing, medians and quartiles.

A GPU's path costs the same Python without one: `xent_ext, launches stubbed` is xent_ext with tensors on the CPU, its
Triton path chosen, and each launch of a kernel replaced by a function that does nothing, timed after the others, in
turns with torch.nn.functional.cross_entropy in one process with one thread: beside its time is the ratio of the two.
Triton's own part of a launch is not in it, and no result is computed that could be checked.
"""

import contextlib
import statistics
from unittest import mock

import torch
import torch.nn.functional as F
from tqdm import tqdm

import xent_ext
from xent_ext import backends, dispatch

from . import machine, report
from .case import Timed, absence
from .overhead_report import text
from .peer import Case
from .peers import ABOUT, OURS
from .run import ROUNDS, add_peers, add_ratio, measure, summarize, with_ours
from .workers import in_fresh_process

SHAPE = (4, 10)
MODES = ("nograd", "fwd", "full")
SETS = 2
STUBBED = "xent_ext, launches stubbed"
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


def compare(peers, device, seconds: float) -> dict:
    """Measure every pass; return all that the report needs, ready for JSON."""
    result = report.begin("overhead", device) | {
        "method": __doc__,
        "about": {name: ABOUT[name] for name in peers} | {STUBBED: "see the method"},
        "rows": [],
    }
    for mode in tqdm(MODES, "Measuring", unit="pass"):
        case = Case("overhead", "tiny logits", SHAPE, "float32", mode, str(device))
        rows = measure(case, peers, seconds, SETS, on_host=True)
        for row in rows:
            add_ratio(row)
            row["peers"][STUBBED] = stubbed(case, row["upstream"], seconds / (len(peers) * len(rows)))
        result["rows"] += rows
    return result


def stubbed(case: Case, factor: float, seconds: float) -> dict:
    try:
        ours, eager = in_fresh_process(stubbed_calls, case, factor, seconds)
        over_eager = statistics.median(ours) / statistics.median(eager)
        return {"status": "unchecked", "over_eager": over_eager} | summarize(ours)
    except Exception as error:
        return absence(error)


def stubbed_calls(case: Case, factor: float, seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds of each call, of xent_ext's and of PyTorch's own."""
    torch.set_num_threads(1)
    on_cpu = Case(case.suite, case.what, case.shape, case.dtype, case.mode, "cpu")
    with launches_stubbed():
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


class NoDriver:
    """In the place of Triton's driver: a device with a stream, where launches do nothing."""

    @staticmethod
    def get_current_device():
        return 0

    @staticmethod
    def get_current_stream(device):
        return 0

    @staticmethod
    def launch(*arguments):
        pass


def compiled_by_nobody(kernel, grid):
    return lambda *arguments, **options: None


def launched_by_nobody(launch, kernel):
    """What `Launch` keeps of compiled code, of none."""
    launch.driver, launch.code, launch.run = NoDriver, (None,) * 5, NoDriver.launch


def forget():
    """Calls with launches that do nothing are not to be found outside, and others not inside."""
    from xent_ext.kernels import implementation

    implementation.setup.cache_clear()
    dispatch.forget()


@contextlib.contextmanager
def launches_stubbed():
    """Inside, CPU tensors take the Triton path by the plan for an H100, and launching a kernel does nothing."""
    from triton.runtime import KernelInterface
    from xent_ext.kernels import device, implementation, launch

    def gpu(index):  # not a Mock: to call one takes longer than much of what is timed
        return device.INTERPRETED

    def work(device, plan):
        return True

    with (
        mock.patch.object(KernelInterface, "__getitem__", compiled_by_nobody),
        mock.patch.object(launch.Launch, "keep", launched_by_nobody),
        mock.patch.multiple(backends, BACKEND="triton", CHECK=False),
        mock.patch.multiple(implementation, device_properties=gpu, clusters_work=work),
    ):
        forget()
        yield
    forget()
