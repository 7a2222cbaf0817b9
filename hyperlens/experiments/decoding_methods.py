"""The ways of decoding that Table 7 of arXiv 2605.22579 compares, and their neighbours."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..decoding.contrastive import Adaptive, adaptive_contrastive_search
from ..decoding.generate import check_sampling, continuations
from ..decoding.guard import Guard
from ..errors import DecodingError
from ..hooks.loading import LoadedModel
from .decoding_finding import METHODS


class Written(NamedTuple):
    """New token ids per prompt, run by run, and the mean seconds of a run."""

    samples: list[list[list[int]]]
    seconds: float


@dataclass(frozen=True)
class Writing:
    """The same prompts and options for every way of decoding.

    Attributes:
        prompts: token ids, all of one length: nothing is padded.
        parameters: of every method that has one.
        max_new_tokens: how many are added at most.
        batch_size: prompts per forward pass.
        stop_at_eos: end at an end of text, or write through it.
        progress: show progress bars.
    """

    prompts: list[list[int]]
    parameters: Mapping[str, float]
    max_new_tokens: int
    batch_size: int
    stop_at_eos: bool
    progress: bool

    def run(self, loaded: LoadedModel, method: str, seeds: Sequence[int]) -> Written:
        """Continue every prompt, once per seed; once where no seed matters."""
        runs = seeds[:1] if METHODS[method].deterministic else seeds
        # The first call of a process takes longer, whatever it does.
        model, tokenizer = loaded.model, loaded.tokenizer
        continuations(model, tokenizer, self.prompts[:1], max_new_tokens=1, progress=False)
        start = time.perf_counter()
        samples = [self._once(loaded, method, seed) for seed in runs]
        return Written(samples, (time.perf_counter() - start) / len(runs))

    def _once(self, loaded: LoadedModel, method: str, seed: int) -> list[list[int]]:
        model, tokenizer = loaded.model, loaded.tokenizer
        common: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "stop_at_eos": self.stop_at_eos,
            "progress": self.progress,
        }
        if method == "contrastive":
            q = self.parameters[method]
            return adaptive_contrastive_search(model, tokenizer, self.prompts, q=q, **common)
        common |= self._sampling(method) | {"seed": seed}
        return continuations(model, tokenizer, self.prompts, **common)

    def _sampling(self, method: str) -> dict[str, Any]:
        """What is not greedy; top-p, min-p and GUARD sample at temperature 1."""
        if method == "greedy":
            return {}
        value = self.parameters[method]
        if method == "guard":
            return {"do_sample": True, "logits_processors": [Guard(int(value))]}
        return {"do_sample": True, method: value}


def check_methods(methods: Sequence[str], parameters: Mapping[str, Any]) -> None:
    """Refuse unknown methods, and parameters out of their range.

    Raises:
        DecodingError: saying what is possible.
    """
    given = list(methods)
    known = not isinstance(methods, str) and set(given) <= METHODS.keys()
    if not given or len(set(given)) < len(given) or not known:
        raise DecodingError(
            f"methods must be some of {', '.join(METHODS)}, as a list with each once at most; got "
            f"{methods!r}"
        )
    check_sampling(**{name: parameters[name] for name in ("temperature", "top_p", "min_p")})
    Guard(parameters["guard"])
    Adaptive(parameters["contrastive"])
