"""`explain` says, where it is shown, how a call runs, with the one reason that applies."""

import re

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import xent_ext
from xent_ext import ahead, backends, cpu_own

INDICES = torch.zeros(3, dtype=torch.int64)
AS_FAST = "PyTorch's own is as fast for logits of this kind and size on a CPU"
IMAGES = torch.empty(4, 16, 256, 256, dtype=torch.bfloat16), torch.empty(4, 256, 256, dtype=torch.int64)


@pytest.fixture(autouse=True)
def auto(monkeypatch):
    monkeypatch.setattr(backends, "BACKEND", "auto")


def test_it_is_shown_once(capsys):
    explanation = xent_ext.explain(torch.randn(3, 5), INDICES)
    assert not capsys.readouterr().out
    assert repr(explanation) == str(explanation)
    assert str(explanation) == f"implementation  torch: {AS_FAST}\nheld            0 bytes: no gradient is wanted"


def test_it_takes_class_indices_in_uint8():
    logits = torch.randn(3, 5, requires_grad=True)
    assert repr(xent_ext.explain(logits, INDICES.to(torch.uint8))) == repr(xent_ext.explain(logits, INDICES))


def probabilities(**options):
    return torch.randn(3, 5), torch.rand(3, 5, **options)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.randn(3, 5), INDICES), AS_FAST),
        ((IMAGES[0].to(memory_format=torch.channels_last), IMAGES[1]), "the logits are on a CPU"),
        (probabilities(requires_grad=True), "a gradient with respect to the target is wanted"),
        ((*probabilities(), torch.ones(5, requires_grad=True)), "a gradient with respect to the weight is wanted"),
    ],
    ids=["few logits", "channels last", "target", "weight"],
)
def test_the_reason_that_applies(arguments, reason):
    assert xent_ext.explain(*arguments).reason == reason


@pytest.mark.skipif(not backends.RECENT, reason="older PyTorch's compiler does not trace it")
def test_the_reason_in_a_compiled_graph():
    reasons = []

    @torch.compile(backend="eager")
    def explained(logits):
        reasons.append(xent_ext.explain(logits, INDICES).reason)
        return logits + 1

    explained(torch.randn(3, 5))
    assert reasons == ["PyTorch's own is as fast for a compiled graph on a CPU"]


# --- What is held until backward

ROWS, CLASSES = 32, 500
LOGITS = ROWS * CLASSES * 4
BY_ROW = 64 * ROWS  # bytes, at most


@pytest.fixture
def every_size(monkeypatch):
    """Gradients that wait for their backward are counted however small."""
    monkeypatch.setattr(ahead, "LARGE", 0)
    ahead.on_device.cache_clear()
    yield
    ahead.on_device.cache_clear()


def new_call(**options):
    logits = torch.randn(ROWS, CLASSES, requires_grad=True) * 1
    return {"input": logits, "target": torch.randint(CLASSES, (ROWS,))} | options


def bytes_of(tensors, args):
    """Those of the storages of tensors, without those of the arguments but the logits."""
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}
    for name, value in args.items():
        if isinstance(value, torch.Tensor) and name != "input":
            sizes.pop(value.untyped_storage()._cdata, None)
    return sum(sizes.values())


def really_held(args):
    """By the graph of the loss, which is returned, too."""
    loss = xent_ext.cross_entropy(**args)
    if loss.grad_fn is None:
        return loss, 0
    _, _, _, overwritten, _ = loss.grad_fn.of_call
    return loss, bytes_of((*loss.grad_fn.saved_tensors, overwritten), args)


@pytest.fixture(params=["cpu_blocks", "triton_backend"])
def calls(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("options", "copies", "what"),
    [
        ({}, 2, "the logits and their gradient, made ahead"),
        ({"label_smoothing": 0.1, "z_loss": 0.1}, 2, "the logits and their gradient, made ahead"),
        ({"reduction": "none"}, 1, "the logits; .* upstream gradient of its own"),
        ({"inplace": True}, 1, "the gradient, in the place of the logits"),
    ],
    ids=["mean", "options", "none", "in place"],
)
def test_held(calls, options, copies, what):
    args = new_call(**options)
    held = xent_ext.explain(**args).held
    assert re.fullmatch(what, held.what)
    assert held.bytes == copies * LOGITS
    _, really = really_held(args)
    assert held.bytes <= really <= held.bytes + BY_ROW
    assert len(calls) == 1


