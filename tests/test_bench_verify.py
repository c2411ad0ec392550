"""`python -m bench verify`: it runs whole, finds what is wrong, and loses nothing when a case fails or its process."""

import contextlib
import dataclasses
import json
import os
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import needs_gpu

from bench import case as case_module
from bench import (
    model,
    overhead,
    peers,
    report,
    run,
    shapes,
    verify,
    verify_calls,
    verify_checks,
    verify_plans,
    verify_report,
    verify_right,
)
from bench import verify_cases as cases
from bench import verify_worker as worker
from bench.__main__ import main
from bench.guard import Guard
from bench.peer import Case, Peer
from bench.verify_errors import Found
from xent_ext import cpu

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="plans are timed in Triton's interpreter"
)
CPU = torch.device("cpu")


def chosen(monkeypatch, *names):
    """Only these cases, wherever they are examined."""
    monkeypatch.setattr(verify, "names", lambda where, quick: [n for n in names if where in cases.CASES[n].where])


def last(printed):
    return printed.strip().splitlines()[-1]


# The command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_what_can_be_done_is(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    chosen(monkeypatch, "one row of 10 classes", "weight", "a CUDA graph, rows of 1000 classes")
    out = tmp_path / "found"
    assert main(["verify", "--quick", "--sanitize", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert last(printed).startswith("RIGHT: 4 of 4 cases are right (xent_ext ")
    for part in ("compute-sanitizer", "fast", "planned", "host"):
        assert f"Not done: {part}: PyTorch sees no GPU" in printed

    result = json.loads((out / "verify.json").read_text())
    assert [(row["where"], row["status"]) for row in result["cases"]] == 2 * [("interpreter", "right")] + 2 * [
        ("cpu", "right")
    ]
    assert result["cases"][0]["plan"] == "triton, resident"
    assert all(0 <= error <= 2 for row in result["cases"] for error in row["ratios"].values())
    assert result["machine"]["torch"] == torch.__version__
    with zipfile.ZipFile(tmp_path / "found.zip") as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        assert names == {f"found/{name}" for name in ("verify.json", "verify.png", "report.html")}
        assert archive.read("found/verify.json") == (out / "verify.json").read_bytes()


@pytest.fixture
def in_process(cpu_blocks, monkeypatch):
    """Cases that are for CPUs are examined here, where tests can change what they meet."""

    def findings(where, names, until):
        return (verify_right.examine(name, where) for name in names if where == "cpu")

    monkeypatch.setattr(worker, "findings", findings)


SOME = ("rows of 10 classes", "weight")


@pytest.mark.usefixtures("in_process")
def test_a_wrong_result_is_the_exit_status_and_the_last_line(monkeypatch, tmp_path, capsys):
    forward = cpu.Setup.forward

    def broken(setup, tensors, expected):
        loss, *others = forward(setup, tensors, expected)
        return loss * 1.1 if len(tensors) > 2 else loss, *others

    monkeypatch.setattr(cpu.Setup, "forward", broken)
    chosen(monkeypatch, *SOME)
    assert main(["verify", "--out", str(tmp_path / "found")]) == 1
    printed = capsys.readouterr().out
    assert last(printed).startswith("WRONG: 1 of 2 cases are right")
    assert "WRONG: weight (cpu): loss: its error is" in printed
    assert json.loads((tmp_path / "found/verify.json").read_text())["cases"][1]["status"] == "wrong"


@pytest.mark.usefixtures("in_process")
def test_a_case_that_raises_is_wrong_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    forward = cpu.Setup.forward

    def raises(setup, tensors, expected):
        if len(tensors) == 2:  # without a weight
            raise ZeroDivisionError("a test")
        return forward(setup, tensors, expected)

    monkeypatch.setattr(cpu.Setup, "forward", raises)
    chosen(monkeypatch, *SOME)
    assert main(["verify", "--out", str(tmp_path / "found")]) == 1
    rows = json.loads((tmp_path / "found/verify.json").read_text())["cases"]
    assert [row["status"] for row in rows] == ["wrong", "right"]
    assert "in raises" in rows[0]["problems"][0]
    assert rows[0]["problems"][0].rstrip().endswith("ZeroDivisionError: a test")


@pytest.mark.usefixtures("in_process")
def test_an_interruption_keeps_what_was_found(monkeypatch, tmp_path, capsys):
    def findings(where, names, until):
        yield verify_right.examine(names[0], "cpu")
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "findings", findings)
    chosen(monkeypatch, *SOME)
    assert main(["verify", "--out", str(tmp_path / "found")]) == 0
    printed = capsys.readouterr().out
    assert last(printed).startswith("RIGHT: 1 of 1 cases are right")
    assert "Not done: interrupted" in printed
    assert (tmp_path / "found.zip").exists()


# The processes


# In the place of what examines the cases.
WORKER = """if True:
    import json, sys, time
    for name in sys.argv[5:]:
        if name == "ends":
            sys.exit("it ends here")
        if name == "hangs":
            time.sleep(60)
        print("a library says something")
        print(json.dumps({"name": name, "status": "right", "problems": []}), flush=True)
        if name == "last":  # whose device is lost: others need another process
            break
"""


@pytest.fixture
def found(monkeypatch):
    """What becomes of cases, by name, that this worker is given."""
    monkeypatch.setattr(worker, "POLL", 0.05)

    def of(*names, seconds=60, patience=60):
        prefix = [sys.executable, "-c", WORKER]  # what it is given after that are its arguments
        each = list(worker.findings("cpu", names, time.monotonic() + seconds, prefix, patience))
        assert sorted(case["name"] for case in each) == sorted(names)
        return {case["name"]: (case["status"], *case["problems"]) for case in each}

    return of


def test_a_process_that_ends_takes_one_case_with_it(found):
    assert found("one", "ends", "two", "last", "three") == {
        **dict.fromkeys(("one", "two", "last", "three"), ("right",)),
        "ends": ("wrong", "its process ended with 1\nit ends here\n"),
    }


def test_a_process_that_hangs_is_ended(found):
    assert found("hangs", "one", patience=3) == {"hangs": ("wrong", "no result after 3 seconds\n"), "one": ("right",)}


def test_what_has_no_time_left_is_left_out(found):
    left_out = "left out", "its time was up"
    assert found("one", "hangs", "two", seconds=3) == {"one": ("right",), "hangs": left_out, "two": left_out}


def test_several_processes_share_the_cases(found, monkeypatch):
    monkeypatch.setattr(worker.os, "cpu_count", lambda: 4)
    names = [f"case {number}" for number in range(5)]
    assert found(*names, "ends") == dict.fromkeys(names, ("right",)) | {
        "ends": ("wrong", "its process ended with 1\nit ends here\n")
    }


@pytest.mark.usefixtures("cpu_blocks")
@pytest.mark.parametrize("name", ["unaligned logits", "in place", "the last layer, mean"])
def test_a_sanitized_case_is_a_call_alone(name):
    case = cases.CASES[name]
    case = dataclasses.replace(case, shape=(8, *case.shape[1:]))
    verify_checks.call_alone(case, CPU, found := Found(case))
    assert not found.problems


@pytest.mark.skipif(os.name != "posix", reason="the sanitizer's stand-in is a shell script")
@pytest.mark.parametrize(("errors", "status"), [(0, "right"), (1, "wrong")])
def test_what_the_sanitizer_finds_is_wrong(errors, status, monkeypatch, tmp_path):
    tool = tmp_path / worker.SANITIZER
    tool.write_text(f'#!/bin/sh\necho "ERROR SUMMARY: {errors} errors" > "{tmp_path}/{worker.SANITIZER}-7.log"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = worker.sanitized([], tmp_path)
    assert found["status"] == status
    assert ("ERROR SUMMARY: 1 errors" in str(found["problems"])) == bool(errors)


def test_the_sanitizer_need_not_be_there(monkeypatch, tmp_path):
    monkeypatch.setattr(worker.shutil, "which", lambda name, path=None: None)
    assert worker.sanitized(["one class"], tmp_path)["status"] == "left out"


# Guard zones


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.uint8], ids=str)
def test_guard_sees_what_is_written_outside(dtype):
    for outside in (-1, 6):
        guard = Guard()
        tensor = guard.empty_strided((2, 3), (3, 1), dtype, CPU)
        tensor.zero_()
        assert guard.harmed() == 0
        tensor.as_strided((1,), (1,), tensor.storage_offset() + outside).zero_()
        assert guard.harmed() == 1


