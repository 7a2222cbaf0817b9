"""The command line: one command per question, and one line on stderr for what goes wrong.

Nothing heavy is imported before a command runs: --help and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from typing import Any, NoReturn

from .. import __version__, processes
from ..errors import HyperlensError, ResourceError
from ..questions import QUESTIONS
from ..training.recipes import nearest
from . import config, demo, experiments, hyperfit, merge, report, validate
from .answers import Answer, add_json, error_document
from .options import DEBUG, STYLE, as_options

DESCRIPTION = """\
What did fine-tuning change inside a language model, in which block, and is it real?

Examples:
  hyperlens demo
  hyperlens compare ./base ./tuned --texts held_out.txt --out comparison
  hyperlens hyperfit ./base --texts stories.txt --recipe demo --out hyperfitted

`hyperlens COMMAND --help` tells more. Exit codes: 0 done, 1 an error (one line on stderr),
2 a wrong command line, 130 interrupted; `check` has two more. With --json, stdout is one JSON
document in every case."""

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# Commands that divide their work among the processes that torchrun starts; training does so in
# its own way.
SHARED, OWN_WAY = ("compare", "behaviour"), ("hyperfit",)
# A launcher ends all processes when one has failed: the others leave the one that says why some
# time to do so, in seconds.
UNTIL_SAID = 2.0


class Parser(argparse.ArgumentParser):
    """Says which option, command or choice was probably meant by one that does not exist."""

    _words: Sequence[str] = ()

    @property
    def known(self) -> list[str]:
        """All options, with their dashes."""
        return [name for action in self._actions for name in action.option_strings]

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, once of several processes, and exit with 2."""
        if not processes.is_first():
            time.sleep(UNTIL_SAID)
            raise SystemExit(USAGE)
        instead = ""
        known = self.known
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message):
            word, choices = choice.group(1), re.findall(r"[\w.-]+", choice.group(2))
            meant = nearest(word, choices)
        else:
            # An option that is missing may be one that was mistyped. What follows a mistyped
            # option may be its value.
            options = [word.partition("=")[0] for word in self._words if word.startswith("--")]
            word = next((option for option in options if option not in known), "--")
            fields = {name.removeprefix("--").replace("-", "_"): name for name in known}
            meant = fields.get(nearest(word.removeprefix("--").replace("-", "_"), fields) or "")
            instead = f" instead of {word}" if "required" in message else ""
        message = f"{message}; did you mean {meant}{instead}?" if meant else message
        if any(word.partition("=")[0] == "--config" for word in self._words):
            message += " (in the file of --config, or beside it)"
        if "--json" in self._words:
            _say_error("UsageError", message)
        super().error(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; remembers what was typed, for the message of an error."""
        self._words = sys.argv[1:] if args is None else [str(word) for word in args]
        if any(config.OPTION in action.option_strings for action in self._actions):
            try:
                args = self._words = config.expanded(self._words)
            except ValueError as error:
                self.error(str(error))
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but unknown options are reported by the command they were given to."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            message = f"unrecognized arguments: {' '.join(unknown)}"
            if getattr(found, "command", "") == "compare" and not unknown[0].startswith("-"):
                message += "; several checkpoints of a run are for `hyperlens trajectory`"
            getattr(found, "parser", self).error(message)
        return found


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands, in the order in which --help lists them."""
    parser = Parser(prog="hyperlens", description=DESCRIPTION, **STYLE)
    parser.add_argument("--version", action="version", version=f"hyperlens {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", parser_class=Parser)
    demo.add(commands)
    for question in QUESTIONS:
        if not question.command:
            experiments.add(commands, question)
    # Commands of their own; that of patching serves all of its questions.
    own = dict.fromkeys(question.command for question in QUESTIONS if question.command)
    for module in own:
        import_module(f"hyperlens.{module}").add(commands)
    for command in (hyperfit, merge, report, validate):
        command.add(commands)
    for name, one in commands.choices.items():
        add_json(one)
        one.set_defaults(parser=one, command=name)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None takes the program's own.

    Returns:
        The exit code: 0 done, 1 an error, 2 wrong usage, 130 interrupted.
    """
    try:
        parser = build_parser()
        args = parser.parse_args(argv)
        if "run" not in args:  # no command
            _say(parser.format_help().rstrip())
            return OK
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else USAGE
    debug = args.debug or os.environ.get(DEBUG, "") not in ("", "0")
    # Of processes that share work, only the one that failed first comes to say so.
    shares = processes.count() > 1 and args.command in SHARED
    as_json = args.json and (processes.is_first() or shares)
    try:
        _check_processes(args.command)
        with _only_our_voice(debug, args.json), _shared(args.command):
            answer: Answer = args.run(args)
            said = answer.to_json() if args.json else answer.text
        # Started several times by torchrun, a command answers once.
        if processes.is_first():
            _say(said)
            if args.json and answer.note:
                _note(answer.note)
        return answer.code
    except processes.FailedElsewhere:
        time.sleep(UNTIL_SAID)
        return FAILED
    except BrokenPipeError:  # whoever read our output has seen enough
        _drop_output()
        return FAILED
    except KeyboardInterrupt as error:
        message = args.interrupted(args) if "interrupted" in args else "interrupted"
        _complain(message, message, error, as_json)
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, HyperlensError):
            message = as_options(str(error), args.parser.known)
            _complain(f"error: {message}", message, error, as_json)
        elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            message = "out of memory: lower --batch-size, or choose another --device"
            _complain(f"error: {message}", message, error, as_json)
        else:
            hint = "" if debug else "; see the traceback with --debug, and please report it"
            message = f"{type(error).__name__}: {error}"
            _complain(f"unexpected error: {message}{hint}", message, error, as_json)
        return FAILED


def _check_processes(command: str) -> None:
    if processes.count() > 1 and command not in (*SHARED, *OWN_WAY):
        if not processes.is_first():
            raise processes.FailedElsewhere("the first process says why")
        raise ResourceError(
            f"{command} runs in one process: start it without torchrun or accelerate launch "
            f"({', '.join((*SHARED, *OWN_WAY))} run in several)"
        )


def _shared(command: str) -> AbstractContextManager[None]:
    return processes.share_work() if command in SHARED else nullcontext()


@contextmanager
def _only_our_voice(debug: bool, as_json: bool) -> Iterator[None]:
    """Keep what other libraries print, log and warn off the terminal, unless debugging.

    Beside a document stdout is ours alone, also then.
    """
    if debug:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
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


def _note(text: str) -> None:
    encoding = sys.stderr.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr)


def _complain(line: str, message: str, error: BaseException, as_json: bool) -> None:
    """One line on stderr; for programs, a document on stdout too."""
    _note(_one_line(f"hyperlens: {line}"))
    if as_json:
        _say_error(type(error).__name__, message)


def _say_error(kind: str, message: str) -> None:
    try:
        _say(error_document(kind, _one_line(message)))
    except BrokenPipeError:
        _drop_output()


def _drop_output() -> None:
    """Nobody reads stdout any more: what is left in its buffer must not be an error at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(text: str) -> str:
    return " ".join(text.split())
