"""The shapes of the measurements, as people meet them, and shapes as arguments of a command."""

import argparse
from typing import NamedTuple


class Shape(NamedTuple):
    what: str
    size: tuple[int, ...]


SUITES = {
    "llm": (
        Shape("2048 tokens, BERT", (2048, 30522)),
        Shape("2048 tokens, Llama 2", (2048, 32000)),
        Shape("512 tokens, Llama 3", (512, 128256)),
        Shape("1023 tokens, GPT-2", (1023, 50257)),
        Shape("8192 tokens, GPT-2", (8192, 50257)),
        Shape("8192 tokens, Llama 2", (8192, 32000)),
        Shape("32768 tokens, Llama 2", (32768, 32000)),
        Shape("8192 tokens, Llama 3", (8192, 128256)),
        Shape("8191 tokens, Llama 3", (8191, 128256)),
        Shape("8192 tokens, Qwen 2.5", (8192, 151936)),
        Shape("2048 tokens, Qwen 2.5 of 7B and more", (2048, 152064)),
        Shape("8192 tokens, Gemma 2", (8192, 256000)),
        Shape("8192 tokens, Gemma 3", (8192, 262144)),
    ),
    "classify": (
        Shape("CIFAR-10", (256, 10)),
        Shape("CIFAR-10, large batch", (4096, 10)),
        Shape("10 classes, points", (65536, 10)),
        Shape("CIFAR-100", (1024, 100)),
        Shape("128 classes", (8192, 128)),
        Shape("ImageNet-1k", (256, 1000)),
        Shape("ImageNet-1k, large batch", (4096, 1000)),
        Shape("ImageNet-21k", (1024, 21843)),
        Shape("ImageNet-21k, large batch", (8192, 21843)),
    ),
    "segment": (
        Shape("Cityscapes, 2 crops", (2, 19, 256, 256)),
        Shape("Cityscapes, 8 crops", (8, 19, 256, 256)),
        Shape("Pascal VOC, odd sides", (4, 21, 255, 333)),
        Shape("Cityscapes, 1 image", (1, 19, 1024, 2048)),
        Shape("Cityscapes, 8 images", (8, 19, 1024, 2048)),
    ),
    "few-rows": (
        Shape("one digit", (1, 10)),
        Shape("32 digits", (32, 10)),
        Shape("ImageNet-1k", (64, 1000)),
        Shape("1 token, Llama 2", (1, 32000)),
        Shape("1 token, Gemma 3", (1, 262144)),
        Shape("16 tokens, GPT-2", (16, 50257)),
        Shape("64 tokens, Llama 3", (64, 128256)),
        Shape("64 tokens, Gemma 3", (64, 262144)),
    ),
    # One or two of each, for a first look.
    "summary": (
        Shape("2048 tokens, Llama 2", (2048, 32000)),
        Shape("8192 tokens, Llama 3", (8192, 128256)),
        Shape("ImageNet-1k, large batch", (4096, 1000)),
        Shape("10 classes, points", (65536, 10)),
        Shape("Cityscapes, 8 crops", (8, 19, 256, 256)),
        Shape("16 tokens, GPT-2", (16, 50257)),
    ),
}
# The last layer of language models, (rows, features, classes): the first two take seconds on two cores of a CPU.
LAYERS = (
    Shape("2048 tokens, 1024 features, Llama 2", (2048, 1024, 32000)),
    Shape("1024 tokens, 512 features, Llama 3", (1024, 512, 128256)),
    Shape("8192 tokens, Llama 3.2 1B", (8192, 2048, 128256)),
    Shape("8192 tokens, Llama 3.1 8B", (8192, 4096, 128256)),
    Shape("8192 tokens, Qwen 3 1.7B", (8192, 2048, 151936)),
    Shape("8192 tokens, Gemma 3 4B", (8192, 2560, 262144)),
)
ALL = [name for name in SUITES if name != "summary"]


def chosen(names: list[str]) -> list[tuple[str, Shape]]:
    """(suite, shape) for the suites of these names; "all" is each but the summary."""
    suites = dict.fromkeys(suite for name in names for suite in (ALL if name == "all" else [name]))
    return [(suite, shape) for suite in suites for shape in SUITES[suite]]


def at_least_two(text: str) -> tuple[int, ...]:
    return sizes(text, "two or more", lambda count: count >= 2)


def two(text: str) -> tuple[int, ...]:
    return sizes(text, "two", lambda count: count == 2)


def three(text: str) -> tuple[int, ...]:
    return sizes(text, "three", lambda count: count == 3)


def sizes(text: str, described: str, enough) -> tuple[int, ...]:
    """Those in an argument such as 8x19x512x512."""
    found = tuple(int(size) if size.isdecimal() else 0 for size in text.split("x"))
    if not enough(len(found)) or 0 in found:
        raise argparse.ArgumentTypeError(f"{text!r} is not {described} positive numbers with an x between them")
    return found
