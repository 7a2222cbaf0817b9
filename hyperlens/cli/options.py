"""What several commands share, options and what is done with them.

Light to import, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Container
from typing import Any

from .. import processes
from ..files import check_new_folder, expand_user
from .answers import Answer, answer_of

DEBUG = "HYPERLENS_DEBUG"

BACKENDS = ("residual", "bridge", "hooked_transformer")
DTYPES = ("float32", "bfloat16", "float16", "float64")

STYLE: dict[str, Any] = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    # A script must not change its meaning when an option is added.
    "allow_abbrev": False,
}


def add_out(parser: argparse.ArgumentParser, what: str, required: bool = False) -> None:
    """--out: a new folder."""
    parser.add_argument(
        "--out",
        type=expand_user,
        required=required,
        metavar="FOLDER",
        help=f"a new folder for {what}",
    )


def add_pair(parser: argparse.ArgumentParser) -> None:
    """The two models, the texts and --out."""
    add_models(parser)
    add_reading(parser)
    add_out(parser, "the results (default: print only)")


def add_models(parser: argparse.ArgumentParser) -> None:
    """The model before and the model after."""
    parser.add_argument("base", metavar="BASE", help="the model before: a folder or hub id")
    parser.add_argument(
        "tuned", metavar="TUNED", help="the model after: a folder, hub id or adapter folder"
    )


def add_reading(parser: argparse.ArgumentParser, unless: str = "", groups: bool = True) -> Any:
    """--texts, required unless something is said, and how to read them.

    Returns the group, for more options.
    """
    group = parser.add_argument_group("texts")
    group.add_argument(
        "--texts",
        required=not unless,
        metavar="SOURCE",
        help="a .txt, .jsonl, .csv (each also .gz or .zst) or .parquet file, or the name of a hub "
        "dataset" + (f" (default: none; needed {unless})" if unless else ""),
    )
    add_how_to_read(group, groups)
    return group


def add_how_to_read(group: Any, groups: bool = True, chats: bool = True) -> None:
    """Which texts of a source are read, and how.

    Args:
        group: of options.
        groups: whether intervals are made, so that it matters which texts belong together.
        chats: whether they may be conversations, and tokens chosen by their roles.
    """
    group.add_argument(
        "--text-column",
        metavar="NAME",
        help='the column that holds the texts (default: "text", or the only one with strings)',
    )
    group.add_argument(
        "--split", default="train", metavar="NAME", help="of a hub dataset (default: train)"
    )
    group.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="read only the first N texts of a source (default: all)",
    )
    if groups:
        group.add_argument(
            "--groups",
            metavar="COLUMN",
            help="the column that says what texts belong together, or how many consecutive texts "
            "do: intervals count a group once (default: blocks of the paragraphs of a .txt file; "
            "each text of other sources by itself)",
        )
    if groups and chats:
        group.add_argument(
            "--chat-template",
            metavar="NAME",
            help="what writes conversations as text, for both models: base or tuned for that "
            "model's, or a file (default: the one that the two models have)",
        )
        group.add_argument(
            "--roles",
            type=names,
            metavar="NAME[,NAME]",
            help="of conversations, count the tokens of these alone: assistant, user, system, "
            "template (default: all)",
        )


def add_running(
    parser: argparse.ArgumentParser, dtype: str | None, device: str = "the best here"
) -> Any:
    """Device, dtype, progress and --debug; returns the group, for more options.

    Args:
        parser: of the command.
        dtype: what it is by default; None for a command that takes none.
        device: what it is by default.
    """
    group = parser.add_argument_group("running")
    group.add_argument(
        "--device", metavar="NAME", help=f'"cpu", "cuda", "cuda:1", "mps" (default: {device})'
    )
    if dtype is not None:
        add_dtype(group, dtype)
    group.add_argument(
        "-q",
        "--no-progress",
        "--quiet",
        dest="progress",
        action="store_false",
        help="no progress bar (default: one, where stderr is a terminal)",
    )
    add_debug(group)
    return group


def add_dtype(group: Any, default: str) -> None:
    """--dtype."""
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="NAME",
        help=f"of the weights: %(choices)s (default: {default})",
    )


def add_debug(group: Any) -> None:
    """--debug."""
    group.add_argument(
        "--debug", action="store_true", help=f"show tracebacks and warnings (also {DEBUG}=1)"
    )


def texts_for(args: argparse.Namespace) -> Any:
    """The texts of a command with `add_pair`, once it is clear that --out can be written."""
    if args.out is not None:
        check_new_folder(args.out)
    return read(args, args.texts, args.split)


def read(args: argparse.Namespace, source: str, split: str) -> Any:
    """The texts or conversations that the options of `add_reading` name."""
    how = {"column": args.text_column, "split": split, "limit": args.limit}
    if "groups" in args:
        groups = args.groups
        how["groups"] = int(groups) if groups and groups.isdecimal() else groups
    if "roles" not in args:
        from ..data.texts import read_texts

        return read_texts(source, **how)
    from ..data.conversations import read_examples

    return read_examples(source, **how, chat_template=args.chat_template, roles=args.roles)


# What a message says of an argument: `batch_size=…`, or its name alone where that is no word.
# Calls such as read_texts(…, groups=1) and parts of paths and of quoted words stay as they are.
QUOTES = "'\""
_CALL = r"[\w.]+\([^()]*\)"
_ARGUMENT = (
    r"(?<![\w/.'\"-])(?P<name>[a-z][a-z_0-9]*)="
    r"(?P<value>'[^']*'|\"[^\"]*\"|\[[^\]]*\]|…|[\w.+-]*\w)"
)
_NAME = r"(?<![\w/.'\"-])(?P<alone>[a-z0-9]+(?:_[a-z0-9]+)+)(?![\w/'\"=-]|\.\w)"
_SUBJECT = r"\A(?P<subject>[a-z]+)(?= must be | has no effect )"
_SAID = re.compile(f"{_SUBJECT}|{_CALL}|{_ARGUMENT}|{_NAME}")
_TWICE = re.compile(r"(?P<option>--[\w-]+)(?P<value> \S+)? \((?P=option)( on the command line)?\)")


def as_options(message: str, known: Container[str]) -> str:
    """A message about arguments of Python, in words of the command line.

    Args:
        message: of an error, such as "lower batch_size" or "pass include_bos=True".
        known: the options of the command, with their dashes; other names stay as they are.

    >>> as_options("lower batch_size, or pass include_bos=True", ["--batch-size", "--include-bos"])
    'lower --batch-size, or pass --include-bos'
    """

    def option(found: re.Match[str]) -> str:
        name = found["name"] or found["alone"] or found["subject"] or ""
        value = found["value"]
        flag = f"--{name.replace('_', '-')}"
        if value == "False":
            return f"--no{flag[1:]}" if f"--no{flag[1:]}" in known else found[0]
        if flag not in known:
            return found[0]
        if value in (None, "True"):
            return flag
        return f"{flag} {value.strip(QUOTES)}"

    return _TWICE.sub(r"\g<option>\g<value>", _SAID.sub(option, message))


def shows_progress(args: argparse.Namespace) -> bool:
    """Whether a progress bar is wanted and somebody looks."""
    return args.progress and sys.stderr.isatty()


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """These options and those of `add_running`, as arguments of an experiment."""
    chosen = {name: getattr(args, name) for name in (*names, "device", "dtype")}
    return chosen | {"progress": shows_progress(args)}


def saved(result: Any, args: argparse.Namespace) -> Answer:
    """The result; with --out, after the first of several processes has saved everything."""
    if args.out is not None and processes.is_first():
        result.save(args.out)
    return answer_saved(result, args)


def answer_saved(result: Any, args: argparse.Namespace) -> Answer:
    """The result; with --out, with the files that have been saved."""
    if args.out is None or not processes.is_first():
        return answer_of(result)
    files = ", ".join(sorted(file.name for file in args.out.iterdir()))
    return answer_of(result, f"saved in {args.out}: {files}")


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def list_of(kind: Callable[[str], Any], example: str) -> Callable[[str], tuple[Any, ...]]:
    """What reads numbers separated by commas."""

    def convert(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected numbers with commas between them, as in {example}; got {text!r}"
            ) from None

    return convert
