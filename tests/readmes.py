"""The READMEs, and the code in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / folder / "README.md" for folder in ("", "xent_ext", "kernels", "bench")]


class Block(NamedTuple):
    """A fenced block of a README."""

    where: str  # its file and the line of its fence
    language: str
    code: str

    @property
    def launched(self):
        """The command in its first line that starts it in several processes, word by word; none where there is none."""
        first = self.code.partition("\n")[0]
        return shlex.split(first[1:]) if first.startswith("# torchrun ") else []


def text(path):
    return path.read_text(encoding="utf-8")


def blocks(*languages):
    """Those of all READMEs, in these languages."""
    return [
        Block(f"{path.relative_to(ROOT)}:{text(path)[: found.start()].count(chr(10)) + 1}", found[1], found[2])
        for path in READMES
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text(path), re.M | re.S)
        if found[1] in languages
    ]


def block_with(words):
    """The code of the Python block that holds them."""
    (block,) = (block for block in blocks("python") if words in block.code)
    return block.code


def section(path, heading):
    """What stands under a heading of the second level, up to the next."""
    return text(path).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
