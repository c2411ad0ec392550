"""The last linear layer with its loss, as autograd and whoever uses it see it."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from parity import REDUCTIONS
from test_linear import expected, make
from torch.utils.checkpoint import checkpoint

import xent_ext
from bench import machine
from xent_ext import ahead, backends, cpu, linear, linear_autograd, memory, plan

every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(autouse=True)
def in_chunks(monkeypatch):
    """Of any size, with nothing expected."""
    linear_autograd.expectation_for.cache_clear()
    monkeypatch.setattr(plan, "LEAST_CHUNK_BYTES", 0)


@pytest.fixture
def again(monkeypatch):
    """A list with an entry for each backward that made the logits again."""
    calls, backward = [], linear.backward
    monkeypatch.setattr(linear, "backward", lambda *args: calls.append(1) or backward(*args))
    return calls


def both(given, **options):
    """Our loss and the specification's."""
    input, weight, bias, target = given
    found = xent_ext.linear_cross_entropy(input, weight, target, linear_bias=bias, chunk_rows=5, **options)
    return found, expected(*given, **options)[0]


# --- Upstream gradients


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_made_ahead_for_any_upstream_gradient(again, reduction):
    given = make()
    for factor in (1.0, 1.0, 0.25, -3.0, 0.0, 1e6):
        found, right = both(given, reduction=reduction)
        upstream = torch.tensor(factor, dtype=torch.float64)
        mine = torch.autograd.grad(found, given[:3], upstream)
        torch.testing.assert_close(mine, torch.autograd.grad(right, given[:3], upstream))
    assert not again


@every_reduction
def test_a_second_backward_with_another_factor(reduction):
    given = make()
    found, right = both(given, reduction=reduction)
    for seed, keep in ((0, True), (1, True), (2, False)):
        upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        mine = torch.autograd.grad(found, given[:3], upstream, retain_graph=keep)
        torch.testing.assert_close(mine, torch.autograd.grad(right, given[:3], upstream, retain_graph=True))
        for gradient in mine:
            gradient.zero_()  # whoever has it may change it
    with pytest.raises(RuntimeError, match="second time"):
        found.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_that_are_not_finite_are_made_of_others(reduction):
    given = make()
    for factor in (float("inf"), 1.0, float("nan"), 2.0):
        found, right = both(given, reduction=reduction)
        upstream = torch.tensor(factor, dtype=torch.float64)
        mine = torch.autograd.grad(found, given[:3], upstream)
        if factor in (1.0, 2.0):
            torch.testing.assert_close(mine, torch.autograd.grad(right, given[:3], upstream))
        else:
            assert not any(gradient.isfinite().all() for gradient in mine)


def test_a_negative_view_and_zeros_without_memory_as_upstream_gradients():
    given = make()
    for upstream in (
        torch._neg_view(torch.rand(23, dtype=torch.float64)),
        torch._efficientzerotensor(23, dtype=torch.float64),
    ):
        found, right = both(given, reduction="none")
        mine = torch.autograd.grad(found, given[:3], upstream)
        torch.testing.assert_close(mine, torch.autograd.grad(right, given[:3], upstream.clone()))


def test_float16_keeps_gradients_that_are_small_without_a_scale(again):
    input, weight, bias, target = (each.detach() for each in make((40,), 16, 3000, torch.float32))
    half = [each.half().requires_grad_() for each in (input, weight, bias)]
    true = [each.detach().double().requires_grad_() for each in half]
    scale = 65536.0
    torch.autograd.backward(F.cross_entropy(F.linear(*true), target) * scale)
    for step in range(3):
        theirs = torch.autograd.grad(F.cross_entropy(F.linear(*half).float(), target) * scale, half)
        loss = xent_ext.linear_cross_entropy(half[0], half[1], target, linear_bias=half[2])
        ours = torch.autograd.grad(loss * scale, half)
        for exact, their, our in zip([each.grad for each in true], theirs, ours, strict=True):
            assert (our - exact).norm() <= 1.1 * (their - exact).norm()
        assert len(again) == 1, step  # the first step can't know the scale


# --- What is needed, and what is kept


@every_reduction
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_only_what_needs_a_gradient_has_one(needed, reduction):
    given = [each.detach() for each in make()]
    for place in needed:
        given[place].requires_grad_()
    found, right = both(given, reduction=reduction)
    wanted, upstream = [given[place] for place in needed], torch.rand_like(found)
    mine = torch.autograd.grad(found, wanted, upstream)
    torch.testing.assert_close(mine, torch.autograd.grad(right, wanted, upstream))


