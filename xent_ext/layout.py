"""How tensors of any shape that the loss takes are seen by the implementations: as (outer, inner, class)."""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """Tensors of one shape as (outer, inner, class), each with three strides in elements.

    Row (o, i) of the batch has the number o * row_outer + i * row_inner in row-major order.
    """

    outer: int
    inner: int
    classes: int
    row_outer: int
    row_inner: int
    strides: tuple  # for each tensor: (outer, inner, class)

    @property
    def rows(self):
        return self.outer * self.inner


@functools.lru_cache(maxsize=1024)
def layout(shape, *strides):
    """See tensors of shape (C), (N, C) or (N, C, d1, ...) as (outer, inner, class), or return None.

    The dimensions of the batch merge where the strides of every tensor allow it; more than two that do not
    merge fit no such view, and such tensors must be copied.
    """
    axis = class_axis(shape)
    groups = []  # (size, row stride, stride for each tensor), innermost first
    rows = 1
    for d in reversed(range(len(shape))):
        size = shape[d]
        if d == axis or size == 1:
            continue
        steps = tuple(s[d] for s in strides)
        if groups and all(a == b * groups[-1][0] for a, b in zip(steps, groups[-1][2], strict=True)):
            groups[-1] = (groups[-1][0] * size, *groups[-1][1:])
        else:
            groups.append((size, rows, steps))
        rows *= size
    if len(groups) > 2:
        return None
    # A stride of 0 is a multiple of every vector width, which is what a dimension of size 1 is.
    while len(groups) < 2:
        groups.append((1, 0, (0,) * len(strides)))
    inner, outer = groups
    # Tiles run along inner. Where rows are not neighbours in memory, the longer dimension makes fuller tiles.
    if inner[2][0] != 1 and outer[0] > inner[0]:
        inner, outer = outer, inner
    return Layout(
        outer=outer[0],
        inner=inner[0],
        classes=shape[axis],
        row_outer=outer[1],
        row_inner=inner[1],
        strides=tuple((o, i, s[axis]) for o, i, s in zip(outer[2], inner[2], strides, strict=True)),
    )


def class_axis(shape):
    return 0 if len(shape) == 1 else 1


def batch_shape(shape):
    """Shape of the row losses: without the class dimension."""
    return shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]


def gradient_stride(input):
    """Strides of torch.empty_like(input): the input's own where it is dense."""
    return input.stride() if input.is_contiguous() else torch.empty_like(input, device="meta").stride()


def arrange(input, q, gradient_stride=gradient_stride):
    """Input and probabilities (or None) with the layout that they share with the gradient, in that order.

    The layout's strides are the input's, the gradient's and the probabilities'; the gradient for the input returned is
    to have the strides that `gradient_stride` gives for it. Tensors that fit no common layout are copied.
    """
    attempts = (
        lambda: (input, q),
        lambda: (input, contiguous(q)),
        lambda: (contiguous(input), contiguous(q)),
    )
    for attempt in attempts:
        x, q = attempt()
        g_stride = gradient_stride(x)
        found = layout(x.shape, x.stride(), g_stride, g_stride if q is None else q.stride())
        if found is not None:
            return x, q, found
    raise AssertionError("contiguous tensors always have a layout")


def contiguous(tensor):
    return None if tensor is None else tensor.contiguous()


# --- The same for a call, whose options say what of the input is read, and where the gradient goes


def visible(problem, input):
    """The logits that take part, (N, C, ...): with `shift` not those of the last position, and never a padded class."""
    if problem.shift:
        input = input[:, :-1].transpose(1, 2)
    return of_classes(problem, input) if problem.num_classes else input


def of_classes(problem, tensor):
    """Of logits, of probabilities or of one number for each of their classes: the columns that are classes."""
    axis = class_axis(tensor.shape)
    return tensor.narrow(axis, 0, classes_here(problem, tensor.shape[axis]))


def classes_here(problem, columns):
    """How many of the columns are classes: the first."""
    return max(min(columns, problem.num_classes - problem.class_start), 0) if problem.num_classes else columns


def arrange_call(problem, tensors):
    """`arrange` for the visible logits; their gradient is to be `visible` in `gradient_memory`."""

    def partial_stride(x):
        like = without_data(whole_like(problem, tensors.input, x))
        return visible(problem, like if problem.inplace else torch.empty_like(like)).stride()

    strides = partial_stride if problem.is_partial else torch.Tensor.stride if problem.inplace else gradient_stride
    return arrange(visible(problem, tensors.input), tensors.target if problem.probabilities else None, strides)


def without_data(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def whole_like(problem, input, x):
    """What has the shape of the whole input, and strides like x, the visible part of it as `arrange_call` returns it.

    Where that had to be copied, it is in order of memory.
    """
    if not problem.is_partial:
        return x
    return input if x.stride() == visible(problem, input).stride() else input.new_empty(input.shape)


def gradient_memory(problem, input, x, empty_like=torch.empty_like):
    """Memory for the gradient with respect to the whole input; 0 where that is not visible.

    x is the input as `arrange_call` returns it: visible, perhaps copied. With `inplace` the gradient takes its place.
    """
    like = whole_like(problem, input, x)
    memory = like.detach() if problem.inplace else empty_like(like)
    if problem.shift:
        memory[:, -1].zero_()
    if problem.num_classes:
        padding_of(problem, memory).zero_()
    return memory


def padding_of(problem, tensor):
    """The columns of logits that are no classes."""
    if problem.shift:
        tensor = tensor.transpose(1, 2)
    axis = class_axis(tensor.shape)
    there = classes_here(problem, tensor.shape[axis])
    return tensor.narrow(axis, there, tensor.shape[axis] - there)
