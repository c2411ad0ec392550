"""What only a GPU has: streams, and CUDA graphs."""

import warnings

import pytest
import torch
from conftest import needs_gpu
from parity import REDUCTIONS, make

import xent_ext
from xent_ext import backends

pytestmark = needs_gpu

all_reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
# A row that stays in registers, one that a cluster may share, one that is streamed.
SHAPES = pytest.mark.parametrize("shape", [(512, 1000), (64, 32000), (16, 300000)], ids=str)


def step(criterion, input, target, upstream):
    loss = criterion(input, target)
    return loss, torch.autograd.grad(loss, input, upstream)[0]


@SHAPES
@all_reductions
def test_graph_capture_and_replay(shape, reduction):
    """A captured step gives the bits of an eager one for whatever lies in its arguments when it is replayed."""
    criterion = xent_ext.CrossEntropyLoss(reduction=reduction, label_smoothing=0.1)
    input, target, _ = make(shape, torch.bfloat16, ignored=0.2, device="cuda")
    input.requires_grad_()
    upstream = torch.ones(target.shape if reduction == "none" else (), dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(criterion, input, target, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(criterion, input, target, upstream)
    for seed, factor in ((1, 1.0), (2, 1.0), (3, 0.25)):
        new_input, new_target, _ = make(shape, torch.bfloat16, ignored=0.2, seed=seed, device="cuda")
        with torch.no_grad():
            input.copy_(new_input)
        target.copy_(new_target)
        upstream.fill_(factor)
        graph.replay()
        for found, expected in zip(captured, step(criterion, input, target, upstream), strict=True):
            assert torch.equal(found, expected)


@SHAPES
@all_reductions
def test_streams(shape, reduction):
    """Steps of one module on two streams at once give what they give one after another."""
    criterion = xent_ext.CrossEntropyLoss(reduction=reduction)
    batches = [make(shape, torch.bfloat16, seed=seed, device="cuda")[:2] for seed in range(2)]
    rows = batches[0][1].shape if reduction == "none" else ()
    upstreams = [torch.full(rows, factor, dtype=torch.bfloat16, device="cuda") for factor in (0.5, 4.0)]
    arguments = [(input.requires_grad_(), target, g) for (input, target), g in zip(batches, upstreams, strict=True)]
    expected = [step(criterion, *args) for args in arguments]
    streams = [torch.cuda.Stream() for _ in arguments]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found = []
    for _ in range(5):
        for stream, args in zip(streams, arguments, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(criterion, *args))
    torch.cuda.synchronize()
    for i, results in enumerate(found):
        assert all(map(torch.equal, results, expected[i % 2]))


@pytest.mark.parametrize("ignored", [0.0, 0.2])
def test_checked_class_indices_cost_one_synchronisation(monkeypatch, ignored):
    monkeypatch.setattr(backends, "CHECK", True)
    input, target, _ = make((64, 1000), ignored=ignored, device="cuda")
    xent_ext.cross_entropy(input, target)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            xent_ext.cross_entropy(input, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) == 1
