"""Classes in slices, all of whose ranks are in this process: summaries, what is made of them, and padded classes.

Each slice is summarised, the summaries are stacked as a gather would, and each slice goes on from there.
"""

import dataclasses
import itertools

import pytest
import torch
from parity import class_axis, make
from test_options import ALONE, DIFFERENTIABLE, allowed, call, flat, outcome, plain

import xent_ext
from xent_ext import checks, parallel
from xent_ext.call import Arguments, Options, prepare, statistics
from xent_ext.problem import Kept, Upstream, Wanted

ARGUMENTS = ("weight", "ignore_index", "reduction", "label_smoothing")
# Of 23 classes: all in one, empty ones, single ones, three ranks and four.
SIZES = ((23,), (10, 13), (5, 0, 18), (0, 1, 20, 2))
both = pytest.mark.parametrize("implementation", ["many_blocks", "small_gpu"])


@pytest.fixture
def small_gpu(triton_backend, monkeypatch):
    """The kernels, on so few processors that few programs share a row: the interpreter runs one after the other."""
    from xent_ext.kernels import device, implementation

    monkeypatch.setattr(device, "INTERPRETED", dataclasses.replace(device.INTERPRETED, processors=8))
    implementation.forget()
    yield triton_backend
    implementation.forget()


def sliced(value, axis, start, size):
    return value.detach().narrow(axis, start, size)


def in_slices(args, sizes, upstreams=("loss", *DIFFERENTIABLE)):
    """What `test_options.outcome` finds, from slices of these sizes. All ranks' results must be equal to the bit."""
    args = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in args.items()}
    options = Options(**{name: value for name, value in args.items() if name not in (*ARGUMENTS, "input", "target")})
    problem, tensors = prepare(
        Arguments(args["input"], args["target"], **{k: args[k] for k in ARGUMENTS if k in args}), options
    )
    axis, ranks = class_axis(args["input"].shape), []
    for rank, (start, size) in enumerate(zip(itertools.accumulate((0, *sizes)), sizes, strict=False)):
        of_rank = dataclasses.replace(
            problem, num_classes=sum(sizes), class_start=start, group="of this process", ranks=len(sizes), rank=rank
        )
        given = tensors._replace(
            input=sliced(tensors.input, axis, start, size),
            target=sliced(tensors.target, axis, start, size) if problem.probabilities else tensors.target,
            weight=None if tensors.weight is None else sliced(tensors.weight, 0, start, size),
        )
        wanted = Wanted(gradient=True, slope=tensors.logit_scale is not None)
        ranks.append((parallel.setup_for(of_rank, given, wanted), given))
    gathered = torch.stack([setup.summary(given) for setup, given in ranks])
    results = [rank_results(setup, given, gathered, options, upstreams) for setup, given in ranks]
    for found, _, _ in results[1:]:
        for name, value in found.items():
            assert torch.equal(value.nan_to_num(7e7), results[0][0][name].nan_to_num(7e7)), name
    found = dict(results[0][0])
    found["d input"] = torch.cat([gradient for _, gradient, _ in results], axis)
    if tensors.logit_scale is not None:
        found["d logit_scale"] = sum(slope.sum() for _, _, slope in results)
    return found


def rank_results(setup, given, gathered, options, upstreams):
    """Results by name, gradient and slopes of a rank; the gradient made ahead is that of an upstream gradient of 1."""
    problem, acc = setup.problem, gathered.dtype
    expected = None if problem.reduction == "none" else torch.tensor((1.0, 0.0), dtype=acc)
    loss, stats, kept = setup.finish(given, gathered, expected)
    kept = Kept(*kept)
    found = dict(zip(problem.stats, stats, strict=True))
    if options.return_stats:
        found = flat((loss, statistics(options.return_stats, problem, given.target, found)))
    else:
        found = {"loss": loss}
    generator = torch.Generator().manual_seed(5)
    factors = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in found.items()}
    upstream = Upstream(**{name: factors[name] for name in Upstream._fields if name in factors and name in upstreams})
    gradient, slope, _ = setup.backward(setup.given(given), kept, upstream, expected)
    return found, gradient, slope


def check(args, sizes, tolerance=None, **which):
    """The results from slices are those of the specification."""
    ours, true = in_slices(args, sizes, **which), outcome(plain, args, **which)
    for name, value in ours.items():
        torch.testing.assert_close(
            value, true[name], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}", **(tolerance or {})
        )


@both
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("options", ALONE.values(), ids=ALONE)
def test_each_option(implementation, request, options, probabilities):
    request.getfixturevalue(implementation)
    ways = list(zip(SIZES[1:], (("mean", 0.0), ("none", 0.2), ("sum", 0.1)), strict=True))
    place = (
        list(ALONE.values()).index(options) + probabilities
    )  # each way with a third of them: the interpreter is slow
    for sizes, (reduction, smoothing) in ways[place % 3 :][:1] if implementation == "small_gpu" else ways:
        options = allowed({**options, "reduction": reduction, "label_smoothing": smoothing})
        check(call((4, 23), probabilities=probabilities, **options), sizes)


