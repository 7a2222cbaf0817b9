"""`hyperlens hyperfit`: fine-tune a model until it has memorised a few texts."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from ..files import check_new_folder
from .options import STYLE, add_out, add_reading, add_running, names, read
from .recipe import add_recipe, chosen

HYPERFIT = """\
Fine-tune a model until it has memorised a small set of texts ("hyperfitting").

--recipe chooses the defaults; each of them can be changed by its own option.
Interrupted or killed, the same command continues from the last checkpoint.
Where stderr is not a terminal, a line every half minute reports the progress."""

HYPERFIT_EXAMPLES = """\
Examples:
  hyperlens hyperfit ./base --texts stories.txt --recipe demo --out hyperfitted
  hyperlens hyperfit ./base --texts stories.txt --method late_lora --last-k 5 --out adapter
  hyperlens hyperfit ./base --texts fancyzhx/ag_news --packed --out hyperfitted"""


def add(commands: Any) -> None:
    """Add the parser of `hyperlens hyperfit`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "hyperfit",
        help="fine-tune a model until it has memorised a few texts",
        description=HYPERFIT,
        epilog=HYPERFIT_EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(run=run, interrupted=interrupted)
    parser.add_argument("model", metavar="BASE", help="the model to train: a folder or hub id")
    texts = add_reading(parser)
    texts.add_argument(
        "--validation",
        metavar="SOURCE",
        help="held-out texts on which quality is recorded during training, read in the same way as "
        "--texts (default: the texts after those that are trained on)",
    )
    texts.add_argument(
        "--validation-split",
        metavar="NAME",
        help="split of a hub dataset given as --validation (default: the one given as --split)",
    )
    add_out(parser, "the trained weights or adapter", required=True)
    add_recipe(parser)
    running = add_running(parser, "float32; for LoRA the checkpoint's own")
    running.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="run the frozen first blocks in every epoch (default: once; the result is the same)",
    )
    running.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=10.0,
        metavar="N",
        help="minutes between checkpoints; 0: one after every step (default: 10)",
    )
    running.add_argument(
        "--report-to",
        type=names,
        default=(),
        metavar="NAME[,NAME]",
        help='loggers of the transformers Trainer, such as "tensorboard" (default: none)',
    )


def run(args: argparse.Namespace) -> str:
    """Train, save and return what to print."""
    check_new_folder(args.out)
    recipe = chosen(args)
    texts = read(args, args.texts, args.split)
    validation = None
    if args.validation is not None:
        validation = read(args, args.validation, args.validation_split or args.split)
    from ..training import hyperfit

    run = hyperfit(
        args.model,
        texts,
        recipe=recipe,
        validation=validation,
        out=args.out,
        device=args.device,
        dtype=args.dtype,
        prefix_cache=args.prefix_cache,
        checkpoint_minutes=args.checkpoint_minutes,
        report_to=args.report_to,
        # Off a terminal, too: there it writes a line now and then.
        progress=args.progress,
    )
    return (
        f"{run.summary()}\n"
        "compare with the base; texts that were not trained on tell more:\n"
        f"  {_compare_command(args)}"
    )


def _compare_command(args: argparse.Namespace) -> str:
    """The command that compares what was trained with its base."""
    command = ["hyperlens", "compare", args.model, str(args.out), "--texts", args.texts]
    for option, value, default in (
        ("--text-column", args.text_column, None),
        ("--split", args.split, "train"),
        ("--limit", args.limit, None),
        ("--device", args.device, None),
    ):
        if value != default:
            command += [option, str(value)]
    return shlex.join([*command, "--out", f"{args.out}-comparison"])


def interrupted(args: argparse.Namespace) -> str:
    """The message after Ctrl-C; checkpoints are in a folder beside --out."""
    if Path(f"{args.out}.partial").is_dir():
        return "interrupted: the same command continues from the last checkpoint"
    return "interrupted"