def test_guard_sees_changed_arguments_and_the_gaps_between_their_elements():
    guard = Guard()
    one, other = (guard.copy(torch.randn(4, 5), (6, 1)) for _ in range(2))
    assert guard.changed() == 0
    one[0, 0] += 1
    other.as_strided((1,), (1,), other.storage_offset() + 5).zero_()
    assert guard.changed() == 2
    assert guard.harmed() == 0


def test_guard_is_around_what_is_allocated():
    guard = Guard()
    like = torch.randn(5, 3).t()
    with guard.allocations():
        made = [torch.empty(3, 2), torch.empty_like(like), torch.zeros(4), torch.full((), 2.5), torch.zeros_like(like)]
        assert torch.empty(3, device="meta").is_meta
    assert len(guard.buffers) == 5
    assert made[0].isnan().all()
    assert made[1].stride() == like.stride()
    assert not any(values.any() for values in (made[2], made[4]))
    assert made[3] == 2.5
    assert all(tensor._base is None for tensor in made)
    assert torch.empty(3).untyped_storage().nbytes() == 12


# What a case is examined for


def examined(function, **changes):
    """What is found of a call of this function."""
    case = dataclasses.replace(cases.CASES["weight"], **changes)
    found = Found(case)
    given = verify_calls.inputs(case, CPU)
    results = [verify_calls.ours(case, given, found, function) for _ in range(2)]
    found.same("in a second run", results[0][0], results[1][0])
    for expected in zip(results[0], verify_calls.theirs(case, given), verify_calls.truth(case, given), strict=True):
        found.close(*expected)
    return found.problems


