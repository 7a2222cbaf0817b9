"""The options of the command line. Nothing heavy is imported, so that --help answers at once."""

from __future__ import annotations

import argparse
import types
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from . import __version__
from .training.recipes import HELP, PRESETS, Method, Recipe, preset

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

The defaults are those of the recipe (--recipe); any of them can be changed by its own option."""

HYPERFIT_EXAMPLES = """\
Examples:
  hyperlens hyperfit ./base --texts stories.txt --recipe demo --out hyperfitted
  hyperlens hyperfit ./base --texts stories.txt --method late_lora --last-k 5 --out adapter"""


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
    add(
        "--out",
        type=_folder,
        metavar="FOLDER",
        help="a new folder for the results (default: print only)",
    )
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
    _add_reading(parser)
    parser.add_argument(
        "--out",
        type=_folder,
        required=True,
        metavar="FOLDER",
        help="a new folder for the weights or adapter",
    )
    recipe = parser.add_argument_group("recipe")
    default = next(iter(PRESETS))
    recipe.add_argument(
        "--recipe",
        choices=tuple(PRESETS),
        default=default,
        metavar="NAME",
        help=f"where to start from: %(choices)s (default: {default})",
    )
    types_ = get_type_hints(Recipe)
    for field in fields(Recipe):
        if field.name != "preset":  # --recipe chooses it
            _add_recipe_field(recipe, field.name, types_[field.name])
    _add_running(parser, "float32; for LoRA the checkpoint's own")


def _add_recipe_field(group: Any, name: str, kind: Any) -> None:
    """One field of the recipe as an option; left out, the recipe's own value stays."""
    options: dict[str, Any] = {
        "default": None,
        "help": f"{HELP[name]} ({_recipe_default(name)})".replace("%", "%%"),
    }
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(kind) is Literal:
        options |= {"choices": get_args(kind), "metavar": "NAME"}
    elif isinstance(kind, types.UnionType):
        options |= {"type": _names, "metavar": "NAME[,NAME]"}
    else:
        options |= {"type": kind, "metavar": "N"}
    group.add_argument(f"--{name.replace('_', '-')}", **options)


def _recipe_default(name: str) -> str:
    """What a field is in every recipe: the default recipe's value first, then what differs."""
    text = f"default: {_differing(name, 'full')}"
    lora = _differing(name, "lora")
    return text if name == "method" or text.endswith(f" {lora}") else f"{text}; LoRA: {lora}"


def _differing(name: str, method: Method) -> str:
    values = {recipe: _shown(getattr(preset(recipe, method), name)) for recipe in PRESETS}
    first, *others = values.items()
    named = [f", {recipe} {value}" for recipe, value in others if value != first[1]]
    return "".join([first[1], *named])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _add_reading(parser: argparse.ArgumentParser) -> None:
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


def _add_running(parser: argparse.ArgumentParser, dtype: str) -> None:
    group = parser.add_argument_group("running")
    group.add_argument(
        "--device", metavar="NAME", help='"cpu", "cuda", "cuda:1", "mps" (default: the best here)'
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="NAME",
        help=f"of the weights: %(choices)s (default: {dtype})",
    )
    group.add_argument(
        "-q",
        "--no-progress",
        "--quiet",
        dest="progress",
        action="store_false",
        help="no progress bar (default: one, where stderr is a terminal)",
    )
    group.add_argument(
        "--debug", action="store_true", help=f"show tracebacks and warnings (also {DEBUG}=1)"
    )


def _folder(text: str) -> Path:
    return Path(text).expanduser()


def _probe_names(text: str) -> tuple[str, ...]:
    names = _names(text)
    unknown = [name for name in names if name not in PROBES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"no probe {(unknown or [text])[0]!r}: choose among {', '.join(PROBES)}"
        )
    return names


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
