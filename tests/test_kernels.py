"""The Triton kernels: every schedule, layout and kind of target, against PyTorch and against the truth.

They run wherever a driver is active: on a GPU, on whatever runs a GPU's code without one, or else in Triton's
interpreter.
"""

import dataclasses
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from parity import check, made_ahead, make
from test_autograd import copies_moved, filled_memory  # noqa: F401

import xent_ext
from xent_ext import backends, plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

compiled_only = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter truncates to bfloat16 and copies storages")
# Code compiled for a GPU takes minutes to prepare for a CPU where its tiles are large: there, one dtype will do.
not_emulated = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="compiled code without a GPU runs in bfloat16 alone here"
)

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture(params=["resident", "streaming", "split"])
def shape(request, monkeypatch):
    """Logits for each schedule; small tiles let short rows stream, in blocks of which the last is part full.

    Their rows start at any element, or they start on whole vectors.
    """
    if request.param == "resident":
        return 6, 40
    small_tiles(monkeypatch)
    force(monkeypatch, request.param)
    return {"streaming": (3, 515), "split": (3, 516)}[request.param]


def force(monkeypatch, name):
    """Have the schedule of that name whatever the plan would choose, as XENT_EXT_SCHEDULE has."""
    monkeypatch.setattr("xent_ext.kernels.implementation.SCHEDULE", name)


def small_tiles(monkeypatch):
    """Tiles of 256 logits, clusters, where there are any, of up to 4096, and few processors to split rows for."""
    from xent_ext.kernels import implementation

    device = implementation.device_properties(0)
    tuning = dataclasses.replace(
        device.tuning,
        long_row_threads=(64,),
        long_row_tile=256,
        packed_tile=256,
        neighbours_threads=64,
        streaming_threads=64,
        split_threads=64,
    )
    device = dataclasses.replace(device, processors=8, tuning=tuning)
    monkeypatch.setattr(implementation, "device_properties", lambda index: device)
    monkeypatch.setattr(plan, "most_logits_per_thread", lambda *args: 4)


def schedule(*args, **options):
    return xent_ext.explain(*args, **options).traffic.schedule


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=not_emulated),
        pytest.param(torch.float16, marks=not_emulated),
        pytest.param(torch.bfloat16, marks=compiled_only),
    ],
)
@pytest.mark.parametrize(
    "classes",
    [
        1,  # loss 0
        2,  # hundreds of rows in a program
        19,  # no vector fits
        1000,  # vectors of 8, though 16 does not divide it
        4095,  # one class short of a tile
        32001,  # one class in the last of several blocks, or nearly nothing in the upper half of a tile
        50257,  # the last block, or program of a cluster, is part full
        131073,  # one class in the last block
    ],
)
def test_widths(classes, dtype):
    rows = 300 if classes < 1000 else 3 if classes < 50000 else 1
    args = make((rows, classes), dtype, ignored=0.3 if rows > 1 else 0.0, device=DEVICE)
    if classes < 8192:
        assert schedule(*args) == "resident"
    check(*args)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_options(shape, reduction, probabilities):
    args = make(shape, weighted=True, probabilities=probabilities, device=DEVICE)
    check(*args, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_float64(shape, probabilities):
    args = make(shape, torch.float64, weighted=True, probabilities=probabilities, device=DEVICE)
    check(*args, label_smoothing=0.3)


@pytest.mark.parametrize("shape", [(9,), (7, 5, 3), (2, 19, 4, 8), (2, 3, 2, 3, 2)], ids=str)
def test_shapes(shape):
    check(*make(shape, weighted=True, device=DEVICE), reduction="none")


def sliced(x):
    """(B, V, T - 1), as causal language models pass `logits[:, :-1].transpose(1, 2)`."""
    return torch.cat([x, x[..., :1]], -1).transpose(1, 2).contiguous()[:, :-1].transpose(1, 2)


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((2, 40, 6), sliced),
        ((2, 40, 6), lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),  # classes last in memory
        ((2, 19, 4, 8), lambda x: x.contiguous(memory_format=torch.channels_last)),
        ((6, 40), lambda x: x.t().contiguous().t()),  # classes strided, rows neighbours
        ((6, 40), lambda x: torch.stack([x, x], -1)[..., 0]),  # no unit stride
        ((6, 40), lambda x: x[:1].expand(6, 40)),  # rows overlap
        ((6, 40), lambda x: x.flip(0)[1:]),  # storage offset that is a multiple of the row
        ((6, 41), lambda x: x[:, 1:]),  # rows that do not start on 16 bytes
        ((2, 7, 4, 6), lambda x: x[:, :, 1:-1, 1:-1]),  # fits no view: copied
        ((2, 600, 4, 50), lambda x: x.transpose(2, 3)),
    ],
    ids=[
        "sliced",
        "classes-last",
        "channels-last",
        "transposed",
        "strided",
        "expanded",
        "offset",
        "odd",
        "copied",
        "hw",
    ],
)
def test_layouts(shape, view):
    input = view(make(shape, device=DEVICE)[0])
    _, target, weight = make(tuple(input.shape), ignored=0.2, weighted=True, device=DEVICE)
    check(input, target, weight, label_smoothing=0.1)


