"""From (rows, classes, strides, dtype, device) to a schedule and its launch numbers.

Everything here is a pure function of plain numbers, so that it can be read and tested without a GPU. Each number
stands beside the reason for it. Those that suit one GPU better than another are a `Tuning`.
"""

import math
from dataclasses import dataclass, field, fields, replace
from itertools import product


def choice(default, *others):
    """A field of `Tuning`, with what else it may be."""
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass(frozen=True)
class Tuning:
    """The launch numbers that depend on how fast a GPU does what, each with the reason for the one that is shipped.

    Plans made of any of the choices cover their rows and can be launched. Whether the compiler spills registers then,
    and which is fastest, `python -m bench tune` finds out; it tries these choices and no others.
    """

    source: str  # where the numbers come from: "modelled", "compiled" (only registers counted) or "measured on ..."
    # Threads hold this many logits each where the tile allows it: four 128-bit loads of bfloat16 in flight, and about
    # 64 registers.
    logits_per_thread: int = choice(32, 8, 16, 64)
    # Threads of a program that holds a long row, or its part in a cluster, the first that fit and hold such a tile.
    # With 8192 logits, of half precision 64 in each of 128 threads (up to 110 registers), of float32 32 in each of 256
    # (64 to 92), two or more programs share a processor, and one loads while another stores. At most 512, as one
    # program on a processor can then use 128 registers a thread.
    long_row_threads: tuple = choice((128, 256, 512), (256, 512), (512,), (128, 256))
    long_row_tile: int = choice(8192, 4096, 16384)
    # Programs of the largest cluster. On a chip where they wait for each other for longer than the model knows of, all
    # longer rows are streamed by one program each (1), or only the longest (8).
    largest_cluster: int = choice(16, 8, 1)
    # Short rows share a program. In 2048 logits a row of 1000 classes has a warp for each half; in a tile of more rows
    # every thread does what belongs to a row for more of them. Narrow rows (and images, whose rows are neighbours) need
    # more of them to fill lines of targets.
    packed_tile: int = choice(2048, 1024, 4096)
    narrow_tile: int = choice(4096, 2048, 8192)
    # With rows side by side a thread keeps what belongs to a row for each of a whole vector of rows: more registers.
    neighbours_threads: int = choice(256, 128, 512)
    # Streaming programs share a processor with none or one other: 64 registers a thread. With a dense target mass they
    # are smaller, as the compiler would rather spill some than use more than that.
    streaming_threads: int = choice(512, 256, 1024)
    streamed_logits: int = choice(16, 8, 32)
    # A streamed tile of strided classes: 128 bytes of bfloat16 rows, a full line, by 128 classes.
    streamed_rows: int = choice(64, 32, 128)
    # The share of L2 that streaming counts on: its halves hold copies of each other's lines, and other things live
    # there.
    usable_l2: float = choice(0.6, 0.3, 0.45, 0.8, 1.0)
    # Few rows: small programs, so that a row of 150,000 classes keeps 37 of them busy.
    split_threads: int = choice(256, 128, 512)
    split_logits: int = choice(16, 8, 32)


CHOICES = {each.name: each.metadata["choices"] for each in fields(Tuning) if "choices" in each.metadata}

# The model of A100, H100 and B200 (bench/TUNING.md) gave no reason to tune one otherwise than another: they differ in
# processors, cache and clusters, which are facts of the `Device`. gfx942 was only compiled for, and spills nothing with
# the same numbers; its wavefronts of 64 lanes are facts of the device, too.
MODELLED = Tuning("modelled")
TUNINGS = {
    "cuda": {80: MODELLED, 90: MODELLED, 100: MODELLED},
    "hip": {"gfx942": replace(MODELLED, source="compiled")},
}


def shipped(backend, arch):
    """The tuning for an architecture, or for the newest of those before it that have one, or else for the oldest."""
    known = TUNINGS[backend]
    nearest = arch if arch in known else max((older for older in known if older < arch), default=min(known))
    tuning = known[nearest]
    return tuning if nearest == arch else replace(tuning, source=f"{tuning.source} for {nearest}, not {arch}")