def test_products_are_only_those_that_are_needed(monkeypatch):
    adds = []
    for name in ("add_input", "add_weight"):
        monkeypatch.setattr(linear.Sums, name, lambda *args, name=name: adds.append(name))
    input, weight, _, target = (each.detach() for each in make())
    xent_ext.linear_cross_entropy(input, weight, target)
    assert adds == []
    xent_ext.linear_cross_entropy(input.requires_grad_(), weight, target)
    assert set(adds) == {"add_input"}
    with torch.no_grad():
        adds.clear()
        assert not xent_ext.linear_cross_entropy(input, weight, target).requires_grad
    assert adds == []


def test_nothing_is_left_of_a_loss_that_is_dropped():
    input, weight, _, target = make()
    loss = xent_ext.linear_cross_entropy(input, weight, target)
    made = weakref.ref(next(each for each in loss.grad_fn.saved_tensors[::-1] if each is not None))
    assert made() is not None
    del loss
    gc.collect()
    assert made() is None


def test_the_gradient_is_handed_out_without_a_copy():
    input, weight, _, target = make()
    loss = xent_ext.linear_cross_entropy(input, weight, target)
    places = {each.data_ptr() for each in loss.grad_fn.saved_tensors if each is not None}
    loss.backward()
    assert weight.grad.data_ptr() in places
    assert input.grad.data_ptr() in places


def test_hooks_on_saved_tensors_see_no_gradient(again):
    given, sizes = make(), []

    def pack(tensor):
        sizes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = xent_ext.linear_cross_entropy(*given[:2], given[3], linear_bias=given[2])
    assert sizes.count(given[1].shape) == 1  # the weight
    right = both(given)[1]
    torch.testing.assert_close(torch.autograd.grad(found, given[:3]), torch.autograd.grad(right, given[:3]))
    assert again


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    given = make()

    def loss(input, weight, bias):
        return xent_ext.linear_cross_entropy(input, weight, given[3], linear_bias=bias, chunk_rows=5)

    found = checkpoint(loss, *given[:3], use_reentrant=reentrant)
    found.backward()
    mine = [each.grad for each in given[:3]]
    torch.testing.assert_close(mine, list(torch.autograd.grad(both(given)[1], given[:3])))


def test_save_on_cpu():
    given = make()
    with torch.autograd.graph.save_on_cpu():
        found, _ = both(given)
    right = both(given)[1]
    torch.testing.assert_close(torch.autograd.grad(found, given[:3]), torch.autograd.grad(right, given[:3]))


def test_of_several_losses_two_make_their_gradients_ahead(again, monkeypatch):
    monkeypatch.setattr(ahead, "LARGE", 1)
    ahead.on_device.cache_clear()
    given = make()
    losses = [both(given) for _ in range(5)]
    mine = torch.autograd.grad(sum(found for found, _ in losses), given[:3])
    torch.testing.assert_close(mine, torch.autograd.grad(sum(right for _, right in losses), given[:3]))
    assert len(again) == 5 - ahead.MOST_AHEAD
    ahead.on_device.cache_clear()


def test_what_is_changed_in_place_is_noticed():
    input, weight, _, target = make()
    loss = xent_ext.linear_cross_entropy(input, weight, target, reduction="none")
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_the_same_bits_on_every_run():
    given = make((300,), 32, 200, torch.float32)
    runs = []
    for _ in range(2):
        found, _ = both(given)
        runs.append((found.detach(), *torch.autograd.grad(found, given[:3])))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


# --- Differentiated in other ways


@every_reduction
def test_a_gradient_is_differentiable(reduction):
    given = make((6,), 3, 4)

    def loss(input, weight, bias):
        return xent_ext.linear_cross_entropy(input, weight, given[3], linear_bias=bias, reduction=reduction)

    assert torch.autograd.gradcheck(loss, given[:3])
    assert torch.autograd.gradgradcheck(loss, given[:3])


def test_a_penalty_on_the_gradient():
    given = make()
    gradients = []
    for loss in both(given):
        first = torch.autograd.grad(loss, given[:3], create_graph=True)
        gradients.append(torch.autograd.grad(sum(each.square().sum() for each in first), given[:3]))
    torch.testing.assert_close(*gradients)


