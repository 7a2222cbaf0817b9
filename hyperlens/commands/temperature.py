"""`hyperlens temperature`: is what tuning did no more than a temperature?"""

from __future__ import annotations

import argparse
from typing import Any

from ..options import STYLE, add_counts, add_pair, add_running, given, saved, texts_for

ORDER = 50

TEMPERATURE = """\
Is it temperature? Set a base model at the tuned model's entropy beside both (Table 1 of
arXiv 2605.22579).

Solves for the temperature that gives the base model the tuned model's entropy, for all contexts
together and for each. Agreement, rank correlation and entropy are teacher-forced on the texts;
repetition is that of greedy and sampled continuations of their first tokens."""

TEMPERATURE_EXAMPLES = """\
Examples:
  hyperlens temperature ./base ./tuned --texts held_out.txt --out temperature
  hyperlens temperature ./base ./adapter --texts t.jsonl --n-prompts 64 --max-new-tokens 224"""

CONTINUATIONS = (
    ("--n-prompts", 32, "texts, drawn at random, that are continued"),
    ("--prompt-tokens", 32, "first tokens of a text that are the prompt"),
    ("--max-new-tokens", 128, "tokens added to each; an end of text is a token like any other"),
    ("--max-length", 256, "tokens per text, BOS included; longer texts are cut"),
    ("--batch-size", 16, "texts or prompts per forward pass"),
    ("--seed", 0, "of the choice of prompts and of everything drawn at random"),
)


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "temperature",
        help="tell whether tuning did more than a temperature does",
        description=TEMPERATURE,
        epilog=TEMPERATURE_EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="temperature", run=run)
    add_pair(parser)
    add_continuations(parser)
    add_running(parser, "the checkpoint's own")


def add_continuations(parser: argparse.ArgumentParser) -> Any:
    """How prompts are made and continued; returns the group, for more options."""
    group = parser.add_argument_group("what is measured")
    add_counts(group, CONTINUATIONS)
    return group


def measuring(args: argparse.Namespace) -> dict[str, Any]:
    """The same options as arguments of an experiment."""
    return given(args, counts=CONTINUATIONS)


def run(args: argparse.Namespace) -> str:
    """Measure, save and return what to print."""
    texts = texts_for(args)
    from ..experiments.temperature import temperature

    return saved(temperature(args.base, args.tuned, texts, **measuring(args)), args)
