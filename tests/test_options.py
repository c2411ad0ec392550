"""The options for training: `reference` against plain PyTorch calls, everything else against `reference`."""

import collections.abc
import dataclasses
import itertools
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import DTYPES, REDUCTIONS, class_axis, make
from torch.autograd import gradcheck, gradgradcheck

import xent_ext
from bench import machine
from xent_ext import backends, cpu, dispatch, memory, reference

both_targets = pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
all_reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
SHAPES = ((5,), (7, 5), (70, 64), (3, 5, 4), (2, 5, 3, 2))
DIFFERENTIABLE = ("logprob", "lse", "entropy")
EVERY = (*reference.STATS, "accuracy")

# Each option alone. A name stands for a tensor of the call, see `call`.
ALONE = {
    "logit_scale": {"logit_scale": 0.7},
    "logit_scale tensor": {"logit_scale": "logit_scale"},
    "softcap": {"softcap": 2.0},
    "z_loss": {"z_loss": 0.3},
    "sample_weight": {"sample_weight": "sample_weight"},
    "normalizer": {"normalizer": 12.5},
    "normalizer tensor": {"normalizer": "normalizer"},
    "on_all_ignored": {"on_all_ignored": "zero"},
    "return_stats": {"return_stats": True},
}
each_option = pytest.mark.parametrize("options", ALONE.values(), ids=ALONE)


@st.composite
def combinations(draw):
    """Any options together, with any reduction and smoothing."""
    options = {"reduction": draw(st.sampled_from(REDUCTIONS)), "label_smoothing": draw(st.sampled_from((0.0, 0.2)))}
    for name in draw(st.sets(st.sampled_from(sorted(ALONE)))):
        options.update(ALONE[name])
    if "return_stats" in options:
        options["return_stats"] = draw(st.one_of(st.just(True), st.sets(st.sampled_from(EVERY), min_size=1).map(tuple)))
    return allowed(options)


def allowed(options):
    """Without a normalizer for a reduction that divides by nothing."""
    return options if options["reduction"] == "mean" else {k: v for k, v in options.items() if k != "normalizer"}


def call(shape=(7, 5), dtype=torch.float64, probabilities=False, *, ignored=0.3, seed=0, **options):
    """Arguments by name; all floating tensors but the normalizer and, for indices, the weight require grad."""
    input, target, weight = make(
        shape, dtype, probabilities=probabilities, weighted=True, ignored=ignored * (len(shape) > 1), seed=seed
    )
    axis = class_axis(shape)
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = {
        "sample_weight": torch.rand(shape[:axis] + shape[axis + 1 :], generator=generator).to(dtype).requires_grad_(),
        "logit_scale": torch.tensor(0.6, dtype=dtype, requires_grad=True),
        "normalizer": torch.tensor(11, dtype=torch.int64),
    }
    options = {name: tensors.get(value, value) if type(value) is str else value for name, value in options.items()}
    return {"input": input.requires_grad_(), "target": target, "weight": weight, **options}


def on(device, args):
    """The arguments of a call, on the device."""
    return {
        name: value.detach().to(device).requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in args.items()
    }


def flat(result):
    """The loss and the statistics that there are, by name."""
    if isinstance(result, torch.Tensor):
        return {"loss": result}
    loss, stats = result
    found = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
    return {"loss": loss, **{name: value for name, value in found.items() if value is not None}}


