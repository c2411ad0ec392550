"""The loss in autograd and in the systems on top of it: what is saved, what may be called again, what composes."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, REDUCTIONS, made_ahead, make, relaid
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import xent_ext
from bench import machine
from xent_ext import ahead, backends, cpu, dispatch, expectation, memory
from xent_ext.problem import Kept, Tensors, Upstream, Wanted

both_targets = pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
all_reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def call(shape=(7, 5), dtype=torch.float32, *, ignored=0.2, **made):
    """Arguments of a call, by name: logits that require grad, target, weight."""
    input, target, weight = make(shape, dtype, weighted=True, ignored=ignored, **made)
    return {"input": input.requires_grad_(), "target": target, "weight": weight}


def random_like(loss):
    return torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss)


def gradient(loss, input, upstream=None, **options):
    return torch.autograd.grad(loss, input, random_like(loss) if upstream is None else upstream, **options)[0]


# --- Backward, once and again


@all_reductions
@both_targets
@pytest.mark.parametrize("factors", [(1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (3.0, 3.0)], ids=str)
def test_backward_again(fused, device, reduction, probabilities, factors):
    """Every backward gives what a first one gives, whatever became of the gradients given before."""
    args = call(probabilities=probabilities, device=device)
    loss = xent_ext.cross_entropy(**args, reduction=reduction)
    for factor in factors:
        upstream = torch.full_like(loss, factor)
        fresh = gradient(xent_ext.cross_entropy(**args, reduction=reduction), args["input"], upstream)
        again = gradient(loss, args["input"], upstream, retain_graph=True)
        assert torch.equal(again, fresh)
        again.zero_()
    assert torch.equal(gradient(loss, args["input"], upstream), fresh)
    with pytest.raises(RuntimeError, match="second time"):
        gradient(loss, args["input"], upstream)


@all_reductions
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_gradients_accumulate(fused, device, reduction, factor):
    args = call(device=device)
    input = args["input"]
    single = gradient(xent_ext.cross_entropy(**args, reduction=reduction).sum() * factor, input, torch.ones(()))
    loss = xent_ext.cross_entropy(**args, reduction=reduction).sum() * factor
    loss.backward(retain_graph=True)
    assert torch.equal(input.grad, single)
    loss.backward()
    assert torch.equal(input.grad, 2 * single)
    input.grad.zero_()
    (xent_ext.cross_entropy(**args, reduction=reduction).sum() * factor).backward()
    assert torch.equal(input.grad, single)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@both_targets
def test_any_factor_gives_the_bits_of_a_direct_computation(fused, device, dtype, reduction, probabilities):
    """The gradient made ahead, for a factor of 1, leaves no trace in those for others."""
    args = call(dtype=dtype, probabilities=probabilities, device=device)
    loss = xent_ext.cross_entropy(**args, reduction=reduction, label_smoothing=0.1)
    implementation = backends.implementation("cpu" if device == "cpu" else "triton")
    tensors, wanted = Tensors(*args.values()), Wanted(gradient=True)
    for factor in (1.0, 3.0, 1 / 3, 1e-6, 65504.0, -1.0, 0.0, float("inf"), float("nan")):
        upstream = torch.full_like(loss, factor)
        with torch.no_grad():
            setup = implementation.setup_for(fused[0], tensors, wanted)
            _, _, kept = setup.forward(tensors, None)
            direct, _, _ = setup.backward(tensors, Kept(*kept), Upstream(upstream), None)
        loss = xent_ext.cross_entropy(**args, reduction=reduction, label_smoothing=0.1)
        torch.testing.assert_close(gradient(loss, args["input"], upstream), direct, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("criterion", ["function", "module"])
def test_the_last_factor_is_expected_again(fused, device, reduction, criterion):
    """The gradient made ahead is the one for the last upstream gradient, and is right at once if that comes again."""
    args = call(device=device)
    module = xent_ext.CrossEntropyLoss(args["weight"], reduction=reduction)

    def loss():
        if criterion == "module":
            return module(args["input"], args["target"])
        return xent_ext.cross_entropy(**args, reduction=reduction)

    for factor in (1.0, 0.25, 0.25, 3.0, 3.0, 1.0):
        upstream = torch.full_like(loss(), factor)
        single = gradient(loss(), args["input"], upstream)
        assert torch.equal(made_ahead(loss()), single)
        other = gradient(F.cross_entropy(**args, reduction=reduction), args["input"], upstream)
        torch.testing.assert_close(single, other)


FILL = 7.0  # what memory for a gradient holds before anything is stored there


@pytest.fixture
def filled_memory(monkeypatch):
    """Memory for gradients is filled, so that what is not stored is seen."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: empty_like(tensor, **options).fill_(FILL))


