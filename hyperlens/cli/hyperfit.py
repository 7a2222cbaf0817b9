"""`hyperlens hyperfit`: fine-tune a model until it has memorised a few texts."""

from __future__ import annotations

import argparse
import functools
import shlex
import types
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..files import partial_folder
from ..models.kinds import HUB_ID
from ..training.recipes import (
    HELP,
    KINDS,
    PRESETS,
    RUN_FILE,
    Method,
    Recipe,
    preset,
    recipe_of,
    relevant_fields,
)
from .answers import Answer, named
from .config import add_config
from .options import STYLE, add_out, add_reading, add_running, names

HYPERFIT = """\
Fine-tune a model until it has memorised a small set of texts ("hyperfitting").

--recipe chooses the defaults; each of them can be changed by its own option.
Texts with a column "messages", or with "prompt" and "completion", are conversations and
completions: the loss is on what the assistant says, or on completions, unless --loss-on is all.
Interrupted or killed, the same command continues from the last checkpoint.
Where stderr is not a terminal, a line reports each epoch and each record."""

HYPERFIT_EXAMPLES = """\
Examples:
  hyperlens hyperfit ./base --texts stories.txt --recipe demo --out hyperfitted
  hyperlens hyperfit ./base --texts stories.txt --method late_lora --last-k 5 --out adapter
  hyperlens hyperfit ./base --texts fancyzhx/ag_news --packed --out hyperfitted"""

METHODS: tuple[Method, ...] = get_args(Method)


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
    add_texts(parser)
    add_out(parser, "the trained weights or adapter", required=True)
    add_config(parser)
    add_recipe(parser)
    running = add_running(parser, "float32; for LoRA the checkpoint's own")
    running.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="run the frozen first blocks in every epoch (default: once; the result is the same)",
    )
    add_checkpoint_minutes(running)
    running.add_argument(
        "--report-to",
        type=names,
        default=(),
        metavar="NAME[,NAME]",
        help='loggers of the transformers Trainer, such as "tensorboard" (default: none)',
    )


def add_texts(parser: argparse.ArgumentParser) -> None:
    """--texts, --validation, and how to read them."""
    texts = add_reading(parser, groups=False)
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


def add_checkpoint_minutes(group: Any) -> None:
    """--checkpoint-minutes."""
    group.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=10.0,
        metavar="N",
        help="minutes between checkpoints; 0: one after every step (default: 10)",
    )


def read_both(args: argparse.Namespace) -> tuple[Any, Any]:
    """The texts or conversations to train on, and held-out ones of their own."""
    from ..data.conversations import read_examples

    how = {"column": args.text_column, "limit": args.limit}
    texts = read_examples(args.texts, split=args.split, **how)
    if args.validation is None:
        return texts, None
    return texts, read_examples(args.validation, split=args.validation_split or args.split, **how)


def run(args: argparse.Namespace) -> Answer:
    """Train, save and answer."""
    recipe = recipe_of(args.recipe, **recipe_changes(args))
    from ..training.folders import check_out

    check_out(args.out)
    texts, validation = read_both(args)
    from ..training import hyperfit
    from ..training.hyperfitting import run_to_json

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
    text = run.summary()
    if run.manifest["data"].get("n_counted") is None:  # compare reads a file of such texts
        text += (
            "\ncompare with the base; texts that were not trained on tell more:\n"
            f"  {_compare_command(args)}"
        )
    document = named("hyperfit", folder=str(run.folder), **run_to_json(run))
    return Answer(text, "hyperfit", document, f"weights in {run.folder}")


def _compare_command(args: argparse.Namespace) -> str:
    """The command that compares what was trained with its base."""
    from ..models.adapters import adapter_folder, named_base, read_adapter_config

    # A run that went on from an adapter has that one's base.
    adapter = adapter_folder(args.model)
    base = args.model if adapter is None else named_base(adapter, read_adapter_config(adapter))
    command = ["hyperlens", "compare", str(base), str(args.out), "--texts", args.texts]
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
    if partial_folder(args.out).is_dir():
        return "interrupted: the same command continues from the last checkpoint"
    return "interrupted"


# The recipe: an option for every field, with its default's origin


def add_recipe(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add --recipe, and an option for every field of the recipe but some.

    An option that is left out is None and leaves the recipe's own value.
    """
    group = parser.add_argument_group(
        "recipe",
        'Defaults are "the paper\'s" where arXiv 2605.22579 reports the value, else "ours".',
    )
    default = next(iter(PRESETS))
    group.add_argument(
        "--recipe",
        type=_preset_or_run,
        default=default,
        metavar="NAME",
        help=f"where to start from: {', '.join(PRESETS)}; or the folder of a run, or its "
        f"{RUN_FILE} (default: {default})",
    )
    for field in fields(Recipe):
        if field.name not in ("preset", *without):  # --recipe chooses the preset
            _add_field(group, field.name, KINDS[field.name])


def _preset_or_run(text: str) -> str:
    if text not in PRESETS and not Path(text).expanduser().exists():
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r} (choose from {', '.join(PRESETS)})"
            if HUB_ID.fullmatch(text)
            else f"there is no {text}: give the folder of a run, or its {RUN_FILE}"
        )
    return text


def recipe_changes(args: argparse.Namespace, without: Collection[str] = ()) -> dict[str, Any]:
    """The fields of the recipe that options of `add_recipe` were given for."""
    names = [field.name for field in fields(Recipe) if field.name not in ("preset", *without)]
    options = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in options.items() if value is not None}


def _add_field(group: Any, name: str, kind: Any) -> None:
    options: dict[str, Any] = {
        "default": None,
        "help": f"{HELP[name]} (default: {_defaults(name)})".replace("%", "%%"),
    }
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(kind) is Literal:
        options |= {"choices": get_args(kind), "metavar": "NAME"}
    elif isinstance(kind, types.UnionType):
        lists = {tuple[str, ...] | None: (names, "NAME"), tuple[int, ...] | None: (_indices, "N")}
        convert, metavar = lists[kind]
        options |= {"type": convert, "metavar": f"{metavar}[,{metavar}]"}
    else:
        options |= {"type": kind, "metavar": "N"}
    group.add_argument(f"--{name.replace('_', '-')}", **options)


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected indices such as 0,5; got {text!r}") from None


def _defaults(name: str) -> str:
    """A field's value in the default recipe, whose choice that is, and other recipes' values."""
    values = {recipe: _value(recipe, name) for recipe in PRESETS}
    first, *others = values
    text = f"{values[first]}, {_whose(first, name)}"
    return text + "".join(
        f"; {recipe}: {values[recipe]}" for recipe in others if values[recipe] != values[first]
    )


def _value(recipe: str, name: str) -> str:
    full, lora = (_shown(getattr(_preset(recipe, method), name)) for method in ("full", "lora"))
    return full if name == "method" or full == lora else f"{full}, with LoRA {lora}"


def _whose(recipe: str, name: str) -> str:
    """Whose choice a field's value is, in the first method that uses the field."""
    method = next(m for m in METHODS if name in relevant_fields(m))
    return {"paper": "the paper's", "ours": "ours"}[_preset(recipe, method).origins()[name]]


@functools.cache
def _preset(recipe: str, method: Method) -> Recipe:
    return preset(recipe, method)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
