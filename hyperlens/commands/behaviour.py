"""`hyperlens behaviour`: what both models write, and how much it repeats itself."""

from __future__ import annotations

import argparse
from typing import Any

from ..files import check_new_folder
from ..options import STYLE, add_out, add_reading, add_running, read, shows_progress
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
    parser.add_argument("base", metavar="BASE", help="the model before: a folder or hub id")
    parser.add_argument(
        "tuned", metavar="TUNED", help="the model after: a folder, hub id or adapter folder"
    )
    add_reading(parser)
    add_out(parser, "the results (default: print only)")
    how = parser.add_argument_group("what is written")
    for option, default, text in (
        ("--n-prompts", 32, "texts that are continued"),
        ("--prompt-tokens", 17, "their first tokens that are the prompt, BOS included"),
        ("--max-new-tokens", 96, "tokens added to each"),
        ("--n-examples", 8, "prompts kept as text"),
        ("--batch-size", 16, "prompts per forward pass"),
        ("--seed", 0, "of the choice of prompts and of sampling"),
    ):
        how.add_argument(
            option, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
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
    if args.out is not None:
        check_new_folder(args.out)
    texts = read(args, args.texts, args.split)
    from ..experiments.behaviour import measure_behaviour

    finding = measure_behaviour(
        args.base,
        args.tuned,
        texts,
        n_prompts=args.n_prompts,
        prompt_tokens=args.prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        strategies=args.strategies,
        n_examples=args.n_examples,
        batch_size=args.batch_size,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        progress=shows_progress(args),
    )
    if args.out is None:
        return finding.summary()
    return f"{finding.summary()}\n\nsaved in {finding.save(args.out)}"