def copies_moved(module, args, factor):
    """Copies of the logits that a step reads and writes, by what its passes store; and the gradient."""
    loss = module(args["input"], args["target"])
    made = made_ahead(loss)
    stored = made is not None and not (made == FILL).all().item()
    before = made.clone() if stored else None
    (found,) = torch.autograd.grad(loss, args["input"], torch.full_like(loss, factor))
    made_again = not (stored and torch.equal(before, found))
    return 1 + stored + 2 * made_again, found


@pytest.mark.parametrize(
    ("factors", "most"),
    [
        ([0.25] * 20, 2),
        ([1 / n for n in range(3, 23)], 3),
        ([0.5, 2.0] * 10, 3),
        ([1 + n // 8 for n in range(24)], 2.25),  # again at one step of 8
    ],
    ids=["constant", "another each time", "alternating", "another every 8th time"],
)
def test_a_factor_that_changes_costs_one_more_reading(fused, device, filled_memory, factors, most):
    """Two reads and one write where no factor is foreseen: no gradient is stored that would be made again."""
    args, module = call(device=device), xent_ext.CrossEntropyLoss()
    steps = [copies_moved(module, args, factor) for factor in factors]
    warm = [copies for copies, _ in steps][4:]
    assert sum(warm) / len(warm) <= most
    for (_, found), factor in zip(steps, factors, strict=True):
        loss = xent_ext.CrossEntropyLoss()(args["input"], args["target"])
        assert torch.equal(found, gradient(loss, args["input"], torch.full_like(loss, factor)))


def test_modules_have_expectations_of_their_own(fused, device):
    args = call(device=device)
    modules = [xent_ext.CrossEntropyLoss() for _ in range(2)]

    def step(module, factor):
        """The gradient made ahead, and the gradient."""
        loss = module(args["input"], args["target"])
        made = made_ahead(loss).clone()
        return made, gradient(loss, args["input"], torch.full_like(loss, factor))

    for _ in range(2):
        steps = [step(module, factor) for module, factor in zip(modules, (0.25, 3.0), strict=True)]
    for made, single in steps:
        assert torch.equal(made, single)


@pytest.mark.parametrize("factor", [1 / 3, 65504.0])
def test_an_expectation_from_another_dtype(fused, device, factor):
    """One module for logits of several dtypes: 1/3 is another number in each."""
    module = xent_ext.CrossEntropyLoss()
    for dtype in (*DTYPES, *reversed(DTYPES)):
        args = call(dtype=dtype, device=device)
        upstream = torch.tensor(factor, dtype=dtype, device=device)
        ours = gradient(module(args["input"], args["target"]), args["input"], upstream)
        fresh = gradient(xent_ext.CrossEntropyLoss()(args["input"], args["target"]), args["input"], upstream)
        assert torch.equal(ours, fresh)


def test_an_expectation_of_another_stream(fused, device, monkeypatch):
    """What another stream wrote may not be there yet, what another device has can't be read: 1 is expected then."""
    args, module = call(device=device), xent_ext.CrossEntropyLoss()

    def made():
        return made_ahead(module(args["input"], args["target"]))

    for_one = made()
    gradient(module(args["input"], args["target"]), args["input"], torch.tensor(3.0, device=device))
    torch.testing.assert_close(made(), 3 * for_one)
    monkeypatch.setattr(expectation, "queue_of", lambda input, problem: "another")
    assert torch.equal(made(), for_one)
    monkeypatch.setattr(expectation, "queue_of", lambda input, problem: None)  # a CUDA graph is captured
    assert torch.equal(made(), for_one)


@pytest.mark.parametrize(
    "memory",
    [{}, {"order": (2, 0, 1)}, {"step": 2, "padding": 1}, {"repeated": (0, 1, 2)}, {"repeated": (1,)}],
    ids=str,
)
def test_upstream_gradients_of_any_strides(fused, device, memory):
    args = call((3, 5, 4, 2), device=device)
    upstream = relaid(random_like(args["target"].float()), **memory)
    ours = gradient(xent_ext.cross_entropy(**args, reduction="none"), args["input"], upstream)
    torch.testing.assert_close(ours, gradient(F.cross_entropy(**args, reduction="none"), args["input"], upstream))


@all_reductions
def test_logits_with_another_use(fused, device, reduction):
    args = call(device=device)

    def total(cross_entropy):
        logits = 2 * args["input"]
        loss = cross_entropy(logits, args["target"], reduction=reduction)
        return loss.sum() + logits.logsumexp(1).square().mean() + cross_entropy(logits, args["target"])

    ours, theirs = total(xent_ext.cross_entropy), total(F.cross_entropy)
    torch.testing.assert_close(gradient(ours, args["input"]), gradient(theirs, args["input"]))


def test_no_upstream_gradient(fused, device):
    """A loss that nothing came of has no gradient."""
    args = call(device=device)
    loss = xent_ext.cross_entropy(**args)

    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            return None

    Drop.apply(loss).backward()
    assert args["input"].grad is None


# --- What is saved


@all_reductions
@both_targets
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arguments_are_not_modified(fused, device, reduction, probabilities, dtype):
    args = call(dtype=dtype, probabilities=probabilities, device=device)
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in args.items()}
    loss = xent_ext.cross_entropy(**args, reduction=reduction, label_smoothing=0.1)
    gradient(loss, args["input"], retain_graph=True)
    gradient(loss, args["input"])
    for name, (values, version) in before.items():
        assert torch.equal(args[name], values)
        assert args[name]._version == version


@all_reductions
@both_targets
@pytest.mark.parametrize("name", ["input", "target", "weight"])
def test_a_change_in_place_before_backward_is_noticed(fused, device, reduction, probabilities, name):
    args = call(probabilities=probabilities, device=device)
    logits = args["input"].clone()
    loss = xent_ext.cross_entropy(logits, args["target"], args["weight"], reduction=reduction)
    with torch.no_grad():
        (logits if name == "input" else args[name]).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(loss, args["input"])


@all_reductions
def test_backward_frees_what_was_saved(fused, device, reduction):
    args = call(device=device)
    loss = xent_ext.cross_entropy(**args, reduction=reduction)
    saved = loss.grad_fn.saved_tensors
    assert saved[0] is args["input"]
    gradient(loss, args["input"])
    with pytest.raises(RuntimeError, match="freed"):
        _ = loss.grad_fn.saved_tensors


def test_no_reference_cycles(fused, device):
    args = call(device=device)
    logits = weakref.ref(args["input"])
    gc.disable()
    try:
        loss = xent_ext.cross_entropy(**args)
        gradient(loss, args["input"], retain_graph=True)
        del args, loss
        assert logits() is None
    finally:
        gc.enable()


@all_reductions
def test_saved_tensors_may_be_kept_elsewhere(fused, device, reduction):
    """As offloading and checkpointing do."""
    args = call(device=device)
    plain = gradient(xent_ext.cross_entropy(**args, reduction=reduction), args["input"])
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        loss = xent_ext.cross_entropy(**args, reduction=reduction)
    for _ in range(2):
        assert torch.equal(gradient(loss, args["input"], retain_graph=True), plain)
    for reentrant in (False, True):
        loss = checkpoint(
            lambda input: xent_ext.cross_entropy(input, args["target"], args["weight"], reduction=reduction),
            args["input"],
            use_reentrant=reentrant,
        )
        loss.backward(random_like(loss))
        assert torch.equal(args["input"].grad, plain)
        args["input"].grad = None


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["", "options"])
def test_a_checkpoint_that_stops_early_is_no_error(monkeypatch, backend, options):
    """It ends a forward pass by an exception, after which nobody looks for a wrong class index."""
    monkeypatch.setattr(backends, "BACKEND", backend)
    looked_at = []
    monkeypatch.setattr(dispatch, "check_values", lambda *args: looked_at.append(args))
    args = call()
    target = args["target"]
    expected = gradient(xent_ext.cross_entropy(args["input"], target, **options), args["input"])
    loss = checkpoint(lambda x: xent_ext.cross_entropy(x, target, **options), args["input"], use_reentrant=False)
    assert torch.equal(gradient(loss, args["input"]), expected)
    assert not looked_at


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@both_targets
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_memory_is_the_gradient_and_a_few_blocks(
    cpu_blocks, monkeypatch, dtype, reduction, probabilities, label_smoothing, grad
):
    """The gradient handed out is the one made, and `explain` says beforehand what will be allocated."""
    block = 1 << 16
    monkeypatch.setattr(cpu, "BLOCK_BYTES", block)
    monkeypatch.setattr(memory, "_buffers", threading.local())
    args = call((2048, 512), dtype, probabilities=probabilities)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}

    def work():
        with torch.set_grad_enabled(grad):
            loss = xent_ext.cross_entropy(**args, **options)
        if grad:
            loss.sum().backward()

    _, peak = machine.peak_memory(work, torch.device("cpu"))
    logits = args["input"].nbytes
    values_by_row = 20 * 2048 * 4
    assert peak <= logits * grad + 4 * block + values_by_row
    with torch.set_grad_enabled(grad):
        foretold = xent_ext.explain(**args, **options).traffic.memory
    assert foretold <= peak <= foretold + 3 * block


