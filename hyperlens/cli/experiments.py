"""The commands of questions that take two models and texts, made from their functions."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from ..questions import Question
from .options import add_pair, add_running, given, saved, texts_for
from .signatures import add_command, add_options, option_names, read_signature


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
    parser = add_command(commands, name, found)
    own = option_names(found.options)
    parser.set_defaults(command=name, run=lambda args: _run(question, own, args))
    add_pair(parser)
    add_options(parser.add_argument_group("what is measured"), found.options)
    add_running(parser, "the checkpoint's own")


def _run(question: Question, own: list[str], args: argparse.Namespace) -> str:
    texts = texts_for(args)
    function = getattr(import_module(f"hyperlens.{question.module}"), question.function)
    result: Any = function(args.base, args.tuned, texts, **given(args, *own))
    return saved(result, args)
