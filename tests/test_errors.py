"""Wrong calls raise what `F.cross_entropy` raises, in words that name the argument; right calls pass."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import current_corners
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import xent_ext
from xent_ext import backends, checks, dispatch

LOGITS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OTHERS = (
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def fused_check(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    """The checks in the order in which the public function makes them."""
    checks.reduction_name(size_average, reduce, reduction)
    ignore_index = checks.integer_ignore_index(ignore_index)
    label_smoothing = checks.smoothing_value(label_smoothing)
    autocast = torch.is_autocast_enabled("cpu")
    checks.check_tensors(input, target, weight, ignore_index, label_smoothing, autocast=autocast)
    if input.shape != target.shape and target.device.type == "cpu":
        checks.bad_target(target, input.shape[min(input.dim() - 1, 1)], ignore_index)


def raised(function, *args, **kwargs):
    """The exception of a call, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(*args, **kwargs)
        except Exception as error:
            return error
    return None


def logits(*shape, dtype=torch.float32, **options):
    return torch.ones(shape).to(dtype=dtype, **options)


def indices(*shape, value=0, dtype=torch.int64, **options):
    return torch.full(shape, value, dtype=dtype, **options)


def call(input=(3, 5), target=(3,), weight=None, **options):
    """Arguments for `cross_entropy`. A shape stands for float32 logits, int64 zeros, a float32 weight."""
    input = logits(*input) if isinstance(input, tuple) else input
    target = indices(*target) if isinstance(target, tuple) else target
    weight = logits(*weight) if isinstance(weight, tuple) else weight
    return {"input": input, "target": target, "weight": weight, **options}


