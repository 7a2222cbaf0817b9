"""The commands of questions, made from their functions: most take two models and texts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ..errors import CorpusError, HyperlensError, PairError
from ..files import check_new_folder, expand_user, partial_folder
from ..questions import Question, named_runs
from .answers import Answer, answer_of, named
from .options import (
    add_debug,
    add_how_to_read,
    add_models,
    add_out,
    add_pair,
    add_reading,
    add_running,
    answer_saved,
    given,
    read,
    saved,
    shows_progress,
    texts_for,
)
from .signatures import add_command, add_options, option_names, read_signature


def command_of(question: Question) -> str:
    """What a question is called on the command line."""
    return {"comparison": "compare"}.get(question.name, question.name.replace("_", "-"))


def add(commands: Any, question: Question) -> None:
    """Add the command of a question."""
    module = f"hyperlens.{question.module}"
    if question.name == "comparison":
        module += ".run"
    found = read_signature(module, question.function)
    parser = add_command(commands, command_of(question), found)
    add_sources, run = SPECIAL.get(question.name, (add_pair, _compare))
    # Every command has --out; a function that saves its result itself has the parameter, too.
    own = [one for one in found.options if one.name != "out"]
    parser.set_defaults(run=lambda args: run(question, option_names(own), args))
    add_sources(parser)
    if own:
        add_options(parser.add_argument_group("what is measured"), own)
        if any(one.name == "dtype" for one in found.options):
            add_running(parser, "the checkpoint's own")
        else:  # no model is run
            add_running(parser, None, device="the CPU")


def _function(question: Question) -> Any:
    return getattr(import_module(f"hyperlens.{question.module}"), question.function)


def _compare(question: Question, own: list[str], args: argparse.Namespace) -> Answer:
    texts = texts_for(args)
    return saved(_function(question)(args.base, args.tuned, texts, **given(args, *own)), args)


def _add_pair_that_is_kept(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(interrupted=_interrupted_pass)
    add_pair(parser)
    _add_dry_run(parser)


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say how large this is and how long it may take, from configurations alone "
        "(default: do it)",
    )


def _compare_and_save(question: Question, own: list[str], args: argparse.Namespace) -> Answer:
    texts = texts_for(args)
    if args.dry_run:
        return _plan_comparison(own, args, texts, args.tuned)
    options = given(args, *own, "out")
    return answer_saved(_function(question)(args.base, args.tuned, texts, **options), args)


def _plan_comparison(
    own: list[str], args: argparse.Namespace, texts: Any, tuned: Any, n_tuned: int = 1
) -> Answer:
    from ..compare.plan import plan_comparison

    names = {*own, "device", "dtype"} - {"report_to"}
    options = {name: getattr(args, name) for name in names}
    planned = plan_comparison(args.base, tuned, texts, n_tuned=n_tuned, **options)
    document = named("comparison_plan", **planned.to_dict())
    return Answer(str(planned), "comparison_plan", document)


def _add_mauve_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "p", metavar="TEXTS", help="a .txt, .jsonl, .csv or .parquet file, or a hub dataset"
    )
    parser.add_argument("q", metavar="OTHER", help="the other texts")
    parser.add_argument(
        "--features",
        required=True,
        metavar="MODEL",
        help="the model that reads the texts: a folder or hub id",
    )
    add_how_to_read(parser, groups=False)
    add_out(parser, "the results (default: print only)")


def _compare_texts(question: Question, own: list[str], args: argparse.Namespace) -> Answer:
    if args.out is not None:
        check_new_folder(args.out)
    from ..experiments.mauve import compute_mauve

    compute_mauve()  # whoever lacks it should not wait for anything
    p, q = (read(args, source, args.split) for source in (args.p, args.q))
    return saved(_function(question)(p, q, args.features, **given(args, *own)), args)


def _add_pairs_and_corpora(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(interrupted=_interrupted)
    parser.add_argument(
        "--pair",
        dest="pairs",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "BASE", "TUNED"),
        help="what to call a pair, the model before and the model after; once for each pair",
    )
    parser.add_argument(
        "--texts",
        nargs=2,
        action="append",
        required=True,
        metavar=("NAME", "SOURCE"),
        help="what to call a corpus, and a .txt, .jsonl, .csv or .parquet file or a hub dataset; "
        "once for each corpus",
    )
    add_how_to_read(parser)
    add_out(parser, "the results (default: print only, keep nothing)")


def _compare_domains(question: Question, own: list[str], args: argparse.Namespace) -> Answer:
    for sources, error in ((args.pairs, PairError), (args.texts, CorpusError)):
        _check_names([name for name, *_ in sources], error)
    pairs = {name: (base, tuned) for name, base, tuned in args.pairs}
    if args.out is not None:
        check_new_folder(args.out)
    corpora = {}
    for name, source in args.texts:
        try:
            corpora[name] = read(args, source, args.split)
        except HyperlensError as error:
            raise type(error)(f"corpus {name!r}: {error}") from error
    result = _function(question)(pairs, corpora, **given(args, *own, "out"))
    return answer_of(result, "" if args.out is None else f"saved in {args.out}")


def _add_variants(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="the model before: a folder or hub id")
    parser.add_argument(
        "--variant",
        dest="variants",
        nargs=2,
        action="append",
        required=True,
        metavar=("NAME", "TUNED"),
        help="what to call a variant, and the model: a folder, hub id or adapter folder; once for "
        "each variant",
    )
    add_reading(parser)
    add_out(parser, "the results (default: print only)")


def _compare_variants(question: Question, own: list[str], args: argparse.Namespace) -> Answer:
    _check_names([name for name, _ in args.variants], PairError)
    texts = texts_for(args)
    result = _function(question)(args.base, dict(args.variants), texts, **given(args, *own))
    return saved(result, args)


def _add_trajectory(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(interrupted=_interrupted)
    parser.add_argument(
        "base", metavar="BASE", help="the model before training: a folder or hub id"
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="RUN",
        help="the folder of a run with checkpoints in it, or the folders of checkpoints",
    )
    add_reading(parser)
    add_out(parser, "the results (default: print only, keep nothing)")
    _add_dry_run(parser)


def _trace_trajectory(question: Question, own: list[str], args: argparse.Namespace) -> Answer:
    texts = texts_for(args)
    if args.dry_run:
        from ..models.training_steps import find_checkpoints

        found = list(find_checkpoints(args.checkpoints).values())
        return _plan_comparison(own, args, texts, found[-1], len(found))
    options = given(args, *own, "out")
    result = _function(question)(args.base, args.checkpoints, texts, **options)
    return answer_of(result, "" if args.out is None else f"saved in {args.out}")


def _add_two_models(parser: argparse.ArgumentParser) -> None:
    add_models(parser)
    add_out(parser, "the results (default: print only)")


def _compare_weights(question: Question, own: list[str], args: argparse.Namespace) -> Answer:
    if args.out is not None:
        check_new_folder(args.out)
    options = {name: getattr(args, name) for name in (*own, "device")}
    progress = shows_progress(args)
    return saved(_function(question)(args.base, args.tuned, **options, progress=progress), args)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        type=expand_user,
        metavar="RUN",
        help="the folder of a run that `hyperlens hyperfit` saved; speed-ups are relative to the "
        "first",
    )
    add_out(parser, "the results (default: print only)")
    add_debug(parser)


def _compare_runs(question: Question, own: list[str], args: argparse.Namespace) -> Answer:
    if args.out is not None:
        check_new_folder(args.out)
    return saved(_function(question)(named_runs(args.runs)), args)


def _check_names(names: Sequence[str], error: type[HyperlensError]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise error(f"{twice[0]!r} is given twice: each needs its own name")


def _interrupted(args: argparse.Namespace) -> str:
    if args.out is None:
        return "interrupted"
    return "interrupted: the same command goes on with what was kept of it"


def _interrupted_pass(args: argparse.Namespace) -> str:
    """Sums are kept about once a minute."""
    if args.out is None or not partial_folder(args.out).exists():
        return "interrupted"
    return _interrupted(args)


# What a question takes instead of two models and texts, and what runs it.
SPECIAL = {
    "comparison": (_add_pair_that_is_kept, _compare_and_save),
    "cross_domain": (_add_pairs_and_corpora, _compare_domains),
    "mauve": (_add_mauve_texts, _compare_texts),
    "training": (_add_runs, _compare_runs),
    "trajectory": (_add_trajectory, _trace_trajectory),
    "variants": (_add_variants, _compare_variants),
    "weights": (_add_two_models, _compare_weights),
}