def test_batched_upstream_gradients():
    given = make()
    upstream = torch.rand(4, 23, dtype=torch.float64)
    mine, right = (
        torch.autograd.grad(loss, given[:3], upstream, is_grads_batched=True) for loss in both(given, reduction="none")
    )
    torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_torch_func(transform):
    input, weight, bias, target = (each.detach() for each in make((4,), 3, 5))

    def ours(weight):
        return xent_ext.linear_cross_entropy(input, weight, target, linear_bias=bias)

    def theirs(weight):
        return F.cross_entropy(F.linear(input, weight, bias), target)

    torch.testing.assert_close(transform(ours)(weight), transform(theirs)(weight))


def test_vmap_and_jvp():
    input, weight, bias, target = (each.detach() for each in make((4, 6), 3, 5))

    def ours(input, target, weight=weight):
        return xent_ext.linear_cross_entropy(input, weight, target, linear_bias=bias)

    def theirs(input, target, weight=weight):
        return F.cross_entropy(F.linear(input, weight, bias), target)

    torch.testing.assert_close(torch.vmap(ours)(input, target), torch.vmap(theirs)(input, target))
    tangent = torch.rand_like(weight)
    torch.testing.assert_close(
        torch.func.jvp(lambda weight: ours(input[0], target[0], weight), (weight,), (tangent,)),
        torch.func.jvp(lambda weight: theirs(input[0], target[0], weight), (weight,), (tangent,)),
    )


@pytest.mark.parametrize("which", ["target", "weight"])
def test_gradients_that_need_all_logits(which):
    input, weight, bias, target = make(probabilities=True)
    class_weight = torch.rand(11, dtype=torch.float64)
    wanted = target if which == "target" else class_weight
    wanted.requires_grad_()
    found = xent_ext.linear_cross_entropy(input, weight, target, linear_bias=bias, weight=class_weight)
    right = F.cross_entropy(F.linear(input, weight, bias), target, class_weight)
    leaves = (input, weight, bias, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(right, leaves))


# --- Types


def test_autocast():
    input, weight, bias, target = make((40,), 16, 100, torch.float32)
    true = [each.detach().double().requires_grad_() for each in (input, weight, bias)]
    exact = torch.autograd.grad(F.cross_entropy(F.linear(*true), target), true)
    leaves = (input, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = F.cross_entropy(F.linear(*leaves), target)
        ours = xent_ext.linear_cross_entropy(input, weight, target, linear_bias=bias)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    for right, their, our in zip(
        exact, torch.autograd.grad(theirs, leaves), torch.autograd.grad(ours, leaves), strict=True
    ):
        assert our.dtype == torch.float32
        assert (our - right).norm() <= 1.1 * (their - right).norm()


def test_autocast_with_mixed_dtypes():
    input, weight, _, target = make(dtype=torch.float32)
    half = weight.detach().bfloat16().requires_grad_()
    with pytest.raises(RuntimeError, match="linear_weight must have the dtype of input"):
        xent_ext.linear_cross_entropy(input, half, target)
    with torch.autocast("cpu", torch.bfloat16):
        loss = xent_ext.linear_cross_entropy(input, half, target)
        right = F.cross_entropy(F.linear(input, half), target)
    torch.testing.assert_close(loss, right)
    assert [each.dtype for each in torch.autograd.grad(loss, (input, half))] == [torch.float32, torch.bfloat16]


def test_backward_under_autocast():
    """Its products are in the dtype of those of the forward pass, with rows that are ignored and without."""
    for ignored in (0.0, 0.5):
        input, weight, _, target = make(dtype=torch.float32, ignored=ignored)
        loss = xent_ext.linear_cross_entropy(input, weight, target, reduction="sum", return_stats=("lse",))[1].lse.sum()
        (right,) = torch.autograd.grad(loss, input, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = torch.autograd.grad(loss, input)
        assert torch.equal(found, right)


@pytest.mark.parametrize("accumulate_dtype", [None, torch.float32])
def test_the_dtype_of_the_sum(accumulate_dtype):
    input, weight, bias, target = make((512,), 64, 300, torch.bfloat16, ignored=0.0)
    true = [each.detach().double().requires_grad_() for each in (input, weight, bias)]
    exact = torch.autograd.grad(F.cross_entropy(F.linear(*true), target), true[1])[0]
    unfused = torch.autograd.grad(F.cross_entropy(F.linear(input, weight, bias).float(), target), weight)[0]
    loss = xent_ext.linear_cross_entropy(
        input, weight, target, linear_bias=bias, chunk_rows=16, accumulate_dtype=accumulate_dtype
    )
    error = (torch.autograd.grad(loss, weight)[0].double() - exact).norm()
    least = (unfused.double() - exact).norm()
    assert error <= 1.01 * least


# --- Modules


def test_module():
    torch.manual_seed(0)
    module = xent_ext.LinearCrossEntropyLoss(8, 11, bias=True, dtype=torch.float64, label_smoothing=0.1)
    input, _, _, target = make()
    right = F.cross_entropy(module.linear(input), target, label_smoothing=0.1)
    torch.testing.assert_close(module(input, target), right)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(copied(input, target), right)
    assert set(module.state_dict()) == {"linear.weight", "linear.bias"}
    assert "label_smoothing=0.1" in repr(module)


@pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="this PyTorch has no LinearCrossEntropyLoss"
)
def test_module_is_what_pytorchs_is():
    for options in ({}, {"bias": True}, {"out_features": (3, 2)}, {"weight": torch.rand(11)}, {"reduction": "none"}):
        torch.manual_seed(0)
        ours = xent_ext.LinearCrossEntropyLoss(8, 11, **options)
        torch.manual_seed(0)
        theirs = torch.nn.LinearCrossEntropyLoss(8, 11, **options)
        assert isinstance(ours, torch.nn.LinearCrossEntropyLoss)
        theirs.load_state_dict(ours.state_dict())
        input, target = torch.randn(5, 8), torch.randint(11, (5, *options.get("out_features", ())))
        torch.testing.assert_close(ours(input, target), theirs(input, target))
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None)
    torch.testing.assert_close(xent_ext.LinearCrossEntropyLoss(8, 11, options=chunks).num_classes, 11)


