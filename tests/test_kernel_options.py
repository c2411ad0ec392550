"""The options for training in the Triton kernels, every schedule, against the specification.

They run where `test_kernels` runs.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import REDUCTIONS, make
from test_kernels import DEVICE, compiled_only, force, not_emulated, small_tiles
from test_options import (
    DIFFERENTIABLE,
    allowed,
    both_targets,
    call,
    combinations,
    each_option,
    flat,
    on,
    outcome,
    plain,
)
from torch.autograd import gradcheck

import xent_ext

pytestmark = pytest.mark.usefixtures("triton_backend")

# Several rows to a tile; a body and a rest; rows that are neighbours in memory.
RESIDENT = ((7, 5), (5, 40), (2, 19, 3, 2))
# With small tiles: several blocks; rows that start at any element and have ends, in the dtypes that have vectors.
STREAMED = ((3, 264), (3, 515))


@pytest.fixture(params=["resident", "streaming", "split"])
def shapes(request, monkeypatch):
    """Logits for each schedule."""
    if request.param == "resident":
        return RESIDENT
    small_tiles(monkeypatch)
    force(monkeypatch, request.param)
    return STREAMED


def on_device(args):
    """The arguments of a call, on the device that the kernels run on."""
    return on(DEVICE, args)


def compare(args, upstreams=("loss", *DIFFERENTIABLE), **tolerances):
    args = on_device(args)
    ours, theirs = (outcome(function, args, upstreams) for function in (xent_ext.cross_entropy, plain))
    torch.testing.assert_close(ours, theirs, **tolerances)


@not_emulated
@each_option
@both_targets
def test_each_option(triton_backend, shapes, probabilities, options):
    for reduction, shape in zip(REDUCTIONS, (*shapes, *shapes), strict=False):
        args = call(shape, probabilities=probabilities, **allowed({**options, "reduction": reduction}))
        compare({**args, "label_smoothing": 0.2 if len(shape) == 2 else 0.0})
    assert len(triton_backend) == 3


@not_emulated
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=combinations(),
    which=st.integers(0, 2),
    probabilities=st.booleans(),
    upstreams=st.sets(st.sampled_from(DIFFERENTIABLE)),
)
def test_combinations(shapes, options, which, probabilities, upstreams):
    """With the gradients of some of the statistics, joined with that of the loss."""
    args = call(shapes[which % len(shapes)], probabilities=probabilities, **options)
    compare(args, ("loss", *upstreams))


@not_emulated
@each_option
@both_targets
def test_gradcheck(probabilities, options):
    args = on_device(call((2, 3), probabilities=probabilities, **options))
    names = [name for name, value in args.items() if torch.is_tensor(value) and value.requires_grad]

    def results(*tensors):
        found = flat(xent_ext.cross_entropy(**args | dict(zip(names, tensors, strict=True))))
        return tuple(value for name, value in found.items() if name in ("loss", *DIFFERENTIABLE))

    assert gradcheck(results, tuple(args[name] for name in names))


@both_targets
def test_half_precision(shapes, probabilities):
    """All options at once: float32 within, half precision only in the logits and their gradient."""
    options = {"softcap": 5.0, "z_loss": 0.1, "sample_weight": "sample_weight", "return_stats": True}
    args = call(shapes[-1], torch.float16, probabilities, **options) | {"weight": None}
    exact = {
        name: value.detach().double().requires_grad_()
        if torch.is_tensor(value) and value.is_floating_point()
        else value
        for name, value in args.items()
    }
    args["dtype"] = torch.float32
    ours = outcome(xent_ext.cross_entropy, on_device(args))
    truth = outcome(plain, on_device(exact))
    for name, value in ours.items():
        rounding = torch.finfo(torch.float16 if name.startswith("d ") else torch.float32).eps
        torch.testing.assert_close(value.double(), truth[name].double(), rtol=8 * rounding, atol=8 * rounding)


@not_emulated
@pytest.mark.parametrize("reduction", ["mean", "none"])
@both_targets
def test_shift(shapes, reduction, probabilities):
    classes = shapes[1][1]
    args = call((2, classes, 4), probabilities=probabilities, reduction=reduction, sample_weight="sample_weight")
    args["input"] = args["input"].detach().mT.contiguous().requires_grad_()  # (B, T, C)
    if probabilities:
        args["target"] = args["target"].mT
    by_hand = {
        **args,
        "input": args["input"].detach()[:, :-1].mT.requires_grad_(),
        "target": args["target"][:, 1:].mT if probabilities else args["target"][:, 1:],
        "sample_weight": args["sample_weight"].detach()[:, 1:].requires_grad_(),
    }
    ours = outcome(xent_ext.cross_entropy, {**on_device(args), "shift": True})
    theirs = outcome(plain, on_device(by_hand))
    gradient = ours.pop("d input")
    assert not gradient[:, -1].any()
    torch.testing.assert_close(gradient[:, :-1].mT, theirs.pop("d input"))
    torch.testing.assert_close(ours.pop("d sample_weight")[:, 1:], theirs.pop("d sample_weight"))
    torch.testing.assert_close(ours, theirs)


@not_emulated
def test_in_place(shapes):
    """The gradient takes the memory of the logits, also for an upstream gradient that was not expected."""
    for shape in shapes:
        args = on_device(call(shape, torch.float32, softcap=9.0, logit_scale="logit_scale"))
        leaf = args.pop("input")
        for factor in (1.0, 0.25):
            logits = leaf * 1
            caught = []
            logits.grad_fn.register_prehook(lambda grads, caught=caught: caught.append(grads[0]))
            loss = xent_ext.cross_entropy(logits, **args, inplace=True)
            memory = logits.data_ptr()
            (loss * factor).backward()
            assert caught[0].data_ptr() == memory
        found = leaf.grad / 1.25, args["logit_scale"].grad / 1.25
        expected = torch.autograd.grad(plain(input=leaf, **args), (leaf, args["logit_scale"]))
        torch.testing.assert_close(found, expected)
        leaf.grad = args["logit_scale"].grad = None


def test_in_place_reads_the_target_before_it_is_overwritten(shapes):
    """Its logit is read by every thread of a program, and by none after another has written there."""
    input, target, _ = make(shapes[-1], torch.float16, device=DEVICE)
    leaf = input.requires_grad_()
    losses = [xent_ext.cross_entropy(leaf * 1, target, inplace=inplace) for inplace in (True, False)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


@not_emulated
def test_all_ignored(shapes):
    args = call(shapes[-1], ignored=2.0, on_all_ignored="zero", return_stats=True, sample_weight="sample_weight")
    args["sample_weight"].data.fill_(torch.nan)  # belongs to ignored rows alone
    compare(args, equal_nan=True)


@not_emulated
def test_ties_and_masked_logits(shapes):
    """The first of several largest; NaN counts as the largest, as torch.argmax has it; p log p is 0 at p = 0."""
    args = call(shapes[1], torch.float64, ignored=0.0, return_stats=True)
    x = args["input"].detach()
    classes = x.shape[1]
    x[0, [2, classes - 1]] = 50.0
    x[1, classes // 2 :] = -torch.inf
    args["target"][1] = 0
    x[2, [classes // 3, classes - 2]] = torch.nan
    compare(args, equal_nan=True)


@not_emulated
def test_a_bad_class_is_nan_where_there_are_weights():
    """Nothing is read out of bounds for the gradient of the weights of rows."""
    args = on_device(call((7, 5), ignored=0.0, sample_weight="sample_weight", reduction="none"))
    args["target"][2] = 5
    loss = xent_ext.cross_entropy(**args)
    (gradient,) = torch.autograd.grad(loss.sum(), args["sample_weight"])
    assert gradient.isnan().tolist() == loss.isnan().tolist() == [row == 2 for row in range(7)]
    (gradient,) = torch.autograd.grad(xent_ext.cross_entropy(**{**args, "reduction": "mean"}), args["sample_weight"])
    assert gradient.isnan().all()


@compiled_only
def test_a_call_without_options_compiles_without_them():
    """No pointer of an option is an argument of what is compiled, and nothing that belongs to one is there."""
    from xent_ext.kernels.resident import resident

    input, target, _ = make((64, 1000), torch.bfloat16, device=DEVICE)
    resident.device_caches.clear()
    xent_ext.cross_entropy(input.requires_grad_(), target).backward()
    kernels = [kernel for cache in resident.device_caches.values() for kernel in cache[0].values()]
    assert kernels
    for kernel in kernels:
        assert "tanh" not in kernel.asm["ttir"]
        for name in ("sample_weight", "logit_scale", "softcap", "z_loss", "stats", "predicted", "slope"):
            assert f"%{name}_ptr" not in kernel.asm["ttir"]
