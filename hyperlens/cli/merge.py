"""`hyperlens merge`: merge an adapter into its base."""

from __future__ import annotations

import argparse
from typing import Any

from .answers import Answer, named
from .options import STYLE, add_debug, add_dtype, add_out

MERGE = """\
Merge a LoRA adapter into its base model and write a standard model folder, with the tokenizer.

The adapter and the base are not changed."""

MERGE_EXAMPLES = """\
Examples:
  hyperlens merge ./adapter --out merged
  hyperlens merge ./adapter --base ./base --dtype float32 --out merged"""


def add(commands: Any) -> None:
    """Add the parser of `hyperlens merge`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "merge",
        help="merge an adapter into its base and write a standard model folder",
        description=MERGE,
        epilog=MERGE_EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(run=run)
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter folder")
    add_out(parser, "the merged model", required=True)
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="the model to merge it into: a folder or hub id (default: the one the adapter names)",
    )
    add_dtype(parser, "the base's own")
    add_debug(parser)


def run(args: argparse.Namespace) -> Answer:
    """Merge, save and answer."""
    from ..training import merge

    folder = merge(args.adapter, args.out, base=args.base, dtype=args.dtype)
    note = f"merged weights in {folder}"
    return Answer(note, "merge", named("merge", folder=str(folder)), note)