def test_streaming_of_strided_classes(monkeypatch):
    small_tiles(monkeypatch)
    args = make((1, 700, 3, 11), ignored=0.3, device=DEVICE)
    assert schedule(*args) == "streaming"
    check(*args)


def test_programs_take_turns(shape, monkeypatch):
    """One program makes the gradient of all tiles again, where the upstream gradient is not the expected one."""
    monkeypatch.setattr(plan, "WAITING", 0)
    rows, classes = shape
    check(*make((7 * rows, classes), ignored=0.3, weighted=True, device=DEVICE))


def test_clusters(monkeypatch):
    """Where there are none, the rows are split. Clusters, too, take turns."""
    small_tiles(monkeypatch)
    monkeypatch.setattr(plan, "WAITING", 0)
    args = make((4, 700), ignored=0.3, weighted=True, device=DEVICE)
    traffic = xent_ext.explain(*args).traffic
    assert traffic.schedule == ("resident" if traffic.numbers["num_ctas"] > 1 else "split")
    for reduction in ("mean", "none"):
        check(*args, reduction=reduction)


CLUSTERED = plan.Plan("resident", rows=1, block=512, num_warps=2, programs=4, num_ctas=2)


def test_clusters_that_work_are_used(recwarn):
    """Where they compile; the interpreter, too, runs what is launched for one, if as one program."""
    from xent_ext.kernels import implementation

    if implementation.device_properties(0).cluster == 1 and not INTERPRETED:
        pytest.skip("no clusters on this device")
    assert implementation.check_clusters(torch.device(DEVICE), CLUSTERED)
    assert not [w for w in recwarn if "clusters" in str(w.message)]


def test_clusters_that_fail_are_not_used(monkeypatch, recwarn):
    """With one warning; they are wrong here, as `streaming` would be right."""
    from xent_ext.kernels import implementation

    monkeypatch.setattr(implementation, "_checked", {})
    forward = implementation.Setup.forward

    def wrong(self, *args):
        loss, *others = forward(self, *args)
        return loss + 1 if self.plan.num_ctas > 1 else loss, *others

    monkeypatch.setattr(implementation.Setup, "forward", wrong)
    device = torch.device(DEVICE)
    with pytest.warns(UserWarning, match="clusters of 2 fail"):
        assert not implementation.clusters_work(device, CLUSTERED)
    recwarn.clear()
    assert not implementation.clusters_work(device, CLUSTERED)
    assert not recwarn.list


def test_strided_target_and_weight():
    input, target, weight = make((6, 40), weighted=True, device=DEVICE)
    check(input, torch.stack([target, target], 1)[:, 1], torch.stack([weight, weight], 1)[:, 0])


def test_uint8_target():
    input, target, _ = make((6, 40), device=DEVICE)
    check(input, target.to(torch.uint8), ignore_index=3)


