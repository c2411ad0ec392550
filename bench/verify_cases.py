"""The cases of `python -m bench verify`, by name: each is a call of the loss, and how it is examined."""

import math
from dataclasses import dataclass, field
from typing import Any

# Where a case is for: a GPU, the same kernels in Triton's interpreter, or the implementation for CPUs.
GPU, INTERPRETER, CPU = "cuda", "interpreter", "cpu"
SANITIZED = "cuda, sanitized"
KERNELS = (GPU, INTERPRETER)
ALL = (GPU, INTERPRETER, CPU)


@dataclass(frozen=True, kw_only=True)
class Case:
    shape: tuple[int, ...]  # of the logits; or rows, features, classes of a layer
    check: str = "loss"  # who examines it: a function of bench/verify_checks.py
    where: tuple[str, ...] = KERNELS
    devices: int = 1  # how many it needs
    quick: bool = False  # also in a quick run

    # The call
    dtype: str = "bfloat16"
    target: str = "class"  # or "uint8", "probabilities"
    ignored: float = 0.1  # the share of rows
    layout: str = "contiguous"  # one of `LAYOUTS` in bench/verify_calls.py
    tensors: tuple[str, ...] = ()  # arguments beside logits and target that are tensors
    options: dict[str, Any] = field(default_factory=dict)  # all other arguments
    gradients: tuple[str, ...] = ("input",)
    upstreams: tuple[float, ...] = (1.0,)  # of a call after another

    # What is forced
    schedule: str | None = None
    tuning: dict[str, Any] = field(default_factory=dict)  # launch numbers in the place of the usual ones

    @property
    def logits(self) -> int:
        """How many there are."""
        return self.shape[0] * self.shape[-1] if self.check == "layer" else math.prod(self.shape)

    @property
    def trains(self) -> bool:
        """Whether it has arguments that PyTorch's loss does not have."""
        return bool({*self.options, *self.tensors} - {"weight", "reduction", "label_smoothing", "ignore_index"})

    @property
    def computes_logits(self) -> bool:
        """Whether the loss is of logits that are first scaled or capped."""
        return bool({"softcap", "logit_scale"} & {*self.options, *self.tensors})


STEPS = (1.0, 0.5, 0.5, 3.0, 7.0, 2.0, 2.0, 2.0)  # expected, not expected, seen again, and after several misses
WEIGHTS = ("weight", "sample_weight")
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 30.0, "logit_scale": 0.7, "return_stats": True,
              "reduction": "sum"}  # fmt: skip

SHORT = {"shape": (512, 1000), "dtype": "float32", "where": ALL}
LONG = {"shape": (140, 128256), "where": (GPU,)}

SCHEDULES = {
    "one row of 10 classes": Case(shape=(1, 10), ignored=0.0, where=ALL, quick=True),
    "one class": Case(shape=(37, 1), where=ALL),
    "one row without a batch": Case(shape=(1, 1000), ignored=0.0, layout="no batch", where=ALL),
    "rows of 10 classes": Case(shape=(4096, 10), where=ALL, quick=True),
    "rows of 1000 classes": Case(shape=(4096, 1000), where=ALL, quick=True),
    "rows of 1003 classes, which start anywhere": Case(shape=(1023, 1003), where=ALL),
    "rows of 32,000 classes": Case(shape=(2048, 32000), quick=True),
    "rows of 50,257 classes": Case(where=(GPU,), shape=(1023, 50257), quick=True),
    "rows of 128,256 classes": Case(where=(GPU,), shape=(512, 128256), quick=True),
    "rows of 262,144 classes": Case(where=(GPU,), shape=(256, 262144)),
    "rows of 400,000 classes": Case(where=(GPU,), shape=(256, 400_000), quick=True),
    "few rows of 151,936 classes": Case(shape=(8, 151936), where=(GPU, CPU)),
    "few rows of 400,000 classes": Case(where=(GPU,), shape=(3, 400_000), quick=True),
    "an image": Case(shape=(4, 19, 64, 64), where=ALL, quick=True),
    "an image of many classes": Case(shape=(2, 3000, 17, 8)),
} | {
    f"{schedule} of {classes:,} classes, forced": Case(shape=(64, classes), schedule=schedule, quick=classes == 5003)
    for classes in (5003, 32000)
    for schedule in ("resident", "streaming", "split")
} | {
    f"clusters of {count}, forced": Case(**LONG, schedule="resident", tuning={"long_row_threads": (threads,)})
    for count, threads in ((16, 128), (4, 512))
}  # fmt: skip

KINDS = ("float32", "float16", "float64")
DTYPES = {
    f"{dtype}, {schedule}": Case(
        shape=(48, classes), schedule=schedule, dtype=dtype, quick=dtype == "float32" and schedule != "split"
    )
    for dtype in KINDS
    for schedule, classes in (("resident", 1001), ("streaming", 9000), ("split", 9000))
} | {f"{dtype} on a CPU": Case(shape=(2000, 1000), dtype=dtype, where=(CPU,)) for dtype in KINDS}

