"""Models patched by `patch_lm_head`, beside their plain copies: losses, gradients, and who makes logits."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import current_corners
from torch.utils.checkpoint import checkpoint

import xent_ext
from xent_ext import deferred, plan
from xent_ext.deferred import DeferredLogits

CLASSES, FEATURES = 11, 6
IDS = torch.arange(15).reshape(3, 5) * 7 % CLASSES
LABELS = (IDS + 3).remainder(CLASSES).index_fill(1, torch.tensor(1), -100)
NEXT = F.pad(LABELS, (0, 1), value=-100)[..., 1:].contiguous()
PROBABILITIES = torch.linspace(0, 1, 15 * CLASSES).view(3, 5, CLASSES).softmax(-1)
WEIGHTS = torch.linspace(0, 1, 15).view(3, 5)
CLOSE = {torch.float64: {"rtol": 1e-12, "atol": 1e-14}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}


class Model(torch.nn.Module):
    """A language model in small."""

    def __init__(self, bias=True, tied=False):
        super().__init__()
        self.embedding = torch.nn.Embedding(CLASSES, FEATURES)
        self.body = torch.nn.Linear(FEATURES, FEATURES)
        self.head = torch.nn.Linear(FEATURES, CLASSES, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def get_output_embeddings(self):
        return self.head

    def hidden(self, ids):
        return torch.tanh(self.body(self.embedding(ids)))

    def forward(self, ids):
        return self.head(self.hidden(ids))


@pytest.fixture(autouse=True)
def in_chunks(monkeypatch):
    """Logits of any size."""
    monkeypatch.setattr(plan, "LEAST_CHUNK_BYTES", 0)


@pytest.fixture
def made(monkeypatch):
    """The calls of the head whose logits were made."""
    calls = []
    outputs = deferred.Head.outputs

    def watched(head):
        calls.append(head)
        return outputs(head)

    monkeypatch.setattr(deferred.Head, "outputs", watched)
    return calls


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


def pair(dtype=torch.float64, **options):
    """A plain model and its patched copy."""
    torch.manual_seed(0)
    model = Model(**options).to(dtype)
    patched = copy.deepcopy(model)
    xent_ext.patch_lm_head(patched)
    return model, patched


def step(model, loss):
    """The loss of the model's logits, and the gradients, for an upstream gradient other than 1."""
    found = loss(model(IDS))
    (2.5 * found).backward()
    return found.detach(), [parameter.grad for parameter in model.parameters()]


def assert_same(models, loss, **tolerance):
    model, patched = models
    tolerance = tolerance or CLOSE[model.body.weight.dtype]
    torch.testing.assert_close(step(patched, loss), step(model, loss), **tolerance)


def flat(logits):
    return logits.view(-1, CLASSES)


def loss_of(logits, labels=LABELS, **options):
    return F.cross_entropy(flat(logits), labels.reshape(-1), **options)


# --- What loss code does


def upcast(logits):
    return logits if logits.dtype == torch.float64 else logits.float()


def causal(logits, items=7):
    """As Transformers' `ForCausalLMLoss`."""
    return loss_of(upcast(logits), NEXT, reduction="sum") / torch.tensor(items)


def sliced(logits):
    shifted = logits[..., :-1, :].contiguous()
    return torch.nn.CrossEntropyLoss()(shifted.view(-1, shifted.size(-1)), LABELS[..., 1:].reshape(-1))


def masked(logits):
    counted = LABELS[..., 1:] != -100
    return F.cross_entropy(logits[..., :-1, :][counted].contiguous(), LABELS[..., 1:][counted])


