"""What is built holds what it should, and works where it is installed: from a wheel, editable, without Triton."""

import ast
import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from xent_ext import backends
from xent_ext.backends import HAS_TRITON

ROOT = Path(__file__).resolve().parents[1]

# What would tie a file to one machine, or to what lies beside the checkout (which only .ci/ may know).
MACHINE_PATH = re.compile(r"/(?:home|root|Users|mnt|srv|work)/\w")
OUTSIDE_PATH = re.compile(r"\.\./\w")
LINK = re.compile(r"\]\((\.\./[^)#]+)")  # of Markdown

# Large enough for the CPU implementation: small logits go to PyTorch's own.
LOSS = """
import torch
import xent_ext

logits = torch.randn(8192, 10, requires_grad=True)
target = torch.randint(10, (8192,))
losses = [loss(logits, target) for loss in (xent_ext.CrossEntropyLoss(), torch.nn.CrossEntropyLoss())]
gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
torch.testing.assert_close(*losses)
torch.testing.assert_close(*gradients)
explanation = xent_ext.explain(logits, target)
print(explanation.implementation)
print(explanation.reason)
"""

WHERE = """
import importlib.metadata
import importlib.util
import xent_ext.kernels

top_level = importlib.util.find_spec("kernels")
print(importlib.metadata.version("xent_ext"))
print(xent_ext.__version__)
print(xent_ext.__file__)
print(xent_ext.kernels.__file__)
print(top_level and top_level.origin)
"""

# None makes `import triton` raise ModuleNotFoundError, as where it is not installed.
WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None
"""

# Audit events tell of compilers started and of libraries loaded.
IMPORT = """
import sys
import torch

before = set(sys.modules)
events = []
watched = ("subprocess.Popen", "os.system", "os.fork", "os.exec", "os.posix_spawn", "ctypes.dlopen")
sys.addaudithook(lambda event, arguments: events.append((event, arguments)) if event in watched else None)
import xent_ext

assert not events, events
assert not torch.cuda.is_initialized()
new = {name.partition(".")[0] for name in sys.modules.keys() - before}
assert "triton" not in new, new
"""


def run(*command, cwd, backend="auto"):
    """The standard output of a command, which must succeed; nothing of this process's settings reaches it."""
    settings = ("PYTHONPATH", "TRITON_INTERPRET", "XENT_EXT_BACKEND", "XENT_EXT_CHECK")
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | {"XENT_EXT_BACKEND": backend},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def needs(*packages):
    for package in packages:
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"to build and install without network, {package} must be installed")


@pytest.fixture(scope="module")
def files():
    """The project's files, relative to ROOT: what git tracks, or would."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("which files are the project's is asked of git, and this is no git checkout")
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def source(files, tmp_path_factory):
    """A copy of the project, so that builds write nothing into the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for file in files:
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, copy / file)
    return copy


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """(sdist, wheel made from that sdist, what the build said), without network."""
    needs("build", "setuptools")
    folder = tmp_path_factory.mktemp("dist")
    said = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel, said


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


def environment(folder, *install):
    """The Python of a fresh environment with this project installed, which sees what this one has besides.

    The path file puts this environment's packages behind its own, and does not run their path files, by which an
    editable installation would get in.
    """
    needs("pip")
    venv.create(folder, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = run(python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(site, "here.pth").write_text("\n".join(here))
    if install:
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
        run(*pip, "--ignore-installed", "--no-build-isolation", *install, cwd=folder)
    return python


@pytest.fixture(scope="module")
def requirements_python(tmp_path_factory):
    return environment(tmp_path_factory.mktemp("requirements"))


@pytest.fixture(scope="module")
def wheel_python(built, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("wheel"), built[1])


@pytest.fixture(scope="module")
def editable_python(source, tmp_path_factory):
    needs("setuptools")
    return environment(tmp_path_factory.mktemp("editable"), "--editable", source)


def test_sdist_holds_the_project(built, files):
    with tarfile.open(built[0]) as sdist:
        names = {Path(*Path(name).parts[1:]) for name in sdist.getnames()}
    wanted = {file for file in files if file.suffix == ".py" or file.name in ("LICENSE", "README.md", "pyproject.toml")}
    assert wanted | {Path("CHANGELOG.md"), Path("bench/model.json")} <= names


def test_wheel_holds_the_package_and_nothing_else(built, files):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {Path(name) for name in wheel.namelist()}
        (licence,) = (name for name in names if name.name == "LICENSE")
        assert wheel.read(licence.as_posix()).decode() == (ROOT / "LICENSE").read_text()
    modules = {file for file in files if file.suffix == ".py"}
    wanted = {file for file in modules if file.parts[0] == "xent_ext"}
    wanted |= {"xent_ext" / file for file in modules if file.parts[0] == "kernels"}
    assert {name for name in names if not name.parts[0].endswith(".dist-info")} == wanted | {Path("xent_ext/py.typed")}


def test_metadata(metadata):
    assert metadata["Name"] == "xent_ext"
    assert metadata["License-Expression"] == "MIT"
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (.+)$", changes, re.M)[1] == metadata["Version"]
    requires = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert requires == ["torch>=2.8", 'triton>=3.4; platform_system == "Linux"']
    assert set(metadata.get_all("Provides-Extra")) == {"test", "bench", "integration"}
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_build_uses_nothing_deprecated(built):
    assert "deprecat" not in built[2].lower()


@pytest.mark.parametrize("kind", ["wheel", "editable", "requirements"])
def test_a_checkout_is_imported_as_it_is(kind, source, request):
    """Whatever is installed beside it, or nothing but what the package requires."""
    python = request.getfixturevalue(f"{kind}_python")
    modules = ("xent_ext", "xent_ext.kernels", "bench")
    where = "; ".join(f"import {module} as found; print(found.__file__)" for module in modules)
    for found in run(python, "-c", where, cwd=source).splitlines():
        assert Path(found).is_relative_to(source)
    assert run(python, "-c", LOSS, cwd=source).splitlines()[-2:] == ["cpu", "the logits are on a CPU"]


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed(kind, source, tmp_path, request):
    python = request.getfixturevalue(f"{kind}_python")
    recorded, version, package, kernels, top_level = run(python, "-I", "-c", WHERE, cwd=tmp_path).splitlines()
    assert recorded == version
    folder = source if kind == "editable" else python.parents[1]
    assert Path(package).is_relative_to(folder)
    assert Path(kernels).is_relative_to(folder)
    assert not Path(top_level).is_relative_to(folder)
    assert run(python, "-I", "-c", LOSS, cwd=tmp_path).splitlines()[-2:] == ["cpu", "the logits are on a CPU"]


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("auto", ["cpu", "the logits are on a CPU"]), ("triton", ["torch", "Triton is not installed"])],
)
def test_without_triton(backend, expected, wheel_python, tmp_path):
    said = run(wheel_python, "-I", "-c", WITHOUT_TRITON + LOSS, cwd=tmp_path, backend=backend)
    assert said.splitlines()[-2:] == expected