@both
@pytest.mark.parametrize("shape", [(23,), (2, 23, 3), (2, 23, 3, 2)])
def test_shapes_and_all_options_together(implementation, request, shape):
    request.getfixturevalue(implementation)
    options = {"logit_scale": "logit_scale", "softcap": 2.0, "z_loss": 0.1, "sample_weight": "sample_weight"}
    for probabilities, sizes in zip((False, True), SIZES[2:], strict=True):
        check(call(shape, probabilities=probabilities, **options, return_stats=True, label_smoothing=0.1), sizes)


@both
def test_slices_without_logits_above_minus_infinity(implementation, request):
    """A slice of -inf has no share in a row, nor one far below the others; a target there has a loss of inf."""
    request.getfixturevalue(implementation)
    args = call((6, 23), ignored=0.0, return_stats=True)
    x, target = args["input"].detach(), args["target"]
    x[0, :10] = -torch.inf
    x[1, 10:] = -torch.inf
    x[2, 5:] -= 1e5
    x[3, 10:] += 1e3
    target[:] = torch.tensor([12, 3, 2, 11, 4, 20])
    args["input"] = x.requires_grad_()
    for sizes in SIZES[1:3]:
        check(args, sizes)
    target[0] = 5
    loss = in_slices({**args, "reduction": "none"}, (10, 13))["loss"]
    assert loss[0].isposinf()
    assert loss[1:].isfinite().all()


@both
def test_nan_on_one_rank_is_nan_on_all(implementation, request):
    request.getfixturevalue(implementation)
    for poison in (torch.nan, torch.inf):
        args = call((4, 23), ignored=0.0, reduction="none", return_stats=("lse", "predicted"))
        x = args["input"].detach()
        x[1, 17] = poison
        found = in_slices({**args, "input": x.requires_grad_()}, (10, 13))
        assert found["loss"].isnan().tolist() == [False, True, False, False]
        assert found["d input"][1].isnan().all()
        assert found["d input"][[0, 2, 3]].isfinite().all()
        assert found["predicted"][1] == 17


@both
def test_the_first_of_equal_logits_is_predicted(implementation, request):
    request.getfixturevalue(implementation)
    x = torch.zeros(3, 23, dtype=torch.float64)
    x[1, 12:] = 4
    x[2, [9, 20]] = 4
    args = {
        "input": x,
        "target": torch.tensor([0, 12, 20]),
        "return_stats": ("predicted", "correct"),
        "reduction": "sum",
    }
    for sizes in SIZES:
        found = in_slices(args, sizes)
        assert found["predicted"].tolist() == [0, 12, 9]
        assert found["correct"].tolist() == [True, True, False]


@both
def test_all_rows_ignored(implementation, request):
    request.getfixturevalue(implementation)
    for on_all_ignored, value in (("nan", torch.nan), ("zero", 0.0)):
        args = {**call((3, 23), on_all_ignored=on_all_ignored), "target": torch.full((3,), -100)}
        found = in_slices(args, (10, 13))
        torch.testing.assert_close(found["loss"], torch.tensor(value, dtype=torch.float64), equal_nan=True)
        if value == 0:
            assert not found["d input"].any()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_further_from_the_truth_than_one_process(implementation, request, dtype):
    """Confident and uniform rows, with large offsets; in float32 but for the sums."""
    request.getfixturevalue(implementation)
    for seed, spread, offset in ((0, 1.0, 0.0), (1, 12.0, 50.0)):
        x, target, _ = make((8, 131), dtype, spread=spread, ignored=0.1, seed=seed)
        x = (x + offset).requires_grad_()
        args = {"input": x, "target": target, "reduction": "sum", "label_smoothing": 0.1}
        true = outcome(plain, {**args, "input": x.detach().double().requires_grad_()})
        one = outcome(xent_ext.cross_entropy, args)
        ours = in_slices(args, (50, 0, 81))
        for name, value in ours.items():
            error, of_one = ((found.double() - true[name]).abs().max().item() for found in (value, one[name]))
            rounding = torch.finfo(value.dtype).eps * true[name].abs().max().item()
            assert error <= 2 * of_one + rounding, name


@pytest.fixture
def one_rank(monkeypatch):
    """A group of one rank, which needs no process of its own: what is gathered is what is there."""
    monkeypatch.setattr(checks, "_check_slice", lambda options: None)
    monkeypatch.setattr(parallel, "slice_of", lambda options, columns: parallel.Slice(columns, 0, "of one", 1, 0))
    monkeypatch.setattr(parallel, "start_gathering", lambda packed, problem: packed)
    monkeypatch.setattr(parallel, "wait_for", lambda packed, problem: packed.unsqueeze(0))
    monkeypatch.setattr(parallel, "sum_over_ranks", lambda tensor, problem: tensor)
    monkeypatch.setattr(parallel, "sum_over_ranks_", lambda tensor, problem: tensor)


