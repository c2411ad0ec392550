"""`python -m bench tune`: the search, the checks of what it tries, and the file that it writes."""

import functools
import importlib
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import xent_ext
from bench import machine, peers, tune
from bench.__main__ import main
from bench.peer import Case, Peer
from bench.search import LEAST_GAIN, Unusable, search
from xent_ext.plan import CHOICES, TUNINGS, Tuning
from xent_ext.tuning import TuningFile

ROOT = Path(__file__).resolve().parents[1]

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the search itself is tested in Triton's interpreter"
)


def python(*arguments, **environment):
    """Python in a process of its own, without the interpreter that the tests ask of Triton."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=inherited | environment, capture_output=True, text=True
    )


# The search, by a cost that is known


@dataclass(frozen=True)
class Numbers:
    tile: int = 4
    warps: int = 2
    unused: int = 0


NUMBERS = {"tile": (1, 2, 4, 8, 16), "warps": (1, 2, 4), "unused": (0, 1)}
CASES = [1, 2, 3]
# The best warps depend on the tile: from (4, 2) one change alone does not lead to the best of both.
SECONDS = {(4, 2): 10.0, (8, 2): 9.0, (4, 4): 11.0, (8, 4): 6.0, (16, 4): 5.0}


def cost(numbers, case):
    return case * SECONDS.get((numbers.tile, numbers.warps), 20.0)


def noisy(share, seed):
    draw = random.Random(seed)
    return lambda numbers, case: cost(numbers, case) * draw.gauss(1, share)


def found(measure, plan=lambda numbers, case: (numbers.tile, numbers.warps), cases=CASES):
    told = []
    best, trials = search(Numbers(), NUMBERS, cases, plan, measure, told.append)
    assert told == trials
    return best, trials


def test_search_finds_the_optimum():
    best, trials = found(cost)
    assert best == Numbers(tile=16, warps=4)
    kept = [(trial.name, trial.value) for trial in trials if trial.kept]
    assert kept == [("tile", 8), ("warps", 4), ("tile", 16)]
    assert trials[0].gain == pytest.approx(1 - 20 / 10)
    assert [trial.gain for trial in trials if trial.kept] == pytest.approx([1 / 10, 1 / 3, 1 / 6])


def test_search_finds_the_optimum_through_noise():
    for seed in range(20):
        best, _ = found(noisy(0.02, seed))
        assert best == Numbers(tile=16, warps=4)


def test_search_keeps_nothing_that_is_only_noise():
    """Of candidates that are all alike one in 150 is expected to be kept; twice that is allowed."""
    trials = []
    for seed in range(200):
        draw = random.Random(seed)
        trials += found(lambda numbers, case: draw.gauss(1, 0.05))[1]  # noqa: B023
    assert sum(trial.kept for trial in trials) <= 2 / 150 * len(trials)


def test_search_keeps_nothing_for_a_gain_below_the_least():
    slightly = 1 - LEAST_GAIN / 2
    best, trials = found(lambda numbers, case: slightly if numbers.tile == 8 else 1.0)
    assert best == Numbers()
    assert max(trial.gain for trial in trials) == pytest.approx(LEAST_GAIN / 2)


def test_search_weighs_cases_by_their_geometric_mean():
    """Twice as slow in one case and half in another is nothing gained, however long they take."""

    def measure(numbers, case):
        return case * {8: (1, 0.5, 2.0), 16: (1, 0.5, 1.5)}.get(numbers.tile, (1, 1, 1))[case - 1]

    assert found(measure)[0].tile == 16


def test_search_measures_only_what_changes():
    asked = set()

    def measure(numbers, case):
        asked.add((numbers, case))
        return cost(numbers, case)

    _, trials = found(measure, lambda numbers, case: numbers.tile if case == 2 else 0)
    assert {case for _, case in asked} == {2}
    assert all(numbers.unused == 0 for numbers, _ in asked)
    assert {(trial.name, trial.cases) for trial in trials} == {("tile", 1)}


def test_search_takes_turns():
    asked = []

    def measure(numbers, case):
        asked.append(numbers.tile)
        return 1.0

    search(Numbers(), {"tile": (8,)}, [1], lambda numbers, case: numbers.tile, measure, print)
    assert asked[:8] == [4, 8, 8, 4, 4, 8, 8, 4]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Unusable("wrong: loss off by 1.0e+00"), "wrong: loss off by 1.0e+00"),
        (RuntimeError("out of resource: shared memory\nand more"), "RuntimeError: out of resource: shared memory"),
    ],
)
def test_search_skips_what_is_wrong_or_cannot_run(error, reason):
    """The fastest by far, but for one case."""

    def measure(numbers, case):
        if numbers.tile == 16:
            if case == 3:
                raise error
            return 0.1
        return cost(numbers, case)

    best, trials = found(measure)
    assert best == Numbers(tile=8, warps=4)
    assert {trial.skipped for trial in trials if trial.value == 16} == {reason}
    assert not any(trial.kept for trial in trials if trial.skipped)


def test_search_does_not_blame_a_candidate_for_what_ails_all():
    def measure(numbers, case):
        raise RuntimeError("the GPU is gone")

    with pytest.raises(RuntimeError, match="the GPU is gone"):
        found(measure)


# A candidate at work


@pytest.fixture
def candidate(triton_backend, monkeypatch):
    module = pytest.importorskip("bench.candidate")
    for cached in (module.plan, module.refusal, module.ready):
        cached.cache_clear()
    return module


CASE = Case("tune", "", (2000, 10), "float32", "full", "cpu")


@interpreted
def test_candidates_plan_the_calls_that_are_measured(candidate, triton_backend):
    shipped = Tuning("a test")
    larger = replace(shipped, narrow_tile=8192)
    assert candidate.plan(shipped, CASE)["numbers"]["ROWS"] == 256
    assert candidate.plan(larger, CASE)["numbers"]["ROWS"] == 512
    with candidate.used(larger):
        logits, target = torch.randn(2000, 10), torch.zeros(2000, dtype=torch.int64)
        assert xent_ext.explain(logits, target).traffic.numbers["ROWS"] == 512
    assert xent_ext.explain(logits, target).traffic.numbers["ROWS"] == 256
    assert candidate.Measure(0.0, lambda case: 2)(larger, CASE) > 0
    assert len(triton_backend) > 2  # the kernels took the calls


@interpreted
def test_wrong_results_are_refused(candidate, monkeypatch):
    wrong = Peer(load=lambda: lambda logits, target: 1.1 * xent_ext.cross_entropy(logits, target), moved=None)
    monkeypatch.setitem(peers.PEERS, "xent_ext", wrong)
    with pytest.raises(Unusable, match=r"wrong: loss off by 1\.0e-01, gradient, mean off by 1\.0e-01"):
        candidate.Measure(0.0, lambda case: 2)(Tuning("a test"), CASE)


@interpreted
def test_what_cannot_run_is_refused(candidate, monkeypatch):
    def load():
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setitem(peers.PEERS, "xent_ext", Peer(load=load, moved=None))
    with pytest.raises(Unusable, match="out of resource: shared memory"):
        candidate.Measure(0.0, lambda case: 2)(Tuning("a test"), CASE)


def test_spills_of_launched_kernels_are_seen():
    """The numbers of test_compiled.py: a row whose logits alone fill every register that its threads can have."""
    pytest.importorskip("triton")
    code = """if True:
        import torch
        import xent_ext
        from bench import candidate, offline
        from xent_ext import plan
        usual = plan.most_logits_per_thread
        with offline.target("cuda", 90):
            for threads, most in ((256, usual), (32, lambda *args: 256)):
                plan.most_logits_per_thread = most
                tuning = plan.Tuning("a test", long_row_threads=(threads,))
                with candidate.used(tuning), candidate.launched() as kernels:
                    xent_ext.cross_entropy(torch.empty(8, 8000), torch.zeros(8, dtype=torch.int64))
                print(sum(map(candidate.spill_bytes, kernels)))
    """
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-4000:]
    usual, spilled = map(int, done.stdout.split())
    assert usual == 0 < spilled


# The command


@pytest.fixture
def larger_is_faster(candidate, monkeypatch):
    """All runs as ever, but by a clock for which calls take the longer the smaller the tiles of narrow rows are."""

    def milliseconds(clock, start, end):
        return 1e4 / candidate.implementation.device_properties(0).tuning.narrow_tile

    monkeypatch.setattr(machine.Clock, "milliseconds", milliseconds)
    monkeypatch.setattr("bench.search.ROUNDS", 2)


@interpreted
@pytest.mark.usefixtures("larger_is_faster")
def test_tune_writes_a_file_that_changes_the_plan(tmp_path, capsys, monkeypatch):
    few = {name: CHOICES[name] for name in ("narrow_tile", "packed_tile", "logits_per_thread", "split_threads")}
    monkeypatch.setattr(tune, "tune", functools.partial(tune.tune, choices=few))
    path = tmp_path / "tuning.json"
    options = ["--shapes", "1100x10", "3x5", "--dtype", "float32", "--seconds", "0", "--out", str(path)]
    assert main(["tune", *options]) == 0
    printed = capsys.readouterr().out
    assert "narrow_tile = 8192, 1 cases: saves 50.0%, noise 0.0%: kept" in printed
    assert "narrow_tile = 2048, 1 cases: saves -100.0%, noise 0.0%: not kept" in printed

    result = json.loads(path.read_text())
    assert result["device"] == "Triton's interpreter"
    assert result["machine"]["torch"] == torch.__version__
    assert result["tuning"]["source"] == "measured on Triton's interpreter"
    changed = {
        name for name, choices in CHOICES.items() if result["tuning"][name] != json.loads(json.dumps(choices[0]))
    }
    assert changed == {"narrow_tile"}
    wide, small = result["cases"]
    assert (wide["shape"], wide["dtype"], small["shape"]) == ([1100, 10], "float32", [3, 5])
    assert (wide["before"]["numbers"]["ROWS"], wide["after"]["numbers"]["ROWS"]) == (256, 512)
    assert wide["before"]["median_ms"] == 2 * wide["after"]["median_ms"]
    assert [trial["value"] for trial in result["trials"] if trial["kept"]] == [8192]

    explain = """if True:
        import torch
        import xent_ext
        print(xent_ext.explain(torch.randn(1100, 10), torch.zeros(1100, dtype=torch.int64)))
    """
    on_cpu = {"TRITON_INTERPRET": "1", "XENT_EXT_BACKEND": "triton"}
    assert "ROWS 256" in python("-c", explain, **on_cpu).stdout
    assert "ROWS 512" in python("-c", explain, **on_cpu, XENT_EXT_TUNING=str(path)).stdout

    path.write_text(json.dumps(result | {"device": "a GPU"}))
    refused = python("-c", explain, **on_cpu, XENT_EXT_TUNING=str(path))
    assert f"XENT_EXT_TUNING={path} is for 'a GPU', but the logits are on \"Triton's interpreter\"" in refused.stderr


@interpreted
@pytest.mark.usefixtures("larger_is_faster")
def test_tune_leaves_out_what_does_not_fit(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    path = tmp_path / "tuning.json"
    assert main(["tune", "--shapes", "2000x10", "--seconds", "0", "--out", str(path)]) == 1
    assert "Left out: 2000 x 10 bfloat16: needs about" in capsys.readouterr().out
    assert not path.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_shipped_plans_are_shown(tmp_path):
    pytest.importorskip("triton")
    other = tmp_path / "other.json"  # for a device: the shipped numbers are shown all the same
    other.write_text(json.dumps({"device": "a GPU", "tuning": {"long_row_threads": [512]}}))
    done = python(
        "-m", "bench", "tune", "--shapes", "8192x32000", "8x19x64x64", "16x151936", XENT_EXT_TUNING=str(other)
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Nothing was searched: PyTorch sees no GPU" in done.stdout
    for target, source in (
        ("sm_80", "modelled"),
        ("sm_90", "modelled"),
        ("sm_100", "modelled"),
        ("gfx942", "compiled"),
    ):
        assert f"{target}: the shipped numbers, {source}" in done.stdout
    assert sum(len(tunings) for tunings in TUNINGS.values()) == done.stdout.count("the shipped numbers")
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("8192x32000")]
    device = importlib.import_module("xent_ext.kernels.device")
    clusters = device.largest_cluster(SimpleNamespace(backend="cuda", arch=90)) > 1
    assert [" ".join(row[2:]) for row in rows][:2] == [
        "resident 1 x 32768, 1 x 16 8192 1 8192",
        f"resident 1 x 32768, {'4 x 4' if clusters else '1 x 16'} 8192 1 8192",
    ]
    assert "split 1 x 4096, 1 x 8" in done.stdout


@pytest.mark.parametrize("shape", ["8", "8x", "8x0", "8x-1", "axb"])
def test_tune_refuses_what_is_no_shape(shape, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--shapes", shape])
    assert stopped.value.code == 2
    assert f"{shape!r} is not two or more positive numbers with an x between them" in capsys.readouterr().err


def test_the_file_of_every_choice_is_read(tmp_path):
    """What the search may find, a file may hold."""
    path = tmp_path / "tuning.json"
    for name, choices in CHOICES.items():
        for value in choices:
            path.write_text(json.dumps({"device": "a GPU", "tuning": {"source": "a test", name: value}}))
            assert getattr(TuningFile.read(path).override(Tuning(""), "a GPU"), name) == value
