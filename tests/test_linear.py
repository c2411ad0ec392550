"""The last linear layer with its loss: against F.linear and the specification, in loss, gradients and statistics."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, REDUCTIONS
from readmes import block_with

import xent_ext
from xent_ext import linear, linear_autograd, plan, reference

every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
DIFFERENTIABLE = ("logprob", "lse", "entropy")


@pytest.fixture(autouse=True)
def in_chunks(monkeypatch):
    """Of any size, with nothing expected."""
    linear_autograd.expectation_for.cache_clear()
    monkeypatch.setattr(plan, "LEAST_CHUNK_BYTES", 0)


def make(batch=(23,), features=8, classes=11, dtype=torch.float64, *, probabilities=False, ignored=0.3, seed=0):
    """Input, weight, bias and target of a layer; all floating ones but the target require grad."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    target = torch.randint(classes, batch, generator=generator)
    if probabilities:
        target = torch.randn((*batch, classes), generator=generator).softmax(-1).to(dtype)
    else:
        target[torch.rand(batch, generator=generator) < ignored] = -100
    return randn(*batch, features), randn(classes, features), randn(classes), target


def expected(input, weight, bias, target, *, shift=False, return_stats=(), **options):
    """The loss and statistics by the specification, of logits with their classes last."""
    if shift:
        input, target = input[:, :-1], target[:, 1:]
        if options.get("sample_weight") is not None:
            options["sample_weight"] = options["sample_weight"][:, 1:]
    batch, classes = input.shape[:-1], weight.shape[0]
    # An ignored row's input takes no part.
    if not target.is_floating_point():
        input = torch.where((target != options.get("ignore_index", -100)).unsqueeze(-1), input, 0)
    logits = F.linear(input, weight, bias).reshape(-1, classes)
    if options.get("sample_weight") is not None:
        options["sample_weight"] = options["sample_weight"].reshape(-1)
    target = target.reshape(-1, classes) if target.is_floating_point() else target.reshape(-1)
    options["weight"] = options.pop("class_weight", None)
    found = reference.cross_entropy(logits, target, stats=return_stats, **options)
    loss, *stats = found if return_stats else (found,)
    return [value.reshape(batch) if value.dim() else value for value in (loss, *stats)]


def ours(input, weight, bias, target, *, return_stats=(), **options):
    options["weight"] = options.pop("class_weight", None)
    found = xent_ext.linear_cross_entropy(
        input, weight, target, linear_bias=bias, return_stats=return_stats or False, **options
    )
    return [found[0], *(getattr(found[1], name) for name in return_stats)] if return_stats else [found]


def assert_same(given, options, wanted=None, chunk_rows=5, seed=1):
    """That loss, statistics and gradients, for random upstream gradients of all, are those of the specification."""
    found = ours(*given, chunk_rows=chunk_rows, **options)
    right = expected(*given, **options)
    torch.testing.assert_close(found, right)
    wanted = wanted or [value for value in (*given[:3], *options.values()) if requires_grad(value)]
    pairs = [(a, b) for a, b in zip(found, right, strict=True) if a.requires_grad]
    assert pairs
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(a.shape, generator=generator, dtype=torch.float64).to(a.dtype) for a, _ in pairs]
    mine = torch.autograd.grad([a for a, _ in pairs], wanted, upstream, allow_unused=True)
    true = torch.autograd.grad([b for _, b in pairs], wanted, upstream, allow_unused=True)
    torch.testing.assert_close(mine, true)


def requires_grad(value):
    return isinstance(value, torch.Tensor) and value.requires_grad


# --- Parity


@every_reduction
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("batch", [(), (1,), (23,), (3, 7), (2, 3, 4)], ids=str)
def test_every_shape_of_batch(batch, probabilities, reduction):
    assert_same(make(batch, probabilities=probabilities, ignored=0.0), {"reduction": reduction})
    if batch and not probabilities:
        assert_same(make(batch), {"reduction": reduction, "on_all_ignored": "zero"})


@every_reduction
@pytest.mark.parametrize("chunk_rows", [1, 5, 22, 23, 1000, None])
def test_every_size_of_chunks(chunk_rows, reduction):
    assert_same(make(), {"reduction": reduction}, chunk_rows=chunk_rows)


OPTIONS = {
    "class_weight": torch.rand(11, dtype=torch.float64),
    "label_smoothing": 0.2,
    "softcap": 2.0,
    "z_loss": 0.3,
    "logit_scale": torch.tensor(0.7, dtype=torch.float64, requires_grad=True),
    "sample_weight": torch.rand(23, dtype=torch.float64, requires_grad=True),
    "normalizer": 12.5,
    "return_stats": DIFFERENTIABLE,
}


def allowed(names, reduction):
    return {name: OPTIONS[name] for name in names if name != "normalizer" or reduction == "mean"}


@every_reduction
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option(name, probabilities, reduction):
    assert_same(make(probabilities=probabilities), {"reduction": reduction, **allowed([name], reduction)})


@every_reduction
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("pair", list(itertools.combinations(OPTIONS, 2)), ids="+".join)
def test_options_in_pairs(pair, probabilities, reduction):
    assert_same(make(probabilities=probabilities, seed=2), {"reduction": reduction, **allowed(pair, reduction)})


@every_reduction
def test_all_options_together(reduction):
    assert_same(make(seed=3), {"reduction": reduction, **allowed(OPTIONS, reduction)})


