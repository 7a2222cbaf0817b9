"""Prompts for a causal LM: chosen, checked and put into batches; generated tokens as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np

from ..checks import check_counts, check_seed
from ..data.corpus import Corpus
from ..errors import CorpusError, LoadingError
from ..hooks.loading import LoadedModel
from ..models.kinds import plain_model, text_config
from ..pair import Inputs, Pair, open_inputs
from ..render.format import count


def check_prompts(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> None:
    """Raise unless the model can generate, and every prompt leaves room for the new tokens.

    Raises:
        CorpusError: if a prompt is empty, or longer than the model's context allows; or a number
            is no count.
        LoadingError: if the model cannot generate.
    """
    if not hasattr(plain_model(model), "generate"):
        raise LoadingError(
            f"{type(model).__name__} cannot generate with padding and a mask: give the model as a "
            "folder, hub id, PreTrainedModel or PeftModel"
        )
    check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
    if len(prompts) == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise CorpusError("expected prompts of at least one token each, got an empty one")
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    context = getattr(plain_model(model).config, "max_position_embeddings", None)
    if isinstance(context, int) and longest > context:
        raise CorpusError(
            f"a prompt and its continuation may be {longest} tokens long, the model has {context} "
            "positions: use shorter prompts or fewer new tokens"
        )


def check_room(pair: Pair, length: int, max_new_tokens: int) -> None:
    """Raise unless prompts of this length and their continuations fit the models' context.

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


def open_prompts(
    base: Any,
    tuned: Any,
    texts: Any,
    *,
    n_prompts: int,
    prompt_tokens: int,
    max_new_tokens: int,
    seed: int,
    device: Any,
    dtype: Any,
) -> tuple[Inputs, list[list[int]]]:
    """Open a pair for experiments that read nothing but prompts, and choose these.

    Args:
        base, tuned, texts, device, dtype: as of `open_inputs`.
        n_prompts, prompt_tokens, max_new_tokens, seed: as of `choose_prompts`.

    Raises:
        HyperlensError: if a source cannot be opened, the texts do not fit the models, or there
            is no room for the continuations.
    """
    inputs = open_inputs(
        base,
        tuned,
        texts,
        max_length=max(prompt_tokens, 2),
        only_prompts=True,
        device=device,
        dtype=dtype,
    )
    check_room(inputs.pair, prompt_tokens, max_new_tokens)
    prompts = choose_prompts(
        inputs.corpus, n_prompts, prompt_tokens, seed, max_new_tokens=max_new_tokens
    )
    return inputs, prompts


class Opening(NamedTuple):
    """Where a text is continued, and how the text itself goes on."""

    prompt: list[int]
    after: list[int]


def choose_prompts(
    corpus: Corpus, n: int, length: int, seed: int, *, max_new_tokens: int = 0
) -> list[list[int]]:
    """The first tokens of n texts drawn at random, or of all texts that are long enough.

    Of conversations, all that stands before the assistant's last turn, whatever its length, with
    the template's generation prompt; those that leave no room for `max_new_tokens` are left out.

    Where texts have groups, at most one of each is drawn, so that prompts are independent. They are
    sorted by their tokens (see `choose_examples` for a few of them to look at): the same texts and
    seed give the same prompts wherever the texts were cut.

    Raises:
        CorpusError: if fewer than two texts have that many tokens, or a number is no count
            or no seed.
    """
    openings = choose_openings(corpus, n, length, seed, max_new_tokens=max_new_tokens)
    return [one.prompt for one in openings]


def choose_openings(
    corpus: Corpus, n: int, length: int, seed: int, *, n_after: int = 0, max_new_tokens: int = 0
) -> list[Opening]:
    """The same with the `n_after` tokens that follow in the text itself, or in the answer.

    Raises:
        CorpusError: as `choose_prompts`.
    """
    check_counts(n_prompts=n, prompt_tokens=length)
    check_seed(seed)
    groups = corpus.groups or range(len(corpus.sequences))
    long = [
        (ids, group)
        for ids, group in zip(
            _continued(corpus, length, n_after, max_new_tokens), groups, strict=True
        )
        if ids is not None
    ]
    if len({group for _, group in long}) < 2:
        which = "texts" if corpus.groups is None else "groups of texts"
        needed, remedy = f"the {length + n_after} tokens of a prompt", "lower prompt_tokens"
        if corpus.turns is not None:
            needed = "something before the assistant's last turn and room for an answer after it"
            needed += f" ({n_after} tokens of it given)" if n_after else ""
            remedy = "lower max_new_tokens"
        raise CorpusError(
            f"{len({group for _, group in long})} of {corpus.n_units} {which} have {needed}, and "
            f"intervals need two: give longer texts, or {remedy}"
        )
    openings = sorted(long, key=lambda one: np.concatenate(one[0]).tobytes())
    drawn: dict[int, int] = {}
    for i in np.random.default_rng(seed).permutation(len(openings)):
        drawn.setdefault(openings[i][1], int(i))
    chosen = [openings[i][0] for i in sorted(list(drawn.values())[:n])]
    return [Opening(prompt.tolist(), after.tolist()) for prompt, after in chosen]


