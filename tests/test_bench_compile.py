"""What calls have compiled, counted: `python -m bench compile`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compile as compile_module
from bench import compile_report
from xent_ext import backends

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not backends.HAS_TRITON, reason="Triton is not installed")

STEPS = """
import json, sys
import torch
from bench.compile import steps
from bench.kernels import Variant

alike = [
    Variant("", (8192, 40000), torch.bfloat16),
    Variant("", (8192, 40000), torch.bfloat16, options=(("ignore_index", 0),)),
    Variant("", (6400, 40016), torch.bfloat16),
]
before = set(sys.modules)
found = [[each["kernel"] for each in compiled] for compiled, _ in steps("sm_90", alike, sys.argv[1])]
print(json.dumps({"compiled": found, "imported": "torch.distributed.tensor" in sys.modules.keys() - before}))
"""


def python(*arguments):
    """Python in a process of its own, without the interpreter that the tests ask of Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_step_is_compiled_once_and_kept_for_other_processes(tmp_path):
    """Rows and classes that 16 divides, and numbers of options, are values; see test_compiled.py for all sizes."""
    first, again = (json.loads(python("-c", STEPS, str(tmp_path))) for _ in range(2))
    usual, ignored, other = first["compiled"]
    if "streaming" in usual:  # rows are shared by clusters, which are checked
        checked, usual = usual[:3], usual[3:]
        assert checked == ["resident", "sum_parts", "streaming"]
        assert usual == ["normalizer_parts", "resident", "sum_parts", "resident"]
    assert not ignored
    assert not other
    assert not any(again["compiled"])
    # Neither by the check: it took as long as to compile a kernel.
    assert not first["imported"]
    assert not again["imported"]


def test_code_that_was_compiled_twice_is_named():
    kernels = [{"kernel": "resident", "hash": hash} for hash in "aba"] + [{"kernel": "sum_parts", "hash": "c"}]
    assert compile_module.twice(kernels) == ["resident"]
    assert compile_module.twice(kernels[1:]) == []


def test_the_report_counts_kernels():
    compiled = [{"kernel": name, "seconds": 0.25} for name in ("resident", "resident", "sum_parts")]
    assert compile_report.kernels(compiled) == "2 resident 0.50, 1 sum_parts 0.25"
    assert compile_report.kernels([]) == "nothing"