@every_reduction
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_shift(probabilities, reduction):
    given = make((3, 6), probabilities=probabilities)
    f = torch.rand(3, 6, dtype=torch.float64, requires_grad=True)
    assert_same(given, {"reduction": reduction, "shift": True, "sample_weight": f, "return_stats": ("lse",)})


def test_statistics_without_gradients_are_those_of_the_logits():
    given = make((4, 6))
    _, stats = xent_ext.linear_cross_entropy(
        *given[:2], given[3], linear_bias=given[2], return_stats=True, chunk_rows=5
    )
    logits = F.linear(*given[:3]).movedim(-1, 1)
    _, right = xent_ext.cross_entropy(logits, given[3], return_stats=True)
    for name, value in vars(right).items():
        torch.testing.assert_close(getattr(stats, name), value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_rows", [64, 200, None])
def test_no_further_from_float64_than_the_two_functions(chunk_rows, dtype):
    input, weight, bias, target = make((300,), 64, 500, dtype)
    true = [each.detach().double().requires_grad_() for each in (input, weight, bias)]
    right = F.cross_entropy(F.linear(*true), target)
    theirs = F.cross_entropy(
        F.linear(input, weight, bias).float().to(torch.promote_types(dtype, torch.float32)), target
    )
    found = xent_ext.linear_cross_entropy(input, weight, target, linear_bias=bias, chunk_rows=chunk_rows)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    slack = 8 * torch.finfo(found.dtype).eps * right.item()
    assert abs(found.item() - right.item()) <= 1.1 * abs(theirs.item() - right.item()) + slack
    gradients = [torch.autograd.grad(loss, leaves) for loss, leaves in (
        (right, true), (theirs, (input, weight, bias)), (found, (input, weight, bias)),
    )]  # fmt: skip
    for exact, their, our in zip(*gradients, strict=True):
        assert our.dtype == dtype
        error = (our.double() - exact).norm()
        assert error <= 1.1 * (their.double() - exact).norm() + 2 * torch.finfo(torch.float64).eps * exact.norm()


def test_a_float32_loss_is_within_1e_5():
    input, weight, bias, target = make((500,), 128, 3000, torch.float32)
    right = F.cross_entropy(F.linear(input.double(), weight.double(), bias.double()), target)
    found = xent_ext.linear_cross_entropy(input, weight, target, linear_bias=bias)
    assert abs(found.item() - right.item()) <= 1e-5 * right.item()


# --- Ignored rows


@every_reduction
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_ignored_row_takes_no_part(value, reduction):
    input, weight, bias, target = make(dtype=torch.float32)
    with torch.no_grad():
        input[target == -100] = value
    found = xent_ext.linear_cross_entropy(input, weight, target, linear_bias=bias, reduction=reduction, chunk_rows=5)
    counted = target != -100
    right = F.cross_entropy(F.linear(input[counted], weight, bias), target[counted], reduction=reduction)
    torch.testing.assert_close(found[counted] if found.dim() else found, right)
    mine = torch.autograd.grad(found.sum(), (input, weight, bias))
    theirs = torch.autograd.grad(right.sum(), (input, weight, bias))
    torch.testing.assert_close(mine[0][counted], theirs[0][counted])
    assert not mine[0][~counted].any()
    torch.testing.assert_close(mine[1:], theirs[1:])


@pytest.mark.parametrize("on_all_ignored", ["nan", "zero"])
@every_reduction
def test_all_rows_ignored(reduction, on_all_ignored):
    input, weight, bias, target = make()
    options = {"reduction": reduction, "on_all_ignored": on_all_ignored}
    loss = xent_ext.linear_cross_entropy(input, weight, target.fill_(-100), linear_bias=bias, **options)
    right = xent_ext.cross_entropy(F.linear(input, weight, bias), target, **options)
    torch.testing.assert_close(loss, right, equal_nan=True)
    for gradient in torch.autograd.grad(loss.sum(), (input, weight, bias)):
        assert not gradient.any()


def test_rows_that_are_ignored_are_not_multiplied(monkeypatch):
    rows = []
    monkeypatch.setattr(linear.Walk, "logits", watched(linear.Walk.logits, lambda walk, x, out: rows.append(len(x))))
    input, weight, bias, target = make((40,))
    xent_ext.linear_cross_entropy(input, weight, target, linear_bias=bias, chunk_rows=16)
    assert sum(rows) == (target != -100).sum() < 40


def watched(function, note):
    def wrapper(*args):
        note(*args)
        return function(*args)

    return wrapper


def test_a_bound_for_the_rows_that_count():
    input, weight, bias, target = make()
    count = int((target != -100).sum())
    for most in (count, 1000):
        found = xent_ext.linear_cross_entropy(input, weight, target, linear_bias=bias, max_counted_rows=most)
        torch.testing.assert_close(found, F.cross_entropy(F.linear(input, weight, bias), target))
    with pytest.raises(ValueError, match=f"max_counted_rows must be at least .* {count}, got {count - 1}"):
        xent_ext.linear_cross_entropy(input, weight, target, max_counted_rows=count - 1)


# --- As the guide has it


def test_the_lines_of_the_guide():
    found = {}
    exec(block_with("xent_ext.LinearCrossEntropyLoss("), found)
    hidden, tokens, head = (
        found[name].detach() if name == "hidden" else found[name] for name in ("hidden", "tokens", "head")
    )
    right = F.cross_entropy(head(hidden)[:, :-1].transpose(1, 2), tokens[:, 1:])
    torch.testing.assert_close(found["loss"], right)
    assert head.weight.grad is not None
