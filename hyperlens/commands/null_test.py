"""`hyperlens null-test`: the tuned model beside random changes of the same size."""

from __future__ import annotations

import argparse
from typing import Any

from ..files import check_new_folder
from ..options import STYLE, add_out, add_reading, add_running, read, shows_progress

ORDER = 50

DESCRIPTION = """\
Would any change of the weights of this size look like this?

Placebos are the base plus the tuned model's change with the entries of each tensor shuffled.
Whatever is measured of the tuned model stands beside the range over the placebos."""

EXAMPLES = """\
Examples:
  hyperlens null-test ./base ./tuned --texts held_out.txt --out null-test
  hyperlens null-test ./base ./lora-adapter --texts held_out.txt --n-placebos 19"""


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "null-test",
        help="compare with random changes of the same size",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="null-test", run=run)
    parser.add_argument("base", metavar="BASE", help="the model before: a folder or hub id")
    parser.add_argument(
        "tuned", metavar="TUNED", help="the model after: a folder, hub id or adapter folder"
    )
    add_reading(parser)
    add_out(parser, "the results (default: print only)")
    how = parser.add_argument_group("what is measured")
    for option, default, text in (
        ("--n-placebos", 3, "placebos"),
        ("--max-length", 256, "tokens per text, BOS included; longer texts are cut"),
        ("--n-prompts", 16, "texts that are continued, greedy"),
        ("--prompt-tokens", 17, "their first tokens that are the prompt, BOS included"),
        ("--max-new-tokens", 64, "tokens added to each"),
        ("--batch-size", 8, "texts per forward pass"),
        ("--seed", 0, "of the placebos and of the choice of prompts"),
    ):
        how.add_argument(
            option, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    add_running(parser, "the checkpoint's own")


def run(args: argparse.Namespace) -> str:
    """Measure, save and return what to print."""
    if args.out is not None:
        check_new_folder(args.out)
    texts = read(args, args.texts, args.split)
    from ..experiments.null_test import null_test

    finding = null_test(
        args.base,
        args.tuned,
        texts,
        n_placebos=args.n_placebos,
        max_length=args.max_length,
        n_prompts=args.n_prompts,
        prompt_tokens=args.prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        progress=shows_progress(args),
    )
    if args.out is None:
        return finding.summary()
    return f"{finding.summary()}\n\nsaved in {finding.save(args.out)}"