def outcome(function, args, upstreams=("loss", *DIFFERENTIABLE)):
    """All results by name, and the gradients of a random combination of those in `upstreams`."""
    found = flat(function(**args))
    generator = torch.Generator().manual_seed(5)
    total = 0
    for name, value in found.items():
        factor = torch.randn(value.shape, generator=generator)
        if name in upstreams:
            assert value.requires_grad
            total = total + (value * factor.to(value)).sum()
    leaves = {name: value for name, value in args.items() if isinstance(value, torch.Tensor) and value.requires_grad}
    gradients = torch.autograd.grad(total, list(leaves.values()))
    found = {name: value.detach() for name, value in found.items()}
    return found | {f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def plain(**args):
    """`xent_ext.cross_entropy` by the specification."""
    names = args.pop("return_stats", False)
    names = EVERY if names is True else tuple(names or ())
    wanted = tuple(name for name in reference.STATS if name in names or (name == "correct" and "accuracy" in names))
    if not names:
        return reference.cross_entropy(**args)
    loss, *values = reference.cross_entropy(**args, stats=wanted)
    found = dict(zip(wanted, values, strict=True))
    if "accuracy" in names:
        counted = torch.ones_like(found["correct"])
        if args["input"].shape != args["target"].shape:
            counted = args["target"] != args.get("ignore_index", -100)
        found["accuracy"] = found["correct"][counted].float().mean()
    return loss, xent_ext.CrossEntropyStats(**{name: found[name] for name in names})


def composed(
    input,
    target,
    weight,
    *,
    reduction="mean",
    label_smoothing=0.0,
    logit_scale=1.0,
    softcap=None,
    z_loss=0.0,
    sample_weight=None,
    normalizer=None,
    on_all_ignored="nan",
    return_stats=False,
):
    """The options by calls of PyTorch: its loss by row of transformed logits, its distribution's statistics."""
    z = input * logit_scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    axis = class_axis(input.shape)
    probabilities = input.shape == target.shape
    rows = F.cross_entropy(z, target, weight, reduction="none", label_smoothing=label_smoothing)
    counted = torch.ones_like(rows) if probabilities else (target != -100).to(rows)
    rows = rows + z_loss * torch.logsumexp(z, axis) ** 2 * counted
    share = torch.ones_like(counted)
    if not probabilities:
        share = weight[target.clamp(min=0)] * counted
    if sample_weight is not None:
        rows, share = rows * sample_weight, share * sample_weight
    divisor = share.sum() if normalizer is None else normalizer
    loss = rows.sum() / divisor
    if on_all_ignored == "zero" and divisor == 0:
        loss = rows.sum() * 0
    loss = {"none": rows, "sum": rows.sum(), "mean": loss}[reduction]
    if not return_stats:
        return loss
    distribution = torch.distributions.Categorical(logits=z.movedim(axis, -1))
    label = target.argmax(axis) if probabilities else target
    if probabilities:
        logprob = -F.cross_entropy(z, target, reduction="none")
    else:
        logprob = distribution.log_prob(target.clamp(min=0))
    kept = counted.bool()
    predicted = z.argmax(axis)
    stats = {
        "logprob": logprob * counted,
        "lse": torch.logsumexp(z, axis) * counted,
        "entropy": distribution.entropy() * counted,
        "max_prob": (distribution.probs.amax(-1) * counted).detach(),
        "predicted": torch.where(kept, predicted, -1),
        "correct": (predicted == label) & kept,
        "accuracy": (predicted == label)[kept].float().mean(),
    }
    names = EVERY if return_stats is True else return_stats
    return loss, xent_ext.CrossEntropyStats(**{name: stats[name] for name in names})


# --- The specification


@each_option
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_targets
def test_reference_is_a_composition_of_pytorch_calls(shape, probabilities, options):
    for reduction, label_smoothing in itertools.product(REDUCTIONS, (0.0, 0.2)):
        args = call(shape, probabilities=probabilities, **allowed({**options, "reduction": reduction}))
        args["label_smoothing"] = label_smoothing
        torch.testing.assert_close(outcome(plain, args), outcome(composed, args))


@settings(deadline=None, max_examples=80)
@given(options=combinations(), shape=st.sampled_from(SHAPES), probabilities=st.booleans(), seed=st.integers(0, 99))
def test_reference_in_combinations(options, shape, probabilities, seed):
    args = call(shape, probabilities=probabilities, seed=seed, **options)
    torch.testing.assert_close(outcome(plain, args), outcome(composed, args))


# --- The implementation


@each_option
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_targets
@all_reductions
def test_blocks(many_blocks, shape, probabilities, reduction, options):
    args = call(shape, probabilities=probabilities, **allowed({**options, "reduction": reduction}))
    torch.testing.assert_close(outcome(xent_ext.cross_entropy, args), outcome(plain, args))
    assert len(many_blocks) == 1


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=combinations(),
    shape=st.sampled_from(SHAPES),
    probabilities=st.booleans(),
    seed=st.integers(0, 99),
    upstreams=st.sets(st.sampled_from(DIFFERENTIABLE)),
)
def test_blocks_in_combinations(many_blocks, options, shape, probabilities, seed, upstreams):
    """With the gradients of some of the statistics, joined with that of the loss."""
    args = call(shape, probabilities=probabilities, seed=seed, **options)
    upstreams = ("loss", *upstreams)
    ours, theirs = (outcome(function, args, upstreams) for function in (xent_ext.cross_entropy, plain))
    torch.testing.assert_close(ours, theirs)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=combinations(), shape=st.sampled_from([(5,), (4, 3), (2, 3, 2)]), probabilities=st.booleans())
def test_gradcheck(many_blocks, options, shape, probabilities):
    """First derivatives through the blocks, second ones through the plain formula."""
    args = call(shape, probabilities=probabilities, **options)
    names = [name for name, value in args.items() if isinstance(value, torch.Tensor) and value.requires_grad]

    def results(*tensors):
        found = flat(xent_ext.cross_entropy(**args | dict(zip(names, tensors, strict=True))))
        return tuple(value for name, value in found.items() if name in ("loss", *DIFFERENTIABLE))

    tensors = tuple(args[name] for name in names)
    assert gradcheck(results, tensors)
    assert gradgradcheck(results, tensors)


