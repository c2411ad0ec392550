"""The training tasks: where the data comes from, the model, and the options given to the loss.

Nothing is downloaded: the language model reads Python's own standard library, the other two use the
handwritten digits that ship with scikit-learn.
"""

import re
import sysconfig
from collections import Counter
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

UNKNOWN = "<unk>"


class Tokenizer:
    """Words, single punctuation marks and runs of white space; the rarest of them are one `<unk>`."""

    PATTERN = re.compile(r"\w+|[^\w\s]|\s+")

    def __init__(self, text: str, size: int):
        # most_common keeps the order of first appearance among equals, so the vocabulary is deterministic.
        common = Counter(self.PATTERN.findall(text)).most_common(size - 1)
        self.words = [UNKNOWN, *(word for word, _ in common)]
        self.ids = {word: number for number, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(word, 0) for word in self.PATTERN.findall(text)]

    def decode(self, ids) -> str:
        return "".join(self.words[number] for number in ids)


def standard_library() -> str:
    """The sources of Python's standard library, without its tests, which some distributions leave out."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = sorted(path for path in root.rglob("*.py") if skipped.isdisjoint(path.relative_to(root).parts))
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


class Task:
    layer_is_with_the_loss = False  # the last of the model, which then has `take_last_layer()`


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        heads = self.project_in(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project_out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


class Transformer(nn.Module):
    """Up to the logits; or, once its last layer is taken, up to that layer's input."""

    def __init__(self, vocabulary: int, context: int, width: int = 128, depth: int = 2, heads: int = 4):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, ids):
        x = self.words(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(self.blocks(x)).flatten(0, 1)

    def take_last_layer(self) -> nn.Linear:
        return self.head.pop(-1)


class LanguageModel(Task):
    """Predict the next word of Python source: logits (batch * context, 16384), the loss's default options."""

    steps = 120
    rate = 1e-3
    vocabulary = 16384
    context = 128

    def __init__(self, seed: int, device: torch.device):
        self.device = device
        self.batch_size = 16 if device.type == "cpu" else 64
        self.generator = torch.Generator().manual_seed(seed)
        text = standard_library()
        self.tokenizer = Tokenizer(text, self.vocabulary)
        ids = torch.tensor(self.tokenizer.encode(text))
        self.held_out, self.training = ids.tensor_split([len(ids) // 20])
        self.loss_options = {}

    def model(self) -> nn.Module:
        return Transformer(self.vocabulary, self.context)

    def batch(self):
        return self._windows(self.training, self.generator)

    def evaluate(self, model) -> dict[str, float]:
        # The same windows for every model and every run, judged by PyTorch's loss.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            batches = [self._windows(self.held_out, generator) for _ in range(4)]
            losses = [F.cross_entropy(model(words), target) for words, target in batches]
        return {"held-out loss": torch.stack(losses).mean().item()}

    def _windows(self, ids, generator):
        starts = torch.randint(len(ids) - self.context, (self.batch_size, 1), generator=generator)
        windows = ids[starts + torch.arange(self.context + 1)].to(self.device)
        return windows[:, :-1], windows[:, 1:].flatten()


class LanguageModelHead(LanguageModel):
    """Predict the next word of Python source; the last layer, 128 to 16384, is with the loss."""

    layer_is_with_the_loss = True


class Digits(Task):
    """Classify 8x8 images of handwritten digits: logits (128, 10), label smoothing."""

    steps = 300
    rate = 1e-3
    batch_size = 128

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator().manual_seed(seed)
        images, labels = digit_images()
        order = torch.randperm(len(labels), generator=self.generator)
        train, test = order.split([1500, len(order) - 1500])
        self.train = images[train].to(device), labels[train].to(device)
        self.test = images[test].to(device), labels[test].to(device)
        self.loss_options = {"label_smoothing": 0.1}

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)
        )

    def batch(self):
        return pick(self.train, self.batch_size, self.generator)

    def evaluate(self, model) -> dict[str, float]:
        parts = {"train accuracy": self.train, "test accuracy": self.test}
        return {name: share(is_right(model, *dataset)) for name, dataset in parts.items()}


class Segment(Task):
    """Label each pixel of a page of digits: logits (16, 11, 60, 60), class weights, ignored borders."""

    steps = 300
    rate = 3e-3
    batch_size = 16
    classes = 11  # the background and ten digits
    ignored = 255

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator().manual_seed(seed)
        images, labels = digit_images()
        # The digits of the test pages occur on no training page.
        pages = (
            compose_pages(images[:1500], labels[:1500], 400, self.generator),
            compose_pages(images[1500:], labels[1500:], 50, self.generator),
        )
        self.train, self.test = (
            (page.unsqueeze(1).to(device), self._ignore_borders(label).to(device)) for page, label in pages
        )
        # Most pixels are background: weigh each class by the inverse of its frequency.
        target = self.train[1]
        counts = target[target != self.ignored].bincount(minlength=self.classes)
        weight = counts.sum() / (self.classes * counts)
        self.loss_options = {"weight": weight, "ignore_index": self.ignored}

    def model(self) -> nn.Module:
        # Half the resolution inside makes the steps four times as fast, and a 3x3 kernel reach twice as far.
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=2, dilation=2),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=2, dilation=2),
            nn.GELU(),
            nn.Conv2d(32, self.classes, 1),
            nn.Upsample(scale_factor=2, mode="bilinear"),
        )

    def batch(self):
        return pick(self.train, self.batch_size, self.generator)

    def evaluate(self, model) -> dict[str, float]:
        labels = self.test[1]
        right = is_right(model, *self.test)
        counted = labels != self.ignored
        return {
            "test accuracy, all pixels": share(right[counted]),
            "test accuracy, digits' pixels": share(right[counted & (labels > 0)]),
        }

    def _ignore_borders(self, labels):
        """Ignore the background pixels that touch a digit: which of the two they are is a matter of taste."""
        digit = (labels > 0).float()
        near = F.max_pool2d(digit.unsqueeze(1), 3, stride=1, padding=1).squeeze(1)
        return labels.masked_fill(near > digit, self.ignored)


