"""Compiled autograd over losses that were made outside graphs: its graph has our operators, and no break."""

import weakref

import pytest
import torch
from parity import made_ahead
from test_options import call, flat, shifted_call
from torch._dynamo import compiled_autograd

import xent_ext
from xent_ext import backends

pytestmark = pytest.mark.skipif(not backends.RECENT, reason="older PyTorch's compiler can't trace what is decided")


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


@pytest.fixture(params=["cpu_blocks", "triton_backend"])
def calls(request):
    return request.getfixturevalue(request.param)


OPTIONS = {"sample_weight": "sample_weight", "logit_scale": "logit_scale"}
CASES = {
    "mean": call(),
    "none": call(reduction="none"),
    "half": call(dtype=torch.bfloat16, **OPTIONS),
    "weights of rows": call(reduction="sum", sample_weight="sample_weight"),
    "all ignored": call(ignored=1.0, sample_weight="sample_weight", on_all_ignored="zero"),
    "normalizer": call(normalizer="normalizer", sample_weight="sample_weight"),
    "probabilities": call(probabilities=True, label_smoothing=0.1, sample_weight="sample_weight", return_stats=True),
    "statistics": call(reduction="none", softcap=2.0, z_loss=0.1, return_stats=True, **OPTIONS),
    "shift": shifted_call(),
    "inplace": call(inplace=True, **OPTIONS),
}


def leaves(args):
    return {name: value for name, value in args.items() if isinstance(value, torch.Tensor) and value.requires_grad}


def total(args, cross_entropy=xent_ext.cross_entropy):
    """A sum of squares of all that has a gradient."""
    found = flat(cross_entropy(**{**args, "input": 1 * args["input"]}))
    return sum(value.square().sum() for name, value in found.items() if name in ("loss", "logprob", "lse", "entropy"))


def gradients_of_compiled_autograd(loss, args, backend="eager", fullgraph=True):
    for leaf in leaves(args).values():
        leaf.grad = None
    with compiled_autograd._enable(torch.compile(backend=backend, fullgraph=fullgraph)):
        loss.backward()
    return {name: leaf.grad for name, leaf in leaves(args).items()}


def agree(args, cross_entropy=xent_ext.cross_entropy, backend="eager"):
    expected = torch.autograd.grad(total(args), list(leaves(args).values()))
    expected = dict(zip(leaves(args), expected, strict=True))
    for step in range(4):  # one graph is for all, once it is known which numbers change
        with torch._dynamo.config.patch(error_on_recompile=step >= 2):
            found = gradients_of_compiled_autograd(total(args, cross_entropy), args, backend)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_gradients(calls, name):
    agree(CASES[name])
    assert calls


@pytest.mark.parametrize("name", ["mean", "statistics", "inplace"])
def test_inductor(calls, name):
    agree(CASES[name], backend="inductor")


def test_a_compiled_loss(calls):
    """Whose forward pass is in another graph than its backward."""
    agree(CASES["statistics"], torch.compile(xent_ext.cross_entropy, backend="eager", fullgraph=True))


def test_frees_what_was_made_ahead(calls):
    """Its graph makes the gradient anew."""
    args = CASES["mean"]
    loss = xent_ext.cross_entropy(**args)
    gradient = weakref.ref(made_ahead(loss))
    found = gradients_of_compiled_autograd(loss, args)
    assert gradient() is None
    assert found["input"] is not None


def test_as_a_setting(calls):
    args = CASES["weights of rows"]
    loss = total(args)
    expected = torch.autograd.grad(loss, args["input"], retain_graph=True)[0]
    args["input"].grad = None
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: loss.backward(), backend="eager")()
    torch.testing.assert_close(args["input"].grad, expected)


def test_in_place_is_refused_where_the_gradient_was_overwritten(calls):
    args = CASES["inplace"]
    logits = 1 * args["input"]
    loss = xent_ext.cross_entropy(**{**args, "input": logits})
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients_of_compiled_autograd(loss, args, fullgraph=False)  # what goes on while an error is raised breaks it


def test_in_place_has_no_gradient_of_statistics(calls):
    args = CASES["inplace"] | {"return_stats": True}
    _, stats = xent_ext.cross_entropy(**{**args, "input": 1 * args["input"]})
    with pytest.raises(Exception, match="does not keep the logits"):
        gradients_of_compiled_autograd(stats.lse.sum(), args)