def shifted_call(dtype=torch.float64, **options):
    """Arguments of a call with shift: logits (2, 4, 3)."""
    args = call((2, 3, 4), dtype, shift=True, logit_scale="logit_scale", sample_weight="sample_weight", **options)
    args["target"] = torch.tensor([[0, 1, -100, 2], [2, 0, 1, 1]])
    return args | {"input": args["input"].detach().mT.requires_grad_()}


@all_reductions
def test_gradcheck_of_shift(many_blocks, reduction):
    args = shifted_call(reduction=reduction, softcap=2.0, z_loss=0.1)

    def loss(input, sample_weight, logit_scale):
        tensors = {"input": input, "sample_weight": sample_weight, "logit_scale": logit_scale}
        return xent_ext.cross_entropy(**args | tensors)

    leaves = (args["input"], args["sample_weight"], args["logit_scale"])
    assert gradcheck(loss, leaves)
    assert gradgradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64], ids=str)
@both_targets
@all_reductions
def test_no_further_from_float64_than_pytorch(many_blocks, dtype, probabilities, reduction):
    """The options together, beside PyTorch's calls, which round to the dtype at every step."""
    options = {"softcap": 5.0, "z_loss": 0.1, "sample_weight": "sample_weight", "logit_scale": "logit_scale"}
    args = call((70, 64), dtype, probabilities, reduction=reduction, **options)
    wide = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in args.items()
    }
    true = outcome(plain, wide)
    ours, theirs = outcome(xent_ext.cross_entropy, args), outcome(composed, args)
    for name, value in true.items():
        error, their_error = ((found[name].double() - value).abs().max() for found in (ours, theirs))
        # Sums in another order, and what is computed in float32 is rounded once: a few epsilons of the largest value.
        assert ours[name].dtype == theirs[name].dtype
        assert error <= 2 * their_error + 4 * torch.finfo(dtype).eps * value.abs().max(), name


def test_batch_dimensions_of_any_strides(many_blocks):
    args = call((2, 5, 3, 4), sample_weight="sample_weight", return_stats=True, softcap=3.0)
    other = dict(args)
    other["input"] = args["input"].detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0).requires_grad_()
    other["sample_weight"] = args["sample_weight"].detach().mT.contiguous().mT.requires_grad_()
    torch.testing.assert_close(outcome(xent_ext.cross_entropy, other), outcome(plain, args))


# --- dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@all_reductions
def test_dtype_is_as_if_the_logits_had_been_cast(many_blocks, dtype, reduction):
    args = call((70, 64), dtype, reduction=reduction)
    args["weight"] = args["weight"].float()
    cast = {**args, "input": args["input"].detach().float().requires_grad_()}
    ours = outcome(xent_ext.cross_entropy, {**args, "dtype": torch.float32})
    theirs = outcome(xent_ext.cross_entropy, cast)
    assert ours["loss"].dtype == torch.float32
    assert torch.equal(ours["loss"], theirs["loss"])
    assert torch.equal(ours["d input"], theirs["d input"].to(dtype))
    args["weight"] = args["weight"].to(dtype)
    assert xent_ext.cross_entropy(**args, dtype=torch.float64).dtype == torch.float64


# --- Who divides by what


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("sample_weight", [None, torch.rand(7)])
def test_all_rows_ignored(monkeypatch, small, sample_weight):
    monkeypatch.setattr(dispatch, "is_small", lambda *_: small)
    input, target = torch.randn(7, 5, requires_grad=True), torch.full((7,), -100)
    for on_all_ignored, expected in (("nan", torch.nan), ("zero", 0.0)):
        loss = xent_ext.cross_entropy(
            input, target, sample_weight=sample_weight, on_all_ignored=on_all_ignored, z_loss=0.1
        )
        torch.testing.assert_close(loss.detach(), torch.tensor(expected), equal_nan=True)
        (gradient,) = torch.autograd.grad(loss, input)
        assert torch.equal(gradient, torch.zeros_like(gradient))


@both_targets
def test_what_belongs_to_ignored_rows_takes_no_part(many_blocks, probabilities):
    args = call(sample_weight="sample_weight", logit_scale="logit_scale", softcap=2.0, z_loss=0.2, return_stats=True)
    poisoned = dict(args)
    ignored = args["target"] == -100
    assert ignored.any()
    for name in ("input", "sample_weight"):
        value = args[name].detach().clone()
        value[ignored] = torch.nan
        poisoned[name] = value.requires_grad_()
    ours, theirs = outcome(xent_ext.cross_entropy, poisoned), outcome(xent_ext.cross_entropy, args)
    torch.testing.assert_close(ours, theirs)
    assert not ours["d input"][ignored].any()
    for name, blank in (("logprob", 0), ("lse", 0), ("entropy", 0), ("max_prob", 0), ("predicted", -1), ("correct", 0)):
        assert (ours[name][ignored] == blank).all()
    torch.testing.assert_close(outcome(plain, poisoned), ours)