# --- Without gradients


@all_reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_grad_and_inference_mode(fused, device, reduction, dtype):
    """They give the same loss, but for roundings, and do not spoil a training step that follows."""
    args = call(dtype=dtype, device=device)
    loss = xent_ext.cross_entropy(**args, reduction=reduction)
    expected = gradient(loss, args["input"])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            quiet = xent_ext.cross_entropy(**args, reduction=reduction)
        assert not quiet.requires_grad
        torch.testing.assert_close(quiet, loss)
        assert torch.equal(gradient(xent_ext.cross_entropy(**args, reduction=reduction), args["input"]), expected)
    detached = xent_ext.cross_entropy(args["input"].detach(), args["target"], args["weight"], reduction=reduction)
    assert not detached.requires_grad
    torch.testing.assert_close(detached, loss)


def test_inference_mode_first(cpu_blocks, monkeypatch):
    """Memory kept from a call in inference mode serves one that wants a gradient."""
    monkeypatch.setattr(memory, "_buffers", threading.local())
    args = call(dtype=torch.bfloat16)
    with torch.inference_mode():
        quiet = xent_ext.cross_entropy(**args)
    loss = xent_ext.cross_entropy(**args)
    loss.backward()
    assert torch.equal(loss, quiet)


# --- Higher derivatives


