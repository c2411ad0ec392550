"""The plan: launch numbers that cover every row and class, fit the device, and suit the shape."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xent_ext.layout import Layout, layout
from xent_ext.plan import (
    CHOICES,
    PARTS,
    ROWS_PER_PROGRAM,
    SCHEDULES,
    TUNINGS,
    Device,
    Plan,
    Tuning,
    gradient_plan,
    is_wide,
    parts,
    plan,
    shipped,
    vectors,
)
from xent_ext.tuning import TuningFile

DEVICES = {
    "sm_80": Device("cuda", 80, lanes=32, processors=108, l2_bytes=40 << 20),
    "sm_90": Device("cuda", 90, lanes=32, processors=132, l2_bytes=50 << 20),
    "sm_90 with clusters": Device("cuda", 90, lanes=32, processors=132, l2_bytes=50 << 20, cluster=16),
    "gfx942": Device("hip", "gfx942", lanes=64, processors=304, l2_bytes=256 << 20),
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
    # A resident row fits its tiles; of a streamed one the body is walked in blocks.
    assert found.schedule in ("resident", "streaming", "split")
    assert found.rest == 0 or is_power_of_2(found.rest)
    if found.edge:
        assert found.rest == 2 * found.edge
    if found.schedule == "resident":
        body = layout.classes // found.edge * found.edge if found.edge else layout.classes - found.rest
        assert body <= found.block < max(2 * layout.classes, 2)
    else:
        assert found.block < layout.classes
        # The gradient after it has a program for every tile.
        after = gradient_plan(layout, found)
        assert (after.rows, after.block) == (found.rows, found.block)
        assert after.programs == found.programs * math.ceil(layout.classes / found.block)
        assert found.at_once >= 1
        assert found.splits == 1 or (found.schedule, found.rows) == ("split", 1)
    # Threads, and what they hold.
    threads = found.num_warps * device.lanes
    assert threads <= 1024
    assert found.rows * found.block * accumulated <= REGISTERS * 4 * threads * found.num_ctas
    assert threads * found.num_ctas <= 16 * 512
    # Clusters
    assert found.num_ctas <= device.cluster
    assert found.num_ctas == 1 or found.rows == 1


@given(
    layouts(),
    dtypes,
    st.sampled_from(list(DEVICES.values())),
    st.booleans(),
    st.fixed_dictionaries({name: st.sampled_from(choices) for name, choices in CHOICES.items()}),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_plans_of_any_tuning_cover_their_rows_and_can_be_launched(layout, dtype, device, dense, numbers):
    """Registers are left to the compiler: `python -m bench tune` keeps nothing that spills."""
    device = replace(device, tuning=Tuning("a test", **numbers))
    for schedule in (None, "streaming"):
        found = plan(layout, *dtype, device, dense, schedule=schedule)
        assert is_power_of_2(found.rows)
        assert is_power_of_2(found.block)
        assert is_power_of_2(found.num_warps)
        assert found.num_warps * device.lanes <= 1024
        assert found.programs == layout.outer * math.ceil(layout.inner / found.rows)
        if found.schedule == "resident":
            body = layout.classes // found.edge * found.edge if found.edge else layout.classes - found.rest
            assert body <= found.block


@devices
@pytest.mark.parametrize("itemsize", [2, 4])
def test_short_rows_share_a_program(device, itemsize):
    for classes in (1, 2, 10, 100, 1000):
        found = plan(contiguous(1 << 16, classes), itemsize, 4, device)
        assert found.schedule == "resident"
        assert found.rows > 1
        assert 2048 <= found.rows * (found.block + found.rest) <= 4096


@pytest.mark.parametrize(
    ("classes", "itemsize", "expected"),
    [
        (19, 4, (16, 4)),  # in one tile of 32 more than a third would be padding
        (151936, 2, (131072, 32768)),
        (1000, 2, (1024, 0)),
        (32000, 2, (32768, 0)),
        (1, 2, (1, 0)),
        (50257, 2, (65536, 16)),  # rows start at any element: whole vectors, and the ends
        (1027, 4, (1024, 8)),
    ],
)
def test_pieces_of_a_row(classes, itemsize, expected):
    found = plan(contiguous(4096, classes), itemsize, 4, DEVICES["sm_90 with clusters"])
    assert (found.block, found.rest) == expected


def test_ends_of_rows_are_apart_only_where_all_tensors_start_alike():
    """Vectors of one tensor would not be vectors of the other."""
    alike = layout((64, 1003), (1011, 1), (1003, 1))
    apart = layout((64, 1003), (1004, 1), (1003, 1))
    device = DEVICES["sm_90"]
    assert plan(alike, 2, 4, device).edge == 8
    assert plan(apart, 2, 4, device).edge == 0
    assert plan(alike, 2, 4, device, aligned=False).edge == 0


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


def schedules(device, *widths, rows=4096, itemsize=2):
    found = (plan(contiguous(rows, classes), itemsize, 4, DEVICES[device]) for classes in widths)
    return [(f.schedule, f.num_ctas, f.num_warps) for f in found]


def test_long_rows_stream_where_there_are_no_clusters():
    assert schedules("sm_80", 8192, 16384, 32768, 65536) == [
        ("resident", 1, 4),
        ("resident", 1, 8),
        ("resident", 1, 16),
        ("streaming", 1, 16),
    ]


def test_clusters_keep_long_rows_resident():
    """Small programs first, of which two share a processor; more than 8 to a cluster only where it must be."""
    assert schedules("sm_90 with clusters", 16384, 65536, 128256, 262144, 1 << 19, 1 << 20) == [
        ("resident", 2, 4),
        ("resident", 8, 4),
        ("resident", 8, 8),
        ("resident", 8, 16),
        ("resident", 16, 16),
        ("streaming", 1, 16),
    ]
    assert schedules("sm_90 with clusters", 262144, itemsize=4) == [("resident", 16, 16)]


def test_few_rows_are_split():
    for rows in (1, 8, 107):
        found = plan(contiguous(rows, 151936), 2, 4, DEVICES["sm_80"])
        assert found.schedule == "split"
        assert found.programs * found.splits >= 108
    assert plan(contiguous(108, 151936), 2, 4, DEVICES["sm_80"]).schedule == "streaming"
    assert plan(contiguous(8, 1000), 2, 4, DEVICES["sm_80"]).schedule == "resident"


@pytest.mark.parametrize(("classes", "itemsize"), [(50257, 2), (65536, 2), (65536, 4), (128256, 2)])
def test_streamed_rows_stay_in_l2(classes, itemsize):
    """Or half the processors would be idle."""
    device = DEVICES["sm_80"]
    found = plan(contiguous(4096, classes), itemsize, 4, device)
    assert found.schedule == "streaming"
    touched = 3 * classes * itemsize * found.at_once  # between two reads of a logit
    assert touched <= 0.6 * device.l2_bytes or found.at_once == device.processors // itemsize


def test_a_schedule_can_be_forced():
    long, short = contiguous(4096, 128256), contiguous(4096, 1000)
    device = DEVICES["sm_90"]
    for name in SCHEDULES:
        assert plan(short, 2, 4, device, schedule=name).schedule == name
    with pytest.raises(ValueError, match="'resident' is not for 4096 rows of 128256 classes"):
        plan(long, 2, 4, device, schedule="resident")
    with pytest.raises(ValueError, match="'split' is not for"):
        plan(contiguous(8, 19, 64, 64), 2, 4, device, schedule="split")


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


def test_few_logits_are_one_tile():
    """One program makes count, loss and gradient, up to 8192 logits in the bodies of rows."""
    for rows, classes in ((4, 10), (256, 10), (1024, 10), (8, 1000), (1, 2048)):
        assert plan(contiguous(rows, classes), 4, 4, DEVICES["sm_90"]).programs == 1
    for rows, classes in ((1025, 10), (9, 1000)):
        assert plan(contiguous(rows, classes), 4, 4, DEVICES["sm_90"]).programs > 1


def test_two_programs_of_512_threads_share_a_processor():
    """With 64 registers for each thread; where a row has a second piece, the compiler would spill some."""
    device = DEVICES["sm_90 with clusters"]
    assert plan(contiguous(4096, 256000), 4, 4, device).registers == 64
    assert plan(contiguous(4096, 151936), 4, 4, device).registers == 0


# --- The launch numbers of a device


@pytest.mark.parametrize(("backend", "arch"), [(backend, arch) for backend in TUNINGS for arch in TUNINGS[backend]])
def test_shipped_numbers_are_among_the_choices_and_say_where_they_are_from(backend, arch):
    tuning = asdict(shipped(backend, arch))
    assert tuning.pop("source") in ("modelled", "compiled")
    assert all(value in CHOICES[name] for name, value in tuning.items())
    assert tuning.keys() == CHOICES.keys()


@pytest.mark.parametrize(
    ("backend", "arch", "source"),
    [
        ("cuda", 89, "modelled for 80, not 89"),
        ("cuda", 120, "modelled for 100, not 120"),
        ("cuda", 75, "modelled for 80, not 75"),
        ("hip", "gfx1100", "compiled for gfx942, not gfx1100"),
    ],
)
def test_an_architecture_without_numbers_has_those_of_its_nearest(backend, arch, source):
    assert shipped(backend, arch).source == source


@pytest.fixture
def tuning_file(tmp_path):
    def write(**tuning):
        path = tmp_path / "tuning.json"
        path.write_text(json.dumps({"device": "a GPU", "tuning": tuning, "found": "somehow"}))
        return str(path)

    return write


def test_a_file_overrides_what_it_names(tuning_file):
    path = tuning_file(packed_tile=1024, long_row_threads=[256, 512])
    found = TuningFile.read(path).override(shipped("cuda", 90), "a GPU")
    assert found == replace(shipped("cuda", 90), source=f"from {path}", packed_tile=1024, long_row_threads=(256, 512))
    before, after = (replace(DEVICES["sm_90"], tuning=tuning) for tuning in (shipped("cuda", 90), found))
    assert plan(contiguous(4096, 1000), 2, 4, before).rows == 2
    assert plan(contiguous(4096, 1000), 2, 4, after).rows == 1


@pytest.mark.parametrize(
    ("largest", "schedule", "programs"), [(16, "resident", 16), (8, "streaming", 1), (1, "streaming", 1)]
)
def test_a_device_whose_clusters_are_slow_may_stream_in_their_place(largest, schedule, programs):
    tuning = replace(shipped("cuda", 90), largest_cluster=largest)
    found = plan(contiguous(4096, 262144), 4, 4, replace(DEVICES["sm_90 with clusters"], tuning=tuning))
    assert (found.schedule, found.num_ctas) == (schedule, programs)


def test_a_file_of_all_fields_is_what_it_was_written_from(tuning_file):
    tuning = Tuning("measured on a GPU", **{name: choices[-1] for name, choices in CHOICES.items()})
    assert TuningFile.read(tuning_file(**asdict(tuning))).override(shipped("cuda", 80), "a GPU") == tuning
    assert len({tuning, shipped("cuda", 80)}) == 2  # plans are looked up by it


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"tile": 1024}, "no choice is called 'tile', but logits_per_thread, long_row_threads, "),
        ({"packed_tile": 1000}, "packed_tile must be one of 2048, 1024, 4096, got 1000"),
        ({"packed_tile": 2048.0}, "packed_tile must be one of 2048, 1024, 4096, got 2048.0"),
        ({"usable_l2": True}, "usable_l2 must be one of .*, got true"),
        ({"source": None}, "source must be a string, got None"),
        ({"long_row_threads": 256}, r"long_row_threads must be one of \[128, 256, 512\], .*, got 256"),
    ],
)
def test_a_file_of_other_numbers_is_refused(tuning, message, tuning_file):
    with pytest.raises(ValueError, match=message):
        TuningFile.read(tuning_file(**tuning))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"device": 1, "tuning": {}}', '{"device": "a GPU", "tuning": []}'])
def test_what_is_no_tuning_file_is_refused(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r'other\.json must be JSON with "device", a name, and "tuning", an object'):
        TuningFile.read(path)


def test_a_file_for_another_device_is_refused(tuning_file):
    file = TuningFile.read(tuning_file())
    with pytest.raises(ValueError, match="is for 'a GPU', but the logits are on 'another'"):
        file.override(shipped("cuda", 90), "another")


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
