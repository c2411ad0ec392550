"""Draw the plots of a folder's results again from its JSON files, and the page with all of them."""

import sys
from pathlib import Path

from . import report


def add_arguments(parser):
    parser.add_argument("folder", type=Path, nargs="?", default=report.OUT, help="(default: %(default)s)")


def run(args) -> int:
    found = report.results(args.folder)
    if not found:
        print(f"{args.folder} holds no results: no JSON file there is from this bench", file=sys.stderr)
        return 1
    for path, result in found.items():
        report.draw(result, path)
    print("Written:", *(path.with_suffix(".png") for path in found), report.write_page(args.folder))
    return 0
