"""`hyperlens sweep`: late-stage LoRA against how many of the last blocks are trained."""

from __future__ import annotations

import argparse
from typing import Any

from ..files import expand_user
from .answers import Answer, answer_of
from .config import add_config
from .hyperfit import add_checkpoint_minutes, add_recipe, add_texts, read_both, recipe_changes
from .options import STYLE, add_running

DESCRIPTION = """\
How many late blocks are needed? Train late-stage LoRA on the last k blocks, for each k, rank and
seed, on the same texts, and set what each k gains beside what the largest gains.

Every run is an adapter folder in --out. Interrupted or killed, the same command goes on; with other
numbers of blocks or more seeds, only new runs are trained."""

EXAMPLES = """\
Examples:
  hyperlens sweep ./base --texts stories.txt --recipe demo --out sweep
  hyperlens sweep ./base --texts stories.txt --last-k 1..8,12 --seeds 0..4 --out sweep
  hyperlens sweep ./base --texts stories.txt --last-k 1,2,4,8 --ranks 4,16,64 --out sweep"""

# What a sweep decides itself.
SWEPT = ("method", "last_k", "lora_r", "seed", "blocks")


def add(commands: Any) -> None:
    """Add the parser of `hyperlens sweep`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sweep",
        help="train late-stage LoRA for each number of late blocks: how many are needed?",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(run=run, interrupted=interrupted)
    parser.add_argument("base", metavar="BASE", help="the model to train: a folder or hub id")
    add_texts(parser)
    parser.add_argument(
        "--out",
        type=expand_user,
        required=True,
        metavar="FOLDER",
        help="a folder for the runs and the result: a new one, or that of an earlier sweep",
    )
    add_config(parser)
    swept = parser.add_argument_group("what is swept")
    swept.add_argument(
        "--last-k",
        type=last_k,
        metavar="N..N[,N]",
        help="how many of the last blocks to train, such as 1..8,12 (default: 1..L, all of them)",
    )
    swept.add_argument(
        "--ranks", type=spans, metavar="N[,N]", help="of the adapters (default: the recipe's)"
    )
    swept.add_argument(
        "--seeds",
        type=spans,
        default=(0, 1, 2),
        metavar="N..N[,N]",
        help="of training, over which intervals are taken (default: 0,1,2)",
    )
    add_recipe(parser, without=SWEPT)
    running = add_running(parser, "the checkpoint's own")
    add_checkpoint_minutes(running)


def last_k(text: str) -> tuple[int, ...] | None:
    """Numbers of blocks; None for 1..L, which is all of them."""
    return None if text.replace(" ", "") == "1..L" else spans(text)


def spans(text: str) -> tuple[int, ...]:
    """Whole numbers and spans of them, separated by commas.

    >>> spans("1..3,8")
    (1, 2, 3, 8)
    """
    found: list[int] = []
    try:
        for part in text.split(","):
            low, dots, high = part.partition("..")
            found += range(int(low), int(high) + 1) if dots else [int(low)]
            if dots and int(high) < int(low):
                raise ValueError("a span that ends before it begins")
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers such as 1..8,12; got {text!r}"
        ) from None
    return tuple(found)


def run(args: argparse.Namespace) -> Answer:
    """Sweep and answer."""
    texts, validation = read_both(args)
    from ..training import sweep

    result = sweep(
        args.base,
        texts,
        last_k=args.last_k,
        ranks=args.ranks,
        seeds=args.seeds,
        recipe=args.recipe,
        validation=validation,
        out=args.out,
        device=args.device,
        dtype=args.dtype,
        checkpoint_minutes=args.checkpoint_minutes,
        # Off a terminal, too: there it writes a line for each run.
        progress=args.progress,
        **recipe_changes(args, without=SWEPT),
    )
    return answer_of(result, f"report: {args.out / 'report.html'}")


def interrupted(args: argparse.Namespace) -> str:
    """What to say after Ctrl-C."""
    return "interrupted: the same command goes on where it stopped"
