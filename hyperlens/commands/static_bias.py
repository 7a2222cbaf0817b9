"""`hyperlens static-bias`: is what tuning did no more than a bias on some tokens?"""

from __future__ import annotations

import argparse
from typing import Any

from ..options import STYLE, add_pair, add_running, saved, texts_for
from .temperature import add_continuations, measuring

ORDER = 52

ALPHAS = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)

STATIC_BIAS = """\
Is it a static bias? Add the mean logit shift of the most promoted tokens to a base model and see
whether it then does as the tuned model does (Table 2 of arXiv 2605.22579).

Beside the paper's bias stand that of all tokens and three placebos: random tokens, the same
shifts dealt out anew, and one shift for every token, which can have no effect."""

STATIC_BIAS_EXAMPLES = """\
Examples:
  hyperlens static-bias ./base ./tuned --texts held_out.txt --out static-bias
  hyperlens static-bias ./base ./adapter --texts t.jsonl --k 200 --alphas 0.1,0.5,1"""


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "static-bias",
        help="tell whether tuning did more than a bias on some tokens does",
        description=STATIC_BIAS,
        epilog=STATIC_BIAS_EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="static-bias", run=run)
    add_pair(parser)
    group = add_continuations(parser)
    group.add_argument(
        "--k",
        type=int,
        default=500,
        metavar="N",
        help="how many of the most promoted tokens get a bias (default: 500)",
    )
    group.add_argument(
        "--alphas",
        type=_numbers,
        default=ALPHAS,
        metavar="A[,A]",
        help="strengths of the bias; 1 is the measured shift itself (default: "
        f"{','.join(f'{alpha:g}' for alpha in ALPHAS)})",
    )
    add_running(parser, "the checkpoint's own")


def run(args: argparse.Namespace) -> str:
    """Measure, save and return what to print."""
    texts = texts_for(args)
    from ..experiments.static_bias import static_bias

    finding = static_bias(
        args.base, args.tuned, texts, k=args.k, alphas=args.alphas, **measuring(args)
    )
    return saved(finding, args)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers with commas between them, as in 0.1,0.5,1; got {text!r}"
        ) from None
