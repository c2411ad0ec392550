"""Measure the most memory that each implementation of the loss holds at one time, beyond its arguments.

Each is measured in a fresh process: xent_ext's first call, so that buffers which it keeps for later calls are counted;
of the others the second, so that compiling and tuning are not. `full` is forward and backward, the gradient of the
logits included; `nograd` is the forward pass under torch.no_grad(). On a GPU the number is PyTorch's own count of what
it has allocated, on a CPU the highest running total of the allocations and frees that torch.profiler saw: the size of
the process would also count what the C library keeps, and miss what it uses again. `copies` is that number over the
size of the logits.
"""

from tqdm import tqdm

from . import machine, report
from .case import absence, inputs, load, peak_bytes
from .memory_report import text
from .peer import Case
from .peers import ABOUT, OURS
from .run import DTYPES, add_peers, dtypes, with_ours
from .workers import in_fresh_process

SHAPES = {"a language model": (2048, 32000), "a classifier": (4096, 1000), "a segmenter": (8, 19, 256, 256)}
MODES = ("full", "nograd")


def add_arguments(parser):
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="(default: float32 on a CPU, bfloat16 on a GPU)")
    add_peers(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    report.add_out(parser)


def run(args) -> int:
    device = machine.pick_device(args.device)
    result = compare(dtypes(args, device), with_ours(args.peers), device)
    print(text(result))
    print("Written:", *report.write(result, args.out))
    return 0 if all("peak_bytes" in row["peers"][OURS] for row in result["rows"]) else 1


def compare(dtypes, peers, device) -> dict:
    """Measure all; return what the report needs, ready for JSON."""
    cases = [
        Case("memory", what, shape, dtype, mode, str(device))
        for mode in MODES
        for dtype in dtypes
        for what, shape in SHAPES.items()
    ]
    return report.begin("memory", device) | {
        "method": __doc__,
        "about": {name: ABOUT[name] for name in peers},
        "rows": [measure(case, peers) for case in tqdm(cases, "Measuring", unit="case")],
    }


def measure(case: Case, peers: list[str]) -> dict:
    return {
        "what": case.what,
        "shape": case.shape,
        "dtype": case.dtype,
        "pass": case.mode,
        "logits_bytes": case.logits_bytes,
        "peers": {name: peak(case, name) for name in peers},
    }


def peak(case: Case, name: str) -> dict:
    """{"peak_bytes"} of the peer, or why it is absent."""
    try:
        return {"peak_bytes": in_fresh_process(first_call, case, name)}
    except Exception as error:
        return absence(error)


def first_call(case: Case, name: str) -> int:
    return peak_bytes(case, name, load(case, name), *next(inputs(case, 1)))
