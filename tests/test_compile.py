"""The loss in graphs: `torch.compile`, `torch.export`, and the operators that both see."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import TORCH, needs_gpu
from parity import DTYPES, REDUCTIONS, check, make, outcome, relaid
from test_kernels import small_tiles
from torch._dynamo.testing import CompileCounterWithBackend

import xent_ext
from xent_ext import backends, ops
from xent_ext.call import Arguments, prepare
from xent_ext.gradients import upstream_of

pytestmark = pytest.mark.skipif(not backends.RECENT, reason="this PyTorch's compiler can't trace the package")

both_targets = pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
all_reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler"
)
both_backends = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Head(torch.nn.Module):
    """A loss with something before it for a compiler to work on."""

    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, input, target):
        return self.criterion(2 * input, target)


def operators(graphs):
    """The operators of this package in Dynamo's graphs."""
    return [
        str(node.target) for graph in graphs for node in graph.graph.nodes if str(node.target).startswith("xent_ext")
    ]


def compiled(function, backend, **options):
    """The compiled function, and the counter of its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def check_compiled(input, target, weight, backend, *, dynamic=None, wanted=("input",), **options):
    """Assert that the compiled loss is as good as PyTorch's own; return the operators of all its graphs."""

    def loss(input, target, weight):
        return xent_ext.cross_entropy(input, target, weight, **options)

    function, counter = compiled(loss, backend, dynamic=dynamic)
    check(
        input,
        target,
        weight,
        function=lambda input, target, weight, **_: function(input, target, weight),
        wanted=wanted,
        **options,
    )
    return operators(counter.graphs)


# --- Results


OPTIONS = {
    "default": {},
    "ignore_index": {"ignore_index": 2},
    "label_smoothing": {"label_smoothing": 0.1},
    "all": {"ignore_index": 1, "label_smoothing": 0.3},
}


@both_backends
@all_reductions
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_class_indices(fused, device, backend, reduction, options, dynamic):
    """Every option, with one graph, and no further from the truth than PyTorch's own."""
    input, target, weight = make(
        (7, 5), weighted="all" in options, ignored=0.2, device=device, ignore_index=options.get("ignore_index", -100)
    )
    operators = check_compiled(input, target, weight, backend, dynamic=dynamic, reduction=reduction, **options)
    assert operators == ["xent_ext.forward"]
    assert fused


@both_backends
@all_reductions
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_probabilities(fused, device, backend, reduction, dynamic):
    input, target, weight = make((3, 5, 4), probabilities=True, weighted=True, device=device)
    operators = check_compiled(
        input, target, weight, backend, dynamic=dynamic, reduction=reduction, label_smoothing=0.1
    )
    assert operators == ["xent_ext.forward"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 5, 3, 2)], ids=str)
@all_reductions
def test_dtypes_and_shapes(fused, device, dtype, shape, reduction):
    input, target, weight = make(shape, dtype, weighted=True, device=device)
    assert check_compiled(input, target, weight, "aot_eager", reduction=reduction) == ["xent_ext.forward"]


@needs_compiler
@pytest.mark.parametrize(
    "memory",
    [{"order": (1, 0, 2, 3)}, {"order": (0, 2, 3, 1)}, {"step": 2, "padding": 1}, {"order": (3, 1, 0, 2), "step": 2}],
    ids=str,
)
def test_strides(fused, device, memory):
    """The gradient comes in the order that the graph was compiled for, also where the logits had to be copied."""
    input, target, _ = make((2, 5, 3, 4), device=device)
    input = relaid(input, **memory)
    assert check_compiled(input, target, None, "inductor") == ["xent_ext.forward"]


@both_targets
@all_reductions
@pytest.mark.parametrize("classes", [40, 516], ids=["short rows", "long rows"])
def test_kernels(triton_backend, monkeypatch, probabilities, reduction, classes):
    """The Triton kernels in a graph, in the interpreter if there is no GPU."""
    if classes > 40:
        small_tiles(monkeypatch)
    input, target, weight = make((2, classes), probabilities=probabilities, weighted=True)
    operators = check_compiled(input, target, weight, "aot_eager", reduction=reduction, label_smoothing=0.1)
    assert operators == ["xent_ext.forward"]
    assert triton_backend


def test_any_upstream_gradient_is_as_good_as_a_direct_one(fused, device):
    """A loss scale times a gradient that was rounded to float16 would be coarser: most of it would be subnormal."""
    input, target, _ = make((64, 50), torch.float16, device=device)
    function, _ = compiled(xent_ext.cross_entropy, "aot_eager")
    upstream = torch.tensor(65504.0, dtype=torch.float16, device=device)
    ours, _ = outcome(function, {"input": input, "target": target, "weight": None}, upstream=upstream)
    eager, _ = outcome(xent_ext.cross_entropy, {"input": input, "target": target, "weight": None}, upstream=upstream)
    assert torch.equal(ours["input"], eager["input"])