def test_normalizer_of_every_kind(many_blocks):
    args = call()
    total = xent_ext.cross_entropy(**args, reduction="sum")
    for normalizer in (8, 8.0, torch.tensor(8), torch.tensor(8.0)):
        torch.testing.assert_close(xent_ext.cross_entropy(**args, normalizer=normalizer), total / 8)
    torch.testing.assert_close(
        xent_ext.cross_entropy(**args, normalizer=0, on_all_ignored="zero"), torch.zeros((), dtype=torch.float64)
    )


@pytest.mark.parametrize("ignored", [0.0, 0.5])
@both_targets
def test_sample_weights_of_0_that_are_learned(many_blocks, probabilities, ignored):
    args = call(probabilities=probabilities, ignored=ignored, on_all_ignored="zero", sample_weight="sample_weight")
    args["sample_weight"] = torch.zeros_like(args["sample_weight"], requires_grad=True)
    ours, theirs = outcome(xent_ext.cross_entropy, args), outcome(plain, args)
    torch.testing.assert_close(ours, theirs)
    assert not ours["d sample_weight"].any()


def test_a_mask_is_a_sample_weight(many_blocks):
    args = call(ignored=0.0)
    mask = torch.arange(7) < 4
    ours = xent_ext.cross_entropy(**args, sample_weight=mask)
    torch.testing.assert_close(ours, F.cross_entropy(args["input"][:4], args["target"][:4], args["weight"]))


def test_only_tensors_of_options_require_grad(many_blocks):
    """Frozen logits: the gradient of the scale and of the sample weights alone."""
    args = call(sample_weight="sample_weight", logit_scale="logit_scale", softcap=2.0)
    for name in ("sample_weight", "logit_scale"):
        only = {**args, "input": args["input"].detach(), name: args[name].detach()}
        torch.testing.assert_close(outcome(xent_ext.cross_entropy, only), outcome(plain, only))


def test_nothing_is_read_from_the_device():
    """Meta tensors have no values to read."""
    args = call(return_stats=True, on_all_ignored="zero", **ALONE["normalizer tensor"], **ALONE["sample_weight"])
    args = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in args.items()}
    args["logit_scale"] = torch.tensor(2.0, device="meta")
    found = flat(xent_ext.cross_entropy(**args))
    assert all(value.is_meta for value in found.values())


# --- Statistics


class Names(collections.abc.Sequence):
    """As those of configurations, which may change, and of which each is equal to itself alone."""

    def __init__(self, *names):
        self.names = names

    def __getitem__(self, index):
        return self.names[index]

    def __len__(self):
        return len(self.names)


LISTS = [("lse",), ("entropy", "correct"), ["accuracy"], Names("lse", "accuracy"), EVERY]


@pytest.mark.parametrize("names", LISTS, ids=lambda names: " ".join(names))
@both_targets
def test_only_the_statistics_asked_for(many_blocks, names, probabilities):
    args = call(probabilities=probabilities)
    loss, stats = xent_ext.cross_entropy(**args, return_stats=names)
    assert isinstance(stats, xent_ext.CrossEntropyStats)
    assert set(flat((loss, stats))) == {"loss", *names}
    torch.testing.assert_close(flat((loss, stats)), flat(plain(**args, return_stats=names)))


def test_names_are_read_in_each_call(many_blocks):
    names, args = Names("lse"), call()
    xent_ext.cross_entropy(**args, return_stats=names)
    names.names = ("entropy",)
    assert set(flat(xent_ext.cross_entropy(**args, return_stats=names))) == {"loss", "entropy"}


def test_ties_and_masked_logits(many_blocks):
    """The first of several largest; a class of probability 0 adds no entropy, and takes none of its gradient."""
    input = torch.tensor([[1.0, 3.0, 3.0, -torch.inf], [2.0, 2.0, 2.0, 2.0], [-torch.inf, 0.0, 1.0, 1.0]])
    target = torch.tensor([2, 0, 2])
    for block in (64, 4 << 20):
        cpu.BLOCK_BYTES = block  # `many_blocks` puts it back
        x = input.clone().requires_grad_()
        _, stats = xent_ext.cross_entropy(x, target, return_stats=True)
        assert stats.predicted.tolist() == [1, 0, 2]
        assert stats.correct.tolist() == [False, True, True]
        assert stats.accuracy == pytest.approx(2 / 3)
        p = input.softmax(-1)
        torch.testing.assert_close(stats.entropy, torch.special.entr(p).sum(-1))
        (gradient,) = torch.autograd.grad(stats.entropy.sum(), x)
        finite = input.clamp(min=-1e4).requires_grad_()  # of probability 0 too
        (expected,) = torch.autograd.grad(torch.distributions.Categorical(logits=finite).entropy().sum(), finite)
        torch.testing.assert_close(gradient, expected)