TASKS = {"lm": LanguageModel, "lm-linear": LanguageModelHead, "digits": Digits, "segment": Segment}


def digit_images():
    """scikit-learn's digits: images (1797, 8, 8) between 0 and 1, labels (1797,)."""
    digits = load_digits()
    return torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target)


def compose_pages(images, labels, pages: int, generator, cell: int = 20, grid: int = 3):
    """Pages of grid x grid digits, each twice its size and somewhere in its cell; a class for each pixel."""
    chosen = torch.randint(len(labels), (pages * grid * grid,), generator=generator)
    offsets = torch.randint(cell - 15, (len(chosen), 2), generator=generator).tolist()
    large = F.interpolate(images[chosen].unsqueeze(1), scale_factor=2, mode="bilinear").squeeze(1)
    cells = torch.zeros(len(chosen), cell, cell)
    for canvas, digit, (top, left) in zip(cells, large, offsets, strict=True):
        canvas[top : top + 16, left : left + 16] = digit
    classes = torch.where(cells > 0.3, 1 + labels[chosen].view(-1, 1, 1), 0)

    def paste(parts):
        rows = parts.view(pages, grid, grid, cell, cell).transpose(2, 3)
        return rows.reshape(pages, grid * cell, grid * cell)

    return paste(cells), paste(classes)


def pick(dataset, size: int, generator):
    images, labels = dataset
    chosen = torch.randint(len(labels), (size,), generator=generator).to(labels.device)
    return images[chosen], labels[chosen]


def is_right(model, images, labels):
    with torch.no_grad():
        return model(images).argmax(1) == labels


def share(truths) -> float:
    return truths.float().mean().item()
