"""MAUVE between what models wrote and how the texts themselves go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..decoding.prompts import as_text
from ..errors import CorpusError
from ..models.sources import check_source
from .mauve_scores import Scores, compute_mauve, mauve_scores
from .text_features import Features, Featurizer, reading_notes

Tokens = Sequence[Sequence[int]]


def check_mauve(features: Any) -> None:
    """What can be told before anything is opened.

    Args:
        features: whatever reads the texts.

    Raises:
        ProbeError: if `mauve-text` is not installed.
        LoadingError: if the reader is no model.
    """
    compute_mauve()
    if not isinstance(features, Featurizer):
        check_source(features)


def check_writes_text(tokenizer: Any) -> None:
    """Refuse a pair whose tokens cannot be read as text.

    Raises:
        CorpusError: saying what to pass.
    """
    if tokenizer is None:
        raise CorpusError(
            "MAUVE compares texts, and the pair has no tokenizer to write them with: pass (model, "
            "tokenizer), or leave MAUVE out"
        )


class OwnTexts:
    """How texts go on by themselves, prompts left out, to hold against what was written.

    Args:
        reader: the model that reads the texts.
        tokenizer: of the pair that wrote.
        rests: token ids after each prompt.

    Attributes:
        notes: which texts could not be read, for the reader of the result.
    """

    def __init__(self, reader: Featurizer, tokenizer: Any, rests: Tokens) -> None:
        check_writes_text(tokenizer)
        self._reader, self._tokenizer = reader, tokenizer
        self.notes: list[str] = []
        self._own = self._read("the texts themselves", [rests])[0]

    def scores(self, who: str, samples: Sequence[Tokens]) -> list[Scores]:
        """MAUVE of each sample; none at all where a side has fewer than two texts to read.

        Args:
            who: wrote them, as a note names it.
            samples: for each run over the prompts the tokens that were added, without the prompts.
        """
        read = self._read(who, samples)
        if min(len(one.vectors) for one in (self._own, *read)) < 2:
            self.notes.append(f"MAUVE of {who} is unknown: it needs two texts a side to read")
            return []
        return [mauve_scores(self._own.vectors, one.vectors) for one in read]

    def _read(self, who: str, samples: Sequence[Tokens]) -> list[Features]:
        found = [
            self._reader.features([as_text(self._tokenizer, one) for one in tokens])
            for tokens in samples
        ]
        self.notes += reading_notes(f"MAUVE of {who}", *found)
        return found