def test_statistics_of_half_precision_are_float32(many_blocks):
    _, stats = xent_ext.cross_entropy(**call((70, 64), torch.bfloat16), return_stats=True)
    assert {stats.lse.dtype, stats.logprob.dtype, stats.entropy.dtype, stats.max_prob.dtype} == {torch.float32}
    assert (stats.predicted.dtype, stats.correct.dtype) == (torch.int64, torch.bool)


def test_statistics_alone_have_gradients(many_blocks):
    """Nothing comes of the loss; the next backward of the loss alone is right."""
    args = call((70, 64))
    ours, theirs = (
        outcome(function, {**args, "return_stats": True}, DIFFERENTIABLE)
        for function in (xent_ext.cross_entropy, plain)
    )
    torch.testing.assert_close(ours, theirs)
    loss, stats = xent_ext.cross_entropy(**args, return_stats=("entropy",))
    (first,) = torch.autograd.grad(loss, args["input"], retain_graph=True)
    (second,) = torch.autograd.grad(loss + stats.entropy.sum(), args["input"])
    (entropy,) = torch.autograd.grad(plain(**args, return_stats=("entropy",))[1].entropy.sum(), args["input"])
    torch.testing.assert_close(second, first + entropy)


# --- Shift


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@both_targets
@all_reductions
@pytest.mark.parametrize("implementation", ["blocks", "plain"])
def test_shift(many_blocks, monkeypatch, dtype, probabilities, reduction, implementation):
    if implementation == "plain":
        monkeypatch.setattr(backends, "BACKEND", "torch")
    args = call((3, 5, 6), dtype, probabilities, sample_weight="sample_weight", reduction=reduction, return_stats=True)
    args["input"] = args["input"].detach().mT.contiguous().requires_grad_()  # (B, T, C)
    if probabilities:
        args["target"] = args["target"].mT
    by_hand = {
        **args,
        "input": args["input"].detach()[:, :-1].mT.requires_grad_(),
        "target": args["target"][:, 1:].mT if probabilities else args["target"][:, 1:],
        "sample_weight": args["sample_weight"].detach()[:, 1:].requires_grad_(),
    }
    ours, theirs = outcome(xent_ext.cross_entropy, {**args, "shift": True}), outcome(xent_ext.cross_entropy, by_hand)
    gradient, weights = ours.pop("d input"), ours.pop("d sample_weight")
    assert gradient.shape == args["input"].shape
    assert not gradient[:, -1].any()
    assert not weights[:, 0].any()
    torch.testing.assert_close(gradient[:, :-1].mT, theirs.pop("d input"))
    torch.testing.assert_close(weights[:, 1:], theirs.pop("d sample_weight"))
    torch.testing.assert_close(ours, theirs)


def test_one_position_shifts_to_nothing(many_blocks):
    input, target = torch.randn(2, 1, 5, requires_grad=True), torch.zeros(2, 1, dtype=torch.int64)
    assert xent_ext.cross_entropy(input, target, shift=True).isnan()
    assert xent_ext.cross_entropy(input, target, shift=True, reduction="none").shape == (2, 0)


# --- In place


class Layer(torch.autograd.Function):
    """Makes logits, and keeps the gradient that comes to it."""

    @staticmethod
    def forward(ctx, leaf, kept):
        ctx.kept = kept
        return leaf.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.kept.append(gradient)
        return None, None


def peak(work):
    return machine.peak_memory(work, torch.device("cpu"))[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "z_loss": 0.1}, {"shift": True}], ids=str)
def test_memory_in_place_is_a_few_blocks(cpu_blocks, monkeypatch, dtype, options):
    """Besides the logits, which become their gradient."""
    block = 1 << 16
    monkeypatch.setattr(cpu, "BLOCK_BYTES", block)
    monkeypatch.setattr(memory, "_buffers", threading.local())
    leaf = torch.randn(8, 256, 512, dtype=dtype).requires_grad_()
    target = torch.randint(512, (8, 256))
    made = []
    logits = Layer.apply(leaf, made)
    seen, labels = (logits, target) if "shift" in options else (logits.view(-1, 512), target.view(-1))

    def work():
        xent_ext.cross_entropy(seen, labels, inplace=True, **options).backward()

    foretold = xent_ext.explain(seen, labels, inplace=True, **options).traffic.memory
    used = peak(work)
    values_by_row = 20 * 2048 * 4
    assert used <= 6 * block + values_by_row < leaf.nbytes / 2
    assert foretold <= used
    assert made[0].data_ptr() == logits.data_ptr()