LOSS_CODE = {
    "causal": causal,
    "sliced": sliced,
    "masked": masked,
    "rows at positions": lambda z: loss_of(z[torch.tensor([2, 0])], LABELS[[2, 0]]),
    "reshaped slice": lambda z: loss_of(z[:, 1:4].reshape(-1, CLASSES), LABELS[:, 1:4]),
    "every other": lambda z: loss_of(z[:, ::2].contiguous(), LABELS[:, ::2]),
    "by sequence": lambda z: sum(F.cross_entropy(z.select(0, i), labels) for i, labels in enumerate(LABELS)),
    "one row": lambda z: F.cross_entropy(z[1, 2], LABELS[1, 2]),
    "classes second": lambda z: F.cross_entropy(z.transpose(1, 2), LABELS),
    "classes second of a slice": lambda z: F.cross_entropy(z[:, 1:].permute(0, 2, 1), LABELS[:, 1:]),
    "classes second, cast": lambda z: F.cross_entropy(z.movedim(-1, 1).double(), LABELS),
    "time first": lambda z: loss_of(z.transpose(0, 1).contiguous(), LABELS.t()),
    "four dimensions": lambda z: F.cross_entropy(z.unsqueeze(0).permute(1, 3, 0, 2), LABELS.unsqueeze(1)),
    "same dtype and device": lambda z: loss_of(z.to(z.device).to(dtype=z.dtype).to("cpu", z.dtype).contiguous()),
    "device by keyword": lambda z: loss_of(z.to(device="cpu", dtype=torch.float64, non_blocking=True)),
    "double": lambda z: loss_of(z.double()),
    "copy": lambda z: loss_of(z.clone()),
    "scale": lambda z: loss_of(3 * (z * 0.25)),
    "divisor": lambda z: loss_of(torch.div(z, 7)),
    "cap": lambda z: loss_of(torch.tanh(z / 0.7) * 0.7),
    "scaled cap": lambda z: loss_of((upcast(z) / 0.7 * 1.5).tanh() * 0.3 / 2),
    "none": lambda z: loss_of(z, reduction="none").square().sum(),
    "sum": lambda z: loss_of(z, reduction="sum"),
    "legacy": lambda z: loss_of(z, size_average=False),
    "weight and smoothing": lambda z: loss_of(z, weight=torch.arange(11).to(z.dtype), label_smoothing=0.1),
    "ignore_index": lambda z: loss_of(z, IDS, ignore_index=3),
    "probabilities": lambda z: F.cross_entropy(z.transpose(1, 2), PROBABILITIES.to(z.dtype).transpose(1, 2)),
    "two losses": lambda z: loss_of(z) + sliced(z * 2),
    "ours": lambda z: xent_ext.cross_entropy(z, LABELS, shift=True, normalizer=7, z_loss=1e-2),
    "ours, by row": lambda z: xent_ext.cross_entropy(z.transpose(1, 2), LABELS, sample_weight=WEIGHTS.to(z.dtype)),
    "our module": lambda z: xent_ext.CrossEntropyLoss(softcap=2.0, logit_scale=0.5, inplace=True)(
        flat(z) * 3, LABELS.view(-1)
    ),
    "our module, capped": lambda z: xent_ext.CrossEntropyLoss(logit_scale=0.5)(flat(z.tanh() * 3), LABELS.view(-1)),
    "in a checkpoint": lambda z: checkpoint(causal, z, use_reentrant=False),
}


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize("name", LOSS_CODE)
def test_loss_code(made, dtype, name):
    assert_same(pair(dtype), LOSS_CODE[name])
    assert not made


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("options", [{"bias": False}, {"tied": True}])
def test_models(made, dtype, options, installed):
    models = pair(dtype, **options)
    model, patched = models
    theirs = step(model, causal)
    if installed:
        with xent_ext.installed():
            ours = step(patched, causal)
    else:
        ours = step(patched, causal)
    torch.testing.assert_close(ours, theirs, **CLOSE[dtype])
    assert not made


def test_devices(made, device):
    found = []
    for model in pair(torch.float32):
        logits = model.to(device)(IDS.to(device))
        shifted = logits.to(device=logits.device)[:, :-1].float() / 2
        loss = F.cross_entropy(shifted.reshape(-1, CLASSES), LABELS[:, 1:].reshape(-1).to(shifted.device))
        loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
        assert logits.detach().cpu().shape == (3, 5, CLASSES)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert len(made) == 1  # in the end


