"""What the compiler made of a Triton kernel: registers, spills, memory accesses, code size."""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# A pointer to global memory (or AMD's descriptor of a buffer there) as an operand in LLVM IR.
POINTER = re.compile(r"ptr addrspace\([18]\)[^,%()]*(?:\([^)]*\)[^,%()]*)*(%[\w.]+)")
# An instruction that makes a pointer from another: its result, and the rest.
DERIVED = re.compile(r"\s*(%[\w.]+) = .*?(?:getelementptr|make\.buffer\.rsrc|phi ptr|select .*ptr)(.*)")
VALUE = re.compile(r"%[\w.]+")
# `ld.global.v4.b32 {` of PTX, which Triton writes into the IR, and `buffer.load.v4i32(` of AMD's intrinsics.
SPELLED = re.compile(r"(?:(ld|st)\.global|buffer\.(load|store))[\w.:]*?\.(?:v(\d+)\.?)?[a-z]+(\d+)[ (]")
# LLVM's own `load <4 x float>, ptr` and `store i16 %x, ptr`.
PLAIN = re.compile(r"\b()(load|store) (?:<(\d+) x )?([a-z]+\d*)>?[ ,]")
BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}
# The widest accesses there are, in PTX and in AMD's assembly.
WIDE = {
    "load": re.compile(r"\bld\.global[\w.:]*\.(?:v2\.[a-z]64|v4\.[a-z]32)\b|_load_dwordx4\b"),
    "store": re.compile(r"\bst\.global[\w.:]*\.(?:v2\.[a-z]64|v4\.[a-z]32)\b|_store_dwordx4\b"),
}


def describe(kernel) -> dict:
    """All of the above for a CompiledKernel, as plain numbers."""
    nvidia = "cubin" in kernel.asm
    text = kernel.asm["ptx" if nvidia else "amdgcn"]
    return {
        **resources(kernel),
        "shared_bytes": kernel.metadata.shared,
        "code_bytes": code_bytes(kernel.asm["cubin" if nvidia else "hsaco"]),
        "accesses": accesses(kernel),
        "wide": {kind: len(pattern.findall(text)) for kind, pattern in WIDE.items()},
    }


def resources(kernel) -> dict:
    """Registers and spills."""
    return nvidia_resources(kernel) if "cubin" in kernel.asm else amd_resources(kernel.asm["amdgcn"])


def nvidia_resources(kernel) -> dict:
    """Registers of a thread and bytes that it spills to local memory."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "cubin"), Path(folder, "ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        dump = run(CUOBJDUMP, "-res-usage", cubin).stdout
        registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump).groups())
        if stack + local:
            # A stack frame need not hold spills; only the assembler tells.
            ptx.write_text(kernel.asm["ptx"])
            spilled = int(re.search(r"(\d+) bytes spill stores", assemble(ptx, kernel.asm["ptx"]))[1])
        else:
            spilled = 0
    return {"registers": registers, "spill_bytes": spilled, "scalar_spills": 0}


def assemble(ptx, text):
    """What the assembler says of a file; Triton ships one more for newer PTX."""
    target = re.search(r"^\.target (\w+)", text, re.M)[1]
    newest = [CUOBJDUMP.with_name(name) for name in ("ptxas-blackwell", "ptxas")]
    assembler = next(path for path in newest if path.exists())
    return run(assembler, "-v", f"--gpu-name={target}", ptx, "-o", ptx.with_suffix(".cubin")).stderr


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True)


def amd_resources(assembly: str) -> dict:
    """Vector registers and bytes of scratch memory of a thread; Triton's kernels put nothing but spills there.

    Scalar registers, of which a wavefront has about a hundred, spill to lanes of vector registers: that costs an
    instruction, but no memory. NVIDIA's tools do not say what its uniform registers do.
    """
    number = {name: int(value) for name, value in re.findall(r"^ +\.(\w+): +(\d+)$", assembly, re.M)}
    return {
        "registers": number["vgpr_count"],
        "spill_bytes": number["private_segment_fixed_size"],
        "scalar_spills": number["sgpr_spill_count"],
    }


def code_bytes(elf: bytes) -> int:
    """Size of the executable sections of a 64-bit ELF file, which cubin and hsaco are."""
    executable = 4  # the flag SHF_EXECINSTR
    (start,) = struct.unpack_from("<Q", elf, 40)
    size, count = struct.unpack_from("<HH", elf, 58)
    sections = [struct.unpack_from("<8xQ16xQ", elf, start + k * size) for k in range(count)]
    return sum(length for flags, length in sections if flags & executable)


def accesses(kernel) -> dict:
    """For each pointer argument of the kernel {"load": {bits: count}, "store": {bits: count}}.

    The counts are of instructions in the program text, each of which moves that many bits for a thread. They come
    from the LLVM IR, the last form in which a pointer can be followed back to the argument it was made from.
    """
    found: dict = {}
    owner: dict = {}
    for line in kernel.asm["llir"].splitlines():
        if line.startswith("define "):
            # Triton appends pointers to scratch memory after the kernel's own arguments.
            owner = dict(zip(POINTER.findall(line), pointer_arguments(kernel.src), strict=False))
        elif derived := DERIVED.match(line):
            base = next((value for value in VALUE.findall(derived[2]) if value in owner), None)
            owner[derived[1]] = owner.get(base)
        elif pointer := POINTER.search(line):
            if access := SPELLED.search(line) or PLAIN.search(line):
                short, long, lanes, of = access.groups()
                kind = long or {"ld": "load", "st": "store"}[short]
                bits = int(lanes or 1) * (BITS.get(of) or int(of.lstrip("i")))
                counts = found.setdefault(owner[pointer[1]], {"load": Counter(), "store": Counter()})
                counts[kind][bits] += 1
    return found


def pointer_arguments(source) -> list[str]:
    """Names of the pointers that the compiled kernel takes, such as `given.logits.ptr`."""
    return [name for name, type in leaves("", source.signature) if type.startswith("*")]


def leaves(name, value):
    """The members of tuples in tuples, each with its name."""
    members = value if isinstance(value, dict) else value._asdict() if isinstance(value, tuple) else None
    if members is None:
        yield name, value
    else:
        for member, inner in members.items():
            yield from leaves(f"{name}.{member}".lstrip("."), inner)
