"""The shapes that `python -m bench run` measures, as people meet them."""

from typing import NamedTuple


class Shape(NamedTuple):
    what: str
    size: tuple[int, ...]
    for_gpu: bool = False  # on a CPU one call would take seconds


SUITES = {
    "llm": (
        Shape("2048 tokens, Llama 2", (2048, 32000)),
        Shape("512 tokens, Llama 3", (512, 128256)),
        Shape("8192 tokens, Llama 2", (8192, 32000), for_gpu=True),
        Shape("32768 tokens, Llama 2", (32768, 32000), for_gpu=True),
        Shape("4096 tokens, Llama 3", (4096, 128256), for_gpu=True),
        Shape("8192 tokens, GPT-2", (8192, 50257), for_gpu=True),
        Shape("8192 tokens, Qwen 2.5", (8192, 151936), for_gpu=True),
        Shape("8192 tokens, Gemma 2", (8192, 256000), for_gpu=True),
    ),
    "classify": (
        Shape("CIFAR-10", (256, 10)),
        Shape("CIFAR-10, large batch", (4096, 10)),
        Shape("10 classes, points", (65536, 10)),
        Shape("128 classes", (8192, 128)),
        Shape("ImageNet-1k, large batch", (4096, 1000)),
        Shape("ImageNet-21k", (4096, 21841), for_gpu=True),
    ),
    "segment": (
        Shape("Cityscapes, 2 crops", (2, 19, 256, 256)),
        Shape("Cityscapes, 8 crops", (8, 19, 256, 256)),
        Shape("Cityscapes, 4 images", (4, 19, 1024, 2048), for_gpu=True),
    ),
    "few-rows": (
        Shape("one digit", (1, 10)),
        Shape("32 digits", (32, 10)),
        Shape("ImageNet-1k", (64, 1000)),
        Shape("16 tokens, GPT-2", (16, 50257)),
        Shape("64 tokens, Llama 3", (64, 128256), for_gpu=True),
    ),
}


def shapes(suites: list[str], device_type: str) -> list[tuple[str, Shape]]:
    """(suite, shape) for all that the suites have for such a device."""
    pairs = [(suite, shape) for suite in suites for shape in SUITES[suite]]
    return [(suite, shape) for suite, shape in pairs if device_type != "cpu" or not shape.for_gpu]