@pytest.mark.parametrize("frozen", ["head", "embedding|body", "body|head.bias"])
def test_frozen(made, frozen):
    models = pair()
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(name.startswith(part) for part in frozen.split("|")))
    assert_same(models, causal)
    assert not made


def test_statistics(made):
    def loss(logits):
        loss, stats = xent_ext.cross_entropy(logits, LABELS, shift=True, return_stats=("entropy", "accuracy"))
        return loss + stats.entropy.sum() + stats.accuracy

    assert_same(pair(), loss)
    assert not made


def test_a_scale_that_requires_a_gradient(made):
    scales = [torch.tensor(0.7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for model, scale in zip(pair(), scales, strict=True):
        xent_ext.cross_entropy(model(IDS) * 2, LABELS, shift=True, logit_scale=scale).backward()
    torch.testing.assert_close(scales[1].grad, scales[0].grad)
    assert not made


def test_accumulated_gradients(made):
    for model in (models := pair()):
        for items in (7, 9, 4):
            causal(model(IDS), items).backward()
    torch.testing.assert_close(*[[parameter.grad for parameter in model.parameters()] for model in models])
    assert not made


# --- Half precision


@pytest.mark.parametrize("cast", [False, True])
def test_half_precision(made, cast):
    def loss(logits):
        logits = logits.float() if cast else logits
        found = loss_of(logits, weight=torch.ones(CLASSES, dtype=logits.dtype))
        assert found.dtype == logits.dtype
        return found

    assert_same(pair(torch.bfloat16), loss, rtol=1e-2, atol=1e-2)
    assert not made


@pytest.mark.parametrize("outside", [False, True])
def test_autocast(made, outside):
    """The loss may be outside, as where Accelerate wraps the forward of the model."""

    def step(model):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(IDS)
            loss = None if outside else causal(logits)
        assert logits.dtype == torch.bfloat16
        loss = causal(logits) if outside else loss
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in model.parameters()], logits.float().detach()

    model, patched = pair(torch.float32)
    theirs, ours = step(model), step(patched)
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=0)
    assert len(made) == 1  # by what was read in the end


def test_no_autocast_in_the_loss_of_a_head_without(made):
    model, patched = pair(torch.float32)
    losses = []
    for each in (model, patched):
        logits = each(IDS)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(causal(logits))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    assert not made


# --- Real logits


def hooked(logits):
    logits.register_hook(lambda gradient: gradient * 2)
    return loss_of(logits)


def in_place(logits):
    rows = flat(logits)
    logits[..., 3] = -5.0
    return F.cross_entropy(rows, LABELS.view(-1))


class Doubled(torch.autograd.Function):
    """What `__torch_function__` doesn't see."""

    @staticmethod
    def forward(ctx, logits):
        return logits

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def measured(logits):
    with torch.no_grad():
        assert logits[:, :-1].argmax(-1).shape == (3, 4)
    return loss_of(logits)