def test_memory_of_shift_is_the_gradient(cpu_blocks, monkeypatch):
    """One gradient of the full shape, no copy of the logits."""
    block = 1 << 16
    monkeypatch.setattr(cpu, "BLOCK_BYTES", block)
    input, target = torch.randn(8, 256, 512, requires_grad=True), torch.randint(512, (8, 256))

    def work():
        xent_ext.cross_entropy(input, target, shift=True).backward()

    assert peak(work) <= input.nbytes + 4 * block + 20 * 2048 * 4


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=combinations(),
    shape=st.sampled_from(SHAPES[1:]),
    probabilities=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
)
def test_in_place_gives_the_same_gradient(many_blocks, options, shape, probabilities, dtype):
    options["reduction"] = options["reduction"].replace("none", "sum")
    args = call(shape, dtype, probabilities, **allowed(options))

    def computed(**args):
        return xent_ext.cross_entropy(**args | {"input": args["input"] * 1})

    ours, theirs = (
        outcome(computed, {**args, "inplace": inplace, "reduction": args["reduction"]}, ("loss",))
        for inplace in (True, False)
    )
    # The stored gradient is multiplied by the upstream one: a rounding more.
    torch.testing.assert_close(
        ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-12 if dtype == torch.float64 else 1e-3
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_in_place_with_shift(many_blocks, reduction):
    args = shifted_call(reduction=reduction, softcap=2.0)

    def computed(inplace, input, **args):
        return xent_ext.cross_entropy(input * 1, **args, inplace=inplace)

    ours, theirs = (outcome(computed, {**args, "inplace": inplace}) for inplace in (True, False))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("classes", [5, 64])
def test_in_place_expects_the_last_factor(many_blocks, classes):
    """From the second step on the gradient is that of a direct computation, to the bit; also after a factor of 0."""
    input, target, _ = make((70, classes), torch.bfloat16)
    leaf = input.requires_grad_()
    inplace, usual = xent_ext.CrossEntropyLoss(inplace=True), xent_ext.CrossEntropyLoss()
    for factor in (65504.0, 65504.0, 0.0, 0.0, torch.inf, 3.0, 3.0):
        ours, theirs = (
            torch.autograd.grad(module(leaf * 1, target), leaf, torch.tensor(factor).bfloat16())[0]
            for module in (inplace, usual)
        )
        if factor in (65504.0, 3.0):
            torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


def test_in_place_another_use_raises(many_blocks):
    leaf, target, _ = make((7, 5))
    leaf.requires_grad_()

    def fresh():
        logits = leaf * 1
        return logits, xent_ext.cross_entropy(logits, target, inplace=True)

    logits, loss = fresh()
    with pytest.raises(RuntimeError, match="used after cross_entropy"):
        (loss + logits.logsumexp(1).sum()).backward()

    logits = leaf.exp()  # exp saves its result
    loss = xent_ext.cross_entropy(logits, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    logits, loss = fresh()
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    whole = leaf * 1  # a view's base is another use too
    loss = xent_ext.cross_entropy(whole.view(7, 5), target, inplace=True)
    with pytest.raises(RuntimeError, match="used after cross_entropy"):
        (loss + whole.sum()).backward()


@pytest.mark.parametrize("seen", ["logits", "view", "slice", "retained view"])
def test_in_place_refuses_what_retains_its_gradient(many_blocks, seen):
    """It would be None. What asks for the gradient in another way gets it."""
    leaf, target, _ = make((7, 5))
    logits = leaf.requires_grad_() * 1
    views = {"view": logits.view(7, 5), "slice": logits[:6], "retained view": logits.view(7, 5)}
    last = views.get(seen, logits)
    (last if seen == "retained view" else logits).retain_grad()
    with pytest.raises(RuntimeError, match=r"inplace=True .* retain_grad\(\)"):
        xent_ext.cross_entropy(last, target[: len(last)], inplace=True)

    logits, hooked = leaf * 1, []
    logits.register_hook(lambda gradient: hooked.append(gradient.clone()))
    between = logits.view(35)
    between.retain_grad()
    xent_ext.cross_entropy(between.view(7, 5), target, inplace=True).backward()
    for gradient in (*hooked, between.grad.view(7, 5)):
        torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(("hooked", "kind"), [("model", "hook"), ("model", "pre_hook"), ("criterion", "hook")])
def test_in_place_behind_a_full_backward_hook(many_blocks, hooked, kind):
    """The reason is said, also where the logits are a view of the hook's; and what is said helps."""
    model, criterion = torch.nn.Linear(3, 5), xent_ext.CrossEntropyLoss(inplace=True)
    module = {"model": model, "criterion": criterion}[hooked]
    getattr(module, f"register_full_backward_{kind}")(lambda *_: None)
    logits, target = model(torch.randn(7, 3)), torch.zeros(7, dtype=torch.int64)
    for seen in (logits, logits.view(-1, 5), logits[:, :4].mT.mT):
        with pytest.raises(RuntimeError, match=r"inplace=True .* a full backward hook of a module"):
            criterion(seen, target)
    if hooked == "model":
        criterion(logits.clone(), target).backward()


def test_in_place_what_made_a_view_is_said(many_blocks):
    class Viewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input):
            return input.view_as(input)

    model, target = torch.nn.Linear(3, 5), torch.zeros(2, dtype=torch.int64)
    model.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    plain, behind = torch.randn(4, 5, requires_grad=True) * 1, model(torch.randn(2, 3))
    with torch.no_grad():
        quiet = plain[:2]
    for view, origin in (
        (Viewed.apply(behind), "by a custom function"),
        (plain.chunk(2)[0], "by split, chunk or unbind"),
        (quiet.view(2, 5), "under no_grad"),
    ):
        with pytest.raises(RuntimeError, match=f"inplace=True .* was made {origin}$"):
            xent_ext.cross_entropy(view, target, inplace=True)


def test_in_place_what_needs_the_logits_raises(many_blocks):
    leaf, target, _ = make((7, 5))
    leaf.requires_grad_()

    def fresh(**options):
        return xent_ext.cross_entropy(leaf * 1, target, inplace=True, **options)

    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(fresh(), leaf, create_graph=True)
    loss = fresh()
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf)
    loss, stats = fresh(return_stats=True)
    with pytest.raises(RuntimeError, match="statistic"):
        torch.autograd.grad(loss + stats.lse.sum(), leaf)


