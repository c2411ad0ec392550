"""What a command leaves behind: tables, a JSON file, a plot of it, and one page with all of a folder's results.

The results of a command NAME say so, and how they look is in NAME_report.py, by `text(result)` and `figure(result)`.
"""

import base64
import html
import importlib
import itertools
import json
import os
import re
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
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>xent_ext: measurements</title>
<style>
:root {{ color-scheme: light dark; --text: #1b1b1b; --page: #fff; --line: #d0d0d0; --stripe: #f4f4f4; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e4e4e4; --page: #141414; --line: #444; --stripe: #1f1f1f; }}
}}
body {{ font-family: sans-serif; color: var(--text); background: var(--page); margin: 0 auto; padding: 1em;
  max-width: 90em; overflow-wrap: break-word; }}
img {{ max-width: 100%; height: auto; background: #fff; }}
pre {{ white-space: pre-wrap; line-height: 1.35; }}
.wide {{ overflow-x: auto; margin: 1em 0; }}
table {{ border-collapse: collapse; font-size: 0.85em; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25em 0.6em; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ position: sticky; left: 0; max-width: 45vw; text-align: left;
  white-space: normal; background: var(--page); }}
tbody tr:nth-child(odd) > * {{ background: var(--stripe); }}
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
{text}
<details>
<summary>Method</summary>
<pre>{method}</pre>
</details>
</section>"""


def as_html(text: str) -> str:
    """The text with each `table` in it as one of HTML, which a narrow screen scrolls while its first column stays."""
    lines, parts, prose = text.strip().splitlines(), [], []
    while lines:
        if len(lines) > 1 and is_rule(lines[1]):
            rows = list(itertools.takewhile(str.strip, lines))
            parts += [preformatted(prose), html_table(rows)]
            lines, prose = lines[len(rows) :], []
        else:
            prose.append(lines.pop(0))
    return "\n".join(part for part in [*parts, preformatted(prose)] if part)


def is_rule(line: str) -> bool:
    """Whether it is what stands below the header of a `table`."""
    return bool(line.strip()) and not line.strip("- ")


def preformatted(lines: list[str]) -> str:
    text = "\n".join(lines).strip()
    return f"<pre>{html.escape(text)}</pre>" if text else ""


def html_table(lines: list[str]) -> str:
    header, rule, *rows = lines
    columns = [slice(*found.span()) for found in re.finditer("-+", rule)]

    def row(line: str, tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(line[column].strip())}</{tag}>" for column in columns)

    body = "\n".join(f"<tr>{row(line, 'td')}</tr>" for line in rows)
    head = f"<thead><tr>{row(header, 'th')}</tr></thead>"
    return f'<div class="wide"><table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table></div>'


def write_page(folder: Path) -> Path:
    """One HTML file with every result of the folder, images inside: nothing of it is loaded from elsewhere."""
    sections = [
        SECTION.format(
            name=html.escape(path.stem),
            image=base64.b64encode(path.with_suffix(".png").read_bytes()).decode(),
            text=as_html(module(result).text(result)),
            method=html.escape(method(result)),
        )
        for path, result in results(folder).items()
    ]
    page = folder / "report.html"
    page.write_text(PAGE.format(sections="\n".join(sections)))
    return page