OTHER_CODE = {
    "log_softmax": lambda z: F.nll_loss(F.log_softmax(flat(z), -1), LABELS.view(-1)),
    "with another loss": lambda z: loss_of(z) + z.logsumexp(-1).square().mean(),
    "after another loss": lambda z: z.float().logsumexp(-1).square().mean() + loss_of(z),
    "some classes": lambda z: F.cross_entropy(z[..., :9].reshape(-1, 9), LABELS.view(-1).clamp(max=8)),
    "rows at other positions": lambda z: F.cross_entropy(z[:, [0, 2]].transpose(1, 2), LABELS[:, [0, 2]]),
    "scale by class": lambda z: loss_of(z * torch.arange(CLASSES)),
    "offset": lambda z: loss_of(z + 1),
    "negative cap": lambda z: loss_of(z.tanh() * -2),
    "tanh twice": lambda z: loss_of(z.tanh().tanh()),
    "reciprocal": lambda z: loss_of(2 / (z.abs() + 1)),
    "scaled in place": lambda z: loss_of(z.div_(3)),
    "narrowed": lambda z: loss_of(z.bfloat16().double()),
    "hook": hooked,
    "in place": in_place,
    "measured before": measured,
    "a function of autograd": lambda z: loss_of(Doubled.apply(z)),
    "a function of autograd, of a view": lambda z: loss_of(Doubled.apply(flat(z * 2))),
    "checkpoint": lambda z: checkpoint(lambda z: z.logsumexp(-1).sum() + loss_of(z), z, use_reentrant=False),
    "reentrant checkpoint": lambda z: checkpoint(lambda z: z.exp().sum() + loss_of(z), z, use_reentrant=True),
    "vmap": lambda z: torch.vmap(F.cross_entropy)(z, IDS).sum(),
    "chunks": lambda z: sum(loss_of(part, labels) for part, labels in zip(z.chunk(2), LABELS.chunk(2), strict=True)),
}


@pytest.mark.parametrize("name", OTHER_CODE)
def test_other_code(made, name):
    """Bit by bit: it gets the logits that the layer would have made."""
    assert_same(pair(), OTHER_CODE[name], rtol=1e-13, atol=1e-15)
    assert len(made) == 1


def test_logits_after_the_loss(made):
    model, patched = pair()
    theirs, logits = model(IDS), patched(IDS)
    loss_of(logits).backward()
    assert not made
    assert torch.equal(logits, theirs)
    assert torch.equal(logits[:, :-1].argmax(-1), theirs[:, :-1].argmax(-1))
    assert repr(logits) == repr(theirs).replace("ViewBackward0", type(logits.view_as(logits).grad_fn).__name__)
    assert logits.detach().numpy().tolist() == theirs.tolist()
    assert type(pickle.loads(pickle.dumps(logits))) is torch.Tensor
    with torch.inference_mode():
        assert logits.sum() == theirs.sum()
    assert len(made) == 1
    saved = io.BytesIO()
    torch.save(patched(IDS), saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved), theirs)


def test_first_read_without_gradients(made):
    """They have gradients all the same."""
    model, patched = pair()
    logits = patched(IDS)
    with torch.inference_mode():
        logits.sum()
    with torch.no_grad():
        assert not logits.detach().requires_grad
        assert not (logits * 2).requires_grad
    assert len(made) == 1
    for found in (logits, model(IDS)):
        found.logsumexp(-1).sum().backward()
    assert torch.equal(patched.head.weight.grad, model.head.weight.grad)


def test_metadata(made):
    model, patched = pair()
    for view in (lambda z: z, flat, lambda z: z[:, 1:], lambda z: z[:, 1:].transpose(1, 2), lambda z: z / 2):
        theirs, ours = view(model(IDS)), view(patched(IDS))
        assert type(ours) is DeferredLogits
        for of in (
            torch.Tensor.size,
            torch.Tensor.stride,
            torch.Tensor.storage_offset,
            torch.Tensor.is_contiguous,
            len,
            torch.is_tensor,
            lambda z: (z.shape, z.ndim, z.dtype, z.device, z.requires_grad, z.is_leaf, z.is_cuda, z.nbytes),
        ):
            assert of(ours) == of(theirs)
    assert ours in {ours}
    assert not made


def test_what_changes_nothing_is_the_same_tensor(made):
    logits = pair()[1](IDS)
    assert logits.double() is logits.contiguous() is logits.to("cpu") is logits.to(torch.float64) is logits
    assert not made


def test_no_gradient_to_record(made):
    logits = pair()[1](IDS)
    with torch.no_grad():
        assert not loss_of(logits).requires_grad
        assert not F.cross_entropy(logits[0], LABELS[0]).requires_grad


