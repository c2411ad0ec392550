"""`python -m bench`: the training comparison runs, tells the truth, and notices a wrong loss."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

# bench/ is run from the checkout, not installed. Appended: what is installed still comes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import machine, report, tasks, train
from bench.__main__ import main

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On problems this small several threads only wait for one another, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def library():
    return tasks.standard_library()


@pytest.fixture
def small_lm(monkeypatch, library):
    """The language model on the same text, with fewer words and shorter windows."""
    monkeypatch.setattr(tasks, "standard_library", lambda: library[:1_000_000])
    monkeypatch.setattr(tasks.LanguageModel, "vocabulary", 512)
    monkeypatch.setattr(tasks.LanguageModel, "context", 16)


class DoubledGradient(torch.nn.CrossEntropyLoss):
    def forward(self, input, target):
        loss = super().forward(input, target)
        return 2 * loss - loss.detach()


class ShiftedLoss(torch.nn.CrossEntropyLoss):
    def forward(self, input, target):
        return super().forward(input, target) + 1e-3


class NanLoss(torch.nn.CrossEntropyLoss):
    def forward(self, input, target):
        return super().forward(input, target) * float("nan")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.usefixtures("small_lm")
def test_both_losses_train_alike(task, device, tmp_path, capsys):
    status = main(["train", "--task", task, "--steps", "8", "--device", device, "--out", str(tmp_path)])
    result = json.loads((tmp_path / f"{task}.json").read_text())
    printed = capsys.readouterr().out

    assert status == 0
    assert result["agreement"]["agree"]
    assert result["device"] == device
    assert set(result["speed_up"]) == {"step", "loss"}
    for name in ("torch.nn", "xent_ext"):
        curve, times, summary = (result[key][name] for key in ("losses", "times_ms", "summary"))
        assert len(curve) == len(times) == result["steps"] == 8
        assert curve[-1] < curve[0]
        assert all(0 < step["loss_forward"] < step["loss"] < step["step"] for step in times)
        assert summary["loss_ms"] == statistics.median(step["loss"] for step in times[result["warm_up"] :])
        assert summary["loss_peak_bytes"] >= 4 * torch.Size(result["logits"]).numel()
        assert all(0 <= value <= curve[0] for value in summary["metrics"].values())
        assert f"{curve[-1]:.6f}" in printed
    assert machine.describe() == result["machine"]
    assert machine.one_line(result["machine"]) in printed
    assert "The losses agree." in printed
    assert (tmp_path / f"{task}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [DoubledGradient, ShiftedLoss, NanLoss])
def test_wrong_loss_is_noticed(wrong, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(train.LOSSES, "xent_ext", wrong)
    assert main(["train", "--task", "digits", "--steps", "3", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "DO NOT AGREE" in capsys.readouterr().out


def test_seed_decides_the_curves():
    curves = [train.compare("digits", 3, seed, CPU)["losses"]["torch.nn"] for seed in (0, 0, 1)]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_sides_take_turns(monkeypatch):
    calls = []
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda side, *rest: (calls.append(id(side)), step(side, *rest)))
    train.compare("digits", 3, 0, CPU)
    first, second = calls[:2]
    assert calls == [first, second, second, first, first, second]


def test_one_step_is_enough(tmp_path):
    assert main(["train", "--task", "digits", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("steps", ["0", "-1", "many"])
def test_steps_must_be_positive(steps, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--steps", steps])
    assert stopped.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_tokenizer_round_trip():
    text = "def f(x):\n    return x**2  # naïve\n"
    tokenizer = tasks.Tokenizer(text, size=100)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.words == tasks.Tokenizer(text, size=100).words


def test_rare_words_are_unknown():
    tokenizer = tasks.Tokenizer("to be or not to be", size=4)
    assert len(tokenizer.words) == 4
    assert tokenizer.decode(tokenizer.encode("to be wise")) == f"to be {tasks.UNKNOWN}"


def test_standard_library_fills_the_vocabulary(library):
    tokenizer = tasks.Tokenizer(library, tasks.LanguageModel.vocabulary)
    sample = library[:200_000]
    ids = tokenizer.encode(sample)
    assert len(tokenizer.words) == len(set(tokenizer.words)) == tasks.LanguageModel.vocabulary
    assert ids.count(0) < 0.05 * len(ids)


@pytest.mark.usefixtures("small_lm")
def test_language_model_predicts_the_next_word():
    task = tasks.LanguageModel(seed=0, device=CPU)
    words, target = task.batch()
    assert torch.equal(target.view_as(words)[:, :-1], words[:, 1:])
    # A word that comes later must not reach an earlier prediction.
    model = task.model()
    changed = words.clone()
    changed[:, -1] = (changed[:, -1] + 1) % task.vocabulary
    before, after = (model(ids).unflatten(0, words.shape)[:, :-1] for ids in (words, changed))
    torch.testing.assert_close(before, after)


def test_segmentation_ignores_the_borders_of_digits():
    task = tasks.Segment(seed=0, device=CPU)
    _, labels = task.batch()
    ignored, digit, background = labels == task.ignored, (labels > 0) & (labels < 11), labels == 0
    beside = torch.nn.functional.max_pool2d(digit.float(), 3, stride=1, padding=1).bool()
    assert torch.equal(beside, digit | ignored)
    assert not (background & beside).any()
    assert set(labels.unique().tolist()) == {*range(11), task.ignored}
    assert task.loss_options["ignore_index"] == task.ignored
    assert task.loss_options["weight"].argmin() == 0  # the background is the most frequent class


def test_peak_memory_counts_what_is_held_at_once():
    def hold_two_of_three():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        return second, torch.empty(1 << 19, dtype=torch.uint8)

    result, peak = machine.peak_memory(hold_two_of_three, CPU)
    assert [part.numel() for part in result] == [1 << 20, 1 << 19]
    assert peak == 2 << 20


def test_table_aligns_its_columns():
    lines = report.table(["name", "a"], [["x", "1.00"], ["longer", "20.00"]]).splitlines()
    assert lines == ["name        a", "------  -----", "x        1.00", "longer  20.00"]