@dataclass(frozen=True)
class Device:
    """What the plan needs to know of a GPU."""

    backend: str  # "cuda" or "hip", Triton's names
    arch: object  # 90 for sm_90, "gfx942"
    lanes: int  # threads of a warp (a wavefront on AMD)
    processors: int  # streaming multiprocessors or compute units
    l2_bytes: int  # of the last level of cache
    cluster: int = 1  # programs that can share a row through distributed shared memory
    tuning: Tuning = MODELLED  # the launch numbers that suit it


@dataclass(frozen=True)
class Plan:
    """A schedule with its launch numbers."""

    schedule: str  # "resident", "streaming" or "split"; "gradient" for what follows those two
    rows: int  # rows of a program's tile
    block: int  # classes of a program's tile
    num_warps: int
    programs: int  # tiles, each for one program or one cluster of programs
    num_ctas: int = 1  # programs of a cluster, which hold a tile together
    rest: int = 0  # classes of a second, smaller tile for what the first leaves of a row
    edge: int = 0  # logits of a vector, where the first tile starts at one and the second holds the ends of the row
    at_once: int = 0  # programs that stream the tiles; 0: one for each
    splits: int = 1  # programs that share a row, each summarising a part
    registers: int = 0  # the most that the compiler may give a thread on an NVIDIA GPU; 0: as it likes


@dataclass(frozen=True)
class Traffic:
    """How an implementation walks the logits of a call, and what that costs."""

    schedule: str
    numbers: dict  # launch numbers of the schedule
    bytes_read: int  # forward and backward, with the upstream gradient that was expected
    bytes_written: int
    memory: int  # bytes allocated beyond the arguments, the gradient included


SCHEDULES = ("resident", "streaming", "split")


def next_power_of_2(n):
    return 1 << max(n - 1, 0).bit_length()


# A program's threads, at most.
MOST_THREADS = 1024
# Threads that share a long row at least, where each can hold only few of its logits.
SHARING_THREADS = 256
# Programs of the largest cluster that every GPU with clusters must run; larger ones, only for rows that need them.
PORTABLE_CLUSTER = 8
# Rows of fewer classes are packed in tiles of another size.
NARROW = 128
# All rows together are one tile where it has so few logits: its program counts the rows and makes the loss, so that a
# step is two launches in place of four. (As one program 16384 logits took longer than as eight.)
WHOLE_TILE = 8192
# Of 512 threads with 32 logits of float32 each two programs share a processor if each thread has this many registers,
# and one reads while the other writes. The compiler needs 60, but takes a few more if it may.
SHARING_REGISTERS = 64
# A sector of DRAM is 32 bytes: where rows are neighbours in memory (classes strided), a tile must be at least
# this many bytes of rows wide, or it fetches what it does not use.
SECTOR = 32
# Two tiles for a row where the second is at most a quarter of the first: a thread then holds few logits more.
FULL = 0.625
# Or half of the first, where the row is narrow: instructions bound it, and of 16 classes for 11 five are padding.
NARROW_FULL = 0.75
# Rows of fewer vectors are not worth a second tile for their ends, which is two vectors wide.
SHORTEST_BODY = 8
# Rows whose accesses are not vectors keep an address for each logit; short ones can afford it.
LONG_ROW = 4096
# Programs for each processor that do a pass in turns if there is anything to do, and their threads: as many as fit at
# once, to fill it; more would only wait, and a program that returns at once costs about a nanosecond. Of those that
# hold rows 512 threads fit, with up to 128 registers each; of those that make a gradient from summaries, 1024.
WAITING = 8
WAITING_THREADS = {"resident": 512, "gradient": 1024}
# The size of L2 where PyTorch cannot be asked: A100, H100, B200, and the Infinity Cache of an MI300X.
L2_BYTES = {80: 40 << 20, 90: 50 << 20, 100: 126 << 20, "gfx942": 256 << 20}


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


