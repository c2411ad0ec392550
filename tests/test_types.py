"""What type checkers say of the package, and of code that uses it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lines that must be errors say so: `--strict` has mypy complain of a comment that ignores nothing.
USER = """
import torch
from torch import Tensor
from typing_extensions import assert_type

import xent_ext

logits, target = torch.randn(4, 5, requires_grad=True), torch.zeros(4, dtype=torch.int64)

criterion = xent_ext.CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-4)
loss = criterion(logits, target)
loss.backward()
criterion.forward(logits, target, sample_weight=torch.ones(4)).backward()

xent_ext.cross_entropy(logits, target, label_smoothing=0.1).backward()
xent_ext.cross_entropy(logits, target, None, None, -100, None, "sum", softcap=30.0, return_stats=False).backward()
loss, stats = xent_ext.cross_entropy(logits, target, return_stats=True)
(loss - stats.entropy.mean()).backward()
assert_type(loss, Tensor)
assert_type(stats, xent_ext.CrossEntropyStats)
for names in (["lse"], ("lse", "accuracy")):
    loss, stats = xent_ext.cross_entropy(logits, target, return_stats=names)
    print(float(stats.accuracy))
xent_ext.cross_entropy(logits, target, return_stats=True).backward()  # type: ignore[attr-defined]
xent_ext.cross_entropy(logits, target, return_stats=1)  # type: ignore[call-overload]


def loss_of(logits: Tensor, target: Tensor, wanted: bool) -> Tensor:
    found = xent_ext.cross_entropy(logits, target, return_stats=wanted)
    return found[0] if isinstance(found, tuple) else found


class Weighted(xent_ext.CrossEntropyLoss):
    def __init__(self, factor: float) -> None:
        super().__init__(reduction="sum")
        self.factor = factor

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.factor * super().forward(input, target)


class Masked(xent_ext.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(input, target, sample_weight=mask)


module: torch.nn.CrossEntropyLoss = Weighted(0.5)
explanation = xent_ext.explain(logits, target, softcap=30.0)
print(explanation, explanation.implementation.upper(), explanation.traffic and explanation.traffic.bytes_read + 1)
xent_ext.install()
xent_ext.uninstall()
with xent_ext.installed():
    pass
"""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")


def checked(*command, cwd):
    """What a type checker says, which must be that all is well."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def mypy(tmp_path):
    return sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache"


def test_the_package(mypy):
    checked(*mypy, cwd=ROOT)


def test_code_that_uses_it(mypy, tmp_path):
    (tmp_path / "user.py").write_text(USER)
    strict = ("--strict", "--untyped-calls-exclude=torch", "--follow-imports=silent")  # `Tensor.backward` has no types
    checked(*mypy, *strict, "user.py", cwd=tmp_path)


@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed")
def test_code_that_uses_it_by_the_rules_of_pyright(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "xent_ext").symlink_to(ROOT / "xent_ext")
    checked("pyright", "--pythonpath", sys.executable, "user.py", cwd=tmp_path)
