"""The last linear layer with its loss in compiled graphs: one graph, the same results, nothing made twice."""

import pytest
import torch
import torch.nn.functional as F
from parity import REDUCTIONS
from test_linear import make

import xent_ext
from xent_ext import backends, linear, linear_autograd, plan

recent = pytest.mark.skipif(not backends.RECENT, reason="this PyTorch's compiler can't trace the package")
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    linear_autograd.expectation_for.cache_clear()
    monkeypatch.setattr(plan, "LEAST_CHUNK_BYTES", 0)
    yield
    torch._dynamo.reset()


def loss_of(given, **options):
    input, weight, bias, target = given
    return xent_ext.linear_cross_entropy(input, weight, target, linear_bias=bias, chunk_rows=5, **options)


@recent
@every_reduction
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_for_every_batch_size(backend, reduction):
    graphs, made = [], 0

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(loss_of, backend=count, fullgraph=True, dynamic=True)
    for rows in (23, 7, 40):
        given = make((rows,))
        found, right = compiled(given, reduction=reduction), loss_of(given, reduction=reduction)
        upstream = torch.rand_like(right)
        torch.testing.assert_close(found, right)
        mine = torch.autograd.grad(found, given[:3], upstream)
        torch.testing.assert_close(mine, torch.autograd.grad(right, given[:3], upstream))
        made = made or len(graphs)  # Dynamo may start again, until it has the first
    assert len(graphs) == made


@recent
@every_reduction
def test_options_and_statistics(reduction):
    given = make()
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    f = torch.rand(23, dtype=torch.float64, requires_grad=True)
    options = {
        "reduction": reduction,
        "weight": torch.rand(11, dtype=torch.float64),
        "label_smoothing": 0.1,
        "softcap": 2.0,
        "z_loss": 0.1,
        "logit_scale": scale,
        "sample_weight": f,
        "return_stats": True,
    }
    leaves = (*given[:3], scale, f)
    outputs = []
    for function in (torch.compile(loss_of, backend="aot_eager", fullgraph=True), loss_of):
        loss, stats = function(given, **options)
        total = loss.sum() * 3 + stats.entropy.sum() + (stats.lse * 0.5).sum()
        outputs.append((loss, vars(stats), torch.autograd.grad(total, leaves)))
    torch.testing.assert_close(*outputs)


@recent
def test_gradients_are_made_ahead(monkeypatch):
    again, backward = [], linear.backward
    monkeypatch.setattr(linear, "backward", lambda *args: again.append(1) or backward(*args))
    given = make()
    compiled = torch.compile(lambda given: loss_of(given) * 0.25, backend="aot_eager", fullgraph=True)
    mine = torch.autograd.grad(compiled(given), given[:3])
    torch.testing.assert_close(mine, torch.autograd.grad(loss_of(given) * 0.25, given[:3]))
    assert not again


@recent
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_with_a_scale(dtype):
    input, weight, bias, target = (each.detach() for each in make((40,), 16, 3000, torch.float32))
    half = [each.to(dtype).requires_grad_() for each in (input, weight, bias)]
    scale = 65536.0 if dtype == torch.float16 else 1.0
    theirs = torch.autograd.grad(F.cross_entropy(F.linear(*half).float(), target) * scale, half)
    true = [each.detach().double().requires_grad_() for each in half]
    exact = torch.autograd.grad(F.cross_entropy(F.linear(*true), target) * scale, true)
    compiled = torch.compile(lambda *args: loss_of((*args, target)) * scale, backend="aot_eager", fullgraph=True)
    for right, their, our in zip(exact, theirs, torch.autograd.grad(compiled(*half), half), strict=True):
        assert (our - right).norm() <= 1.1 * (their - right).norm()


@recent
def test_autocast_in_a_graph():
    input, weight, _, target = make(dtype=torch.float32)

    def step(input, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return xent_ext.linear_cross_entropy(input, weight, target)

    found, right = torch.compile(step, backend="aot_eager", fullgraph=True)(input, weight), step(input, weight)
    torch.testing.assert_close(found, right)
    leaves = (input, weight)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(right, leaves))


@recent
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operators(reduction):
    given = make((7,), 3, 4)
    recorded, forward = [], linear_autograd.arguments

    def note(*args):
        recorded.append(forward(*args))
        return recorded[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_autograd, "arguments", note)
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(torch.compiler, "is_exporting", lambda: False)
        loss_of(given, reduction=reduction)
    torch.library.opcheck(torch.ops.xent_ext.linear_forward.default, recorded[0])


@recent
def test_under_compiled_autograd():
    given = make()
    found, right = loss_of(given) * 0.5, loss_of(given) * 0.5
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        found.backward()
    mine = [each.grad for each in given[:3]]
    torch.testing.assert_close(mine, list(torch.autograd.grad(right, given[:3])))


@recent
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_of_a_number_that_depends_on_data():
    def counted(input, weight, bias, target):
        mask = target != -100
        return xent_ext.linear_cross_entropy(input[mask], weight, target[mask], linear_bias=bias)

    given = make()
    found, right = torch.compile(counted, backend="aot_eager", fullgraph=True)(*given), loss_of(given)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(torch.autograd.grad(found, given[:3]), torch.autograd.grad(right, given[:3]))


@recent
@pytest.mark.parametrize("strict", [False, True], ids=["tracing", "strict"])
def test_export_with_a_dynamic_batch_size(strict):
    module = xent_ext.LinearCrossEntropyLoss(8, 11)
    input, _, _, target = make(dtype=torch.float32)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        module, (input.detach(), target), dynamic_shapes=({0: rows}, {0: rows}), strict=strict
    )
    assert "xent_ext" not in str(program.graph)
    for size in (4, 23):
        torch.testing.assert_close(program.module()(input[:size], target[:size]), module(input[:size], target[:size]))


def test_where_the_graph_may_break():
    given = make()
    found, right = torch.compile(loss_of, backend="eager")(given), loss_of(given)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(torch.autograd.grad(found, given[:3]), torch.autograd.grad(right, given[:3]))
