"""Time the loss of classes that several processes share, and measure what each of them holds and sends.

Each rank is a process with one thread, in a gloo group on CPUs, and on GPUs one process for each in a group of nccl. It
has an equal slice of the classes of the same rows. Every number of ranks, and on these every implementation, has
processes of its own; the implementations take turns, A B C C B A and so on, with new random logits in each, of standard
deviation 3, and one call that is not counted. All ranks start a call at once. Times are of forward and backward, with
the gradient's allocation and release, of the slowest rank in each call: medians and quartiles by the wall clock, and
the CPU time that the process took, in which no time is that of waiting for others. Where ranks are more than cores, or
the machine has other work, the wall clock says more of that than of them; then the least CPU time says most.

Each is checked on every rank before it is timed: its loss and its slice of the gradient against float64, as
`python -m bench run` does; what is wrong is shown as WRONG, and not timed. The exit status is 1 when xent_ext is wrong
or absent. Peak memory is what the rank that holds most does beyond its logits, the gradient included, as `python -m
bench memory` measures it; its floor is the gradient alone. Logits are intact if they have the same bits after a call.

Bytes are not counted on the wire: the profiler tells which collectives a call makes, and of how many bytes. An
all-gather of B bytes on each of n ranks is taken to send (n - 1) B from each, an all-reduce 2 (n - 1) / n B, the least
that either can do, and as many to be received. For xent_ext that must be what `explain` says, or it is DIFFERENT, with
an exit status of 1.

The second table is computed: what `explain` says of xent_ext's call on one rank of so many that need not be there. In
it nothing runs. Memory is that of a CPU: the gradient, a block's buffer, and the summaries of all ranks, of 16 bytes a
row and rank; some numbers of each row and rank, which live while these are merged, are left out. What is read and
written, in copies of the slice, is that of a CPU and of an H100. Beside it stands what was measured.
"""

from contextlib import ExitStack

import torch
import torch.distributed as dist
from tqdm import tqdm

from xent_ext import backends

from . import machine, report, traffic
from .case import absence
from .parallel_case import block, check, explained, group
from .parallel_peers import OURS, PEERS, SlicedCase, about
from .parallel_report import sent, text
from .run import DTYPES, ROUNDS, add_peers, dtypes, summarize, turns, with_ours
from .shapes import two
from .workers import in_fresh_process

SHAPE = (2048, 32000)
RANKS = (1, 2, 4)
PLANNED_RANKS = (2, 4, 8, 16, 32, 64)
PLANNED_CLASSES = (32000, 128256, 262144, 1_000_000)