def test_module_with_options():
    module = xent_ext.LinearCrossEntropyLoss(
        8, 11, dtype=torch.float64, softcap=3.0, return_stats=("lse",), chunk_rows=4
    )
    input, _, _, target = make()
    f = torch.rand(23, dtype=torch.float64)
    loss, stats = module(input, target, sample_weight=f, normalizer=7.0, logit_scale=0.5)
    logits = F.linear(input, module.linear.weight)
    right, right_stats = xent_ext.cross_entropy(
        logits, target, softcap=3.0, return_stats=("lse",), sample_weight=f, normalizer=7.0, logit_scale=0.5
    )
    torch.testing.assert_close((loss, stats.lse), (right, right_stats.lse))


def test_the_repr_of_a_module_says_what_it_was_given():
    options = {"softcap": 3.0, "loss_dtype": torch.float64, "chunk_rows": 5, "accumulate_dtype": torch.float32}
    shown = xent_ext.LinearCrossEntropyLoss(8, 11, **options).extra_repr()
    for name, value in options.items():
        assert f", {name}={value!r}" in shown
    assert "max_counted_rows" not in shown


def test_tied_embeddings():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(11, 8, dtype=torch.float64)
    module = xent_ext.LinearCrossEntropyLoss(8, 11, dtype=torch.float64)
    module.linear.weight = embedding.weight
    tokens, target = torch.randint(11, (23,)), torch.randint(11, (23,))
    module(embedding(tokens), target).backward()
    found, embedding.weight.grad = embedding.weight.grad, None
    F.cross_entropy(F.linear(embedding(tokens), embedding.weight), target).backward()
    torch.testing.assert_close(found, embedding.weight.grad)


def test_functional_call():
    module = xent_ext.LinearCrossEntropyLoss(8, 11, dtype=torch.float64)
    input, weight, _, target = make()
    found = torch.func.functional_call(module, {"linear.weight": weight}, (input, target))
    torch.testing.assert_close(found, F.cross_entropy(F.linear(input, weight), target))


# --- By the two functions


