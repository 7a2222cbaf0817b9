"""Tokens coloured by a number, as circuitsvis draws them: in notebooks and as a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..checks import check_types, check_whole
from ..errors import ResultsError
from ..files import expand_user, write_text
from .blocks import Block, Details, Samples
from .html import tag

# What a token can be coloured by; the first is shown at once.
LABELS = ("log10 of the base rank", "base rank")


@dataclass(frozen=True)
class TokenView:
    """The texts of one example; in a notebook it shows itself, also offline.

    Attributes:
        prompt: what the texts continue.
        html: the tokens of each text, with circuitsvis's script inside.
    """

    prompt: str
    html: str

    def __repr__(self) -> str:
        return f"TokenView({self.prompt[:40]!r})"

    def _repr_html_(self) -> str:
        return self.html

    @check_types
    def save(self, path: str | Path) -> Path:
        """Write a page that fetches nothing; atomic.

        Raises:
            ResultsError: if it cannot be written.
        """
        file = expand_user(path)
        head = '<!doctype html>\n<meta charset="utf-8">\n<title>hyperlens: tokens</title>\n'
        write_text(file, head + self.html)
        return file


def token_view(blocks: Sequence[Block], example: int = 0) -> TokenView:
    """The texts of one example, each token coloured by the base model's rank of it.

    Args:
        blocks: those of a result.
        example: which of the examples with ranks, from 0 up.

    Raises:
        ResultsError: if there is no such example.
    """
    check_whole("example", example, 0, ResultsError)
    found = list(_with_ranks(blocks))
    if example >= len(found):
        has = f"{len(found)} examples" if found else "no examples"
        raise ResultsError(
            f"this result has {has} whose tokens have base ranks: "
            + (f"give example=0 to {len(found) - 1}" if found else "measure_behaviour keeps some")
        )
    chosen = found[example]
    parts = [str(tag("p", f"Prompt: {chosen.prompt}"))]
    for one in chosen.texts:
        if one.ranks:
            parts += [str(tag("h4", one.label)), _drawn(one.tokens, one.ranks)]
    return TokenView(chosen.prompt, "\n".join(parts))


def _with_ranks(blocks: Sequence[Block]) -> Iterator[Samples]:
    for block in blocks:
        if isinstance(block, Details):
            yield from _with_ranks(block.blocks)
        elif isinstance(block, Samples) and any(one.ranks for one in block.texts):
            yield block


def _drawn(tokens: Sequence[str], ranks: Sequence[int]) -> str:
    """One text by circuitsvis, whose script is put in whole: nothing is fetched to show it."""
    import torch
    from circuitsvis.tokens import colored_tokens_multi

    values = torch.tensor([[math.log10(rank), rank] for rank in ranks], dtype=torch.float64)
    # circuitsvis takes a token for HTML.
    texts = [escape(token, quote=False) for token in tokens]
    source: str = colored_tokens_multi(texts, values, list(LABELS)).local_src
    # Its <div …/> is an opening tag to a browser, which would put all that follows into it.
    return f"{source}\n</div>"
