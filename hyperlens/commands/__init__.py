"""The commands of the command line, one file each.

A command is a module with `ORDER`, `add(commands)`, which adds its parser to argparse's
subparsers and sets `run` as its default, and `run(args)`, which returns what to print. Modules
import nothing heavy at their top: --help and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import pkgutil
from importlib import import_module
from types import ModuleType

from .. import __version__
from ..options import STYLE

DESCRIPTION = """\
What did fine-tuning change inside a language model, in which block, and is it real?

Examples:
  hyperlens compare ./base ./tuned --texts held_out.txt --out comparison
  hyperlens hyperfit ./base --texts stories.txt --recipe demo --out hyperfitted
  hyperlens merge ./adapter --out merged

`hyperlens COMMAND --help` tells more. Exit codes: 0 done, 1 an error (one line on stderr),
2 a wrong command line, 130 interrupted."""


def all_commands() -> list[ModuleType]:
    """Every command, in the order in which --help lists them."""
    names = (found.name for found in pkgutil.iter_modules(__path__))
    return sorted((import_module(f".{name}", __name__) for name in names), key=lambda m: m.ORDER)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="hyperlens", description=DESCRIPTION, **STYLE)
    parser.add_argument("--version", action="version", version=f"hyperlens {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for command in all_commands():
        command.add(commands)
    return parser
