"""An option of the command line for every field of a training recipe, with its default's origin."""

from __future__ import annotations

import argparse
import types
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..training.recipes import HELP, PRESETS, Method, Recipe, preset, relevant_fields
from .options import names

METHODS: tuple[Method, ...] = get_args(Method)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add --recipe, and an option for every field of the recipe.

    An option that is left out is None and leaves the recipe's own value.
    """
    group = parser.add_argument_group(
        "recipe",
        'Defaults are "the paper\'s" where arXiv 2605.22579 reports the value, else "ours".',
    )
    default = next(iter(PRESETS))
    group.add_argument(
        "--recipe",
        choices=tuple(PRESETS),
        default=default,
        metavar="NAME",
        help=f"where to start from: %(choices)s (default: {default})",
    )
    kinds = get_type_hints(Recipe)
    for field in fields(Recipe):
        if field.name != "preset":  # --recipe chooses it
            _add_field(group, field.name, kinds[field.name])


def chosen(args: argparse.Namespace) -> Recipe:
    """The recipe that the options ask for.

    Raises:
        TrainingError: if a value is out of range, or an option has no effect with the method.
    """
    options = {f.name: getattr(args, f.name, None) for f in fields(Recipe) if f.name != "preset"}
    changes = {name: value for name, value in options.items() if value is not None}
    return preset(args.recipe, changes.pop("method", "full"), **changes)


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
    full, lora = (_shown(getattr(preset(recipe, method), name)) for method in ("full", "lora"))
    return full if name == "method" or full == lora else f"{full}, with LoRA {lora}"


def _whose(recipe: str, name: str) -> str:
    """Whose choice a field's value is, in the first method that uses the field."""
    method = next(m for m in METHODS if name in relevant_fields(m))
    return {"paper": "the paper's", "ours": "ours"}[preset(recipe, method).origins()[name]]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
