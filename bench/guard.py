"""Guard zones: memory around the tensors of a call, filled with a pattern that must be there afterwards."""

import contextlib
from unittest import mock

import torch

ZONE = 4096  # bytes on each side; a multiple of what PyTorch aligns memory to
PATTERN = 0xFF  # NaN in every floating dtype, -1 in every signed integer: whoever reads it is found out, too
# What xent_ext asks for memory, and whether the values are to be those that PyTorch puts there.
ALLOCATIONS = {"empty": False, "empty_like": False, "zeros": True, "zeros_like": True, "full": True}

full, empty = torch.full, torch.empty  # as they are outside of `Guard.allocations`


class Guard:
    """Makes tensors inside larger buffers, and looks whether anything was written beside them."""

    def __init__(self, zone=ZONE):
        self.zone = zone
        self.buffers = []  # each with the slice that is within its zones
        self.inputs = []  # the buffer of each, and what it held

    def empty_strided(self, shape, stride, dtype, device, first=0):
        """A tensor that starts `first` elements after a zone; it, the zones and gaps between elements hold the pattern.

        It is no view of its buffer for autograd, as an allocated one is none.
        """
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1 if 0 not in shape else 0
        content = (first + last) * dtype.itemsize
        buffer = full((self.zone + content + self.zone,), PATTERN, dtype=torch.uint8, device=device)
        self.buffers.append((buffer, slice(self.zone, self.zone + content)))
        made, start = empty(0, dtype=dtype, device=device), self.zone // dtype.itemsize + first
        return made.set_(buffer.untyped_storage(), start, shape, stride)

    def copy(self, values, stride=None, first=0):
        """An input with these values. A stride of 0 repeats those of the first index."""
        made = self.empty_strided(values.shape, stride or values.stride(), values.dtype, values.device, first)
        once = tuple(slice(1) if step == 0 else slice(None) for step in made.stride())
        made[once].copy_(values[once])
        buffer, _ = self.buffers[-1]
        self.inputs.append((buffer, buffer.clone()))
        return made

    @contextlib.contextmanager
    def allocations(self):
        """Inside, what PyTorch's functions are asked for has zones, too: results, and what kernels share."""
        guarded = {name: self.guarded(getattr(torch, name), filled) for name, filled in ALLOCATIONS.items()}
        with mock.patch.multiple(torch, **guarded):
            yield

    def guarded(self, function, filled: bool):
        def allocate(*args, **options):
            usual = function(*args, **options)
            if usual.is_meta or not usual.numel():
                return usual
            made = self.empty_strided(usual.shape, usual.stride(), usual.dtype, usual.device)
            return made.copy_(usual) if filled else made

        return allocate

    def harmed(self) -> int:
        """How many buffers have a zone in which something else stands."""
        return sum(bool(not_pattern(buffer, content)) for buffer, content in self.buffers)

    def changed(self) -> int:
        """How many inputs are not as they were, the gaps between their elements included."""
        return sum(not torch.equal(buffer, before) for buffer, before in self.inputs)


def not_pattern(buffer, content: slice):
    return (buffer[: content.start] != PATTERN).any() | (buffer[content.stop :] != PATTERN).any()