def test_held_without_a_gradient(calls):
    args = new_call()
    with torch.no_grad():
        assert xent_ext.explain(**args).held == (0, "no gradient is wanted")
        assert really_held(args)[1] == 0


def test_held_where_the_logits_have_none(calls):
    args = new_call(sample_weight=torch.rand(ROWS, requires_grad=True))
    args["input"] = args["input"].detach()
    assert xent_ext.explain(**args).held == (LOGITS, "the logits")
    assert LOGITS <= really_held(args)[1] <= LOGITS + BY_ROW


@pytest.mark.parametrize("hooks", [save_on_cpu, lambda: saved_tensors_hooks(lambda t: t, lambda t: t)])
def test_held_under_hooks(calls, hooks):
    args = new_call()
    with hooks():
        held = xent_ext.explain(**args).held
        _, really = really_held(args)
    assert held == (LOGITS, "the logits; their gradient is left to backward, as hooks on saved tensors are active")
    assert LOGITS <= really <= LOGITS + BY_ROW


def test_held_beside_other_losses(calls, every_size):
    """To explain a call changes nothing for it, nor for others."""
    args, losses = new_call(), []
    for copies in (2, 2, 1, 1):
        held = [xent_ext.explain(**args).held for _ in range(3)]
        assert held == 3 * [held[0]]
        assert held[0].bytes == copies * LOGITS
        assert ("those of other losses wait" in held[0].what) == (copies == 1)
        loss, really = really_held(args)
        assert held[0].bytes <= really <= held[0].bytes + BY_ROW
        losses.append(loss)


def saved_by_operators(args):
    saved = []
    with saved_tensors_hooks(saved.append, lambda _: None):
        xent_ext.cross_entropy(**args)
    return bytes_of(saved, args | {"logits": args["input"]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [20, CLASSES])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("few_logits", [0, cpu_own.FEW_LOGITS])
def test_held_by_pytorchs_own(monkeypatch, backend, dtype, classes, probabilities, options, few_logits):
    """What its operators save, in the dtype that they have on a CPU."""
    monkeypatch.setattr(backends, "BACKEND", backend)
    monkeypatch.setattr(cpu_own, "FEW_LOGITS", few_logits)
    logits = torch.randn(ROWS, classes, dtype=dtype, requires_grad=True)
    target = torch.rand(ROWS, classes).to(dtype) if probabilities else torch.randint(classes, (ROWS,))
    args = {"input": logits, "target": target, **options}
    explanation = xent_ext.explain(**args)
    assert explanation.implementation == "torch"
    assert explanation.held.bytes >= logits.nbytes
    assert abs(explanation.held.bytes - saved_by_operators(args)) <= BY_ROW


def test_held_by_the_plain_formula():
    args = new_call(target=torch.rand(ROWS, CLASSES, requires_grad=True), softcap=2.0, logit_scale=torch.tensor(2.0))
    explanation = xent_ext.explain(**args)
    assert explanation.implementation == "plain"
    assert explanation.held.bytes >= 2 * LOGITS
    assert abs(explanation.held.bytes - saved_by_operators(args)) <= BY_ROW


def test_held_by_what_nobody_can_ask_beforehand():
    assert torch.func.vmap(lambda x: x + (xent_ext.explain(x, INDICES).held.bytes is None))(torch.zeros(2, 3, 5)).all()


# --- Classes on several devices


@pytest.fixture
def four_ranks():
    """A group of four, of which this process is the second, and nobody is there."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=1, world_size=4, store=fake.FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, 4),
        ({"weight": torch.ones(CLASSES)}, 5),
        ({"return_stats": True}, 8),
        ({"reduction": "none"}, 4),
    ],
    ids=["mean", "weight", "statistics", "none"],
)
def test_what_is_sent(calls, four_ranks, options, numbers):
    """So many numbers of each row, to each of the others; the logits are read once more for their gradient."""
    explanation = xent_ext.explain(**new_call(process_group=four_ranks, **options))
    sent, traffic = 4 * numbers * ROWS, explanation.traffic
    assert (traffic.sent, traffic.received) == (sent, 3 * sent)
    said = f"collective      summaries gathered: {sent:,} bytes sent to each rank, {3 * sent:,} received"
    assert said in str(explanation).splitlines()
    assert 2 * LOGITS <= traffic.bytes_read < 2.2 * LOGITS
    assert explanation.held.bytes == (1 if "reduction" in options else 2) * LOGITS
    assert not calls


def test_nothing_is_said_of_a_collective_where_there_is_none(calls):
    assert "collective" not in str(xent_ext.explain(**new_call()))
