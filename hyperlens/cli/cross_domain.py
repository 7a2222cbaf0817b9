"""`hyperlens cross-domain`: several pairs of models on several corpora, one row each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..errors import CorpusError, HyperlensError, PairError
from ..files import check_new_folder
from .options import add_how_to_read, add_out, add_running, given, read
from .signatures import add_command, add_options, option_names, read_signature


def add(commands: Any) -> None:
    """Add the command."""
    found = read_signature("hyperlens.experiments.cross_domain", "compare_domains")
    parser = add_command(commands, "cross-domain", found)
    own = [one for one in found.options if one.name != "out"]
    names = (*option_names(own), "out")
    parser.set_defaults(
        command="cross-domain", run=lambda args: _run(names, args), interrupted=interrupted
    )
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
    add_options(parser.add_argument_group("what is measured"), own)
    add_running(parser, "the checkpoint's own")


def _run(names: Sequence[str], args: argparse.Namespace) -> str:
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
    from ..experiments.cross_domain import compare_domains

    result = compare_domains(pairs, corpora, **given(args, *names))
    if args.out is None:
        return result.summary()
    return f"{result.summary()}\n\nsaved in {args.out}"


def _check_names(names: Sequence[str], error: type[HyperlensError]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise error(f"{twice[0]!r} is given twice: each pair and each corpus needs its own name")


def interrupted(args: argparse.Namespace) -> str:
    """What to say after Ctrl-C."""
    if args.out is None:
        return "interrupted"
    return "interrupted: the same command goes on after the last row that was done"
