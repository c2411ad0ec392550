"""Processes to measure in."""

import datetime
import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist


@functools.cache
def context():
    """Where there is a fork server: its processes come with PyTorch imported, and with nothing else done."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["bench.case"])
    return server


def fresh_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, context(), torch.set_num_threads, (torch.get_num_threads(),))


def in_fresh_process(function, *args):
    with fresh_process() as process:
        return process.submit(function, *args).result()


GROUPS = {"cpu": "gloo", "cuda": "nccl"}  # what connects processes, by the kind of device


def join_group(kind: str, rank: int, ranks: int, store, seconds: float) -> torch.device:
    """Join a group of processes that meet at a file, and wait for one another so long at most; this one's device."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    patience = datetime.timedelta(seconds=seconds)
    dist.init_process_group(GROUPS[kind], init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=patience)
    return device
