"""`hyperlens hyperfit`: fine-tune a model until it knows a few texts by heart."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import check_new_folder
from ..options import STYLE, add_out, add_reading, add_running, names, read, shows_progress
from .recipe import add_recipe, chosen

HYPERFIT = """\
Fine-tune a model until it knows a small set of texts by heart ("hyperfitting").

The defaults are those of the recipe (--recipe); any of them can be changed by its own option.
Interrupted or killed, the same command goes on from the last checkpoint."""

HYPERFIT_EXAMPLES = """\
Examples:
  hyperlens hyperfit ./base --texts stories.txt --recipe demo --out hyperfitted
  hyperlens hyperfit ./base --texts stories.txt --method late_lora --last-k 5 --out adapter
  hyperlens hyperfit ./base --texts fancyzhx/ag_news --packed --out hyperfitted"""


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "hyperfit",
        help="fine-tune a model on a few texts until it knows them by heart",
        description=HYPERFIT,
        epilog=HYPERFIT_EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="hyperfit", run=run, interrupted=interrupted)
    parser.add_argument("model", metavar="BASE", help="the model to train: a folder or hub id")
    texts = add_reading(parser)
    texts.add_argument(
        "--validation",
        metavar="SOURCE",
        help="held-out texts for the record, read as --texts are (default: those after them)",
    )
    texts.add_argument(
        "--validation-split",
        metavar="NAME",
        help="of a hub dataset given as --validation (default: the one of --split)",
    )
    add_out(parser, "the weights or adapter", required=True)
    add_recipe(parser)
    running = add_running(parser, "float32; for LoRA the checkpoint's own")
    running.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="compute frozen first blocks anew in every epoch (default: once; the same result)",
    )
    running.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=10.0,
        metavar="N",
        help="minutes between two checkpoints; 0 after every step (default: 10)",
    )
    running.add_argument(
        "--report-to",
        type=names,
        default=(),
        metavar="NAME[,NAME]",
        help='loggers of transformers\' Trainer, such as "tensorboard" or "wandb" (default: none)',
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
        progress=shows_progress(args),
    )
    about = run.manifest
    blocks = ", ".join(map(str, about["trained_blocks"]))
    lines = [
        *(f"note: {note}" for note in about["notes"]),
        f"{recipe.method} on blocks {blocks} (0-based) of {about['n_blocks']}, "
        f"{about['trained_parameters']:,} weights, {about['seconds']:.0f} s: {about['ending']}",
        f"mean loss {run.history[0]:.3f} in the first epoch, {run.history[-1]:.3f} in the last",
        *_quality(run.records, about["kept_epoch"]),
        f"weights in {run.folder}",
        "compare with the base; texts that were not trained on tell more:",
        f"  {_compare_command(args)}",
    ]
    return "\n".join(lines)


def _quality(records: Sequence[Any], kept_epoch: int) -> list[str]:
    """What the record of the weights that were kept says beside the base's own, the first."""
    if len(records) < 2:
        return []
    base, last = records[0], next(r for r in records if r.epoch == kept_epoch)
    return [
        f"held-out text after epoch {last.epoch} (the base): "
        f"TTR {last.ttr:.3f} ({base.ttr:.3f}), "
        f"bigram repetition {last.bigram_repetition:.3f} ({base.bigram_repetition:.3f}), "
        f"perplexity {last.perplexity:,.1f} ({base.perplexity:,.1f})"
    ]


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
    """What to say after Ctrl-C; what has been done is kept beside the folder to be."""
    if Path(f"{args.out}.partial").is_dir():
        return "interrupted: the same command goes on from the last checkpoint"
    return "interrupted"