def add_arguments(parser):
    parser.add_argument(
        "--shape", type=two, metavar="NxC", default=SHAPE, help="rows and classes (default: 2048x32000)"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="(default: 1 2 4)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="(default: float32 on a CPU, bfloat16 on a GPU)")
    add_peers(parser, PEERS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--calls", type=int, default=5, help=f"timed in each of {ROUNDS} turns (default: %(default)s)")
    report.add_out(parser)


def run(args) -> int:
    device = machine.pick_device(args.device)
    cases = [
        SlicedCase(args.shape, dtype, ranks, device.type) for dtype in dtypes(args, device) for ranks in args.ranks
    ]
    result = compare(cases, with_ours(args.peers, PEERS), args.calls)
    print(text(result))
    print("Written:", *report.write(result, args.out))
    return 0 if all(row["peers"][OURS]["status"] == "right" and row["agrees"] for row in result["rows"]) else 1


def compare(cases: list[SlicedCase], peers: list[str], calls: int) -> dict:
    """Measure all cases that fit, and compute the table; return all that the report needs, ready for JSON."""
    reasons = {case: too_large(case) for case in cases}
    first = cases[0]
    result = report.begin("parallel", first.device) | {
        "left_out": [described(case) | {"reason": reason} for case, reason in reasons.items() if reason],
        "method": __doc__,
        "calls": calls,
        "about": {name: about(name) for name in peers},
        "rows": [
            measure(case, peers, calls)
            for case in tqdm([case for case in cases if not reasons[case]], "Measuring", unit="case")
        ],
        "planned": in_fresh_process(planned, first.rows, first.dtype),
    }
    return result | {"clocks_after": machine.clocks()}


def described(case: SlicedCase) -> dict:
    ranks = "1 rank" if case.ranks == 1 else f"{case.ranks} ranks"
    return {"what": "the mean loss", "shape": case.shape, "dtype": case.dtype, "pass": ranks, "ranks": case.ranks}


def too_large(case: SlicedCase) -> str | None:
    """Why the case is not measured on this machine, or None."""
    if case.shape[1] % case.ranks:
        return f"{case.shape[1]} classes are not {case.ranks} slices of one size"
    if case.device == "cuda" and case.ranks > torch.cuda.device_count():
        return f"needs {case.ranks} GPUs, PyTorch sees {torch.cuda.device_count()}"
    needed, free = memory_needed(case), machine.free_memory(torch.device(case.device))
    if needed > free:
        return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    return None


def memory_needed(case: SlicedCase) -> int:
    """Bytes on the first device, roughly: a few tensors in float64 for the check, or the gathered logits' in a call."""
    ranks_here = case.ranks if case.device == "cpu" else 1
    check = 6 * 8 * case.rows * case.columns
    call = (5 * case.ranks + 3) * case.slice_bytes
    return ranks_here * max(check, call)


def measure(case: SlicedCase, peers: list[str], calls: int) -> dict:
    told = {"received": 0}
    try:
        with ExitStack() as stack:
            groups = {name: stack.enter_context(group(case)) for name in peers}
            found = {name: of_all(everywhere(check, case, name)) for name, everywhere in groups.items()}
            told = groups[OURS](explained, case)[0]
            take_turns(case, groups, found, calls)
    except Exception as error:
        # One case that fails, for want of memory say, must not take the others' results with it.
        found = {name: absence(error) for name in peers}
    return described(case) | {
        "upstream": 1.0,
        "floor_bytes": case.slice_bytes,
        "explained": told,
        "agrees": sent(found[OURS]) == told["received"],
        "peers": found,
    }


def of_all(ranks: list[dict]) -> dict:
    """What all ranks found of a peer, as one: whatever is worst."""
    for status in ("absent", "wrong"):
        for rank in ranks:
            if rank["status"] == status:
                return rank
    errors = [rank["errors"] for rank in ranks if "errors" in rank]
    return ranks[0] | {
        "errors": {what: max(each[what] for each in errors) for what in errors[0]} if errors else {},
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "intact": all(rank["intact"] for rank in ranks),
    }


def take_turns(case: SlicedCase, groups: dict, found: dict[str, dict], calls: int):
    """Add the times of each call to those found to be right."""
    peers = [name for name in groups if found[name]["status"] in ("right", "unchecked")]
    times = {name: [] for name in peers}
    for turn, name in enumerate(turns(peers)):
        of_ranks = groups[name](block, case, name, 1 + turn // len(peers), calls)
        times[name] += [tuple(map(max, zip(*call, strict=True))) for call in zip(*of_ranks, strict=True)]
    for name, pairs in times.items():
        wall, cpu = zip(*pairs, strict=True)
        found[name] |= summarize(wall) | {"cpu": summarize(cpu) | {"least_ms": min(cpu)}}


# The table


def planned(rows: int, dtype: str) -> list[dict]:
    """What xent_ext plans for one rank's slice, by the target that it plans for."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # of a group in which there is nobody else

    found = []
    for ranks in PLANNED_RANKS:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        for classes in PLANNED_CLASSES:
            shape = (rows, classes // ranks)
            plans = {target: plan_for(target, shape, dtype) for target in targets()}
            found.append({"ranks": ranks, "shape": (rows, classes), "dtype": dtype, "plans": plans})
        dist.destroy_process_group()
    return found


def targets() -> list[str]:
    return ["cpu", "sm_90"] if backends.HAS_TRITON else ["cpu"]


def plan_for(target: str, shape: tuple[int, int], dtype: str) -> dict:
    if target == "cpu":
        return traffic.plan(shape, dtype, process_group=dist.group.WORLD)
    from . import kernels, offline  # these need Triton

    with offline.target(*kernels.TARGETS[target]):
        return traffic.plan(shape, dtype, process_group=dist.group.WORLD)
