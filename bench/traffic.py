"""What each implementation must move and hold for each logit, by a model that is checked against what it allocates.

The model is that of each peer's adapter, which derives it in its docstring: bytes read and written, forward and
backward with an upstream gradient of 1, and the most that is held at one time beyond the arguments, the gradient
included. What has a few numbers for each row is left out of the models of other implementations, and a row that is
read again at once is counted once, as caches hold it. No counter tells what is moved, but what is moved through memory
is allocated first: the model's memory must be what `python -m bench memory` measures, but for 16 bytes a row and 64
KiB, or the row is marked as DIFFERENT and the exit status is 1. The least time is that of a copy of as many bytes.

The second table is xent_ext's plan for GPUs that need not be there: nothing runs.
"""

import torch
from tqdm import tqdm

import xent_ext
from xent_ext import backends

from . import machine, memory, report
from .case import absence, copy_bandwidth
from .peer import Case
from .peers import ABOUT, PEERS
from .run import DTYPES, add_peers, dtypes, with_ours
from .traffic_report import text
from .workers import in_fresh_process

# One for each schedule there is, and few logits, which take PyTorch's own on a CPU.
SHAPES = {
    "a language model": (2048, 32000),
    "a large vocabulary": (256, 262144),
    "a classifier": (4096, 1000),
    "points": (65536, 10),
    "a segmenter": (8, 19, 256, 256),
    "few rows": (16, 1000),
    "few long rows": (4, 262144),
}
PLANNED = ("bfloat16", "float32")
ROW_BYTES, CALL_BYTES = 16, 64 << 10  # what the model may miss


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
    return 0 if all(peer.get("agrees", True) for row in result["rows"] for peer in row["peers"].values()) else 1


def compare(dtypes, peers, device) -> dict:
    """The models beside the measurements; all that the report needs, ready for JSON."""
    cases = [
        Case("traffic", what, shape, dtype, "full", str(device)) for dtype in dtypes for what, shape in SHAPES.items()
    ]
    return report.begin("traffic", device) | {
        "method": __doc__,
        "about": {name: ABOUT[name] for name in peers},
        "copy_bytes_per_second": in_fresh_process(copy_bandwidth, str(device), machine.last_cache_bytes(device)),
        "rows": [row(case, peers) for case in tqdm(cases, "Measuring", unit="case")],
        "planned": planned() if backends.HAS_TRITON else [],
    }


def row(case: Case, peers: list[str]) -> dict:
    return {
        "what": case.what,
        "shape": case.shape,
        "dtype": case.dtype,
        "pass": case.mode,
        "logits_bytes": case.logits_bytes,
        "peers": {name: model_and_measurement(case, name) for name in peers},
    }


def model_and_measurement(case: Case, name: str) -> dict:
    measured = memory.peak(case, name)
    if "peak_bytes" not in measured:
        return measured
    try:
        moved = in_fresh_process(modelled, case, name)
    except Exception as error:
        return absence(error)
    missed = abs(measured["peak_bytes"] - moved.peak)
    return measured | {
        "bytes_read": moved.read,
        "bytes_written": moved.written,
        "modelled_peak_bytes": moved.peak,
        "schedule": moved.schedule,
        "agrees": missed <= ROW_BYTES * case.rows + CALL_BYTES,
    }


def modelled(case: Case, name: str):
    return PEERS[name].moved(case)


def planned() -> list[dict]:
    """xent_ext's own account of its schedules, for each shape, dtype and target."""
    from . import kernels, offline  # these need Triton

    rows = []
    for target, gpu in kernels.TARGETS.items():
        with offline.target(*gpu):
            for dtype in PLANNED:
                rows += [{"target": target, "what": what, "shape": shape, "dtype": dtype, **plan(shape, dtype)}
                         for what, shape in SHAPES.items()]  # fmt: skip
    return rows


def plan(shape, dtype: str, device="cpu", **options) -> dict:
    logits = torch.empty(shape, dtype=getattr(torch, dtype), device=device, requires_grad=True)
    target = torch.empty(shape[:1] + shape[2:], dtype=torch.int64, device=device)
    traffic = xent_ext.explain(logits, target, **options).traffic
    sent = {"sent": traffic.sent, "received": traffic.received} if traffic.sent else {}
    return sent | {
        "schedule": traffic.schedule,
        "numbers": traffic.numbers,
        "logits_bytes": logits.numel() * logits.element_size(),
        "bytes_read": traffic.bytes_read,
        "bytes_written": traffic.bytes_written,
        "peak_bytes": traffic.memory,
    }