@every_reduction
def test_few_logits_are_made_at_once(monkeypatch, reduction):
    monkeypatch.undo()
    given = make((3, 7))
    with torch.no_grad():
        given[0][given[3] == -100] = float("nan")
    options = {"reduction": reduction, "z_loss": 0.1, "return_stats": ("lse",)}
    monkeypatch.setattr(linear.Walk, "logits", lambda *args: pytest.fail("a chunk was made"))
    loss, stats = xent_ext.linear_cross_entropy(*given[:2], given[3], linear_bias=given[2], **options)
    right, lse = expected(*given, **options)
    torch.testing.assert_close((loss, stats.lse), (right, lse))
    upstream = torch.rand_like(loss)
    torch.testing.assert_close(
        torch.autograd.grad(loss, given[:3], upstream), torch.autograd.grad(right, given[:3], upstream)
    )
    assert "made at once" in xent_ext.explain_linear(*given[:2], given[3]).reason


@pytest.mark.parametrize(("reduction", "most"), [("mean", 48), ("sum", 48), ("none", 36)])
def test_few_logits_whose_rows_are_ignored_are_chunks(monkeypatch, reduction, most):
    """On a CPU, where they take no time. For "none" they are made again in backward: four products of three rows."""
    monkeypatch.undo()
    monkeypatch.setattr(plan, "LEAST_SPARED", 16 * 64 * 128)
    input, weight, _, target = make((64,), 64, 128, ignored=0.0)
    target[most:] = -100
    assert xent_ext.explain_linear(input, weight, target, reduction=reduction).implementation == "cpu"
    target[most] = 0
    assert xent_ext.explain_linear(input, weight, target, reduction=reduction).implementation == "torch"
    with torch.no_grad():
        target[47:] = -100
        assert xent_ext.explain_linear(input, weight, target, reduction=reduction).implementation == "cpu"


def test_few_logits_of_a_large_weight_are_chunks(monkeypatch):
    """On a CPU, whose memory for its gradient is kept, if that is made in the forward pass."""
    monkeypatch.undo()
    input, weight, _, target = make((4,), 64, 128)
    monkeypatch.setattr(memory, "MAPPED", 128 * 64 * 8)
    assert xent_ext.explain_linear(input, weight, target).implementation == "cpu"
    assert xent_ext.explain_linear(input, weight, target, reduction="none").implementation == "torch"
    assert xent_ext.explain_linear(input, weight.detach(), target).implementation == "torch"
    monkeypatch.setattr(memory, "MAPPED", 128 * 64 * 8 + 1)
    assert xent_ext.explain_linear(input, weight, target).implementation == "torch"


@pytest.mark.parametrize("rows", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_class_weights_of_half_precision_with_few_logits(monkeypatch, rows, dtype, probabilities):
    monkeypatch.undo()
    input, weight, _, target = make((rows,), dtype=dtype, probabilities=probabilities)
    class_weight = torch.rand(11).to(dtype)
    loss = xent_ext.linear_cross_entropy(input, weight, target, weight=class_weight, reduction="sum")
    (right,) = expected(
        *[each.detach().float() for each in (input, weight)],
        None,
        target,
        class_weight=class_weight.float(),
        reduction="sum",
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, right, rtol=1e-2, atol=1e-2)


def test_weights_of_several_dimensions():
    input = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, 3, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randint(11, (5, 3, 2))
    target[0, 0] = -100
    found = xent_ext.linear_cross_entropy(input, weight, target, linear_bias=bias, z_loss=0.1)
    logits = torch.einsum("nd,cijd->ncij", input, weight) + bias
    right = xent_ext.cross_entropy(logits, target, z_loss=0.1)
    leaves = (input, weight, bias)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(right, leaves))


def test_pytorchs_backend(monkeypatch):
    monkeypatch.setattr(backends, "BACKEND", "torch")
    given = make((2, 5))
    found, right = both(given, return_stats=False, reduction="none", z_loss=0.1)
    torch.testing.assert_close(found, right)


def test_a_sparse_input():
    input, weight, bias, target = make()
    found = xent_ext.linear_cross_entropy(input.detach().to_sparse(), weight, target, linear_bias=bias)
    right = F.cross_entropy(F.linear(input, weight, bias), target)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(torch.autograd.grad(found, (weight, bias)), torch.autograd.grad(right, (weight, bias)))


@every_reduction
def test_no_features(reduction):
    input, weight, bias, target = make((2, 5), features=0)
    loss = xent_ext.linear_cross_entropy(input, weight, target, linear_bias=bias, reduction=reduction)
    right = F.cross_entropy(F.linear(input, weight, bias).movedim(-1, 1), target, reduction=reduction)
    torch.testing.assert_close(loss, right)
    mine, theirs = [torch.autograd.grad(value.sum(), (input, weight, bias)) for value in (loss, right)]
    torch.testing.assert_close(mine, theirs)


