"""What Triton compiles the kernels to, for GPUs that need not be there: the data of `python -m bench kernels`."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.kernels import TARGETS, VARIANTS, without_tools
from xent_ext import backends

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not backends.HAS_TRITON, reason="Triton is not installed")


TRITON = backends.release(importlib.metadata.version("triton")) if backends.HAS_TRITON else ()


def python(*arguments):
    """Run Python where Triton compiles; in this process its interpreter may have taken the compiler's place."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# Each kernel, with all that it is compiled for; helpers walk no logits.
PASSES = {
    "resident": {"loss", "loss+gradient", "remake", "gradient"},
    "cluster": {"loss", "loss+gradient", "remake", "gradient"},  # `resident`, shared by several programs
    "streaming": {"loss", "loss+gradient"},
    "gradient": {"loss", "loss+gradient", "remake", "gradient"},
    "collect": {""},
    "normalizer_parts": {""},
    "sum_parts": {""},
}
LOGITS = [kernel for kernel in PASSES if PASSES[kernel] != {""}]
VECTORS = (torch.bfloat16, torch.float32)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The rows of `python -m bench kernels` for a kernel and a target."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.json"
    python("-m", "bench", "kernels", "--json", str(path))
    if TRITON < (3, 9):
        pytest.skip("the plans are for a newer Triton: with this one all compiles, but some kernels spill a few bytes")
    rows = json.loads(path.read_text())

    def of(kernel, target):
        if target in without_tools():
            pytest.skip(f"this Triton alone can't link for {target}")
        if kernel == "cluster" and not has_clusters(target):
            pytest.skip(f"no clusters on {target}")
        found = [row for row in rows if row["target"] == target and kernel_of(row) == kernel]
        assert {row["pass"] for row in found} == PASSES[kernel]
        return found

    return of


def kernel_of(row):
    return "cluster" if row["num_ctas"] > 1 else row["kernel"]


def has_clusters(target):
    backend, arch = TARGETS[target]
    device = importlib.import_module("xent_ext.kernels.device")
    return device.largest_cluster(SimpleNamespace(backend=backend, arch=arch)) > 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", PASSES)
def test_nothing_spills_to_memory(compiled, kernel, target):
    spilled = [
        f"{row['variant']} ({row['pass']}): {row['registers']} registers, {row['spill_bytes']} bytes spilled"
        for row in compiled(kernel, target)
        if row["spill_bytes"]
    ]
    assert not spilled, "\n".join(spilled)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", LOGITS)
def test_logits_move_in_128_bits(compiled, kernel, target):
    """Exactly as many 128-bit accesses as a thread's part of the tile fills, and no other access to its logits.

    That leaves no room for a tile that is read in part by narrower ones, or twice. Only the logit at the target of
    each of the tile's rows may be read once more by itself. (Options make tiles smaller; the rest of a row may then
    have no 128 bits for each thread.)
    """
    variants = {str(v): v for v in VARIANTS if v.aligned and v.dtype in VECTORS and not v.options}
    for row in compiled(kernel, target):
        if row["variant"] not in variants:
            continue
        where = f"{row['variant']} ({row['pass']})"
        accesses, vectors = row["accesses"], row["vectors"]
        writes = row["pass"] != "loss"
        reads = row["walks"]
        load = dict(accesses["given.logits.ptr"]["load"]) if "given.logits.ptr" in accesses else {}
        assert load.pop("128", 0) == reads * vectors, where
        assert sum(load.values()) <= (row["rows"] if row["gathers"] else 0), where
        if reads and variants[row["variant"]].probabilities:
            assert accesses["given.target.probabilities.ptr"]["load"] == {"128": reads * vectors}, where
        if writes:
            assert accesses["gradient.view.ptr"] == {"load": {}, "store": {"128": vectors}}, where


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", LOGITS)
def test_assembly_has_the_wide_accesses(compiled, kernel, target):
    """The widths come from LLVM IR, where pointers have names; the assembly, where they have none, agrees."""
    for row in compiled(kernel, target):
        for kind, found in row["wide"].items():
            assert found >= sum(counts[kind].get("128", 0) for counts in row["accesses"].values()), row["variant"]


@pytest.mark.parametrize(("target", "classes", "threads"), [("sm_90", 8000, 32), ("gfx942", 32000, 64)])
def test_spills_are_noticed(target, classes, threads):
    """A row whose logits alone fill every register that its threads can have."""
    code = f"""if True:
        import torch
        from bench.kernels import Variant, compile_call
        from xent_ext import plan
        from xent_ext.kernels import device
        device.shipped = lambda *args: plan.Tuning("a test", long_row_threads=({threads},))
        plan.most_logits_per_thread = lambda *args: {1 << (classes - 1).bit_length()} // {threads}
        rows = compile_call("{target}", Variant("", (8, {classes}), torch.float32, backwards=0))
        print(*[row["spill_bytes"] for row in rows if row["pass"]])
    """
    if target in without_tools():
        pytest.skip(f"this Triton alone can't link for {target}")
    assert int(python("-c", code)) > 0


