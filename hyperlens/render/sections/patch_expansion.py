"""Is it the extra dimensions: the expansion taken away, or brought about, size by size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from ..parts import (
    conclusions,
    details,
    heading,
    join,
    notes,
    pair_name,
    paragraph,
    picture,
    preformatted,
    share,
    table,
)
from ..words import number

ORDER = 134
TITLE = "Is it the extra dimensions?"
READS = "patch_expansion"
LOADS = "hyperlens.patching.expansion.result:ExpansionResult"

METHODS = {
    "base_directions": "The tuned model, kept to the base model's first directions",
    "new_directions": "The tuned model, rid of the directions that grew most",
    "base_spectrum": "The tuned model, given the base model's spectrum",
    "tuned_spectrum": "The base model, given the tuned model's spectrum",
    "tuned_covariance": "The base model, given the tuned model's covariance",
}
CONDITIONS = {
    "itself": "the change itself",
    "same_dimension": "control: random directions, as many",
    "same_variance": "control: random directions, as much variance",
    "shuffled_gains": "control: the same gains in a random order",
}
SHARES = {
    "to_tuned": "changed decisions that are the tuned model's",
    "to_base": "changed decisions that are the base model's",
    "rank_gt_10": "choices from below base rank 10",
}


def body(results: Sequence[Any]) -> Markup:
    """Pair after pair."""
    intro = paragraph(
        "What leaves one model's last block is changed about its mean, and nothing else: the "
        "tuned model's is made to spread over as few directions as the base model's, or the base "
        "model's over as many as the tuned one's. If the expansion causes the reordering, the "
        "tuned model must then decide as the base does, and the base as the tuned one, more than "
        "under random changes that do as much. Directions are fitted on one half of the texts, "
        "decisions are read on the other."
    )
    return join([intro, *(part for result in results for part in _one(result))])


def _one(result: Any) -> Iterator[Markup]:
    from ..plots import png

    pair = pair_name(result)
    yield heading(pair)
    yield conclusions(result)
    yield notes(result)
    yield picture(
        png(result.plot(), dpi=110),
        f"{pair}: share of changed decisions that are the tuned model's, and diversity of greedy "
        "text, over the dimension of the changed outputs, beside random controls",
    )
    for method, words in METHODS.items():
        if result.sizes(method):
            yield details(words, table(_head(result), _rows(result, method)))
    yield details("In words, with the rules of the verdict", preformatted(result.summary()))


def _head(result: Any) -> list[str]:
    return ["directions", "", "dimension", *SHARES.values(), "KL(tuned ‖ it), nats", "greedy TTR"]


def _rows(result: Any, method: str) -> Iterator[list[str]]:
    for size in result.sizes(method):
        for condition, words in CONDITIONS.items():
            if result.at(method, size, condition, "to_tuned") is None:
                continue
            ttr = result.at(method, size, condition, "ttr")
            yield [
                str(size) if size else "all",
                words,
                number(result.value(method, size, condition, "dimension")),
                *(share(result.at(method, size, condition, metric)) for metric in SHARES),
                number(result.value(method, size, condition, "kl_tuned")),
                "" if ttr is None else number(ttr["value"]),
            ]