def test_no_rows():
    weight = torch.randn(11, 8, requires_grad=True)
    for reduction in REDUCTIONS:
        input = torch.randn(0, 8, requires_grad=True)
        found = xent_ext.linear_cross_entropy(input, weight, torch.empty(0, dtype=torch.long), reduction=reduction)
        right = F.cross_entropy(F.linear(input, weight), torch.empty(0, dtype=torch.long), reduction=reduction)
        torch.testing.assert_close(found, right, equal_nan=True)
        found.sum().backward()


# --- Where values can't be read without a wait, and by the kernels


@pytest.fixture
def unread(monkeypatch):
    """As on a GPU: nothing is known of how many rows count."""
    monkeypatch.setattr(linear, "is_read_freely", lambda tensor: False)


@every_reduction
def test_rows_that_are_not_known_to_count(unread, reduction):
    given = make()
    with torch.no_grad():
        given[0][given[3] == -100] = float("nan")
    for most in (None, int((given[3] != -100).sum()), 20):
        found, right = both(given, reduction=reduction) if most is None else (
            xent_ext.linear_cross_entropy(
                *given[:2], given[3], linear_bias=given[2], reduction=reduction, chunk_rows=5, max_counted_rows=most
            ),
            expected(*given, reduction=reduction)[0],
        )  # fmt: skip
        torch.testing.assert_close(found, right)
        upstream = torch.rand_like(found)
        mine = torch.autograd.grad(found, given[:3], upstream)
        torch.testing.assert_close(mine, torch.autograd.grad(right, given[:3], upstream))


def test_more_rows_than_the_bound_are_noticed(unread):
    input, weight, _, target = make()
    most = int((target != -100).sum()) - 1
    for reduction in ("mean", "sum"):
        assert xent_ext.linear_cross_entropy(input, weight, target, max_counted_rows=most, reduction=reduction).isnan()
    losses = xent_ext.linear_cross_entropy(input, weight, target, max_counted_rows=most, reduction="none")
    assert losses.isnan().sum() == 1


@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 0.1, "softcap": 3.0, "label_smoothing": 0.1}], ids=["plain", "options"]
)
@every_reduction
def test_by_the_kernels(triton_backend, reduction, options):
    given = make((19,), 8, 40, torch.float32)
    found, right = both(given, reduction=reduction, **options)
    torch.testing.assert_close(found, right)
    upstream = torch.rand_like(found)
    mine = torch.autograd.grad(found, given[:3], upstream)
    torch.testing.assert_close(mine, torch.autograd.grad(right, given[:3], upstream), rtol=1e-5, atol=1e-6)
    assert triton_backend


# --- What it costs, before it does


def test_explain_linear():
    input, weight, bias, target = make((600,), 64, 1000, torch.float32)
    found = xent_ext.explain_linear(input, weight, target, linear_bias=bias)
    assert (found.implementation, found.traffic.schedule) == ("cpu", "chunks of rows")
    assert found.traffic.numbers == {"rows": 256, "chunks": 3, "products": 3}
    gradients = 4 * (600 * 64 + 1000 * 64 + 1000)
    assert found.traffic.memory == gradients + 4 * 256 * 1000
    numbers = xent_ext.explain_linear(input, weight.detach(), target, reduction="none", chunk_rows=100).traffic.numbers
    assert numbers == {"rows": 100, "chunks": 6, "products": 3}
    with torch.no_grad():
        numbers = xent_ext.explain_linear(input, weight, target).traffic.numbers
        assert numbers["products"] == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'inplace'"):
        xent_ext.explain_linear(input, weight, target, inplace=True)
    whole = xent_ext.explain_linear(input, weight.view(500, 2, 64), target)
    assert (whole.implementation, whole.traffic) == ("torch", None)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_explained_products_are_those_that_are_made(monkeypatch, reduction):
    input, weight, _, target = make((23,), ignored=0.0)
    products = []
    for place, name in ((linear.Walk, "logits"), (linear.Sums, "add_input"), (linear.Sums, "add_weight")):
        function = getattr(place, name)

        def counted(*args, name=name, function=function):
            products.append(name)
            return function(*args)

        monkeypatch.setattr(place, name, counted)
    xent_ext.linear_cross_entropy(input, weight, target, reduction=reduction, chunk_rows=5).sum().backward()
    numbers = xent_ext.explain_linear(input, weight, target, reduction=reduction, chunk_rows=5).traffic.numbers
    assert len(products) == numbers["products"] * numbers["chunks"]


