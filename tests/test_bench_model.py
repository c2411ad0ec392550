"""`python -m bench model`: figures that a driver counts, and the tables that are made of them."""

import contextlib
import json
import math
import sys
from types import SimpleNamespace

import pytest

from bench import model
from bench.__main__ import main
from bench.peer import Case

pytestmark = pytest.mark.skipif(not model.FILE.exists(), reason="this installation has no figures")
KEYS = {"device", "arch", "shape", "dtype", "what", "schedule", "bytes", "instructions", "time_us", "launches"}


class Counts:
    """What a driver counts of a pass: here always the same."""

    def __init__(self, *kernels):
        self.kernels = kernels

    def as_dict(self, device):
        return [record(kernel, device) for kernel in self.kernels]


def record(kernel, device):
    return {
        "kernel": kernel,
        "ctas": 32,
        "regs": 40,
        "warp_instructions": 1000,
        "instructions": {"fp32_fma": 700, "move": 100, "ld_param": 200},
        "model": {
            "resident_ctas_per_sm": 4, "dram_bytes": 1e6, "l2_bytes": 2_000_000, "bound": "dram",
            "time_us": {"H100": 5.0, "H200": 4.0}[device], "overhead_us": 3.0,
        },
    }  # fmt: skip


@pytest.fixture
def counted():
    """The profile of a made-up driver; the kernels themselves run in Triton's interpreter, or on a GPU."""
    asked = []

    @contextlib.contextmanager
    def profile(programs, rest):
        asked.append((programs, rest))
        yield Counts("resident", "sum_parts") if len(asked) % 2 else Counts("resident")

    return profile


@pytest.mark.usefixtures("triton_backend")
def test_an_entry_adds_up_what_is_counted(counted):
    pytest.importorskip("triton")
    h100, h200 = model.entries(Case("model", "", (64, 100), "float32", "full", "cpu"), 90, counted)
    assert set(h100) >= KEYS
    assert (h100["device"], h100["arch"], h100["shape"], h100["schedule"]) == ("H100", 90, (64, 100), "resident")
    assert [(launch["pass"], launch["kernel"]) for launch in h100["launches"]] == [
        ("forward", "resident"), ("forward", "sum_parts"), ("backward", "resident")
    ]  # fmt: skip
    assert h100["bytes"] == 3_000_000
    assert h100["instructions"] == 3 * 700
    assert h100["time_us"] == 3 * 5.0  # with launches
    assert h200["time_us"] == 3 * 4.0
    copies, ideal = 3e6 / (2 * 64 * 100 * 4), 2 * 64 * 100 * 4 / 3.35e12
    assert model.times(h100) == f"{copies:.3f} / {2e-6 / ideal:.2f} / {6e-6 / ideal:.2f} / 15.0"
    assert model.line(h100, h200)[4] == f"{32 * 700 / 6400:.1f}"


def test_a_driver_that_counts_nothing_is_told_of(monkeypatch, capsys):
    monkeypatch.setattr(model, "counter", lambda: None)
    assert main(["model", "--count"]) == 1
    assert "counts nothing" in capsys.readouterr().err


def test_the_driver_that_counts_is_triton_s_active_one(monkeypatch, counted):
    triton = pytest.importorskip("triton")

    class Driver:
        def get_current_target(self):
            return SimpleNamespace(arch=90)

    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=Driver()))
    assert model.counter() is None
    monkeypatch.setattr(sys.modules[__name__], "profile", counted, raising=False)
    assert model.counter() == (90, counted)


def test_the_file_says_what_it_is_and_holds_every_case():
    found = model.read()
    assert found["note"].startswith("modelled, not measured: ")
    assert found["how"] == model.HOW
    assert found["triton"]
    names = [(e["device"], tuple(e["shape"]), e["dtype"], e["what"]) for e in found["entries"]]
    assert len(set(names)) == len(names)
    devices = [device for of_arch in model.DEVICES.values() for device in of_arch]
    assert {name[:3] for name in names} == {
        (device, shape, dtype) for device in devices for shape, dtypes in model.SHAPES.items() for dtype in dtypes
    }
    for entry in found["entries"]:
        assert set(entry) >= KEYS
        least = 2 * math.prod(entry["shape"]) * (2 if entry["dtype"] == "bfloat16" else 4)
        assert entry["bytes"] >= 0.99 * least  # those of few programs were counted
        assert entry["time_us"] > 1e6 * least / model.DEVICES[entry["arch"]][entry["device"]]
    assert json.loads(model.text(found)) == found


def test_tuning_shows_the_file_s_tables():
    if not model.TUNING.exists():
        pytest.skip("a source distribution has no tables")
    page = model.TUNING.read_text()
    assert page == model.with_tables(page, model.read())
    for name, table in model.tables(model.read()).items():
        assert f"\n## {name} (modelled)\n\n{table}\n" in page