OPTIONS = {
    "reduction none": Case(**SHORT, options={"reduction": "none"}, quick=True),
    "weight": Case(**SHORT, tensors=("weight",), quick=True),
    "label smoothing": Case(**SHORT, options={"label_smoothing": 0.1}, quick=True),
    "class probabilities, weight, smoothing": Case(
        **SHORT, target="probabilities", tensors=("weight",), options={"label_smoothing": 0.1}, quick=True
    ),
    "uint8 targets": Case(shape=(500, 200), target="uint8", dtype="float32", ignored=0.0, where=ALL),
    "all rows ignored": Case(**SHORT, ignored=1.0, options={"on_all_ignored": "zero"}),
    "softcap": Case(**SHORT, options={"softcap": 20.0}),
    "z-loss": Case(**SHORT, options={"z_loss": 1e-2}, quick=True),
    "logit scale with a gradient": Case(**SHORT, tensors=("logit_scale",), gradients=("input", "logit_scale")),
    "sample weight with a gradient": Case(**SHORT, tensors=("sample_weight",), gradients=("input", "sample_weight")),
    "normalizer": Case(**SHORT, tensors=("normalizer",)),
    "statistics and their gradients": Case(**SHORT, options={"return_stats": True}, quick=True),
    "a loss in float32 of bfloat16": Case(shape=(512, 1000), options={"dtype": "float32"}, where=ALL),
    "in place": Case(**SHORT, options={"inplace": True}, upstreams=(1.0, 0.5), quick=True),
    "shift": Case(shape=(4, 65, 1000), options={"shift": True}, where=ALL),
    "everything": Case(**SHORT, tensors=WEIGHTS, options=EVERYTHING, quick=True),
    "everything, streaming": Case(shape=(70, 9000), schedule="streaming", tensors=WEIGHTS, options=EVERYTHING),
}

LAYOUTS = {
    f"{layout} logits": Case(shape=(256, 1000), layout=layout, where=ALL, quick=layout == "transposed")
    for layout in ("transposed", "padded", "stepped", "repeated", "unaligned")
} | {"transposed logits, streaming": Case(shape=(256, 9000), layout="transposed", schedule="streaming")}

GRADIENTS = {
    "no gradient, rows of 1000 classes": Case(shape=(4096, 1000), gradients=(), where=ALL, quick=True),
    "no gradient, split": Case(shape=(3, 9000), schedule="split", gradients=()),
    "upstream gradients that change": Case(**SHORT, upstreams=STEPS, quick=True),
    "upstream gradients that change, streaming": Case(shape=(70, 9000), schedule="streaming", upstreams=STEPS),
    "a second backward": Case(**SHORT, check="second_backward", upstreams=(1.0, 0.25)),
    "classes out of range": Case(**SHORT, check="out_of_range", options={"reduction": "none"}, quick=True),
    "classes out of range, split": Case(
        shape=(7, 9000), check="out_of_range", schedule="split", options={"reduction": "none"}
    ),
}

DEVICES = {
    "a CUDA graph, rows of 1000 classes": Case(shape=(512, 1000), check="cuda_graph", where=(GPU,), quick=True),
    "a CUDA graph, rows of 400,000 classes": Case(shape=(3, 400_000), check="cuda_graph", where=(GPU,)),
    "two streams, rows of 1000 classes": Case(shape=(512, 1000), check="two_streams", where=(GPU,), quick=True),
    "a compiled graph": Case(shape=(512, 1000), check="compiled", where=(GPU,)),
    "a second device": Case(shape=(512, 1000), check="second_device", where=(GPU,), devices=2, quick=True),
    "classes on two devices": Case(
        shape=(64, 9000), check="class_parallel", where=(GPU, CPU), devices=2, dtype="float32",
        tensors=("weight",), options={"label_smoothing": 0.1, "z_loss": 1e-2, "return_stats": True},
    ),
}  # fmt: skip

LAYER = {"shape": (1024, 256, 8192), "check": "layer", "gradients": ("input", "linear_weight"), "where": ALL}
LAYERS = {
    "the last layer, mean": Case(**LAYER, dtype="float32", options={"chunk_rows": 512}, quick=True),
    "the last layer, bfloat16": Case(**LAYER, options={"chunk_rows": 512}),
    "the last layer, none": Case(**LAYER, dtype="float32", options={"reduction": "none"}),
    "the last layer, no gradient": Case(**LAYER | {"gradients": ()}, dtype="float32"),
    "the last layer, everything": Case(
        **LAYER | {"gradients": ("input", "linear_weight", "linear_bias")}, dtype="float32",
        tensors=("linear_bias", *WEIGHTS), options=EVERYTHING,
    ),
}  # fmt: skip

CASES = SCHEDULES | DTYPES | OPTIONS | LAYOUTS | GRADIENTS | DEVICES | LAYERS


def names(where: str, quick: bool) -> list[str]:
    return [name for name, case in CASES.items() if where in case.where and (case.quick or not quick)]


def names_to_sanitize(quick: bool) -> list[str]:
    """Those that are one call."""
    return [name for name in names(GPU, quick) if CASES[name].check in ("loss", "out_of_range", "layer")]
