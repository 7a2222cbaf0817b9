"""`hyperlens reproduce`: the whole paper on one base model."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import Any

from ..errors import CorpusError, HyperlensError, PairError
from ..files import expand_user
from ..reproduction.protocol import HELP, METHODS, SCALES, Protocol, protocol_for
from .answers import Answer, answer_of, named
from .judge import add_judge, judge_of
from .options import STYLE, add_how_to_read, add_out, add_running, read, shows_progress
from .signatures import Option, add_options

DESCRIPTION = """\
Carry out "Beyond Temperature: Hyperfitting as a Late-Stage Geometric Expansion" (arXiv 2605.22579)
on a base model: train its three variants, measure its tables and figures, set every number beside
the paper's, and judge the claims of its abstract by stated rules.

Everything is kept in --out: interrupted or killed, the same command goes on, and with other options
it repeats only what depends on them. With --scale demo or smoke and no BASE, the model and the
tales that ship with hyperlens are taken."""

EXAMPLES = """\
Examples:
  hyperlens reproduce --scale demo --out reproduction
  hyperlens reproduce ./base --texts stories.txt --out reproduction
  hyperlens reproduce ./base --texts FS stories.txt --texts AG fancyzhx/ag_news --out reproduction
  hyperlens reproduce ./base --texts stories.txt --only "Table 1,Figure 5" --out reproduction
  hyperlens reproduce ./base --texts stories.txt --out r --dry-run"""


def add(commands: Any) -> None:
    """Add the parser of `hyperlens reproduce`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "reproduce",
        help="carry out the whole paper on a base model",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(run=run, interrupted=interrupted)
    parser.add_argument(
        "base", nargs="?", metavar="BASE", help="the model before: a folder or hub id"
    )
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--texts",
        nargs="+",
        action="append",
        metavar="SOURCE",
        help="a .txt, .jsonl, .csv or .parquet file or a hub dataset; for several domains NAME "
        "SOURCE, once for each; the paper's are FS, WP and AG (default: the embedded tales, at the "
        "scales demo and smoke)",
    )
    add_how_to_read(texts, chats=False)
    add_out(parser, "models, results and report, or that of an earlier run", required=True)
    what = parser.add_argument_group("what is carried out")
    what.add_argument(
        "--scale",
        choices=tuple(SCALES),
        default="paper",
        help="the settings to start from: the paper's, minutes for the embedded model, or every "
        "step once with numbers that mean nothing (default: paper)",
    )
    what.add_argument(
        "--only",
        metavar="EXHIBIT[,EXHIBIT]",
        help='such as "Table 1,Figure 5" (default: all)',
    )
    what.add_argument(
        "--trained",
        nargs="+",
        default=[],
        metavar="METHOD=FOLDER",
        help=f"models that are trained already, by method: {', '.join(METHODS)} (default: none)",
    )
    what.add_argument(
        "--mauve-features",
        metavar="MODEL",
        help="a model that reads texts, for MAUVE in Tables 6 and 7 (default: no MAUVE)",
    )
    what.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what would be done, how large it is, and how long it may take (default: do "
        "it)",
    )
    _add_protocol(parser)
    add_judge(parser, required=False)
    add_running(parser, "float32 for training all weights, the checkpoint's own otherwise")


def _add_protocol(parser: argparse.ArgumentParser) -> None:
    """An option for every field of the protocol; one that is left out leaves the scale's value."""
    group = parser.add_argument_group("settings (defaults: those of the scale, here of paper)")
    options = (
        Option(
            one.name,
            # As the signatures of functions name it.
            str(one.type).replace("tuple[float, ...]", "Sequence[float]"),
            one.default,
            f"{HELP[one.name]}; " + (f"the paper's, {place}" if place else "ours"),
        )
        for one in fields(Protocol)
        for place in [one.metadata["place"]]
    )
    add_options(group, options, only_given=True)


def run(args: argparse.Namespace) -> Answer:
    """Carry it out, or plan it, and answer."""
    changes = {name: getattr(args, name) for name in HELP if name in args}
    protocol = protocol_for(args.scale, **changes)
    base, texts = _inputs(args)
    options: dict[str, Any] = {
        "protocol": protocol,
        "only": None if args.only is None else [name.strip() for name in args.only.split(",")],
        "trained": _trained(args.trained),
    }
    if args.dry_run:
        from ..reproduction.plan import plan

        planned = plan(base, texts, device=args.device, **options)
        return Answer(str(planned), "plan", named("plan", **planned.to_dict()))
    from ..reproduction.reproduce import reproduce

    def say(step: str) -> None:
        if args.progress:
            sys.stderr.write(f"{step} …\n")

    is_judged = args.judge_rule or args.judge_url is not None or args.judge_folder is not None
    result = reproduce(
        base,
        texts,
        out=args.out,
        judge=judge_of(args) if is_judged else None,
        mauve_features=args.mauve_features,
        device=args.device,
        dtype=args.dtype,
        progress=shows_progress(args),
        say=say,
        **options,
    )
    return answer_of(result, f"report: {args.out / 'report.html'}")


def interrupted(args: argparse.Namespace) -> str:
    """What to say after Ctrl-C."""
    return "interrupted: the same command goes on where it stopped"


def _inputs(args: argparse.Namespace) -> tuple[Any, Any]:
    """The base and the texts; the embedded ones where neither is given at a small scale."""
    if args.base is None and args.texts is None and args.scale != "paper":
        from ..data.texts import read_texts
        from ..embedded import HERE

        return str(HERE / "base"), read_texts(HERE / "tales.jsonl")
    if args.base is None or args.texts is None:
        raise PairError(
            "expected BASE and --texts: give both, or neither with --scale demo or --scale smoke"
        )
    if len(args.texts) == 1 and len(args.texts[0]) == 1:
        return args.base, read(args, args.texts[0][0], args.split)
    if any(len(one) != 2 for one in args.texts):
        raise CorpusError("expected --texts SOURCE, or --texts NAME SOURCE once for each domain")
    named: dict[str, Any] = {}
    for name, source in args.texts:
        if name in named:
            raise CorpusError(f"{name!r} is given twice: each domain needs its own name")
        try:
            named[name] = read(args, source, args.split)
        except HyperlensError as error:
            raise type(error)(f"domain {name!r}: {error}") from error
    return args.base, named


def _trained(given: list[str]) -> dict[str, Any]:
    found = {}
    for one in given:
        method, equals, folder = one.partition("=")
        if not equals or method not in METHODS or not folder:
            raise PairError(
                f"expected --trained METHOD=FOLDER with a method of {', '.join(METHODS)}; got {one}"
            )
        found[method] = expand_user(folder)
    return found
