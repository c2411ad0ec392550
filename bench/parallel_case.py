"""One rank's part of the loss of classes that ranks share: the group, its inputs, the check, the timing of calls.

As in bench/case.py, all that touches tensors is here, and runs in processes that do nothing else: one for each rank.
"""

import functools
import math
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

import xent_ext

from . import machine
from .case import LOGIT_SCALE, Truth, absence, verdict
from .parallel_peers import ALONE, OURS, PEERS, SlicedCase
from .workers import fresh_process, join_group

PATIENCE = 120  # seconds, with a rank that does not come: a call takes a few at most


# The processes


@contextmanager
def group(case: SlicedCase):
    """A function that calls another one in a process of each rank at once, and returns what it does there, by rank."""
    with ExitStack() as stack:
        store = Path(stack.enter_context(TemporaryDirectory())) / "store"
        processes = [stack.enter_context(fresh_process()) for _ in range(case.ranks)]

        def everywhere(function, *args):
            return [answer.result() for answer in [process.submit(function, *args) for process in processes]]

        joining = [process.submit(join, case, str(store), rank) for rank, process in enumerate(processes)]
        for answer in joining:
            answer.result()
        yield everywhere
        everywhere(dist.destroy_process_group)


_mesh = _device = None  # the group that this process is in, and what it computes on


def join(case: SlicedCase, store: str, rank: int):
    """One thread, and on GPUs one of these, for each rank."""
    global _mesh, _device
    torch.set_num_threads(1)
    _device = join_group(case.device, rank, case.ranks, store, PATIENCE)
    _mesh = dist.device_mesh.init_device_mesh(case.device, (case.ranks,))


# The inputs


def slice_of(case: SlicedCase, number: int):
    """This rank's slice of random logits, and the targets, which are the same on all; others for each number."""
    first = number * (case.ranks + 1)  # seed of the targets; the ranks have the next ones
    of_all = torch.Generator(_device).manual_seed(first)
    of_rank = torch.Generator(_device).manual_seed(first + 1 + dist.get_rank())
    logits = torch.empty(case.rows, case.columns, dtype=getattr(torch, case.dtype), device=_device)
    logits.normal_(std=LOGIT_SCALE, generator=of_rank)
    return logits.requires_grad_(), torch.randint(case.shape[1], (case.rows,), device=_device, generator=of_all)


# The check


def check(case: SlicedCase, name: str) -> dict:
    """Of this rank: is the peer "right", "wrong" or "absent"; its errors and those allowed, its memory, what it sends.

    The peak is that of our own first call, in which buffers are kept; of others of the second.
    """
    logits, target = slice_of(case, 0)
    before = logits.detach().clone()
    try:
        function = PEERS[name].load_for(case)

        def work():
            logits.detach().copy_(before)  # whatever an earlier call left
            return function(logits, target, _mesh)

        if name not in (OURS, ALONE):
            work()
        (loss, gradient), peak = machine.peak_memory(work, logits.device)
        found = {"peak_bytes": peak, "intact": torch.equal(logits, before), "collectives": collectives(work)}
    except Exception as error:
        return absence(error)
    if name == ALONE:
        return {"status": "unchecked"} | found
    truth = SliceTruth(before, target)
    return verdict(truth.errors(loss, gradient), truth.allowed) | found


class SliceTruth(Truth):
    """That of a slice, from plain collectives in float64."""

    def exact(self, logits, target):
        rows, columns = logits.shape
        lse = logits.logsumexp(1)
        of_ranks = [torch.empty_like(lse) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, lse)
        lse = torch.stack(of_ranks).logsumexp(0)
        index = target - dist.get_rank() * columns
        (here,) = torch.where((index >= 0) & (index < columns))
        at_target = torch.zeros_like(lse)
        at_target[here] = logits[here, index[here]]
        dist.all_reduce(at_target)
        largest = (lse - logits.amin(1)).max().item()
        gradient = logits.sub_(lse.unsqueeze(1)).exp_()
        gradient[here, index[here]] -= 1
        return (lse - at_target).mean(), gradient.div_(rows), largest


ITEMSIZES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2}
# Bytes that a rank sends, and that it receives, at least, by the ranks and the bytes that it puts in.
SENT = {
    "all_gather_into_tensor": lambda ranks, size: (ranks - 1) * size,
    "all_reduce": lambda ranks, size: 2 * (ranks - 1) / ranks * size,
}
LOCAL = ("wait_tensor", "_wrap_tensor_autograd")


def collectives(work) -> list[dict]:
    """Those of a call, as the profiler saw them, with the bytes that each rank puts in and sends."""
    ranks = dist.get_world_size()
    _, events = machine.traced(work, record_shapes=True)
    found = []
    for event in events:
        namespace, _, kind = event["name"].partition("::")
        if namespace != "_c10d_functional" or kind in LOCAL:
            continue
        if kind not in SENT:
            raise NotImplementedError(f"nothing is known of what {kind} sends")
        size = math.prod(event["args"]["Input Dims"][0]) * ITEMSIZES[event["args"]["Input type"][0]]
        found.append({"kind": kind, "bytes": size, "sent": SENT[kind](ranks, size)})
    return found


def explained(case: SlicedCase) -> dict:
    """What xent_ext says of its own call on this rank: bytes received from the other ranks, and allocated."""
    traffic = xent_ext.explain(*slice_of(case, 0), process_group=_mesh.get_group()).traffic
    return {"received": traffic.received, "memory": traffic.memory}


# The timing


def block(case: SlicedCase, name: str, number: int, calls: int) -> list[tuple[float, float]]:
    """Milliseconds of each call by the clock and of this process's CPU time; not of a first one, to warm up."""
    clock, call = machine.Clock(_device), functools.partial(PEERS[name].load(), *slice_of(case, number), _mesh)
    call()
    marks = []
    for _ in range(calls):
        clock.wait()
        dist.barrier()
        cpu, start = time.process_time(), clock.mark()
        call()  # whose results are freed at once, as in a training step
        marks.append((start, clock.mark(), 1e3 * (time.process_time() - cpu)))
    clock.wait()
    return [(clock.milliseconds(start, end), cpu) for start, end, cpu in marks]
