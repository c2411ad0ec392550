"""Processes that a test starts, and that end."""

import os
import time

import torch

DEADLINE = 180  # seconds


def run(function, processes, *args):
    """Run `function(rank, *args)` in so many processes, which are ended where they have not by the deadline."""
    context = torch.multiprocessing.spawn(to_its_end, args=(function, args), nprocs=processes, join=False)
    end = time.monotonic() + DEADLINE
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"{function.__name__} had not ended after {DEADLINE} s"
    finally:
        for process in context.processes:
            process.kill()


def to_its_end(rank, function, args):
    """Run the function, and end at once: while an interpreter shuts down, threads of PyTorch may abort it."""
    function(rank, *args)
    os._exit(0)
