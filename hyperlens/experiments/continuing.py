"""Continuations of prompts under several conditions, and how much each repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.corpus import Corpus
from ..decoding.diversity import repetition, type_token_ratio
from ..decoding.generate import continuations
from ..errors import CorpusError
from ..hooks.loading import LoadedModel
from ..pair import Pair

METRICS = ("ttr", "rep_2", "rep_3")
# Torch takes 64 bits, and some experiments count on from the seed.
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Continued:
    """New tokens of every prompt, and how much each repeats itself.

    Attributes:
        tokens: token ids, prompt by prompt.
        metrics: for each of `METRICS` a value per prompt: distinct tokens / tokens (TTR), and the
            share of bigrams and of trigrams that came before (rep-2, rep-3).
    """

    tokens: list[list[int]]
    metrics: dict[str, list[float]]


@dataclass(frozen=True)
class Continuing:
    """The same prompts, length and seed for every condition.

    Texts have one length, whatever a model takes for an end: repetition depends on length.

    Attributes:
        prompts: token ids.
        max_new_tokens: how many are added to each.
        batch_size: prompts per forward pass.
        seed: of sampled continuations.
        progress: show progress bars.
    """

    prompts: list[list[int]]
    max_new_tokens: int
    batch_size: int
    seed: int
    progress: bool

    def run(
        self, loaded: LoadedModel, processors: Sequence[Any] = (), *, do_sample: bool = False
    ) -> Continued:
        """Continue every prompt with one model, its logits changed by the processors."""
        tokens = continuations(
            loaded.model,
            loaded.tokenizer,
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            do_sample=do_sample,
            batch_size=self.batch_size,
            stop_at_eos=False,
            seed=self.seed,
            logits_processors=tuple(processors),
            progress=self.progress,
        )
        return Continued(
            tokens,
            {
                "ttr": [type_token_ratio(one) for one in tokens],
                "rep_2": [repetition(one, 2) for one in tokens],
                "rep_3": [repetition(one, 3) for one in tokens],
            },
        )


def choose_prompts(corpus: Corpus, n: int, length: int, seed: int) -> list[list[int]]:
    """The first tokens of n texts drawn at random, or of all texts that are long enough.

    They stand in the order of the texts: for a few of them to look at see `choose_examples`.

    Raises:
        CorpusError: if fewer than two texts have that many tokens, or the seed is none.
    """
    check_counts(n_prompts=n, prompt_tokens=length)
    check_seed(seed)
    long = [sequence for sequence in corpus.sequences if len(sequence) >= length]
    if len(long) < 2:
        raise CorpusError(
            f"{len(long)} of {len(corpus.sequences)} texts have the {length} tokens of a prompt, "
            "and intervals need two: give longer texts, or lower prompt_tokens"
        )
    drawn = np.random.default_rng(seed).permutation(len(long))[:n]
    return [long[i][:length].tolist() for i in sorted(drawn)]


def choose_examples(n_prompts: int, n_examples: int, seed: int) -> list[int]:
    """Which prompts are shown: drawn anew, because a corpus is sorted by its tokens."""
    drawn = np.random.default_rng((seed, 1)).permutation(n_prompts)[:n_examples]
    found: list[int] = drawn.tolist()
    return found


def check_counts(least: int = 1, /, **counts: Any) -> None:
    """Refuse what is no number of things, from `least` on.

    Raises:
        CorpusError: naming the argument.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise CorpusError(f"{name} must be at least {least} (a whole number), got {value}")


def check_seed(seed: Any) -> None:
    """Refuse what seeds no generator.

    Raises:
        CorpusError: with the range of seeds.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= LARGEST_SEED:
        raise CorpusError(f"seed must be a whole number from 0 to {LARGEST_SEED}, got {seed!r}")


def check_room(pair: Pair, length: int, max_new_tokens: int) -> None:
    """Refuse continuations that the models have no positions for.

    Raises:
        CorpusError: with the number of tokens there is room for.
    """
    check_counts(prompt_tokens=length, max_new_tokens=max_new_tokens)
    room = pair.base.hooked.cfg.n_ctx
    if room and length + max_new_tokens > room:
        raise CorpusError(
            f"{length} prompt tokens and {max_new_tokens} new ones do not fit the model's context "
            f"of {room}: lower max_new_tokens to {max(1, room - length)} or less"
        )
