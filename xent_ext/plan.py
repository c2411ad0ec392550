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


# At most 512 threads: one program on a processor can use 128 registers a thread, two can use 64. AMD's wavefronts are
# 64 wide, so this is half as many warps there.
MAX_THREADS = 512
# Threads hold this many logits each where the tile allows it: four 128-bit loads of bfloat16 in flight, and about 64
# registers.
LOGITS_PER_THREAD = 32
# Short rows share a program: 4096 logits give 4 warps 32 each.
PACKED_TILE = 4096
# A sector of DRAM is 32 bytes: where rows are neighbours in memory (classes strided), a tile must be at least
# this many bytes of rows wide, or it fetches what it does not use.
SECTOR = 32
# A streamed tile of strided classes: 128 bytes of bfloat16 rows, a full line, by 128 classes.
STREAMED_ROWS = 64


def most_logits_per_thread(layout, itemsize, accumulated, dense):
    """How many logits a thread can hold before the compiler spills registers, on any of the targets; compiled, not run.

    Half precision is kept packed. A dense target mass (smoothing or probabilities) is held beside the logits, and so
    are the addresses of long rows that are not accessed by vectors; float64 takes two registers for everything.
    """
    class_vec, row_vec = vectors(layout, itemsize)
    most = 64 if itemsize == 2 else 32
    if dense or (class_vec == row_vec == 1 and layout.classes > PACKED_TILE):
        most = 16
    return most // 4 if accumulated == 8 else most


def plan(layout, itemsize, accumulated, device, dense=False):
    """Schedule and launch numbers for logits seen as `layout`.

    Args:
        itemsize: bytes of a logit.
        accumulated: bytes of the dtype that is computed in.
        dense: whether every class has target mass: class probabilities, or label smoothing.
    """
    most = most_logits_per_thread(layout, itemsize, accumulated, dense)
    held = min(most, LOGITS_PER_THREAD)
    _, s_inner, s_class = layout.strides[0]
    width = next_power_of_2(layout.classes)
    neighbours = s_inner == 1 and s_class != 1 and layout.inner > 1
    # With rows side by side a thread keeps what belongs to a row for each of a whole vector of rows: more registers.
    threads = MAX_THREADS // 2 if neighbours else MAX_THREADS
    fewest = min(SECTOR // itemsize if neighbours else 1, next_power_of_2(layout.inner))
    if not neighbours and accumulated == 4 and threads * held < width <= threads * held * device.cluster:
        num_ctas = width // (threads * held)
        return Plan("resident", 1, width, threads // device.lanes, layout.rows, num_ctas)
    if width * fewest <= threads * most:
        rows, block = max(PACKED_TILE // width, fewest), width
        schedule = "resident"
    else:
        rows = min(STREAMED_ROWS if neighbours else 1, next_power_of_2(layout.inner))
        block = threads * held // rows
        schedule = "streaming"
    rows = min(rows, next_power_of_2(layout.inner))
    warps = min(max(rows * block // held, device.lanes), threads) // device.lanes
    programs = layout.outer * -(-layout.inner // rows)
    return Plan(schedule, rows, block, warps, programs)


def gradient_plan(layout, forward):
    """Launch numbers of the deferred gradient after a streamed forward: one program for each tile."""
    blocks = -(-layout.classes // forward.block)
    programs = forward.programs * blocks
    return Plan("gradient", forward.rows, forward.block, forward.num_warps, programs)


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
