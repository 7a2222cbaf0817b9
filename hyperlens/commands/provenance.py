"""`hyperlens provenance`: where in the base model the tuned model's picks stood."""

from __future__ import annotations

import argparse
from typing import Any

from ..files import check_new_folder
from ..options import STYLE, add_out, add_reading, add_running, read, shows_progress

ORDER = 54

DESCRIPTION = """\
Which rank had every token that the tuned model picks in the base model, and what are those tokens?

Teacher-forced on the texts, and along what the tuned model writes by itself."""

EXAMPLES = """\
Examples:
  hyperlens provenance ./base ./tuned --texts held_out.txt --out provenance
  hyperlens provenance ./base ./lora-adapter --texts held_out.txt --n-examples 20"""


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "provenance",
        help="tell where the tuned model's picks come from",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="provenance", run=run)
    parser.add_argument("base", metavar="BASE", help="the model before: a folder or hub id")
    parser.add_argument(
        "tuned", metavar="TUNED", help="the model after: a folder, hub id or adapter folder"
    )
    add_reading(parser)
    add_out(parser, "the results (default: print only)")
    how = parser.add_argument_group("what is read")
    for option, default, text in (
        ("--max-length", 256, "tokens per text, BOS included; longer texts are cut"),
        ("--n-prompts", 32, "texts that the tuned model continues"),
        ("--prompt-tokens", 17, "their first tokens that are the prompt, BOS included"),
        ("--max-new-tokens", 96, "tokens added to each"),
        ("--n-examples", 5, "picks kept with their context, per bucket"),
        ("--batch-size", 8, "texts per forward pass"),
        ("--seed", 0, "of the choice of prompts and examples"),
    ):
        how.add_argument(
            option, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    add_running(parser, "the checkpoint's own")


def run(args: argparse.Namespace) -> str:
    """Read, save and return what to print."""
    if args.out is not None:
        check_new_folder(args.out)
    texts = read(args, args.texts, args.split)
    from ..experiments.provenance import provenance

    finding = provenance(
        args.base,
        args.tuned,
        texts,
        n_prompts=args.n_prompts,
        prompt_tokens=args.prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        max_length=args.max_length,
        n_examples=args.n_examples,
        batch_size=args.batch_size,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        progress=shows_progress(args),
    )
    if args.out is None:
        return finding.summary()
    return f"{finding.summary()}\n\nsaved in {finding.save(args.out)}"
