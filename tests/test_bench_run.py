"""`python -m bench run`: it measures what it says, shows who is wrong or absent, and survives a case that fails."""

import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

# bench/ is run from the checkout, not installed. Appended: what is installed still comes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import case as case_module
from bench import peers, run, shapes
from bench.__main__ import main
from bench.case import PASSES, Case, Truth

SMALL = shapes.SUITES | {"few-rows": (shapes.Shape("tiny", (3, 10)), shapes.Shape("tiny image", (2, 5, 3, 4)))}
CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Threads in place of processes, tiny shapes, and no copies of a large tensor."""
    monkeypatch.setattr(run, "fresh_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(run, "copy_bandwidth", lambda device, cache: 1e9)
    monkeypatch.setattr(shapes, "SUITES", SMALL)
    monkeypatch.setattr(case_module, "_timed", {})


def add_peer(monkeypatch, name, load):
    monkeypatch.setitem(peers.PEERS, name, SimpleNamespace(INCLUDES="a test", load=load))


def make_case(mode="full", dtype="float32", shape=(4, 7)):
    return Case("few-rows", "tiny", shape, dtype, mode, "cpu")


def start(tmp_path, *options):
    return main(
        ["run", "--suite", "few-rows", "--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path), *options]
    )


@pytest.mark.usefixtures("quick")
def test_run_writes_what_it_prints(tmp_path, capsys):
    options = ["--pass", "full", "fwd", "nograd", "--dtype", "float32", "bfloat16", "--peers", "torch_eager"]
    status = start(tmp_path, *options)
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "run.json").read_text())

    assert status == 0
    assert len(result["rows"]) == 2 * 2 * (2 + 1 + 1)  # shapes, dtypes, upstream gradients of each pass
    for row in result["rows"]:
        ours, theirs = row["peers"]["xent_ext"], row["peers"]["torch_eager"]
        assert row["best_baseline"] == "torch_eager"
        assert row["ratio"] == theirs["median_ms"] / ours["median_ms"]
        assert f"{row['ratio']:.2f}x" in printed
        assert row["bytes"] == PASSES[row["pass"]].reads_and_writes * ours_bytes(row)
        for peer in (ours, theirs):
            low, high = peer["quartiles_ms"]
            assert peer["status"] == "right"
            assert peer["calls"] >= run.ROUNDS
            assert 0 < low <= peer["median_ms"] <= high
            assert peer["bytes_per_second"] == pytest.approx(row["bytes"] / (peer["median_ms"] / 1e3))
            assert peer["share_of_copy"] == pytest.approx(peer["bytes_per_second"] / 1e9)
            assert peer["peak_bytes"] > 0
    assert {row["upstream"] for row in result["rows"] if row["pass"] == "full"} == {1.0, 0.5}
    assert result["method"] == run.__doc__
    assert result["method"].strip() in printed
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def ours_bytes(row):
    return torch.Size(row["shape"]).numel() * getattr(torch, row["dtype"]).itemsize


def doubled_gradient(logits, target):
    loss = F.cross_entropy(logits, target)
    return 2 * loss - loss.detach()


WRONG = {
    "loss": lambda logits, target: F.cross_entropy(logits, target) + 1e-3,
    "gradient": doubled_gradient,
    "NaN": lambda logits, target: F.cross_entropy(logits, target) * float("nan"),
    "one element": lambda logits, target: (
        F.cross_entropy(logits, target) + 0.01 * (logits[0, 0] - logits[0, 0].detach())
    ),
    "scale of the upstream gradient": lambda logits, target: IgnoresUpstream.apply(logits, target),
}


class IgnoresUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        with torch.enable_grad():
            own = logits.detach().requires_grad_()
            loss = F.cross_entropy(own, target)
            (ctx.gradient,) = torch.autograd.grad(loss, own)
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.gradient, None


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("what", WRONG)
def test_wrong_peer_is_shown_and_not_timed(what, monkeypatch, tmp_path, capsys):
    add_peer(monkeypatch, "broken", lambda: WRONG[what])
    monkeypatch.setattr(run, "shapes", lambda suites, device: [("few-rows", SMALL["few-rows"][0])])
    result = run.compare(["few-rows"], ["float32"], ["full"], ["xent_ext", "broken"], CPU, 0.01)
    for row in result["rows"]:
        assert row["peers"]["broken"]["status"] == "wrong"
        assert "median_ms" not in row["peers"]["broken"]
        assert row["ratio"] is None
    text = run.run_report.text(result)
    assert "WRONG: broken at 3 x 10 float32 full" in text
    run.run_report.plot(result)  # with nothing to show


@pytest.mark.usefixtures("quick")
def test_our_own_error_is_the_exit_status(monkeypatch, tmp_path):
    add_peer(monkeypatch, "xent_ext", lambda: WRONG["loss"])
    assert start(tmp_path, "--peers", "torch_eager") == 1


@pytest.mark.usefixtures("quick")
def test_absent_peer_has_its_reason(monkeypatch, capsys):
    def load():
        raise ModuleNotFoundError("No module named 'elsewhere'")

    add_peer(monkeypatch, "elsewhere", load)
    result = run.compare(["few-rows"], ["float32"], ["full"], ["xent_ext", "torch_eager", "elsewhere"], CPU, 0.01)
    assert all(row["ratio"] is not None for row in result["rows"])
    text = run.run_report.text(result)
    reason = "ABSENT: elsewhere at 3 x 10 float32 full: ModuleNotFoundError: No module named 'elsewhere'"
    assert text.count(reason) == 1  # once, not for each upstream gradient


@pytest.mark.usefixtures("quick")
def test_failed_case_leaves_the_others(monkeypatch):
    take_turns = run.take_turns

    def fail_on_images(case, *rest):
        if len(case.shape) > 2:
            raise MemoryError("too much")
        return take_turns(case, *rest)

    monkeypatch.setattr(run, "take_turns", fail_on_images)
    result = run.compare(["few-rows"], ["float32"], ["fwd"], ["xent_ext", "torch_eager"], CPU, 0.01)
    good, failed = result["rows"]
    assert good["ratio"] is not None
    assert failed["peers"]["xent_ext"] == {"status": "absent", "reason": "MemoryError: too much"}


@pytest.mark.usefixtures("quick")
def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr(run.machine, "free_memory", lambda device: 2000)
    result = run.compare(["few-rows"], ["float32"], ["full"], ["xent_ext"], CPU, 0.01)
    assert not result["rows"]
    assert run.run_report.text(result).count("Left out: tiny") == 2
    run.run_report.plot(result)


@pytest.mark.usefixtures("quick")
def test_peers_take_turns(monkeypatch):
    calls = []
    monkeypatch.setattr(run, "block", lambda name, factor, seconds: calls.append(name) or [1.0])
    times = run.take_turns(make_case("fwd"), ["xent_ext", "torch_eager"], 0.01, 2)
    a, b = "xent_ext", "torch_eager"
    assert calls == [a, b, b, a] * (run.ROUNDS // 2)
    assert times == {(name, 1.0): [1.0] * run.ROUNDS for name in (a, b)}


def test_processes_are_real():
    (row,) = run.measure(make_case("fwd"), ["xent_ext"], 0.01, 2)
    assert row["peers"]["xent_ext"]["status"] == "right"
    assert not case_module._timed  # nothing was prepared in this process


def test_timed_calls_rotate_their_inputs(monkeypatch):
    seen = []

    def spy(logits, target):
        assert logits.grad is None
        seen.append(logits.data_ptr())
        return F.cross_entropy(logits, target)

    add_peer(monkeypatch, "spy", lambda: spy)
    timed = case_module.Timed(make_case(), "spy", 3)
    for _ in range(6):
        assert len(timed.calls(1.0, 0)) == 1
    assert len(set(seen)) == 3
    assert seen[:3] == seen[3:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 10), (64, 1000), (2, 19, 16, 16), (256, 4000)])
def test_rounding_in_its_dtype_is_not_an_error(dtype, shape):
    found = case_module.check(make_case(dtype=dtype, shape=shape), ["torch_eager", "xent_ext"])
    assert [peer["status"] for peer in found.values()] == ["right", "right"]


def test_truth_allows_little():
    logits, target = next(case_module.inputs(make_case(shape=(64, 1000)), 1))
    assert all(allowed < 2e-5 for allowed in Truth(logits, target).allowed.values())


def test_same_inputs_for_all():
    one, two = (list(case_module.inputs(make_case(), 2)) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0][0], one[1][0])


def test_sets_exceed_the_cache():
    case = make_case(shape=(1024, 1024))  # 4 MiB
    assert [run.rotating_sets(case, mib << 20) for mib in (1, 8, 32, 1024)] == [2, 4, 16, 16]


def test_gpu_shapes_are_not_for_cpus():
    for suite in shapes.SUITES:
        on_cpu, on_gpu = (shapes.shapes([suite], device) for device in ("cpu", "cuda"))
        assert set(on_cpu) < set(on_gpu) or set(on_cpu) == set(on_gpu)
        assert on_cpu


def test_summary_is_median_and_quartiles():
    times = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert run.summarize(times) == {"median_ms": statistics.median(times), "quartiles_ms": [2.0, 4.0], "calls": 5}
