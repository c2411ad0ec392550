"""Tensors that are not what their memory says: negative views, zeros without memory, subclasses, meta tensors."""

import pytest
import torch
import torch.nn.functional as F
from parity import REDUCTIONS, make
from test_options import flat
from torch.autograd.graph import saved_tensors_hooks

import xent_ext
from xent_ext import backends

all_reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
STATS = ("logprob", "lse", "entropy")


@pytest.fixture(params=["cpu_blocks", "triton_backend"])
def calls(request):
    """Each implementation, on a CPU."""
    return request.getfixturevalue(request.param)


def conjugate(tensor):
    """The imaginary part of a conjugate, as the gradients of complex numbers have it: a negative view."""
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


# For some values, or in place of them: a tensor whose memory does not hold them, and one whose memory does.
DISGUISES = {
    "negative": (lambda tensor: torch._neg_view(-tensor), torch.clone),
    "conjugate": (conjugate, torch.clone),
    "zeros": (lambda tensor: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype), torch.zeros_like),
}
disguises = pytest.mark.parametrize("disguise", DISGUISES)
of_any_dtype = pytest.mark.parametrize("disguise", ["negative", "zeros"])


def problem():
    input, target, weight = make((7, 5), weighted=True)
    return {"input": input.requires_grad_(), "target": target, "weight": weight}


# --- Negative views and zeros without memory


@disguises
@pytest.mark.parametrize("output", ["loss", *STATS])
@all_reductions
def test_upstream_gradients(calls, reduction, output, disguise):
    disguised, plain = DISGUISES[disguise]
    args = problem()
    value = flat(xent_ext.cross_entropy(**args, reduction=reduction, return_stats=True))[output]
    seed = torch.linspace(1, 2, 7).sum() if value.dim() == 0 else torch.linspace(1, 2, 7)
    found, expected = (
        torch.autograd.grad(value, args["input"], upstream, retain_graph=True)[0]
        for upstream in (disguised(seed), plain(seed))
    )
    assert torch.equal(found, expected)
    assert calls


@disguises
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_upstream_gradient_that_is_expected_next(calls, reduction, disguise):
    """What backward saw is what the next forward pass reads."""
    disguised, plain = DISGUISES[disguise]
    args, seed = problem(), torch.tensor(3.0)
    modules = xent_ext.CrossEntropyLoss(reduction=reduction), xent_ext.CrossEntropyLoss(reduction=reduction)
    for _ in range(2):
        found, expected = (
            torch.autograd.grad(module(args["input"], args["target"]), args["input"], upstream)[0]
            for module, upstream in zip(modules, (disguised(seed), plain(seed)), strict=True)
        )
        assert torch.equal(found, expected)


@disguises
def test_upstream_gradient_in_place(calls, disguise):
    disguised, plain = DISGUISES[disguise]
    args = problem()
    found = []
    for upstream in (disguised(torch.tensor(3.0)), plain(torch.tensor(3.0))):
        logits = 1 * args["input"]
        loss = xent_ext.cross_entropy(logits, args["target"], inplace=True)
        found.append(torch.autograd.grad(loss, args["input"], upstream)[0])
    torch.testing.assert_close(*found)  # the second is made for the upstream gradient of the first


@of_any_dtype
@pytest.mark.parametrize("name", ["input", "target", "weight", "sample_weight", "normalizer", "logit_scale"])
def test_arguments(calls, name, disguise):
    """They are not mistaken for tensors that hold their values and are otherwise alike, of a call before."""
    disguised, plain = DISGUISES[disguise]
    args = problem() | {"input": problem()["input"].detach(), "reduction": "mean"}
    if name not in args:
        args |= {
            "sample_weight": torch.linspace(1, 2, 7),
            "normalizer": torch.tensor(3.0),
            "logit_scale": torch.tensor(2.0),
        }
    expected = xent_ext.cross_entropy(**args | {name: plain(args[name])})
    torch.testing.assert_close(xent_ext.cross_entropy(**args | {name: disguised(args[name])}), expected, equal_nan=True)
    assert len(calls) == 1


@pytest.mark.skipif(not backends.RECENT, reason="older PyTorch has its own in graphs")
@of_any_dtype
def test_in_a_graph(triton_backend, disguise):
    """An operator is given neither."""
    disguised, plain = DISGUISES[disguise]
    args = problem()

    def gradient(cross_entropy, make):
        loss = cross_entropy(**args, reduction="none")
        return torch.autograd.grad(loss, args["input"], make(torch.linspace(1, 2, 7)))[0]

    compiled = torch.compile(xent_ext.cross_entropy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled, disguised), gradient(F.cross_entropy, plain))
    assert triton_backend


def test_saved_tensors_come_back_as_negative_views(calls):
    """From hooks that keep the opposite."""
    args = problem()

    def gradient():
        return torch.autograd.grad(xent_ext.cross_entropy(**args), args["input"])[0]

    expected = gradient()
    with saved_tensors_hooks(torch.neg, torch._neg_view):
        assert torch.equal(gradient(), expected)