CALL = """
import torch, xent_ext
print(xent_ext.cross_entropy(torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)).isfinite().item())
"""


@pytest.mark.skipif(torch.cuda.is_available() or not HAS_TRITON, reason="Triton has a driver, or is not installed")
def test_triton_on_a_cpu(monkeypatch):
    """Without its interpreter it says what to set; every value that Triton takes for that will do."""
    monkeypatch.setenv("XENT_EXT_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused = subprocess.run([sys.executable, "-c", CALL], cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"RuntimeError: .*XENT_EXT_BACKEND=triton .* set TRITON_INTERPRET=1", refused.stderr)
    for value in ("1", "true"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert subprocess.check_output([sys.executable, "-c", CALL], cwd=ROOT, text=True) == "True\n"


def test_a_word_for_neither_on_nor_off():
    done = subprocess.run(
        [sys.executable, "-c", "import xent_ext"],
        cwd=ROOT,
        env=os.environ | {"XENT_EXT_CHECK": "ja"},
        capture_output=True,
        text=True,
    )
    assert "ValueError: XENT_EXT_CHECK must be one of 0, false, no, off, 1, true, yes, on, got 'ja'" in done.stderr


@pytest.mark.skipif(
    not backends.RECENT, reason="to break graphs of older PyTorch takes its compiler, which imports Triton"
)
def test_import_is_light(wheel_python, tmp_path):
    run(wheel_python, "-I", "-c", IMPORT, cwd=tmp_path)


def imported(file):
    """The top-level modules that a Python file cannot do without, relative imports aside."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    optional = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.Try) and any("ImportError" in ast.dump(handler) for handler in block.handlers)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in optional:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def test_imports_are_declared(files, metadata):
    """The package imports what it requires, and the rest of the project what an extra requires besides."""
    lines = metadata.get_all("Requires-Dist")
    modules = importlib.metadata.packages_distributions()

    def importable(lines):
        names = {re.match(r"[\w.-]+", line)[0] for line in lines}
        return names | {module for module, distributions in modules.items() if names & set(distributions)}

    package = importable(line for line in lines if "extra ==" not in line)
    project = importable(lines) | {"bench", "xent_ext"} | {file.stem for file in files if file.parts[0] == "tests"}
    undeclared = [
        f"{file} imports {name}"
        for file in files
        if file.suffix == ".py"
        for name in imported(file)
        if name not in sys.stdlib_module_names
        if name not in (package if file.parts[0] in ("xent_ext", "kernels") else project)
    ]
    assert not undeclared


def leads_outside(file, line):
    """Whether a line names what lies beside the checkout. A page's links to others of the project do not."""
    inside = [link for link in LINK.findall(line) if file.suffix == ".md" and is_of_project(file.parent / link)]
    for link in inside:
        line = line.replace(f"]({link}", "](")
    return file.parts[0] != ".ci" and OUTSIDE_PATH.search(line)


def is_of_project(path):
    found = (ROOT / path).resolve()
    return found.is_relative_to(ROOT) and found.exists()


@pytest.mark.parametrize(
    ("file", "line", "leads"),
    [
        ("xent_ext/README.md", "[this](UP/README.md#here) and ![that](UP/bench/figures/memory.png)", False),
        ("xent_ext/README.md", "[this](UP/README.md) and UP/shared", True),
        ("xent_ext/README.md", "[this](UP/UP/README.md)", True),
        ("README.md", "[this](UP/README.md)", True),
        ("xent_ext/plan.py", "[this](UP/README.md)", True),
        (".ci/run", "UP/shared", False),
    ],
)
def test_what_leads_outside(file, line, leads):
    """UP is two dots: this file, too, must name nothing outside."""
    assert bool(leads_outside(Path(file), line.replace("UP", ".."))) == leads


def test_files_name_no_machine(files):
    found = []
    for file in files:
        content = (ROOT / file).read_bytes()
        if b"\0" in content:  # an image
            continue
        for number, line in enumerate(content.decode().splitlines(), 1):
            if MACHINE_PATH.search(line) or leads_outside(file, line):
                found.append(f"{file}:{number}: {line}")
    assert not found
