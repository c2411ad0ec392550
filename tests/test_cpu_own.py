"""PyTorch's own loss on a CPU: which calls it takes, and half precision whose sums are right, whoever computes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, check, make, outcome, truth

import xent_ext
from xent_ext import backends, cpu_own, dispatch
from xent_ext.problem import Problem, Tensors

HALF = (torch.float16, torch.bfloat16)
half_dtypes = pytest.mark.parametrize("dtype", HALF, ids=str)
both_targets = pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])


@pytest.fixture(autouse=True)
def auto(monkeypatch):
    monkeypatch.setattr(backends, "BACKEND", "auto")
    monkeypatch.setattr(backends, "CHECK", False)


# --- Who takes a call


def taken_by(where, classes, count, dtype=torch.float32, column="gradient", label_smoothing=0.0):
    """The implementation of a call over so many rows of logits."""
    shape = (1, classes, count) if where == "strided" else (count, classes)
    input = torch.empty(shape[::-1] if where == "columns" else shape, dtype=dtype)
    input = (input.t() if where == "columns" else input).requires_grad_("forward" not in column)
    target = torch.empty(shape) if "dense" in column else torch.empty(shape[:1] + shape[2:], dtype=torch.int64)
    problem = Problem("dense" in column, "none" if column == "deferred" else "mean", -100, label_smoothing, dtype)
    return dispatch.route(Tensors(input, target), problem, with_options=False)[0]


# For each kind of logits where their classes are, and how many.
KINDS = {
    "few": ("last", 10),
    "short": ("last", 19),
    "medium": ("last", 100),
    "long": ("last", 1000),
    "columns": ("columns", 100),
    "strided few": ("strided", 2),
    "strided short": ("strided", 19),
    "strided": ("strided", 150),
    "strided long": ("strided", 2000),
}
each_kind = pytest.mark.parametrize(("where", "classes"), KINDS.values(), ids=KINDS)
each_column = pytest.mark.parametrize("column", cpu_own.Least._fields)


@each_kind
@each_column
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_take_what_is_large(where, classes, column, dtype):
    positions = -(-cpu_own.least_for_blocks(where, classes, dtype, 1, column) // classes)
    for count, name in ((positions, "cpu"), (positions - 1, "torch")):
        assert taken_by(where, classes, count, dtype, column) == name


@each_column
def test_so_many_strided_classes_blocks_never_take(column):
    assert taken_by("strided", cpu_own.MOST_STRIDED, 1000, torch.float32, column) == "torch"
    assert taken_by("last", cpu_own.MOST_STRIDED, 1000, torch.float32, column) == "cpu"


@each_kind
@each_column
def test_more_threads_need_more_logits(where, classes, column):
    """But no more than what PyTorch has mapped anew."""
    sizes = [cpu_own.least_for_blocks(where, classes, torch.float32, threads, column) for threads in (1, 2, 3, 64)]
    assert sizes == sorted(sizes)
    assert sizes[-1] <= cpu_own.MAPPED // 4


def test_each_kind_has_a_name():
    assert {name: cpu_own.kind(*numbers) for name, numbers in KINDS.items()} == {name: name for name in cpu_own.LEAST}


def test_a_gradient_that_is_not_wanted_does_not_count():
    rows = cpu_own.LEAST["long"][0].gradient // 1000 + 1
    assert taken_by("last", 1000, rows) == "cpu"
    with torch.no_grad():
        assert taken_by("last", 1000, rows) == "torch"


def test_smoothing_is_a_mass_of_all_classes():
    rows = cpu_own.LEAST["long"][0].gradient // 1000 + 1
    assert taken_by("last", 1000, rows, label_smoothing=0.1) == "torch"


def test_sizes_decide(monkeypatch):
    """Calls on both sides of the least size are right."""
    cpu_own.least_for_blocks.cache_clear()
    monkeypatch.setattr(cpu_own, "ALWAYS", 30)
    monkeypatch.setattr(cpu_own, "LEAST", dict.fromkeys(cpu_own.LEAST, (cpu_own.Least(100, 200, 300, 400, 500),) * 3))
    monkeypatch.setattr(cpu_own, "ALWAYS_OF_MORE", 30)
    for shape, dtype, probabilities in itertools.product(
        [(4, 5), (40, 5), (1, 400), (3, 50), (2, 50, 3), (400,)], DTYPES, [False, True]
    ):
        args = make(shape, dtype, probabilities=probabilities)
        check(*args)
        with torch.no_grad():
            check(*args, wanted=())
    cpu_own.least_for_blocks.cache_clear()


@pytest.mark.parametrize("input", ["text", None, 3], ids=str)
def test_what_is_no_tensor_is_not_decided_here(input):
    assert not dispatch.is_small(input, None, "mean", 0.0)


# --- Half precision


def loss_and_gradient(input, target, weight=None, function=xent_ext.cross_entropy, **options):
    tensors = {"input": input, "target": target, "weight": weight}
    upstream = torch.ones(()).to(input.dtype)
    found, _ = outcome(function, tensors, options=options, upstream=upstream)
    true = truth(**tensors, upstream=upstream, **options)
    return found["loss"], found["input"], true


@pytest.fixture(params=["pytorch's own", "blocks"])
def way(request, monkeypatch):
    """Both ways that a call may take, whatever its size."""
    monkeypatch.setattr(dispatch, "is_small", lambda *_: request.param != "blocks")


# (C) and (N, C) of few and of many classes, one row, images: each is computed in another way.
SHAPES = ((200,), (1, 200), (500, 10), (500, 200), (2, 10, 16, 16), (2, 200, 16, 16))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@half_dtypes
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("few_logits", [0, cpu_own.FEW_LOGITS])
def test_half_precision_is_added_up_in_float32(
    way, shape, dtype, weighted, ignored, label_smoothing, few_logits, monkeypatch
):
    """Of a sum of row losses each is rounded once at most, and the sum once more."""
    monkeypatch.setattr(cpu_own, "FEW_LOGITS", few_logits)
    args = make(shape, dtype, weighted=weighted, ignored=ignored)
    for reduction in ("mean", "sum"):
        loss, gradient, true = loss_and_gradient(*args, reduction=reduction, label_smoothing=label_smoothing)
        assert loss.dtype == gradient.dtype == dtype
        if (args[1] == -100).all():
            assert loss.isnan() if reduction == "mean" else loss == 0
            assert not gradient.any()
            continue
        allowed = torch.finfo(dtype).eps * true["loss"].magnitude
        assert abs(loss.item() - true["loss"].value) <= allowed


@half_dtypes
@both_targets
def test_half_precision_with_more_rows_than_it_counts(way, dtype, probabilities):
    """PyTorch's count of 65505 rows in float16 is infinite: the mean NaN or 0, the gradient 0."""
    args = make((70_000, 2), dtype, probabilities=probabilities)
    loss, gradient, true = loss_and_gradient(*args)
    assert abs(loss.item() - true["loss"].value) <= torch.finfo(dtype).eps * true["loss"].magnitude
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    largest = abs(true["input"].value).max()
    assert abs(gradient.abs().max().item() - largest) <= torch.finfo(dtype).eps * largest + smallest


