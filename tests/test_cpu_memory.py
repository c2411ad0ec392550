"""The memory of large gradients on a CPU: on huge pages, kept for the next gradient, and like any other tensor's."""

import gc
import mmap
import multiprocessing
import os
import pickle
import time

import pytest
import torch

import xent_ext
from xent_ext import memory

SIZE = 4 << 20  # bytes, from which on gradients are large in these tests
needs_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="the system does not tell what is resident"
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(memory, "MAPPED", SIZE)
    monkeypatch.setattr(memory, "LEAST_KEPT", SIZE)


def large(elements=SIZE // 4):
    """A tensor with the values 0, 1, 2, ..., in memory as a gradient has it."""
    tensor = memory.empty_like(torch.empty(elements))
    return tensor.copy_(torch.arange(elements))


def is_kept():
    return memory._kept.storage is not None


# --- Like any other tensor's


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_it_is_empty_like(dtype, order):
    like = torch.empty(64, 128, 640, dtype=dtype).permute(order)
    tensor, usual = memory.empty_like(like), torch.empty_like(like)
    for what in ("shape", "dtype", "device", "layout", "requires_grad", "is_leaf"):
        assert getattr(tensor, what) == getattr(usual, what), what
    assert tensor.stride() == usual.stride()
    assert tensor.untyped_storage().nbytes() == usual.untyped_storage().nbytes()
    assert tensor.untyped_storage().resizable()
    assert tensor.data_ptr() % 64 == 0


def test_it_may_be_resized():
    tensor = large()
    tensor.resize_(3 * tensor.numel())[SIZE // 4 :] = 7
    assert torch.equal(tensor[: SIZE // 4], torch.arange(SIZE // 4.0))
    assert torch.equal(large(), torch.arange(SIZE // 4.0))  # in other memory
    assert (tensor[SIZE // 4 :] == 7).all()
    tensor.resize_(5)
    assert tensor.tolist() == [0, 1, 2, 3, 4]


def test_it_may_be_pickled_and_copied():
    tensor = large()
    for copy in (pickle.loads(pickle.dumps(tensor)), tensor.clone(), torch.from_numpy(tensor.numpy().copy())):
        assert torch.equal(copy, tensor)


def double(queue, done):
    queue.get().mul_(2)
    done.set()


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_it_may_be_shared_between_processes(method):
    context = torch.multiprocessing.get_context(method)
    queue, done = context.SimpleQueue(), context.Event()
    tensor, before = large(), torch.arange(SIZE // 4.0)
    process = context.Process(target=double, args=(queue, done))
    process.start()
    queue.put(tensor)
    assert done.wait(60)
    process.join()
    assert torch.equal(tensor, 2 * before)
    del tensor
    assert torch.equal(large(), before)  # not in the memory that another process may have


@needs_fork
def test_a_forked_process_has_its_own():
    tensor = large()
    child = os.fork()
    if child == 0:
        tensor.fill_(-1)
        right = not is_kept() and torch.equal(large(), torch.arange(SIZE // 4.0)) and bool((tensor == -1).all())
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(tensor, torch.arange(SIZE // 4.0))


def test_it_becomes_a_gradient():
    """Which is not written over by the next one, as long as it is there in any form."""
    logits = torch.randn(8, SIZE // 16, requires_grad=True)
    target = torch.arange(8)
    seen = []
    for _ in range(3):
        logits.grad = None
        xent_ext.cross_entropy(logits, target, reduction="sum").backward()
        seen.append((logits.grad.detach(), logits.grad.clone()))
    assert all(torch.equal(*pair) for pair in seen)


# --- Kept for the next


def test_the_next_one_has_the_memory_of_one_that_is_dropped():
    tensor = large()
    place = tensor.data_ptr()
    del tensor
    assert large().data_ptr() == place


@pytest.mark.parametrize(
    "held",
    [lambda t: t, lambda t: t[5:], lambda t: t.detach(), lambda t: t.numpy(), lambda t: t.untyped_storage()],
    ids=["itself", "a view", "detached", "an array", "its storage"],
)
def test_what_is_held_in_any_form_is_not_used_again(held):
    tensor = large()
    place, form = tensor.data_ptr(), held(tensor)
    del tensor
    assert large().data_ptr() != place
    del form


def test_one_is_kept_of_bounded_size(monkeypatch):
    monkeypatch.setattr(memory, "MOST_KEPT", 2 * SIZE)
    first, second = large(), large()
    assert memory._kept.storage.data_ptr() == second.data_ptr()
    del first, second
    large(SIZE)
    assert not is_kept()  # this is too large, and what was kept made way for it


@needs_proc
def test_memory_that_is_dropped_is_free_in_time(monkeypatch):
    """Of the process's resident pages nothing is left."""
    monkeypatch.setattr(memory, "KEPT_SECONDS", 0.2)
    elements = 16 << 20
    gc.collect()
    before = resident()
    tensor = large(elements)
    held = resident() - before
    assert held >= 0.9 * 4 * elements  # other pages of the process may have gone in between
    del tensor
    end = time.monotonic() + 30
    while is_kept() and time.monotonic() < end:
        time.sleep(0.05)
    assert resident() - before < held / 10


@needs_proc
def test_what_is_too_large_to_be_kept_is_free_at_once(monkeypatch):
    monkeypatch.setattr(memory, "MOST_KEPT", SIZE)
    before = resident()
    tensor = large(16 << 20)
    held = resident() - before
    del tensor
    assert resident() - before < held / 10


def test_each_use_keeps_it_longer(monkeypatch):
    monkeypatch.setattr(memory, "KEPT_SECONDS", 1.0)
    place = large().data_ptr()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert large().data_ptr() == place
        time.sleep(0.05)


def resident():
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


# --- Elsewhere


@pytest.mark.parametrize("reason", ["no advice", "advice is refused"])
def test_systems_without_huge_pages(monkeypatch, reason):
    monkeypatch.setattr(memory, "advise", lambda: None if reason == "no advice" else lambda *_: -1)
    assert torch.equal(large(), torch.arange(SIZE // 4.0))


def test_small_ones_are_pytorchs():
    memory.empty_like(torch.empty(SIZE // 4 - 1))
    assert not is_kept()
