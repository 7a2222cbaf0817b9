"""The command line's frame: runs one command, and says in one line what went wrong."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

from .commands import build_parser
from .errors import HyperlensError
from .options import DEBUG

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
            text = args.run(args)
        # Started several times by torchrun, a command answers once.
        if os.environ.get("RANK", "0") == "0":
            _say(text)
        return OK
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        _complain(args.interrupted(args) if "interrupted" in args else "interrupted")
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, HyperlensError):
            _complain(f"error: {error}")
        elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            _complain("error: out of memory: lower --batch-size, or choose another --device")
        else:
            hint = "" if debug else "; see the traceback with --debug, and please report it"
            _complain(f"unexpected error: {type(error).__name__}: {error}{hint}")
        return FAILED


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