def loss_of(input, target, weight):
    return torch.nn.functional.cross_entropy(input, target, weight)


def scribbles(input, target, weight):
    with torch.no_grad():
        weight.as_strided((1,), (1,), weight.storage_offset() + weight.numel()).zero_()
    return loss_of(input, target, weight)


def overwrites(input, target, weight):
    target[0] = 1
    return loss_of(input, target, weight)


def scribbles_beside_what_it_made(input, target, weight):
    made = torch.empty(7)
    made.as_strided((1,), (1,), made.storage_offset() + 7).zero_()
    return loss_of(input, target, weight)


def one_wrong_gradient(input, target, weight):
    return loss_of(input, target, weight) + 1e-6 * (input[3, 7] - input[3, 7].detach())


def in_another_dtype(input, target, weight):
    return loss_of(input.double(), target, weight.double())


CALLS = iter(range(100))


def differs(input, target, weight):
    return loss_of(input, target, weight) * (1 + 1e-7 * (next(CALLS) % 2))


def nan(input, target, weight):
    return loss_of(input, target, weight) * float("nan")


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (loss_of, None),
        (scribbles, "written outside of 1 tensors"),
        (scribbles_beside_what_it_made, "written outside of 1 tensors"),
        (overwrites, "1 arguments were written to"),
        (one_wrong_gradient, "gradient of input: its error is"),
        (in_another_dtype, "loss: its error is inf"),
        (differs, "loss: other bits in a second run"),
        (nan, "loss: its error is inf"),
    ],
)
def test_each_kind_of_fault_is_found(function, problem):
    found = examined(function)
    assert bool(found) == (problem is not None)
    assert problem is None or any(each.startswith(problem) for each in found), found


def test_cases_have_names_checks_and_layouts():
    assert 60 <= len(cases.CASES) <= 90
    assert {case.check for case in cases.CASES.values()} == verify_right.CHECKS.keys()
    layouts = {case.layout for case in cases.CASES.values()}
    assert layouts == {"contiguous", "no batch", *verify_calls.LAYOUTS}
    assert {case.schedule for case in cases.CASES.values()} == {None, "resident", "streaming", "split"}
    for where in cases.ALL:
        assert 0 < len(cases.names(where, quick=True)) < len(cases.names(where, quick=False))