# --- Graphs and their number


@both_backends
@all_reductions
@pytest.mark.parametrize("criterion", ["function", "module"])
def test_one_graph_for_all_batch_sizes(fused, device, backend, reduction, criterion):
    """The first batch gives a graph for its size, the second one for every size."""
    if criterion == "module":
        head = Head(xent_ext.CrossEntropyLoss(reduction=reduction))
    else:
        head = Head(lambda input, target: xent_ext.cross_entropy(input, target, reduction=reduction))
    function, counter = compiled(head, backend)
    for rows in (7, 4, 9, 12, 300):
        input, target, _ = make((rows, 5), device=device)
        ours, upstream = outcome(function, {"input": input, "target": target})
        theirs, _ = outcome(
            xent_ext.cross_entropy,
            {"input": 2 * input, "target": target},
            upstream=upstream,
            options={"reduction": reduction},
        )
        torch.testing.assert_close(ours["loss"], theirs["loss"])
        torch.testing.assert_close(ours["input"], 2 * theirs["input"])
    assert operators(counter.graphs) == 2 * ["xent_ext.forward"]


@all_reductions
def test_only_the_logits_are_kept_for_backward(fused, device, reduction):
    input, target, _ = make((7, 500), device=device)
    leaf = input.requires_grad_()
    loss = compiled(Head(xent_ext.CrossEntropyLoss(reduction=reduction)), "aot_eager")[0](leaf, target)
    kept = [tensor for tensor in loss.grad_fn.saved_tensors if tensor.numel() >= input.numel()]
    assert len(kept) == 1


def test_without_a_gradient(fused, device):
    input, target, _ = make((7, 5), device=device)
    function, counter = compiled(xent_ext.cross_entropy, "aot_eager")
    expected = xent_ext.cross_entropy(input, target)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(function(input, target), expected)
    assert set(operators(counter.graphs)) == {"xent_ext.forward"}


def test_on_a_cpu_inductor_compiles_the_formula_of_pytorch():
    input, target, _ = make((7, 5))
    assert check_compiled(input, target, None, "aot_eager") == []


def test_gradients_for_other_arguments(fused):
    """What the implementations don't do goes to PyTorch's own, as it does without a compiler."""
    input, target, weight = make((7, 5), probabilities=True, weighted=True)
    assert check_compiled(input, target, weight, "aot_eager", wanted=("input", "target", "weight")) == []


def test_transforms_inside_a_graph(fused, device):
    input, target, _ = make((7, 5), device=device)

    def per_sample(input, target):
        return torch.func.vmap(torch.func.grad(xent_ext.cross_entropy))(input, target)

    torch.testing.assert_close(compiled(per_sample, "aot_eager")[0](input, target), per_sample(input, target))


def test_gradient_of_a_gradient(fused, device):
    """AOTAutograd has none; without it the operators' gradient is differentiable, as the function's is."""
    input, target, _ = make((7, 5), torch.float64, device=device)
    input.requires_grad_()

    def penalty(cross_entropy):
        (gradient,) = torch.autograd.grad(cross_entropy(input, target), input, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), input)[0]

    function, counter = compiled(xent_ext.cross_entropy, "eager")
    torch.testing.assert_close(penalty(function), penalty(F.cross_entropy))
    assert operators(counter.graphs) == ["xent_ext.forward"]


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_sizes_that_depend_on_data(fused, device):
    input, target, _ = make((7, 5), device=device)
    input.requires_grad_()

    def masked(input, target):
        mask = target > 1
        return xent_ext.cross_entropy(input[mask], target[mask])

    function, _ = compiled(masked, "aot_eager")
    (ours,) = torch.autograd.grad(function(input, target), input)
    (theirs,) = torch.autograd.grad(masked(input, target), input)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@all_reductions
def test_autocast(fused, device, dtype, reduction):
    """The loss is float32, and the operator reads the logits as they are."""
    input, target, _ = make((7, 5), dtype, device=device)

    def loss(input, target, weight, **options):
        with torch.autocast(device, torch.bfloat16):
            return xent_ext.cross_entropy(input, target, weight, **options)

    function, counter = compiled(loss, "aot_eager")
    tensors = {"input": input, "target": target, "weight": None}
    ours, upstream = outcome(function, tensors, options={"reduction": reduction})
    eager, _ = outcome(loss, tensors, options={"reduction": reduction}, upstream=upstream)
    assert ours["loss"].dtype == torch.float32
    assert ours["input"].dtype == dtype
    torch.testing.assert_close(ours, eager)
    (forward,) = [node for node in counter.graphs[0].graph.nodes if str(node.target) == "xent_ext.forward"]
    assert forward.args[0].meta["example_value"].dtype == dtype


# --- Errors