def test_what_is_said_of_pytorchs_mean_in_half_precision():
    """NaN or 0 with a gradient of 0 in float16, off by up to a hundredth in bfloat16."""
    input, target, _ = make((70_000, 2), torch.float16)
    input.requires_grad_()
    loss = F.cross_entropy(input, target)
    assert loss.isnan() or loss == 0
    assert not torch.autograd.grad(loss, input)[0].any()
    errors = []
    for seed in range(20):
        input, target, _ = make((4096, 10), torch.bfloat16, seed=seed)
        exact = F.cross_entropy(input.double(), target)
        errors.append(abs(F.cross_entropy(input, target) - exact) / exact)
    assert 0.005 < max(errors) < 0.015


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_smoothing_of_many_classes_does_not_overflow(way, reduction):
    """PyTorch adds up the log-probabilities of all classes in float16."""
    input, target, _ = make((3, 30_000), torch.float16)
    loss = xent_ext.cross_entropy(input, target, reduction=reduction, label_smoothing=0.1)
    exact = F.cross_entropy(input.double(), target, reduction=reduction, label_smoothing=0.1)
    assert ((loss - exact).abs() <= torch.finfo(torch.float16).eps * exact).all()


@half_dtypes
@pytest.mark.parametrize("shape", [(200,), (500, 10), (700, 200), (2, 10, 16, 16), (2, 200, 16, 16)], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gradient", [False, True])
def test_probabilities_in_half_precision(way, shape, dtype, label_smoothing, gradient):
    """What sums all products at once is rounded there and in the mean."""
    input, target, _ = make(shape, dtype, probabilities=True)
    input.requires_grad_(gradient)
    for reduction in ("mean", "sum"):
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        loss = xent_ext.cross_entropy(input, target, **options)
        exact = truth(input, target, upstream=torch.ones(()), **options)["loss"]
        assert abs(loss.item() - exact.value) <= torch.finfo(dtype).eps * exact.magnitude


def test_many_losses_in_float16_do_not_overflow(way):
    """PyTorch adds up all products in float16, and divides that."""
    input, target, _ = make((20_000, 40), torch.float16, probabilities=True)
    loss = xent_ext.cross_entropy(input.detach(), target)
    torch.testing.assert_close(loss, F.cross_entropy(input.detach().float(), target.float()).half())


@half_dtypes
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_targets_in_any_strides(dtype, ignore_index):
    """A weight belongs to the class of its own row."""
    input, target, weight = make((40, 100, 20, 2), dtype, weighted=True)
    target = target.masked_fill(target % 7 == 0, ignore_index).permute(2, 1, 0).contiguous().permute(2, 1, 0)
    loss = xent_ext.cross_entropy(input, target, weight, ignore_index=ignore_index)
    exact = F.cross_entropy(input.double(), target, weight.double(), ignore_index=ignore_index)
    assert abs(loss - exact) <= torch.finfo(dtype).eps * exact


@half_dtypes
def test_autocast_stays_float32(way, dtype):
    input, target, _ = make((500, 200), dtype)
    with torch.autocast("cpu", dtype):
        loss = xent_ext.cross_entropy(input, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(input.float(), target))


@half_dtypes
@pytest.mark.parametrize("shape", [(7, 5), (7, 100)], ids=str)
def test_errors_of_half_precision_are_pytorchs(dtype, shape):
    """To compute in float32 makes nothing right that is wrong."""
    input, target, weight = make(shape, dtype, weighted=True)
    wrong = {
        "dtype of the weight": {"weight": weight.float()},
        "shape of the weight": {"weight": weight[1:]},
        "shape of the target": {"target": target[1:]},
        "dtype of the target": {"target": target.int()},
        "class": {"target": target + shape[1]},
    }
    for changes in wrong.values():
        arguments = {"input": input, "target": target, **changes}
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            F.cross_entropy(**arguments)
        with pytest.raises(theirs.type):
            xent_ext.cross_entropy(**arguments)


@half_dtypes
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_compiled_half_precision_is_added_up_in_float32(dtype, weighted):
    """A graph holds PyTorch's own formula, in float32 too."""
    input, target, weight = make((70_000, 2), dtype, weighted=weighted)
    compiled = torch.compile(xent_ext.cross_entropy, fullgraph=True, backend="eager")
    loss, gradient, true = loss_and_gradient(input, target, weight, function=compiled)
    assert loss.dtype == gradient.dtype == dtype
    assert abs(loss.item() - true["loss"].value) <= torch.finfo(dtype).eps * true["loss"].magnitude
    assert gradient.any()


@half_dtypes
@pytest.mark.parametrize("shape", [(70_000, 2), (30, 100), (700, 100)], ids=str)
def test_transforms_of_half_precision_are_added_up_in_float32(shape, dtype):
    """What neither blocks nor kernels take goes to PyTorch's own, by whatever way, and whatever its size."""
    input, target, _ = make(shape, dtype)
    loss = torch.func.vmap(xent_ext.cross_entropy)(input.unsqueeze(0), target.unsqueeze(0))
    exact = F.cross_entropy(input.double(), target)
    assert (loss - exact).abs() <= torch.finfo(dtype).eps * exact
