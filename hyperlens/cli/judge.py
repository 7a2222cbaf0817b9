"""`hyperlens judge`: a judge compares what two models write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import JudgeError
from ..files import check_new_folder, expand_user
from .answers import Answer, answer_of
from .options import STYLE, add_out, add_reading, add_running, read, shows_progress
from .signatures import add_options, read_signature

DESCRIPTION = """\
Let a judge compare two models' continuations of the same prompts: which is more coherent, which
more diverse, which better (Table 5 of arXiv 2605.22579). Each pair is asked about in both orders;
with --prompt once more in one order, as the paper asks.

The judge is a model behind any OpenAI-compatible endpoint (--judge-url, --judge-model), a local
chat model (--judge-folder), or, to try things out, a rule (--judge-rule). A key comes from the
environment and is never written anywhere. After an interruption the same command resumes."""

EXAMPLES = """\
Examples:
  hyperlens judge ./a ./b --texts t.txt --judge-url http://localhost:8000/v1 --judge-model m --out j
  hyperlens judge ./a ./b --texts t.txt --judge-folder ./chat-model --out judged
  hyperlens judge --pairs written.jsonl --judge-url https://host/v1 --judge-model m --key-env KEY
  hyperlens judge ./a ./b --texts t.txt --judge-rule --prompt paper"""

# Options of `judge_models` that --pairs has no use for.
GENERATION = ("n_prompts", "prompt_tokens", "max_new_tokens", "batch_size", "seed")
ASKING = ("tries", "prompt", "n_examples")


def add(commands: Any) -> None:
    """Add the parser of `hyperlens judge`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "judge",
        help="let a judge compare what two models write",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(run=run, interrupted=interrupted)
    for name in ("A", "B"):
        parser.add_argument(
            name.lower(),
            nargs="?",
            metavar=name,
            help="a model: a folder, a hub id, or an adapter folder (put on the base that it "
            "names)",
        )
    texts = add_reading(parser, unless="with two models")
    texts.add_argument(
        "--pairs",
        metavar="FILE",
        help="instead of models and texts: continuations that are already written, as JSONL with "
        "context, a and b (default: none)",
    )
    add_out(parser, "the results (default: print only)")
    add_judge(parser)
    parser.add_argument(
        "--cache",
        type=expand_user,
        metavar="FOLDER",
        help="where answers are kept (default: the folder of --out with .answers added)",
    )
    options = {
        one.name: one for one in read_signature("hyperlens.judging.judge", "judge_models").options
    }
    generation = parser.add_argument_group("what the two models write (not with --pairs)")
    add_options(generation, (options[name] for name in GENERATION), only_given=True)
    asking = parser.add_argument_group("asking")
    add_options(asking, (options[name] for name in ASKING))
    add_running(parser, "the checkpoint's own")


def add_judge(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Who judges, and how it is asked."""
    group = parser.add_argument_group("judge (one of --judge-url, --judge-folder, --judge-rule)")
    one_of = group.add_mutually_exclusive_group(required=required)
    one_of.add_argument(
        "--judge-url",
        metavar="URL",
        help="the base URL of an endpoint, such as http://localhost:8000/v1 (no default)",
    )
    one_of.add_argument(
        "--judge-folder",
        metavar="MODEL",
        help="a local chat model: a folder or hub id (no default)",
    )
    one_of.add_argument(
        "--judge-rule",
        action="store_true",
        help="no model: the text with fewer repeated bigrams wins (no default)",
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
        help='parameters of each request (default: {"temperature": 0, "max_tokens": 800})',
    )
    for option, kind, default, text in (
        ("--judge-tokens", int, 800, "longest answer of a local judge, in tokens"),
        ("--workers", int, 4, "requests at a time"),
        ("--timeout", float, 60.0, "seconds to wait for one answer"),
        ("--retries", int, 5, "further attempts after a failure that may pass"),
    ):
        group.add_argument(
            option, type=kind, default=default, metavar="N", help=f"{text} (default: {default:g})"
        )


def run(args: argparse.Namespace) -> Answer:
    """Ask, save and answer."""
    if args.out is not None:
        check_new_folder(args.out)
    _check_sources(args)
    texts = read(args, args.texts, args.split) if args.pairs is None else None
    from ..judging.judge import judge_continuations, judge_models

    shared: dict[str, Any] = {
        "judge": judge_of(args),
        **{name: getattr(args, name) for name in ASKING},
        "cache": _cache(args),
        "device": args.device,
        "progress": shows_progress(args),
    }
    if texts is None:
        result = judge_continuations(args.pairs, **shared)
    else:
        result = judge_models(
            args.a, args.b, texts, dtype=args.dtype, **_generation_options(args), **shared
        )
    if args.out is None:
        return answer_of(result)
    return answer_of(
        result, f"saved in {result.save(args.out)}; answers are kept in {_cache(args)}"
    )


def interrupted(args: argparse.Namespace) -> str:
    """What to say after Ctrl-C."""
    cache = _cache(args)
    kept = 0 if cache is None or not cache.is_dir() else len(list(cache.glob("*.json")))
    if not kept:
        return "interrupted"
    return f"interrupted: {kept} answers are kept in {cache}; the same command resumes from there"


def _check_sources(args: argparse.Namespace) -> None:
    is_given = [source is not None for source in (args.a, args.b, args.texts)]
    if not (all(is_given) if args.pairs is None else not any(is_given)):
        raise JudgeError("expected two models and --texts, or --pairs alone: give one or the other")
    if args.pairs is None:
        return
    reading = ("text_column", "limit", "groups", "chat_template", "roles", "dtype")
    others = {name: getattr(args, name) for name in reading}
    useless = [
        *_generation_options(args),
        *(name for name, value in others.items() if value is not None),
        *(["split"] if args.split != "train" else []),
    ]
    if useless:
        option = useless[0].replace("_", "-")
        raise JudgeError(
            f"--{option} is for two models and --texts; with --pairs every pair of the file is "
            "judged: leave it out"
        )


def _generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of GENERATION that are on the command line."""
    return {name: getattr(args, name) for name in GENERATION if name in args}


def judge_of(args: argparse.Namespace) -> Any:
    """The judge that the options of `add_judge` name; there must be one."""
    if args.judge_rule:
        from ..judging.judges import FewerRepeatedBigrams

        return FewerRepeatedBigrams()
    if args.judge_folder is not None:
        from ..judging.judges import LocalJudge

        return LocalJudge(args.judge_folder, max_new_tokens=args.judge_tokens, device=args.device)
    from ..judging.endpoint import Endpoint

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
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('expected a JSON object such as {"temperature": 0}')
    return value
