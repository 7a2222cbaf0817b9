"""`hyperlens compare`: what fine-tuning changed, block by block."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import BACKENDS, STYLE, add_pair, add_running, given, saved, texts_for
from ..recipe_options import names

ORDER = 10


# Kept here as plain names because listing them must not import torch; a test holds them to it.
PROBES = ("drift", "participation_ratio", "logit_lens", "rank_reordering", "artefact_audit")


COMPARE = """\
Compare a base model with a fine-tuned one on some text, at every block.

Both models read the same tokens in one pass. The summary goes to stdout; --out also writes the
whole table, its figure and everything needed to repeat the run."""

COMPARE_EXAMPLES = """\
Examples:
  hyperlens compare ./base ./tuned --texts held_out.txt --out comparison
  hyperlens compare ./base ./lora-adapter --texts owner/dataset --split test --limit 200
  hyperlens compare ./base ./tuned --texts t.jsonl --text-column story --probes drift,logit_lens"""


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="tell what fine-tuning changed, block by block",
        description=COMPARE,
        epilog=COMPARE_EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="compare", run=run)
    add_pair(parser)
    how = parser.add_argument_group("what is measured")
    how.add_argument(
        "--probes",
        type=_probe_names,
        metavar="NAME[,NAME]",
        help=f"which probes to run (default: all): {', '.join(PROBES)}",
    )
    for name, kind, default, text in (
        ("--max-length", int, 256, "tokens per text, BOS included; longer texts are cut"),
        ("--batch-size", int, 8, "texts per forward pass; does not change the result"),
        (
            "--sink-threshold",
            float,
            10.0,
            "mask positions whose norm exceeds this many times their text's median as attention "
            "sinks, layer by layer; 0 masks none",
        ),
        ("--seed", int, 0, "of the token sample that some intervals are computed from"),
    ):
        how.add_argument(
            name, type=kind, default=default, metavar="N", help=f"{text} (default: {default:g})"
        )
    how.add_argument(
        "--include-bos", action="store_true", help="measure BOS positions too (default: left out)"
    )
    how.add_argument(
        "--backend",
        choices=BACKENDS,
        default="residual",
        help="how the models are hooked: %(choices)s (default: residual, the fastest)",
        metavar="NAME",
    )
    add_running(parser, "the checkpoint's own")


def run(args: argparse.Namespace) -> str:
    """Compare, save and return what to print."""
    texts = texts_for(args)
    from ..compare import compare_models
    from ..probes import default_probes

    probes = None
    if args.probes is not None:
        built_in = {probe.name: probe for probe in default_probes()}
        probes = [built_in[name] for name in args.probes]
    comparison = compare_models(
        args.base,
        args.tuned,
        texts,
        probes=probes,
        **given(
            args, "max_length", "batch_size", "include_bos", "sink_threshold", "backend", "seed"
        ),
    )
    return saved(comparison, args)


def _probe_names(text: str) -> tuple[str, ...]:
    given = names(text)
    unknown = [name for name in given if name not in PROBES]
    if unknown or not given:
        raise argparse.ArgumentTypeError(
            f"no probe {(unknown or [text])[0]!r}: choose among {', '.join(PROBES)}"
        )
    return given
