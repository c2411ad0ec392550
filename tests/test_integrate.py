"""The fused loss under torch.nn.functional.cross_entropy, and PyTorch's own there again."""

import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import current_corners
from parity import check, make

import xent_ext
from xent_ext import backends, integrate

OWN = F.cross_entropy


@pytest.fixture(autouse=True)
def nothing_installed():
    assert F.cross_entropy is OWN
    yield
    xent_ext.uninstall()
    assert F.cross_entropy is OWN


@pytest.fixture
def arguments(device):
    input, target, _ = make((7, 5), ignored=0.2, device=device)
    return input.requires_grad_(), target


# --- Installing


def test_install_and_uninstall():
    for _ in range(2):
        xent_ext.install()
        assert F.cross_entropy is integrate.cross_entropy
    xent_ext.uninstall()
    assert F.cross_entropy is OWN
    xent_ext.uninstall()
    assert F.cross_entropy is OWN


def test_blocks_nest():
    with xent_ext.installed():
        with xent_ext.installed():
            assert F.cross_entropy is integrate.cross_entropy
        assert F.cross_entropy is integrate.cross_entropy
    assert F.cross_entropy is OWN


def test_a_block_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), xent_ext.installed():
        _ = 1 / 0
    assert F.cross_entropy is OWN


def test_blocks_and_install():
    xent_ext.install()
    with xent_ext.installed():
        pass
    assert F.cross_entropy is integrate.cross_entropy
    with xent_ext.installed():
        xent_ext.uninstall()
        assert F.cross_entropy is integrate.cross_entropy
    assert F.cross_entropy is OWN


def test_threads():
    """Overlapping blocks of many threads: present within each, gone after the last."""
    start, seen = threading.Barrier(8), []

    def work():
        start.wait()
        for _ in range(200):
            with xent_ext.installed():
                seen.append(F.cross_entropy is integrate.cross_entropy)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1600
    assert all(seen)
    assert F.cross_entropy is OWN


def test_what_was_there_before_comes_back(monkeypatch):
    def other(*args, **kwargs):
        return OWN(*args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", other)
    with xent_ext.installed():
        assert F.cross_entropy is integrate.cross_entropy
    assert F.cross_entropy is other
    monkeypatch.undo()


def test_what_came_later_stays(fused, arguments):
    """It has replaced ours, and calls it; ours is gone when it is."""
    xent_ext.install()
    ours = F.cross_entropy

    def later(*args, **kwargs):
        return ours(*args, **kwargs)

    F.cross_entropy = later
    with pytest.warns(RuntimeWarning, match="later"):
        xent_ext.uninstall()
    assert F.cross_entropy is later
    F.cross_entropy(*arguments)
    assert len(fused) == 1
    with xent_ext.installed():
        assert F.cross_entropy is ours
    assert F.cross_entropy is later
    F.cross_entropy = ours
    xent_ext.uninstall()
    assert F.cross_entropy is OWN


def test_own_put_back_by_someone_else(recwarn):
    xent_ext.install()
    F.cross_entropy = OWN
    xent_ext.install()
    assert F.cross_entropy is integrate.cross_entropy
    F.cross_entropy = OWN
    xent_ext.uninstall()
    assert not recwarn


# --- What is installed


def test_signature_and_name():
    ours, theirs = (inspect.signature(function).parameters.values() for function in (integrate.cross_entropy, OWN))
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]
    assert integrate.cross_entropy.__name__ == OWN.__name__


@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_results(fused, device, probabilities, reduction):
    input, target, weight = make((2, 5, 3), probabilities=probabilities, weighted=True, device=device)

    def installed(*args, **options):
        with xent_ext.installed():
            return F.cross_entropy(*args, **options)

    check(input, target, weight, function=installed, reduction=reduction, label_smoothing=0.1)
    assert len(fused) == 1


def test_module(fused, arguments):
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    expected = criterion(*arguments)
    with xent_ext.installed():
        loss = criterion(*arguments)
    torch.testing.assert_close(loss, expected)
    assert len(fused) == 1


def test_functions_of_torch_that_call_it(fused, device):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this PyTorch has no linear_cross_entropy")
    x, weight = torch.randn(7, 3, device=device), torch.randn(5, 3, device=device)
    target = torch.arange(7, device=device) % 5
    expected = F.linear_cross_entropy(x, weight, target)
    with xent_ext.installed():
        torch.testing.assert_close(F.linear_cross_entropy(x, weight, target), expected)
    assert len(fused) == 1