def test_a_class_out_of_range(cpu_blocks):
    """Found when the operator runs."""
    function, _ = compiled(xent_ext.cross_entropy, "aot_eager")
    input, target, _ = make((7, 5))
    function(input, target)
    target[3] = 5
    with pytest.raises(IndexError, match=r"target\[3\] is 5"):
        function(input, target)


def test_class_indices_are_checked_on_request(triton_backend, monkeypatch):
    function, _ = compiled(xent_ext.cross_entropy, "aot_eager")
    input, target, _ = make((7, 5))
    target[3] = 5
    assert function(input, target).isnan()
    monkeypatch.setattr(backends, "CHECK", True)
    with pytest.raises(IndexError, match=r"target\[3\] is 5"):
        function(input, target)


@pytest.mark.parametrize(
    ("target", "options", "error"),
    [
        (torch.zeros(6, dtype=torch.int64), {}, ValueError),
        (torch.zeros(7, dtype=torch.int32), {}, RuntimeError),
        (torch.zeros(7, dtype=torch.int64), {"label_smoothing": 2.0}, RuntimeError),
        (torch.zeros(7, dtype=torch.int64), {"reduction": "average"}, ValueError),
    ],
    ids=["batch size", "dtype", "label_smoothing", "reduction"],
)
def test_errors(fused, device, target, options, error):
    """A bad call can't be compiled, and where a graph may break raises what it raises without a compiler."""

    def loss(input, target):
        return xent_ext.cross_entropy(input, target, **options)

    arguments = torch.zeros(7, 5, device=device), target.to(device)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=error.__name__):
        compiled(loss, "eager")[0](*arguments)
    torch.compiler.reset()
    with pytest.raises(error):
        torch.compile(loss, backend="eager")(*arguments)


# --- The operators


def opcheck(input, target, weight, reduction, options=None, **which):
    arguments = Arguments(input.requires_grad_(), target, weight, None, -100, None, reduction, 0.1)
    opcheck_operators(*prepare(arguments, options), **which)


def opcheck_operators(problem, tensors, **which):
    """Check both operators: with gradients for all that require one, from the loss and from all statistics."""
    arguments = ops.arguments(problem, tensors)
    torch.library.opcheck(torch.ops.xent_ext.forward.default, arguments, **which)
    needed = [tensor is not None and tensor.requires_grad for tensor in tensors]
    with torch.no_grad():
        loss, stats = torch.ops.xent_ext.forward(*arguments)
        upstream = upstream_of(problem, torch.ones_like(loss), [torch.ones_like(stat) for stat in stats])
        torch.library.opcheck(torch.ops.xent_ext.backward.default, (*upstream, *arguments, needed), **which)


@both_targets
@all_reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 5, 3, 2)], ids=str)
def test_opcheck(fused, device, probabilities, reduction, dtype, shape):
    opcheck(*make(shape, dtype, probabilities=probabilities, weighted=True, device=device), reduction)


@all_reductions
@pytest.mark.parametrize("classes", [40, 516], ids=["short rows", "long rows"])
def test_opcheck_of_kernels(triton_backend, monkeypatch, reduction, classes):
    """What the schedules leave for backward, of sizes of their own, is no operator's result."""
    if classes > 40:
        small_tiles(monkeypatch)
    opcheck(*make((2, classes), weighted=True), reduction, test_utils=("test_schema", "test_faketensor"))


@both_targets
@pytest.mark.parametrize("strict", [False, True], ids=["tracing", "strict"])
@pytest.mark.skipif(TORCH < (2, 13), reason="older PyTorch exports no class probabilities of any batch size")
def test_export(fused, device, probabilities, strict):
    """With a dynamic batch size; a program holds PyTorch's own, and so runs where this package is not."""
    input, target, weight = make((7, 5), probabilities=probabilities, weighted=True, device=device)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        Head(xent_ext.CrossEntropyLoss(weight, label_smoothing=0.1)),
        (input, target),
        dynamic_shapes=({0: rows}, {0: rows}),
        strict=strict,
    )
    assert not operators([program.graph_module])
    for size in (4, 7):
        loss = program.module()(input[:size], target[:size])
        torch.testing.assert_close(loss, F.cross_entropy(2 * input[:size], target[:size], weight, label_smoothing=0.1))


# --- On a GPU


@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@all_reductions
def test_inductor_on_a_gpu(mode, reduction):
    """Also within the CUDA graphs of "reduce-overhead"."""
    head = Head(xent_ext.CrossEntropyLoss(reduction=reduction, label_smoothing=0.1))
    function = torch.compile(head, fullgraph=True, mode=mode)
    for seed in range(4):
        input, target, _ = make((64, 1000), torch.bfloat16, seed=seed, device="cuda")
        ours, upstream = outcome(function, {"input": input, "target": target})
        eager, _ = outcome(head, {"input": input, "target": target}, upstream=upstream)
        torch.testing.assert_close(ours, eager)
