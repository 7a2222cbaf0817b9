"""`hyperlens judge`: a judge compares what two models write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import JudgeError
from ..files import check_new_folder
from ..options import (
    STYLE,
    add_counts,
    add_out,
    add_reading,
    add_running,
    folder,
    read,
    shows_progress,
)

DESCRIPTION = """\
Let a judge compare two models' continuations of the same prompts: which is more coherent, which
more diverse, which better (Table 5 of arXiv 2605.22579). Each pair is asked in both orders.

The judge is a model behind any OpenAI-compatible endpoint (--judge-url, --judge-model), a local
chat model (--judge-folder), or, to try things out, a rule (--judge-rule). A key comes from the
environment and is written nowhere. Interrupted, the same command goes on."""

EXAMPLES = """\
Examples:
  hyperlens judge ./a ./b --texts t.txt --judge-url http://localhost:8000/v1 --judge-model m --out j
  hyperlens judge ./a ./b --texts t.txt --judge-folder ./chat-model --out judged
  hyperlens judge --pairs written.jsonl --judge-url https://host/v1 --judge-model m --key-env KEY
  hyperlens judge ./a ./b --texts t.txt --judge-rule"""

# The defaults of `judge_models`.
WRITTEN = (
    ("--n-prompts", 100, "texts that are continued"),
    ("--prompt-tokens", 17, "their first tokens that are the prompt, BOS included"),
    ("--max-new-tokens", 96, "tokens added to each at most"),
    ("--batch-size", 16, "prompts per forward pass"),
    ("--seed", 0, "of the choice of prompts"),
)
ASKED = (
    ("--tries", 3, "times to ask until an answer can be read"),
    ("--n-examples", 4, "pairs kept as text"),
)


def add(commands: Any) -> None:
    """The parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "judge",
        help="let a judge compare what two models write",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(command="judge", run=run, interrupted=interrupted)
    for name in ("A", "B"):
        parser.add_argument(
            name.lower(),
            nargs="?",
            metavar=name,
            help="a model: a folder, hub id, or adapter folder (on the base that it names)",
        )
    texts = add_reading(parser, unless="with two models")
    texts.add_argument(
        "--pairs",
        metavar="FILE",
        help="in place of models and texts: JSONL with context, a and b, already written "
        "(default: none)",
    )
    add_out(parser, "the results (default: print only)")
    _add_judge(parser)
    add_counts(parser.add_argument_group("what two models write"), WRITTEN, asked=True)
    add_counts(parser.add_argument_group("what is asked"), ASKED)
    add_running(parser, "the checkpoint's own")


def _add_judge(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("judge")
    who = group.add_mutually_exclusive_group(required=True)
    for option, metavar, text in (
        ("--judge-url", "URL", "base URL of an endpoint, as in http://localhost:8000/v1"),
        ("--judge-folder", "MODEL", "a local chat model: a folder or hub id"),
    ):
        who.add_argument(option, metavar=metavar, help=f"{text} (one of three; no default)")
    who.add_argument(
        "--judge-rule",
        action="store_true",
        help="no model: fewer repeated bigrams win (one of three; no default)",
    )
    group.add_argument(
        "--judge-model", metavar="NAME", help="the model's name at the endpoint (default: none)"
    )
    group.add_argument(
        "--key-env",
        metavar="NAME",
        help="environment variable that holds the key (default: OPENAI_API_KEY, if it is set and "
        "the URL is https or of this machine)",
    )
    group.add_argument(
        "--judge-parameters",
        type=_json_object,
        metavar="JSON",
        help='of the request (default: {"temperature": 0, "max_tokens": 800})',
    )
    for option, kind, default, text in (
        ("--judge-tokens", int, 800, "tokens of a local judge's answer at most"),
        ("--workers", int, 4, "requests at a time"),
        ("--timeout", float, 60.0, "seconds to wait for one answer"),
        ("--retries", int, 5, "attempts after a failure that may pass"),
    ):
        group.add_argument(
            option, type=kind, default=default, metavar="N", help=f"{text} (default: {default:g})"
        )
    group.add_argument(
        "--cache",
        type=folder,
        metavar="FOLDER",
        help="where answers are kept (default: the folder of --out with .answers added)",
    )


def run(args: argparse.Namespace) -> str:
    """Ask, save and return what to print."""
    if args.out is not None:
        check_new_folder(args.out)
    _check_sources(args)
    texts = read(args, args.texts, args.split) if args.pairs is None else None
    from .judge import judge_continuations, judge_models

    shared: dict[str, Any] = {
        "judge": _judge(args),
        "tries": args.tries,
        "cache": _cache(args),
        "n_examples": args.n_examples,
        "device": args.device,
        "progress": shows_progress(args),
    }
    if texts is None:
        finding = judge_continuations(args.pairs, **shared)
    else:
        finding = judge_models(
            args.a,
            args.b,
            texts,
            **_of_writing(args),
            dtype=args.dtype,
            **shared,
        )
    if args.out is None:
        return finding.summary()
    return (
        f"{finding.summary()}\n\nsaved in {finding.save(args.out)}; answers are kept in "
        f"{_cache(args)}"
    )


def interrupted(args: argparse.Namespace) -> str:
    """What to say after Ctrl-C."""
    cache = _cache(args)
    kept = 0 if cache is None or not cache.is_dir() else len(list(cache.glob("*.json")))
    if not kept:
        return "interrupted"
    return f"interrupted: {kept} answers are kept in {cache}, from which the same command goes on"


def _check_sources(args: argparse.Namespace) -> None:
    given = [source is not None for source in (args.a, args.b, args.texts)]
    if not (all(given) if args.pairs is None else not any(given)):
        raise JudgeError("expected two models and --texts, or --pairs alone: give one or the other")
    if args.pairs is None:
        return
    reading = {name: getattr(args, name) for name in ("text_column", "limit", "dtype")}
    useless = [*_of_writing(args), *(name for name, value in reading.items() if value is not None)]
    if args.split != "train":
        useless.append("split")
    if useless:
        option = useless[0].replace("_", "-")
        raise JudgeError(
            f"--{option} is for models that write, and every pair of --pairs is judged as it "
            "stands: leave it out"
        )


def _of_writing(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `WRITTEN` that were asked for, as arguments."""
    names = [option.removeprefix("--").replace("-", "_") for option, *_ in WRITTEN]
    return {name: getattr(args, name) for name in names if name in args}


def _judge(args: argparse.Namespace) -> Any:
    if args.judge_rule:
        from .rule import FewerRepeatedBigrams

        return FewerRepeatedBigrams()
    if args.judge_folder is not None:
        from .local import LocalJudge

        return LocalJudge(args.judge_folder, max_new_tokens=args.judge_tokens, device=args.device)
    from .endpoint import Endpoint

    if args.judge_model is None:
        raise JudgeError("--judge-url needs --judge-model, the model's name there: add it")
    parameters = {} if args.judge_parameters is None else {"parameters": args.judge_parameters}
    return Endpoint(
        args.judge_url,
        args.judge_model,
        key_env=args.key_env,
        workers=args.workers,
        timeout=args.timeout,
        retries=args.retries,
        **parameters,
    )


def _cache(args: argparse.Namespace) -> Path | None:
    if args.cache is not None:
        return Path(args.cache)
    return None if args.out is None else Path(f"{args.out}.answers")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('expected a JSON object, as in {"temperature": 0}')
    return value