@all_reductions
@both_targets
@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_gradcheck(fused, device, reduction, probabilities, shape, label_smoothing):
    ignored = 0.3 if len(shape) > 1 else 0.0
    args = call(shape, torch.float64, ignored=ignored, probabilities=probabilities, spread=1.0, device=device)

    def loss(input):
        return xent_ext.cross_entropy(
            input, args["target"], args["weight"], reduction=reduction, label_smoothing=label_smoothing
        )

    assert gradcheck(loss, args["input"], check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(loss, args["input"], check_batched_grad=True)
    assert fused


@all_reductions
def test_gradcheck_for_probabilities_and_weight(fused, device, reduction):
    args = call((3, 4), torch.float64, probabilities=True, spread=1.0, device=device)
    tensors = tuple(tensor.detach().requires_grad_() for tensor in args.values())

    def loss(*tensors):
        return xent_ext.cross_entropy(*tensors, reduction=reduction, label_smoothing=0.2)

    assert gradcheck(loss, tensors)
    assert gradgradcheck(loss, tensors)


@all_reductions
@both_targets
@pytest.mark.parametrize("before", [False, True], ids=["", "after a backward"])
def test_third_derivative(fused, device, reduction, probabilities, before):
    args = call(dtype=torch.float64, probabilities=probabilities, spread=1.0, device=device)

    def derivatives(cross_entropy):
        loss = cross_entropy(**args, reduction=reduction, label_smoothing=0.1)
        if before:
            gradient(loss, args["input"], retain_graph=True)
        for _ in range(3):
            loss = gradient(loss, args["input"], create_graph=True)
            yield loss

    for ours, theirs in zip(derivatives(xent_ext.cross_entropy), derivatives(F.cross_entropy), strict=True):
        torch.testing.assert_close(ours, theirs)


@all_reductions
def test_gradient_penalty(fused, device, reduction):
    """The gradient's norm in the loss, in float32 and through logits that are not a leaf."""
    args = call(device=device)

    def penalised(cross_entropy):
        logits = args["input"].tanh()
        loss = cross_entropy(logits, args["target"], args["weight"], reduction=reduction).sum()
        (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
        return gradient(loss + slope.square().sum(), args["input"])

    torch.testing.assert_close(penalised(xent_ext.cross_entropy), penalised(F.cross_entropy))


# --- torch.func, forward mode, batched gradients


def transforms(cross_entropy, args, reduction):
    """The results of every transform of torch.func and their kind."""
    input = args["input"].detach()

    def loss(input, target=args["target"]):
        return cross_entropy(input, target, args["weight"], reduction=reduction)

    def scalar(input, target=args["target"]):
        return loss(input, target).sum()

    tangent = torch.linspace(-1, 1, input.numel(), dtype=input.dtype, device=input.device).reshape(input.shape)
    yield "grad", torch.func.grad(scalar)(input)
    yield "vmap", torch.func.vmap(loss)(torch.stack([input, tangent]), torch.stack([args["target"]] * 2))
    yield "per-sample", torch.func.vmap(torch.func.grad(scalar))(input.unsqueeze(1), args["target"].unsqueeze(1))
    yield "vjp", torch.func.vjp(loss, input)[1](torch.ones_like(loss(input)))[0]
    yield "jvp", torch.func.jvp(loss, (input,), (tangent,))
    yield "jacrev", torch.func.jacrev(loss)(input)
    yield "jacfwd", torch.func.jacfwd(loss)(input)
    yield "hessian", torch.func.hessian(scalar)(input)
    yield "jacobian", torch.autograd.functional.jacobian(loss, input, vectorize=True)
    with forward_ad.dual_level():
        yield "dual", tuple(forward_ad.unpack_dual(loss(forward_ad.make_dual(input, tangent))))


@all_reductions
@both_targets
def test_transforms(fused, device, reduction, probabilities):
    args = call((4, 3), torch.float64, ignored=0.0, probabilities=probabilities, device=device)
    ours = dict(transforms(xent_ext.cross_entropy, args, reduction))
    torch.testing.assert_close(ours, dict(transforms(F.cross_entropy, args, reduction)))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["", "options"])
@pytest.mark.parametrize("check", [False, True], ids=["", "check"])
def test_class_indices_that_vmap_hides(monkeypatch, options, check):
    """None can be read: right ones pass, and for a wrong one there is PyTorch's error, not one about reading it."""
    monkeypatch.setattr(backends, "CHECK", check)
    input, target = torch.randn(2, 4, 3), torch.tensor([[0, 1, 2, 2], [0, 1, 2, 0]])
    loss = torch.func.vmap(lambda input, target: xent_ext.cross_entropy(input, target, **options))
    alone = [xent_ext.cross_entropy(*pair, **options) for pair in zip(input, target, strict=True)]
    torch.testing.assert_close(loss(input, target), torch.stack(alone))
    target[0, 2] = 3
    with pytest.raises((IndexError, RuntimeError), match="index 3 is out of bounds for dimension"):
        loss(input, target)


@all_reductions
@both_targets
def test_batched_gradients(fused, device, reduction, probabilities):
    """Of a loss that the implementation made, before anyone asked for a batch of gradients."""
    args = call(probabilities=probabilities, device=device)

    def batch(cross_entropy):
        loss = cross_entropy(**args, reduction=reduction)
        upstream = torch.stack([random_like(loss), 2 * random_like(loss), torch.ones_like(loss)])
        return gradient(loss, args["input"], upstream, is_grads_batched=True)

    ours = batch(xent_ext.cross_entropy)
    assert fused
    torch.testing.assert_close(ours, batch(F.cross_entropy))


# --- Tracing, subclasses, modes


class Head(torch.nn.Module):
    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, input, target):
        return self.criterion(2 * input, target)


