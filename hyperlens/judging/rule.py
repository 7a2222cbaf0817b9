"""A rule in place of a judge: what choosing by repetition alone would say."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Sequence

from ..decoding.diversity import repetition, words
from .prompt import read_prompt
from .verdict import PLACES, TIE


class FewerRepeatedBigrams:
    """The text that repeats fewer bigrams of words wins. It reads nothing and judges no coherence.

    It tries out a set-up without a model, and is a baseline: a judge that hardly differs from it
    has told nothing that counting would not.
    """

    identity = {"kind": "rule", "name": "fewer repeated bigrams"}

    def answers(self, prompts: Sequence[str]) -> Generator[tuple[int, str], None, None]:
        """An answer in the form that judges are asked for."""
        for index, prompt in enumerate(prompts):
            yield index, self._answer(prompt)

    def _answer(self, prompt: str) -> str:
        _, *texts = read_prompt(prompt)
        first, second = (repeated_bigrams(text) for text in texts)
        winner = TIE if first == second else PLACES[first > second]
        scores = [1 + round(9 * (1 - share)) for share in (first, second)]
        return json.dumps(
            {
                "reason": f"Repeated bigrams: {first:.1%} in the first, {second:.1%} in the second "
                "text. A rule; coherence was not judged.",
                "coherence": dict.fromkeys(PLACES, 5),
                "diversity": dict(zip(PLACES, scores, strict=True)),
                "winner": winner,
            }
        )


def repeated_bigrams(text: str) -> float:
    """Share of bigrams of words that came before; 0 in a text of fewer than two words."""
    share = repetition(words(text), 2)
    return 0.0 if math.isnan(share) else share
