"""The tables of a result for papers, in LaTeX and Markdown: the numbers as the page shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ResultsError, shortened
from .blocks import Block, Details, Heading, Table
from .format import count, one_line
from .labels import label_of

# Speed only: they do not change what is measured.
NO_SETTING = ("batch_size",)

LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "{}#$%&_"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    # At the beginning of a cell these two would belong to the end of the row above.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    # In the tokens of some vocabularies.
    "▁": r"\textunderscore{}",
    "�": "{?}",
    "°": r"$^{\circ}$",
    "²": "$^{2}$",
    "…": r"\ldots{}",
    "–": r"\textendash{}",
    "—": r"\textemdash{}",
    "−": "$-$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "≠": r"$\neq$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
    "‖": r"$\Vert$",
    "→": r"$\rightarrow$",
    "←": r"$\leftarrow$",
    "“": r"\textquotedblleft{}",
    "”": r"\textquotedblright{}",
    "‘": r"\textquoteleft{}",
    "’": r"\textquoteright{}",
    "Δ": r"$\Delta$",
    "Σ": r"$\Sigma$",
    "α": r"$\alpha$",
    "δ": r"$\delta$",
    "λ": r"$\lambda$",
    "μ": r"$\mu$",
    "ρ": r"$\rho$",
    "σ": r"$\sigma$",
    "τ": r"$\tau$",
}
# What pdfLaTeX knows without a package: up to Latin Extended-A.
LAST_LATIN = "\u017f"
MINUS = re.compile(r"(?<![\w.])-(?=\d)")
# Two of these in a row would become a dash or a quotation mark.
LIGATURES = re.compile(r"([-',])(?=\1)")
MARKDOWN = re.compile(r"[\\`*_<|~$#]|\](?=[(\[:])")


class Part(NamedTuple):
    """A table of a result.

    Attributes:
        name: what it is asked for by: its heading, else the head of its first column; numbered
            where several share one.
        heading: the words above it, a heading or what it is folded under; "" for none.
        table: the table.
        is_folded: whether only those see it who ask for it.
    """

    name: str
    heading: str
    table: Table
    is_folded: bool


def parts(blocks: Sequence[Block]) -> list[Part]:
    """The tables among blocks, each with a name of its own."""
    found: list[Part] = []
    taken: dict[str, int] = {}
    for part in _tables(blocks, "", False):
        n = taken[part.name] = taken.get(part.name, 0) + 1
        found.append(part if n == 1 else part._replace(name=f"{part.name} ({n})"))
    return found


def _tables(blocks: Sequence[Block], heading: str, is_folded: bool) -> Iterator[Part]:
    for block in blocks:
        if isinstance(block, Heading):
            heading = block.text
        elif isinstance(block, Details):
            yield from _tables(block.blocks, block.summary, True)
        elif isinstance(block, Table):
            yield Part(heading or block.head[0] or "table", heading, block, is_folded)


def chosen(found: Sequence[Part], part: str | None) -> list[Part]:
    """The tables that are not folded away, or the one whose name is, or contains, these words.

    Raises:
        ResultsError: if there is none, or several contain the words.
    """
    if part is None:
        return [one for one in found if not one.is_folded]
    words = part.casefold()
    exact = [one for one in found if one.name.casefold() == words]
    near = exact or [one for one in found if words and words in one.name.casefold()]
    if len(near) != 1:
        names = "; ".join(one.name for one in (near or found))
        how_many = f"{len(near)} tables are" if near else "no table is"
        raise ResultsError(f"{how_many} called {shortened(part)}: expected one of {names}")
    return near


def caption(result: Any, part: Part) -> str:
    """What is shown, of which models, over how many texts, and with which settings."""
    heading = part.heading or result.title
    sentences = [heading, label_of(result), part.table.caption, _texts(result), _settings(result)]
    return " ".join(
        one if one[-1] in ".?" else f"{one}." for one in map(one_line, sentences) if one
    )


def _texts(result: Any) -> str:
    corpus = result.meta.get("corpus") or {}
    if not isinstance(corpus.get("n_tokens"), int):  # several corpora, or no texts
        return ""
    options = result.meta.get("options", {})
    # Prompts, and texts that are drawn, are settings.
    word = "Drawn from" if {"n_prompts", "n_texts"} & set(options) else "Over"
    tokens = count(corpus["n_tokens"], "token")
    return f"{word} {count(corpus['n_sequences'], 'text')}, {tokens} (BOS included)"


def _settings(result: Any) -> str:
    meta = result.meta
    named = {**meta.get("options", {}), **{key: meta.get(key) for key in ("seed", "dtype")}}
    version = meta.get("versions", {}).get("hyperlens")
    said = [
        f"{key.replace('_', ' ')} {_value(value)}"
        for key, value in named.items()
        if key not in NO_SETTING and value is not None
    ]
    said += [f"hyperlens {version}"] if version else []
    return f"Settings: {'; '.join(said)}" if said else ""


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def to_latex(name: str, captioned: Sequence[tuple[Part, str]]) -> str:
    """Floating tables with booktabs rules, one for each part.

    Args:
        name: of the result; labels are `tab:<name>-<part>`.
        captioned: the parts and their captions.
    """
    text = "\n\n".join(_latex_table(name, part, words) for part, words in captioned)
    notes = [r"% Needs \usepackage{booktabs}."]
    if any(c > LAST_LATIN for c in text):
        notes.append("% Has characters that pdfLaTeX does not know: use LuaLaTeX or XeLaTeX.")
    return "\n".join([*notes, text, ""])


def _latex_table(name: str, part: Part, words: str) -> str:
    head, *rows = (
        " & ".join(map(latex, row)) + r" \\" for row in (part.table.head, *part.table.rows)
    )
    label = re.sub(r"[^a-z0-9]+", "-", f"{name} {part.name}".casefold()).strip("-")
    columns = "l" + "r" * (len(part.table.head) - 1)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex(words)}}}",
        rf"\label{{tab:{label}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def latex(text: str) -> str:
    r"""Text that LaTeX sets as it stands; a minus before a number is one.

    >>> print(latex("-2.4 [-3, 50%] of Δ_1"))
    $-$2.4 {[}$-$3, 50\%{]} of $\Delta$\_1
    """
    signed = MINUS.sub("−", one_line(text))
    return LIGATURES.sub(r"\1{}", "".join(LATEX.get(c, c) for c in signed))


def to_markdown(captioned: Sequence[tuple[Part, str]]) -> str:
    """Pipe tables, each under its caption."""
    return "\n\n".join(_markdown_table(part, words) for part, words in captioned) + "\n"


def _markdown_table(part: Part, words: str) -> str:
    head, *rows = (
        f"| {' | '.join(map(markdown, row))} |" for row in (part.table.head, *part.table.rows)
    )
    rule = "|".join(["", ":--", *["--:"] * (len(part.table.head) - 1), ""])
    return "\n".join([markdown(words), "", head, rule, *rows])


def markdown(text: str) -> str:
    r"""Text that Markdown shows as it stands, in a cell or a paragraph.

    >>> print(markdown("<s> | 2 * 3 [1, 2]"))
    \<s> \| 2 \* 3 [1, 2]
    """
    return MARKDOWN.sub(lambda found: f"\\{found[0]}", one_line(text))
