"""Compile every variant of the kernels, without a GPU, and say what the compiler made of them.

For each variant and target: registers and bytes spilled of a thread, shared memory of a program, the accesses to
logits and gradient by width, and the size of the code. A loss call is made as a user would make it, for a GPU that
need not be there (see bench/offline.py): what is compiled is what that GPU would run.
"""

import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import xent_ext
from xent_ext import backends

from . import report

MOST_PROCESSES = 8  # each starts with importing PyTorch and Triton
TARGETS = {"sm_80": ("cuda", 80), "sm_90": ("cuda", 90), "sm_100": ("cuda", 100), "gfx942": ("hip", "gfx942")}


@dataclass(frozen=True)
class Variant:
    """A loss call that has kernels compiled."""

    why: str
    shape: tuple
    dtype: torch.dtype
    probabilities: bool = False
    weight: bool = False
    smoothing: float = 0.0
    reduction: str = "mean"
    backwards: int = 1  # 0: no gradient; 2: a second backward makes the gradient anew
    options: tuple = ()  # those for training: (name, value) of each
    ranks: int = 0  # which share the classes, of which these are one's

    def __str__(self):
        options = [
            str(self.dtype).removeprefix("torch."),
            *["probabilities"] * self.probabilities,
            *["weight"] * self.weight,
            *["smoothing"] * (self.smoothing > 0),
            self.reduction,
            *["no gradient"] * (self.backwards == 0),
            *[name if value is True else f"{name}={value}" for name, value in self.options],
            *[f"{self.ranks} ranks"] * (self.ranks > 0),
        ]
        return f"{self.shape} {' '.join(options)}"

    @property
    def aligned(self):
        """Whether neighbours in memory, classes or else rows, come in multiples of eight."""
        return math.prod(self.shape[2:] or self.shape[1:]) % 8 == 0


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CAPPED = (("logit_scale", 0.5), ("softcap", 30.0), ("z_loss", 1e-4))
STATISTICS = (("return_stats", True),)
EVERY_CLASS = {"weight": True, "smoothing": 0.1}  # every class has a target mass of its own
VARIANTS = [
    # Whole rows in the registers of a program.
    Variant("short rows share a program", (4096, 1000), BF16, backwards=2),
    Variant("and in float32", (4096, 1000), FP32),
    Variant("nothing of the logits' size is written", (4096, 1000), BF16, backwards=0),
    Variant("the gradient waits for its factors", (4096, 1000), BF16, reduction="none"),
    Variant("a second tile, of probabilities", (4096, 1000), FP16, probabilities=True),
    Variant("very short rows, no vector's multiple", (65536, 10), FP32),
    Variant("rows start at any element", (4096, 1003), BF16),
    Variant("the most that a thread holds of float64", (512, 8000), FP64, **EVERY_CLASS),
    # The same with rows as neighbours in memory.
    Variant("segmentation with class weights", (8, 19, 1024, 2048), BF16, weight=True, backwards=2),
    Variant("a loss for each pixel", (8, 19, 1024, 2048), FP32, smoothing=0.1, reduction="none"),
    Variant("images of no vector's multiple", (8, 21, 511, 511), FP16),
    Variant("offsets beyond 32 bits", (1, 257, 4096, 2048), BF16, smoothing=0.1),
    # Longer rows, in the registers of a program or of a cluster of two.
    Variant("the most that a thread holds", (8192, 32000), BF16, backwards=2),
    Variant("and in float32", (8192, 32000), FP32),
    Variant("and with every option", (8192, 32000), BF16, **EVERY_CLASS),
    Variant("and without a gradient", (8192, 32000), FP32, backwards=0, **EVERY_CLASS),
    Variant("and a second tile, of probabilities", (8192, 32000), FP32, True, reduction="none", **EVERY_CLASS),
    # Large vocabularies: the largest clusters, or streamed.
    Variant("a row of the largest cluster", (4096, 128256), BF16, backwards=2),
    Variant("and with every option", (4096, 128256), FP32, **EVERY_CLASS),
    Variant("rows start at any element", (8192, 50257), BF16),
    # Streamed by some targets or by all.
    Variant("the largest vocabularies", (4096, 256000), BF16, backwards=2),
    Variant("and in float32, beyond 2 GiB", (4096, 256000), FP32),
    Variant("and without a gradient", (4096, 256000), FP16, backwards=0),
    Variant("and with every option", (4096, 256000), BF16, reduction="none", **EVERY_CLASS),
    Variant("a second tile, of probabilities", (1024, 256000), FP32, True, **EVERY_CLASS),
    Variant("rows start at any element", (4096, 151665), BF16),
    Variant("float64", (512, 32000), FP64),
    Variant("few rows", (8, 151936), BF16, backwards=2),
    Variant("few rows with every option", (16, 256000), FP32, True, **EVERY_CLASS),
    Variant("few rows without a gradient", (16, 256000), BF16, backwards=0, **EVERY_CLASS),
    Variant("rows as neighbours in memory", (4, 4096, 128, 128), BF16, **EVERY_CLASS),
    # With options for training.
    Variant("capped logits of short rows", (4096, 1000), BF16, options=CAPPED),
    Variant("and of long ones", (8192, 32000), BF16, options=CAPPED),
    Variant("and of streamed ones", (4096, 256000), FP32, True, options=CAPPED),
    Variant("statistics of short rows", (4096, 1000), BF16, options=STATISTICS),
    Variant("and of long ones", (8192, 32000), BF16, options=STATISTICS),
    Variant("and of few", (8, 151936), BF16, options=STATISTICS),
    Variant("and of pixels", (8, 19, 1024, 2048), BF16, reduction="none", options=STATISTICS),
    # A slice of the classes, of which other ranks have the rest.
    Variant("a slice of a large vocabulary", (4096, 32000), BF16, backwards=2, ranks=4),
    Variant("and with every option", (4096, 16000), FP32, ranks=3, **EVERY_CLASS),
    Variant("and statistics, of few rows", (8, 64000), BF16, options=STATISTICS, ranks=2),
]

