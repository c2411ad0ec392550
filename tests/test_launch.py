"""What is kept from call to call: that arguments are right, launch numbers, compiled code; and what is not."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import xent_ext
from xent_ext import backends

ROOT = Path(__file__).resolve().parents[1]


def arguments(device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 40, generator=generator).to(device).requires_grad_()
    return x, torch.randint(40, (6,), generator=generator).to(device)


def test_calls_that_are_alike_share_what_was_found(triton_backend, device):
    from xent_ext.kernels import implementation

    for _ in range(3):
        x, target = arguments(device)
        xent_ext.cross_entropy(x, target).backward()
    assert implementation.setup.cache_info().misses == 1
    xent_ext.cross_entropy(x, target, label_smoothing=0.1)
    xent_ext.cross_entropy(x[:, :-1], target % 39)
    assert implementation.setup.cache_info().misses == 3
    assert len({id(problem) for problem in triton_backend}) == 3


def test_no_tensor_is_kept(fused, device):
    x, target = arguments(device)
    loss = xent_ext.cross_entropy(x, target)
    loss.backward()
    kept = [weakref.ref(tensor) for tensor in (x, target, x.grad, loss)]
    del x, target, loss
    gc.collect()
    assert [ref() for ref in kept] == [None] * 4


@pytest.mark.parametrize(
    ("good", "bad", "error"),
    [
        ({"ignore_index": 1}, {"ignore_index": True}, TypeError),
        ({"ignore_index": 0}, {"ignore_index": 0.0}, TypeError),
        ({"label_smoothing": 1.0}, {"label_smoothing": torch.ones(1)}, TypeError),
        ({}, {"reduction": "average"}, ValueError),
        ({}, {"weight": torch.ones(39)}, RuntimeError),
        ({"weight": torch.ones(40)}, {"weight": torch.ones(40, dtype=torch.float64)}, RuntimeError),
        ({"weight": torch.ones(40)}, {"weight": torch.ones(40, requires_grad=True)}, RuntimeError),
        ({"weight": torch.ones(40)}, {"weight": [1.0] * 40}, TypeError),
    ],
)
def test_wrong_arguments_that_equal_right_ones(fused, device, good, bad, error):
    """True equals 1, and has its hash; the rest differs from what was seen before in one thing."""
    x, target = arguments(device)

    def call(options):
        on_device = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
        return xent_ext.cross_entropy(x, target, **on_device)

    call(good)
    with pytest.raises(error):
        call(bad)
    call(good)
    assert len(fused) == 2


def test_modes_are_seen_after_the_same_call_without(fused, device):
    x, target = arguments(device)
    expected = xent_ext.cross_entropy(x, target)
    half = x.detach().bfloat16()
    assert xent_ext.cross_entropy(half, target).dtype == torch.bfloat16
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        assert xent_ext.cross_entropy(half, target).dtype == torch.float32
    assert xent_ext.cross_entropy(half, target).dtype == torch.bfloat16
    with torch.no_grad():
        assert not xent_ext.cross_entropy(x, target).requires_grad
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        assert forward_ad.unpack_dual(xent_ext.cross_entropy(dual, target)).tangent is not None
    through = torch.func.grad(xent_ext.cross_entropy)(x.detach(), target)
    torch.testing.assert_close(through, torch.autograd.grad(F.cross_entropy(x, target), x)[0])
    assert torch.equal(xent_ext.cross_entropy(x, target), expected)


def test_class_indices_are_checked_in_every_call(triton_backend, monkeypatch, device):
    x, target = arguments(device)
    xent_ext.cross_entropy(x, target)
    monkeypatch.setattr(backends, "CHECK", True)
    xent_ext.cross_entropy(x, target)
    with pytest.raises(IndexError, match="Target 40 is out of bounds"):
        xent_ext.cross_entropy(x, target.fill_(40))


@pytest.mark.skipif(not backends.HAS_TRITON, reason="Triton is not installed")
def test_kept_code_gets_what_triton_gives_it():
    """Under a driver that loads and launches nothing: in the first call Triton launches, later its binder is not asked.

    Tensors that start at another place than on 16 bytes have code of their own.
    """
    code = """if True:
        import inspect
        import torch, triton, xent_ext
        from triton.runtime import JITFunction
        from bench import offline
        from xent_ext import backends

        launches, bound = [], []

        class Launcher:
            def __init__(self, source, metadata):
                self.name = metadata.name

            def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
                launches.append((self.name, (x, y, z), addresses(args)))

        def addresses(value):
            if isinstance(value, tuple):
                return [addresses(member) for member in value]
            return value.data_ptr() % 16 if isinstance(value, torch.Tensor) else value

        class Driver(offline.Driver):
            launcher_cls = Launcher

            def load_binary(self, *args):
                module, function, registers, spills, threads = "module", "function", 32, 0, 1024
                if "n_max_threads" in inspect.getsource(triton.compiler.CompiledKernel._init_handles):
                    return module, function, registers, spills, threads
                return module, function, registers, spills  # as older Tritons expect

            def unload_module(self, module):
                pass

        run = JITFunction.run
        JITFunction.run = lambda self, *args, **kwargs: bound.append(self) or run(self, *args, **kwargs)
        triton.runtime.driver.set_active(Driver("cuda", 90))
        backends.BACKEND = "triton"
        memory = torch.randn(2001 * 1000)
        target = torch.zeros(2000, dtype=torch.int64)

        def step(start):
            launches.clear()
            bound.clear()
            x = memory[start : start + 2000 * 1000].view(2000, 1000).requires_grad_()
            xent_ext.cross_entropy(x, target, label_smoothing=0.1).backward()
            return list(launches), len(bound)

        for start in (0, 1):
            (by_triton, asked), (by_kept_code, asked_again) = step(start), step(start)
            assert [name for name, *_ in by_triton] == ["normalizer_parts", "resident", "sum_parts", "resident"]
            assert asked == 4 and asked_again == 0, (asked, asked_again)
            assert by_kept_code == by_triton
            given, *_ = by_triton[1][2]
            assert given[0][0] == 4 * start  # the logits
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
