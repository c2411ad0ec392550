"""The plan: launch numbers that cover every row and class, fit the device, and suit the shape."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xent_ext.layout import Layout, layout
from xent_ext.plan import PARTS, ROWS_PER_PROGRAM, Device, Plan, gradient_plan, is_wide, parts, plan, vectors

DEVICES = {
    "sm_80": Device("cuda", 80, lanes=32, processors=108),
    "sm_90": Device("cuda", 90, lanes=32, processors=132),
    "sm_90 with clusters": Device("cuda", 90, lanes=32, processors=132, cluster=8),
    "gfx942": Device("hip", "gfx942", lanes=64, processors=304),
}
REGISTERS = 64  # logits that a thread may hold as float32

devices = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)


def contiguous(*shape):
    """The layout of contiguous logits and of their gradient, of any size: nothing is allocated."""
    stride = torch.empty(shape, device="meta").stride()
    return layout(shape, stride, stride)


@st.composite
def layouts(draw):
    """Any (outer, inner, class), its strides contiguous or not."""
    outer, inner = draw(st.integers(1, 70)), draw(st.integers(1, 100_000))
    classes = draw(st.integers(1, 300) | st.integers(1, 300_000))
    s_class, s_inner = draw(st.sampled_from([(1, classes), (inner, 1), (1, classes + 3), (2, 2 * classes), (1, 0)]))
    strides = (draw(st.sampled_from([0, inner * classes, inner * classes + 5])), s_inner, s_class)
    return Layout(outer, inner, classes, inner, 1, (strides, strides))


dtypes = st.sampled_from([(2, 4), (4, 4), (8, 8), (2, 8), (4, 8)])  # bytes of a logit, and computed in


def is_power_of_2(n):
    return n > 0 and n & (n - 1) == 0


@given(layouts(), dtypes, st.sampled_from(list(DEVICES.values())), st.booleans())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_every_plan_covers_its_rows_and_fits_its_device(layout, dtype, device, dense):
    itemsize, accumulated = dtype
    found = plan(layout, itemsize, accumulated, device, dense)
    # Triton's tiles are powers of 2, and so are its warps.
    assert is_power_of_2(found.rows)
    assert is_power_of_2(found.block)
    assert is_power_of_2(found.num_warps)
    # No tile has rows of two outers, and none is without rows.
    tiles = math.ceil(layout.inner / found.rows)
    assert found.programs == layout.outer * tiles
    assert (tiles - 1) * found.rows < layout.inner
    # A resident row fits its tile, which is no larger than it must be; a streamed one does not.
    assert found.schedule in ("resident", "streaming")
    if found.schedule == "resident":
        assert layout.classes <= found.block < max(2 * layout.classes, 2)
    else:
        assert found.block < layout.classes
        # A deferred gradient has a program for every tile.
        deferred = gradient_plan(layout, found)
        assert (deferred.rows, deferred.block) == (found.rows, found.block)
        assert deferred.programs == found.programs * math.ceil(layout.classes / found.block)
    # Threads, and what they hold.
    threads = found.num_warps * device.lanes
    assert threads <= 1024
    assert found.rows * found.block * accumulated <= REGISTERS * 4 * threads * found.num_ctas
    # Clusters
    assert found.num_ctas <= device.cluster
    assert found.num_ctas == 1 or found.rows == 1


@devices
@pytest.mark.parametrize("itemsize", [2, 4])
def test_short_rows_share_a_program(device, itemsize):
    for classes in (1, 2, 10, 100, 1000):
        found = plan(contiguous(1 << 16, classes), itemsize, 4, device)
        assert found.schedule == "resident"
        assert found.rows > 1
        assert found.rows * found.block == 4096


@devices
def test_no_more_rows_than_there_are(device):
    for rows in (1, 3, 5):
        assert plan(contiguous(rows, 10), 4, 4, device).rows == 1 << (rows - 1).bit_length()


@devices
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_tiles_of_neighbouring_rows_are_a_sector_wide(device, itemsize):
    """Images: less than 32 bytes of rows side by side would fetch what they don't use."""
    for classes in (2, 21, 150, 1000, 20_000, 200_000):
        found = plan(contiguous(8, classes, 128, 128), itemsize, max(itemsize, 4), device)
        assert found.rows * itemsize >= 32


def test_long_rows_stream():
    device = DEVICES["sm_90"]
    schedules = {
        classes: plan(contiguous(4096, classes), 2, 4, device).schedule for classes in (32000, 32768, 32769, 128256)
    }
    assert schedules == {32000: "resident", 32768: "resident", 32769: "streaming", 128256: "streaming"}


