"""The command line: `hyperlens compare`, `hyperlens hyperfit` and `hyperlens merge`.

Parsing imports nothing heavy, so that --help and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from .errors import HyperlensError
from .files import check_new_folder
from .options import DEBUG, build_parser
from .recipe_options import chosen

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None takes the program's own.

    Returns:
        The exit code: 0 done, 1 an error, 2 wrong usage, 130 interrupted.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else USAGE
    debug = args.debug or os.environ.get(DEBUG, "") not in ("", "0")
    try:
        with _only_our_voice(debug):
            command = {"compare": _compare, "hyperfit": _hyperfit, "merge": _merge}[args.command]
            text = command(args)
        # Started several times by torchrun, a command answers once.
        if os.environ.get("RANK", "0") == "0":
            _say(text)
        return OK
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        _complain(_interrupted(args))
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, HyperlensError):
            _complain(f"error: {error}")
        else:
            hint = "" if debug else "; see the traceback with --debug, and please report it"
            _complain(f"unexpected error: {type(error).__name__}: {error}{hint}")
        return FAILED


def _compare(args: argparse.Namespace) -> str:
    """Compare, save and return what to print."""
    if args.out is not None:
        check_new_folder(args.out)
    texts = _read(args, args.texts, args.split)
    from .compare import compare_models
    from .probes import default_probes

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
        progress=_shows_progress(args),
    )
    if args.out is None:
        return comparison.summary()
    folder = comparison.save(args.out)
    files = ", ".join(sorted(file.name for file in folder.iterdir()))
    return f"{comparison.summary()}\n\nsaved in {folder}: {files}"


def _hyperfit(args: argparse.Namespace) -> str:
    """Train, save and return what to print."""
    check_new_folder(args.out)
    recipe = chosen(args)
    texts = _read(args, args.texts, args.split)
    validation = None
    if args.validation is not None:
        validation = _read(args, args.validation, args.validation_split or args.split)
    from .training import hyperfit

    run = hyperfit(
        args.model,
        texts,
        recipe=recipe,
        validation=validation,
        out=args.out,
        device=args.device,
        dtype=args.dtype,
        prefix_cache=args.prefix_cache,
        checkpoint_minutes=args.checkpoint_minutes,
        report_to=args.report_to,
        progress=_shows_progress(args),
    )
    about = run.manifest
    blocks = ", ".join(map(str, about["trained_blocks"]))
    lines = [
        *(f"note: {note}" for note in about["notes"]),
        f"{recipe.method} on blocks {blocks} (0-based) of {about['n_blocks']}, "
        f"{about['trained_parameters']:,} weights, {about['seconds']:.0f} s: {about['ending']}",
        f"mean loss {run.history[0]:.3f} in the first epoch, {run.history[-1]:.3f} in the last",
        *_quality(run.records, about["kept_epoch"]),
        f"weights in {run.folder}",
        "compare with the base; texts that were not trained on tell more:",
        f"  {_compare_command(args)}",
    ]
    return "\n".join(lines)


def _quality(records: Sequence[Any], kept_epoch: int) -> list[str]:
    """What the record of the weights that were kept says beside the base's own, the first."""
    if len(records) < 2:
        return []
    base, last = records[0], next(r for r in records if r.epoch == kept_epoch)
    return [
        f"held-out text after epoch {last.epoch} (the base): "
        f"TTR {last.ttr:.3f} ({base.ttr:.3f}), "
        f"bigram repetition {last.bigram_repetition:.3f} ({base.bigram_repetition:.3f}), "
        f"perplexity {last.perplexity:,.1f} ({base.perplexity:,.1f})"
    ]


def _merge(args: argparse.Namespace) -> str:
    """Merge, save and return what to print."""
    from .training import merge

    return f"merged weights in {merge(args.adapter, args.out, base=args.base, dtype=args.dtype)}"


def _interrupted(args: argparse.Namespace) -> str:
    """What to say after Ctrl-C; hyperfit keeps what it has done beside the folder to be."""
    if args.command == "hyperfit" and Path(f"{args.out}.partial").is_dir():
        return "interrupted: the same command goes on from the last checkpoint"
    return "interrupted"


def _compare_command(args: argparse.Namespace) -> str:
    """The command that compares what was trained with its base."""
    command = ["hyperlens", "compare", args.model, str(args.out), "--texts", args.texts]
    for option, value, default in (
        ("--text-column", args.text_column, None),
        ("--split", args.split, "train"),
        ("--limit", args.limit, None),
        ("--device", args.device, None),
    ):
        if value != default:
            command += [option, str(value)]
    return shlex.join([*command, "--out", f"{args.out}-comparison"])


def _read(args: argparse.Namespace, source: str, split: str) -> list[str]:
    from .texts import read_texts

    return read_texts(source, column=args.text_column, split=split, limit=args.limit)


def _shows_progress(args: argparse.Namespace) -> bool:
    return args.progress and sys.stderr.isatty()


@contextmanager
def _only_our_voice(debug: bool) -> Iterator[None]:
    """Keep what other libraries print, log and warn off the terminal, unless debugging."""
    if debug:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _say(text: str) -> None:
    """Print, whatever the terminal's alphabet."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def _complain(text: str) -> None:
    encoding = sys.stderr.encoding or "utf-8"
    line = " ".join(f"hyperlens: {text}".split())
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr)