def _continued(
    corpus: Corpus, length: int, n_after: int, max_new_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray] | None]:
    """Of each text the prompt and what follows it; None where it is too short, or too long."""
    if corpus.turns is None:
        for ids in corpus.sequences:
            end = length + n_after
            yield (ids[:length], ids[length:end]) if len(ids) >= end else None
        return
    room = corpus.context_length or math.inf
    for turn in corpus.turns:
        fits = turn is not None and len(turn.prompt) + max(max_new_tokens, 1) <= room
        if turn is None or not fits or len(turn.answer) < n_after:
            yield None
        else:
            yield turn.prompt, turn.answer[:n_after]


def prompt_lengths(
    corpus: Corpus, prompts: Sequence[Sequence[int]], length: int
) -> int | list[int]:
    """Tokens of each prompt, for the record; of conversations those of the shortest and longest."""
    if corpus.turns is None or not prompts:
        return length
    lengths = [len(prompt) for prompt in prompts]
    return [min(lengths), max(lengths)]


def lengths_in_words(lengths: int | Sequence[int]) -> str:
    """What `prompt_lengths` has recorded.

    >>> lengths_in_words(17)
    '17 tokens'
    >>> lengths_in_words([12, 40])
    "12 to 40 tokens (conversations up to the assistant's last turn)"
    """
    if isinstance(lengths, int):
        return count(lengths, "token")
    low, high = lengths
    span = str(low) if low == high else f"{low} to {high}"
    return f"{span} tokens (conversations up to the assistant's last turn)"


def batch_size_for(loaded: LoadedModel, prompts: Sequence[Sequence[int]], batch_size: int) -> int:
    """How many prompts a model continues at once: one of several lengths, if it takes no pads."""
    is_even = len({len(prompt) for prompt in prompts}) <= 1
    return 1 if loaded.unpadded and not is_even else batch_size


def choose_examples(n_prompts: int, n_examples: int, seed: int) -> list[int]:
    """Which prompts to show: drawn at random, because a corpus is sorted by its tokens."""
    drawn = np.random.default_rng((seed, 1)).permutation(n_prompts)[:n_examples]
    chosen: list[int] = drawn.tolist()
    return chosen


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """The EOS ids of tokenizer, configuration and generation settings, in that order.

    Chat models end a turn with another token than a text, and not each of the three knows both. The
    first is also what prompts are padded with.
    """
    generation = getattr(plain_model(model), "generation_config", None)
    ids: list[Any] = []
    for holder in (tokenizer, text_config(model), generation):
        value = getattr(holder, "eos_token_id", None)
        ids += value if isinstance(value, list | tuple) else [value]
    return [int(token) for token in dict.fromkeys(ids) if token is not None]


def batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of the prompts of each batch: prompts of similar length together, longest first.

    >>> list(batches([[1], [2, 3, 4], [5, 6]], 2))
    [[1, 2], [0]]
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def as_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of some tokens, without special ones; their ids where there is no tokenizer."""
    if tokenizer is None:
        return " ".join(map(str, tokens))
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def opening_and_texts(
    tokenizer: Any, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
) -> tuple[str, list[str]]:
    """A prompt's text and its continuations' texts, such that each pair joins to the whole text.

    A prompt may end inside a character, which is "\ufffd" until a continuation completes it: the
    opening ends before that character then, and every continuation begins with it.

    Args:
        tokenizer: None for ids instead of text.
        prompt: token ids.
        continuations: for each text the ids after the prompt.
    """
    if tokenizer is None:
        return as_text(None, prompt), [as_text(None, tokens) for tokens in continuations]
    wholes = [as_text(tokenizer, [*prompt, *tokens]) for tokens in continuations]
    opening = commonprefix([as_text(tokenizer, prompt), *wholes])  # noqa: RUF071 - by characters
    return opening, [whole[len(opening) :] for whole in wholes]