# What is wrong: (the argument that the message names, what to call with).
WRONG = {
    # Not tensors
    "input None": ("input", call(input=None)),
    "input list": ("input", call(input=[[1.0, 2.0]])),
    "input array": ("input", call(input=logits(3, 5).numpy())),
    "target None": ("target", call(target=None)),
    "target int": ("target", call(target=1)),
    "target array": ("target", call(target=indices(3).numpy())),
    "weight list": ("weight", call(weight=[1.0] * 5)),
    "weight float": ("weight", call(weight=1.0)),
    # Ranks and shapes
    "0-d input, 0-d target": ("input", call((), logits())),
    "0-d input, 0-d long target": ("target", call((), ())),
    "0-d input, 1-d target": ("input", call((), (1,))),
    "1-d input, empty target": ("target", call((5,), (0,))),
    "1-d input, two targets": ("target", call((5,), (2,))),
    "1-d input, 2-d target": ("target", call((5,), (1, 1))),
    "1-d input, (1,) target, smoothing": ("target", call((5,), (1,), label_smoothing=0.1)),
    "1-d input, long target of its shape": ("target", call((5,), (5,))),
    "(1,) input, (1,) target": ("target", call((1,), (1,))),
    "(N, C), () target": ("target", call(target=())),
    "(N, C), empty target": ("target", call(target=(0,))),
    "(N, C), batch mismatch": ("target", call(target=(2,))),
    "(N, C), (N, 1) target": ("target", call(target=(3, 1))),
    "(N, C), (N, C) long target": ("target", call(target=(3, 5))),
    "(0, C), () target": ("target", call((0, 5), ())),
    "(0, C), (1,) target": ("target", call((0, 5), (1,))),
    "(0, C), (0, 1) target": ("target", call((0, 5), (0, 1))),
    "3-d, batch mismatch": ("target", call((2, 5, 4), (3, 4))),
    "3-d, spatial mismatch": ("target", call((2, 5, 4), (2, 3))),
    "3-d, spatial missing": ("target", call((2, 5, 4), (2,))),
    "3-d, class axis kept": ("target", call((2, 5, 4), (2, 1, 4))),
    "3-d, flattened target": ("target", call((2, 5, 4), (8,))),
    "3-d, logits of (N, L, C)": ("target", call((2, 4, 5), (2, 4))),
    "3-d, empty batch, () target": ("target", call((0, 5, 4), ())),
    "4-d, spatial transposed": ("target", call((2, 5, 4, 3), (2, 3, 4))),
    "4-d, class axis kept": ("target", call((2, 5, 4, 3), (2, 1, 4, 3))),
    "4-d, empty batch, () target": ("target", call((0, 5, 4, 3), ())),
    "5-d, spatial mismatch": ("target", call((2, 5, 2, 2, 2), (2, 2, 2, 3))),
    "5-d, batch mismatch": ("target", call((2, 5, 2, 2, 2), (1, 2, 2, 2))),
    # No classes
    "(N, 0)": ("target", call((3, 0), (3,))),
    "(0,), () target": ("target", call((0,), ())),
    "3-d without classes": ("input", call((2, 0, 4), (2, 4))),
    "3-d without classes, all ignored": ("input", call((2, 0, 4), indices(2, 4, value=-100))),
    "4-d without classes": ("target", call((2, 0, 4, 3), (2, 4, 3))),
    "5-d without classes": ("input", call((2, 0, 2, 2, 2), (2, 2, 2, 2))),
    # Dtypes of the input
    **{
        f"{dtype} logits, {kind}": ("input", call(logits(*shape, dtype=dtype), target))
        for dtype in (*OTHERS, torch.int16, torch.int8, torch.uint16, torch.complex128)
        for kind, shape, target in (
            ("indices", (3, 5), (3,)),
            ("3-d indices", (3, 5, 2), (3, 2)),
            ("empty, indices", (0, 5), (0,)),
            ("probabilities", (3, 5), logits(3, 5)),
        )
    },
    "empty float8 logits, float32 probabilities": (
        "input",
        call(logits(0, 5, dtype=torch.float8_e5m2), logits(0, 5)),
    ),
    "empty float8 logits, float8 probabilities": (
        "input",
        call(logits(0, 5, dtype=torch.float8_e5m2), logits(0, 5, dtype=torch.float8_e5m2)),
    ),
    # Dtypes of the target
    **{
        f"{dtype} indices": ("target", call(target=indices(3).to(dtype)))
        for dtype in (
            *LOGITS,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint16,
            torch.bool,
            torch.complex64,
        )
    },
    "int32 index of a 1-d input": ("target", call((5,), indices(dtype=torch.int32))),
    "float indices, empty batch": ("target", call((0, 5), logits(0))),
    "uint8 indices, 3-d": ("target", call((2, 5, 4), indices(2, 4, dtype=torch.uint8))),
    "uint8 indices, 4-d": ("target", call((2, 5, 4, 3), indices(2, 4, 3, dtype=torch.uint8))),
    **{
        f"{dtype} probabilities": ("target", call(target=indices(3, 5).to(dtype)))
        for dtype in (*OTHERS, torch.int16, torch.float8_e4m3fnuz)
    },
    "float8 probabilities, smoothing": (
        "target",
        call(target=logits(3, 5, dtype=torch.float8_e5m2), label_smoothing=0.1),
    ),
    # Weight
    **{
        f"weight of shape {shape}, {kind}": ("weight", call(weight=shape, target=target))
        for shape in ((), (1,), (4,), (6,), (0,), (1, 5), (5, 1), (3, 5))
        for kind, target in (("indices", indices(3)), ("probabilities", logits(3, 5)))
    },
    "weight too short, 4-d": ("weight", call((2, 5, 4, 3), (2, 4, 3), (4,))),
    "weight too short, empty batch": ("weight", call((0, 5), (0,), (4,))),
    **{
        f"{dtype} weight, indices": ("weight", call(weight=logits(5, dtype=dtype)))
        for dtype in (torch.float64, torch.float16, torch.bfloat16, *OTHERS)
    },
    "float32 weight, float64 logits": ("weight", call(logits(3, 5, dtype=torch.float64), weight=(5,))),
    "float64 weight, empty batch": ("weight", call((0, 5), (0,), logits(5, dtype=torch.float64))),
    "weight requires grad, indices": ("weight", call(weight=logits(5).requires_grad_())),
    "float8 weight, probabilities": (
        "weight",
        call(target=logits(3, 5), weight=logits(5, dtype=torch.float8_e5m2)),
    ),
    # Devices
    "input elsewhere": ("target", call(logits(3, 5, device="meta"))),
    "target elsewhere": ("target", call(target=indices(3, device="meta"))),
    "weight elsewhere": ("weight", call(weight=logits(5, device="meta"))),
    "probabilities elsewhere": ("target", call(target=logits(3, 5, device="meta"))),
    "weight of probabilities elsewhere": (
        "weight",
        call(target=logits(3, 5), weight=logits(5, device="meta")),
    ),
    "batch mismatch on meta": ("target", call(logits(3, 5, device="meta"), indices(2, device="meta"))),
    # Values of class indices
    **{
        f"index {value}": ("target", call(target=torch.tensor([0, value, 1])))
        for value in (5, -1, -99, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63))
    },
    "-100 with another ignore_index": ("target", call(target=indices(3, value=-100), ignore_index=-1)),
    "uint8 index 7": ("target", call(target=indices(3, value=7, dtype=torch.uint8))),
    "index of a 1-d input": ("target", call((5,), indices(value=5))),
    "3-d index": ("target", call((2, 5, 4), indices(2, 4, value=5))),
    "4-d index": ("target", call((2, 5, 4, 3), indices(2, 4, 3, value=-1))),
    # ignore_index
    **{
        f"ignore_index {value!r}": ("ignore_index", call(ignore_index=value))
        for value in (None, 1.0, True, "1", 1j, [1], 2**63, -(2**63) - 1, 10**400)
    },
    **{
        f"ignore_index {value!r}": ("ignore_index", call(ignore_index=torch.tensor(value)))
        for value in (1.0, True, 1j, [], [1, 2], [True, False])
    },
    "ignore_index 0 with probabilities": ("ignore_index", call(target=logits(3, 5), ignore_index=0)),
    "ignore_index 7 with probabilities": ("ignore_index", call(target=logits(3, 5), ignore_index=7)),
    # label_smoothing
    **{
        f"label_smoothing {value!r}, {kind}": ("label_smoothing", call(target=target, label_smoothing=value))
        for value in (
            None,
            "0.1",
            1j,
            [0.1],
            1.5,
            2,
            2**63,
            float("inf"),
            torch.tensor([0.1]),
            torch.tensor(3.0),
        )
        for kind, target in (("indices", indices(3)), ("probabilities", logits(3, 5)))
    },
    "label_smoothing requires grad": (
        "label_smoothing",
        call(label_smoothing=torch.tensor(0.1, requires_grad=True)),
    ),
    "label_smoothing 1.5, empty batch": ("label_smoothing", call((0, 5), (0,), label_smoothing=1.5)),
    # Reduction
    **{
        f"reduction {value!r}": ("reduction", call(reduction=value))
        for value in (None, 0, 1, True, b"mean", "MEAN", "", "batchmean", ["mean"], {}, torch.tensor([1, 2]))
    },
    # Two at once: PyTorch's order decides
    "reduction before input": ("reduction", call(input=None, reduction="no")),
    "type of ignore_index before shapes": ("ignore_index", call(target=(2,), ignore_index=1.0)),
    "label_smoothing before shapes": ("label_smoothing", call(target=(2,), label_smoothing=2.0)),
    "dtype of logits before batch": ("input", call(logits(3, 5, dtype=torch.int64), (2,))),
    "batch before dtype of empty logits": ("target", call(logits(0, 5, dtype=torch.int64), (2,))),
    "batch before weight": ("target", call(target=(2,), weight=logits(4).requires_grad_())),
    "weight's grad before size of a 1-d target": ("weight", call((5,), (2,), logits(5).requires_grad_())),
    "dtype of indices before size of a 1-d target": ("target", call((5,), logits(2))),
    "weight before range": ("weight", call(target=indices(3, value=9), weight=(4,))),
    "long target before ignore_index": ("target", call(target=(3, 5), ignore_index=1)),
    "ignore_index before 0-d input": ("ignore_index", call((), logits(), ignore_index=1)),
}


