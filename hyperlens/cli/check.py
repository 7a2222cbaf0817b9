"""`hyperlens check`: is the change within bounds? A gate for continuous integration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExpectationError, ResultsError
from ..files import check_new_folder, expand_user, new_folder
from .answers import Answer, answer_of, named
from .options import STYLE, add_out, add_reading, add_running, given, saved, texts_for
from .signatures import add_options, option_names, read_signature

if TYPE_CHECKING:
    from ..compare import Comparison

NOT_MET, CANNOT_TELL = 3, 4
# Options that a saved comparison has no use for, besides those of what is measured.
OF_MODELS = ("texts", "text_column", "limit", "groups", "device", "dtype")

DESCRIPTION = """\
Compare two models and check the changes against stated bounds, as a gate of continuous integration.

--expect FILE is TOML or JSON with a list of bounds:

  [[expect]]
  metric = "participation_ratio.delta"   # probe.metric, as in layers.csv
  view = "final_norm"                    # left out: every view
  layer = -1                             # or [0, 5]; left out: every layer
  at_most = 5.0                          # or at_least, or both

Judged by interval: a bound is met if the whole 95% interval is inside it, not met if it is wholly
outside, and cannot be told otherwise. Exit codes: 0 all are met, 3 some are not met, 4 some cannot
be told and all others are met, 1 an error, 2 a wrong command line.

In place of the models, a saved comparison can be checked."""

EXAMPLES = """\
Examples:
  hyperlens check ./base ./tuned --texts held_out.txt --expect bounds.toml
  hyperlens check comparison --write-expect bounds.toml
  hyperlens check comparison --expect bounds.toml --cannot-tell fail --json"""


def _options() -> list[Any]:
    """What a comparison measures; which probes are needed, the bounds say."""
    found = read_signature("hyperlens.compare.run", "compare_models")
    return [one for one in found.options if one.name not in ("probes", "out", "report_to")]


def add(commands: Any) -> None:
    """Add the parser of `hyperlens check`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "check",
        help="check the changes against stated bounds: a gate for continuous integration",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        **STYLE,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "base",
        metavar="BASE",
        help="the model before: a folder or hub id; or, alone, the folder of a saved comparison",
    )
    parser.add_argument(
        "tuned",
        nargs="?",
        metavar="TUNED",
        help="the model after: a folder, hub id or adapter folder",
    )
    one_of = parser.add_mutually_exclusive_group(required=True)
    one_of.add_argument(
        "--expect", type=expand_user, metavar="FILE", help="the bounds, .toml or .json (no default)"
    )
    one_of.add_argument(
        "--write-expect",
        type=expand_user,
        metavar="FILE",
        help="instead of checking, write a first .toml file of bounds around what is measured (no "
        "default)",
    )
    parser.add_argument(
        "--cannot-tell",
        choices=("pass", "fail"),
        metavar="pass|fail",
        help="count bounds that cannot be told as met, or as not met (default: neither, exit code "
        "4)",
    )
    add_reading(parser, unless="with two models")
    add_out(parser, "the verdicts, and the comparison where one was made (default: print only)")
    group = parser.add_argument_group("what is measured (not with a saved comparison)")
    add_options(group, _options(), only_given=True)
    add_running(parser, "the checkpoint's own")


def run(args: argparse.Namespace) -> Answer:
    """Compare or read, check, save and answer."""
    if args.out is not None:
        check_new_folder(args.out)
    _check_sources(args)
    from ..compare import check

    if args.write_expect is not None:
        check.check_new_expectations(args.write_expect)
    bounds = [] if args.expect is None else check.read_expectations(args.expect)
    # Those that the bounds name; all for a first file.
    probes = [*dict.fromkeys(one.metric.partition(".")[0] for one in bounds)]
    comparison = _comparison(args, probes or None)
    if args.write_expect is not None:
        path = check.write_expectations(comparison, args.write_expect)
        note = f"bounds written to {path}"
        if args.out is not None:
            comparison.save(args.out)
            note += f", the comparison saved in {args.out}"
        return Answer(note, "expectations", named("expectations", file=str(path)), note)
    result = check.check_comparison(comparison, args.expect)
    answer = _saved(result, comparison, args)
    return answer._replace(code=_code(result.outcome, args.cannot_tell))


def _check_sources(args: argparse.Namespace) -> None:
    if args.tuned is None and args.out is not None and args.write_expect is not None:
        raise ExpectationError("the comparison is saved already: leave --out out")
    if args.tuned is not None:
        if args.texts is None:
            raise ExpectationError("two models are compared on texts: add --texts")
        return
    others = {name: getattr(args, name) for name in OF_MODELS}
    is_given = [
        *(name for name in option_names(_options()) if name in args),
        *(name for name, value in others.items() if value is not None),
        *(["split"] if args.split != "train" else []),
    ]
    if is_given:
        raise ExpectationError(
            f"--{is_given[0].replace('_', '-')} is for two models, and only {args.base} is given: "
            "add TUNED, or leave the option out"
        )


def _comparison(args: argparse.Namespace, probes: list[str] | None) -> Comparison:
    from ..compare import Comparison, compare_models

    if args.tuned is None:
        try:
            return Comparison.load(args.base)
        except ResultsError as error:
            raise ResultsError(
                f"{error}; alone, {args.base} must be a saved comparison: to compare two models, "
                "give TUNED and --texts"
            ) from error
    options = given(args, *(name for name in option_names(_options()) if name in args))
    return compare_models(args.base, args.tuned, texts_for(args), probes=probes, **options)


def _saved(result: Any, comparison: Comparison, args: argparse.Namespace) -> Answer:
    """A comparison that was made here is kept beside its verdicts."""
    if args.out is None or args.tuned is None:
        return saved(result, args)
    with new_folder(args.out) as staging:
        comparison.save(Path(staging) / comparison.name)
        result.save(Path(staging) / result.name)
    return answer_of(result, f"saved in {args.out}: {comparison.name}, {result.name}")


def _code(outcome: str, cannot_tell: str | None) -> int:
    if outcome == "cannot tell":
        return {"pass": 0, "fail": NOT_MET, None: CANNOT_TELL}[cannot_tell]
    return 0 if outcome == "met" else NOT_MET