def test_in_place_without_a_gradient_keeps_the_logits(many_blocks):
    input, target, _ = make((7, 5))
    before = input.clone()
    scale = torch.tensor(2.0, requires_grad=True)
    xent_ext.cross_entropy(input, target, inplace=True)
    xent_ext.cross_entropy(input, target, inplace=True, logit_scale=scale).backward()
    with torch.no_grad():
        xent_ext.cross_entropy(input.clone().requires_grad_(), target, inplace=True)
    assert torch.equal(input, before)


# --- Errors

X, T = torch.randn(3, 5), torch.tensor([1, 2, -100])
WRONG = {
    "dtype no dtype": (TypeError, {"dtype": "float32"}),
    "dtype no float": (ValueError, {"dtype": torch.int64}),
    "dtype narrower": (ValueError, {"dtype": torch.bfloat16}),
    "logit_scale string": (TypeError, {"logit_scale": "1"}),
    "logit_scale bool": (TypeError, {"logit_scale": True}),
    "logit_scale infinite": (ValueError, {"logit_scale": float("inf")}),
    "logit_scale shape": (RuntimeError, {"logit_scale": torch.ones(1)}),
    "logit_scale device": (RuntimeError, {"logit_scale": torch.ones((), device="meta")}),
    "softcap zero": (ValueError, {"softcap": 0.0}),
    "softcap tensor": (TypeError, {"softcap": torch.tensor(5.0)}),
    "softcap NaN": (ValueError, {"softcap": float("nan")}),
    "z_loss negative": (ValueError, {"z_loss": -1e-4}),
    "z_loss None": (TypeError, {"z_loss": None}),
    "sample_weight list": (TypeError, {"sample_weight": [1.0, 1.0, 1.0]}),
    "sample_weight shape": (RuntimeError, {"sample_weight": torch.ones(3, 1)}),
    "sample_weight complex": (TypeError, {"sample_weight": torch.ones(3, dtype=torch.complex64)}),
    "sample_weight device": (RuntimeError, {"sample_weight": torch.ones(3, device="meta")}),
    "normalizer sum": (ValueError, {"normalizer": 3, "reduction": "sum"}),
    "normalizer shape": (RuntimeError, {"normalizer": torch.ones(3)}),
    "normalizer grad": (RuntimeError, {"normalizer": torch.ones((), requires_grad=True)}),
    "normalizer list": (TypeError, {"normalizer": [3]}),
    "on_all_ignored name": (ValueError, {"on_all_ignored": "mean"}),
    "inplace number": (TypeError, {"inplace": 1}),
    "inplace none": (ValueError, {"inplace": True, "reduction": "none"}),
    "inplace leaf": (RuntimeError, {"inplace": True, "input": X.clone().requires_grad_()}),
    "inplace expanded": (
        RuntimeError,
        {"inplace": True, "input": torch.ones(5, requires_grad=True).mul(1).expand(3, 5)},
    ),
    "inplace overlapping": (
        RuntimeError,
        {"inplace": True, "input": torch.ones(9, requires_grad=True).mul(1).as_strided((3, 5), (2, 1))},
    ),
    "inplace chunk": (
        RuntimeError,
        {"inplace": True, "input": torch.ones(6, 5, requires_grad=True).mul(1).chunk(2)[0]},
    ),
    "return_stats name": (ValueError, {"return_stats": ("lse", "perplexity")}),
    "return_stats string": (TypeError, {"return_stats": "lse"}),
    "return_stats bytes": (TypeError, {"return_stats": b"lse"}),
    "return_stats set": (TypeError, {"return_stats": {"lse"}}),
    "shift None": (TypeError, {"shift": None}),
    "shift rank": (RuntimeError, {"shift": True}),
    "shift target": (
        RuntimeError,
        {"shift": True, "input": torch.ones(2, 4, 5), "target": torch.zeros(2, 3, dtype=torch.int64)},
    ),
    "shift sample_weight": (
        RuntimeError,
        {
            "shift": True,
            "input": torch.ones(2, 4, 5),
            "target": torch.zeros(2, 4, dtype=torch.int64),
            "sample_weight": torch.ones(2, 3),
        },
    ),
}


