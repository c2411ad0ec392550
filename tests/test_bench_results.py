"""The committed results are complete, and the READMEs' numbers and pictures are theirs."""

import ast
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from readmes import ROOT, section, text
from torch.profiler import ProfilerActivity, profile

import xent_ext
from bench import figures, report
from bench.__main__ import main

README, BENCH = ROOT / "README.md", ROOT / "bench/README.md"
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


def result(name):
    return json.loads((RESULTS / f"cpu/{name}.json").read_text())


@pytest.fixture(scope="module")
def measured():
    """The rows of the committed run with an upstream gradient of 1, by shape."""
    return {tuple(row["shape"]): row for row in result("run")["rows"] if row["upstream"] == 1}


def rows_of(table, first):
    """The rows of a Markdown table whose first cell looks like that."""
    return re.findall(rf"^\| {first}.*\|$", table, re.M)


def time_text(milliseconds):
    if milliseconds >= 20:
        return f"{milliseconds:.0f} ms"
    return f"{milliseconds:.2f} ms" if milliseconds >= 1 else f"{1e3 * milliseconds:.0f} us"


def mebibytes(peer):
    return f"{peer['peak_bytes'] / 2**20:.0f}"


def shape_of(row):
    return ast.literal_eval(re.search(r"\(.*?\)", row)[0])


def joined(*cells):
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


# --- bench/README.md: all


def line(row):
    """A row of the table of the loss."""
    peers = [row["peers"][name] for name in COMPARED]
    times = [time_text(peer["median_ms"]) for peer in peers]
    return joined(str(tuple(row["shape"])), *times, f"{row['ratio']:.2f}", ", ".join(map(mebibytes, peers)))


def layer_line(row):
    """A row of the table of the last layer."""
    peers = [row["peers"][name] for name in ("torch_eager", "torch_chunked_512", "with_our_loss", "xent_ext")]
    cells = [f"{peer['median_ms']:.0f} ms, {mebibytes(peer)}" for peer in peers]
    return joined(" x ".join(map(str, row["shape"])), row["pass"], *cells)


def test_the_bench_shows_the_committed_run(measured):
    shown = rows_of(section(BENCH, "The loss"), r"\(")
    assert len(shown) >= 10
    assert shown == [line(measured[shape_of(row)]) for row in shown]


def test_the_bench_shows_the_committed_layers():
    shown = rows_of(section(BENCH, "The last layer with its loss"), r"\d+ x ")
    assert shown == [layer_line(row) for row in result("linear")["rows"]]


RANKS_COMPARED = ("loss_parallel", "gathered", "xent_ext", "slice_alone")


def rank_line(row, name):
    """A row of the table of classes that ranks share."""
    peer = row["peers"][name]
    cpu, sent = peer["cpu"], sum(each["sent"] for each in peer["collectives"])
    times = [f"{milliseconds:.0f}" for milliseconds in (cpu["least_ms"], cpu["median_ms"], peer["median_ms"])]
    return joined(str(row["ranks"]), name, *times, mebibytes(peer), f"{sent / 2**20:.3f}")


def planned_line(row):
    """A row of the table of what is computed."""
    plan, (rows, classes) = row["plans"]["cpu"], row["shape"]
    summaries = row["ranks"] * plan["sent"]
    sizes = [f"{size / 2**20:.2f}" for size in (plan["logits_bytes"], plan["peak_bytes"], summaries, plan["received"])]
    walks = {f"{p['bytes_read'] / p['logits_bytes']:.2f}, {p['bytes_written'] / p['logits_bytes']:.2f}"
             for p in row["plans"].values()}  # fmt: skip
    return joined(f"{classes:,}", str(row["ranks"]), *sizes, f"{plan['sent'] / rows:g}", " or ".join(sorted(walks)))


def test_the_bench_shows_the_committed_ranks():
    found, said = result("parallel"), section(BENCH, "Classes on several devices")
    lines = [rank_line(row, name) for row in found["rows"] for name in RANKS_COMPARED]
    assert rows_of(said, r"\d+ \| \w+ ") == lines
    lines = {planned_line(row) for row in found["planned"]}
    shown = rows_of(said, r"[\d,]+ \| \d+ ")
    assert len(shown) >= 9
    assert set(shown) <= lines
    peaks = [f"{row['peers']['xent_ext']['peak_bytes'] / 2**20:.2f}" for row in found["rows"][1:]]
    assert f"The first two were measured, too: {' and '.join(peaks)} MiB" in " ".join(said.split())
    assert all(peer["intact"] and peer["status"] != "wrong" for row in found["rows"] for peer in row["peers"].values())


