"""The options for training in graphs, against the specification."""

import pytest
import torch
from conftest import needs_gpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import REDUCTIONS
from test_compile import (
    all_reductions,
    both_backends,
    compiled,
    needs_compiler,
    nothing_compiled,  # noqa: F401
    opcheck,
    operators,
)
from test_kernels import small_tiles
from test_options import (
    DIFFERENTIABLE,
    allowed,
    both_targets,
    call,
    combinations,
    each_option,
    on,
    outcome,
    plain,
    shifted_call,
)

import xent_ext
from xent_ext import backends
from xent_ext.call import Options

pytestmark = pytest.mark.skipif(not backends.RECENT, reason="this PyTorch's compiler can't trace the package")

EVERYTHING = {
    "logit_scale": "logit_scale",
    "softcap": 2.0,
    "z_loss": 0.3,
    "sample_weight": "sample_weight",
    "return_stats": True,
}


# --- Results


@both_backends
@each_option
@both_targets
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_each_option(fused, device, backend, probabilities, options, dynamic):
    """One graph, with the operator in it; numbers, too, are variables of a dynamic graph.

    The reduction is the operator's matter, so that one graph of the fastest compiler has each.
    """
    for reduction in REDUCTIONS if backend == "aot_eager" and not dynamic else ("mean",):
        args = on(device, call(probabilities=probabilities, **allowed({**options, "reduction": reduction})))
        function, counter = compiled(xent_ext.cross_entropy, backend, dynamic=dynamic)
        torch.testing.assert_close(outcome(function, args), outcome(plain, args))
        assert operators(counter.graphs) == ["xent_ext.forward"]
    assert fused


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=combinations(),
    shape=st.sampled_from([(5,), (7, 5), (2, 5, 3, 2)]),
    probabilities=st.booleans(),
    upstreams=st.sets(st.sampled_from(DIFFERENTIABLE)),
)
def test_combinations(fused, device, options, shape, probabilities, upstreams):
    """With the gradients of some of the statistics, joined with that of the loss."""
    torch.compiler.reset()
    args = on(device, call(shape, probabilities=probabilities, **options))
    function, _ = compiled(xent_ext.cross_entropy, "aot_eager")
    ours, theirs = (outcome(function, args, ("loss", *upstreams)) for function in (function, plain))
    torch.testing.assert_close(ours, theirs)


@both_backends
@all_reductions
def test_one_row(fused, device, backend, reduction):
    """Logits (C) have a 0-dim target, whose value no graph may ask for."""
    args = on(device, call((5,), ignored=0.0, reduction=reduction, **EVERYTHING))
    function, _ = compiled(xent_ext.cross_entropy, backend)
    torch.testing.assert_close(outcome(function, args), outcome(plain, args))
    assert fused


@both_backends
@all_reductions
@pytest.mark.parametrize("classes", [40, 516], ids=["short rows", "long rows"])
def test_kernels(triton_backend, monkeypatch, backend, reduction, classes):
    """The Triton kernels in a graph, in the interpreter if there is no GPU."""
    if classes > 40:
        small_tiles(monkeypatch)
    args = call((2, classes), ignored=0.0, reduction=reduction, **EVERYTHING)
    function, counter = compiled(xent_ext.cross_entropy, backend)
    torch.testing.assert_close(outcome(function, args), outcome(plain, args))
    assert operators(counter.graphs) == ["xent_ext.forward"]
    assert triton_backend


@all_reductions
@both_targets
def test_half_precision(fused, device, probabilities, reduction):
    """Float32 within, half precision only in the logits and their gradient."""
    args = on(device, call(dtype=torch.float16, probabilities=probabilities, reduction=reduction, **EVERYTHING))
    args["weight"] = None
    exact = {
        name: value.detach().double().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in args.items()
    }
    function, _ = compiled(xent_ext.cross_entropy, "aot_eager")
    ours, truth = outcome(function, {**args, "dtype": torch.float32}), outcome(plain, exact)
    for name, value in ours.items():
        rounding = torch.finfo(torch.float16 if name.startswith("d ") else torch.float32).eps
        torch.testing.assert_close(value.double(), truth[name].double(), rtol=8 * rounding, atol=8 * rounding)