@current_corners
@pytest.mark.parametrize(("named", "arguments"), WRONG.values(), ids=WRONG)
def test_wrong_calls_raise_what_pytorch_raises(named, arguments):
    expected = raised(F.cross_entropy, **arguments)
    assert expected is not None
    ours = raised(fused_check, **arguments)
    assert type(ours) is type(expected), (ours, expected)
    assert named in str(ours).lower()
    assert type(raised(xent_ext.cross_entropy, **arguments)) is type(expected)


@pytest.mark.parametrize("dtype", LOGITS, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0, -1.0, float("nan")])
def test_right_calls_pass(dtype, reduction, label_smoothing):
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    for shape in (
        (5,),
        (3, 5),
        (0, 5),
        (1, 1),
        (2, 5, 4),
        (2, 5, 4, 3),
        (0, 5, 4),
        (2, 5, 0),
        (2, 5, 2, 2, 2),
    ):
        input = logits(*shape, dtype=dtype)
        classes = shape[min(len(shape) - 1, 1)]
        for weight in (None, logits(classes, dtype=dtype)):
            target = indices(*shape[:1], *shape[2:]) if len(shape) > 1 else indices()
            fused_check(input, target, weight, **options)
            fused_check(input, target, weight, ignore_index=classes - 1, **options)
            fused_check(input, indices(*target.shape, value=-100), weight, **options)
        for probability in LOGITS:
            weight = logits(classes, dtype=torch.int64)
            fused_check(input, logits(*shape, dtype=probability), weight, **options)


