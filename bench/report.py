"""What a command leaves behind: tables, a JSON file, a plot of it, and one page with all of a folder's results.

The results of a command NAME say so, and how they look is in NAME_report.py, by `text(result)` and `figure(result)`.
"""

import base64
import html
import importlib
import json
import os
import textwrap
from pathlib import Path

from . import machine

OUT = Path("xent_ext_bench")


def add_out(parser):
    parser.add_argument("--out", type=Path, default=OUT, help="folder of JSON, plot and page (default: %(default)s)")


def begin(command: str, device) -> dict:
    """What every result starts with."""
    return {
        "command": command,
        "machine": machine.describe(),
        "device": str(device),
        "load_before": os.getloadavg()[0],
        "clocks_before": machine.clocks(),
    }


def head(result: dict) -> str:
    """Where a result is from."""
    return (
        f"\nMachine: {machine.one_line(result['machine'])}\n"
        f"On {result['device']}; load before the start {result['load_before']:.2f}"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells):
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}x"


def size(row: dict) -> str:
    return " x ".join(map(str, row["shape"]))


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.2f}"


def write(result: dict, folder: Path, name: str = "") -> list[str]:
    """Write the JSON, the plot and the folder's page; return their paths. The name is the command's unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name or result['command']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, path)
    return [str(path), str(path.with_suffix(".png")), str(write_page(folder))]


def draw(result: dict, path: Path):
    """The plot beside the JSON file `path`."""
    module(result).figure(result).savefig(path.with_suffix(".png"), dpi=120)


def module(result: dict):
    return importlib.import_module(f".{result['command']}_report", __package__)


def results(folder: Path) -> dict[Path, dict]:
    """All results in a folder, by path."""
    found = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {path: result for path, result in found.items() if isinstance(result, dict) and "command" in result}


def method(result: dict) -> str:
    """How a result was measured, and what the numbers of each peer include."""
    about = [textwrap.fill(f"{name}: {what}", 118) for name, what in result.get("about", {}).items()]
    return "\n\n".join([result["method"].strip(), *about])


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>xent_ext: measurements</title>
<style>
body {{ font-family: sans-serif; margin: 2em; }}
img {{ max-width: 100%; }}
pre {{ overflow-x: auto; line-height: 1.35; }}
</style>
</head>
<body>
<h1>xent_ext: measurements</h1>
{sections}
</body>
</html>
"""

SECTION = """<section>
<h2>{name}</h2>
<img alt="{name}" src="data:image/png;base64,{image}">
<pre>{text}</pre>
<h3>Method</h3>
<pre>{method}</pre>
</section>"""


def write_page(folder: Path) -> Path:
    """One HTML file with every result of the folder, images inside: nothing of it is loaded from elsewhere."""
    sections = [
        SECTION.format(
            name=html.escape(path.stem),
            image=base64.b64encode(path.with_suffix(".png").read_bytes()).decode(),
            text=html.escape(module(result).text(result).strip()),
            method=html.escape(method(result)),
        )
        for path, result in results(folder).items()
    ]
    page = folder / "report.html"
    page.write_text(PAGE.format(sections="\n".join(sections)))
    return page
