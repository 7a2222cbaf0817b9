"""What the tests of decoding share: prompts, fixed logits, and a look at what is sampled from."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import LogitsProcessor

PROMPTS = [[1, 5, 9, 12], [1, 7], [1, 30, 31, 32, 33, 34, 8], [1], [1, 7, 7]]


class Given(LogitsProcessor):
    """These logits instead of the model's, the same at every step."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.logits.to(scores).expand_as(scores)


@contextmanager
def watched_sampling() -> Iterator[list[torch.Tensor]]:
    """The probabilities of every draw inside, step by step."""
    drawn_from: list[torch.Tensor] = []
    real = torch.multinomial

    def multinomial(p: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        drawn_from.append(p.double())
        return real(p, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        yield drawn_from


def next_probabilities(model, tokens: list[int]) -> list[float]:
    """Of one text, by a pass without cache or padding, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits.double().softmax(-1).tolist()