class Index:
    def __index__(self):
        return 2


UNUSUAL = {
    "uint8 indices": call(target=indices(3, dtype=torch.uint8)),
    "1-d input, (1,) target": call((5,), (1,)),
    "1-d input, uint8 index": call((5,), indices(dtype=torch.uint8)),
    "(0, 0)": call((0, 0), (0,)),
    "(0, 0, 4)": call((0, 0, 4), (0, 4)),
    "no classes, all ignored": call((3, 0), indices(3, value=-100)),
    "4-d without classes, all ignored": call((2, 0, 4, 3), indices(2, 4, 3, value=-100)),
    "no classes, probabilities": call((3, 0), logits(3, 0)),
    "empty int64 logits, probabilities": call(logits(0, 5, dtype=torch.int64), logits(0, 5)),
    "(0,), probabilities": call((0,), logits(0)),
    "ignored beyond int32": call(target=indices(3, value=2**40), ignore_index=2**40),
    "ignored at the end of int64": call(target=indices(3, value=-(2**63)), ignore_index=-(2**63)),
    "ignore_index of a tensor": call(ignore_index=torch.tensor(2)),
    "ignore_index of a uint8 (1, 1) tensor": call(ignore_index=torch.tensor([[2]], dtype=torch.uint8)),
    "ignore_index of an array": call(ignore_index=torch.tensor(2).numpy()),
    "ignore_index with __index__": call(ignore_index=Index()),
    "label_smoothing True": call(label_smoothing=True),
    "label_smoothing of a float16 tensor": call(label_smoothing=torch.tensor(0.5, dtype=torch.float16)),
    "label_smoothing of NumPy": call(label_smoothing=torch.tensor(0.5).numpy()[()]),
    "label_smoothing -inf": call(label_smoothing=float("-inf")),
    "weight of probabilities requires grad": call(target=logits(3, 5), weight=logits(5).requires_grad_()),
    "complex weight of probabilities": call(target=logits(3, 5), weight=logits(5, dtype=torch.complex64)),
    "negative ignore_index with probabilities": call(target=logits(3, 5), ignore_index=-1),
    "meta": call(logits(3, 5, device="meta"), indices(3, device="meta"), logits(5, device="meta")),
    "elementwise_mean": call(reduction="elementwise_mean"),
    "size_average": call(size_average=False, reduction="no"),
    "reduce": call(reduce=False, reduction="no"),
}


