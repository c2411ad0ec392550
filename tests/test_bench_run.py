"""`python -m bench run`: it measures what it says, shows who is wrong or absent, and survives a case that fails."""

import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

# bench/ is run from the checkout, not installed. Appended: what is installed still comes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import case as case_module
from bench import peers, report, run, run_report, shapes, workers
from bench.__main__ import main
from bench.case import PASSES, Truth
from bench.peer import Case, Peer, copies

SMALL = shapes.SUITES | {"few-rows": (shapes.Shape("tiny", (3, 10)), shapes.Shape("tiny image", (2, 5, 3, 4)))}
CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Threads in place of processes, tiny shapes, and no copies of a large tensor."""
    for module in (run, workers):
        monkeypatch.setattr(module, "fresh_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(run, "copy_bandwidth", lambda device, cache: 1e9)
    monkeypatch.setattr(shapes, "SUITES", SMALL)
    monkeypatch.setattr(case_module, "_timed", {})


def add_peer(monkeypatch, name, load, **options):
    moved = lambda case: copies(case, 1, 1, 1)  # noqa: E731
    monkeypatch.setitem(peers.PEERS, name, Peer(load=load, moved=moved, images=True, **options))
    monkeypatch.setitem(peers.ABOUT, name, "a test")


def compare(names, mode="full", only=None):
    suites = [("few-rows", shape) for shape in SMALL["few-rows"][:only]]
    return run.compare(suites, ["float32"], [mode], names, CPU, 0.01)


def make_case(mode="full", dtype="float32", shape=(4, 7)):
    return Case("few-rows", "tiny", shape, dtype, mode, "cpu")


def start(tmp_path, *options):
    return main(
        ["run", "--suite", "few-rows", "--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path), *options]
    )


@pytest.mark.usefixtures("quick")
def test_run_writes_what_it_prints(tmp_path, capsys):
    options = ["--pass", "full", "fwd", "bwd", "nograd", "--dtype", "float32", "bfloat16", "--peers", "torch_eager"]
    status = start(tmp_path, *options)
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "run.json").read_text())

    assert status == 0
    assert len(result["rows"]) == 2 * 2 * (2 + 1 + 2 + 1)  # shapes, dtypes, upstream gradients of each pass
    for row in result["rows"]:
        ours, theirs = row["peers"]["xent_ext"], row["peers"]["torch_eager"]
        assert row["best_baseline"] == "torch_eager"
        assert row["ratio"] == theirs["median_ms"] / ours["median_ms"]
        assert f"{row['ratio']:.2f}x" in printed
        least = PASSES[row["pass"]].reads_and_writes
        assert row["bytes"] == (least and least * ours_bytes(row))
        for peer in (ours, theirs):
            low, high = peer["quartiles_ms"]
            assert peer["status"] == "right"
            assert peer["calls"] >= run.ROUNDS
            assert 0 < low <= peer["median_ms"] <= high
            assert peer["peak_bytes"] > 0
            if row["bytes"]:
                assert peer["bytes_per_second"] == pytest.approx(row["bytes"] / (peer["median_ms"] / 1e3))
                assert peer["share_of_copy"] == pytest.approx(row["roofline_ms"] / peer["median_ms"])
    for mode in ("full", "bwd"):
        assert {row["upstream"] for row in result["rows"] if row["pass"] == mode} == {1.0, 0.5}
    assert result["method"] == run.__doc__
    assert {"clocks_before", "clocks_after", "load_before", "machine", "device", "cache_bytes"} <= result.keys()
    assert "bwd bfloat16: xent_ext beside the BEST right baseline of each of 4 cases" in printed
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
def test_wrong_peer_is_shown_and_not_timed(what, monkeypatch):
    add_peer(monkeypatch, "broken", lambda: WRONG[what])
    result = compare(["xent_ext", "broken"], only=1)
    for row in result["rows"]:
        assert row["peers"]["broken"]["status"] == "wrong"
        assert "median_ms" not in row["peers"]["broken"]
        assert row["ratio"] is None
    text = run_report.text(result)
    assert text.count("WRONG: broken at 3 x 10 float32 full") == 1
    run_report.figure(result)  # with nothing to show


@pytest.mark.usefixtures("quick")
def test_our_own_error_is_the_exit_status(monkeypatch, tmp_path):
    add_peer(monkeypatch, "xent_ext", lambda: WRONG["loss"])
    assert start(tmp_path, "--peers", "torch_eager") == 1


@pytest.mark.usefixtures("quick")
def test_absent_peer_has_its_reason(monkeypatch, capsys):
    def load():
        raise ModuleNotFoundError("No module named 'elsewhere'")

    add_peer(monkeypatch, "elsewhere", load)
    result = compare(["xent_ext", "torch_eager", "elsewhere"], only=1)
    assert all(row["ratio"] is not None for row in result["rows"])
    reason = "ABSENT: elsewhere at 3 x 10 float32 full: ModuleNotFoundError: No module named 'elsewhere'"
    assert run_report.text(result).count(reason) == 1  # once, not for each upstream gradient


@pytest.mark.usefixtures("quick")
def test_peer_that_does_not_take_a_case_is_absent(monkeypatch):
    add_peer(monkeypatch, "for GPUs", lambda: F.cross_entropy, devices=("cuda",))
    add_peer(monkeypatch, "for halves", lambda: F.cross_entropy, dtypes=("float16",))
    text = run_report.text(compare(["xent_ext", "for GPUs", "for halves"]))
    assert "ABSENT: for GPUs at 2 cases: runs on cuda, not on cpu" in text
    assert "ABSENT: for halves at 2 cases: is for float16, not for float32" in text


class WritesOverLogits(torch.autograd.Function):
    """As some implementations do behind autograd's back: the gradient takes the logits' memory."""

    @staticmethod
    def forward(ctx, logits, target):
        with torch.enable_grad():
            own = logits.detach().clone().requires_grad_()
            loss = F.cross_entropy(own, target)
        (gradient,) = torch.autograd.grad(loss, own)
        ctx.gradient = logits.detach().copy_(gradient)
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.gradient.mul_(upstream), None


@pytest.mark.usefixtures("quick")
def test_logits_are_fresh_for_a_peer_that_writes_over_them(monkeypatch):
    seen = []

    def spy(logits, target):
        seen.append(logits.detach().clone())
        return WritesOverLogits.apply(logits, target)

    add_peer(monkeypatch, "spy", lambda: spy, writes_logits=True)
    case = make_case()
    assert case_module.check(case, ["spy", "xent_ext"]).keys() == {"spy", "xent_ext"}
    assert {peer["status"] for peer in case_module.check(case, ["spy", "xent_ext"]).values()} == {"right"}
    seen.clear()
    timed = case_module.Timed(case, "spy", spy, 2)
    for _ in range(4):
        timed.calls(1.0, 0)
    first, second = (logits for logits, _ in case_module.inputs(case, 2))
    assert all(torch.equal(a, b) for a, b in zip(seen, [first, second, first, second], strict=True))


@pytest.mark.usefixtures("quick")
def test_writing_over_the_logits_unsaid_is_wrong(monkeypatch):
    add_peer(monkeypatch, "unsaid", lambda: WritesOverLogits.apply)
    assert case_module.check(make_case(), ["unsaid"])["unsaid"]["status"] == "wrong"


@pytest.mark.usefixtures("quick")
def test_failed_case_leaves_the_others(monkeypatch):
    take_turns = run.take_turns

    def fail_on_images(case, *rest):
        if len(case.shape) > 2:
            raise MemoryError("too much")
        return take_turns(case, *rest)

    monkeypatch.setattr(run, "take_turns", fail_on_images)
    result = compare(["xent_ext", "torch_eager"], "fwd")
    good, failed = result["rows"]
    assert good["ratio"] is not None
    assert failed["peers"]["xent_ext"] == {"status": "absent", "reason": "MemoryError: too much"}


@pytest.mark.usefixtures("quick")
def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr(run.machine, "free_memory", lambda device: 2000)
    result = compare(["xent_ext"])
    assert not result["rows"]
    assert run_report.text(result).count("Left out: tiny") == 2
    assert "needs about 0.0 GiB" in result["left_out"][0]["reason"]
    run_report.figure(result)


@pytest.mark.usefixtures("quick")
def test_what_takes_too_long_is_said(monkeypatch):
    monkeypatch.setattr(run, "copy_bandwidth", lambda device, cache: 10.0)
    result = compare(["xent_ext"])
    assert not result["rows"]
    assert "one call would take about 144.0 seconds" in run_report.text(result)


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
        seen.append(logits.data_ptr())
        return F.cross_entropy(logits, target)

    add_peer(monkeypatch, "spy", lambda: spy)
    timed = case_module.Timed(make_case(), "spy", spy, 3)
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


@pytest.mark.parametrize(("mode", "halves"), [("full", 2), ("fwd", 1), ("bwd", 2), ("nograd", 1)])
def test_passes_do_what_they_say(mode, halves):
    logits, target = next(case_module.inputs(make_case(mode), 1))
    loss, gradient, marks = case_module.step(mode, F.cross_entropy, logits, target, 0.5)
    assert len(marks) == 3
    assert loss.requires_grad == (mode != "nograd")
    assert (gradient is not None) == (halves == 2)
    assert PASSES[mode].last == halves


def test_all_suites_are_all_but_the_summary():
    everything = shapes.chosen(["all"])
    assert {suite for suite, _ in everything} == set(shapes.SUITES) - {"summary"}
    assert len(shapes.chosen(["all", "llm"])) == len(everything)
    assert any(shape.size[1] == 262144 for _, shape in everything)


@pytest.mark.usefixtures("quick")
def test_page_needs_no_network(tmp_path):
    result = run.compare([], ["float32"], ["full"], ["xent_ext"], CPU, 0.01)
    result["left_out"] = [{"what": "<script>", "shape": [1, 2], "dtype": "f", "pass": "fwd", "reason": "none"}]
    *_, page = report.write(result, tmp_path)
    text = Path(page).read_text()
    assert text.count("data:image/png;base64,") == 1
    assert "http" not in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "How it is measured" in text


def test_summary_is_median_and_quartiles():
    times = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert run.summarize(times) == {"median_ms": statistics.median(times), "quartiles_ms": [2.0, 4.0], "calls": 5}


@pytest.mark.parametrize(("quartiles", "said"), [([0.9, 1.1], False), ([0.9, 1.2], True)])
def test_noise_is_said(quartiles, said):
    rows = [{"peers": {"a": {"median_ms": 1.0, "quartiles_ms": quartiles}, "b": {"status": "absent"}}}]
    assert ("1 of 1 medians" in run_report.noise(rows)) == said


def test_absent_peers_need_no_memory():
    needed = [run.memory_needed(make_case(), names, 1 << 20) for names in (["xent_ext"], ["xent_ext", "quack"])]
    assert needed[0] == needed[1]