# --- Outputs


@all_reductions
def test_outputs_may_be_changed_in_place(calls, reduction):
    """Each is a tensor of its own, not a view of one that autograd would have to replay."""
    args = problem()
    mask = torch.arange(7) % 2 == 0

    def gradient(blank):
        loss, stats = xent_ext.cross_entropy(**args, reduction=reduction, return_stats=True)
        found = [blank(value) for value in vars(stats).values()]
        return torch.autograd.grad(loss.mul_(2).sum() + sum(value.sum() for value in found[:3]), args["input"])[0]

    def blank(value):
        assert not value._is_view()
        value[mask if value.dim() else ()] = 0
        return value

    expected = gradient(lambda value: value[~mask] if value.dim() else value)
    torch.testing.assert_close(gradient(blank), expected)
    assert len(calls) == 2


# --- Meta tensors


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "return_stats": True}], ids=["", "options"])
@pytest.mark.parametrize("check", [False, True], ids=["", "check"])
def test_meta_tensors(triton_backend, monkeypatch, options, check):
    """The kernels are forced on CPU tensors, and nobody can look at class indices that are not there."""
    monkeypatch.setattr(backends, "CHECK", check)
    args = {name: tensor.detach().to("meta") for name, tensor in problem().items()}
    args["input"].requires_grad_()
    loss = flat(xent_ext.cross_entropy(**args, **options))["loss"]
    loss.backward()
    assert loss.is_meta
    assert args["input"].grad.shape == (7, 5)
    assert xent_ext.explain(**args).implementation == "torch"
    assert not triton_backend


# --- Subclasses that change no operator


class Labelled(torch.Tensor):
    """As fastai's, and MONAI's: results are of it, too."""


class Mask(torch.Tensor):
    """As torchvision's: results are plain tensors."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


class Silent(torch.Tensor):
    """As parameters and buffers: functions do not ask it."""

    __torch_function__ = torch._C._disabled_torch_function_impl


subclasses = pytest.mark.parametrize("subclass", [Labelled, Mask, Silent])


def plain(tensor):
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


@subclasses
@pytest.mark.parametrize("names", [("input",), ("target",), ("weight",), ("input", "target", "weight")], ids="-".join)
@all_reductions
def test_subclasses(calls, subclass, names, reduction):
    """The result is what PyTorch's own is, type and all."""

    def outcome(cross_entropy):
        args = {name: tensor.detach() for name, tensor in problem().items()}
        args |= {name: args[name].as_subclass(subclass) for name in names}
        args["input"].requires_grad_()
        loss = cross_entropy(**args, reduction=reduction)
        loss.sum().backward()
        return loss, args["input"].grad

    for ours, theirs in zip(outcome(xent_ext.cross_entropy), outcome(F.cross_entropy), strict=True):
        assert type(ours) is type(theirs)
        torch.testing.assert_close(plain(ours), plain(theirs))
    assert len(calls) == 1


@subclasses
def test_subclasses_among_options(calls, subclass):
    args = problem() | {"sample_weight": torch.linspace(1, 2, 7), "normalizer": torch.tensor(3.0)}

    def outcome(make):
        logits = make(2 * args["input"])
        loss = xent_ext.cross_entropy(
            logits, make(args["target"]), inplace=True, **{name: make(args[name]) for name in list(args)[2:]}
        )
        (gradient,) = torch.autograd.grad(loss, args["input"])
        return plain(loss), plain(gradient), plain(logits)

    loss, gradient, logits = outcome(lambda tensor: tensor.as_subclass(subclass))
    assert torch.equal(gradient, 2 * logits)  # which has taken their place
    torch.testing.assert_close((loss, gradient, logits), outcome(lambda tensor: tensor))
    assert len(calls) == 2


@subclasses
def test_explain_subclasses(calls, subclass):
    args = {name: tensor.detach().as_subclass(subclass) for name, tensor in problem().items()}
    assert xent_ext.explain(**args).implementation == ("triton" if backends.BACKEND == "triton" else "cpu")


@pytest.mark.parametrize("make", [lambda leaf: leaf.view(7, 5), lambda leaf: leaf.as_subclass(Labelled)])
def test_in_place_on_another_view_of_a_leaf(calls, make):
    """It is refused before anything is overwritten."""
    leaf = problem()["input"]
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf that requires grad"):
        xent_ext.cross_entropy(make(leaf), problem()["target"], inplace=True)
    assert torch.equal(leaf, before)


def test_installed_for_subclasses(calls):
    """Those that have no `__torch_function__` of their own, and so no table of functions, are reached."""
    args = {name: tensor.detach().as_subclass(Labelled) for name, tensor in problem().items()}
    expected = F.cross_entropy(**args)
    with xent_ext.installed():
        loss = F.cross_entropy(**args)
    assert type(loss) is Labelled
    torch.testing.assert_close(plain(loss), plain(expected))
    assert len(calls) == 1
