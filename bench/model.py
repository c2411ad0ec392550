"""What a model says of the kernels on GPUs: the figures of bench/model.json, in the tables of bench/TUNING.md.

Nothing of it was measured. `--count` makes the figures anew for the architecture that Triton compiles for. That takes
a driver which executes a kernel's PTX and counts: its module has `profile(programs, rest)`, a context that counts so
many programs of each launch and, unless `rest`, runs no others, and whose `as_dict(device)` gives for each launch its
counts, scaled to all programs, and the model's time on that device.
"""

import json
import math
import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import xent_ext
from xent_ext import backends

from . import machine, traffic, tune
from .peer import Case

FILE, TUNING = Path(__file__).with_name("model.json"), Path(__file__).with_name("TUNING.md")

# By architecture, with the bytes per second of the memory by the data sheet.
DEVICES = {
    80: {"A100": 2.039e12},
    90: {"H100": 3.35e12, "H200": 4.8e12},
    100: {"B200": 8.0e12},
}
BOTH, HALF = ("bfloat16", "float32"), ("bfloat16",)
SHAPES = {
    (8192, 32000): BOTH,
    (2048, 32000): HALF,
    (4096, 50257): BOTH,
    (16, 50257): HALF,
    (4096, 65536): BOTH,
    (8192, 128256): BOTH,
    (4096, 151936): BOTH,
    (64, 151936): HALF,
    (8, 151936): HALF,
    (1, 151936): HALF,
    (4096, 262144): BOTH,
    (16384, 4096): BOTH,
    (4096, 1000): BOTH,
    (256, 1000): HALF,
    (4096, 1003): HALF,
    (65536, 128): BOTH,
    (65536, 10): BOTH,
    (256, 10): HALF,
    (65536, 19): HALF,
    (8, 19, 1024, 2048): BOTH,
    (8, 19, 256, 256): HALF,
}
NOTE = (
    "modelled, not measured: counts of the kernels' compiled code, and times computed from the counts and from data "
    "sheets as if loads, arithmetic and stores overlapped perfectly; they rank variants and predict no milliseconds"
)
HOW = (
    "The PTX that Triton made of the kernels was executed on a CPU, by a simulator that checks every address and "
    "counts bytes and instructions; its times come from a model of the card. Of each launch 64 programs (or clusters) "
    "were counted, evenly spaced, and scaled to all; none finds anything in L2. A step is the mean loss of int64 class "
    "indices and its backward, with the upstream gradient that was expected. bytes: to and from the card's memory; "
    "instructions: of warps, without moves and reads of parameters; time_us: with launch_us for each launch, but "
    "without it in `launches`. Made by `python -m bench model --count`."
)
PROGRAMS = 64  # of each launch that are counted
LAUNCH_US = 3.0
FREE = ("move", "ld_param")  # instructions that a GPU seldom spends time on
WALKS = ("resident", "streaming", "gradient")  # the kernels that walk the logits


def add_arguments(parser):
    parser.add_argument("--count", action="store_true", help="make the figures of the active driver's GPU anew")


def run(args) -> int:
    if args.count:
        counts = counter()
        if counts is None:
            print("Triton's active driver counts nothing: see python -m bench model --help", file=sys.stderr)
            return 1
        FILE.write_text(text(count(*counts)))
        TUNING.write_text(with_tables(TUNING.read_text(), read()))
    print("\n\n".join(tables(read()).values()))
    return 0


def read() -> dict:
    return json.loads(FILE.read_text())


def milliseconds(gpu: str | None, shape, dtype: str) -> float | None:
    """The modelled time of a step on the GPU of this name, such as "NVIDIA H100 80GB HBM3"; None where none is."""
    words = re.split(r"\W+", gpu or "")
    for entry in read()["entries"] if FILE.exists() else ():
        if entry["device"] in words and (tuple(entry["shape"]), entry["dtype"]) == (tuple(shape), dtype):
            return 1e-3 * entry["time_us"]
    return None


def text(model: dict) -> str:
    """JSON, with a line for each entry."""
    *head, _ = json.dumps(model | {"entries": []}, indent=1).splitlines()
    head[-1] = head[-1].removesuffix("]")
    entries = ",\n".join(f"  {json.dumps(entry)}" for entry in model["entries"])
    return "\n".join([*head, entries, " ]", "}", ""])


# The figures


def counter():
    """(architecture, `profile`) of the active driver; None where it counts nothing."""
    if not backends.HAS_TRITON:
        return None
    import triton

    try:
        driver = triton.runtime.driver.active
        arch = driver.get_current_target().arch
    except RuntimeError:  # there is no driver
        return None
    profile = getattr(sys.modules[type(driver).__module__], "profile", None)
    return profile and (arch, profile)


