"""Blocks as plain text: the answers first, then what they rest on."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from .blocks import Block, Heading, Samples, Table, Text, Verdict

WIDTH = 100


def to_text(title: str, blocks: Sequence[Block]) -> str:
    """A screenful of text: title, verdicts, texts and tables; charts and details are left out.

    So is a heading with nothing but those under it.
    """
    lines, heading = [*textwrap.wrap(title, WIDTH), ""], list[str]()
    for block in blocks:
        shown = _lines(block)
        if isinstance(block, Heading):
            heading = shown
        elif shown:
            lines += [*heading, *shown]
            heading = []
    return "\n".join(map(_printable, lines)).rstrip()


def _printable(line: str) -> str:
    """Nothing that moves a terminal's cursor, and nothing that UTF-8 cannot hold."""
    return "".join(c if c.isprintable() else "?" for c in line)


def _lines(block: Block) -> list[str]:
    match block:
        case Verdict():
            mark = "!" if block.caution else "•"
            return textwrap.wrap(
                block.answer, WIDTH, initial_indent=f"{mark} ", subsequent_indent="  "
            )
        case Heading():
            return ["", block.text, "-" * len(block.text)]
        case Text():
            label = "" if block.role == "plain" else f"{block.role}: "
            return ["", *textwrap.wrap(label + block.text, WIDTH)]
        case Table():
            return ["", *table(block)]
        case Samples():
            return ["", *_samples(block)]
    return []


def table(block: Table) -> list[str]:
    """Aligned columns, the first to the left and all others to the right."""
    head = [shortened(title) for title in block.head]
    rows = [head, *(list(row) for row in block.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    return [*lines, *textwrap.wrap(block.caption, WIDTH)]


def shortened(name: str, width: int = 26) -> str:
    """A name with its middle left out where it is long: both ends of a path tell something.

    >>> shortened("organisation/a-model-with-a-long-name", 20)
    'organisat…-long-name'
    """
    if len(name) <= width:
        return name
    return f"{name[: (width - 1) // 2]}…{name[-(width // 2) :]}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.rjust(width) if i else cell.ljust(width)


def _samples(block: Samples) -> list[str]:
    lines = textwrap.wrap(f"prompt: {' '.join(block.prompt.split())}", WIDTH)
    for sample in block.texts:
        text = f"{sample.label}: {' '.join(sample.text.split())}"
        lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return lines