HEADER = [
    "variant",
    "kernel",
    "pass",
    "cluster",
    "registers",
    "spills",
    "shared",
    "logits read",
    "gradient written",
    "code",
]
LEGEND = """
Programs of a cluster, which share a row; registers of a thread (vector registers on AMD) and bytes that it spills to
memory, with the scalar registers that AMD's compiler spills to vector registers; bytes of shared memory of a program;
bytes of code. Accesses by the bits that one instruction moves for a thread: "4x128 2x16" are four of 128 bits and two
of 16. The logit at a row's target is read once more by itself. A kernel that several variants share is shown once."""


def without_tools() -> list[str]:
    """Targets that the installed Triton links with what is not here: old ones have no linker for AMD GPUs."""
    from triton.backends.amd.compiler import HIPBackend

    try:
        getattr(HIPBackend, "path_to_rocm_lld", bool)()
    except Exception:  # there is no type of its own for it
        return ["gfx942"]
    return []


def add_arguments(parser):
    parser.add_argument(
        "--target", nargs="+", choices=TARGETS, help="(default: all that the installed Triton has the tools for)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the data here too")


def run(args) -> int:
    if not backends.HAS_TRITON:
        print("Triton is not installed: there are no kernels to compile.", file=sys.stderr)
        return 1
    targets = args.target or [target for target in TARGETS if target not in without_tools()]
    rows = compile_all(targets)
    for target in targets:
        print(f"\n{target}\n{table([row for row in rows if row['target'] == target])}")
    for target in [] if args.target else without_tools():
        print(f"\n{target}: not compiled, as the installed Triton lacks the linker")
    print(LEGEND)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def compile_all(targets: list[str]) -> list[dict]:
    """Describe what every variant compiles for every target."""
    calls = list(product(targets, VARIANTS))
    # A forked child would inherit PyTorch's locks without its threads.
    with ProcessPoolExecutor(min(os.cpu_count() or 1, MOST_PROCESSES), multiprocessing.get_context("spawn")) as pool:
        described = list(tqdm(pool.map(compile_call, *zip(*calls, strict=True)), "Compiling", len(calls), unit="call"))
    return list(chain.from_iterable(described))


