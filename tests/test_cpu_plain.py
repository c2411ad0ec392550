"""Blocks of rows on a CPU, by PyTorch's softmax: every order of memory that they are computed in."""

import itertools

import pytest
import torch
from parity import check, make, relaid

import xent_ext
from xent_ext import cpu, cpu_plain

ROWS = {"row by row": (0, 2, 1), "classes strided": (0, 1, 2), "positions outermost": (2, 0, 1)}


@pytest.mark.parametrize("classes", [2, cpu_plain.FEW_CLASSES - 1, cpu_plain.FEW_CLASSES, 17, 70])
@pytest.mark.parametrize("order", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 20, 100], ids=["parts", "some at a time", "one block"])
def test_orders_of_memory(cpu_blocks, monkeypatch, classes, order, dtype, rows):
    """A block is a part of an image of 13 positions, one or more images, or all five."""
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 2 * rows * classes * 8)
    for probabilities, label_smoothing in itertools.product([False, True], [0.0, 0.1]):
        input, target, weight = make(
            (5, classes, 13), dtype, probabilities=probabilities, weighted=True, ignored=0.3, spread=2.0
        )
        input = relaid(input, order=order)
        check(input, target, weight, label_smoothing=label_smoothing)
        check(input, target, label_smoothing=label_smoothing, reduction="none")
        with torch.no_grad():
            check(input, target, weight, wanted=(), label_smoothing=label_smoothing)


def test_blocks_that_are_ignored_are_not_read(cpu_blocks, monkeypatch):
    """Nor does what they hold reach the rows of others, with smoothing or without."""
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 4 * 20 * 8)
    for dtype, label_smoothing in itertools.product([torch.float32, torch.float16], [0.0, 0.1]):
        input, target, weight = make((16, 20), dtype, weighted=True)
        target[3:12] = -100
        input[3:12] = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(3).unsqueeze(1)
        check(input, target, weight, label_smoothing=label_smoothing)


@pytest.mark.parametrize("shape", [(40, 7), (40, 20), (40, 70), (2, 7, 20), (2, 20, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_ignored_rows_hold_stays_there(cpu_blocks, shape, dtype):
    """Among others in their block, whatever their logits are."""
    for value, label_smoothing in itertools.product([torch.nan, torch.inf, -torch.inf], [0.0, 0.1]):
        input, target, weight = make(shape, dtype, weighted=True, ignored=0.3)
        rows = input.movedim(1, -1)
        rows[target == -100] = value
        rows[..., 1][target == -100] = value if value != torch.inf else 0
        check(input, target, label_smoothing=label_smoothing)
        check(input, target, weight, label_smoothing=label_smoothing)


def test_an_index_below_zero_is_no_class_where_a_class_is_ignored(cpu_blocks):
    """As many of the one as of the other."""
    with pytest.raises(IndexError, match="-1"):
        xent_ext.cross_entropy(torch.randn(3, 20), torch.tensor([-1, 5, 2]), ignore_index=5)


def test_the_forward_pass_alone_is_as_right_as_with_a_gradient(cpu_blocks):
    """One makes log p, the other p: of classes that are all but sure, or all but impossible, too."""
    for spread in (0.01, 1.0, 100.0, 10_000.0):
        for shape in ((50, 7), (50, 20), (50, 100), (2, 7, 25), (2, 20, 25)):
            args = make(shape, spread=spread)
            check(*args, reduction="none")
            with torch.no_grad():
                check(*args, wanted=(), reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outer", "classes", "inner"), itertools.product([1, 3], [2, 13, 40], [1, 5, 300]))
def test_to_another_order_and_back(dtype, outer, classes, inner):
    """Class by class, all at once, or as PyTorch turns a matrix."""
    rows = torch.arange(outer * inner * classes).view(outer, inner, classes).to(dtype)
    across = cpu_plain.copy_across(rows.transpose(1, 2), torch.empty(outer, classes, inner, dtype=dtype))
    assert torch.equal(across, rows.transpose(1, 2))
    assert torch.equal(cpu_plain.copy_across(across.transpose(1, 2), torch.empty_like(rows)), rows)