def test_the_readme_shows_the_committed_ranks():
    (row,) = [row for row in result("parallel")["rows"] if row["ranks"] == 2]
    ours, theirs = (row["peers"][name] for name in ("xent_ext", "loss_parallel"))
    assert (
        f"for {tuple(row['shape'])} in float32 each of two processes takes {ours['cpu']['least_ms']:.0f} ms of its CPU "
        f"and {mebibytes(ours)} MiB, where `loss_parallel` takes {theirs['cpu']['least_ms']:.0f} and "
        f"{mebibytes(theirs)}"
    ) in " ".join(section(README, "Classes on several devices").split())


def test_the_bench_shows_the_committed_training():
    training = result("lm")
    theirs, ours = (training["summary"][name] for name in ("torch.nn", "xent_ext"))
    peaks = [f"{side['loss_peak_bytes'] / 2**20:.2f}" for side in (theirs, ours)]
    assert (
        f"a step takes {theirs['step_ms']:.0f} ms with PyTorch's loss and {ours['step_ms']:.0f} ms with this one, "
        f"the loss alone {theirs['loss_ms']:.0f} and {ours['loss_ms']:.0f} ms ({training['speed_up']['loss']:.2f}x), "
        f"its peak memory {' and '.join(peaks)} MiB; the loss curves differ by at most "
        f"{training['agreement']['difference']['curves']:.1e}, relatively."
    ) in " ".join(text(BENCH).split())


def spread(ratios):
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def test_the_bench_says_how_the_ratios_spread(measured):
    said = " ".join(section(BENCH, "The loss").split())
    many = {shape: row for shape, row in measured.items() if math.prod(shape) >= 1 << 20}
    images = many.pop((2, 19, 256, 256))
    few = [row for shape, row in measured.items() if math.prod(shape) < 1 << 20]
    assert f"from a million logits on it is {spread([row['ratio'] for row in many.values()])}, but for" in said
    assert f"(2, 19, 256, 256), where it is {images['ratio']:.2f}" in said
    by_eager = [row["ratio"] for row in few if row["best_baseline"] == "torch_eager"]
    assert f"go to PyTorch's own, {spread(by_eager)} with the choice" in said
    others = [row for row in few if row["best_baseline"] != "torch_eager"]
    assert {(row["best_baseline"], row["shape"][1], row["shape"][0] > 1000) for row in others} == {
        ("torch_compile", 10, True),
        ("torch_compile", 262144, False),
    }
    forward = json.loads((RESULTS / "cpu-forward/run.json").read_text())["rows"]
    assert f"it is {spread([row['ratio'] for row in forward])} times as fast" in said


def test_the_bench_says_how_many_medians_are_uncertain():
    peers = [peer for row in result("run")["rows"] for peer in row["peers"].values() if "median_ms" in peer]
    wide = sum(peer["quartiles_ms"][1] - peer["quartiles_ms"][0] > peer["median_ms"] / 4 for peer in peers)
    assert f"{wide} of {len(peers)} medians have quartiles that are more than a quarter of them apart" in " ".join(
        text(BENCH).split()
    )


def test_the_bench_says_what_the_products_of_a_layer_take():
    row = result("linear")["rows"][0]
    products = 3 * 2 * math.prod(row["shape"]) / result("linear")["operations_per_second"][row["dtype"]]
    share = 1e3 * products / row["peers"]["torch_eager"]["median_ms"]
    said = " ".join(section(BENCH, "The last layer with its loss").split())
    assert f"three matrix products take {share:.2f} of the first's time" in said


# --- README.md: a few of them, in one table


def both(peer):
    return f"{time_text(peer['median_ms'])}, {mebibytes(peer)} MiB"