def count(arch: int, profile) -> dict:
    """The model with this architecture's entries made anew; those of others stay, if the same Triton compiled them."""
    triton = machine.describe()["triton"]
    old = read() if FILE.exists() else {"triton": None}
    others = [entry for entry in old["entries"] if entry["arch"] != arch] if old["triton"] == triton else []
    cases = [Case("model", "", shape, dtype, "full", "cpu") for shape, dtypes in SHAPES.items() for dtype in dtypes]
    new = [entry for case in tqdm(cases, "Counting", unit="case") for entry in entries(case, arch, profile)]
    found = sorted([*others, *new], key=lambda entry: (entry["arch"], entry["device"]))
    return {"note": NOTE, "triton": triton, "how": HOW, "launch_us": LAUNCH_US, "entries": found}


def entries(case: Case, arch: int, profile) -> list[dict]:
    """What a step does, on each device of the architecture."""
    planned = traffic.plan(case.shape, case.dtype)
    passes = counted(case, profile)
    return [entry(case, device, arch, planned, launches(passes, device)) for device in DEVICES[arch]]


def counted(case: Case, profile) -> dict:
    """A step, counted; its logits are never written, so that they take no memory where no program reads them."""
    logits = torch.empty(case.shape, dtype=getattr(torch, case.dtype), requires_grad=True)
    target = torch.randint(case.shape[1], case.shape[:1] + case.shape[2:], generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the first call checks clusters
        with profile(PROGRAMS, rest=False) as forward:
            loss = xent_ext.cross_entropy(logits, target)
        with profile(PROGRAMS, rest=False) as backward:
            torch.autograd.grad(loss, logits)
    return {"forward": forward, "backward": backward}


def launches(passes: dict, device: str) -> list[dict]:
    return [
        {
            "pass": name,
            "kernel": record["kernel"],
            "programs": record["ctas"],
            "registers": record["regs"],
            "programs_on_a_processor": record["model"]["resident_ctas_per_sm"],
            "instructions": record["warp_instructions"] - sum(record["instructions"].get(kind, 0) for kind in FREE),
            "bytes": round(record["model"]["dram_bytes"]),
            "l2_bytes": record["model"]["l2_bytes"],
            "bound": record["model"]["bound"],
            "time_us": round(record["model"]["time_us"] - record["model"]["overhead_us"], 3),
        }
        for name, counts in passes.items()
        for record in counts.as_dict(device)
    ]


def entry(case: Case, device: str, arch: int, planned: dict, launches: list[dict]) -> dict:
    return {
        "device": device,
        "arch": arch,
        "shape": case.shape,
        "dtype": case.dtype,
        "what": "forward+backward",
        "schedule": planned["schedule"],
        "numbers": planned["numbers"],
        "bytes": total(launches, "bytes"),
        "instructions": total(launches, "instructions"),
        "time_us": round(total(launches, "time_us") + LAUNCH_US * len(launches), 3),
        "launches": launches,
    }


def total(launches: list[dict], key: str):
    return sum(launch[key] for launch in launches)


# The tables


def tables(model: dict) -> dict[str, str]:
    """For each architecture its table, in Markdown, by its name."""
    return {f"sm_{arch}": table(model["entries"], devices) for arch, devices in DEVICES.items()}


def table(entries: list[dict], devices: dict) -> str:
    header = ["logits", "schedule, rows x classes, programs x warps", "registers", "programs on a processor",
              "instructions by logit", *(f"{device}: DRAM / pass / step / us" for device in devices)]  # fmt: skip
    by_device = [[entry for entry in entries if entry["device"] == device] for device in devices]
    body = [line(*each) for each in zip(*by_device, strict=True)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body))


def line(entry: dict, *others: dict) -> list[str]:
    walks, logits = walk(entry), math.prod(entry["shape"])
    main = max(walks, key=lambda launch: launch["instructions"])
    return [
        f"{tuple(entry['shape'])} {entry['dtype']}",
        tune.tile(entry),
        f"{main['registers']}",
        f"{main['programs_on_a_processor']}",
        f"{32 * total(walks, 'instructions') / logits:.1f}",
        *map(times, (entry, *others)),
    ]


def times(entry: dict) -> str:
    """Over those of reading and writing the logits once at the data sheet's rate; and microseconds with launches."""
    case = Case("model", "", tuple(entry["shape"]), entry["dtype"], "full", "cpu")
    ideal_us = 1e6 * 2 * case.logits_bytes / DEVICES[entry["arch"]][entry["device"]]
    dram = entry["bytes"] / (2 * case.logits_bytes)
    walking, step = (total(launches, "time_us") / ideal_us for launches in (walk(entry), entry["launches"]))
    return f"{dram:.3f} / {walking:.2f} / {step:.2f} / {entry['time_us']:.1f}"


def walk(entry: dict) -> list[dict]:
    """The pass that makes loss and gradient."""
    return [launch for launch in entry["launches"] if launch["pass"] == "forward" and launch["kernel"] in WALKS]


def with_tables(page: str, model: dict) -> str:
    """The page with the model's tables in the places of those that stand below the architectures' headings."""
    for name, table in tables(model).items():
        before, heading, after = page.partition(f"\n## {name} (modelled)\n\n")
        _, end, rest = after.partition("\n\n")
        page = before + heading + table + end + rest
    return page
