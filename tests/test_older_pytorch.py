"""The loss in graphs of older PyTorch, whose compiler cannot trace this package."""

import pytest
import torch
import torch.nn.functional as F
from test_compile import compiled, nothing_compiled, operators  # noqa: F401

import xent_ext
from xent_ext import backends


@pytest.fixture
def arguments():
    target = torch.randint(40, (6,))
    target[2] = -100
    return torch.randn(6, 40, requires_grad=True), target


@pytest.mark.parametrize("function", [xent_ext.cross_entropy, xent_ext.CrossEntropyLoss()], ids=["function", "module"])
def test_graphs_have_the_formula_of_pytorch(triton_backend, monkeypatch, arguments, function):
    monkeypatch.setattr(backends, "RECENT", False)
    loss, counter = compiled(lambda input, target: function(2 * input, target), "aot_eager")
    torch.testing.assert_close(loss(*arguments), F.cross_entropy(2 * arguments[0], arguments[1]))
    assert not operators(counter.graphs)
    assert not triton_backend


@pytest.mark.skipif(backends.RECENT, reason="this PyTorch's compiler can trace the options")
def test_options_break_the_graph(arguments):
    def loss(input, target):
        return 3 * xent_ext.cross_entropy(2 * input, target, z_loss=0.1, softcap=3.0)

    input, target = arguments
    found, expected = torch.compile(loss, backend="aot_eager")(input, target), loss(input, target)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*[torch.autograd.grad(value, input) for value in (found, expected)])
