"""The options of the command line. Nothing heavy is imported, so that --help answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import __version__
from .recipe_options import add_recipe, names

DEBUG = "HYPERLENS_DEBUG"

# Kept here as plain names because listing them must not import torch; a test holds them to it.
PROBES = ("drift", "participation_ratio", "logit_lens", "rank_reordering", "artefact_audit")
BACKENDS = ("residual", "bridge", "hooked_transformer")
DTYPES = ("float32", "bfloat16", "float16", "float64")

DESCRIPTION = """\
What did fine-tuning change inside a language model, in which block, and is it real?

Examples:
  hyperlens compare ./base ./tuned --texts held_out.txt --out comparison
  hyperlens hyperfit ./base --texts stories.txt --recipe demo --out hyperfitted
  hyperlens merge ./adapter --out merged

`hyperlens COMMAND --help` tells more. Exit codes: 0 done, 1 an error (one line on stderr),
2 a wrong command line, 130 interrupted."""

COMPARE = """\
Compare a base model with a fine-tuned one on some text, at every block.

Both models read the same tokens in one pass. The summary goes to stdout; --out also writes the
whole table, its figure and everything needed to repeat the run."""

COMPARE_EXAMPLES = """\
Examples:
  hyperlens compare ./base ./tuned --texts held_out.txt --out comparison
  hyperlens compare ./base ./lora-adapter --texts owner/dataset --split test --limit 200
  hyperlens compare ./base ./tuned --texts t.jsonl --text-column story --probes drift,logit_lens"""

HYPERFIT = """\
Fine-tune a model until it knows a small set of texts by heart ("hyperfitting").

The defaults are those of the recipe (--recipe); any of them can be changed by its own option.
Interrupted or killed, the same command goes on from the last checkpoint."""

HYPERFIT_EXAMPLES = """\
Examples:
  hyperlens hyperfit ./base --texts stories.txt --recipe demo --out hyperfitted
  hyperlens hyperfit ./base --texts stories.txt --method late_lora --last-k 5 --out adapter
  hyperlens hyperfit ./base --texts fancyzhx/ag_news --packed --out hyperfitted"""

MERGE = """\
Fold a LoRA adapter into its base and write a standard model folder, with its tokenizer.

Adapter and base stay as they are."""

MERGE_EXAMPLES = """\
Examples:
  hyperlens merge ./adapter --out merged
  hyperlens merge ./adapter --base ./base --dtype float32 --out merged"""


STYLE: dict[str, Any] = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    # A script must not change its meaning when an option is added.
    "allow_abbrev": False,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="hyperlens", description=DESCRIPTION, **STYLE)
    parser.add_argument("--version", action="version", version=f"hyperlens {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    _add_compare(commands)
    _add_hyperfit(commands)
    _add_merge(commands)
    return parser


def _add_compare(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="tell what fine-tuning changed, block by block",
        description=COMPARE,
        epilog=COMPARE_EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="compare")
    add = parser.add_argument
    add("base", metavar="BASE", help="the model before: a folder or hub id")
    add("tuned", metavar="TUNED", help="the model after: a folder, hub id or adapter folder")
    _add_reading(parser)
    _add_out(parser, "the results (default: print only)")
    how = parser.add_argument_group("what is measured")
    how.add_argument(
        "--probes",
        type=_probe_names,
        metavar="NAME[,NAME]",
        help=f"which probes to run (default: all): {', '.join(PROBES)}",
    )
    for name, kind, default, text in (
        ("--max-length", int, 256, "tokens per text, BOS included; longer texts are cut"),
        ("--batch-size", int, 8, "texts per forward pass; does not change the result"),
        (
            "--sink-threshold",
            float,
            10.0,
            "mask positions whose norm exceeds this many times their text's median as attention "
            "sinks, layer by layer; 0 masks none",
        ),
        ("--seed", int, 0, "of the token sample that some intervals are computed from"),
    ):
        how.add_argument(
            name, type=kind, default=default, metavar="N", help=f"{text} (default: {default:g})"
        )
    how.add_argument(
        "--include-bos", action="store_true", help="measure BOS positions too (default: left out)"
    )
    how.add_argument(
        "--backend",
        choices=BACKENDS,
        default="residual",
        help="how the models are hooked: %(choices)s (default: residual, the fastest)",
        metavar="NAME",
    )
    _add_running(parser, "the checkpoint's own")


def _add_hyperfit(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "hyperfit",
        help="fine-tune a model on a few texts until it knows them by heart",
        description=HYPERFIT,
        epilog=HYPERFIT_EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="hyperfit")
    parser.add_argument("model", metavar="BASE", help="the model to train: a folder or hub id")
    texts = _add_reading(parser)
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
    _add_out(parser, "the weights or adapter", required=True)
    add_recipe(parser)
    running = _add_running(parser, "float32; for LoRA the checkpoint's own")
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


def _add_merge(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "merge",
        help="fold an adapter into its base: a standard model folder",
        description=MERGE,
        epilog=MERGE_EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="merge")
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter folder")
    _add_out(parser, "the merged model", required=True)
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="the model to merge it into: a folder or hub id (default: the one the adapter names)",
    )
    _add_dtype(parser, "the base's own")
    _add_debug(parser)


def _add_out(parser: argparse.ArgumentParser, what: str, required: bool = False) -> None:
    parser.add_argument(
        "--out",
        type=_folder,
        required=required,
        metavar="FOLDER",
        help=f"a new folder for {what}",
    )


def _add_reading(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("texts")
    group.add_argument(
        "--texts",
        required=True,
        metavar="SOURCE",
        help="a .txt, .jsonl, .csv or .parquet file, or the name of a hub dataset",
    )
    group.add_argument(
        "--text-column",
        metavar="NAME",
        help='the column that holds the texts (default: "text", or the only one with strings)',
    )
    group.add_argument(
        "--split", default="train", metavar="NAME", help="of a hub dataset (default: train)"
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="read only the first N texts (default: all)"
    )
    return group


def _add_running(parser: argparse.ArgumentParser, dtype: str) -> Any:
    group = parser.add_argument_group("running")
    group.add_argument(
        "--device", metavar="NAME", help='"cpu", "cuda", "cuda:1", "mps" (default: the best here)'
    )
    _add_dtype(group, dtype)
    group.add_argument(
        "-q",
        "--no-progress",
        "--quiet",
        dest="progress",
        action="store_false",
        help="no progress bar (default: one, where stderr is a terminal)",
    )
    _add_debug(group)
    return group


def _add_dtype(group: Any, default: str) -> None:
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="NAME",
        help=f"of the weights: %(choices)s (default: {default})",
    )


def _add_debug(group: Any) -> None:
    group.add_argument(
        "--debug", action="store_true", help=f"show tracebacks and warnings (also {DEBUG}=1)"
    )


def _folder(text: str) -> Path:
    return Path(text).expanduser()


def _probe_names(text: str) -> tuple[str, ...]:
    given = names(text)
    unknown = [name for name in given if name not in PROBES]
    if unknown or not given:
        raise argparse.ArgumentTypeError(
            f"no probe {(unknown or [text])[0]!r}: choose among {', '.join(PROBES)}"
        )
    return given
