"""Memory on a CPU: for the gradient, whose pages cost more than to fill them; and for what a block needs."""

import ctypes
import functools
import mmap
import os
import sys
import threading
import time

import torch

HUGE_PAGE = 2 << 20
# The C library maps what is larger than this anew each time and gives it back when it is freed: its DEFAULT_MMAP_
# THRESHOLD_MAX. The kernel then hands it out by pages of 4 KiB, and 262 MB of them take 87 ms of CPU time where to
# write them takes 8. By pages of 2 MiB it is 12 ms, and nothing if they were kept.
MAPPED = 32 << 20
# One gradient's memory is kept for the next gradient of its size, if it is so large that the C library may give it
# back, which depends on what was freed before, and no larger than this, ...
LEAST_KEPT, MOST_KEPT = 4 << 20, 1 << 30
# ... but no longer than this: whoever calls less often would save less than a hundredth of the time between the calls.
KEPT_SECONDS = 2.0


def empty_like(tensor):
    """`torch.empty_like` for a tensor on the CPU. What is large has huge pages, where the system has them."""
    size = tensor.numel() * tensor.element_size()
    if size < LEAST_KEPT:
        return torch.empty_like(tensor)
    storage = _kept.take(size)
    if storage is not None:
        stride = torch.empty_like(tensor, device="meta").stride()
        return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(storage, 0, tensor.shape, stride)
    made = on_huge_pages(torch.empty_like(tensor))
    if size <= MOST_KEPT:
        _kept.keep(made.untyped_storage())
    return made


def on_huge_pages(tensor):
    """A new tensor on the CPU, which has huge pages if it is large, and the system has them."""
    storage = tensor.untyped_storage()
    if storage.nbytes() >= MAPPED and advise() is not None:
        to_huge_pages(storage)
    return tensor


def to_huge_pages(storage):
    """Ask for them where whole ones fit. This is advice, and an error no reason to fail."""
    first = -(-storage.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    last = (storage.data_ptr() + storage.nbytes()) // HUGE_PAGE * HUGE_PAGE
    advise()(first, last - first, mmap.MADV_HUGEPAGE)


@functools.cache  # not at import, which loads no library
def advise():
    """The C library's madvise, or None where there is none, or no huge pages to ask for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


class Kept:
    """The memory of the last large gradient, for the next one, if nothing else refers to it by then.

    It is an ordinary tensor's, and whoever has the tensor may do with it what he likes: what was resized or shared with
    other processes meanwhile is left to him. A thread lets go of it in time, so that memory of a gradient that is
    dropped is free `KEPT_SECONDS` after it was made.
    """

    def __init__(self):
        self.storage, self.size, self.since, self.timer = None, 0, 0.0, None
        self.lock = threading.Lock()

    def keep(self, storage):
        with self.lock:
            self.storage, self.size = storage, storage.nbytes()
            self.renew()

    def take(self, size):
        """What is kept, if it has this size and is free, or None; then nothing is kept any more."""
        with self.lock:
            storage, self.storage = self.storage, None
            if storage is None or not (storage.nbytes() == self.size == size) or storage.is_shared():
                return None
            # Tensors count in the one number, Python's names for the storage itself in the other: here it has two.
            if torch._C._storage_Use_Count(storage._cdata) > 1 or sys.getrefcount(storage) > 2:
                return None
            self.storage = storage
            self.renew()
            return storage

    def renew(self):
        """Keep it for another `KEPT_SECONDS`. There is a timer at most, which is set again when it is too early."""
        self.since = time.monotonic()
        if self.timer is None:
            self.start(KEPT_SECONDS)

    def start(self, seconds):
        timer = threading.Timer(seconds, self.expire)
        timer.daemon = True
        try:
            timer.start()
            self.timer = timer
        except RuntimeError:  # no thread starts while the interpreter ends
            self.storage = None

    def expire(self):
        with self.lock:
            self.timer = None
            left = self.since + KEPT_SECONDS - time.monotonic()
            if self.storage is not None and left > 0:
                self.start(left)
            else:
                self.storage = None


def forget():
    """In a forked process there is no timer, and the memory is a copy once it is written to: nothing is kept."""
    global _kept
    _kept = Kept()


_kept = Kept()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)

_buffers = threading.local()


def buffer(shape, dtype, name="block"):
    """Contiguous memory kept for the thread's next block and next call; there is one for each `name`.

    The system's allocator hands memory of this size back at once, and to fault it in again costs more than to use it.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = getattr(_buffers, name, None)
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=torch.uint8)
        setattr(_buffers, name, memory)
    return memory[:size].view(dtype).view(shape)
