"""Prove or disprove xent_ext on this machine, in one command: is it right, fast and well planned, and what does a call
cost? Needs a GPU for all but the first.

Right: every case is a call of the loss - each schedule, chosen and forced, dtypes, options, layouts, gradients, CUDA
graphs, streams, the last linear layer. Its loss and gradients are compared with float64, on the device. The number that
is shown is the largest error over PyTorch's own, row by row, where PyTorch's counts as what rounding can't be spared at
least (see bench/verify_errors.py); up to 2 is right. Each case is run twice and must give the same bits, every tensor
that it takes or allocates lies in a buffer with guard zones that must be unharmed, and its arguments must be unchanged.
Without a GPU the kernels run in Triton's interpreter, with fewer rows; and what is for CPUs is examined everywhere.
`--sanitize` runs the GPU's cases again under NVIDIA's compute-sanitizer.

Fast: as `python -m bench run` measures it, in run.json; beside it the modelled time of bench/model.json. Well planned:
every schedule and cluster size that can take some logits is timed, beside the one that the plan chose, and what
`python -m bench tune` would set of these numbers is written to tuning.json. The host: as `python -m bench overhead`
measures it, eager and in a CUDA graph.

All of it is in one folder, and in a zip file of it to send to whoever asked. The exit status is 1 if a result is wrong,
and 0 if none is, whatever was left out.
"""

import functools
import json
import shutil
import time
from pathlib import Path

import torch
from tqdm import tqdm

from xent_ext import backends

from . import machine, model, overhead, report, verify_plans, verify_report, verify_worker
from . import run as side_by_side
from .case import absence
from .peers import OURS, PEERS
from .shapes import Shape
from .verify_cases import CASES, CPU, GPU, INTERPRETER, names, names_to_sanitize
from .workers import in_fresh_process

OUT = Path("xent_ext_verify")
# Seconds in all, if it is quick or not, in which something may begin; and the share of what is left of them in which
# something of a part may begin, so that each has its turn.
SECONDS = {True: 100, False: 540}
SHARES = {GPU: 0.5, INTERPRETER: 0.8, CPU: 1.0, "fast": 0.55, "planned": 0.7}
FAST = (
    Shape("Llama 2", (8192, 32000)),
    Shape("few rows", (64, 151936)),
    Shape("ImageNet-1k", (4096, 1000)),
    Shape("10 classes, points", (65536, 10)),
    Shape("Llama 3", (8192, 128256)),
    Shape("GPT-2", (4096, 50257)),
    Shape("images", (8, 19, 1024, 2048)),
    Shape("Qwen 2.5", (4096, 151936)),
    Shape("Gemma 3", (4096, 262144)),
    Shape("4096 classes", (16384, 4096)),
    Shape("128 classes", (65536, 128)),
    Shape("one row", (1, 151936)),
)
PLANNED = (
    (8192, 32000),
    (64, 151936),
    (4096, 50257),
    (8192, 128256),
    (4096, 151936),
    (4096, 262144),
    (8, 151936),
    (16384, 4096),
)
QUICK_FAST, QUICK_PLANNED = 3, 2  # the first of these
DTYPE = "bfloat16"
# Those that stand for others here: in float32 PyTorch's own is slower, and to tune takes longer than all of this.
LEFT_OUT_PEERS = ("torch_eager_float", "torch_compile_float", "torch_compile_max_autotune",
                  "torch_compile_max_autotune_float")  # fmt: skip
SECONDS_OF_A_CASE, SECONDS_OF_A_PLAN, SECONDS_OF_CALLS = 2.0, 0.2, 2.0


def add_arguments(parser):
    parser.add_argument("--quick", action="store_true", help="fewer cases and shapes: at most two minutes, not ten")
    parser.add_argument("--sanitize", action="store_true", help="the cases under compute-sanitizer, too: takes long")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of all results (default: %(default)s)")


def run(args) -> int:
    work = Verification(args.quick, args.sanitize, args.out)
    try:
        work.parts()
    except KeyboardInterrupt:
        work.result["undone"].append("interrupted: what comes after was not done")
    work.write()
    out = args.out.resolve()
    archive = shutil.make_archive(str(out), "zip", out.parent, out.name)
    print(verify_report.text(work.result))
    print("Written:", args.out / "report.html", archive)
    print(verify_report.last_line(work.result), flush=True)
    return 1 if verify_report.count(work.result)["wrong"] else 0