@current_corners
@pytest.mark.parametrize("arguments", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_calls_pass_where_pytorch_takes_them(arguments):
    assert raised(F.cross_entropy, **arguments) is None
    assert raised(fused_check, **arguments) is None
    assert raised(xent_ext.cross_entropy, **arguments) is None


def test_a_weight_that_requires_grad_passes_under_no_grad():
    arguments = call(weight=logits(5).requires_grad_())
    with torch.no_grad():
        assert raised(F.cross_entropy, **arguments) is None
        assert raised(fused_check, **arguments) is None


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_arguments_override_the_reduction(size_average, reduce):
    if size_average is None and reduce is None:
        assert checks.reduction_name(None, None, "sum") == "sum"
        return
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        name = checks.reduction_name(size_average, reduce, "overridden")
    rows = torch.tensor([1.0, 2.0])
    with pytest.warns(UserWarning, match="deprecated"):
        expected = F.l1_loss(rows, torch.zeros(2), size_average, reduce)
    assert torch.equal(F.l1_loss(rows, torch.zeros(2), reduction=name), expected)


def test_elementwise_mean_warns():
    with pytest.warns(UserWarning, match="elementwise_mean"):
        assert checks.reduction_name(None, None, "elementwise_mean") == "mean"


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0.25, 0.25), (1, 1.0), (True, 1.0), (-0.5, 0.0), (float("nan"), 0.0), (torch.tensor(0.5), 0.5)],
)
def test_smoothing_value_is_a_float(given, expected):
    value = checks.smoothing_value(given)
    assert type(value) is float
    assert value == expected


@pytest.mark.parametrize("given", [7, torch.tensor([7]), torch.tensor(7, dtype=torch.uint8).numpy()])
def test_ignore_index_is_an_int(given):
    value = checks.integer_ignore_index(given)
    assert type(value) is int
    assert value == 7


@pytest.mark.parametrize(
    ("words", "expected"), [(("0", "no", "off", "False"), False), (("1", "yes", "on", "TRUE"), True)]
)
def test_words_for_on_and_off(monkeypatch, words, expected):
    for word in words:
        monkeypatch.setenv("XENT_EXT_CHECK", word)
        assert backends.switch("XENT_EXT_CHECK") is expected
    monkeypatch.delenv("XENT_EXT_CHECK")
    assert backends.switch("XENT_EXT_CHECK") is False
    for word in ("2", "", "ja"):
        monkeypatch.setenv("XENT_EXT_CHECK", word)
        with pytest.raises(ValueError, match=f"XENT_EXT_CHECK must be one of 0, .*, got '{word}'"):
            backends.switch("XENT_EXT_CHECK")


MISTAKEN = {
    "classes last": (call((2, 4, 5), (2, 4)), "input.transpose(1, 2)"),
    "classes last, or both flat": (call((2, 4, 5), (2, 4)), "input.flatten(0, 1) with target.flatten()"),
    "classes last of an image": (call((2, 4, 3, 5), (2, 4, 3)), "input.movedim(-1, 1)"),
    "classes last of an image, or both flat": (
        call((2, 4, 3, 5), (2, 4, 3)),
        "input.flatten(0, 2) with target.flatten()",
    ),
    "classes last, flat indices": (call((2, 4, 5), (8,)), "input.flatten(0, 1)"),
    "flat logits": (call((8, 5), (2, 4)), "target.flatten()"),
    "(N, 1) indices": (call((3, 5), (3, 1)), "target.flatten()"),
    "class axis kept": (call((2, 5, 4, 3), (2, 1, 4, 3)), "target.squeeze(1)"),
    "int32 indices": (call(target=indices(3, dtype=torch.int32)), "target.long()"),
    "float indices": (call(target=logits(3)), "target.long()"),
    "one-hot": (call(target=indices(3, 5)), "target.float()"),
    "classes not last": (call((2, 5, 4), (2, 4), shift=True), "input.transpose(1, 2)"),
}


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(("arguments", "advice"), MISTAKEN.values(), ids=MISTAKEN)
def test_frequent_mistakes_are_told_what_to_pass(monkeypatch, arguments, advice, small):
    """And that is right."""
    monkeypatch.setattr(dispatch, "is_small", lambda *_: small)
    error = raised(xent_ext.cross_entropy, **arguments)
    assert f"ass {advice}" in str(error) or f"or {advice}" in str(error)
    for expression in advice.split(" with "):
        name = expression.partition(".")[0]
        arguments = arguments | {name: eval(expression, dict(arguments))}
    assert raised(xent_ext.cross_entropy, **arguments) is None


