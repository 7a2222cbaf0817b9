"""`hyperlens mauve`: how near one set of texts is to another."""

from __future__ import annotations

import argparse
from typing import Any

from ..files import check_new_folder
from ..options import (
    STYLE,
    add_counts,
    add_how_to_read,
    add_out,
    add_running,
    given,
    read,
    saved,
)

DESCRIPTION = """\
How near is one set of texts to another, in the eyes of a model that reads both? (MAUVE)

1: the same distribution; towards 0: nothing in common. Needs the extra package mauve-text (GPL):
pip install 'hyperlens[mauve]'. A thousand texts a side and more are needed for it to mean much."""

EXAMPLES = """\
Examples:
  hyperlens mauve human.txt written.jsonl --features openai-community/gpt2-large --out mauve
  hyperlens mauve human.txt written.txt --features ./base --seeds 0,1,2"""

COUNTS = (
    ("--max-length", 1024, "tokens per text; longer ones are read up to there"),
    ("--batch-size", 16, "texts per forward pass"),
)


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "mauve",
        help="tell how near one set of texts is to another",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="mauve", run=run)
    parser.add_argument(
        "p", metavar="TEXTS", help="a .txt, .jsonl, .csv or .parquet file, or a hub dataset"
    )
    parser.add_argument("q", metavar="OTHER", help="the other texts")
    parser.add_argument(
        "--features",
        required=True,
        metavar="MODEL",
        help="the model that reads the texts: a folder or hub id",
    )
    add_how_to_read(parser)
    add_out(parser, "the results (default: print only)")
    how = parser.add_argument_group("how it is computed")
    how.add_argument(
        "--seeds",
        type=seeds,
        default=(0, 1, 2, 3, 4),
        metavar="N[,N]",
        help="of its clustering (default: 0,1,2,3,4)",
    )
    add_counts(how, COUNTS)
    add_running(parser, "the checkpoint's own")


def seeds(text: str) -> tuple[int, ...]:
    """Whole numbers with commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers with commas, as in 0,1,2; got {text!r}"
        ) from None


def run(args: argparse.Namespace) -> str:
    """Measure, save and return what to print."""
    if args.out is not None:
        check_new_folder(args.out)
    from .mauve_scores import compute_mauve

    compute_mauve()  # whoever lacks it should not wait for anything
    p, q = (read(args, source, args.split) for source in (args.p, args.q))
    from .mauve import measure_mauve

    finding = measure_mauve(p, q, args.features, **given(args, "seeds", counts=COUNTS))
    return saved(finding, args)