def test_errors_are_those_of_real_logits():
    models = pair()
    for call, error in (
        (lambda z: F.cross_entropy(z, LABELS), RuntimeError),
        (lambda z: F.cross_entropy(flat(z), LABELS.view(-1)[1:]), ValueError),
        (lambda z: F.cross_entropy(flat(z), LABELS.view(-1) + 99), IndexError),
        (lambda z: F.cross_entropy(flat(z), LABELS.view(-1), reduction="most"), ValueError),
        (lambda z: z[:, 1:].view(-1, CLASSES), RuntimeError),
        (lambda z: z.view(7, CLASSES), RuntimeError),
        (lambda z: z[4], IndexError),
        (lambda z: z / "a", TypeError),
    ):
        for model in models:
            with pytest.raises(error):
                call(model(IDS))


def test_second_derivatives():
    found = []
    for model in pair():
        hidden = model.hidden(IDS).detach().requires_grad_()
        loss = loss_of(Doubled.apply(model.head(hidden)))
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), hidden)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


# --- What can't be made any more


@pytest.mark.parametrize("change", ["step", "data", "freed"])
def test_a_weight_that_has_changed(change):
    model = pair()[1]
    logits, scaled = model(IDS), model(IDS) * 2
    weight = model.head.weight
    if change == "step":
        loss_of(logits).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    elif change == "data":
        weight.data = weight.data.clone()
    else:
        weight.untyped_storage().resize_(0)
    for read in (logits.sum, scaled.sum, lambda: loss_of(logits), lambda: loss_of(scaled)):
        with pytest.raises(RuntimeError, match="optimizer's step"):
            read()


def test_logits_that_were_read_before_the_step():
    model = pair()[1]
    logits = model(IDS)
    before = logits.sum().item()
    loss_of(logits).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert logits.sum().item() == before


def test_a_copy_that_was_not_made_before_its_original_changed():
    logits = pair()[1](IDS)
    copied, rows = flat(logits).clone(), flat(logits)
    logits.zero_()
    assert not rows.any()
    with pytest.raises(RuntimeError, match="in place"):
        copied.sum()


# --- Where the layer is as it was


def test_evaluation():
    model, patched = pair()
    with torch.no_grad():
        assert type(patched(IDS)) is torch.Tensor
    assert type(patched.eval()(IDS)) is torch.Tensor
    assert torch.equal(patched(IDS), model.eval()(IDS))


def test_nothing_to_train():
    model = pair()[1].requires_grad_(False)
    assert type(model(IDS)) is torch.Tensor


def test_other_weights():
    """Of which nobody knows whether they are there after the call."""
    model = pair()[1]
    weights = {"head.weight": model.head.weight * 2}
    assert type(torch.func.functional_call(model, weights, (IDS,))) is torch.Tensor
    model.head.weight.ds_id = 0
    assert type(model(IDS)) is torch.Tensor
    model = pair()[1]
    torch.nn.utils.parametrizations.weight_norm(model.head)
    assert type(model(IDS)) is torch.Tensor


def test_transforms():
    model, patched = pair()

    def loss(model, parameters):
        return loss_of(torch.func.functional_call(model, parameters, (IDS,)))

    found = [torch.func.grad(lambda p, m=m: loss(m, p))(dict(m.named_parameters())) for m in (model, patched)]
    torch.testing.assert_close(*found)


def test_wrong_input_and_dtype():
    for layer in (model.head for model in pair()):
        with pytest.raises(RuntimeError):
            layer(torch.randn(2, FEATURES + 1, dtype=torch.float64))
        with pytest.raises(RuntimeError):
            layer(torch.randn(2, FEATURES))
        assert layer(torch.randn(0, FEATURES, dtype=torch.float64)).shape == (0, CLASSES)