def test_other_mistakes_get_no_advice():
    """Indices of an image the wrong way round must not be reshaped."""
    error = raised(xent_ext.cross_entropy, **call((2, 5, 4, 3), (2, 3, 4)))
    assert str(error).endswith("got (2, 3, 4)")


# --- Class indices out of range


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_out_of_range_message_gives_row_value_and_range(dtype):
    target = indices(2, 3, 4, dtype=dtype)
    target[1, 2, 0] = 11
    target[1, 2, 3] = 12
    with pytest.raises(IndexError, match=r"^Target 11 is out of bounds\.") as error:
        checks.bad_target(target, 11, -100)
    assert "target[1, 2, 0] is 11" in str(error.value)
    assert "[0, 11)" in str(error.value)
    assert "-100" in str(error.value)
    with pytest.raises(IndexError, match=r"target is 11;"):
        checks.bad_target(target[1, 2, 0], 11, -100)


@pytest.mark.parametrize("value", [156, 255])
def test_large_uint8_indices_do_not_wrap(value):
    """156 is -100 in 8 bits, which must not make it the ignored one; and 300 classes are not 44."""
    target = indices(3, value=value, dtype=torch.uint8)
    checks.bad_target(target, 300, -100)
    checks.bad_target(target, 5, value)
    for ignore_index in (value - 256, value + 256):
        with pytest.raises(IndexError, match=f"Target {value} is out of bounds"):
            checks.bad_target(target, 5, ignore_index)


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 12), max_size=20),
    st.integers(0, 10),
    st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 12),
)
@settings(deadline=None)
def test_bad_target_finds_the_first_bad_one(values, classes, ignore_index):
    bad = [value for value in values if not 0 <= value < classes and value != ignore_index]
    target = torch.tensor(values, dtype=torch.int64)
    error = raised(checks.bad_target, target, classes, ignore_index)
    if bad:
        assert type(error) is IndexError
        assert str(error).startswith(f"Target {bad[0]} is out of bounds. target[{values.index(bad[0])}] ")
    else:
        assert error is None


def test_targets_of_any_strides():
    target = indices(6, 4).t()[::2]
    checks.bad_target(target, 1, -100)
    checks.bad_target(indices(1).expand(1000), 1, -100)
    with pytest.raises(IndexError):
        checks.bad_target(target + 1, 1, -100)


# --- Where the checks are on purpose not PyTorch's


def test_weight_shape_is_strict_in_every_rank():
    """PyTorch takes a (1, C) weight for (N, C, d1) without smoothing only."""
    error = raised(fused_check, **call((2, 5, 4), (2, 4), (1, 5)))
    assert type(error) is RuntimeError
    assert "weight" in str(error)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_uint8_indices_pass_whatever_the_reduction(reduction):
    """PyTorch refuses the first for the mean only, the second for none only."""
    weighted = call(target=indices(3, dtype=torch.uint8), weight=(5,), label_smoothing=0.1)
    empty = call((0, 5, 4), indices(0, 4, dtype=torch.uint8))
    assert raised(fused_check, **weighted, reduction=reduction) is None
    assert raised(fused_check, **empty, reduction=reduction) is None


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (call(logits(3, 5, dtype=torch.int64), logits(3, 5), label_smoothing=2.0), RuntimeError),
        (call(input=None, label_smoothing=2.0), RuntimeError),
        (call(input=None, ignore_index=2**63), ValueError),
    ],
    ids=["smoothing before dtype", "smoothing before type", "ignore_index before type"],
)
def test_options_are_looked_at_before_tensors(arguments, kind):
    """PyTorch raises for the tensor here; each type is right for one of the two faults."""
    assert type(raised(fused_check, **arguments)) is kind


# --- PyTorch's own examples


