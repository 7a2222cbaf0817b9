"""`hyperlens compare`: what fine-tuning changed, block by block."""

from __future__ import annotations

import argparse
from typing import Any

from ..files import check_new_folder
from ..options import BACKENDS, STYLE, add_out, add_reading, add_running, read, shows_progress
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
    add = parser.add_argument
    add("base", metavar="BASE", help="the model before: a folder or hub id")
    add("tuned", metavar="TUNED", help="the model after: a folder, hub id or adapter folder")
    add_reading(parser)
    add_out(parser, "the results (default: print only)")
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
    if args.out is not None:
        check_new_folder(args.out)
    texts = read(args, args.texts, args.split)
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
        max_length=args.max_length,
        batch_size=args.batch_size,
        include_bos=args.include_bos,
        sink_threshold=args.sink_threshold,
        backend=args.backend,
        device=args.device,
        dtype=args.dtype,
        seed=args.seed,
        progress=shows_progress(args),
    )
    if args.out is None:
        return comparison.summary()
    folder = comparison.save(args.out)
    files = ", ".join(sorted(file.name for file in folder.iterdir()))
    return f"{comparison.summary()}\n\nsaved in {folder}: {files}"


def _probe_names(text: str) -> tuple[str, ...]:
    given = names(text)
    unknown = [name for name in given if name not in PROBES]
    if unknown or not given:
        raise argparse.ArgumentTypeError(
            f"no probe {(unknown or [text])[0]!r}: choose among {', '.join(PROBES)}"
        )
    return given