def test_clusters_keep_long_rows_resident():
    found = plan(contiguous(4096, 128256), 2, 4, DEVICES["sm_90 with clusters"])
    assert found == Plan("resident", rows=1, block=131072, num_warps=16, programs=4096, num_ctas=8)
    beyond = plan(contiguous(4096, 131073), 2, 4, DEVICES["sm_90 with clusters"])
    assert (beyond.schedule, beyond.num_ctas) == ("streaming", 1)


def longest_resident(itemsize, accumulated, dense=False):
    device = DEVICES["sm_90"]
    plans = {1 << k: plan(contiguous(64, 1 << k), itemsize, accumulated, device, dense) for k in range(20)}
    return max(classes for classes, found in plans.items() if found.schedule == "resident")


def test_what_takes_more_registers_streams_sooner():
    half, single, double = longest_resident(2, 4), longest_resident(4, 4), longest_resident(8, 8)
    assert half >= single >= 2 * double
    assert longest_resident(2, 8) <= half // 2  # half-precision logits, float64 probabilities
    assert longest_resident(2, 4, dense=True) <= half // 2  # a target mass beside every logit


@pytest.mark.parametrize("classes", [1, 10, 1000, 32000, 128256])
def test_wide_wavefronts_come_in_half_as_many(classes):
    """1024 threads are all that launch: 32 warps of 32, or 16 of 64."""
    warps = {name: plan(contiguous(4096, classes), 2, 4, device).num_warps for name, device in DEVICES.items()}
    assert warps["gfx942"] == max(warps["sm_90"] // 2, 1)


# --- Offsets and alignment


@given(layouts(), dtypes)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_offsets_that_are_not_wide_fit_32_bits(layout, dtype):
    found = plan(layout, *dtype, DEVICES["sm_90"])
    blocks = math.ceil(layout.classes / found.block)
    last = [(found.rows - 1) * i + (blocks * found.block - 1) * c for _, i, c in layout.strides]
    assert is_wide(layout, found) or max(last) < 2**31


def test_wide_offsets():
    def wide(*shape):
        found = contiguous(*shape)
        return is_wide(found, plan(found, 2, 4, DEVICES["sm_90"]))

    assert not wide(4096, 128256)
    assert not wide(1 << 20, 128256)  # 2**37 logits, but each program starts at its own rows, in 64 bits
    assert wide(1, 1 << 31)
    assert wide(1, 1000, 1 << 22)  # the classes of one pixel are spread over 2**32


@given(layouts(), st.sampled_from([2, 4, 8]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_vectors_start_on_16_bytes_and_end_with_the_row(layout, itemsize):
    by_class, by_row = vectors(layout, itemsize)
    assert min(by_class, by_row) == 1
    assert max(by_class, by_row) <= 16 // itemsize
    for outer, inner, s_class in layout.strides:
        if by_class > 1:
            assert s_class == 1
            assert layout.classes % by_class == outer % by_class == inner % by_class == 0
        if by_row > 1:
            assert inner == 1
            assert layout.inner % by_row == outer % by_row == s_class % by_row == 0


@pytest.mark.parametrize(
    ("shape", "itemsize", "expected"),
    [
        ((8, 32000), 2, (8, 1)),
        ((8, 32000), 4, (4, 1)),
        ((8, 32000), 8, (2, 1)),
        ((8, 50257), 2, (1, 1)),  # an odd number of classes: rows start anywhere
        ((8, 50260), 2, (4, 1)),
        ((8, 19, 256, 256), 2, (1, 8)),  # pixels are neighbours
        ((8, 19, 255, 255), 2, (1, 1)),
    ],
)
def test_known_vectors(shape, itemsize, expected):
    assert vectors(contiguous(*shape), itemsize) == expected


# --- Sums


@given(st.integers(0, 1 << 40) | st.integers(0, 4 * ROWS_PER_PROGRAM))
@settings(deadline=None, derandomize=True)
def test_parts_cover_a_sum(count):
    programs, span = parts(count)
    assert programs * span >= count
    assert programs in (1, PARTS)
    assert span >= 1
    assert programs == 1 or (programs - 1) * span < count


def test_the_plan_needs_neither_torch_nor_triton():
    """A pure function of numbers: it runs where nothing else is installed."""
    path = sys.modules[Plan.__module__].__file__
    code = f"import runpy, sys; runpy.run_path({path!r}); assert not {{'torch', 'triton', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=60)
