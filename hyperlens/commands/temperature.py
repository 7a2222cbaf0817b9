"""`hyperlens temperature`: is what tuning did no more than a temperature?"""

from __future__ import annotations

import argparse
from typing import Any

from ..files import check_new_folder
from ..options import STYLE, add_out, add_reading, add_running, read, shows_progress

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


def add_pair(parser: argparse.ArgumentParser) -> None:
    """The two models, the texts and --out."""
    parser.add_argument("base", metavar="BASE", help="the model before: a folder or hub id")
    parser.add_argument(
        "tuned", metavar="TUNED", help="the model after: a folder, hub id or adapter folder"
    )
    add_reading(parser)
    add_out(parser, "the results (default: print only)")


def add_continuations(parser: argparse.ArgumentParser) -> Any:
    """How prompts are made and continued; returns the group, for more options."""
    group = parser.add_argument_group("what is measured")
    for name, default, text in CONTINUATIONS:
        group.add_argument(
            name, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    return group


def measuring(args: argparse.Namespace) -> dict[str, Any]:
    """The same options as arguments of an experiment."""
    chosen = ("n_prompts", "prompt_tokens", "max_new_tokens", "max_length", "batch_size", "seed")
    given = {name: getattr(args, name) for name in (*chosen, "device", "dtype")}
    return given | {"progress": shows_progress(args)}


def saved(finding: Any, args: argparse.Namespace) -> str:
    """The summary; with --out, after saving everything."""
    summary: str = finding.summary()
    if args.out is None:
        return summary
    folder = finding.save(args.out)
    files = ", ".join(sorted(file.name for file in folder.iterdir()))
    return f"{summary}\n\nsaved in {folder}: {files}"


def run(args: argparse.Namespace) -> str:
    """Measure, save and return what to print."""
    if args.out is not None:
        check_new_folder(args.out)
    texts = read(args, args.texts, args.split)
    from ..experiments.temperature import temperature

    return saved(temperature(args.base, args.tuned, texts, **measuring(args)), args)
