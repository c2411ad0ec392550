"""The committed results are complete, and README.md's numbers are theirs."""

import ast
import json
import re
from pathlib import Path

import pytest

from bench import report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
FOLDERS = sorted(path for path in RESULTS.glob("*") if path.is_dir())
COMPARED = ("torch_eager", "torch_compile", "xent_ext")

pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="a source distribution has no results")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_result_names_its_machine_and_has_its_plot(folder):
    found = report.results(folder)
    assert found
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(found)
    for path, result in found.items():
        assert result["machine"]["cpu"]
        assert result["method"].strip()
        assert report.module(result).text(result).strip()
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def measured():
    """The rows of the committed run with an upstream gradient of 1, by shape."""
    rows = json.loads((RESULTS / "cpu/run.json").read_text())["rows"]
    return {tuple(row["shape"]): row for row in rows if row["upstream"] == 1}


def time_text(milliseconds):
    if milliseconds >= 20:
        return f"{milliseconds:.0f} ms"
    return f"{milliseconds:.2f} ms" if milliseconds >= 1 else f"{1e3 * milliseconds:.0f} us"


def line(row):
    """A row of README.md's table."""
    peers = [row["peers"][name] for name in COMPARED]
    times = [time_text(peer["median_ms"]) for peer in peers]
    peaks = ", ".join(f"{peer['peak_bytes'] / 2**20:.0f}" for peer in peers)
    return "| " + " | ".join([str(tuple(row["shape"])), *times, f"{row['ratio']:.2f}", peaks]) + " |"


def layer_line(row):
    """A row of README.md's table of the last layer."""
    peers = [row["peers"][name] for name in ("torch_eager", "torch_chunked_512", "with_our_loss", "xent_ext")]
    cells = [f"{peer['median_ms']:.0f} ms, {peer['peak_bytes'] / 2**20:.0f}" for peer in peers]
    return "| " + " | ".join([" x ".join(map(str, row["shape"])), row["pass"], *cells]) + " |"


def test_readme_shows_the_committed_layers():
    rows = json.loads((RESULTS / "cpu/linear.json").read_text())["rows"]
    shown = re.findall(r"^\| \d+ x .*\|$", (ROOT / "README.md").read_text(), re.M)
    assert shown == [layer_line(row) for row in rows]


def test_readme_shows_the_committed_run(measured):
    numbers = (ROOT / "README.md").read_text().partition("\n## Numbers\n")[2]
    shown = re.findall(r"^\| \(.*\|$", numbers, re.M)
    shapes = [ast.literal_eval(row.split("|")[1].strip()) for row in shown]
    assert len(shown) >= 10
    assert shown == [line(measured[shape]) for shape in shapes]


def test_readme_shows_the_committed_training():
    readme = " ".join((ROOT / "README.md").read_text().split())
    result = json.loads((RESULTS / "cpu/lm.json").read_text())
    theirs, ours = (result["summary"][name] for name in ("torch.nn", "xent_ext"))
    peaks = [f"{side['loss_peak_bytes'] / 2**20:.2f}" for side in (theirs, ours)]
    assert (
        f"a step takes {theirs['step_ms']:.0f} ms with PyTorch's loss and {ours['step_ms']:.0f} ms with this one, "
        f"the loss alone {theirs['loss_ms']:.0f} and {ours['loss_ms']:.0f} ms ({result['speed_up']['loss']:.2f}x), "
        f"its peak memory {' and '.join(peaks)} MiB; the loss curves differ by at most "
        f"{result['agreement']['difference']['curves']:.1e}, relatively."
    ) in readme
