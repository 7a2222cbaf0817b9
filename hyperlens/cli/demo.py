"""`hyperlens demo`: the whole idea on the model that ships with the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .answers import Answer, answer_of_several
from .options import STYLE, add_debug

DESCRIPTION = """\
Hyperfit the embedded base model in two ways, compare, measure behaviour, and write the report.

Needs no network. Takes a few minutes on two cores; a second run with the same folder reuses
what is done, and after Ctrl-C the same command goes on."""

EXAMPLES = """\
Examples:
  hyperlens demo --out hyperlens-demo"""


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="show everything on the model that ships with the package",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(run=run, interrupted=interrupted)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("hyperlens-demo"),
        metavar="FOLDER",
        help="where everything goes (default: hyperlens-demo)",
    )
    parser.add_argument(
        "-q",
        "--quiet",
        dest="progress",
        action="store_false",
        help="say only the result (default: each step as well)",
    )
    add_debug(parser)


def run(args: argparse.Namespace) -> Answer:
    """Run the demo and answer."""
    from ..demo import run_demo

    def say(step: str) -> None:
        if args.progress:
            sys.stderr.write(f"{step} …\n")

    shows = args.progress and sys.stderr.isatty()
    demo = run_demo(args.out, progress=shows, say=say)
    return answer_of_several("demo", demo.summary(), demo.results, f"report: {demo.report}")


def interrupted(args: argparse.Namespace) -> str:
    """What to say after Ctrl-C."""
    return "interrupted: the same command goes on where it stopped"