@current_corners
@pytest.mark.parametrize("whole", [True, False], ids=["model", "loss"])
def test_compile(made, whole):
    """A compiled model has plain logits in its graph; a compiled loss breaks its graph at them."""
    model, patched = pair(torch.float32)
    compiled = torch.compile(patched if whole else causal, fullgraph=whole, backend="aot_eager")
    theirs = step(model, causal)
    ours = step(compiled, causal) if whole else step(patched, compiled)
    torch.testing.assert_close(ours, theirs, **CLOSE[torch.float32])
    assert not made


# --- Patching


def test_remove():
    model = pair()[0]
    patch = xent_ext.patch_lm_head(model)
    assert type(model(IDS)) is DeferredLogits
    for _ in range(2):
        patch.remove()
        assert type(model.head) is torch.nn.Linear
        assert type(model(IDS)) is torch.Tensor
    with xent_ext.patch_lm_head(model):
        assert type(model(IDS)) is DeferredLogits
    assert type(model(IDS)) is torch.Tensor


def test_twice():
    model = pair()[1]
    with xent_ext.patch_lm_head(model):
        assert type(model(IDS)) is DeferredLogits
    assert type(model.head) is torch.nn.Linear


def test_replaced_since():
    """As by Accelerate's hooks, which call what they replace."""
    model = pair()[0]
    patch = xent_ext.patch_lm_head(model)
    ours = model.head.forward
    model.head.forward = lambda input: ours(input)
    assert type(model(IDS)) is DeferredLogits
    with pytest.raises(ValueError, match="replaced"):
        xent_ext.patch_lm_head(model)
    with pytest.warns(RuntimeWarning, match="may still be"):
        patch.remove()


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_their_own_weights(copied_by):
    model = pair()[1]
    copied, head = copied_by(model), copied_by(model.head)
    torch.nn.init.zeros_(copied.head.weight)
    torch.nn.init.zeros_(copied.head.bias)
    assert type(copied(IDS)) is DeferredLogits
    assert not copied(IDS).any()
    model.head.weight.data.zero_()
    assert head(model.hidden(IDS)).any()


def test_data_parallel_replicas_have_their_own_weights():
    head = pair()[1].head
    replica = head._replicate_for_data_parallel()
    replica.weight, replica.bias = head.weight * 0, head.bias * 0
    x = torch.randn(2, FEATURES, dtype=torch.float64, requires_grad=True)
    assert not replica(x).any()
    assert type(replica(x)) is torch.Tensor


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (None, "Headless"),
        (torch.nn.Embedding(3, 3), "Embedding"),
        (torch.nn.Sequential(torch.nn.Linear(3, 3)), "Sequential"),
        (torch.nn.modules.linear.NonDynamicallyQuantizableLinear(3, 3), "NonDynamicallyQuantizableLinear of torch"),
    ],
)
def test_heads(head, named):
    class Headless(torch.nn.Module):
        def get_output_embeddings(self):
            return head

    with pytest.raises(TypeError, match=named):
        xent_ext.patch_lm_head(Headless())


def test_a_model_without_a_head():
    with pytest.raises(TypeError, match="get_output_embeddings"):
        xent_ext.patch_lm_head(torch.nn.Linear(2, 2))


# --- Wrapped models


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_ddp(made, one_process, options):
    model, patched = pair()
    wrapped = torch.nn.parallel.DistributedDataParallel(patched, **options)
    torch.testing.assert_close(step(wrapped, causal), step(model, causal), **CLOSE[torch.float32])
    assert len(made) == bool(options)  # by its own function of autograd


@current_corners
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("own_unit", [False, True])
def test_fsdp_makes_logits(made, one_process, own_unit):
    """Its weight is there for the call alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, patched = pair()
    mesh = init_device_mesh("cpu", (1,))
    if own_unit:
        fully_shard(patched.head, mesh=mesh)
    fully_shard(patched, mesh=mesh, reshard_after_forward=True)
    loss, gradients = step(patched, causal)
    gradients = [gradient.full_tensor() for gradient in gradients]
    torch.testing.assert_close((loss, gradients), step(model, causal), **CLOSE[torch.float32])
    assert not made