def test_the_readme_shows_the_committed_results(measured):
    shown = {first: cells for first, *cells in map(cells_of, rows_of(section(README, "Numbers"), ""))}
    losses = [first for first in shown if re.match(r"(logits )?\(", first)]
    assert len(losses) >= 4
    for first in losses:
        assert shown[first][:3] == [both(measured[shape_of(first)]["peers"][name]) for name in COMPARED]
    layers = {row["pass"]: row["peers"] for row in reversed(result("linear")["rows"])}  # the first shape's mean, last
    for first, variant in {
        "layer and loss, 2048 x 1024 x 32000": "mean",
        "the same, half of the rows ignored": "half ignored",
    }.items():
        peers = layers[variant]
        assert shown[first][:3] == [both(peers["torch_eager"]), "", both(peers["xent_ext"])]
    steps = [f"{result('lm')['summary'][name]['step_ms']:.0f} ms" for name in ("torch.nn", "xent_ext")]
    assert shown["training step, logits (2048, 16384)"][:3] == [steps[0], "", steps[1]]
    assert len(shown) == len(losses) + 3 + 2  # and the heading's two rows


def cells_of(row):
    return [cell.strip() for cell in row[1:-1].split("|")]


def test_the_readme_shows_what_was_modelled():
    """The time over that of the bytes that must move, as TUNING.md has it for an H100."""
    (row,) = rows_of(text(ROOT / "bench/TUNING.md").partition("## sm_100")[0], r"\(8192, 32000\) bfloat16")
    time = cells_of(row)[-2].split(" / ")[1]
    numbers = " ".join(section(README, "Numbers").split())
    assert f"(8192, 32000) in bfloat16 on an H100 are *modelled* to take {time} times as long as" in numbers


# --- Pictures


def test_what_is_held_is_what_was_measured():
    row = result("linear")["rows"][0]
    modelled = figures.held(*row["shape"])
    for peer, (_, stages) in modelled.items():
        assert max(map(sum, stages)) == pytest.approx(row["peers"][peer]["peak_bytes"], rel=0.01)


@pytest.mark.parametrize("peer", figures.held(1, 1, 1))
def test_what_is_kept_is_what_forward_leaves(peer):
    rows, features, classes = shape = 512, 64, 32000
    input, weight = torch.randn(rows, features, requires_grad=True), torch.randn(classes, features, requires_grad=True)
    target = torch.randint(classes, (rows,))
    forward = {
        "torch_eager": lambda: F.cross_entropy(F.linear(input, weight), target),
        "with_our_loss": lambda: xent_ext.cross_entropy(F.linear(input, weight), target),
        "xent_ext": lambda: xent_ext.linear_cross_entropy(input, weight, target),
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = forward[peer]()
    left = sum(event.self_cpu_memory_usage for event in recorded.key_averages())
    assert loss.requires_grad
    _, stages = figures.held(*shape)[peer]
    assert left == pytest.approx(sum(stages[figures.STAGES.index("kept\n")]), rel=0.02)


@pytest.mark.parametrize("name", ["schedules", "memory"])
def test_pictures_are_there(name):
    assert (ROOT / f"bench/figures/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_are_drawn(tmp_path):
    assert main(["figures", "--out", str(tmp_path), "--result", str(RESULTS / "cpu/linear.json")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"schedules.png", "memory.png"}


def test_schedules_read_and_write_what_the_kernels_do():
    """As their table has it, and `Traffic`: a row is read once more where it was not held."""
    table = dict(cells_of(row)[::2] for row in rows_of(section(ROOT / "kernels/README.md", "Schedules"), "`"))
    for name, (_, steps, _) in figures.SCHEDULES.items():
        read = figures.copies(steps, figures.READ, figures.AGAIN)
        written = figures.copies(steps, figures.WRITTEN)
        assert (round(read, 9), round(written, 9)) == ((1 if name == "resident" else 2), 1)
        in_forward = 1 if name == "gradient" else 0
        assert table[f"`{name}`"].startswith(f"{read - in_forward:.0f} + {written:.0f}")


def test_readme_says_what_a_first_step_compiles():
    rows = result("compile")["rows"]
    kernels, seconds = [len(row["compiled"]) for row in rows], [row["seconds"] for row in rows]
    counts, times = f"{min(kernels)} to {max(kernels)}", f"{min(seconds):.1f} to {max(seconds):.1f}"
    said = f"compiles {counts} kernels, in {times} s of one core"
    assert said in text(README)
    assert {f"{row['seconds_cached']:.1f}" for row in rows} == {"0.4"}
    assert not any(row["compiled_twice"] for row in rows)