SPECIAL = {
    "uniform": lambda x, t: x.fill_(2.5),
    "confident": lambda x, t: x.scatter_(1, t[:, None], 60.0),
    "wrong": lambda x, t: x.scatter_(1, t[:, None], -60.0),
    "offset": lambda x, t: x.add_(1e4),
    "huge": lambda x, t: x.mul_(1e30),
    "masked": lambda x, t: x[:, 5:25].fill_(-torch.inf),
    "target masked": lambda x, t: x.scatter_(1, t[:, None], -torch.inf),
    "half a row masked": lambda x, t: x[0, : x.shape[1] // 2].fill_(-torch.inf),
    "row masked": lambda x, t: x[1].fill_(-torch.inf),
    "inf": lambda x, t: x[1, 7].fill_(torch.inf),
    "nan": lambda x, t: x[1, 7].fill_(torch.nan),
}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("special", SPECIAL)
def test_special_logits(shape, special, label_smoothing):
    input, target, _ = make(shape, device=DEVICE)
    SPECIAL[special](input, target)
    check(input, target, reduction="none", label_smoothing=label_smoothing)


def test_probability_of_zero_at_a_masked_logit_is_nan():
    input, target, _ = make((4, 40), probabilities=True, device=DEVICE)
    input[1, 3] = -torch.inf
    target[1, 3] = 0
    check(input, target, reduction="none")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ignored_rows_are_not_read(shape, reduction):
    input, target, _ = make(shape, device=DEVICE)
    input[1] = torch.nan
    target[1] = -100
    input.requires_grad_()
    loss = xent_ext.cross_entropy(input, target, reduction=reduction)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert (input.grad[1] == 0).all()
    assert input.grad[0].abs().sum() > 0


def test_all_ignored(shape):
    input, target, _ = make(shape, ignored=2.0, device=DEVICE)
    for reduction in ("none", "mean", "sum"):
        x = input.clone().requires_grad_()
        loss = xent_ext.cross_entropy(x, target, reduction=reduction)
        loss.sum().backward()
        assert loss.isnan() if reduction == "mean" else (loss == 0).all()
        assert (x.grad == 0).all()


@pytest.mark.parametrize("bad", [-1, 2100, 2**31, 2**32, -(2**40)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_target_out_of_range_is_nan_in_its_row_alone(shape, bad, label_smoothing, reduction):
    """In the gradient, whether it is made with the loss or after it; and in the loss, which is NaN if it is one."""
    input, target, weight = make(shape, weighted=True, device=DEVICE)
    target[1] = bad
    x = input.clone().requires_grad_()
    loss = xent_ext.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=label_smoothing)
    loss.sum().backward()
    expected = torch.zeros_like(target, dtype=torch.bool)
    expected[1] = True
    assert torch.equal(loss.isnan(), expected if reduction == "none" else expected.any())
    assert torch.equal(x.grad.isnan().any(1), expected)
    assert x.grad[1].isnan().any()


def test_check_names_the_bad_target(monkeypatch):
    monkeypatch.setattr(backends, "CHECK", True)
    input, target, _ = make((6, 40), device=DEVICE)
    target[4] = 41
    with pytest.raises(IndexError, match=r"Target 41 is out of bounds.*target\[4\]"):
        xent_ext.cross_entropy(input, target)


def test_another_upstream_gradient_gives_the_bits_of_a_direct_computation(shape):
    x, target, _ = make(shape, ignored=0.3, device=DEVICE)
    x.requires_grad_()
    factor = torch.tensor(0.3, device=DEVICE)
    loss = xent_ext.cross_entropy(x, target)
    over = torch.autograd.grad(loss, x, factor, retain_graph=True)[0]  # over the gradient made for 1
    anew = torch.autograd.grad(loss, x, factor)[0]  # in a new tensor
    ahead = made_ahead(xent_ext.cross_entropy(x, target))  # by the forward pass, which expects the factor now
    assert torch.equal(over, ahead)
    assert torch.equal(anew, ahead)


def test_the_expected_upstream_gradient_makes_nothing(shape):
    input, target, _ = make(shape, device=DEVICE)
    x = input.clone().requires_grad_()
    loss = xent_ext.cross_entropy(x, target)
    made = made_ahead(loss)
    made.data.fill_(7.0)  # what only a kernel that returns at once leaves
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.data_ptr() == made.data_ptr()
    assert (gradient == 7.0).all()


def test_a_factor_that_repeats_is_made_in_the_forward_pass(shape):
    """Gradient accumulation and loss scaling: a factor costs a gradient made again where it is new."""
    input, target, _ = make(shape, ignored=0.3, device=DEVICE)
    module = xent_ext.CrossEntropyLoss()
    right = []
    for factor in (0.25, 0.25, 0.25, 65536.0, 65536.0, 1.0, 1.0):
        x = input.clone().requires_grad_()
        loss = module(x, target)
        made = made_ahead(loss).clone()
        (loss * factor).backward()
        right.append(torch.equal(made, x.grad))
        fresh = input.clone().requires_grad_()
        (xent_ext.CrossEntropyLoss()(fresh, target) * factor).backward()
        assert torch.equal(x.grad, fresh.grad)
    assert right == [False, True, True, False, True, False, True]


def test_no_gradient_is_stored_where_no_factor_is_foreseen(shape, filled_memory):  # noqa: F811
    """After two misses; one that comes twice in a row is foreseen again."""
    input, target, _ = make(shape, ignored=0.3, device=DEVICE)
    args, module = {"input": input.requires_grad_(), "target": target}, xent_ext.CrossEntropyLoss()
    moved = []
    for factor in (1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 6.0, 6.0):
        copies, found = copies_moved(module, args, factor)
        moved.append(copies)
        loss = xent_ext.CrossEntropyLoss()(**args)
        assert torch.equal(found, torch.autograd.grad(loss, args["input"], torch.full_like(loss, factor))[0])
    assert moved == [2, 4, 4, 3, 3, 3, 2, 4, 2]


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_nothing_waits_for_the_device(shape, reduction, monkeypatch):
    input, target, weight = make(shape, weighted=True, device=DEVICE)
    input.requires_grad_()
    upstream = torch.rand(target.shape if reduction == "none" else (), device=DEVICE)

    def refused(function):
        def waits(*args, **kwargs):
            if "triton" in sys._getframe(1).f_globals["__name__"]:  # its interpreter, which reads what it computes with
                return function(*args, **kwargs)
            raise AssertionError("this waits for the device")

        return waits

    with monkeypatch.context() as patched:
        for name in ("item", "__bool__", "__int__", "__float__", "__index__", "tolist", "cpu", "numpy", "nonzero"):
            patched.setattr(torch.Tensor, name, refused(getattr(torch.Tensor, name)))
        loss = xent_ext.cross_entropy(input, target, weight, reduction=reduction, label_smoothing=0.1)
        loss.backward(upstream)
    assert input.grad is not None


def test_more_rows_than_one_program_sums():
    """Normaliser and final sum over several programs."""
    check(*make((20000, 3), ignored=0.3, weighted=True, device=DEVICE))
    check(*make((17, 3, 1200), ignored=0.3, device=DEVICE), reduction="sum")


@compiled_only
def test_offsets_beyond_32_bits(shape, monkeypatch):
    """Rows, and images, that lie 2**31 + 16 elements apart, in memory that is mostly never touched."""
    stride = 2**31 + 16
    storage = torch.empty(2 * stride, dtype=torch.float16, device=DEVICE)
    for size, strides in (((2, shape[1]), (stride, 1)), ((2, shape[1], 3), (stride, 3, 1))):
        if len(size) == 3:
            force(monkeypatch, None)  # rows that are neighbours in memory are not split
        input = storage.as_strided(size, strides)
        values, target, _ = make(size, torch.float16, device=DEVICE)
        input.copy_(values)
        check(input, target)


def test_same_input_same_bits(shape):
    args = make(shape, weighted=True, device=DEVICE)
    results = []
    for _ in range(2):
        x = args[0].clone().requires_grad_()
        loss = xent_ext.cross_entropy(x, *args[1:], label_smoothing=0.1)
        loss.backward()
        results.append((loss.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_logits_are_left_alone_and_saved_ones_guarded():
    input, target, _ = make((6, 40), device=DEVICE)
    x = input.clone().requires_grad_()
    y = x * 1
    loss = xent_ext.cross_entropy(y, target)
    assert torch.equal(y, input)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_result_is_float32():
    input, target, weight = make((6, 40), torch.float16, weighted=True, device=DEVICE)
    x = input.clone().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = xent_ext.cross_entropy(x, target, weight.float())
        expected = F.cross_entropy(input, target, weight.float())
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert x.grad.dtype == torch.float16
