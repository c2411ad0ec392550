"""From (rows, classes, strides, dtype, device) to a schedule and its launch numbers.

Everything here is a pure function of plain numbers, so that it can be read and tested without a GPU. Each number
stands beside the reason for it.
"""

import math
from dataclasses import dataclass, replace


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
    rest: int = 0  # classes of a second, smaller tile for what the first leaves of a row
    edge: int = 0  # logits of a vector, where the first tile starts at one and the second holds the ends of the row


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
# Short rows share a program. In 2048 logits a row of 1000 classes has a warp for each half; in a tile of more rows every
# thread does the work that belongs to a row for more of them. Narrow rows need more of them to fill lines of targets.
PACKED_TILE = 2048
NARROW, NARROW_TILE = 128, 4096
# A sector of DRAM is 32 bytes: where rows are neighbours in memory (classes strided), a tile must be at least
# this many bytes of rows wide, or it fetches what it does not use.
SECTOR = 32
# Two tiles for a row, of different powers of two, where they are that much smaller than one; each costs its own code.
FULL = 0.75
# Rows of fewer vectors are not worth a second tile for their ends, which is two vectors wide.
SHORTEST_BODY = 8
# Rows whose accesses are not vectors keep an address for each logit; short ones can afford it.
LONG_ROW = 4096
# A streamed tile of strided classes: 128 bytes of bfloat16 rows, a full line, by 128 classes.
STREAMED_ROWS = 64


def most_logits_per_thread(layout, itemsize, accumulated, dense, edge):
    """How many logits a thread can hold before the compiler spills registers, on any of the targets; compiled, not run.

    Half precision is kept packed. A dense target mass (smoothing or probabilities) is held beside the logits, and so
    are the addresses of long rows that are not accessed by vectors; float64 takes two registers for everything.
    """
    class_vec, row_vec = vectors(layout, itemsize)
    most = 64 if itemsize == 2 else 32
    if dense or (class_vec == row_vec == 1 and not edge and layout.classes > LONG_ROW):
        most = 16
    return most // 4 if accumulated == 8 else most


def plan(layout, itemsize, accumulated, device, dense=False, aligned=True):
    """Schedule and launch numbers for logits seen as `layout`.

    Args:
        itemsize: bytes of a logit.
        accumulated: bytes of the dtype that is computed in.
        dense: whether every class has target mass: class probabilities, or label smoothing.
        aligned: whether every tensor starts on 16 bytes.
    """
    edge = edge_vector(layout, itemsize) if aligned else 0
    most = most_logits_per_thread(layout, itemsize, accumulated, dense, edge)
    held = min(most, LOGITS_PER_THREAD)
    _, s_inner, s_class = layout.strides[0]
    block, rest = pieces(layout.classes, edge)
    width = next_power_of_2(block + rest)
    neighbours = s_inner == 1 and s_class != 1 and layout.inner > 1
    # With rows side by side a thread keeps what belongs to a row for each of a whole vector of rows: more registers.
    threads = MAX_THREADS // 2 if neighbours else MAX_THREADS
    fewest = min(SECTOR // itemsize if neighbours else 1, next_power_of_2(layout.inner))
    if not neighbours and accumulated == 4 and threads * held < block <= threads * most * device.cluster:
        num_ctas = min(-(-block // (threads * held)), device.cluster)
        return Plan("resident", 1, block, threads // device.lanes, layout.rows, num_ctas, rest, edge)
    if width * fewest <= threads * most:
        rows = max((NARROW_TILE if width < NARROW else PACKED_TILE) // width, fewest)
        schedule = "resident"
    else:
        rows = min(STREAMED_ROWS if neighbours else 1, next_power_of_2(layout.inner))
        block, rest = threads * held // rows, 2 * edge
        schedule = "streaming"
    rows = min(rows, next_power_of_2(layout.inner))
    warps = min(max(rows * block // held, device.lanes), threads) // device.lanes
    programs = layout.outer * -(-layout.inner // rows)
    return Plan(schedule, rows, block, warps, programs, rest=rest, edge=edge)


def pieces(classes, edge):
    """(classes of the body, a power of two; classes of the rest) of a row that is held whole."""
    if edge:
        return next_power_of_2(classes // edge * edge), 2 * edge
    whole = next_power_of_2(classes)
    rest = next_power_of_2(classes - whole // 2)
    return (whole // 2, rest) if classes > 1 and whole // 2 + rest <= FULL * whole else (whole, 0)


def edge_vector(layout, itemsize):
    """Logits of a 16-byte vector, where rows start at any element but in all tensors at the same one of a vector.

    0 where vectors are aligned anyway or cannot be, and for rows too short to be worth it.
    """
    widest = 16 // itemsize
    congruent = all(
        c == 1 and (o - layout.strides[0][0]) % widest == (i - layout.strides[0][1]) % widest == 0
        for o, i, c in layout.strides
    )
    uneven = vectors(layout, itemsize)[0] < widest
    return widest if congruent and uneven and layout.classes >= SHORTEST_BODY * widest else 0


def gradient_plan(layout, forward):
    """Launch numbers of the deferred gradient after a streamed forward: one program for each tile."""
    blocks = -(-layout.classes // forward.block)
    programs = forward.programs * blocks
    return replace(forward, schedule="gradient", programs=programs)


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