def plan(layout, itemsize, accumulated, device, dense=False, aligned=True, schedule=None):
    """Schedule and launch numbers for logits seen as `layout`.

    Args:
        itemsize: bytes of a logit.
        accumulated: bytes of the dtype that is computed in.
        device: its tuning is the shipped one, or that of the file that XENT_EXT_TUNING names.
        dense: whether every class has target mass: class probabilities, or label smoothing.
        aligned: whether every tensor starts on 16 bytes.
        schedule: one of SCHEDULES to have that one; ValueError where it cannot be.
    """
    _, s_inner, s_class = layout.strides[0]
    neighbours = s_inner == 1 and s_class != 1 and layout.inner > 1
    edge = edge_vector(layout, itemsize) if aligned else 0
    most = most_logits_per_thread(layout, itemsize, accumulated, dense, edge)
    if schedule in (None, "resident"):
        block, rest = pieces(layout.classes, edge, fullest(layout, itemsize, dense, neighbours))
        if neighbours:
            found = resident_neighbours(layout, itemsize, most, device, block, rest)
        else:
            cluster = min(device.cluster, device.tuning.largest_cluster) if accumulated == 4 else 1
            found = resident(layout, most, device, block, rest, edge, cluster)
        if found or schedule:
            return found or cannot(schedule, layout)
    few = layout.rows < device.processors
    if schedule == "split" or (schedule is None and few and not neighbours):
        return cannot(schedule, layout) if neighbours else split(layout, most, device, edge)
    return streaming(layout, itemsize, most, device, edge, neighbours, dense)


def cannot(schedule, layout):
    raise ValueError(f"schedule {schedule!r} is not for {layout.rows} rows of {layout.classes} classes in this layout")