def test_sizes_and_numbers_do_not_compile_anew():
    """Of fifty calls of as many rows and classes, and every number of an option another, few are compiled.

    Rows and classes matter by the tile, by whether 16 divides them, and by the vectors that start with a row.
    """
    code = """if True:
        import random
        import torch
        import xent_ext
        from bench import offline
        draw = random.Random(0)
        with offline.target("cuda", 90) as launches:
            for _ in range(50):
                rows, classes = draw.randrange(257, 9000), draw.randrange(1300, 2048)
                xent_ext.cross_entropy(
                    torch.empty(rows, classes, dtype=torch.bfloat16, requires_grad=True),
                    torch.empty(rows, dtype=torch.int64),
                    ignore_index=-draw.randrange(1, 1000),
                    label_smoothing=draw.random(),
                    logit_scale=draw.random(),
                    softcap=1 + draw.random(),
                    z_loss=draw.random(),
                ).backward(torch.empty((), dtype=torch.bfloat16))
        kernels = [launch for launch in launches if launch.name == "resident"]
        print(len(kernels), len({launch.kernel.hash for launch in kernels}))
    """
    calls, compiled = map(int, python("-c", code).split())
    assert calls == 100  # forward, and the gradient again where it was not expected
    # Both; rows counted here, before by one program or by many; vectors of 4 or 8, 16 divides, or ends apart.
    assert compiled <= 2 * 3 * 4


def test_accesses_are_traced_to_their_arguments():
    assembly = pytest.importorskip("bench.assembly")
    ir = """
define ptx_kernel void @kernel(ptr addrspace(1) inreg captures(none) %0, ptr addrspace(1) align 16 dereferenceable(4) %1, i32 %2, ptr addrspace(1) %3) {
  %p = getelementptr [2 x i8], ptr addrspace(1) %0, i64 %n
  %4 = tail call { i32, i32, i32, i32 } asm sideeffect "@$5 ld.global.L1::evict_last.v4.b32 { $0, $1, $2, $3 }, [ $4 + 0 ];", "=r,=r,=r,=r,l,b"(ptr addrspace(1) %p, i1 %m)
  %q = phi ptr addrspace(1) [ %p, %a ], [ %r, %b ]
  %5 = tail call i16 asm sideeffect "ld.global.b16 { $0 }, [ $1 + 0 ];", "=c,l"(ptr addrspace(1) %q)
  %6 = load <4 x float>, ptr addrspace(3) @shared, align 16
  %7 = tail call ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1) %1, i16 0, i64 9, i32 9)
  %8 = tail call <4 x i32> @llvm.amdgcn.raw.ptr.buffer.load.v4i32(ptr addrspace(8) %7, i32 %o, i32 0, i32 0)
  %9 = load <8 x bfloat>, ptr addrspace(1) %0, align 16
  store i16 %5, ptr addrspace(1) %1, align 2
  tail call void @llvm.amdgcn.raw.ptr.buffer.store.f32(float %x, ptr addrspace(8) %7, i32 %o, i32 0, i32 0)
}
"""  # noqa: E501
    source = SimpleNamespace(signature={"x": "*bf16", "none": "constexpr", "y": "*fp32", "n": "i32"}, constants={})
    assert assembly.accesses(SimpleNamespace(asm={"llir": ir}, src=source)) == {
        "x": {"load": Counter({128: 2, 16: 1}), "store": Counter()},
        "y": {"load": Counter({128: 1}), "store": Counter({16: 1, 32: 1})},
    }


@pytest.mark.parametrize("name", TARGETS)
def test_offline_target_is_active_only_inside(name, monkeypatch):
    offline = pytest.importorskip("bench.offline")
    driver = offline.triton.runtime.driver
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend, arch = TARGETS[name]
    before = dict(vars(driver))
    with offline.target(backend, arch):
        assert driver.active.get_current_target() == offline.GPUTarget(backend, arch, 64 if backend == "hip" else 32)
        assert offline.device.device_properties(0).arch == arch
        assert backends.BACKEND == "triton"
    assert dict(vars(driver)) == before
    assert offline.device.device_properties.cache_info().currsize == 0


def test_interpreter_cannot_compile(monkeypatch):
    offline = pytest.importorskip("bench.offline")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), offline.target("cuda", 90):
        pass