def test_make_fx(cpu_blocks):
    args = call()
    input, target = args["input"].detach(), args["target"]
    head = Head(xent_ext.CrossEntropyLoss())
    torch.testing.assert_close(make_fx(head)(input, target)(input, target), F.cross_entropy(2 * input, target))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_jit_trace(cpu_blocks):
    """What was traced with one target holds for others, though they have ignored rows."""
    args = call(ignored=0.0)
    input, target = args["input"].detach(), args["target"]
    traced = torch.jit.trace(Head(xent_ext.CrossEntropyLoss()), (input, target))
    target = target.clone().index_fill_(0, torch.tensor([1, 3]), -100)
    torch.testing.assert_close(traced(input, target), F.cross_entropy(2 * input, target))


@pytest.mark.parametrize("criterion", [xent_ext.cross_entropy, xent_ext.CrossEntropyLoss()], ids=["function", "module"])
def test_symbolic_trace(cpu_blocks, criterion):
    traced = torch.fx.symbolic_trace(Head(criterion))
    assert xent_ext.cross_entropy in [node.target for node in traced.graph.nodes]
    args = call()
    loss = traced(args["input"], args["target"])
    assert torch.equal(loss, xent_ext.cross_entropy(2 * args["input"], args["target"]))
    assert len(cpu_blocks) == 2


