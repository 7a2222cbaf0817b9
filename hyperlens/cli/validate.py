"""`hyperlens validate`: every experiment on planted pairs, whose truth is known."""

from __future__ import annotations

import argparse
from typing import Any

from .answers import Answer, answer_of
from .options import STYLE, add_debug, add_out, names, shows_progress

DESCRIPTION = """\
Run every experiment on planted pairs and count false alarms and truths that are named.

Pairs are small random models and copies with one known change, made without training and without
any download. The default takes a few minutes; before a release, run it with --nulls 200."""

EXAMPLES = """\
Examples:
  hyperlens validate
  hyperlens validate --only temperature,bias --planted 10
  hyperlens validate --nulls 200 --planted 20 --out validation"""


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "validate",
        help="run every experiment on planted pairs whose truth is known",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(run=run, interrupted=interrupted)
    parser.add_argument(
        "--nulls",
        dest="n_nulls",
        type=int,
        default=5,
        metavar="N",
        help="pairs of each kind in which there is nothing to find (default: 5)",
    )
    parser.add_argument(
        "--planted",
        dest="n_planted",
        type=int,
        default=2,
        metavar="N",
        help="pairs of each other kind (default: 2)",
    )
    parser.add_argument(
        "--only",
        type=names,
        default=(),
        metavar="KIND,...",
        help="these kinds of pairs alone (default: all)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first pair (default: 0)"
    )
    add_out(parser, "the results; pairs that are done are kept beside it (default: print only)")
    parser.add_argument(
        "-q",
        "--no-progress",
        "--quiet",
        dest="progress",
        action="store_false",
        help="no progress bar (default: one, where stderr is a terminal)",
    )
    add_debug(parser)


def run(args: argparse.Namespace) -> Answer:
    """Validate and answer."""
    from ..validation import validate

    result = validate(
        n_nulls=args.n_nulls,
        n_planted=args.n_planted,
        only=args.only,
        seed=args.seed,
        out=args.out,
        progress=shows_progress(args),
    )
    return answer_of(result, "" if args.out is None else f"saved in {args.out}")


def interrupted(args: argparse.Namespace) -> str:
    """What to say after Ctrl-C."""
    if args.out is None:
        return "interrupted: nothing is kept without --out"
    return "interrupted: the same command goes on after the last pair that was done"
