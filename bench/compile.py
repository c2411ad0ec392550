"""What the first call pays for compiling the kernels, and that it is paid once. No GPU is needed for it.

For each run the call of a step, loss and gradient, by the plan for a GPU that need not be there, in a fresh process
with an empty cache of Triton's; then the same in another process that finds the cache filled. Then calls that differ
from one another, in turn in a process with an empty cache: what each has compiled besides; and in the same way every
variant of `python -m bench kernels`. Where rows are shared by a cluster, the kernels that check clusters are compiled,
too.

Seconds are those of the CPU, Python's, LLVM's and the assembler's: on an idle machine a call waits as long. PyTorch's
own loss was called before. What a call takes that finds its kernels cached is mostly Triton reading its own files, by
which it knows whether they are the same. The exit status is 1 where anything was compiled twice.
"""

import functools
import os
import resource
import tempfile
import warnings
from collections import Counter
from unittest import mock

import torch
from tqdm import tqdm

from xent_ext import backends

from . import report
from .compile_report import text
from .kernels import BF16, CAPPED, FP32, TARGETS, VARIANTS, Variant, make_call
from .workers import in_fresh_process

GPUS = ("sm_80", "sm_90", "sm_100")
LANGUAGE_MODEL = Variant("a language model", (8192, 32000), BF16)
RUNS = [
    LANGUAGE_MODEL,
    Variant("its evaluation", (8192, 32000), BF16, backwards=0),
    Variant("a loss for each token", (8192, 32000), BF16, reduction="none"),
    Variant("with options for training", (8192, 32000), BF16, options=CAPPED),
    Variant("a large vocabulary", (4096, 128256), BF16),
    Variant("rows that start anywhere", (4096, 50257), BF16),
    Variant("few long rows", (8, 151936), BF16),
    Variant("a classifier", (256, 1000), FP32),
    Variant("with smoothing and weights", (256, 1000), FP32, weight=True, smoothing=0.1),
    Variant("points", (65536, 10), FP32),
    Variant("a segmenter", (8, 19, 512, 512), BF16),
]
IN_TURN = [
    LANGUAGE_MODEL,
    Variant("the same again", (8192, 32000), BF16),
    Variant("another ignore_index", (8192, 32000), BF16, options=(("ignore_index", 0),)),
    Variant("half as many rows", (4096, 32000), BF16),
    Variant("rows that 16 does not divide", (1001, 32000), BF16),
    Variant("and others", (5003, 32000), BF16),
    Variant("few rows", (200, 32000), BF16),
    Variant("one row", (1, 32000), BF16),
    Variant("other classes that 16 divides", (8192, 32512), BF16),
    Variant("classes that only 8 divides", (8192, 32008), BF16),
    Variant("no gradient", (8192, 32000), BF16, backwards=0),
    Variant("smoothing", (8192, 32000), BF16, smoothing=0.1),
    Variant("another smoothing", (8192, 32000), BF16, smoothing=0.2),
]


def add_arguments(parser):
    parser.add_argument("--target", nargs="+", choices=GPUS, default=GPUS, help="(default: all of these)")
    report.add_out(parser)


def run(args) -> int:
    if not backends.HAS_TRITON:
        print("Triton is not installed: there are no kernels to compile.")
        return 1
    result = report.begin("compile", "cpu") | {
        "method": __doc__,
        "rows": [row(*each) for each in tqdm([(t, v) for t in args.target for v in RUNS], "Compiling", unit="run")],
        "in_turn": [in_turn(target, IN_TURN) for target in args.target],
        "variants": [in_turn(target, VARIANTS) for target in tqdm(args.target, "Variants", unit="target")],
    }
    print(text(result))
    print("Written:", *report.write(result, args.out))
    found = (*result["rows"], *result["in_turn"], *result["variants"])
    return 1 if any(each["compiled_twice"] for each in found) else 0


def row(target: str, variant: Variant) -> dict:
    """A run's first step, in a process that has to compile and in one that has not."""
    with tempfile.TemporaryDirectory() as cache:
        ((first, seconds),), ((again, seconds_again),) = (
            in_fresh_process(steps, target, [variant], cache) for _ in range(2)
        )
    return {
        "target": target,
        "what": variant.why,
        "call": str(variant),
        "compiled": first,
        "seconds": seconds,
        "seconds_cached": seconds_again,
        "compiled_twice": twice([*first, *again]),
    }


def in_turn(target: str, variants: list[Variant]) -> dict:
    """What each of the calls in turn has compiled."""
    with tempfile.TemporaryDirectory() as cache:
        done = in_fresh_process(steps, target, variants, cache)
    calls = [
        {"what": variant.why, "call": str(variant), "compiled": compiled}
        for variant, (compiled, _) in zip(variants, done, strict=True)
    ]
    return {
        "target": target,
        "calls": calls,
        "compiled_twice": twice([each for compiled, _ in done for each in compiled]),
    }


def twice(compiled: list[dict]) -> list[str]:
    """Kernels that were compiled more than once to the same code."""
    counts = Counter((each["kernel"], each["hash"]) for each in compiled)
    return [kernel for (kernel, _), count in counts.items() if count > 1]


def steps(target: str, variants: list[Variant], cache: str) -> list[tuple]:
    """For each call, in turn: what it has compiled, and its seconds."""
    from triton import knobs

    from . import offline  # these need Triton

    compiled = Compiled()
    warm_up()
    with (
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        offline.target(*TARGETS[target]),
        mock.patch.object(offline.implementation, "clusters_work", checked),
        mock.patch.object(knobs.compilation, "listener", compiled.note),
    ):
        return [compiled.by(functools.partial(make_call, variant)) for variant in variants]


def warm_up():
    """What PyTorch imports when a gradient is first asked for."""
    logits = torch.zeros(1, 2, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, torch.zeros(1, dtype=torch.int64))
    torch.autograd.grad(loss, logits, torch.ones_like(loss))


class Compiled:
    """What Triton compiles, and did not find in its cache."""

    def by(self, call) -> tuple[list[dict], float]:
        self.compiled, start = [], cpu_seconds()
        self.since = start
        call()
        return self.compiled, round(cpu_seconds() - start, 3)

    def note(self, *, src, metadata, cache_hit, **_):
        before, self.since = self.since, cpu_seconds()
        if not cache_hit:
            self.compiled.append(
                {"kernel": src.name, "hash": metadata["hash"], "seconds": round(self.since - before, 3)}
            )


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for, such as the assembler."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@functools.cache
def checked(device: torch.device, plan) -> bool:
    """The package's check of clusters, whose kernels are compiled here, and whose outcome is that nothing ran."""
    from . import offline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        offline.implementation.check_clusters(device, plan)
    return True