@pytest.mark.parametrize(("kind", "options"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_named(kind, options, request):
    name = request.node.callspec.id.split()[0]
    name = "target" if "shift target" in request.node.callspec.id else name
    with pytest.raises(kind, match=name):
        xent_ext.cross_entropy(**{"input": X, "target": T, **options})


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_class_indices_out_of_range(monkeypatch, backend):
    monkeypatch.setattr(backends, "BACKEND", backend)
    for options in ({"softcap": 2.0}, {"weight": torch.ones(5), "z_loss": 0.1}):
        with pytest.raises(IndexError, match="Target 5 is out of bounds"):
            xent_ext.cross_entropy(X, torch.tensor([1, 5, -100]), **options)
        xent_ext.explain(X, torch.tensor([1, 5, -100]), **options)  # says nothing of values


def test_unsigned_class_indices(many_blocks):
    """No uint8 is an ignore_index of -100, though 156 has its bits."""
    input, target = torch.randn(3, 200), torch.tensor([156, 3, 199])
    ours, theirs = (flat(xent_ext.cross_entropy(input, t, return_stats=True)) for t in (target.byte(), target))
    torch.testing.assert_close(ours, theirs)


def test_unknown_keywords():
    for function in (xent_ext.cross_entropy, xent_ext.explain):
        with pytest.raises(TypeError, match="unexpected keyword argument 'softcaps'"):
            function(X, T, softcaps=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'softcaps'"):
        xent_ext.CrossEntropyLoss(softcaps=1.0)


# --- The module, and who takes a call


def test_module(many_blocks):
    args = call(sample_weight="sample_weight", logit_scale="logit_scale", normalizer="normalizer")
    module = xent_ext.CrossEntropyLoss(args["weight"], softcap=3.0, z_loss=0.1, return_stats=("lse",))
    assert repr(module) == "CrossEntropyLoss(softcap=3.0, z_loss=0.1, return_stats=('lse',))"
    copied = pickle.loads(pickle.dumps(module))
    assert repr(copied) == repr(module)
    assert list(module.state_dict()) == ["weight"]
    without, base = xent_ext.CrossEntropyLoss(softcap=None, z_loss=0.0), torch.nn.CrossEntropyLoss()
    assert vars(without).keys() == vars(base).keys()
    expected = outcome(xent_ext.cross_entropy, {**args, "softcap": 3.0, "z_loss": 0.1, "return_stats": ("lse",)})

    def called(weight, **args):
        return copied(**args)

    torch.testing.assert_close(outcome(called, args), expected)
    with pytest.raises(TypeError, match="logit_scale"):
        xent_ext.CrossEntropyLoss(logit_scale=args["logit_scale"])


def test_defaults_given_are_no_options(monkeypatch):
    """They leave a small call to PyTorch's own."""
    monkeypatch.setattr(backends, "BACKEND", "auto")
    defaults = {"dtype": None, "logit_scale": 1.0, "softcap": None, "z_loss": 0.0, "return_stats": False}
    assert xent_ext.explain(X, T, **defaults).implementation == "torch"
    assert xent_ext.explain(X, T, softcap=3.0).implementation == "cpu"
    monkeypatch.setattr(backends, "BACKEND", "torch")
    assert xent_ext.explain(X, T, softcap=3.0).implementation == "plain"


@each_option
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_plain_formula_takes_what_nothing_else_does(monkeypatch, backend, options):
    monkeypatch.setattr(backends, "BACKEND", backend)
    args = call(**options)
    torch.testing.assert_close(outcome(xent_ext.cross_entropy, args), outcome(plain, args))


def test_transforms(many_blocks):
    args = call((4, 3), ignored=0.0, softcap=2.0, z_loss=0.1)

    def loss(input):
        return xent_ext.cross_entropy(**{**args, "input": input})

    expected = torch.autograd.grad(loss(args["input"]), args["input"])[0]
    torch.testing.assert_close(torch.func.grad(loss)(args["input"].detach()), expected)


def test_overrides_see_the_options():
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append((function, kwargs))
            return super().__torch_function__(function, types, args, kwargs or {})

    xent_ext.cross_entropy(X.as_subclass(Watched), T, softcap=2.0)
    assert seen[0][0] is xent_ext.cross_entropy
    assert seen[0][1]["softcap"] == 2.0