def test_what_a_gpu_lacks_is_left_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    found = verify_right.examine("a second device", "cuda")
    assert (found["status"], found["problems"]) == ("left out", ["needs 2 devices, there is 1"])
    found = verify_right.examine("rows of 262,144 classes", "cuda")
    assert (found["status"], found["problems"]) == ("left out", ["needs about 4.0 GiB, 1.0 are free"])


def test_a_gpu_of_8_gib_is_enough(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 << 30, 8 << 30))
    for name in cases.names("cuda", quick=False):
        verify_right.fitted(cases.CASES[name], "cuda")


@pytest.mark.usefixtures("cpu_blocks")
def test_what_the_package_warns_of_is_shown(monkeypatch):
    def warns(setup, tensors, expected):
        warnings.warn("xent_ext streams long rows", stacklevel=1)
        return forward(setup, tensors, expected)

    forward = cpu.Setup.forward
    monkeypatch.setattr(cpu.Setup, "forward", warns)
    found = verify_right.examine("weight", "cpu")
    assert found["warnings"] == ["xent_ext streams long rows"]
    assert "WARNING: weight (cpu): xent_ext streams long rows" in verify_report.problems([found])


@interpreted
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("name", ["streaming of 5,003 classes, forced", "classes out of range", "repeated logits"])
def test_kernels_are_examined(name):
    found = verify_right.examine(name, "interpreter")
    assert found["status"] == "right", found["problems"]


@interpreted
@pytest.mark.usefixtures("triton_backend")
def test_what_is_forced_but_not_for_the_shape_is_left_out(monkeypatch):
    case = dataclasses.replace(cases.CASES["resident of 5,003 classes, forced"], shape=(2, 400_000))
    monkeypatch.setitem(cases.CASES, "too long", case)
    found = verify_right.examine("too long", "interpreter")
    assert found["status"] == "left out"
    assert "schedule 'resident' is not for 2 rows" in found["problems"][0]


# What a GPU alone has, by stand-ins


class Replayed:
    """In the place of a CUDA graph: does the work again, and puts what it gives where the first results are."""

    def __init__(self, work):
        self.work, self.results = work, work()

    def replay(self):
        for name, values in self.work().items():
            self.results[name].copy_(values)


def captured(work):
    graph = Replayed(work)
    return graph, graph.results


