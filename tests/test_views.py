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
        if not all(issubclass(cls, type_) for type_ in types):
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


class Described(torch.Tensor):
    """As MONAI's: results are of it, too, and take over what it says of itself."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        found = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(found, cls):
            given = [each for each in (*args, *(kwargs or {}).values()) if isinstance(each, cls)]
            found.about = [getattr(each, "about", None) for each in given]
        return found


class Silent(torch.Tensor):
    """As parameters and buffers: functions do not ask it."""

    __torch_function__ = torch._C._disabled_torch_function_impl


subclasses = pytest.mark.parametrize("subclass", [Labelled, Mask, Described, Silent])
any_of_them = pytest.mark.parametrize(
    "names", [("input",), ("target",), ("weight",), ("input", "target", "weight")], ids="-".join
)


def plain(tensor):
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


def outcome(cross_entropy, subclass, names, reduction):
    """The loss and the gradient of `problem`, where the arguments of these names are of a subclass."""
    args = {name: tensor.detach() for name, tensor in problem().items()}
    for name in names:
        args[name] = args[name].as_subclass(subclass)
        args[name].about = name
    args["input"].requires_grad_()
    loss = cross_entropy(**args, reduction=reduction)
    loss.sum().backward()
    return loss, args["input"].grad


def assert_alike(ours, theirs):
    assert type(ours) is type(theirs)
    assert getattr(ours, "about", None) == getattr(theirs, "about", None)
    torch.testing.assert_close(plain(ours), plain(theirs))


@subclasses
@any_of_them
@all_reductions
def test_subclasses(calls, subclass, names, reduction):
    """The result is what PyTorch's own is, type and all."""
    case = subclass, names, reduction
    for pair in zip(outcome(xent_ext.cross_entropy, *case), outcome(F.cross_entropy, *case), strict=True):
        assert_alike(*pair)
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


class Viewed(torch.autograd.Function):
    """Returns views of what it is given, in so many pieces."""

    @staticmethod
    def forward(ctx, input, pieces):
        views = tuple(view.view_as(view) for view in input.tensor_split(pieces))
        return views if pieces > 1 else views[0]


def computed(*shape):
    return torch.randn(shape, requires_grad=True) * 1


def rows_in(mode, whole):
    with mode():
        return whole[:3]


def plain_leaf():
    return torch.randn(4, 5)[:3].requires_grad_()


def now_of_a_leaf():
    data = torch.randn(4, 5)
    view = data[:3]
    data.requires_grad_()
    return view


# Logits that autograd lets nobody change, by what PyTorch's message has to say of them and ours has, too.
REFUSED = {
    "leaf": ("leaf", lambda: torch.randn(3, 5, requires_grad=True)),
    "view of a leaf": ("leaf", lambda: torch.randn(4, 5, requires_grad=True)[:3]),
    "leaf that is a view of data": ("leaf", plain_leaf),
    "view of a leaf that is a view of data": ("leaf", lambda: plain_leaf()[:]),
    "the same in other strides": ("leaf", lambda: plain_leaf().as_strided((3, 5), (5, 1))),
    "view of another view of the leaf's data": ("leaf", now_of_a_leaf),
    "view of what was detached": ("leaf", lambda: computed(4, 5).detach()[:3].requires_grad_()[:]),
    "no_grad": ("no_grad", lambda: rows_in(torch.no_grad, computed(4, 5))),
    "no_grad, of data": ("no_grad", lambda: rows_in(torch.no_grad, torch.randn(4, 5)).requires_grad_()),
    "view of one in no_grad": ("no_grad", lambda: rows_in(torch.no_grad, computed(4, 5))[:]),
    "inference mode": ("inference mode", lambda: rows_in(torch.inference_mode, computed(4, 5))),
    "unbind": ("a view", lambda: computed(2, 3, 5).unbind(0)[0]),
    "chunk": ("a view", lambda: computed(6, 5).chunk(2)[0]),
    "view of a split": ("a view", lambda: computed(6, 5).split(3)[0][:]),
    "custom function": ("custom", lambda: Viewed.apply(computed(3, 5), 1)),
    "pieces of a custom function": ("a view", lambda: Viewed.apply(computed(6, 5), 2)[0]),
    "expanded": ("memory", lambda: computed(1, 5).expand(3, 5)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_in_place_refuses_before_anything_is_written(calls, kind):
    """With the type that a change by PyTorch has, and the same reason."""
    reason, make_logits = REFUSED[kind]
    logits = make_logits()
    memory = logits.untyped_storage().clone()
    with pytest.raises(RuntimeError, match=reason):
        logits.mul_(2)
    with pytest.raises(RuntimeError, match=f"inplace=True .*{reason}"):
        xent_ext.cross_entropy(logits, torch.arange(3), inplace=True)
    assert logits.untyped_storage().tolist() == memory.tolist()
    assert not calls


# What PyTorch lets change, and is changed.
ALLOWED = {
    "view": lambda: computed(4, 5)[:3],
    "view that was written to": lambda: torch.randn(4, 5)[:3].copy_(torch.randn(3, 5, requires_grad=True)),
    "pieces without views": lambda: computed(6, 5).unsafe_chunk(2)[0],
    "part of complex numbers": lambda: torch.view_as_real(torch.complex(computed(3, 5), computed(3, 5)))[..., 1],
}


@pytest.mark.parametrize("kind", ALLOWED)
def test_in_place_takes_what_pytorch_lets_change(calls, kind):
    ALLOWED[kind]().mul_(2)
    logits = ALLOWED[kind]()
    before = logits.detach().clone()
    xent_ext.cross_entropy(logits, torch.arange(3), inplace=True).backward()
    assert not torch.equal(logits, before)
    assert calls


@pytest.mark.parametrize("hooked", ["logits", "view", "view between", "base"])
def test_in_place_with_a_hook_on_the_logits(calls, hooked):
    """It gets the gradient, and what it gives in its place goes on."""
    leaf, seen = torch.randn(4, 5, requires_grad=True), []

    def gradient(cross_entropy):
        base = leaf * 1
        view = base[:3]
        logits = {"logits": view * 1, "view": view, "view between": view[:], "base": view}[hooked]
        {"logits": logits, "view": view, "view between": view, "base": base}[hooked].register_hook(
            lambda gradient: seen.append(gradient.clone()) or 2 * gradient
        )
        return torch.autograd.grad(cross_entropy(logits, torch.arange(3)), leaf)[0]

    expected = gradient(F.cross_entropy)
    found = gradient(lambda *args: xent_ext.cross_entropy(*args, inplace=True))
    torch.testing.assert_close((found, seen[1]), (expected, seen[0]))
    assert calls


@subclasses
@any_of_them
@all_reductions
def test_installed_for_subclasses(calls, subclass, names, reduction):
    """Those without a `__torch_function__` of their own are reached: others may know PyTorch's function only."""
    case = subclass, names, reduction

    def by_its_name(*args, **options):
        return F.cross_entropy(*args, **options)

    expected = outcome(by_its_name, *case)
    with xent_ext.installed():
        found = outcome(by_its_name, *case)
    for pair in zip(found, expected, strict=True):
        assert_alike(*pair)
    assert len(calls) == (subclass in (Labelled, Silent))
