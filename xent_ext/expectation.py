"""What upstream gradient the next backward is expected to have: the one that the last had, at first 1."""

import functools
import weakref

import torch

from .backends import is_capturing
from .reference import accumulation_dtype


class Expectation:
    """The upstream gradient that is expected, a 0-dim tensor.

    It stays on its device, and is for the CUDA stream that wrote it: another could read it too early. A captured CUDA
    graph can neither read what may be freed later nor leave what it allocated: it expects 1.
    """

    def __init__(self):
        self.queue, self.upstream = None, None

    def get(self, input, problem):
        """What to expect for the gradient of `input`, which is to be made by the current stream."""
        here = queue_of(input, problem)
        if here is not None and here == self.queue:
            return self.upstream
        first = torch.ones((), dtype=accumulation_dtype(problem.dtype), device=input.device)
        self.note(first, input, problem)
        return first

    def note(self, seen, input, problem):
        """Expect `seen` from now on."""
        here = queue_of(input, problem)
        if here is not None:
            self.queue, self.upstream = None, seen  # no other thread is to have it under the old name
            self.queue = here


def queue_of(input, problem):
    """What does the work on `input` in order, and in which dtype: its device, or on a GPU the current stream.

    None in a graph's capture.
    """
    if not input.is_cuda:
        return input.device, problem.dtype
    if is_capturing():
        return None
    return input.device, problem.dtype, torch._C._cuda_getCurrentRawStream(input.device.index)


def expectation_of(owner):
    """That of a module."""
    found = _expectations.get(owner)
    return _expectations.setdefault(owner, Expectation()) if found is None else found


# Beside the modules, not in them: a copied or pickled module is what torch.nn.CrossEntropyLoss would be.
_expectations = weakref.WeakKeyDictionary()


@functools.lru_cache(maxsize=256)
def shared_expectation(problem, device):
    """That of all calls without a module, with the same options on the same device."""
    return Expectation()