@both_backends
@all_reductions
def test_shift(fused, device, backend, reduction):
    args = on(device, shifted_call(reduction=reduction, return_stats=True))
    function, counter = compiled(xent_ext.cross_entropy, backend)
    torch.testing.assert_close(outcome(function, args), outcome(xent_ext.cross_entropy, args))
    assert operators(counter.graphs) == ["xent_ext.forward"]


def test_in_place(fused, device):
    """A graph keeps the logits, whoever uses them besides, and whatever they are."""
    args = on(device, call(softcap=2.0, inplace=True))

    def twice(input, **args):
        return xent_ext.cross_entropy(input, **args) + input.square().sum()

    function, counter = compiled(twice, "aot_eager")
    expected = outcome(lambda inplace, **args: plain(**args) + args["input"].square().sum(), args)
    before = args["input"].detach().clone()
    torch.testing.assert_close(outcome(function, args), expected)
    assert torch.equal(args["input"], before)
    assert operators(counter.graphs) == ["xent_ext.forward"]


def by_row(cross_entropy, args, upstream):
    """The gradients of row losses for these upstream gradients."""
    names = [name for name, value in args.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    found = torch.autograd.grad(cross_entropy(**args, reduction="none"), [args[name] for name in names], upstream)
    return dict(zip(names, found, strict=True))


@both_targets
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.3, "sample_weight": "sample_weight"}], ids=["none", "some"])
def test_row_losses_are_differentiated_in_one_walk(fused, device, monkeypatch, probabilities, options):
    """As their sum is, weighted by the upstream gradients: finite or not, and whatever an ignored row has."""
    args = on(device, call((9, 5), probabilities=probabilities, ignored=0.0, **options))
    upstream = torch.randn(9, dtype=torch.float64, device=device)
    upstream[1:4] = torch.tensor([0.0, torch.inf, torch.nan])
    with torch.no_grad():
        args["input"][4] = torch.nan
        if not probabilities:
            args["target"][3:6] = -100
    function, _ = compiled(xent_ext.cross_entropy, "aot_eager")
    implementation = backends.implementation_for(args["input"])
    expected = by_row(xent_ext.cross_entropy, args, upstream)
    monkeypatch.setattr(implementation.Setup, "backward", None)
    torch.testing.assert_close(by_row(function, args, upstream), expected, equal_nan=True)


