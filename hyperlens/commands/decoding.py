"""`hyperlens decoding`: would another way of decoding the base model do as well?"""

from __future__ import annotations

import argparse
from typing import Any

from ..options import STYLE, add_counts, add_pair, add_running, given, saved, texts_for
from ..recipe_options import names

ORDER = 44

DESCRIPTION = """\
Would another way of decoding do as well? The base model under methods that need no training, and
the tuned model's greedy text (Table 7 of arXiv 2605.22579).

The prompts are the first tokens of the texts. The summary goes to stdout; --out also writes the
table, the figure, examples and a page."""

EXAMPLES = """\
Examples:
  hyperlens decoding ./base ./tuned --texts held_out.txt --out decoding
  hyperlens decoding ./base ./adapter --texts t.jsonl --methods greedy,min_p,guard --n-samples 5"""

COUNTS = (
    ("--n-prompts", 32, "texts, drawn at random, that are continued"),
    ("--prompt-tokens", 17, "their first tokens that are the prompt, BOS included"),
    ("--max-new-tokens", 96, "tokens added to each"),
    ("--n-samples", 1, "runs of the methods that sample, each with its own seed"),
    ("--n-examples", 3, "prompts kept as text, with what every method wrote"),
    ("--batch-size", 16, "prompts per forward pass; contrastive search takes up to 15 times that"),
    ("--seed", 0, "of the choice of prompts and of sampling"),
)
PARAMETERS = (
    ("--temperature", float, 0.7, "of sampling with a temperature", "ours"),
    ("--top-p", float, 0.95, "mass of the likeliest tokens that top-p samples from", "ours"),
    ("--min-p", float, 0.1, "share of the largest probability that min-p asks for", "the paper's"),
    ("--guard-window", int, 7, "entropies that are local to GUARD", "the paper's"),
    ("--contrastive-q", float, 1.0, "how steeply k and alpha follow entropy", "its authors'"),
)


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "decoding",
        help="tell whether another way of decoding does as well",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="decoding", run=run)
    add_pair(parser)
    how = parser.add_argument_group("what is written")
    add_counts(how, COUNTS)
    how.add_argument(
        "--stop-at-eos",
        action="store_true",
        help="end at an end of text (default: write through it, so that all are of one length)",
    )
    how.add_argument(
        "--mauve-features",
        metavar="MODEL",
        help="a model that reads texts, for MAUVE with the texts' own continuations "
        "(default: no MAUVE)",
    )
    methods = parser.add_argument_group("methods of the base model")
    methods.add_argument(
        "--methods",
        type=names,
        default=("greedy", "temperature", "top_p", "min_p", "guard", "contrastive"),
        metavar="NAME[,NAME]",
        help="of greedy, temperature, top_p, min_p, guard, contrastive (default: all)",
    )
    for option, kind, value, text, whose in PARAMETERS:
        methods.add_argument(
            option,
            type=kind,
            default=value,
            metavar="X",
            help=f"{text} (default: {value}, {whose})",
        )
    add_running(parser, "the checkpoint's own")


def run(args: argparse.Namespace) -> str:
    """Measure, save and return what to print."""
    texts = texts_for(args)
    from ..experiments.decoding_baselines import decoding_baselines

    finding = decoding_baselines(
        args.base,
        args.tuned,
        texts,
        **given(args, "methods", "stop_at_eos", "mauve_features", counts=(*COUNTS, *PARAMETERS)),
    )
    return saved(finding, args)