class Labelled(torch.Tensor):
    pass


def test_subclasses_are_kept(cpu_blocks):
    args = call()
    input = args["input"].detach().as_subclass(Labelled).requires_grad_()
    loss = xent_ext.cross_entropy(input, args["target"])
    assert type(loss) is Labelled
    loss.backward()
    torch.testing.assert_close(
        input.grad.as_subclass(torch.Tensor),
        gradient(F.cross_entropy(args["input"], args["target"]), args["input"], torch.ones(())),
    )


def test_overrides_see_the_function():
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    xent_ext.cross_entropy(call()["input"].detach().as_subclass(Watched), call()["target"])
    assert seen[0] is xent_ext.cross_entropy


@all_reductions
@both_targets
def test_meta_and_fake_tensors(cpu_blocks, reduction, probabilities):
    args = call((7, 5, 3), torch.bfloat16, probabilities=probabilities)
    expected = xent_ext.cross_entropy(**args, reduction=reduction)

    def agree(args):
        loss = xent_ext.cross_entropy(**args, reduction=reduction)
        assert loss.shape == expected.shape
        assert loss.dtype == expected.dtype
        assert gradient(loss, args["input"], torch.ones_like(loss)).shape == args["input"].shape

    agree({name: tensor.to("meta") for name, tensor in args.items()})
    with FakeTensorMode() as mode:
        agree({name: mode.from_tensor(tensor) for name, tensor in args.items()})


@all_reductions
@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_default_device_does_not_matter(cpu_blocks, reduction, default):
    args = call()
    expected = gradient(xent_ext.cross_entropy(**args, reduction=reduction, label_smoothing=0.1).sum(), args["input"])
    torch.set_default_device(default)
    try:
        loss = xent_ext.cross_entropy(**args, reduction=reduction, label_smoothing=0.1).sum()
        upstream = torch.randn((), generator=torch.Generator("cpu").manual_seed(1), device="cpu")
        assert torch.equal(gradient(loss, args["input"], upstream), expected)
    finally:
        torch.set_default_device(None)
    assert len(cpu_blocks) == 2


@all_reductions
def test_debugging_modes(cpu_blocks, reduction):
    args = call()
    expected = gradient(xent_ext.cross_entropy(**args, reduction=reduction), args["input"])
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            loss = xent_ext.cross_entropy(**args, reduction=reduction)
            assert torch.equal(gradient(loss, args["input"]), expected)
    finally:
        torch.use_deterministic_algorithms(False)


# --- Several losses in one graph


@pytest.fixture
def every_size(monkeypatch):
    """Gradients are counted however small, from none on."""
    monkeypatch.setattr(ahead, "LARGE", 0)
    ahead.on_device.cache_clear()
    yield
    ahead.on_device.cache_clear()


# How many losses there are at each step, and which of them have their gradient ahead when all are there. A third loss
# lets go of one that waits; a step of few losses after one of many has one ahead, and the next as many as it may.
STEPS = [(1, "A"), (5, "-A---"), (5, "A----"), (2, "A-"), (2, "AA"), (3, "-A-"), (3, "A--"), (1, "A"), (2, "AA")]


def test_two_gradients_or_one_of_many_are_made_ahead_at_a_time(fused, device, every_size):
    """The others are left to backward, with the same bits."""
    args = call(device=device)
    alone = gradient(xent_ext.cross_entropy(**args), args["input"], torch.ones((), device=device))
    for count, expected in STEPS:
        losses = [xent_ext.cross_entropy(**args) for _ in range(count)]
        assert "".join("-" if made_ahead(loss) is None else "A" for loss in losses) == expected
        for loss in losses:
            assert torch.equal(gradient(loss, args["input"], torch.ones_like(loss)), alone)


