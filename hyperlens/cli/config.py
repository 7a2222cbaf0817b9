"""--config FILE: options of a command in a TOML or JSON file; those that are typed win."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OPTION = "--config"


def add_config(parser: Any) -> None:
    """The option itself; `expanded` replaces it before argparse reads the others."""
    parser.add_argument(
        OPTION,
        metavar="FILE",
        help="a .toml or .json file of options, such as last_k = 5; those on the command line win "
        "(default: none)",
    )


def expanded(words: Sequence[str]) -> list[str]:
    """The words with the options of each --config before all others.

    Raises:
        ValueError: if a file cannot be read, in one line.
    """
    rest: list[str] = []
    files: list[str] = []
    it = iter(words)
    for word in it:
        if word == OPTION:
            files.append(next(it, ""))
        elif word.startswith(f"{OPTION}="):
            files.append(word.partition("=")[2])
        else:
            rest.append(word)
    return [*(word for file in files for word in _options(file)), *rest]


def _options(file: str) -> list[str]:
    if not file:
        raise ValueError(f"argument {OPTION}: expected a file")
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {file} for {OPTION}: {reason}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no options: expected lines such as last_k = 5")
    return [word for name, value in values.items() for word in _words(name, value, file)]


def _words(name: str, value: Any, file: str) -> list[str]:
    """One option as it would be typed.

    >>> _words("last_k", 5, ""), _words("packed", False, ""), _words("blocks", [0, 5], "")
    (['--last-k=5'], ['--no-packed'], ['--blocks=0,5'])
    """
    option = name.replace("_", "-")
    if isinstance(value, dict):
        raise ValueError(f"{file} has a table [{name}]: expected options only, without tables")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return [f"--{option}={value}"]
