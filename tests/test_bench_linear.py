"""`python -m bench linear` and `train --linear`: they measure what they say, and show who is wrong or absent."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

# bench/ is run from the checkout, not installed. Appended: what is installed still comes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import xent_ext
from bench import linear, linear_case, linear_peers, linear_report, run, tasks, train, workers
from bench.__main__ import main
from bench.linear_case import Truth, check, layer_of, step
from bench.linear_peers import OURS, PEERS, VARIANTS, LayerCase, LayerPeer, eager
from bench.shapes import Shape
from xent_ext import cpu

CPU = torch.device("cpu")
SHAPE = (40, 16, 70)
needs_chunked = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="PyTorch before 2.13 has none")


@pytest.fixture
def quick(monkeypatch):
    """Threads in place of processes, and no product to measure."""
    for module in (run, workers):
        monkeypatch.setattr(module, "fresh_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(linear, "product_rate", lambda device, dtype: 1e12)
    monkeypatch.setattr(linear_case, "_timed", {})


def make_case(variant="mean", shape=SHAPE, dtype="float32", device="cpu"):
    return LayerCase("tiny", shape, dtype, variant, device)


def add_peer(monkeypatch, name, function, **options):
    def load():
        """A test."""
        return function

    monkeypatch.setitem(PEERS, name, LayerPeer(load=load, **options))


def compare(names, shapes=(SHAPE,)):
    return linear.compare([Shape("tiny", shape) for shape in shapes], ["float32"], names, CPU, 0.01)


def start(tmp_path, *options):
    return main(["linear", "--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path), *options])


@pytest.mark.usefixtures("quick")
def test_linear_writes_what_it_prints(tmp_path, capsys):
    options = ["--shapes", "40x16x70", "24x8x50", "--dtype", "float32", "bfloat16"]
    status = start(tmp_path, *options, "--peers", "torch_eager", "with_our_loss", "quack")
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "linear.json").read_text())

    assert status == 0
    assert [row["pass"] for row in result["rows"]] == [*VARIANTS, "mean"] * 2  # the variants are of the first shape
    for row in result["rows"]:
        rows, features, classes = row["shape"]
        gradients = (rows + classes) * features * getattr(torch, row["dtype"]).itemsize
        assert row["floor_bytes"] == (0 if row["pass"] == "no gradient" else gradients)
        timed = {name: peer for name, peer in row["peers"].items() if name != "quack"}
        for peer in timed.values():
            low, high = peer["quartiles_ms"]
            assert peer["status"] == "right"
            assert peer["calls"] >= run.ROUNDS
            assert 0 < low <= peer["median_ms"] <= high
            assert peer["peak_bytes"] > row["floor_bytes"]
            assert peer["of_first"] == peer["median_ms"] / timed["torch_eager"]["median_ms"]
            assert peer["of_best"] == peer["median_ms"] / timed[row["best_baseline"]]["median_ms"]
            assert set(peer["errors"]) == ({"loss"} if row["pass"] == "no gradient" else {"loss", "input", "weight"})
        assert row["peers"]["quack"] == {"status": "absent", "reason": "runs on cuda, not on cpu"}
        assert row["best_baseline"] in ("torch_eager", "with_our_loss")
        assert f"{timed[OURS]['of_best']:.2f} of {row['best_baseline']}'s time" in printed
    assert "ABSENT: quack at 10 cases: runs on cuda, not on cpu" in printed
    assert result["method"] == linear.__doc__
    assert {"clocks_before", "clocks_after", "load_before", "machine", "device"} <= result.keys()
    assert (tmp_path / "linear.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 1


@pytest.mark.parametrize("dtype", linear.DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rounding_in_its_dtype_is_not_an_error(variant, dtype):
    found = check(make_case(variant, (520, 16, 70), dtype), [OURS, "torch_eager", "with_our_loss"])
    assert [peer["status"] for peer in found.values()] == ["right"] * 3


@needs_chunked
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_are_right(variant):
    names = ["torch_chunked", "torch_chunked_512"]
    found = check(make_case(variant, (520, 16, 70)), names)
    assert [found[name]["status"] for name in names] == ["right", "right"]


def scaled(input, factor):
    """As it is, with another gradient."""
    return input.detach() + factor * (input - input.detach())


WRONG = {
    "loss": ("mean", lambda input, weight, target, reduction: eager(input, weight, target, reduction) + 1e-3),
    "gradient of the input": ("mean", lambda input, *rest: eager(scaled(input, 1.001), *rest)),
    "gradient of the weight": ("mean", lambda input, weight, *rest: eager(input, scaled(weight, 1.001), *rest)),
    "NaN": ("mean", lambda *arguments: eager(*arguments) * float("nan")),
    "the upstream gradient of a row": (
        "none",
        lambda *arguments: scaled(eager(*arguments), torch.linspace(1, 1.1, 40)),
    ),
    "ignored rows that count": (
        "half ignored",
        lambda input, weight, target, reduction: eager(input, weight, target.clamp(min=0), reduction),
    ),
    "without a gradient": ("no gradient", lambda *arguments: eager(*arguments) * 1.001),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_is_noticed(what, monkeypatch):
    variant, function = WRONG[what]
    add_peer(monkeypatch, "broken", function)
    found = check(make_case(variant), ["broken", "torch_eager"])
    assert [peer["status"] for peer in found.values()] == ["wrong", "right"]


@pytest.mark.usefixtures("quick")
def test_wrong_peer_is_shown_and_not_timed(monkeypatch):
    add_peer(monkeypatch, "broken", WRONG["loss"][1])
    result = compare(["broken", OURS])
    for row in result["rows"]:
        assert row["peers"]["broken"]["status"] == "wrong"
        assert "median_ms" not in row["peers"]["broken"]
        assert row["best_baseline"] is None
    text = linear_report.text(result)
    assert text.count("WRONG: broken at 40 x 16 x 70 float32") == len(VARIANTS)
    linear_report.figure(result)


@pytest.mark.usefixtures("quick")
def test_our_own_error_is_the_exit_status(monkeypatch, tmp_path, capsys):
    add_peer(monkeypatch, OURS, WRONG["loss"][1])
    assert start(tmp_path, "--shapes", "40x16x70", "--peers", "torch_eager") == 1
    assert "40 x 16 x 70 float32 mean: xent_ext is WRONG" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_our_own_absence_is_the_exit_status(monkeypatch, tmp_path, capsys):
    def broken(*arguments):
        raise RuntimeError("broken")

    add_peer(monkeypatch, OURS, broken)
    assert start(tmp_path, "--shapes", "40x16x70", "--peers", "torch_eager") == 1
    assert "ABSENT: xent_ext at 4 cases: RuntimeError: broken" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_failed_case_leaves_the_others(monkeypatch):
    take_turns = linear.take_turns

    def fail_at_half(case, *rest):
        if case.variant == "half ignored":
            raise MemoryError("too much")
        return take_turns(case, *rest)

    monkeypatch.setattr(linear, "take_turns", fail_at_half)
    result = compare([OURS, "torch_eager"])
    found = {row["pass"]: row["peers"][OURS] for row in result["rows"]}
    assert found.pop("half ignored") == {"status": "absent", "reason": "MemoryError: too much"}
    assert all(peer["status"] == "right" for peer in found.values())
    linear_report.figure(result)


@pytest.mark.usefixtures("quick")
def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr(linear.machine, "free_memory", lambda device: 2000)
    result = compare([OURS], [(2048, 1024, 32000), SHAPE])
    assert not result["rows"]
    assert "needs about 2.9 GiB, 0.0 are free" in result["left_out"][0]["reason"]
    assert linear_report.text(result).count("Left out: tiny") == len(VARIANTS) + 1
    linear_report.figure(result)


@pytest.mark.usefixtures("quick")
def test_what_takes_too_long_is_said(monkeypatch):
    monkeypatch.setattr(linear, "product_rate", lambda device, dtype: 4e3)
    result = compare([OURS])
    assert [row["pass"] for row in result["rows"]] == []
    reason = "the products of one call would take about 67.2 seconds, the limit is 20.0"
    assert linear_report.text(result).count(reason) == 3  # a third of them without a gradient


def test_product_rate_is_measured():
    assert linear_case.product_rate("cpu", "float32") > 0


@pytest.mark.usefixtures("quick")
def test_first_call_of_a_turn_is_not_counted_where_there_are_more(monkeypatch):
    timed = linear_case.prepare(make_case(), OURS) or linear_case._timed[OURS]
    for made, counted in (([3.0], [3.0]), ([3.0, 1.0, 2.0], [1.0, 2.0])):
        monkeypatch.setattr(timed, "calls", lambda seconds, made=made: made)
        assert linear_case.block(OURS, 0.0) == counted


def test_processes_are_real():
    row = linear.measure(make_case(), [OURS], 0.01)
    assert row["peers"][OURS]["status"] == "right"
    assert not linear_case._timed  # nothing was prepared in this process


def test_same_inputs_for_all():
    one = layer_of(make_case("half ignored"))
    layer_of.cache_clear()
    two = layer_of(make_case("half ignored"))
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
    assert (one.target == -100).sum() == 20


def test_truth_is_that_of_all_rows(monkeypatch):
    monkeypatch.setattr(Truth, "ROWS", 7)
    for variant in VARIANTS:
        case = make_case(variant)
        errors = Truth(case).errors(*step(case.todo, eager, layer_of(case)))
        assert all(error < 1e-6 for error in errors.values())


def test_chunks_hold_less_than_all_logits():
    """What is measured is what `explain_linear` says, but for a block's buffer and some numbers a row."""
    case = make_case(shape=(600, 64, 8000))
    layer = layer_of(case)
    said = xent_ext.explain_linear(*layer[:3]).traffic
    found = check(case, [OURS, "torch_eager"])
    logits = 600 * 8000 * 4
    assert found["torch_eager"]["peak_bytes"] > 3 * logits
    assert said.numbers["rows"] < 600
    assert 0 <= found[OURS]["peak_bytes"] - said.memory < cpu.BLOCK_BYTES + (256 << 10)