class Verification:
    """The parts, one after another, each with what it adds to the result. What one can't do stops no other."""

    def __init__(self, quick: bool, sanitize: bool, out: Path):
        self.quick, self.sanitize, self.out = quick, sanitize, out
        self.device = machine.pick_device("auto")
        self.on_gpu = self.device.type == "cuda"
        self.end = time.monotonic() + SECONDS[quick]
        self.result = report.begin("verify", self.device) | {
            "method": __doc__,
            "quick": quick,
            "gpus": [str(torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count())],
            "cases": [],
            "fast": [],
            "planned": [],
            "tuned": {},
            "host": [],
            "undone": [],
        }

    def parts(self):
        for where in (GPU, CPU) if self.on_gpu else (INTERPRETER, CPU):
            self.attempt(where, functools.partial(self.right, where))
        if self.sanitize:
            self.attempt(verify_worker.SANITIZER, self.sanitized)
        for part in (self.fast, self.host, self.planned):
            if reason := self.hindrance():
                self.undone(part.__name__, reason)
            else:
                self.attempt(part.__name__, part)

    def attempt(self, name: str, part):
        try:
            part()
        except Exception as error:
            self.undone(name, absence(error)["reason"])
        self.write()

    def hindrance(self) -> str | None:
        """Why nothing can be timed, or None."""
        if not self.on_gpu:
            return "PyTorch sees no GPU"
        if not backends.HAS_TRITON:
            return "Triton is not installed"
        return "its time was up" if time.monotonic() > self.end else None

    def write(self):
        report.write(self.result, self.out)

    def undone(self, part: str, reason: str):
        self.result["undone"].append(f"{part}: {reason}")

    def until(self, part: str) -> float:
        now = time.monotonic()
        return now + SHARES[part] * (self.end - now)

    # The parts

    def right(self, where: str):
        """The cases that are for GPUs, for their kernels in the interpreter, or for CPUs."""
        if where != CPU and not backends.HAS_TRITON:
            self.undone(where, "Triton is not installed")
            return
        if where == INTERPRETER:
            self.undone("the kernels on a GPU", "PyTorch sees no GPU; they ran in Triton's interpreter")
        chosen = names(where, self.quick)
        with tqdm(verify_worker.findings(where, chosen, self.until(where)), total=len(chosen)) as progress:
            progress.set_description(f"Right, {where}")
            for found in progress:
                self.result["cases"].append(found)
        order = list(CASES)
        self.result["cases"].sort(key=lambda row: (row["where"] == CPU, order.index(row["name"])))

    def sanitized(self):
        if self.on_gpu:
            start = time.monotonic()
            self.result["cases"].append(verify_worker.sanitized(names_to_sanitize(self.quick), self.out))
            self.end += time.monotonic() - start  # which was asked for on top
        else:
            self.undone(verify_worker.SANITIZER, "PyTorch sees no GPU")

    def fast(self):
        shapes = [("verify", shape) for shape in (FAST[:QUICK_FAST] if self.quick else FAST)]
        peers = [name for name in PEERS if name not in LEFT_OUT_PEERS]

        def keep(result: dict):
            self.result |= {"fast": result["rows"], "copy_bytes_per_second": result["copy_bytes_per_second"]}
            for row in result["rows"]:
                row["modelled_ms"] = model.milliseconds(result["machine"]["gpu"], row["shape"], row["dtype"])

        until = self.until("fast")
        report.write(side_by_side.compare(
            shapes, [DTYPE], ["full"], peers, self.device, SECONDS_OF_A_CASE, until, keep), self.out)  # fmt: skip

    def host(self):
        peers = [OURS, overhead.EAGER]
        result = overhead.compare(peers, self.device, SECONDS_OF_CALLS, modes=("full",), stubs=())
        self.result["host"] = result["rows"]
        report.write(result, self.out)

    def planned(self):
        sizes, until = PLANNED[:QUICK_PLANNED] if self.quick else PLANNED, self.until("planned")
        arguments = DTYPE, str(self.device), SECONDS_OF_A_PLAN
        for size in tqdm(sizes, "Planned", unit="shape"):
            found = {"left_out": "its time was up"}
            if time.monotonic() < until:
                try:
                    found = in_fresh_process(verify_plans.compare, size, *arguments)
                except Exception as error:
                    found = {"left_out": absence(error)["reason"]}
            self.result["planned"].append({"shape": size, "dtype": DTYPE} | found)
        measured = [row["shape"] for row in self.result["planned"] if "plans" in row]
        if measured and time.monotonic() < self.end:
            tuning = in_fresh_process(verify_plans.tuned, measured, *arguments)
            self.result["tuned"] = verify_plans.changes(tuning)
            (self.out / "tuning.json").write_text(json.dumps(tuning, indent=1) + "\n")
