"""The options of a command from the signature and docstring of its function, without importing it.

Importing an experiment loads torch, which takes seconds; `--help` reads the source instead. So
defaults and descriptions are written once, in the function.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .options import BACKENDS, STYLE, list_of, names

PACKAGE = Path(__file__).resolve().parents[1]
# Given by every command in the same way, or not from the command line at all.
SHARED = {
    *("base", "tuned", "texts", "device", "dtype", "progress"),
    *("chat_template", "roles", "tokens"),
}


class Signature(NamedTuple):
    """A function as its command needs it.

    Attributes:
        summary: the first line of its docstring.
        description: the rest, before "Args:".
        options: keyword-only parameters.
        examples: the module's EXAMPLES, lines of the command line.
    """

    summary: str
    description: str
    options: list[Option]
    examples: tuple[str, ...]


class Option(NamedTuple):
    """One keyword-only parameter: its name, annotation, default and description."""

    name: str
    annotation: str
    default: Any
    text: str


@functools.cache
def read_signature(module: str, function: str) -> Signature:
    """Read a function's signature from the source of its module.

    Args:
        module: its full name, beginning with "hyperlens.".
        function: a function at its top level.
    """
    tree = ast.parse(_source(module))
    constants = _constants(module, tree)
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    doc = ast.get_docstring(node) or ""
    about = doc.split("\nArgs:")[0]
    summary, _, rest = about.partition("\n\n")
    texts = _parameter_texts(doc)
    options = [
        Option(
            one.arg, ast.unparse(one.annotation), _value(default, constants), texts.get(one.arg, "")
        )
        for one, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        if one.annotation is not None and default is not None
    ]
    return Signature(summary, rest.strip(), options, tuple(constants.get("EXAMPLES", ())))


def _source(module: str) -> str:
    # Not by `find_spec`, which imports the packages that the module is in.
    _, *parts = module.split(".")
    path = PACKAGE.joinpath(*parts)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text(encoding="utf-8")


def _constants(module: str, tree: ast.Module) -> dict[str, Any]:
    """Literals that have a name at the top of a module, or come from a module beside it."""
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            wanted = [alias.name for alias in node.names if alias.name.isupper()]
            if wanted:
                other = f"{module.rpartition('.')[0]}.{node.module}"
                beside = _constants(other, ast.parse(_source(other)))
                found |= {name: beside[name] for name in wanted if name in beside}
            continue
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            targets: list[ast.expr] = [node.target]
            value = node.value
        elif isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name):
                with suppress(ValueError):
                    found[target.id] = _value(value, found)
    return found


def _value(node: ast.expr, constants: Mapping[str, Any]) -> Any:
    """A literal, a constant of the module, tuple(...) of one, or the keys of a dictionary."""
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "tuple":
        return tuple(_value(node.args[0], constants))
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): None for key in node.keys if key is not None}
    return ast.literal_eval(node)


def _parameter_texts(doc: str) -> dict[str, str]:
    """Parameter to its description, from the "Args:" of a docstring."""
    found: dict[str, str] = {}
    section = re.search(r"\nArgs:\n(.*?)(?:\n\S|\Z)", doc, re.S)
    if section is None:
        return found
    for parameters, text in re.findall(
        r"^    ([a-z][\w, ]*): (.*?)(?=\n    \S|\Z)", section[1], re.S | re.M
    ):
        for name in parameters.split(","):
            found[name.strip()] = " ".join(text.split())
    return found


def add_command(commands: Any, name: str, found: Signature) -> argparse.ArgumentParser:
    """Add a command with the help of its function; options are for the caller to add."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=_lower(found.summary),
        description=f"{found.summary}\n\n{found.description}".strip(),
        epilog="\n  ".join(["Examples:", *found.examples]) if found.examples else None,
        **STYLE,
    )
    return parser


def _lower(summary: str) -> str:
    """The first line of a docstring as argparse lists it."""
    text = summary.rstrip(".").replace("%", "%%")
    return text[0].lower() + text[1:]


def option_names(options: list[Option]) -> list[str]:
    """The options that `add_options` adds, as they are called in Python."""
    return [one.name for one in options if one.name not in SHARED]


def add_options(group: Any, options: Iterable[Option], *, only_given: bool = False) -> None:
    """Add an argparse option for every parameter that is the function's own.

    Args:
        group: a parser or a group of options.
        options: the parameters.
        only_given: leave options that are not on the command line out of the parsed arguments.
    """
    for one in options:
        if one.name not in SHARED:
            _add(group, one, argparse.SUPPRESS if only_given else one.default)


def _count_or_share(text: str) -> int | float:
    """A number of things, or with a decimal point a share of them."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number such as 32, or a share such as 0.1; got {text!r}"
        ) from None


# Annotation, without "| None", to what reads a value and what it is called in --help.
KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "N"),
    "float": (float, "X"),
    "int | float": (_count_or_share, "N"),
    "str": (str, "NAME"),
    "str | Path": (str, "FILE"),
    "Any": (str, "MODEL"),
    "Sequence[str]": (names, "NAME[,NAME]"),
    "str | Sequence[str]": (names, "NAME[,NAME]"),
    "Sequence[Probe | str]": (names, "NAME[,NAME]"),
    "Sequence[int]": (list_of(int, "0,1,2"), "N[,N]"),
    "Sequence[float]": (list_of(float, "0.1,0.5,1"), "X[,X]"),
    "Backend": (str, "NAME"),
}
CHOICES = {"Backend": BACKENDS}


def _add(group: Any, one: Option, default: Any) -> None:
    option = f"--{one.name.replace('_', '-')}"
    # On the command line None is an option left out.
    said, _, instead = one.text.rstrip(".").partition("; None for ")
    text = f"{said} (default: {instead or _shown(one.default)})".replace("%", "%%")
    if one.annotation == "bool":
        action = argparse.BooleanOptionalAction
        group.add_argument(option, action=action, default=default, help=text)
        return
    annotation = one.annotation.removesuffix(" | None")
    kind, metavar = KINDS[annotation]
    group.add_argument(
        option,
        type=kind,
        choices=CHOICES.get(annotation),
        default=default,
        metavar=metavar,
        help=text,
    )


def _shown(default: Any) -> str:
    if isinstance(default, tuple | list):
        return ",".join(map(_shown, default)) or "none"
    if isinstance(default, bool):
        return "yes" if default else "no"
    return (
        "none"
        if default is None
        else f"{default:g}"
        if isinstance(default, float)
        else str(default)
    )
