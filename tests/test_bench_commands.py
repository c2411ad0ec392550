"""`python -m bench memory`, `traffic`, `overhead`, `plot` and `compare`; the command line; the adapters of peers."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import xent_ext
from bench import case as case_module
from bench import compare, launched, machine, memory, overhead, peers, run, traffic, traffic_report, workers
from bench.__main__ import COMMANDS, main
from bench.case import check
from bench.peer import Case, Moved, Peer
from xent_ext import backends

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Threads in place of processes, tiny shapes, and no copies of a large tensor."""
    for module in (run, workers):
        monkeypatch.setattr(module, "fresh_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(traffic, "copy_bandwidth", lambda device, cache: 1e9)
    monkeypatch.setattr(traffic, "planned", list)
    monkeypatch.setattr(memory, "SHAPES", {"rows": (64, 1000), "an image": (2, 5, 3, 4)})
    monkeypatch.setattr(traffic, "SHAPES", {"rows": (64, 1000), "an image": (2, 5, 3, 4)})
    monkeypatch.setattr(case_module, "_timed", {})
    case_module.shared_inputs.cache_clear()


# memory


@pytest.mark.usefixtures("quick")
def test_memory_is_what_tensors_take(tmp_path, capsys):
    options = ["--peers", "torch_eager", "flash_attn", "--dtype", "float32", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["memory", *options]) == 0
    result = json.loads((tmp_path / "memory.json").read_text())
    full = result["rows"][0]
    assert (full["what"], full["pass"], full["logits_bytes"]) == ("rows", "full", 256_000)
    # Log-softmax, the gradient of zeros and the gradient; and the loss, a few numbers.
    assert 0 <= full["peers"]["torch_eager"]["peak_bytes"] - 3 * 256_000 <= 64
    assert full["peers"]["flash_attn"] == {"status": "absent", "reason": "runs on cuda, not on cpu"}
    assert {row["pass"] for row in result["rows"]} == {"full", "nograd"}
    assert "(3.00)" in capsys.readouterr().out
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("quick")
def test_memory_without_our_own_fails(monkeypatch, tmp_path):
    def load():
        raise RuntimeError("broken")

    monkeypatch.setitem(peers.PEERS, "xent_ext", Peer(load=load, moved=None))
    assert main(["memory", "--peers", "torch_eager", "--device", "cpu", "--out", str(tmp_path)]) == 1


# traffic


@pytest.mark.usefixtures("quick")
def test_models_agree_with_allocations(tmp_path, capsys):
    options = ["--peers", "torch_eager", "torch_eager_float", "--dtype", "float32", "bfloat16", "--out", str(tmp_path)]
    assert main(["traffic", "--device", "cpu", *options]) == 0
    result = json.loads((tmp_path / "traffic.json").read_text())
    assert len(result["rows"]) == 4
    for row in result["rows"]:
        timed = [peer for peer in row["peers"].values() if "reason" not in peer]
        assert len(timed) == (2 if row["dtype"] == "float32" else 3)
        assert all(peer["agrees"] for peer in timed)
        assert row["peers"]["torch_eager"]["bytes_read"] == 3 * row["logits_bytes"]
    assert "DIFFERENT" not in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_wrong_model_is_shown(monkeypatch, tmp_path, capsys):
    optimist = Peer(load=lambda: F.cross_entropy, moved=lambda case: Moved(1, 1, case.logits_bytes), images=True)
    monkeypatch.setitem(peers.PEERS, "optimist", optimist)
    monkeypatch.setitem(peers.ABOUT, "optimist", "a test")
    result = traffic.compare(["float32"], ["optimist"], CPU)
    assert not result["rows"][0]["peers"]["optimist"]["agrees"]
    assert "DIFFERENT" in traffic_report.text(result)
    monkeypatch.setattr(traffic, "with_ours", lambda names: ["optimist"])
    assert main(["traffic", "--device", "cpu", "--out", str(tmp_path)]) == 1


def test_plans_name_every_schedule_of_every_target():
    pytest.importorskip("triton")
    command = "import json; from bench import traffic; print(json.dumps(traffic.planned()))"
    rows = json.loads(run_python("-c", command).stdout)
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {"resident", "streaming", "split"} <= {row["schedule"] for row in rows}
    assert all(row["bytes_read"] >= row["logits_bytes"] <= row["peak_bytes"] for row in rows)


# overhead


@pytest.mark.usefixtures("quick")
def test_overhead_times_calls_and_stubbed_launches(tmp_path):
    pytest.importorskip("triton")
    options = ["--peers", "torch_eager", "--seconds", "0.05", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["overhead", *options]) == 0
    result = json.loads((tmp_path / "overhead.json").read_text())
    assert [(row["pass"], row["upstream"]) for row in result["rows"]] == [
        ("nograd", 1.0), ("fwd", 1.0), ("full", 1.0), ("full", 0.5)
    ]  # fmt: skip
    # The launcher of older Tritons is compiled against CUDA.
    launcher = "unchecked" if backends.release(importlib.metadata.version("triton")) >= (3, 9) else "absent"
    for row in result["rows"]:
        assert {name: peer["status"] for name, peer in row["peers"].items()} == {
            "xent_ext": "right", "torch_eager": "right", overhead.STUBBED: "unchecked", overhead.LAUNCHER: launcher
        }  # fmt: skip
        assert all(peer["median_ms"] > 0 for peer in row["peers"].values() if peer["status"] != "absent")
        assert row["peers"][overhead.STUBBED]["over_eager"] > 0
    assert overhead.text(result).count("x torch_eager") == (1 + (launcher == "unchecked")) * len(result["rows"])


def test_stubbed_launches_take_the_triton_path(monkeypatch):
    implementation = pytest.importorskip("xent_ext.kernels.implementation", exc_type=ImportError)
    calls = []
    forward = implementation.Setup.forward
    monkeypatch.setattr(implementation.Setup, "forward", lambda *args: calls.append(args) or forward(*args))
    logits, target = torch.randn(4, 10, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    with launched.by_nobody():
        loss = xent_ext.cross_entropy(logits, target)
        loss.backward()
    assert len(calls) == 1
    assert logits.grad.shape == logits.shape  # whatever the memory held
    xent_ext.cross_entropy(logits, target)
    assert len(calls) == 1


# plot


@pytest.mark.usefixtures("quick")
def test_plot_draws_again_what_a_folder_holds(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 1
    assert "holds no results" in capsys.readouterr().err
    main(["memory", "--peers", "torch_eager", "--device", "cpu", "--out", str(tmp_path)])
    main(["overhead", "--peers", "torch_eager", "--seconds", "0.01", "--device", "cpu", "--out", str(tmp_path)])
    (tmp_path / "other.json").write_text("[1, 2]")
    for name in ("memory.png", "overhead.png", "report.html"):
        (tmp_path / name).unlink()
    assert main(["plot", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page
    assert (tmp_path / "overhead.png").exists()


# compare


@pytest.fixture
def results(tmp_path):
    """Writes a result with one row; returns its path."""

    def write(name, median=1.0, peak=100, status="right", **row):
        peer = {"status": status} | ({} if median is None else {"median_ms": median, "peak_bytes": peak})
        row = {"what": "x", "shape": [3, 4], "dtype": "float32", "pass": "full", "upstream": 1.0} | row
        result = {"machine": machine.describe(), "load_before": 0.5, "rows": [row | {"peers": {"xent_ext": peer}}]}
        path = tmp_path / name
        path.write_text(json.dumps(result))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("second", "ratio", "status"),
    [
        ({}, 1.1, 0),
        ({"median": 1.09}, 1.1, 0),
        ({"median": 1.2}, 1.1, 1),
        ({"median": 1.2}, 1.3, 0),
        ({"median": 0.5}, 1.0, 0),
        ({"median": float("nan")}, 1.1, 1),
        ({"peak": 120}, 1.1, 1),
        ({"status": "wrong"}, 1.1, 1),
        ({"status": "absent", "median": None}, 1.1, 1),
        ({"shape": [3, 5]}, 1.1, 1),  # what was measured before is gone
    ],
)
def test_compare_exits_by_the_ratio(second, ratio, status, results, capsys):
    assert main(["compare", results("a.json"), results("b.json", **second), "--ratio", str(ratio)]) == status
    assert ("WORSE" in capsys.readouterr().out) == bool(status)


def test_compare_with_nothing_in_common(results, tmp_path, capsys):
    one = results("a.json")
    assert main(["compare", one, one, "--peers", "torch_eager"]) == 2
    (tmp_path / "list.json").write_text("[]")
    assert main(["compare", one, str(tmp_path / "list.json")]) == 2
    assert "no result of" in capsys.readouterr().err


@pytest.mark.parametrize("ratio", ["0.9", "nan", "much"])
def test_compare_refuses_a_ratio_below_one(ratio, results, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", results("a.json"), results("b.json"), "--ratio", ratio])
    assert stopped.value.code == 2
    assert "--ratio" in capsys.readouterr().err


def test_compare_shows_the_worst_first():
    pairs = [(('"x"', "[1]", '"f"', '"full"', "1.0", "p", "median_ms"), 1.0, after) for after in (1.0, 3.0, 2.0)]
    lines = compare.changes(pairs, 1.1).splitlines()[2:]
    assert [line.split()[9] for line in lines] == ["3.00x", "2.00x", "1.00x"]


# the command line


def run_python(*arguments):
    """Python in a process of its own, without the interpreter that the tests ask of Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"python -m bench {command}" in capsys.readouterr().out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(what in printed for what in COMMANDS.values())


def test_without_a_command_comes_the_summary(monkeypatch):
    seen = []
    monkeypatch.setattr(run, "run", lambda args: seen.append(args.suite) or 0)
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert main() == 0
    assert seen == [["summary"]]


def test_missing_extra_is_said():
    """Only commands that need more than PyTorch ask for it, by name."""
    program = """
import sys

for name in ("tqdm", "matplotlib", "numpy", "sklearn"):
    sys.modules[name] = None
from bench.__main__ import main

sys.exit(0 if main(["run"]) == 1 else 1)
"""
    assert 'needs tqdm: pip install -e ".[bench]"' in run_python("-c", program).stderr


# peers


def make_case(**changes):
    return Case(**({"suite": "x", "what": "x", "shape": (5, 33), "dtype": "float32", "mode": "full", "device": "cpu"}
                   | changes))  # fmt: skip


@pytest.mark.parametrize("name", peers.PEERS)
def test_adapters_say_what_they_are(name):
    assert "ncludes" in peers.ABOUT[name]
    assert "Moves" in peers.ABOUT[name]
    moved = peers.PEERS[name].moved(make_case(dtype="bfloat16"))
    assert moved.read >= make_case(dtype="bfloat16").logits_bytes
    assert moved.written >= make_case(dtype="bfloat16").logits_bytes


# torch_compile_float stands for torch_compile: compiling takes long.
@pytest.mark.parametrize("name", ["xent_ext", "torch_eager", "torch_eager_float", "torch_compile_float"])
def test_adapters_for_cpus_are_right(name):
    if "compile" in name and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    case = make_case(dtype=peers.PEERS[name].dtypes[0])
    assert check(case, [name])[name]["status"] == "right"


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter was not asked for")
def test_liger_under_the_interpreter(upstream):
    pytest.importorskip("liger_kernel")
    case = make_case()
    logits, target = next(case_module.inputs(case, 1))
    truth = case_module.Truth(logits, target)
    fresh = case_module.own("liger", logits)
    loss, gradient, _ = case_module.step("full", peers.PEERS["liger"].load(), fresh, target, upstream)
    errors = truth.errors(loss, gradient, upstream)
    assert all(error <= truth.allowed[what] for what, error in errors.items())
    assert not torch.equal(fresh, logits)  # which is why the adapter asks for fresh ones


def test_refusals_have_reasons():
    refusals = {
        "runs on cuda, not on cpu": ("flash_attn", {}),
        "is for float32, bfloat16, not for float16": ("transformer_engine", {"device": "cuda", "dtype": "float16"}),
        "takes (N, C) only": ("quack", {"device": "cuda", "shape": (2, 3, 4)}),
    }
    for reason, (name, changes) in refusals.items():
        assert peers.PEERS[name].refusal(make_case(**changes)) == reason
    assert all(peers.PEERS[name].refusal(make_case()) is None for name in ("xent_ext", "torch_eager"))
