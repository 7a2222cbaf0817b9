"""`hyperlens mauve`: how close is one set of texts to another?"""

from __future__ import annotations

import argparse
from typing import Any

from ..files import check_new_folder
from .options import add_how_to_read, add_out, add_running, given, read, saved
from .signatures import add_command, add_options, option_names, read_signature


def add(commands: Any) -> None:
    """Add the command."""
    found = read_signature("hyperlens.experiments.mauve.run", "measure_mauve")
    parser = add_command(commands, "mauve", found)
    own = option_names(found.options)
    parser.set_defaults(command="mauve", run=lambda args: _run(own, args))
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
    add_options(parser.add_argument_group("what is measured"), found.options)
    add_running(parser, "the checkpoint's own")


def _run(own: list[str], args: argparse.Namespace) -> str:
    """Measure, save and return what to print."""
    if args.out is not None:
        check_new_folder(args.out)
    from ..experiments.mauve.scores import compute_mauve

    compute_mauve()  # whoever lacks it should not wait for anything
    p, q = (read(args, source, args.split) for source in (args.p, args.q))
    from ..experiments.mauve import measure_mauve

    return saved(measure_mauve(p, q, args.features, **given(args, *own)), args)
