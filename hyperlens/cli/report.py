"""`hyperlens report`: one page from any number of saved results."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import STYLE, add_debug, folder

DESCRIPTION = """\
Put saved results into one self-contained HTML page.

Each FOLDER is one that --out of another command wrote, or holds such folders."""

EXAMPLES = """\
Examples:
  hyperlens report comparison behaviour --out report.html
  hyperlens report all-results --out report.html --title "Run 7 against its base\""""


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="put saved results into one page",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="report", run=run)
    parser.add_argument(
        "folders", nargs="+", type=folder, metavar="FOLDER", help="results, or a folder of results"
    )
    parser.add_argument(
        "--out",
        type=folder,
        required=True,
        metavar="FILE",
        help="the page; an older one is replaced",
    )
    parser.add_argument("--title", metavar="TEXT", help="of the page (default: the models' names)")
    add_debug(parser)


def run(args: argparse.Namespace) -> str:
    """Read, write and return what to print."""
    from ..questions import read_results
    from ..render.page import write_report

    results = read_results(args.folders)
    page = write_report(args.out, results, args.title)
    names = ", ".join(dict.fromkeys(result.name for result in results))
    return f"{page}: {len(results)} results ({names}), {page.stat().st_size / 2**20:.1f} MB"