@pytest.mark.parametrize("implementation", ["cpu_blocks", "triton_backend"])
def test_a_gradient_that_is_let_go_is_made_again(request, implementation, every_size):
    """With slopes and row losses; and as one that hooks put elsewhere is, which nobody knows by its place."""
    request.getfixturevalue(implementation)
    args = call() | {
        "sample_weight": torch.rand(7).requires_grad_(),
        "logit_scale": torch.tensor(2.0, requires_grad=True),
    }
    leaves = [args[name] for name in ("input", "sample_weight", "logit_scale")]

    def gradients(loss):
        return torch.autograd.grad(loss, leaves, torch.full_like(loss, 3.0))

    expected = gradients(xent_ext.cross_entropy(**args))
    losses = [xent_ext.cross_entropy(**args) for _ in range(4)]
    assert [made_ahead(loss) is not None for loss in losses] == [False, True, False, False]
    losses[1].grad_fn._raw_saved_tensors[losses[1].grad_fn.of_call[0].given].register_hooks(torch.clone, torch.clone)
    for loss in losses:
        torch.testing.assert_close(gradients(loss), expected)


def test_losses_without_backward_do_not_slow_others_for_ever(fused, device, every_size):
    """Neither those whose graph is gone, nor those that someone keeps."""
    args = call(device=device)
    for _ in range(5):
        assert made_ahead(xent_ext.cross_entropy(**args)) is not None
    kept = [xent_ext.cross_entropy(**args) for _ in range(2)]
    found = []
    for _ in range(ahead.PATIENCE + 5):
        loss = xent_ext.cross_entropy(**args)
        found.append(made_ahead(loss) is not None)
        loss.backward()
    assert not found[0]
    assert all(found[-3:])
    for loss in kept:
        other = xent_ext.cross_entropy(**args)
        assert torch.equal(*(gradient(each, args["input"], torch.ones_like(loss)) for each in (loss, other)))


@pytest.mark.parametrize("reductions", [("mean",), ("mean",) * 2, ("mean", "sum", "none"), ("mean",) * 3, ("sum",) * 8])
def test_losses_of_a_graph_hold_no_more_than_pytorchs(cpu_blocks, monkeypatch, every_size, reductions):
    """Two copies more than there are losses, in the first step and in the next."""
    block = 1 << 14
    monkeypatch.setattr(cpu, "BLOCK_BYTES", block)
    monkeypatch.setattr(memory, "_buffers", threading.local())
    hidden, target = torch.randn(64, 8, requires_grad=True), torch.randint(512, (64,))
    heads = [torch.randn(512, 8, requires_grad=True) for _ in reductions]
    size = 64 * 512 * 4

    def peak(cross_entropy):
        def step():
            losses = [
                cross_entropy(hidden @ head.t(), target, reduction=reduction).mean()
                for head, reduction in zip(heads, reductions, strict=True)
            ]
            torch.autograd.grad(sum(losses), [hidden, *heads])

        return [machine.peak_memory(step, torch.device("cpu"))[1] for _ in range(3)]

    for ours, theirs in zip(peak(xent_ext.cross_entropy), peak(F.cross_entropy), strict=True):
        assert ours <= theirs + 4 * block
        assert theirs >= (len(reductions) + 2) * size


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_keeps_no_gradient(fused, device, use_reentrant):
    """Nothing of the logits' size is made for tensors that hooks throw away."""
    args = call((64, 40), device=device)
    made = []

    def loss(input):
        found = xent_ext.cross_entropy(2 * input, args["target"])
        if found.grad_fn is not None:
            made.append((found.grad_fn.of_call[2] is not None, torch.is_grad_enabled()))
        return found

    found = checkpoint(loss, args["input"], use_reentrant=use_reentrant)
    (given,) = torch.autograd.grad(found, args["input"]) if not use_reentrant else (None,)
    if use_reentrant:
        found.backward()
        given = args["input"].grad
    torch.testing.assert_close(given, gradient(loss(args["input"]), args["input"], torch.ones_like(found)))
    if not use_reentrant:
        assert not made[0][0]
