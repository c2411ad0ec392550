"""Processes to measure in."""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch


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
