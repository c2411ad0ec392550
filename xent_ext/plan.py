"""From (rows, classes, strides, dtype, device) to a schedule and its launch numbers.

Everything here is a pure function of plain numbers, so that it can be read and tested without a GPU. Each number
stands beside the reason for it.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What the plan needs to know of a GPU."""

    backend: str  # "cuda" or "hip", Triton's names
    arch: object  # 90 for sm_90, "gfx942"
    lanes: int  # threads of a warp (a wavefront on AMD)
    processors: int  # streaming multiprocessors or compute units
    cluster: int = 1  # programs that can share a row through distributed shared memory


@dataclass(frozen=True)
class Plan:
    """A schedule with its launch numbers."""

    schedule: str  # "resident" or "streaming"
    rows: int  # rows of a program's tile
    block: int  # classes of a program's tile
    num_warps: int
    programs: int  # clusters, where num_ctas > 1
    num_ctas: int = 1  # programs of a cluster, which hold a tile together


@dataclass(frozen=True)
class Traffic:
    """How an implementation walks the logits of a call, and what that costs."""

    schedule: str
    numbers: dict  # launch numbers of the schedule
    bytes_read: int  # forward and backward, with the upstream gradient that was expected
    bytes_written: int
    memory: int  # bytes allocated beyond the arguments, the gradient included


def next_power_of_2(n):
    return 1 << max(n - 1, 0).bit_length()


# A row stays resident while a thread holds at most 64 of its logits as float32: above that the registers of
# 16 warps (65536 on every target) no longer hold the tile and its temporaries, and the compiler spills.
RESIDENT_TILE = 32768
# A long row is shared by a cluster of programs of this many logits each: 32 for each of 512 threads takes 64 registers,
# so that two programs share a processor and one loads while the other stores.
CLUSTER_SHARE = 16384
# Short rows share a program: 4096 logits give 4 warps 32 each, four 128-bit bfloat16 loads in flight per thread.
PACKED_TILE = 4096
# A sector of DRAM is 32 bytes: where rows are neighbours in memory (classes strided), a tile must be at least
# this many bytes of rows wide, or it fetches what it does not use.
SECTOR = 32
# One streamed block: 16 warps with 32 logits a thread, so that only two programs share a processor and L2 sees few rows
# at once. (8192, four programs: 1.45 x the floor in DRAM at 128256 bfloat16 classes on sm_90, against 1.41; modelled.)
STREAMED_BLOCK = 16384
# A streamed tile of strided classes: 128 bytes of bfloat16 rows, a full line, by 128 classes.
STREAMED_ROWS = 64
# Threads hold this many logits each where the tile allows it, ...
LOGITS_PER_THREAD = 32
# ... in at most 512 threads, above which two programs no longer fit on a streaming multiprocessor with 64
# registers a thread; AMD's wavefronts are 64 wide, so this is half as many warps there.
MAX_THREADS = 512


def plan(layout, itemsize, accumulated, device):
    """Schedule and launch numbers for logits of `itemsize` bytes, computed in `accumulated` bytes, seen as `layout`."""
    resident_tile, streamed_block = RESIDENT_TILE, STREAMED_BLOCK
    if accumulated == 8:  # float64 takes two registers
        resident_tile, streamed_block = resident_tile // 4, streamed_block // 4
    _, s_inner, s_class = layout.strides[0]
    width = next_power_of_2(layout.classes)
    neighbours = s_inner == 1 and s_class != 1 and layout.inner > 1
    fewest = min(SECTOR // itemsize if neighbours else 1, next_power_of_2(layout.inner))
    if not neighbours and accumulated == 4 and CLUSTER_SHARE < width <= CLUSTER_SHARE * device.cluster:
        warps = MAX_THREADS // device.lanes
        return Plan("resident", 1, width, warps, layout.rows, num_ctas=width // CLUSTER_SHARE)
    if width * fewest <= resident_tile:
        return _plan("resident", layout, max(PACKED_TILE // width, fewest), width, device)
    rows = STREAMED_ROWS if neighbours else 1
    return _plan("streaming", layout, rows, streamed_block // min(rows, next_power_of_2(layout.inner)), device)


def gradient_plan(layout, forward):
    """Launch numbers of the deferred gradient after a streamed forward: one program for each tile."""
    blocks = -(-layout.classes // forward.block)
    programs = forward.programs * blocks
    return Plan("gradient", forward.rows, forward.block, forward.num_warps, programs)


def _plan(schedule, layout, rows, block, device):
    rows = min(rows, next_power_of_2(layout.inner))
    threads = min(max(rows * block // LOGITS_PER_THREAD, device.lanes), MAX_THREADS)
    programs = layout.outer * -(-layout.inner // rows)
    return Plan(schedule, rows, block, threads // device.lanes, programs)


def vectors(layout, itemsize):
    """(CLASS_VEC, ROW_VEC): logits that one aligned access of up to 16 bytes can take, along classes and along rows.

    One is 1: the other is the dimension whose neighbours are neighbours in memory, in every tensor.
    """
    widest = 16 // itemsize
    if all(c == 1 for _, _, c in layout.strides):
        return math.gcd(widest, layout.classes, *(s for o, i, _ in layout.strides for s in (o, i))), 1
    if all(i == 1 for _, i, _ in layout.strides):
        return 1, math.gcd(widest, layout.inner, *(s for o, _, c in layout.strides for s in (o, c)))
    return 1, 1


def is_wide(layout, plan):
    """Whether offsets within a tile pass 32 bits. A streamed tile's classes run to the end of the row."""
    lanes = plan.rows - 1
    classes = max(layout.classes, plan.block) - 1 + plan.block
    return any(lanes * abs(i) + classes * abs(c) >= 2**31 for _, i, c in layout.strides)


# Normaliser and final sum: one program reads up to this many rows (128 KB of class indices); more rows are split
# over 128 programs, whose sums every program of the main kernel adds up, one load for each of its threads.
ROWS_PER_PROGRAM = 16384
PARTS = 128
REDUCTION = {"BLOCK": 4096, "num_warps": 16}


def parts(count):
    """(programs, elements for each) of a sum over `count` numbers."""
    if count <= ROWS_PER_PROGRAM:
        return 1, max(count, 1)
    return PARTS, -(-count // PARTS)