@pytest.mark.usefixtures("cpu_blocks")
@pytest.mark.parametrize("check", [verify_checks.cuda_graph, verify_checks.two_streams])
def test_checks_of_graphs_and_streams(check, monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(overhead, "captured", captured)
    for name, value in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda device: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    case = cases.CASES["a CUDA graph, rows of 1000 classes"]
    found = Found(case)
    check(case, CPU, found)
    assert not found.problems


def test_replays_are_checked_and_timed(monkeypatch):
    monkeypatch.setattr(overhead, "captured", lambda work: (SimpleNamespace(replay=work), work()))
    monkeypatch.setattr(overhead, "in_fresh_process", lambda function, *args: function(*args))
    case = Case("overhead", "", (4, 10), "float32", "full", "cpu")
    names, row = ["xent_ext", "torch_eager", "liger"], {"pass": "graph", "upstream": 1.0, "shape": (4, 10)}
    found = overhead.in_graphs(names, row, case, 0.01)["peers"]
    assert {name: peer["status"] for name, peer in found.items()} == {
        "xent_ext": "right", "torch_eager": "right", "liger": "absent"
    }  # fmt: skip
    assert all(found[name]["median_ms"] > 0 for name in overhead.CAPTURED)
    monkeypatch.setattr(overhead, "captured", lambda work: 1 / 0)
    found = overhead.in_graphs(names, row, case, 0.01)
    assert found["peers"]["xent_ext"] == {"status": "absent", "reason": "ZeroDivisionError: division by zero"}
    assert found["ratio"] is None


@needs_gpu
@pytest.mark.parametrize("name", [name for name, case in cases.DEVICES.items() if case.devices == 1])
def test_graphs_streams_and_compiled_graphs(name):
    found = verify_right.examine(name, "cuda")
    assert found["status"] == "right", found["problems"]


@needs_gpu
def test_replays_are_right_and_timed(tmp_path):
    result = overhead.compare(["xent_ext", "torch_eager"], torch.device("cuda"), 0.2, modes=("full",), stubs=())
    graph = result["rows"][-1]
    assert graph["pass"] == "graph"
    assert all(peer["status"] == "right" and peer["median_ms"] > 0 for peer in graph["peers"].values())


# What is timed on a GPU, here on a CPU


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """A run on what it takes for a GPU, with threads in place of processes and tiny shapes."""
    monkeypatch.setattr(run, "fresh_process", lambda: ThreadPoolExecutor(1))
    for module in (run, verify):
        monkeypatch.setattr(module, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(overhead, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(run, "copy_bandwidth", lambda device, cache: 1e9)
    monkeypatch.setattr(case_module, "_timed", {})
    monkeypatch.setattr(verify, "FAST", (shapes.Shape("tiny", (3, 10)), shapes.Shape("tiny", (4, 10))))
    monkeypatch.setattr(verify, "PEERS", dict.fromkeys(["torch_eager", "xent_ext", "flash_attn"]))
    monkeypatch.setattr(verify, "SECONDS_OF_A_CASE", 0.01)
    monkeypatch.setattr(verify, "SECONDS_OF_CALLS", 0.01)
    monkeypatch.setattr(verify, "PLANNED", ((8, 1), (8, 2), (8, 3), (8, 4)))
    monkeypatch.setattr(verify_plans, "compare", lambda size, *args: PLANS[size[1]]())
    monkeypatch.setattr(verify_plans, "tuned", lambda *args: TUNED)
    case_module.shared_inputs.cache_clear()
    work = verify.Verification(quick=False, sanitize=False, out=tmp_path)
    work.on_gpu = True
    return work


def plan(schedule, ms):
    numbers = {"ROWS": 1, "BLOCK": 1024, "REST": 16, "num_ctas": 8, "num_warps": 4}
    return {"schedule": schedule, "numbers": numbers, "median_ms": ms}


def fails():
    raise RuntimeError("the GPU is gone")


PLANS = {
    1: lambda: {"plans": [plan("split", 1.0), plan("resident", 1.5)], "refused": [], "chosen": 1, "slower": 0.5},
    2: lambda: {"plans": [plan("split", 1.0)], "refused": [{"reason": "x"}], "chosen": None, "slower": None},
    3: lambda: {"left_out": "needs about 80.0 GiB, 8.0 are free"},
    4: fails,
}
TRIALS = [{"name": "largest_cluster", "value": 1, "kept": True}, {"name": "streamed", "value": 2, "kept": False}]
TUNED = {"device": "a GPU", "tuning": {}, "trials": TRIALS}


def test_what_is_timed_is_written_and_shown(timed, monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "findings", lambda where, names, until: iter(()))
    monkeypatch.setattr(model, "milliseconds", lambda gpu, shape, dtype: 0.5 if shape[0] == 3 else None)
    timed.parts()
    assert not timed.result["undone"]
    shown = verify_report.text(timed.result)
    assert "NOTHING WAS EXAMINED" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("3 x 10 ") and "torch_eager" in line]
    assert " 0.5 (" in line
    assert "Not done: 8 x 3: needs about 80.0 GiB, 8.0 are free" in shown
    assert "Not done: 8 x 4: RuntimeError: the GPU is gone" in shown
    assert "resident 1 x 1024+16, 8 x 4  1.5" in shown
    assert "50.0%" in shown
    assert "could not be used" in shown
    assert "`python -m bench tune` would change: largest_cluster = 1" in shown
    assert json.loads((tmp_path / "tuning.json").read_text())["device"] == "a GPU"
    assert {path.stem for path in report.results(tmp_path)} == {"verify", "run", "overhead"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    for name, status in {"verify": 2, "run": 0}.items():  # which `compare` takes
        assert main(["compare", *2 * [str(tmp_path / f"{name}.json")], "--peers", "torch_eager"]) == status


def test_a_wrong_result_of_what_is_timed_is_wrong(timed, monkeypatch):
    right = Peer(load=lambda: torch.nn.functional.cross_entropy, moved=None)
    twice = Peer(load=lambda: lambda logits, target: 2 * torch.nn.functional.cross_entropy(logits, target), moved=None)
    monkeypatch.setattr(worker, "findings", lambda where, names, until: iter(()))
    monkeypatch.setattr(timed, "planned", lambda: None)
    for peer, status in ((right, "NOTHING WAS EXAMINED"), (twice, "WRONG")):
        monkeypatch.setitem(peers.PEERS, "xent_ext", peer)
        timed.attempt("fast", timed.fast)
        assert verify_report.last_line(timed.result).startswith(status)
    assert "WRONG: xent_ext at 3 x 10 bfloat16 full, relative errors: loss 1.0e+00" in verify_report.text(timed.result)


def test_an_interruption_keeps_what_was_timed(timed, monkeypatch):
    measured = run.measure
    monkeypatch.setattr(
        run, "measure", lambda case, *args: interrupt() if case.shape[0] == 4 else measured(case, *args)
    )
    with pytest.raises(KeyboardInterrupt):
        timed.fast()
    assert {row["shape"] for row in timed.result["fast"]} == {(3, 10)}
    assert "3 x 10" in verify_report.text(timed.result)


def interrupt():
    raise KeyboardInterrupt


def test_nothing_is_timed_when_the_time_is_up(timed, monkeypatch):
    monkeypatch.setattr(worker, "findings", lambda where, names, until: iter(()))
    timed.end = time.monotonic() - 1
    timed.parts()
    assert timed.result["undone"] == [f"{part}: its time was up" for part in ("fast", "host", "planned")]
    suites = [("few-rows", shapes.Shape("tiny", (3, 10)))]
    late = run.compare(suites, ["float32"], ["full"], ["xent_ext"], CPU, 0.01, until=time.monotonic())
    assert [case["reason"] for case in late["left_out"]] == ["its time was up"]
    assert not late["rows"]


@interpreted
@pytest.mark.usefixtures("triton_backend")
def test_every_plan_is_timed(monkeypatch):
    """By a clock for which streamed rows take half the time, as the plan does not think."""
    from bench import candidate

    for cached in (candidate.plan, candidate.refusal, candidate.ready):
        cached.cache_clear()
    monkeypatch.setattr("bench.search.ROUNDS", 2)
    monkeypatch.setattr(verify_plans, "SCHEDULES", ("resident", "streaming"))

    def milliseconds(clock, start, end):
        return 1.0 if candidate.implementation.SCHEDULE == "streaming" else 2.0

    monkeypatch.setattr("bench.machine.Clock.milliseconds", milliseconds)
    row = verify_plans.compare((3, 200), "float32", "cpu", 0.0)
    assert [plan["schedule"] for plan in row["plans"]] == ["streaming", "resident"]
    assert (row["chosen"], row["slower"], row["refused"]) == (1, 1.0, [])
    tuned = verify_plans.tuned([(3, 200)], "float32", "cpu", 0.0)
    assert tuned["device"] == "Triton's interpreter"
    assert verify_plans.changes(tuned) == {}
    monkeypatch.setattr("bench.machine.free_memory", lambda device: 1000)
    assert verify_plans.compare((3, 200), "float32", "cpu", 0.0)["left_out"].startswith("needs about")


def test_modelled_times_are_those_of_the_gpu(monkeypatch, tmp_path):
    entry = {"shape": [8, 10], "dtype": "bfloat16", "what": "forward+backward", "time_us": 1500.0}
    entries = [entry | {"device": "A100"}, entry | {"device": "H100", "time_us": 900.0}]
    monkeypatch.setattr(model, "FILE", tmp_path / "model.json")
    assert model.milliseconds("NVIDIA H100 80GB HBM3", (8, 10), "bfloat16") is None
    model.FILE.write_text(json.dumps({"entries": entries}))
    assert model.milliseconds("NVIDIA H100 80GB HBM3", (8, 10), "bfloat16") == 0.9
    assert model.milliseconds("NVIDIA A100-SXM4-80GB", [8, 10], "bfloat16") == 1.5
    assert model.milliseconds("NVIDIA H100 80GB HBM3", (8, 11), "bfloat16") is None
    assert model.milliseconds("NVIDIA L4", (8, 10), "bfloat16") is None
    assert model.milliseconds(None, (8, 10), "bfloat16") is None


def test_what_is_timed_has_modelled_times():
    for shape in verify.FAST:
        assert model.milliseconds("NVIDIA H100 80GB HBM3", shape.size, verify.DTYPE) > 0
