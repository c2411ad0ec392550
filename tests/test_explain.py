"""`explain` says, where it is shown, how a call runs, with the one reason that applies."""

import doctest
from pathlib import Path

import pytest
import torch

import xent_ext
from xent_ext import backends

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
INDICES = torch.zeros(3, dtype=torch.int64)
AS_FAST = "PyTorch's own is as fast for logits of this kind and size on a CPU"
IMAGES = torch.empty(4, 16, 256, 256, dtype=torch.bfloat16), torch.empty(4, 256, 256, dtype=torch.int64)


@pytest.fixture(autouse=True)
def auto(monkeypatch):
    monkeypatch.setattr(backends, "BACKEND", "auto")


def test_readme_shows_what_an_interpreter_shows():
    found = doctest.DocTestParser().get_doctest(
        README.replace("```\n", "\n"), {"xent_ext": xent_ext, "torch": torch}, "README.md", None, None
    )
    assert found.examples
    said = []
    doctest.DocTestRunner().run(found, out=said.append)
    assert not said, "".join(said)


def test_it_is_shown_once(capsys):
    explanation = xent_ext.explain(torch.randn(3, 5), INDICES)
    assert not capsys.readouterr().out
    assert repr(explanation) == str(explanation)
    assert str(explanation) == f"implementation  torch: {AS_FAST}"


def probabilities(**options):
    return torch.randn(3, 5), torch.rand(3, 5, **options)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.randn(3, 5), INDICES), AS_FAST),
        ((IMAGES[0].to(memory_format=torch.channels_last), IMAGES[1]), "the logits are on a CPU"),
        (probabilities(requires_grad=True), "a gradient with respect to the target is wanted"),
        ((*probabilities(), torch.ones(5, requires_grad=True)), "a gradient with respect to the weight is wanted"),
    ],
    ids=["few logits", "channels last", "target", "weight"],
)
def test_the_reason_that_applies(arguments, reason):
    assert xent_ext.explain(*arguments).reason == reason


@pytest.mark.skipif(not backends.RECENT, reason="older PyTorch's compiler does not trace it")
def test_the_reason_in_a_compiled_graph():
    reasons = []

    @torch.compile(backend="eager")
    def explained(logits):
        reasons.append(xent_ext.explain(logits, INDICES).reason)
        return logits + 1

    explained(torch.randn(3, 5))
    assert reasons == ["PyTorch's own is as fast for a compiled graph on a CPU"]