def compile_call(target: str, variant: Variant) -> list[dict]:
    """Make the variant's loss call, forward and backward, for the target; describe what that compiles."""
    from . import assembly, offline  # these need Triton, which other commands do without

    with offline.target(*TARGETS[target]) as launches:
        make_call(variant)
    return [
        {
            "target": target,
            "variant": str(variant),
            "why": variant.why,
            "kernel": launch.name,
            "num_ctas": launch.kernel.metadata.num_ctas,
            "hash": launch.kernel.hash,
            **walk(launch, variant),
            **assembly.describe(launch.kernel),
        }
        for launch in launches
    ]


def make_call(variant: Variant):
    """The tensors are never touched, so that they take no memory, however large."""
    rows = variant.shape[:1] + variant.shape[2:]
    x = torch.empty(variant.shape, dtype=variant.dtype, requires_grad=variant.backwards > 0)
    group = {"process_group": group_of(variant.ranks)} if variant.ranks else {}
    loss = xent_ext.cross_entropy(
        x,
        torch.empty_like(x, requires_grad=False) if variant.probabilities else torch.empty(rows, dtype=torch.int64),
        torch.empty(variant.shape[1], dtype=variant.dtype) if variant.weight else None,
        reduction=variant.reduction,
        label_smoothing=variant.smoothing,
        **dict(variant.options),
        **group,
    )
    if isinstance(loss, tuple):
        loss, _ = loss
    for _ in range(variant.backwards):
        torch.autograd.grad(loss, x, torch.empty_like(loss), retain_graph=True)


def group_of(ranks: int):
    """A process group of so many ranks, of which this process is the first and the others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    return dist.group.WORLD


def walk(launch, variant: Variant) -> dict:
    """What a launch does with the logits, and in how many vectors of 128 bits a thread could read its tile once."""
    arguments, metadata = launch.arguments, launch.kernel.metadata
    if "results" not in arguments:  # it has nothing to do with logits but those at the targets
        return {"pass": ""}
    results, gradient, numbers = arguments["results"], arguments["gradient"], arguments["K"]
    if gradient.view is None:
        name = "loss"
    elif gradient.seen is not None:
        name = "remake"
    else:
        name = "gradient" if results.loss is None else "loss+gradient"
    threads = metadata.num_ctas * metadata.num_warps * metadata.target.warp_size
    pieces = [numbers.BLOCK, *([numbers.REST] if numbers.REST and not numbers.EDGE else [])]
    tiles = [numbers.ROWS * classes * variant.dtype.itemsize for classes in pieces]
    return {
        "pass": name,
        "rows": numbers.ROWS,
        "walks": walks(launch.name, gradient.view is not None),
        "vectors": sum(max(tile // (16 * threads), 1) for tile in tiles),
        "gathers": "loss" in name and not variant.probabilities,  # the target's logit, by itself
    }


def walks(kernel: str, writes: bool) -> int:
    """How often a kernel reads all the logits."""
    return {"resident": 1, "streaming": 1 + writes, "gradient": int(writes)}[kernel]


def table(rows: list[dict]) -> str:
    """A line for each kernel, under the first variant that has it compiled."""
    kernels: dict = {}
    for row in rows:
        kernels.setdefault(row["hash"], row)
    return report.table(
        HEADER,
        [
            [
                row["variant"], row["kernel"], row["pass"], str(row["num_ctas"]), str(row["registers"]), spills(row),
                str(row["shared_bytes"]), widths(row, "given.logits.ptr", "load"),
                widths(row, "gradient.view.ptr", "store"), str(row["code_bytes"]),
            ]
            for row in kernels.values()
        ],
    )  # fmt: skip


def spills(row: dict) -> str:
    return f"{row['spill_bytes']}" + (f" + {row['scalar_spills']} scalar" if row["scalar_spills"] else "")


def widths(row: dict, argument: str, kind: str) -> str:
    """Accesses by their bits, widest first."""
    counts = row["accesses"].get(argument, {}).get(kind, {})
    return " ".join(f"{counts[bits]}x{bits}" for bits in sorted(counts, reverse=True))
