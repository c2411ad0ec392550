"""The specification itself, against its words written out and against PyTorch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, REDUCTIONS, SHAPES, check, class_axis, make

from xent_ext import reference

both_targets = pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])


def check_each(*args, **options):
    """With every reduction and smoothing."""
    for reduction, label_smoothing in itertools.product(REDUCTIONS, (0.0, 0.1, 1.0)):
        options |= {"reduction": reduction, "label_smoothing": label_smoothing}
        check(*args, function=reference.cross_entropy, **options)


def composed(input, target, weight, *, ignore_index, reduction, label_smoothing):
    """The target mass b made in full, one row after the other; the rest is a product and a sum."""
    axis, eps = class_axis(input.shape), max(label_smoothing, 0.0)
    classes = input.shape[axis]
    logp = F.log_softmax(input, axis).movedim(axis, -1)
    if input.shape == target.shape:
        mass = weight * ((1 - eps) * target.movedim(axis, -1) + eps / classes)
        normalizer = mass.numel() / classes
    else:
        ignored = target == ignore_index
        one_hot = F.one_hot(target.masked_fill(ignored, 0), classes)
        mass = (1 - eps) * weight * one_hot + eps / classes * weight
        mass = mass * ~ignored.unsqueeze(-1)
        normalizer = (weight * one_hot * ~ignored.unsqueeze(-1)).sum()
    loss = -(mass * logp).sum(-1)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / normalizer}[reduction]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_targets
@pytest.mark.parametrize("ignore_index", [-100, 3, 2**40])
def test_composition(shape, probabilities, ignore_index):
    ignored = 0.0 if probabilities or len(shape) == 1 else 0.3
    args = make(
        shape, torch.float64, weighted=True, probabilities=probabilities, ignored=ignored, ignore_index=ignore_index
    )
    leaves = [tensor.requires_grad_() for tensor in args if tensor.is_floating_point()]
    for reduction, label_smoothing in itertools.product(REDUCTIONS, (-1.0, 0.0, 0.1, 1.0)):
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        ours, theirs = reference.cross_entropy(*args, **options), composed(*args, **options)
        torch.testing.assert_close(ours, theirs)
        upstream = torch.linspace(0.5, 2.0, ours.numel(), dtype=ours.dtype).reshape(ours.shape)
        torch.testing.assert_close(
            torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream)
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_targets
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_pytorch(shape, dtype, probabilities, weighted):
    args = make(shape, dtype, probabilities=probabilities, weighted=weighted, ignored=0.3)
    wanted = ["input", *["target"] * probabilities, *["weight"] * (probabilities and weighted)]
    check_each(*args, wanted=wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_of_ignored_rows_take_no_part(value):
    input, target, weight = make((7, 5), torch.float64, weighted=True)
    target[2] = -100
    input[2] = value
    check_each(input, target, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", [torch.int64, *DTYPES], ids=str)
@pytest.mark.parametrize("weight", [None, torch.int64, *DTYPES], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_result_dtype_is_that_of_pytorch(dtype, target, weight, autocast):
    input, indices, ones = make((7, 5), dtype, weighted=True)
    if target.is_floating_point:
        target = torch.full((7, 5), 0.2, dtype=target)
    else:
        target, weight = indices, weight and dtype  # for indices the weight has the logits' dtype
    weight = None if weight is None else ones.to(weight)
    with torch.autocast("cpu", enabled=autocast):
        expected = F.cross_entropy(input, target, weight).dtype
    assert reference.result_dtype(input, target, weight, autocast) == expected


def test_accumulation_dtype():
    assert [reference.accumulation_dtype(dtype).itemsize for dtype in DTYPES] == [
        max(dtype.itemsize, 4) for dtype in DTYPES
    ]