@both
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_stats": True}], ids=str)
def test_chunks_of_the_layer_go_on_from_their_summaries(implementation, request, one_rank, options, ignored):
    """Made ahead, and in backward from the summaries that the forward pass kept."""
    request.getfixturevalue(implementation)
    torch.manual_seed(0)
    target = torch.randint(23, (8,))
    if ignored:
        target[2] = -100
    args = {
        "input": torch.randn(8, 6, dtype=torch.float64, requires_grad=True),
        "linear_weight": torch.randn(23, 6, dtype=torch.float64, requires_grad=True),
        "target": target,
        "chunk_rows": 3,
        **options,
    }
    ours = outcome(xent_ext.linear_cross_entropy, {**args, "process_group": "of one"})
    for name, value in outcome(xent_ext.linear_cross_entropy, args).items():
        torch.testing.assert_close(ours[name], value, msg=lambda m, n=name: f"{n}: {m}")


# --- Padded classes


def padded(args, columns, fill):
    """The same call with so many more columns, of this value."""
    found = dict(args)
    axis = class_axis(args["input"].shape)
    for name in ("input", "target", "weight"):
        value = args.get(name)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            at = 0 if name == "weight" else axis
            shape = (*value.shape[:at], columns, *value.shape[at + 1 :])
            found[name] = torch.cat([value.detach(), torch.full(shape, fill, dtype=value.dtype)], at)
    found["input"].requires_grad_()
    return {**found, "num_classes": args["input"].shape[axis]}


@both
@pytest.mark.parametrize("fill", [30.0, torch.nan])
@pytest.mark.parametrize("shape", [(23,), (7, 23), (2, 23, 3), (2, 23, 2, 3, 2)])
def test_padding_takes_no_part(implementation, request, shape, fill):
    calls = request.getfixturevalue(implementation)
    for options in (
        {"reduction": "none"},
        {"label_smoothing": 0.2, "z_loss": 0.1},
        {"return_stats": True, "sample_weight": "sample_weight", "probabilities": True},
    ):
        args = call(shape, **options)
        ours, true = outcome(xent_ext.cross_entropy, padded(args, 5, fill)), outcome(plain, args)
        axis = class_axis(shape)
        gradient = ours.pop("d input")
        assert not gradient.narrow(axis, 23, 5).any()
        torch.testing.assert_close(gradient.narrow(axis, 0, 23), true.pop("d input"))
        for name, value in ours.items():
            torch.testing.assert_close(value, true[name])
    assert calls


@both
def test_padding_with_shift_in_place_and_strides(implementation, request):
    request.getfixturevalue(implementation)
    torch.manual_seed(0)
    x, tokens = torch.randn(2, 5, 28, dtype=torch.float64), torch.randint(23, (2, 5))
    leaf = x.clone().requires_grad_()
    true = xent_ext.cross_entropy(leaf[..., :23].clone(), tokens, shift=True)
    true.backward()
    for inplace in (False, True):
        ours = x.clone().requires_grad_()
        loss = xent_ext.cross_entropy(ours * 1, tokens, shift=True, num_classes=23, inplace=inplace)
        loss.backward()
        torch.testing.assert_close(loss, true)
        torch.testing.assert_close(ours.grad, leaf.grad)
    strided = x.movedim(-1, 1)[:, :, ::2].detach().requires_grad_()
    loss = xent_ext.cross_entropy(strided, tokens[:, ::2], num_classes=23)
    loss.backward()
    torch.testing.assert_close(loss, plain(input=x[:, ::2, :23].movedim(-1, 1), target=tokens[:, ::2]))
    assert not strided.grad[:, 23:].any()
    assert strided.grad[:, :23].any()


def test_a_class_of_padding_is_out_of_range():
    with pytest.raises(IndexError, match=r"expected a class index in \[0, 23\)"):
        xent_ext.cross_entropy(torch.randn(3, 28), torch.tensor([0, 25, 1]), num_classes=23)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "num_classes must be an int", {"num_classes": 5.0}),
        (ValueError, "num_classes must be at least 1", {"num_classes": 0}),
        (ValueError, "at most the number of columns of input, 28", {"num_classes": 29}),
        (ValueError, "it needs a process_group", {"class_start": 0, "num_classes": 5}),
        (TypeError, "process_group must be a torch.distributed.ProcessGroup", {"process_group": 3}),
    ],
)
def test_arguments_that_say_not_which_classes_there_are(error, match, options):
    with pytest.raises(error, match=match):
        xent_ext.cross_entropy(torch.randn(3, 28), torch.tensor([0, 5, 1]), **options)
