"""`python -m bench parallel`: ranks that share the classes measure what they say, and what is wrong is noticed."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from test_bench_commands import run_python
from test_wrappers import distributed

# bench/ is run from the checkout, not installed. Appended: what is installed still comes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from xent_ext import backends, cpu

pytestmark = distributed

if torch.distributed.is_available():
    from bench import parallel, parallel_case, parallel_peers, parallel_report
    from bench.__main__ import main
    from bench.parallel_peers import FIRST, OURS, PEERS, SlicedCase
    from bench.peer import Implementation

ROWS, CLASSES = 16, 60
NEEDS_DTENSOR = [] if backends.RECENT else ["xent_ext_dtensor"]


def make_case(ranks=2, shape=(ROWS, CLASSES), dtype="float32", device="cpu"):
    return SlicedCase(shape, dtype, ranks, device)


@pytest.fixture
def planned_here(monkeypatch):
    """The table is computed in this process, of few sizes, and for its CPU alone: kernels may be interpreted here."""
    monkeypatch.setattr(parallel, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(parallel, "targets", lambda: ["cpu"])
    monkeypatch.setattr(parallel, "PLANNED_RANKS", (2, 20))
    monkeypatch.setattr(parallel, "PLANNED_CLASSES", (CLASSES, 64_000))


@pytest.mark.usefixtures("planned_here")
def test_parallel_writes_what_it_prints(tmp_path, capsys):
    options = ["--shape", f"{ROWS}x{CLASSES}", "--ranks", "2", "7", "--calls", "1", "--device", "cpu"]
    assert main(["parallel", *options, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "parallel.json").read_text())

    assert [case["reason"] for case in result["left_out"]] == [f"{CLASSES} classes are not 7 slices of one size"]
    (row,) = result["rows"]
    peers = {name: peer for name, peer in row["peers"].items() if name not in NEEDS_DTENSOR}
    assert list(row["peers"]) == [OURS, *(name for name in PEERS if name != OURS)]
    assert {name for name, peer in peers.items() if peer["status"] != "right"} == {"slice_alone"}
    slice_bytes = row["floor_bytes"]
    assert slice_bytes == ROWS * CLASSES // 2 * 4
    for peer in peers.values():
        low, high = peer["quartiles_ms"]
        assert 0 < low <= peer["median_ms"] <= high
        assert 0 < peer["cpu"]["least_ms"] <= peer["cpu"]["median_ms"]
        assert peer["calls"] == parallel.ROUNDS
        assert peer["peak_bytes"] >= slice_bytes
        assert peer["intact"]
    sent = {name: [(each["kind"], each["bytes"], each["sent"]) for each in peer["collectives"]]
            for name, peer in peers.items()}  # fmt: skip
    assert sent[OURS] == [("all_gather_into_tensor", 16 * ROWS, 16 * ROWS)]
    assert sent[FIRST] == 3 * [("all_reduce", 4 * ROWS, 4 * ROWS)]
    assert sent["gathered"] == [("all_gather_into_tensor", slice_bytes, slice_bytes)]
    assert sent["slice_alone"] == []
    assert row["agrees"]
    assert row["explained"]["received"] == 16 * ROWS
    assert "as explain says" in printed
    assert f"{peers[FIRST]['cpu']['least_ms'] / peers[OURS]['cpu']['least_ms']:.2f}x as fast as {FIRST}" in printed
    assert result["method"] == parallel.__doc__
    assert {"clocks_before", "clocks_after", "load_before", "machine", "device"} <= result.keys()
    assert (tmp_path / "parallel.png").read_bytes().startswith(b"\x89PNG")

    # Beside what is computed for the same case stands what was measured.
    (computed,) = [each for each in result["planned"] if (each["ranks"], each["shape"][1]) == (2, CLASSES)]
    assert parallel_report.measured(computed, result) == row["peers"][OURS]
    assert computed["plans"]["cpu"]["received"] == row["explained"]["received"]
    assert computed["plans"]["cpu"]["peak_bytes"] == row["explained"]["memory"]


def test_what_is_computed_is_what_follows(planned_here):
    found = parallel.planned(ROWS, "bfloat16")
    assert [(row["ranks"], row["shape"]) for row in found] == [
        (ranks, (ROWS, classes)) for ranks in (2, 20) for classes in (CLASSES, 64_000)
    ]
    for row in found:
        plan, numbers = row["plans"]["cpu"], ROWS * (row["shape"][1] // row["ranks"])
        assert plan["logits_bytes"] == 2 * numbers
        assert plan["sent"] == 16 * ROWS
        assert plan["received"] == (row["ranks"] - 1) * 16 * ROWS
        least = plan["logits_bytes"] + row["ranks"] * 16 * ROWS  # the gradient, and the summaries
        assert least <= plan["peak_bytes"] <= least + cpu.BLOCK_BYTES + 64 * ROWS
        assert math.isclose(plan["bytes_read"], 2 * plan["logits_bytes"], abs_tol=16 * ROWS)


def test_gpus_are_planned_for_without_one():
    pytest.importorskip("triton")
    command = (
        "import json; from bench import parallel; parallel.PLANNED_RANKS = (2, 16); "
        "print(json.dumps(parallel.planned(64, 'bfloat16')))"
    )
    for row in json.loads(run_python("-c", command).stdout):
        ours, gpu = row["plans"]["cpu"], row["plans"]["sm_90"]
        assert [gpu[key] for key in ("sent", "received")] == [ours[key] for key in ("sent", "received")]
        assert gpu["bytes_read"] >= 2 * gpu["logits_bytes"]  # no row stays on the chip until its summary is merged


# --- What is wrong


def scaled(loss, gradient):
    def function(logits, target, mesh):
        found = parallel_peers.ours(logits, target, mesh)
        return found[0] * loss, found[1] * gradient

    return function


def on_one_rank(logits, target, mesh):
    return scaled(1, 1 + 0.01 * mesh.get_rank())(logits, target, mesh)


def overwriting(logits, target, mesh):
    found = parallel_peers.ours(logits, target, mesh)
    logits.detach().zero_()
    return found


def failing(logits, target, mesh):
    raise RuntimeError("not today")


BAD = {
    "loss": scaled(1.01, 1),
    "gradient": scaled(1, 1.01),
    "NaN": scaled(math.nan, 1),
    "one rank": on_one_rank,
    "overwriting": overwriting,
    "failing": failing,
}


def check_bad(case):
    """In a rank of a group: what is found of each."""
    found = {}
    for name, function in BAD.items():
        PEERS[name] = Implementation(load=lambda function=function: function)
        found[name] = parallel_case.check(case, name)
    return found


def test_what_is_wrong_on_any_rank_is_noticed():
    case = make_case()
    with parallel_case.group(case) as everywhere:
        ranks = everywhere(check_bad, case)
    found = {name: parallel.of_all([rank[name] for rank in ranks]) for name in BAD}
    status = {name: peer["status"] for name, peer in found.items()}
    assert status == dict.fromkeys(BAD, "wrong") | {"overwriting": "right", "failing": "absent"}
    assert ranks[0]["one rank"]["status"] == "right"
    assert not found["overwriting"]["intact"]
    assert found["failing"]["reason"] == "RuntimeError: not today"


@pytest.fixture
def result(planned_here):
    """As `compare` makes it, of one case in which nothing was measured."""
    right = {"status": "right", "errors": {}, "allowed": {}, "peak_bytes": 1, "collectives": [], "intact": True}
    row = parallel.described(make_case()) | {
        "upstream": 1.0, "floor_bytes": 1, "explained": {"received": 0}, "agrees": True, "peers": {OURS: right}
    }  # fmt: skip
    return parallel.report.begin("parallel", "cpu") | {
        "rows": [row], "left_out": [], "planned": parallel.planned(ROWS, "float32")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("peer", "said"),
    [
        (
            {"status": "wrong", "errors": {"loss": 1.0}, "allowed": {"loss": 0.5}},
            "WRONG: xent_ext at 16 x 60 float32 2",
        ),
        ({"intact": False}, "CHANGED"),
        ({"status": "absent", "reason": "not today"}, "ABSENT: xent_ext at 16 x 60 float32 2 ranks: not today"),
    ],
    ids=["wrong", "changed", "absent"],
)
def test_what_is_wrong_is_shown(result, peer, said):
    result["rows"][0]["peers"][OURS] |= peer
    assert said in parallel_report.text(result)


def test_other_bytes_than_explain_says_are_shown_and_fail(result, tmp_path, monkeypatch):
    result["rows"][0] |= {"agrees": False, "explained": {"received": 77}}
    assert "DIFFERENT from what explain says, 77" in parallel_report.text(result)
    monkeypatch.setattr(parallel, "compare", lambda *_: result | {"method": ""})
    assert main(["parallel", "--device", "cpu", "--out", str(tmp_path)]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
def test_what_does_not_fit_is_left_out(monkeypatch):
    assert parallel.too_large(make_case()) is None
    assert parallel.too_large(make_case(device="cuda")) == "needs 2 GPUs, PyTorch sees 0"
    monkeypatch.setattr(parallel.machine, "free_memory", lambda device: 1000)
    assert "are free" in parallel.too_large(make_case())


@pytest.mark.parametrize("name", parallel_peers.PEERS if torch.distributed.is_available() else [])
def test_peers_say_what_they_are(name):
    assert len(parallel_peers.about(name).split()) >= 8