def test_statistics_alone(fused, device):
    """Nothing comes of the loss: the weights of the rows have no gradient, the logits have."""
    args = on(device, call(sample_weight="sample_weight", return_stats=True))
    function, _ = compiled(xent_ext.cross_entropy, "eager")

    def gradients(function):
        _, stats = function(**args)
        wanted = args["input"], args["sample_weight"]
        return torch.autograd.grad(stats.entropy.sum(), wanted, allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(gradients(function), gradients(plain))
    args["input"] = args["input"].detach()
    _, stats = function(**args)
    leaf = torch.autograd.grad(stats.entropy.sum(), args["sample_weight"], allow_unused=True, materialize_grads=True)
    assert not leaf[0].any()


def test_gradient_of_a_gradient(fused, device):
    """AOTAutograd has none; without it the operators' gradient is differentiable, as the function's is."""
    args = on(device, call(**EVERYTHING))
    leaves = args["input"], args["sample_weight"], args["logit_scale"]

    def penalty(cross_entropy):
        loss, stats = cross_entropy(**args)
        first = torch.autograd.grad(loss + stats.entropy.sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)

    function, _ = compiled(xent_ext.cross_entropy, "eager")
    torch.testing.assert_close(penalty(function), penalty(plain))


def test_on_a_cpu_inductor_compiles_the_plain_formula():
    function, counter = compiled(xent_ext.cross_entropy, "aot_eager")
    args = call(**EVERYTHING)
    torch.testing.assert_close(outcome(function, args), outcome(plain, args))
    assert operators(counter.graphs) == []


# --- Graphs and their number


@pytest.mark.parametrize("marked", [False, True], ids=["automatic", "mark_dynamic"])
@each_option
@both_targets
def test_one_graph_for_all_batch_sizes(fused, device, probabilities, options, marked):
    """The first batch gives a graph for its size, the second one for every size; if marked the first does."""
    function, counter = compiled(xent_ext.cross_entropy, "aot_eager")
    for rows in (7, 4, 9, 12, 300):
        args = on(device, call((rows, 5), probabilities=probabilities, **options))
        if marked:
            for name in {"input", "target", "sample_weight"} & args.keys():
                if isinstance(args[name], torch.Tensor):
                    torch._dynamo.mark_dynamic(args[name], 0)
        torch.testing.assert_close(outcome(function, args), outcome(plain, args))
    assert operators(counter.graphs) == (1 if marked else 2) * ["xent_ext.forward"]


@pytest.mark.parametrize("name", ["logit_scale", "softcap", "z_loss", "normalizer"])
def test_numbers_compile_nothing_anew(fused, device, name):
    """After the second value, as a number is compiled that is multiplied by a tensor."""
    function, counter = compiled(xent_ext.cross_entropy, "aot_eager")
    for value in (0.4, 0.5, 0.6, 0.7, 0.8):
        args = on(device, call(**{name: value}))
        torch.testing.assert_close(outcome(function, args), outcome(plain, args))
    assert operators(counter.graphs) == 2 * ["xent_ext.forward"]


# --- Errors


def test_a_class_out_of_range_with_shift(triton_backend, monkeypatch):
    monkeypatch.setattr(backends, "CHECK", True)
    function, _ = compiled(xent_ext.cross_entropy, "aot_eager")
    input, target = torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)
    target[1, 3] = 5
    with pytest.raises(IndexError, match=r"target\[1, 2\] is 5"):
        function(input, target, shift=True)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"softcap": -1.0}, ValueError),
        ({"z_loss": float("inf")}, ValueError),
        ({"normalizer": float("nan")}, ValueError),
        ({"sample_weight": torch.ones(3)}, RuntimeError),
        ({"return_stats": ("perplexity",)}, ValueError),
    ],
    ids=lambda value: next(iter(value), None) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_errors(triton_backend, options, error, dynamic):
    """A bad call can't be compiled, and where a graph may break raises what it raises without a compiler."""
    arguments = torch.zeros(7, 5), torch.zeros(7, dtype=torch.int64)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=error.__name__):
        compiled(xent_ext.cross_entropy, "eager", dynamic=dynamic)[0](*arguments, **options)
    torch.compiler.reset()
    with pytest.raises(error):
        torch.compile(xent_ext.cross_entropy, backend="eager", dynamic=dynamic)(*arguments, **options)


# --- The operators


def opcheck_call(args, **which):
    options = {name: value for name, value in args.items() if name in Options._fields}
    opcheck(args["input"], args["target"], args["weight"], args["reduction"], Options(**options), **which)


@each_option
@both_targets
@all_reductions
def test_opcheck(fused, device, probabilities, options, reduction):
    options = allowed({**options, "reduction": reduction})
    opcheck_call(on(device, call((4, 3), probabilities=probabilities, **options)))


@all_reductions
def test_opcheck_of_all_options(fused, device, reduction):
    opcheck_call(on(device, shifted_call(reduction=reduction, softcap=2.0, z_loss=0.1, return_stats=True)))


@all_reductions
@pytest.mark.parametrize("classes", [40, 516], ids=["short rows", "long rows"])
def test_opcheck_of_kernels(triton_backend, monkeypatch, reduction, classes):
    if classes > 40:
        small_tiles(monkeypatch)
    args = call((2, classes), ignored=0.0, reduction=reduction, **EVERYTHING)
    opcheck_call(args, test_utils=("test_schema", "test_faketensor"))


# --- On a GPU


@needs_gpu
@needs_compiler
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@all_reductions
def test_inductor_on_a_gpu(mode, reduction):
    """Also within the CUDA graphs of "reduce-overhead"."""
    function = torch.compile(xent_ext.cross_entropy, fullgraph=True, mode=mode)
    for seed in range(4):
        args = on("cuda", call((64, 1000), torch.float32, seed=seed, reduction=reduction, **EVERYTHING))
        ours, eager = (
            {name: value.clone() for name, value in outcome(cross_entropy, args).items()}
            for cross_entropy in (function, xent_ext.cross_entropy)
        )
        torch.testing.assert_close(ours, eager)
