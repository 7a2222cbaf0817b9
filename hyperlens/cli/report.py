"""`hyperlens report`: one page from any number of saved results."""

from __future__ import annotations

import argparse
from typing import Any

from ..files import expand_user
from .answers import Answer, answer_of_several
from .options import STYLE, add_debug

DESCRIPTION = """\
Put saved results into one self-contained HTML page.

Each FOLDER was written by another command with --out, or contains such folders."""

EXAMPLES = """\
Examples:
  hyperlens report comparison behaviour --out report.html
  hyperlens report all-results --out report.html --title "Run 7 against its base\""""


def add(commands: Any) -> None:
    """Add the parser of `hyperlens report`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="put saved results into one HTML page",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "folders",
        nargs="+",
        type=expand_user,
        metavar="FOLDER",
        help="a saved result, or a folder that contains some",
    )
    parser.add_argument(
        "--out",
        type=expand_user,
        required=True,
        metavar="FILE",
        help="the HTML file to write; an existing one is replaced",
    )
    parser.add_argument(
        "--title", metavar="TEXT", help="title of the page (default: the models' names)"
    )
    add_debug(parser)


def run(args: argparse.Namespace) -> Answer:
    """Read, write and answer."""
    from ..questions import read_results
    from ..render.format import count
    from ..render.page import write_report

    results = read_results(args.folders)
    page = write_report(args.out, results, args.title)
    names = ", ".join(dict.fromkeys(result.name for result in results))
    size = page.stat().st_size / 2**20
    note = f"{page}: {count(len(results), 'result')} ({names}), {size:.1f} MB"
    return answer_of_several("report", note, results, note)