def test_legacy_arguments(fused, arguments):
    with xent_ext.installed(), pytest.warns(UserWarning, match="size_average"):
        loss = F.cross_entropy(*arguments, None, False)
    torch.testing.assert_close(loss, OWN(*arguments, reduction="sum"))


def test_what_the_implementations_do_not_do(fused):
    input, target, _ = make((7, 5), probabilities=True)
    target.requires_grad_()
    with xent_ext.installed():
        F.cross_entropy(input, target).backward()
    assert target.grad is not None
    assert not fused


@pytest.mark.parametrize(
    ("change", "error"),
    [
        pytest.param({"input": torch.zeros(7, 5, dtype=torch.int64)}, NotImplementedError, marks=current_corners),
        ({"target": torch.zeros(6, dtype=torch.int64)}, ValueError),
        ({"target": torch.full((7,), 5)}, IndexError),
        ({"target": None}, TypeError),
        ({"reduction": "average"}, ValueError),
        ({"label_smoothing": 2.0}, RuntimeError),
    ],
    ids=str,
)
def test_errors(cpu_blocks, change, error):
    input, target, _ = make((7, 5))
    arguments = {"input": input, "target": target, **change}
    with pytest.raises(error):
        OWN(**arguments)
    with xent_ext.installed(), pytest.raises(error):
        F.cross_entropy(**arguments)


def test_unknown_arguments(arguments):
    with xent_ext.installed(), pytest.raises(TypeError, match="z_loss"):
        F.cross_entropy(*arguments, z_loss=1e-4)


# --- Who asks which function it is


class Table(torch.Tensor):
    """A subclass that handles what stands in its table, made when only PyTorch's function was there."""

    handled = {OWN: lambda *args, **kwargs: "handled"}  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in cls.handled:
            return cls.handled[function](*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


def test_subclasses_know_it(arguments):
    input, target = arguments
    with xent_ext.installed():
        assert F.cross_entropy(input.detach().as_subclass(Table), target) == "handled"


def test_under_a_mode(fused, device, arguments):
    """A default device is a mode that sees every function, and changes nothing about this one."""
    with xent_ext.installed(), torch.device(device):
        loss = F.cross_entropy(*arguments)
    assert len(fused) == 1
    torch.testing.assert_close(loss, OWN(*arguments))


def test_a_mode_sees_what_it_looks_up(arguments):
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function is F.cross_entropy)
            return function(*args, **(kwargs or {}))

    with xent_ext.installed(), Watch():
        F.cross_entropy(*arguments)
    assert seen[0]


def test_symbolic_trace(fused, device, arguments):
    """The graph has PyTorch's function in it, and outlives the installation."""
    with xent_ext.installed():
        traced = torch.fx.symbolic_trace(lambda input, target: F.cross_entropy(2 * input, target))
    input, target = arguments
    assert OWN in [node.target for node in traced.graph.nodes]
    torch.testing.assert_close(traced(input, target), OWN(2 * input, target))


# --- Compilers


def loss_of_double(input, target):
    return F.cross_entropy(2 * input, target)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_script(device, arguments):
    """TorchScript compiles PyTorch's own under the installed name."""
    with xent_ext.installed():
        scripted = torch.jit.script(loss_of_double)
        module = torch.jit.script(torch.nn.CrossEntropyLoss())
    assert torch.equal(scripted(*arguments), loss_of_double(*arguments))
    assert torch.equal(module(*arguments), OWN(*arguments))


def test_compile(fused, device, arguments):
    """A graph is made again when what stands under the name is another."""
    torch.compiler.reset()
    function = torch.compile(loss_of_double, fullgraph=True, backend="aot_eager")
    expected = function(*arguments)
    assert not fused
    with xent_ext.installed():
        torch.testing.assert_close(function(*arguments), expected)
        assert len(fused) == int(backends.RECENT)
    assert torch.equal(function(*arguments), expected)
    assert len(fused) == int(backends.RECENT)


def test_compile_a_loss_made_in_the_graph(fused, device, arguments):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(input, target):
        return torch.nn.CrossEntropyLoss()(2 * input, target)

    with xent_ext.installed():
        torch.testing.assert_close(function(*arguments), loss_of_double(*arguments))
