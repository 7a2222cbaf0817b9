"""The commands of questions that take two models and texts, made from their functions."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from ..options import STYLE, add_pair, add_running, given, saved, texts_for
from ..questions import Question
from .signatures import SHARED, add_options, read_signature


def command_of(question: Question) -> str:
    """What a question is called on the command line."""
    return {"comparison": "compare"}.get(question.name, question.name.replace("_", "-"))


def add(commands: Any, question: Question) -> None:
    """Add the command of a question."""
    module = f"hyperlens.{question.module}"
    if question.name == "comparison":
        module += ".run"
    found = read_signature(module, question.function)
    name = command_of(question)
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=_lower(found.summary),
        description=f"{found.summary}\n\n{found.description}".strip(),
        epilog="\n  ".join(["Examples:", *found.examples]) if found.examples else None,
        **STYLE,
    )
    own = [one.name for one in found.options if one.name not in SHARED]
    parser.set_defaults(command=name, run=lambda args: _run(question, own, args))
    add_pair(parser)
    add_options(parser.add_argument_group("what is measured"), found.options)
    add_running(parser, "the checkpoint's own")


def _lower(summary: str) -> str:
    """The first line of a docstring as argparse lists it."""
    text = summary.rstrip(".").replace("%", "%%")
    return text[0].lower() + text[1:]


def _run(question: Question, own: list[str], args: argparse.Namespace) -> str:
    texts = texts_for(args)
    function = getattr(import_module(f"hyperlens.{question.module}"), question.function)
    result: Any = function(args.base, args.tuned, texts, **given(args, *own))
    return saved(result, args)
