"""Tensors of any shape and strides seen as (outer, inner, class)."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import class_axis, relaid

from xent_ext.layout import arrange, batch_shape, gradient_stride, layout

TOKENS, IMAGES = (3, 7, 5), (2, 5, 3, 4)  # of five classes: (B, V, T), (N, C, H, W)


def numbered(shape, **memory):
    """A tensor whose elements are all different."""
    return relaid(torch.arange(float(torch.Size(shape).numel())).reshape(shape), **memory)


def rows(tensor):
    """(rows in row-major order, class)."""
    return tensor.movedim(class_axis(tensor.shape), -1).reshape(-1, tensor.shape[class_axis(tensor.shape)])


def seen(found, tensor, which):
    """What the layout's strides show of a tensor, with its rows brought into row-major order."""
    view = tensor.as_strided((found.outer, found.inner, found.classes), found.strides[which], tensor.storage_offset())
    numbers = torch.arange(found.outer).unsqueeze(1) * found.row_outer + torch.arange(found.inner) * found.row_inner
    assert sorted(numbers.flatten().tolist()) == list(range(found.rows))
    return view.reshape(-1, found.classes)[numbers.flatten().argsort()]


@st.composite
def memory(draw, rank):
    dims = range(rank)
    return {
        "order": draw(st.permutations(dims)),
        "step": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "repeated": draw(st.sets(st.sampled_from(dims), max_size=rank)),
    }


@st.composite
def pairs(draw):
    """Logits and probabilities of one shape, in any memory."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    return [numbered(shape, **draw(memory(len(shape)))) for _ in range(2)]


@given(pairs())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_layout_shows_every_element_in_its_place(pair):
    x, q = pair
    input, probabilities, found = arrange(x, q)
    assert (found.outer * found.inner, found.classes) == rows(x).shape
    gradient = torch.empty_like(input).copy_(x)
    for which, (tensor, original) in enumerate([(input, x), (gradient, x), (probabilities, q)]):
        assert torch.equal(seen(found, tensor, which), rows(original))


@given(pairs())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_only_what_has_no_layout_is_copied(pair):
    x, q = pair
    input, probabilities, _ = arrange(x, q)
    contiguous_gradient = gradient_stride(x)
    if layout(x.shape, x.stride(), contiguous_gradient, q.stride()):
        assert input is x
        assert probabilities is q
    elif layout(x.shape, x.stride(), contiguous_gradient):
        alone, _, _ = arrange(x, None)
        assert alone is x
    else:
        assert input.is_contiguous()
        assert torch.equal(input, x)


@given(pairs())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_gradient_stride_is_that_of_empty_like(pair):
    for tensor in pair:
        assert gradient_stride(tensor) == torch.empty_like(tensor).stride()


@pytest.mark.parametrize(
    ("tensor", "outer", "inner", "strides"),
    [
        (numbered((5,)), 1, 1, (0, 0, 1)),
        (numbered((7, 5)), 1, 7, (0, 5, 1)),  # rows follow one another
        (numbered((7, 5), order=(1, 0)), 1, 7, (0, 1, 7)),  # rows are neighbours
        (numbered((7, 5), repeated=(0,)), 1, 7, (0, 0, 1)),
        (numbered(IMAGES), 2, 12, (60, 1, 12)),  # H and W merge
        (numbered(IMAGES, order=(0, 2, 3, 1)), 1, 24, (0, 5, 1)),  # channels last: all merge
        (numbered((2, 5, 2, 3, 4)), 2, 24, (120, 1, 24)),
        (numbered((3, 5, 1, 7)), 3, 7, (35, 1, 7)),  # of size 1: no dimension
        (numbered((1, 5, 3, 4)), 1, 12, (0, 1, 12)),
        (numbered((3, 8, 5))[:, :-1].transpose(1, 2), 3, 7, (40, 5, 1)),  # next tokens
        (numbered((8, 3, 5))[:-1].transpose(1, 2).contiguous(), 7, 3, (15, 1, 3)),
        (numbered((9, 4, 5))[:, :2].transpose(1, 2), 2, 9, (5, 20, 1)),  # tiles run along the longer dimension
        (numbered((9, 5, 4))[..., :2], 9, 2, (20, 1, 4)),  # but where rows are neighbours, along those
    ],
    ids=lambda value: f"{tuple(value.shape)}, {value.stride()}" if isinstance(value, torch.Tensor) else "",
)
def test_known_layouts(tensor, outer, inner, strides):
    found = layout(tensor.shape, tensor.stride())
    assert (found.outer, found.inner) == (outer, inner)
    assert found.strides == (strides,)
    assert torch.equal(seen(found, tensor, 0), rows(tensor))


@pytest.mark.parametrize(
    "tensor",
    [
        numbered((2, 5, 4, 6))[:, :, 1:-1, 1:-1],  # a cropped image
        numbered((2, 5, 3, 4), order=(0, 1, 3, 2)),
        numbered((2, 5, 2, 3, 4), order=(4, 3, 2, 1, 0)),
    ],
    ids=["cropped", "width before height", "reversed"],
)
def test_three_dimensions_that_do_not_merge_have_no_layout(tensor):
    assert layout(tensor.shape, tensor.stride()) is None


def test_tensors_merge_together_or_not_at_all():
    """Dimensions that merge in one tensor but not in the other stay apart in both."""
    x, last = numbered(IMAGES), numbered(IMAGES, order=(0, 2, 3, 1))
    assert layout(IMAGES, last.stride()).outer == 1
    together = layout(IMAGES, x.stride(), last.stride())
    assert (together.outer, together.inner) == (2, 12)
    assert together.strides == ((60, 1, 12), (60, 5, 1))


def test_probabilities_are_copied_before_logits():
    x = numbered(IMAGES)
    for order in itertools.permutations(range(4)):
        input, q, _ = arrange(x, numbered(IMAGES, order=order))
        assert input is x
        assert torch.equal(q, x)


@pytest.mark.parametrize(
    ("shape", "axis", "batch"),
    [((5,), 0, ()), ((7, 5), 1, (7,)), ((3, 5, 7), 1, (3, 7)), ((2, 5, 3, 4), 1, (2, 3, 4))],
)
def test_batch_shape(shape, axis, batch):
    assert class_axis(shape) == axis
    assert batch_shape(torch.Size(shape)) == batch
