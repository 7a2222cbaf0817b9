"""`hyperlens behaviour`: what both models write, and how much it repeats itself."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import STYLE, add_counts, add_pair, add_running, given, saved, texts_for
from ..recipe_options import names

ORDER = 40

DESCRIPTION = """\
Let both models continue the same prompts, and measure how diverse what they write is.

The prompts are the first tokens of the texts. The summary goes to stdout; --out also writes the
table, the figure, the continuations and a page."""

EXAMPLES = """\
Examples:
  hyperlens behaviour ./base ./tuned --texts held_out.txt --out behaviour
  hyperlens behaviour ./base ./tuned --texts held_out.txt --strategies greedy --n-prompts 100"""

COUNTS = (
    ("--n-prompts", 32, "texts that are continued"),
    ("--prompt-tokens", 17, "their first tokens that are the prompt, BOS included"),
    ("--max-new-tokens", 96, "tokens added to each"),
    ("--n-examples", 8, "prompts kept as text"),
    ("--batch-size", 16, "prompts per forward pass"),
    ("--seed", 0, "of the choice of prompts and of sampling"),
)


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "behaviour",
        help="tell how diverse what both models write is",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="behaviour", run=run)
    add_pair(parser)
    how = parser.add_argument_group("what is written")
    add_counts(how, COUNTS)
    how.add_argument(
        "--strategies",
        type=names,
        default=("greedy", "sample"),
        metavar="NAME[,NAME]",
        help="greedy, sample or both (default: both)",
    )
    add_running(parser, "the checkpoint's own")


def run(args: argparse.Namespace) -> str:
    """Measure, save and return what to print."""
    texts = texts_for(args)
    from ..experiments.behaviour import measure_behaviour

    finding = measure_behaviour(
        args.base,
        args.tuned,
        texts,
        **given(args, "strategies", counts=COUNTS),
    )
    return saved(finding, args)
