"""`hyperlens null-test`: the tuned model beside random changes of the same size."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import STYLE, add_counts, add_pair, add_running, given, saved, texts_for

ORDER = 50

DESCRIPTION = """\
Would any change of the weights of this size look like this?

Placebos are the base plus the tuned model's change with the entries of each tensor shuffled.
Whatever is measured of the tuned model stands beside the range over the placebos."""

EXAMPLES = """\
Examples:
  hyperlens null-test ./base ./tuned --texts held_out.txt --out null-test
  hyperlens null-test ./base ./lora-adapter --texts held_out.txt --n-placebos 19"""

COUNTS = (
    ("--n-placebos", 3, "placebos"),
    ("--max-length", 256, "tokens per text, BOS included; longer texts are cut"),
    ("--n-prompts", 16, "texts that are continued, greedy"),
    ("--prompt-tokens", 17, "their first tokens that are the prompt, BOS included"),
    ("--max-new-tokens", 64, "tokens added to each"),
    ("--batch-size", 8, "texts per forward pass"),
    ("--seed", 0, "of the placebos and of the choice of prompts"),
)


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "null-test",
        help="compare with random changes of the same size",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="null-test", run=run)
    add_pair(parser)
    how = parser.add_argument_group("what is measured")
    add_counts(how, COUNTS)
    add_running(parser, "the checkpoint's own")


def run(args: argparse.Namespace) -> str:
    """Measure, save and return what to print."""
    texts = texts_for(args)
    from ..experiments.null_test import null_test

    finding = null_test(
        args.base,
        args.tuned,
        texts,
        **given(args, counts=COUNTS),
    )
    return saved(finding, args)