def test_memory_that_was_kept_is_counted():
    """Each holds what it holds alone: our other loss, too, though its gradient has the size of the layer's."""
    case = make_case(shape=(640, 640, 4000))
    alone = check(case, ["with_our_loss"])["with_our_loss"]["peak_bytes"]
    after = check(case, [OURS, "with_our_loss"])["with_our_loss"]["peak_bytes"]
    assert alone == after > 2 * 640 * 4000 * 4  # the logits and their gradient


# The adapters


@pytest.mark.parametrize("name", PEERS)
def test_adapters_say_what_they_are(name):
    assert len(linear_peers.about(name).split()) > 8


def test_refusals_have_reasons():
    refusals = {
        "runs on cuda, not on cpu": ("liger", make_case()),
        "is for bfloat16, not for float32": ("cut_cross_entropy", make_case(device="cuda")),
        "has no reduction 'none'": ("quack", make_case("none", dtype="bfloat16", device="cuda")),
        "would take all of 512 rows in one chunk": ("torch_chunked_512", make_case(shape=(512, 16, 70))),
    }
    for reason, (name, case) in refusals.items():
        assert PEERS[name].refusal(case) == reason
    assert all(PEERS[name].refusal(make_case()) is None for name in (OURS, "torch_eager", "torch_chunked"))