def resident(layout, most, device, block, rest, edge, largest_cluster):
    """Rows in registers, several to a program or one to a program or a cluster of them; None for rows too long."""
    tuning, width = device.tuning, next_power_of_2(block + rest)
    if width <= tuning.packed_tile:
        held = min(most, tuning.logits_per_thread)
        tile = min(tuning.narrow_tile if width < NARROW else tuning.packed_tile, MOST_THREADS * held)
        # A second tile of half the first counts in full: 32 + 16 logits a thread take up to 255 registers.
        held_classes = width if 2 * rest == block else block
        all_rows = next_power_of_2(layout.inner)
        is_whole = layout.outer == 1 and all_rows * held_classes <= min(WHOLE_TILE, MOST_THREADS * held)
        rows = all_rows if is_whole else min(tile // width, all_rows)
        warps = max(rows * held_classes // held // device.lanes, 1)
        return Plan("resident", rows, block, warps, layout.outer * -(-layout.inner // rows), rest=rest, edge=edge)
    fewest = min(tuning.long_row_tile // most, SHARING_THREADS)
    for cluster, threads in product((PORTABLE_CLUSTER, 2 * PORTABLE_CLUSTER), tuning.long_row_threads):
        num_ctas = max(block // (threads * most), 1)
        if threads >= fewest and num_ctas <= min(cluster, largest_cluster):
            warps = max(min(block // most, threads) // device.lanes, 1)
            registers = SHARING_REGISTERS if threads == 512 and most == 32 and not rest else 0
            return Plan("resident", 1, block, warps, layout.rows, num_ctas, rest, edge, registers=registers)
    return None


def resident_neighbours(layout, itemsize, most, device, block, rest):
    """`resident` where neighbours in memory are rows, as the pixels of images are."""
    tuning, threads = device.tuning, device.tuning.neighbours_threads
    inner = next_power_of_2(layout.inner)
    fewest = min(SECTOR // itemsize, inner)
    width = next_power_of_2(block + rest)
    if width * fewest > threads * most:
        return None
    rows = min(max(tuning.narrow_tile // width, fewest), inner)
    warps = min(max(rows * block // min(most, tuning.logits_per_thread), device.lanes), threads) // device.lanes
    return Plan("resident", rows, block, warps, layout.outer * -(-layout.inner // rows), rest=rest)


def split(layout, most, device, edge):
    """Each row shared by as many programs as leave no processor idle."""
    splits = next_power_of_2(-(-device.processors // max(layout.rows, 1)))
    threads, programs = device.tuning.split_threads, layout.rows
    block, warps = threads * min(most, device.tuning.split_logits), threads // device.lanes
    return Plan("split", 1, block, warps, programs, rest=2 * edge, edge=edge, at_once=programs * splits, splits=splits)


def streaming(layout, itemsize, most, device, edge, neighbours, dense):
    """A loop over each row, or over some that are neighbours in memory."""
    tuning = device.tuning
    if neighbours:
        threads, held = tuning.neighbours_threads, tuning.logits_per_thread
        rows = min(tuning.streamed_rows, next_power_of_2(layout.inner))
    else:
        threads, held, rows = tuning.streaming_threads, tuning.streamed_logits, 1
        if dense:
            threads, held = threads // 2, held // 2
    return Plan(
        "streaming",
        rows,
        block=threads * min(most, held) // rows,
        num_warps=threads // device.lanes,
        programs=layout.outer * -(-layout.inner // rows),
        rest=2 * edge,
        edge=edge,
        at_once=streams(rows * layout.classes, itemsize, device),
    )


def streams(logits, itemsize, device):
    """How many programs stream tiles of so many logits at once, so that the second read of a logit finds it in L2.

    The second walk is backward: between two reads of a logit a program has read what lies behind it in the row, read
    that again and written its gradient, so it has made three accesses to at most a row. With too few processors at
    work their instructions take longer than the memory: half of them can feed it in half precision, a quarter else.
    """
    fitting = int(device.tuning.usable_l2 * device.l2_bytes) // (3 * logits * itemsize)
    return max(min(fitting, device.processors), device.processors // itemsize)


def fullest(layout, itemsize, dense, neighbours):
    """The share of a tile of one piece up to which two pieces are better.

    A thread holds up to 48 logits in two. A dense target mass beside each of them spills, and so do rows that are
    neighbours in no vectors; of those in float32 the memory takes longer than the instructions in any case.
    """
    can = not neighbours or (itemsize == 2 and vectors(layout, itemsize)[1] > 1)
    return NARROW_FULL if layout.classes <= NARROW and can and not dense else FULL


def pieces(classes, edge, full=FULL):
    """(classes of the body, a power of two; classes of the rest) of a row that is held whole."""
    if edge:
        return next_power_of_2(classes // edge * edge), 2 * edge
    whole = next_power_of_2(classes)
    rest = next_power_of_2(classes - whole // 2)
    return (whole // 2, rest) if classes > 1 and whole // 2 + rest <= full * whole else (whole, 0)


def edge_vector(layout, itemsize):
    """Logits of a 16-byte vector, where rows start at any element but in all tensors at the same one of a vector.

    0 where accesses of 8 bytes are aligned anyway or vectors cannot be, and for rows too short to be worth it.
    """
    widest = 16 // itemsize
    congruent = all(
        c == 1 and (o - layout.strides[0][0]) % widest == (i - layout.strides[0][1]) % widest == 0
        for o, i, c in layout.strides
    )
    narrow = vectors(layout, itemsize)[0] < widest // 2
    return widest if congruent and narrow and layout.classes >= SHORTEST_BODY * widest else 0


def waiting(plan, accumulated, device):
    """How many programs, or clusters, a launch has that makes a gradient only if the expected one was wrong.

    In double precision one for each tile: its exponential branches, and such code in a loop could not be checked.
    """
    for_each = min(WAITING, max(WAITING_THREADS[plan.schedule] // (plan.num_warps * device.lanes), 1))
    few = max(device.processors * for_each // plan.num_ctas, 1)
    return min(plan.programs, few) if accumulated == 4 else plan.programs


def gradient_plan(layout, forward):
    """Launch numbers of the gradient from the summary of streamed or split rows: one program for each tile."""
    blocks = -(-layout.classes // forward.block)
    programs = forward.programs * blocks
    return replace(forward, schedule="gradient", programs=programs, at_once=0)


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
# Short rows are counted by one program only where it needs to wait for memory once. Beside long ones four times are
# nothing, and to add up parts takes registers there: 128 in place of 96 at 32000 classes.
SHORT_ROWS_PER_PROGRAM = 4096
# Up to this many rows are counted by every program that needs their number: one launch less. The second is 8 KB of
# class indices for each program, from L2. Beside long rows a launch is little, and 1024 numbers take registers there.
FEW_ROWS = (256, 1024)
# Numbers that a program of either adds up at one go, 8 for a thread: more threads only where there are more numbers, as
# masked ones cost as much.
AT_ONCE = (1024, 4096, 8192)
NUMBERS_PER_THREAD = 8


def counted_by_all(layout):
    """Up to how many rows every program counts, where there are so few; else 0."""
    counts = FEW_ROWS if layout.classes <= LONG_ROW else FEW_ROWS[:1]
    return next((few for few in counts if layout.rows <= few), 0)


def counting(layout):
    """`parts` of the normaliser."""
    return parts(layout.rows, ROWS_PER_PROGRAM if layout.classes > LONG_ROW else SHORT_ROWS_PER_PROGRAM)


def reduction(span, device):
    """(numbers at one go, warps) of a program that adds up `span` numbers."""
    block = next((block for block in AT_ONCE if span <= block), AT_ONCE[-1])
    return block, block // NUMBERS_PER_THREAD // device.lanes


def parts(count, for_one=ROWS_PER_PROGRAM):
    """(programs, elements for each) of a sum over `count` numbers, of which one program takes up to `for_one`."""
    if count <= for_one:
        return 1, max(count, 1)
    return PARTS, -(-count // PARTS)


# --- The last linear layer

# A chunk's products are as fast as those of all rows from about so many rows on. Fewer would have the weight's gradient
# read and written too often: on an H100 that takes as long as its arithmetic with 600 rows of bfloat16, or 1200 of
# float32; on a CPU 256 rows take 1.04 times as long as 512, 128 rows 1.15 times.
LEAST_CHUNK_ON_CPU, LEAST_CHUNK_ON_GPU = 256, 1024
# Rows of chunks are multiples of this, which is one of every tile that a BLAS works with.
CHUNK_STEP = 128
# Chunks of less memory than this save next to none, and logits of this size are no chunk, but are made at once: a chunk
# takes 300 us more on a CPU than its arithmetic, and its products take longer than those of more rows.
LEAST_CHUNK_BYTES = 16 << 20
# They are chunks on a CPU if that spares so many multiplications of each product, as those of ignored rows: in one core
# and the three products 1 ms, and about as long as a chunk takes more.
LEAST_SPARED = 1 << 24
# Chunks whose parts of the weight's gradient are added up in half precision. Each rounds the sum once more: with four
# the error is 1.1 to 1.5 times that of one product, and it grows with their root.
MOST_ROUNDED = 4


def chunk_rows(rows, features, classes, itemsize, on_cpu, with_weight):
    """How many rows of the logits (rows, classes) of a layer (classes, features) there are at a time.

    The logits then take half of the memory of the weight's gradient, or where there is none as much as the input's.
    """
    most = max(features / 2 if with_weight else rows * features / classes, LEAST_CHUNK_BYTES / (classes * itemsize))
    most = max(round(most / CHUNK_STEP) * CHUNK_STEP, LEAST_CHUNK_ON_CPU if on_cpu else LEAST_CHUNK_ON_GPU)
    return max(min(most, rows), 1)
