"""The module: everything but its forward is torch.nn.CrossEntropyLoss's."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from parity import REDUCTIONS, check, make

import xent_ext

WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5])
OPTIONS = {
    "default": {},
    "weight": {"weight": WEIGHT},
    "ignore_index": {"ignore_index": 2},
    "reduction": {"reduction": "none"},
    "label_smoothing": {"label_smoothing": 0.1},
    "all": {"weight": WEIGHT, "ignore_index": 1, "reduction": "sum", "label_smoothing": 0.3},
}

every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@every_option
@pytest.mark.parametrize("shape", [(7, 5), (2, 5, 3, 4)], ids=str)
def test_forward(cpu_blocks, options, shape):
    """The module's options reach the function, and so the loss is as good as PyTorch's."""
    rest = {"ignore_index": -100} | {name: value for name, value in options.items() if name != "weight"}
    input, target, _ = make(shape, ignored=0.2, ignore_index=rest["ignore_index"])

    def module(input, target, weight, **options):
        return xent_ext.CrossEntropyLoss(weight, **options)(input, target)

    check(input, target, options.get("weight"), function=module, **rest)
    assert len(cpu_blocks) == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probabilities(cpu_blocks, reduction):
    input, target, _ = make((7, 5), probabilities=True)

    def module(input, target, weight, **options):
        return xent_ext.CrossEntropyLoss(weight, **options)(input, target)

    check(input, target, WEIGHT, function=module, reduction=reduction, label_smoothing=0.1)


@every_option
def test_state_is_that_of_torch_nn(options):
    ours, theirs = xent_ext.CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert dict(ours.named_buffers()).keys() == dict(theirs.named_buffers()).keys()
    assert not list(ours.parameters())
    for name in ("ignore_index", "label_smoothing", "reduction", "training"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.weight is theirs.weight  # the same object, not a copy
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (xent_ext.CrossEntropyLoss, torch.nn.CrossEntropyLoss),
        (xent_ext.cross_entropy, torch.nn.functional.cross_entropy),
    ],
    ids=["module", "function"],
)
def test_signature_is_that_of_pytorch_and_options_by_keyword(ours, theirs):
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
    same, options = ours[: len(theirs)], ours[len(theirs) :]
    assert [(p.name, p.default, p.kind) for p in same] == [(p.name, p.default, p.kind) for p in theirs]
    assert {p.kind for p in options} == {inspect.Parameter.KEYWORD_ONLY}


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_option
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, through_pickle, through_torch_save])
def test_copies(cpu_blocks, options, copied):
    original = xent_ext.CrossEntropyLoss(**options)
    copied = copied(original)
    assert type(copied) is xent_ext.CrossEntropyLoss
    args = make((7, 5))[:2]
    assert torch.equal(copied(*args), original(*args))
    assert len(cpu_blocks) == 2


def test_weight_moves_with_the_module():
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), xent_ext.CrossEntropyLoss(WEIGHT))
    assert "1.weight" in model.state_dict()
    model.double()
    assert model[1].weight.dtype == torch.float64
    assert model.to("meta")[1].weight.device.type == "meta"


def test_attributes_may_change_after_construction(cpu_blocks):
    args = make((7, 5))[:2]
    module = xent_ext.CrossEntropyLoss()
    module.reduction, module.label_smoothing, module.ignore_index, module.weight = "sum", 0.2, 1, WEIGHT
    made = xent_ext.CrossEntropyLoss(WEIGHT, reduction="sum", label_smoothing=0.2, ignore_index=1)
    assert torch.equal(module(*args), made(*args))


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [True, False])
def test_legacy_arguments(size_average, reduce):
    with pytest.warns(UserWarning, match="deprecated"):
        ours = xent_ext.CrossEntropyLoss(size_average=size_average, reduce=reduce)
    with pytest.warns(UserWarning, match="deprecated"):
        theirs = torch.nn.CrossEntropyLoss(size_average=size_average, reduce=reduce)
    assert ours.reduction == theirs.reduction


@pytest.mark.parametrize("own", ["a name", None, torch.nn.Linear(1, 1), torch.nn.Parameter(torch.ones(1))], ids=str)
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}], ids=str)
def test_a_subclass_has_options_of_its_own(cpu_blocks, own, options):
    class Named(xent_ext.CrossEntropyLoss):
        def __init__(self, **options):
            super().__init__(**options)
            self.options = own

    args = make((7, 5))[:2]
    module = copy.deepcopy(Named(**options))
    assert type(module.options) is type(own)
    assert torch.equal(module(*args), xent_ext.CrossEntropyLoss(**options)(*args))
    assert module.extra_repr() == xent_ext.CrossEntropyLoss(**options).extra_repr()


def test_options_are_looked_at_in_forward():
    module = xent_ext.CrossEntropyLoss(reduction="no", label_smoothing=7)
    with pytest.raises(ValueError, match="reduction"):
        module(*make((7, 5))[:2])


class Scaled(torch.nn.Module):
    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, input, target):
        return self.criterion(2 * input, target)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@every_option
def test_script(options):
    """TorchScript compiles PyTorch's own in its place, by itself and within a model."""
    input, target, _ = make((7, 5))
    criterion = xent_ext.CrossEntropyLoss(**options).eval()
    for module in (criterion, Scaled(criterion)):
        scripted = torch.jit.script(module)
        torch.testing.assert_close(scripted(input, target), module(input, target))
        assert scripted.state_dict().keys() == module.state_dict().keys()
    assert not scripted.criterion.training


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_script_of_the_function():
    input, target, _ = make((7, 5))
    scripted = torch.jit.script(scripted_loss)
    torch.testing.assert_close(scripted(input, target), scripted_loss(input, target))


def scripted_loss(input, target):
    return xent_ext.cross_entropy(2 * input, target, label_smoothing=0.1, reduction="sum")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_script_has_no_options_for_training():
    with pytest.raises(RuntimeError, match=r"no options for training, got z_loss=0.1"):
        torch.jit.script(xent_ext.CrossEntropyLoss(z_loss=0.1))


def test_training_step(cpu_blocks):
    """One line swapped in a training script: the same weights after a few steps."""

    def trained(criterion):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(10):
            input, target = torch.randn(32, 8), torch.randint(5, (32,))
            optimizer.zero_grad()
            criterion(model(input), target).backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    ours, theirs = trained(xent_ext.CrossEntropyLoss()), trained(torch.nn.CrossEntropyLoss())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(cpu_blocks) == 10