def test_module_error_inputs_of_pytorch():
    common_modules = pytest.importorskip("torch.testing._internal.common_modules")
    info = next(info for info in common_modules.module_db if info.module_cls is torch.nn.CrossEntropyLoss)
    if info.module_error_inputs_func is None:
        pytest.skip("this PyTorch has no error inputs for CrossEntropyLoss")
    for sample in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=False
    ):
        made, forward = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        with pytest.raises(sample.error_type, match=sample.error_regex):
            fused_check(*forward.args, **forward.kwargs, **made.kwargs)
        module = xent_ext.CrossEntropyLoss(*made.args, **made.kwargs)
        with pytest.raises(sample.error_type, match=sample.error_regex):
            module(*forward.args, **forward.kwargs)


def test_operator_sample_inputs_of_pytorch():
    op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    info = next(info for info in op_db if info.name == "nn.functional.cross_entropy")
    for dtype in LOGITS:
        for sample in info.sample_inputs("cpu", dtype):
            assert raised(F.cross_entropy, sample.input, *sample.args, **sample.kwargs) is None
            fused_check(sample.input, *sample.args, **sample.kwargs)


# --- Right and wrong at random

shapes = st.lists(st.sampled_from([0, 1, 2, 2, 5]), max_size=5).map(tuple)
dtypes = st.sampled_from(LOGITS) | st.sampled_from(LOGITS + OTHERS)


@st.composite
def target_shapes(draw, shape):
    """The shape of class indices, of class probabilities, or one that is a step away from right."""
    right = shape[:1] + shape[2:] if len(shape) > 1 else draw(st.sampled_from([(), (1,)]))
    kind = draw(st.sampled_from(["indices", "indices", "probabilities", "insert", "drop", "reverse", "any"]))
    at = draw(st.integers(0, len(right)))
    return {
        "indices": right,
        "probabilities": shape,
        "insert": (*right[:at], draw(st.integers(0, 3)), *right[at:]),
        "drop": right[:at] + right[at + 1 :],
        "reverse": right[::-1],
        "any": draw(shapes),
    }[kind]


@st.composite
def calls(draw):
    shape = draw(shapes)
    target_shape = draw(target_shapes(shape))
    input_dtype = draw(dtypes)
    if target_shape == shape:
        target_dtype = draw(dtypes)
    else:
        target_dtype = draw(st.sampled_from([torch.int64, torch.int64, torch.uint8, *OTHERS, *LOGITS]))
    weight = None
    if draw(st.booleans()):
        classes = shape[min(len(shape) - 1, 1)] if shape else 1
        weight_shape = draw(st.sampled_from([(classes,)] * 4 + [(), (1,), (classes + 1,), (1, classes)]))
        weight = logits(*weight_shape, dtype=draw(st.just(input_dtype) | dtypes))
        if weight.is_floating_point() and draw(st.integers(0, 4)) == 0:
            weight.requires_grad_()
    input = logits(*shape, dtype=input_dtype)
    if input.is_floating_point() and draw(st.booleans()):
        input.requires_grad_()
    return call(
        input,
        indices(*target_shape).to(target_dtype),
        weight,
        ignore_index=draw(st.sampled_from([-100, -7, 0, 1])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0, -1.0])),
        reduction=draw(st.sampled_from(["none", "mean", "sum"])),
    )


def settled_otherwise(input, target, weight, label_smoothing, **_):
    """The calls in which the checks are on purpose not PyTorch's, or cannot know its order.

    The tests under that heading pin them. The last is a (1,) target of a 1-d input with smoothing and no
    classes, where PyTorch looks at the value before the shape.
    """
    rank = input.dim()
    if target.shape == input.shape or rank == 0:
        return False
    classes = input.shape[min(rank - 1, 1)]
    if rank == 1 and classes == 0 and target.dim() == 1 and label_smoothing > 0:
        return True
    smoothed_weight = weight is not None and label_smoothing > 0
    if target.dtype == torch.uint8 and (smoothed_weight or target.numel() == 0):
        return True
    return rank > 2 and weight is not None and weight.dim() != 1 and weight.numel() == classes


@current_corners
@given(calls(), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=1000)
def test_any_call_raises_what_pytorch_raises(arguments, grad, autocast):
    assume(not settled_otherwise(**arguments))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=autocast):
        expected = raised(F.cross_entropy, **arguments)
        ours = raised(fused_check, **arguments)
    assert type(ours) is type(expected), (ours, expected)