# --- Errors


@pytest.mark.parametrize(
    ("kind", "match", "changes"),
    [
        (TypeError, "input must be a Tensor, got list", {"input": [1.0]}),
        (TypeError, "linear_bias must be a Tensor", {"linear_bias": 1.0}),
        (RuntimeError, r"input must have shape \(\*, D\)", {"input": torch.tensor(1.0)}),
        (RuntimeError, r"linear_weight must have shape \(C, D\)", {"linear_weight": torch.rand(8)}),
        (RuntimeError, r"equal last dimensions, got \(5, 8\) and \(11, 7\)", {"linear_weight": torch.rand(11, 7)}),
        (RuntimeError, r"linear_bias must have shape \(11,\), got \(8,\)", {"linear_bias": torch.rand(8)}),
        (RuntimeError, "linear_weight must have the dtype of input", {"linear_weight": torch.rand(11, 8).double()}),
        (RuntimeError, "on the device of input", {"linear_weight": torch.rand(11, 8, device="meta")}),
        (ValueError, r"Expected target size \(5,\)", {"target": torch.zeros(4, dtype=torch.long)}),
        (RuntimeError, r"Expected target size \(5,\)", {"target": torch.zeros(5, 3, dtype=torch.long)}),
        (RuntimeError, "expected target dtype to be Long", {"target": torch.zeros(5)}),
        (RuntimeError, "weight tensor should be defined", {"weight": torch.rand(8)}),
        (IndexError, r"Target 11 is out of bounds. target\[3\] is 11", {"target": torch.tensor([0, 1, 2, 11, 4])}),
        (ValueError, "reduction must be", {"reduction": "average"}),
        (ValueError, "chunk_rows must be positive, got 0", {"chunk_rows": 0}),
        (TypeError, "chunk_rows must be an int", {"chunk_rows": 2.5}),
        (ValueError, "accumulate_dtype must hold every value of torch.float32", {"accumulate_dtype": torch.bfloat16}),
        (RuntimeError, "sample_weight must have one factor for each row", {"sample_weight": torch.rand(4)}),
        (RuntimeError, r"\(B, T, D\), .*, got \(5, 8\)", {"shift": True}),
        (
            RuntimeError,
            r"\(1, 5, 11\) for class probabilities, .* input of shape \(1, 5, 8\), got \(5,\)",
            {"shift": True, "input": torch.rand(1, 5, 8)},
        ),
        (NotImplementedError, "input must be float16, .*, got torch.complex64", {"input": torch.rand(5, 8) + 0j}),
        (NotImplementedError, "got torch.int64", {"input": torch.ones(5, 8).long()}),
        (ValueError, "softcap must be positive", {"softcap": -1.0}),
    ],
)
def test_errors_come_before_any_product(monkeypatch, kind, match, changes):
    monkeypatch.setattr(linear.Walk, "logits", lambda *args: pytest.fail("a product was made"))
    arguments = {"input": torch.rand(5, 8), "linear_weight": torch.rand(11, 8), "target": torch.arange(5), **changes}
    with pytest.raises(kind, match=match):
        xent_ext.linear_cross_entropy(**arguments)


# --- Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory(dtype, monkeypatch):
    """Of logits there are a chunk's; beside them the gradients, and a few blocks on a CPU, which here are small."""
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 1 << 18)
    input, weight, bias, target = make((2048,), 64, 8192, dtype, ignored=0.0)
    chunk, gradients = 128 * 8192 * dtype.itemsize, (2048 + 8192) * 64 * dtype.itemsize
    options = {"linear_bias": bias, "chunk_rows": 128, "accumulate_dtype": dtype}

    def forward(**reduction):
        return xent_ext.linear_cross_entropy(input, weight, target, **options, **reduction)

    assert peak(torch.no_grad()(forward)) <= 2 * chunk
    for reduction in ("mean", "none"):
        most = peak(
            lambda reduction=reduction: torch.autograd.grad(forward(reduction=reduction).sum(), (input, weight, bias))
        )
        assert gradients + chunk <= most <= gradients + 2 * chunk


def peak(work):
    return machine.peak_memory(work, torch.device("cpu"))[1]