# As their packages declare them.
def liger(input, weight, target, bias=None, ce_weight=None, ignore_index=-100, *, reduction="mean"):
    return eager(input, weight, target, reduction)


def cut_cross_entropy(e, c, targets, bias=None, ignore_index=-100, softcap=None, reduction="mean"):
    return eager(e, c, targets, reduction)


def quack(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True):
    return eager(x, weight, target, reduction)


PACKAGES = {
    "liger": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", liger),
    "cut_cross_entropy": ("cut_cross_entropy", "linear_cross_entropy", cut_cross_entropy),
    "quack": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", quack),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_adapters_pass_arguments_on(name, monkeypatch):
    path, attribute, function = PACKAGES[name]
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:count]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    setattr(sys.modules[path], attribute, function)
    for variant in VARIANTS:
        case = make_case(variant)
        loss, gradients = step(case.todo, PEERS[name].load(), layer_of(case))
        errors = Truth(case).errors(loss, gradients)
        assert all(error < 1e-6 for error in errors.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter was not asked for")
@pytest.mark.parametrize("variant", VARIANTS)
def test_liger_under_the_interpreter(variant):
    pytest.importorskip("liger_kernel")
    case = make_case(variant)
    loss, gradients = step(case.todo, PEERS["liger"].load(), layer_of(case))
    truth = Truth(case)
    errors = truth.errors(loss, gradients)
    assert all(error <= truth.allowed[what] for what, error in errors.items())


@pytest.mark.parametrize("shape", ["40x16", "40x16x70x2", "40x0x70", "axbxc"])
def test_shapes_are_three_numbers(shape, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["linear", "--shapes", shape])
    assert stopped.value.code == 2
    assert "is not three positive numbers" in capsys.readouterr().err


# Training


@pytest.fixture
def small_lm(monkeypatch):
    """The language model on a little text, with fewer words and shorter windows; their logits are made in chunks."""
    text = Path(tasks.__file__).read_text() * 20
    monkeypatch.setattr(tasks, "standard_library", lambda: text)
    monkeypatch.setattr(tasks.LanguageModel, "vocabulary", 8192)
    monkeypatch.setattr(tasks.LanguageModel, "context", 64)


@pytest.mark.usefixtures("small_lm")
def test_last_layer_trains_with_the_loss(tmp_path, capsys):
    assert main(["train", "--linear", "--steps", "6", "--device", "cpu", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "lm-linear.json").read_text())
    assert result["agreement"]["agree"]
    assert result["logits"] == [16 * 64, 8192]
    curves = result["losses"]
    assert list(curves) == ["torch.nn", "xent_ext", "xent_ext, with the layer"]
    assert all(len(curve) == 6 and curve[-1] < curve[0] for curve in curves.values())
    theirs, ours, layer = (side["loss_peak_bytes"] for side in result["summary"].values())
    assert theirs > ours > layer
    # All train the same parameters: the model's, and the last layer's.
    plain = train.make_sides(tasks.LanguageModel(0, CPU), 0, CPU)["torch.nn"].model
    assert result["parameters"] == sum(parameter.numel() for parameter in plain.parameters())
    assert "torch.nn / xent_ext, with the layer" in capsys.readouterr().out


class ScaledGradient(train.LayerThenLoss):
    def forward(self, input, target):
        loss = super().forward(input, target)
        return 2 * loss - loss.detach()


@pytest.mark.usefixtures("small_lm")
@pytest.mark.parametrize("name", ["xent_ext", "xent_ext, with the layer"])
def test_wrong_layer_is_noticed(name, monkeypatch):
    monkeypatch.setitem(train.LAYER_LOSSES, name, lambda linear: ScaledGradient(linear, torch.nn.CrossEntropyLoss()))
    assert not train.compare("lm-linear", 2, 0, CPU)["agreement"]["agree"]


@pytest.mark.usefixtures("small_lm")
def test_plain_and_split_models_train_alike():
    """The last layer apart or not: the same model, the same curve."""
    plain, split = (train.compare(task, 3, 0, CPU)["losses"]["torch.nn"] for task in ("lm", "lm-linear"))
    torch.testing.assert_close(torch.tensor(plain), torch.tensor(split))


def test_nan_of_one_side_is_the_largest_difference():
    one = torch.ones(3)
    for others in ([one * float("nan"), one], [one, one * float("nan")]):
        assert train.largest_difference([one, *others]) != train.largest_difference([one, *others])
