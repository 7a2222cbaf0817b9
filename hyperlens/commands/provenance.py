"""`hyperlens provenance`: where in the base model the tuned model's picks stood."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import STYLE, add_counts, add_pair, add_running, given, saved, texts_for

ORDER = 54

DESCRIPTION = """\
Which rank had every token that the tuned model picks in the base model, and what are those tokens?

Teacher-forced on the texts, and along what the tuned model writes by itself."""

EXAMPLES = """\
Examples:
  hyperlens provenance ./base ./tuned --texts held_out.txt --out provenance
  hyperlens provenance ./base ./lora-adapter --texts held_out.txt --n-examples 20"""

COUNTS = (
    ("--max-length", 256, "tokens per text, BOS included; longer texts are cut"),
    ("--n-prompts", 32, "texts that the tuned model continues"),
    ("--prompt-tokens", 17, "their first tokens that are the prompt, BOS included"),
    ("--max-new-tokens", 96, "tokens added to each"),
    ("--n-examples", 5, "picks kept with their context, per bucket"),
    ("--batch-size", 8, "texts per forward pass"),
    ("--seed", 0, "of the choice of prompts and examples"),
)


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "provenance",
        help="tell where the tuned model's picks come from",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="provenance", run=run)
    add_pair(parser)
    how = parser.add_argument_group("what is read")
    add_counts(how, COUNTS)
    add_running(parser, "the checkpoint's own")


def run(args: argparse.Namespace) -> str:
    """Read, save and return what to print."""
    texts = texts_for(args)
    from ..experiments.provenance import provenance

    finding = provenance(
        args.base,
        args.tuned,
        texts,
        **given(args, counts=COUNTS),
    )
    return saved(finding, args)
