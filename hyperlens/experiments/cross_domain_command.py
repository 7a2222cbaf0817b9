"""`hyperlens cross-domain`: several pairs of models on several corpora, one row each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..errors import CorpusError, HyperlensError, PairError
from ..files import check_new_folder
from ..options import STYLE, add_counts, add_how_to_read, add_out, add_running, given, read

DESCRIPTION = """\
Does it hold on other texts? Several pairs of models on several corpora, one row each.

Every pair is read and written with on every corpus: diversity and repetition of greedy text,
agreement and rank correlation with the base, change of effective dimension at the last layer, and
MAUVE if a model is named for it. With --out, rows that are done are kept in FOLDER.partial: after
Ctrl-C the same command goes on."""

EXAMPLES = """\
Examples:
  hyperlens cross-domain --pair full ./base ./tuned --pair lora ./base ./adapter \\
      --texts stories stories.txt --texts news owner/news --out cross-domain
  hyperlens cross-domain --pair mine ./base ./tuned --texts a a.txt --texts b b.jsonl \\
      --n-prompts 1000 --mauve-features openai-community/gpt2-large"""

COUNTS = (
    ("--n-prompts", 32, "texts of each corpus that are continued, greedy"),
    ("--prompt-tokens", 17, "their first tokens that are the prompt, BOS included"),
    ("--max-new-tokens", 96, "tokens added to each"),
    ("--max-length", 256, "tokens per text, BOS included; longer texts are cut"),
    ("--batch-size", 16, "texts per forward pass"),
    ("--seed", 0, "of the choice of prompts"),
)


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "cross-domain",
        help="measure several pairs on several corpora",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="cross-domain", run=run, interrupted=interrupted)
    parser.add_argument(
        "--pair",
        dest="pairs",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "BASE", "TUNED"),
        help="what to call a pair, the model before and the model after; once for each pair",
    )
    parser.add_argument(
        "--texts",
        nargs=2,
        action="append",
        required=True,
        metavar=("NAME", "SOURCE"),
        help="what to call a corpus, and a .txt, .jsonl, .csv or .parquet file or a hub dataset; "
        "once for each corpus",
    )
    add_how_to_read(parser)
    add_out(parser, "the results (default: print only, keep nothing)")
    how = parser.add_argument_group("what is measured")
    add_counts(how, COUNTS)
    how.add_argument(
        "--mauve-features",
        metavar="MODEL",
        help="a folder or hub id of a model that reads texts: adds MAUVE of the continuations and "
        "the texts' own (default: no MAUVE)",
    )
    add_running(parser, "the checkpoint's own")


def run(args: argparse.Namespace) -> str:
    """Measure, save and return what to print."""
    for named, error in ((args.pairs, PairError), (args.texts, CorpusError)):
        _check_names([name for name, *_ in named], error)
    pairs = {name: (base, tuned) for name, base, tuned in args.pairs}
    if args.out is not None:
        check_new_folder(args.out)
    corpora = {}
    for name, source in args.texts:
        try:
            corpora[name] = read(args, source, args.split)
        except HyperlensError as error:
            raise type(error)(f"corpus {name!r}: {error}") from error
    from .cross_domain import compare_domains

    finding = compare_domains(
        pairs,
        corpora,
        **given(args, "mauve_features", "out", counts=COUNTS),
    )
    if args.out is None:
        return finding.summary()
    return f"{finding.summary()}\n\nsaved in {args.out}"


def _check_names(names: Sequence[str], error: type[HyperlensError]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise error(f"{twice[0]!r} is the name of two: give each pair and each corpus its own name")


def interrupted(args: argparse.Namespace) -> str:
    """What to say after Ctrl-C."""
    if args.out is None:
        return "interrupted"
    return "interrupted: the same command goes on after the last row that was done"
