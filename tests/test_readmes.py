"""The READMEs hold what they say: their code runs, their commands are there, and their links lead somewhere."""

import ast
import doctest
import functools
import os
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser

import pytest
import torch
from readmes import READMES, ROOT, blocks, section, text
from test_wrappers import distributed

import xent_ext
from bench.__main__ import COMMANDS
from xent_ext import backends

by_path = pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))

DEADLINE = 120  # seconds

# Whatever the libraries want of the net is not wanted here. Read when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")


@pytest.fixture(autouse=True)
def auto(monkeypatch):
    monkeypatch.setattr(backends, "BACKEND", "auto")


by_block = functools.partial(pytest.mark.parametrize, "block", ids=lambda block: block.where)


@by_block([block for block in blocks("python") if not block.launched])
def test_python(block, tmp_path, monkeypatch):
    """Each block is whole in itself."""
    for module in re.findall(r"^import (\w+)", block.code, re.M):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install -e '.[integration]'")
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(block.code, block.where, "exec"), {"__name__": "__main__"})
    finally:
        xent_ext.uninstall()


@distributed
@by_block([block for block in blocks("python") if block.launched])
def test_torchrun(block, tmp_path):
    """Several processes print what one does, which has all classes without a group, but for rounding."""
    command, *options, name = block.launched
    assert (command, name) == ("torchrun", "example.py")
    (tmp_path / name).write_text(block.code)
    (tmp_path / "alone.py").write_text(re.sub(r", process_group=[\w.]+", "", block.code))
    several, one = launched(options, tmp_path / name), launched(["--nproc_per_node=1"], tmp_path / "alone.py")
    assert len(one) >= 2
    assert several == pytest.approx(one, rel=1e-5)


def launched(options, path):
    """The numbers with a point that a program prints under torchrun; which has a deadline, as have its processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        printed, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.terminate()  # if it is there still: it ends its processes then
        process.wait(DEADLINE)
    assert process.returncode == 0, errors
    return [float(number) for number in re.findall(r"\d+\.\d+", printed)]


def test_examples_show_what_an_interpreter_shows():
    examples = [block for block in blocks("") if block.code.startswith(">>> ")]
    assert examples
    said = []
    for block in examples:
        names = {"xent_ext": xent_ext, "torch": torch}
        found = doctest.DocTestParser().get_doctest(block.code, names, block.where, None, None)
        doctest.DocTestRunner().run(found, out=said.append)
    assert not said, "".join(said)


def test_every_block_is_of_a_kind_that_is_tested():
    languages = ("python", "bash", "diff")
    everything = {block for path in READMES for block in re.findall(r"^```(\w+)$", text(path), re.M)}
    assert everything <= set(languages)
    assert all(block.code.startswith(">>> ") for block in blocks(""))


def commands():
    """What shells are given, word by word."""
    lines = "\n".join(block.code for block in blocks("bash")).replace(" && ", "\n").splitlines()
    return [[word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)] for line in lines]


@pytest.mark.parametrize(
    "words", [words for words in commands() if words[:3] == ["python", "-m", "bench"]], ids=" ".join
)
def test_commands_of_the_bench(words):
    """Each is one that there is, with options that it takes."""
    _, _, _, name, *options = words
    assert name in COMMANDS
    parser = ArgumentParser()
    pytest.importorskip(f"bench.{name}").add_arguments(parser)  # some need Triton
    parser.parse_args(options)


def test_commands_run_tests_that_there_are():
    tests = [word for words in commands() for word in words if word.endswith(".py")]
    assert tests
    assert all((ROOT / name).is_file() for name in tests)


def test_the_bench_lists_its_commands():
    table = re.findall(r"^\| `(\w+)", text(ROOT / "bench/README.md"), re.M)
    assert set(COMMANDS) <= set(table)


def anchors(path):
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text(path), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_path
def test_links(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", text(path)):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        leads_to = path.parent / name if name else path
        if "results" in leads_to.parts and not (ROOT / "bench/results").is_dir():
            continue  # a source distribution has none
        assert leads_to.exists(), link
        assert not anchor or anchor in anchors(leads_to), link


def test_tables_are_whole():
    """As many cells in every row as in the heading."""
    for path in READMES:
        for rows in re.findall(r"(?:^\|.*\n)+", text(path), re.M):
            cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()}
            assert len(cells) == 1, rows


@pytest.mark.parametrize("folder", ["xent_ext", "kernels"])
def test_maps_name_every_module(folder):
    """Those in the docstrings of packages."""
    named = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")))
    modules = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert modules <= set(re.findall(r"\w+", named))


def test_the_readme_says_what_ci_runs():
    script = ROOT / ".ci/run"
    if not script.is_file():
        pytest.skip("a source distribution has no .ci/run")
    named = re.findall(r"\$\(readme (\w+)\)", script.read_text())
    marks = re.findall(r"^<!-- ci: (\w+) -->\n```bash$", text(ROOT / "README.md"), re.M)
    assert sorted(named) == sorted(marks) == ["run", "test"]
    assert section(ROOT / "README.md", "Try it").count("```bash") == len(marks)
