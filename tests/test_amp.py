"""Automatic mixed precision: autocast, loss scales, torch.amp.GradScaler. (tests/test_parity.py has the results.)"""

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from parity import assert_as_good, expectation_of, make, outcome, truth

import xent_ext
from bench import machine
from xent_ext import cpu, memory

SCALE = 65536.0


@pytest.fixture(params=["cpu_blocks", "triton_backend"])
def implementation(request):
    """Each implementation, on a CPU. Returns its calls."""
    return request.getfixturevalue(request.param)


def under_autocast(function, dtype=torch.float16):
    def autocast(input, *args, **options):
        with torch.autocast(input.device.type, dtype):
            return function(input, *args, **options)

    return autocast


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_copy_of_the_logits(cpu_blocks, monkeypatch, dtype, reduction):
    """Under autocast a training step takes the memory of one gradient in half precision, and some blocks."""
    block = 1 << 16
    monkeypatch.setattr(cpu, "BLOCK_BYTES", block)
    monkeypatch.setattr(memory, "_buffers", threading.local())
    input, target, _ = make((2048, 512), dtype)
    input.requires_grad_()

    def step():
        loss = under_autocast(xent_ext.cross_entropy, dtype)(input, target, reduction=reduction)
        assert loss.dtype == torch.float32
        loss.sum().backward()

    _, peak = machine.peak_memory(step, torch.device("cpu"))
    values_by_row = 20 * 2048 * 4
    assert peak <= input.nbytes + 4 * block + values_by_row


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float16_gradients_under_a_loss_scale(implementation, reduction):
    """As precise as float16 can hold them, at the first step with that scale, and at the next, which expects it.

    Without the scale nearly all of them would be subnormal, with few digits.
    """
    input, target, _ = make((64, 300), torch.float16)
    tensors = {"input": input, "target": target, "weight": None}
    # What "mean" divides by is in the upstream gradient of the others: 65536 itself overflows.
    upstream = torch.full(target.shape if reduction == "none" else (), SCALE if reduction == "mean" else SCALE / 64)
    options = {"reduction": reduction}
    true = truth(**tensors, upstream=upstream, **options)["input"]
    theirs, _ = outcome(under_autocast(F.cross_entropy), tensors, options=options, upstream=upstream)
    for _ in range(2):
        ours, _ = outcome(under_autocast(xent_ext.cross_entropy), tensors, options=options, upstream=upstream)
        assert_as_good("input", ours["input"], theirs["input"], true)
        error = abs(ours["input"].double().numpy() - true.value)
        # Half an epsilon is the rounding to float16, the rest that of the computation in float32.
        assert (error <= 0.51 * torch.finfo(torch.float16).eps * abs(true.value) + 2**-25).all()
    assert len(implementation) == 2


def train(cross_entropy, device, steps, overflow):
    """Losses, weights, and the scale and what was expected at each step. One step's gradient overflows."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 5).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE, growth_interval=3)
    losses, scales, expected = [], [], []
    for step in range(steps):
        x, target = torch.randn(32, 8, device=device), torch.randint(5, (32,), device=device)
        with torch.autocast(device, torch.float16):
            loss = cross_entropy(model(x), target)
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        expected.append(expectation_of(loss) if hasattr(loss.grad_fn, "of_call") else None)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step == overflow:
            model.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    return losses, [p.detach() for p in model.parameters()], scales, expected


def test_grad_scaler(fused, device):
    """The scale of a step is expected at the next; where it changes, the gradient is made again, and as right."""
    criterion = xent_ext.CrossEntropyLoss()
    losses, weights, scales, expected = train(criterion, device, steps=9, overflow=4)
    their_losses, their_weights, their_scales, _ = train(F.cross_entropy, device, steps=9, overflow=4)
    assert scales == their_scales
    assert sum(a != b for a, b in itertools.pairwise(scales)) > 2
    assert [upstream.item() for upstream in expected] == [1, *scales[:-1]]
    # Gradients pass float16 on their way to the weights.
    tolerance = {"rtol": torch.finfo(torch.float16).eps, "atol": torch.finfo(torch.float16).eps}
    torch.testing.assert_close(losses, their_losses, **tolerance)
    torch.testing.assert_close(weights, their_weights, **tolerance)
    assert len(fused) == 9


def test_a_layer_whose_input_autocast_made():
    """In half precision, as what comes before the last layer is; the layer's weight is not."""
    torch.manual_seed(0)
    layers, target = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 100)), torch.randint(100, (40,))
    first, last = layers
    with torch.autocast("cpu", torch.bfloat16):
        right = F.cross_entropy(layers(torch.ones(40, 16)), target)
        loss = xent_ext.linear_cross_entropy(first(torch.ones(40, 16)), last.weight, target, linear_bias=last.bias)
    torch.testing.assert_close(loss, right)
    found, theirs = (torch.autograd.grad(each, layers.parameters()) for each in (loss, right))
    torch.testing.assert_close(found, theirs, rtol=1e-2, atol=1e-3)
