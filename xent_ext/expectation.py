"""What upstream gradient the next backward is expected to have: the one that the last had, at first 1.

What is expected is two numbers on the device: that upstream gradient, and how many of the last ones in a row were not
the expected ones. After two such misses a forward pass stores no gradient ahead, as it would be made again: a loss that
is divided by another number at each step costs one more reading of the logits than a constant one, not two more passes.
An upstream gradient that is seen twice in a row is foreseen again. On a GPU nothing of this is read by the host.
"""

import functools
import weakref

import torch

from .backends import is_capturing
from .reference import accumulation_dtype

MOST_MISSES = 2


def first_expected(device, dtype):
    """1, with no misses."""
    return torch.arange(1, -1, -1, device=device, dtype=dtype)


def compared(upstream, expected):
    """Whether an upstream gradient is the expected one, and what to expect after it; on a CPU. So do the kernels."""
    (factor, misses), now = expected.tolist(), upstream.item()
    was_expected = now == factor
    return was_expected, expected.new_tensor((now, 0 if was_expected else min(misses + 1, MOST_MISSES)))


class Expectation:
    """The upstream gradient that is expected, with its misses, [2].

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
        first = first_expected(input.device, accumulation_dtype(problem.dtype))
        self.note(first, input, problem)
        return first

    def has_seen(self, input, problem):
        """Whether there is more to go by than the first guess."""
        here = queue_of(input, problem)
        return here is not None and here == self.queue

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
