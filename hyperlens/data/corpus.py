"""Texts to token sequences: tokenisation, counted exclusions, a fixed order, padded batches.

Sequences are put in a fixed order (longest first, then by content), so that a result does not
depend on the order the texts came in, batches carry little padding, and the largest batch, the
one that could run out of memory, comes first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from numbers import Integral
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..errors import CorpusError, first_line
from .chat import ChatTemplate, Tagged, Turn, speaker_notes, tag_rows
from .conversations import Conversations
from .reading import EVERYTHING, ROLES, Reading, describe_tokens
from .texts import read_texts

T = TypeVar("T")
PaddingSide = Literal["right", "left"]

# Groups of texts that are kept apart: each has a row in the sample that intervals are made from.
MAX_GROUPS = 512
# Of the two samples of a text's tokens, the stream of random numbers of the logit lens's.
LENS = 1


@dataclass(frozen=True)
class Counts:
    """What became of the texts.

    Attributes:
        n_texts: texts given.
        n_empty, n_short: left out, without any token or with a single one.
        n_cut: cut to the maximal length.
        n_duplicates: sequences equal to another one; they narrow intervals unduly.
        n_sequences, n_tokens: what is measured, BOS included.
        n_bos: positions left out as BOS.
    """

    n_texts: int
    n_empty: int
    n_short: int
    n_cut: int
    n_duplicates: int
    n_sequences: int
    n_tokens: int
    n_bos: int


@dataclass(frozen=True)
class Batch:
    """A padded batch.

    Attributes:
        tokens: ids, pads being any valid id.
        real: False at pads.
        bos: True where a position is left out as BOS.
        slot: which row of the token sample each sequence's tokens go to, -1 for none; those of one
            group share a row.
        position: the position that goes to each place of that row, -1 for none of this sequence.
        chosen: False where a position is left out because of its role, or by a mask; None for no
            such choice.
        roles: who speaks each token, as places in `ROLES`; None where there are no conversations.
        lens: True where the logit lens is read below the output; None where it is everywhere.
    """

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    bos: Bool[Tensor, "batch pos"]
    slot: Int[Tensor, " batch"]
    position: Int[Tensor, "batch sampled"]
    chosen: Bool[Tensor, "batch pos"] | None = None
    roles: Int[Tensor, "batch pos"] | None = None
    lens: Bool[Tensor, "batch pos"] | None = None

    @property
    def counted(self) -> Bool[Tensor, "batch pos"]:
        """True where a decision is counted: at chosen tokens that are not BOS."""
        counted = self.real & ~self.bos
        return counted if self.chosen is None else counted & self.chosen


@dataclass(frozen=True)
class Corpus:
    """Token sequences ready to be run.

    Attributes:
        sequences: token ids, longest first.
        bos_id: the id left out as BOS, None for none.
        max_length: longest a sequence could be.
        counts: what became of the texts.
        notes: what a reader of the result should know.
        sha256: hash of all token ids, independent of the order the texts came in.
        groups: the independent group of each sequence, counted from 0; None where each sequence is
            one of its own.
        unpadded: whether batches hold sequences of one length only.
        chosen: for each sequence which tokens are counted; None for all.
        roles: for each sequence who speaks each token, as places in `ROLES`; None where there are
            no conversations.
        turns: for each conversation where the assistant's last turn begins; None where there are no
            conversations.
        context_length: the model's own limit, if it has one.
        reading: what the choice of tokens rests on, as JSON values.
    """

    sequences: tuple[np.ndarray, ...]
    bos_id: int | None
    max_length: int
    counts: Counts
    notes: tuple[str, ...]
    sha256: str
    groups: tuple[int, ...] | None = None
    unpadded: bool = False
    chosen: tuple[np.ndarray, ...] | None = None
    roles: tuple[np.ndarray, ...] | None = None
    turns: tuple[Turn | None, ...] | None = None
    context_length: int | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_units(self) -> int:
        """How many independent units there are: groups, or else sequences."""
        return len(self.sequences) if self.groups is None else len(set(self.groups))

    def longest_unit(self) -> int:
        """Tokens of the longest group, or else sequence."""
        if self.groups is None:
            return len(self.sequences[0])
        return int(np.bincount(self.groups, weights=[len(s) for s in self.sequences]).max())

    def describe(self) -> dict[str, Any]:
        """Counts, hash and options as JSON values."""
        grouped = {} if self.groups is None else {"n_groups": self.n_units}
        return asdict(self.counts) | {
            "sha256": self.sha256,
            "max_length": self.max_length,
            "bos_id": self.bos_id,
            **grouped,
            **self.reading,
        }

    def counted(self, i: int) -> Bool[np.ndarray, " pos"]:
        """Which tokens of a sequence are counted: those chosen that are not BOS."""
        sequence = self.sequences[i]
        counted = np.ones(len(sequence), bool) if self.chosen is None else self.chosen[i]
        return counted if self.bos_id is None else counted & (sequence != self.bos_id)

    def take(self, kept: Sequence[int]) -> Corpus:
        """Some of the sequences, in their order; the hash stays that of all."""
        sequences = _taken(self.sequences, kept)
        n_bos = sum(int((ids == self.bos_id).sum()) for ids in sequences if self.bos_id is not None)
        groups = None if self.groups is None else _taken(self.groups, kept)
        return replace(
            self,
            sequences=sequences,
            counts=replace(
                self.counts,
                n_sequences=len(sequences),
                n_tokens=sum(map(len, sequences)),
                n_bos=n_bos,
            ),
            groups=groups and tuple(np.unique(groups, return_inverse=True)[1].tolist()),
            chosen=None if self.chosen is None else _taken(self.chosen, kept),
            roles=None if self.roles is None else _taken(self.roles, kept),
            turns=None if self.turns is None else _taken(self.turns, kept),
        )

    def batches(
        self,
        batch_size: int,
        *,
        n_sampled_sequences: int = 0,
        n_sampled_tokens: int = 0,
        lens_tokens: int | float | None = None,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """Padded batches in the corpus's own order.

        Args:
            batch_size: sequences per batch.
            n_sampled_sequences: of how many sequences, or groups, tokens are sampled.
            n_sampled_tokens: how many tokens of each.
            lens_tokens: how many counted tokens of each sequence the logit lens reads, or what
                share of them; None for all.
            seed: of the choice of both samples, which depends on content alone otherwise.
            share: (i, n) gives every n-th batch, from number i on, which makes about equal shares.
        """
        sample = self._sample(n_sampled_sequences, n_sampled_tokens, seed)
        first, step = share
        for indices in islice(self._batch_indices(batch_size), first, None, step):
            tokens, mask = pad([self.sequences[i] for i in indices])
            real = mask.bool()
            slot = np.full(len(indices), -1, dtype=np.int64)
            position = np.full((len(indices), n_sampled_tokens), -1, dtype=np.int64)
            for row, i in enumerate(indices):
                if i in sample:
                    slot[row], places, drawn = sample[i]
                    position[row, places] = drawn
            is_bos = torch.zeros_like(real) if self.bos_id is None else tokens == self.bos_id
            chosen = None if self.chosen is None else pad(_taken(self.chosen, indices))[0].bool()
            roles = None if self.roles is None else pad(_taken(self.roles, indices))[0]
            lens = None
            if lens_tokens is not None:
                lens = pad([self._read_by_lens(i, lens_tokens, seed) for i in indices])[0].bool()
            yield Batch(
                tokens=tokens,
                real=real,
                bos=real & is_bos,
                slot=torch.from_numpy(slot),
                position=torch.from_numpy(position),
                chosen=chosen,
                roles=roles,
                lens=lens,
            )

    def n_read_by_lens(self, lens_tokens: int | float) -> tuple[int, int]:
        """How many tokens the logit lens reads of this sample of each text, and of how many."""
        counted = [int(self.counted(i).sum()) for i in range(len(self.sequences))]
        return sum(_sample_size(n, lens_tokens) for n in counted), sum(counted)

    def _read_by_lens(
        self, i: int, lens_tokens: int | float, seed: int
    ) -> Bool[np.ndarray, " pos"]:
        """Counted tokens of a sequence, drawn without replacement."""
        counted = np.flatnonzero(self.counted(i))
        # Another stream than that of the tokens kept for intervals.
        generator = np.random.default_rng([_hash(self.sequences[i], seed), LENS])
        chosen = generator.permutation(counted)[: _sample_size(len(counted), lens_tokens)]
        read = np.zeros(len(self.sequences[i]), dtype=bool)
        read[chosen] = True
        return read

    def _batch_indices(self, batch_size: int) -> Iterator[range]:
        """Consecutive sequences, at most `batch_size`; of one length where there are no pads."""
        start, n = 0, len(self.sequences)
        while start < n:
            end = min(start + batch_size, n)
            if self.unpadded:
                length = len(self.sequences[start])
                end = start + sum(len(ids) == length for ids in self.sequences[start:end])
            yield range(start, end)
            start = end

    def _sample(
        self, n_units: int, n_tokens: int, seed: int
    ) -> dict[int, tuple[int, np.ndarray, np.ndarray]]:
        """For sampled sequences, the row of the sample, places in it, and the positions there."""
        members: dict[int, list[int]] = {}
        for i, unit in enumerate(self.groups or range(len(self.sequences))):
            members.setdefault(unit, []).append(i)
        keys = {
            unit: min(_hash(self.sequences[i], seed) for i in of_unit)
            for unit, of_unit in members.items()
        }
        chosen = sorted(members, key=lambda unit: (keys[unit], unit))[:n_units]
        sample = {}
        for slot, unit in enumerate(chosen):
            positions = [np.flatnonzero(self.counted(i)) for i in members[unit]]
            owner = np.repeat(members[unit], [len(of_one) for of_one in positions])
            drawn = np.random.default_rng(keys[unit]).permutation(len(owner))[:n_tokens]
            at = np.concatenate(positions)[drawn]
            for i in members[unit]:
                places = np.flatnonzero(owner[drawn] == i)
                sample[i] = slot, places, at[places]
        return sample


def _sample_size(n: int, wanted: int | float) -> int:
    """How many of n tokens are drawn, by their number or their share.

    >>> _sample_size(10, 4), _sample_size(3, 4), _sample_size(10, 0.25), _sample_size(10, 0.7)
    (4, 3, 3, 7)
    """
    # The share of a decimal fraction may lie above a whole number by a rounding error.
    return min(n, wanted if isinstance(wanted, int) else math.ceil(wanted * n - 1e-9))


def _taken(values: Sequence[T], kept: Iterable[int]) -> tuple[T, ...]:
    return tuple(values[i] for i in kept)


def pad(
    sequences: Sequence[Sequence[int] | np.ndarray],
    *,
    side: PaddingSide = "right",
    width: int | None = None,
    pad_id: int = 0,
) -> tuple[Int[Tensor, "text pos"], Int[Tensor, "text pos"]]:
    """Token ids and attention mask of several sequences in one batch.

    Args:
        sequences: token ids.
        side: where the pads go, "right" or "left".
        width: of the batch; None for that of the longest sequence.
        pad_id: what pads are.

    >>> tokens, mask = pad([[5, 6, 7], [8]], side="left")
    >>> tokens.tolist(), mask.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
    """
    width = max(map(len, sequences)) if width is None else width
    tokens = np.full((len(sequences), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(tokens)
    for row, ids in enumerate(sequences):
        start = 0 if side == "right" else width - len(ids)
        tokens[row, start : start + len(ids)] = ids
        mask[row, start : start + len(ids)] = 1
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def build_corpus(
    texts: Any,
    tokenizer: Any,
    *,
    max_length: int,
    context_length: int | None = None,
    d_vocab: int | None = None,
    is_shared: bool = False,
    include_bos: bool = False,
    bos_id: int | None = None,
    unpadded: bool = False,
    template: ChatTemplate | None = None,
    reading: Reading = EVERYTHING,
) -> Corpus:
    """Tokenise texts, or take token ids as they are.

    BOS is put in front exactly where the tokenizer itself would, and never twice. Other special
    tokens are not added. Conversations have the ids that their template gives them.

    Args:
        texts: anything `read_texts` takes, `Conversations`, or a list of token id sequences.
        tokenizer: a Hugging Face tokenizer; may be None if token ids are given.
        max_length: tokens per sequence, BOS included.
        context_length: the model's own limit, if it has one.
        d_vocab: number of logits, to find ids that the model does not have.
        is_shared: whether these are all that two models have in common, of more.
        include_bos: measure BOS positions too.
        bos_id: what BOS is where there is no tokenizer to tell.
        unpadded: put sequences of one length only into each batch.
        template: what writes conversations.
        reading: which tokens are counted; texts without any are left out.

    Raises:
        CorpusError: if nothing is left to measure, or the ids do not fit the model.
    """
    check_max_length(max_length)
    longest = min(max_length, context_length or max_length)
    notes: list[str] = []
    groups: Sequence[Hashable] | None = None
    tagged: list[Tagged] | None = None
    if tokenizer is not None:
        bos_id = tokenizer.bos_token_id
    if are_token_ids(texts):
        pad_id = getattr(tokenizer, "pad_token_id", None)
        raw = read_token_ids(texts, pad_id)
        notes += _padding_notes(raw) if pad_id is None else []
    elif isinstance(texts, Conversations):
        groups = texts.groups
        tagged = tag_rows(texts, tokenizer, template, _start(tokenizer))
        raw = [one.ids for one in tagged]
        notes += speaker_notes(texts)
    else:
        texts = read_texts(texts)
        groups = texts.groups
        raw = tokenize(texts, tokenizer)
        notes += _bos_notes(texts, tokenizer)
    chosen = _chosen(raw, tagged, reading)
    two_tokens = [i for i, ids in enumerate(raw) if _content_length(ids, bos_id) >= 2]
    n_empty = sum(_content_length(ids, bos_id) == 0 for ids in raw)
    if not two_tokens:
        raise CorpusError(
            f"none of the {len(raw)} texts has two tokens or more "
            f"({n_empty} are empty): give longer texts"
        )
    kept = two_tokens
    if chosen is not None:
        left_out = None if include_bos else bos_id
        kept = [i for i in kept if _has_counted(raw[i][:longest], chosen[i][:longest], left_out)]
        notes += _choice_notes(len(two_tokens), len(kept), longest)
    long_enough = [raw[i] for i in kept]
    cut = [ids[:longest] for ids in long_enough]
    check_ids(cut, d_vocab, is_shared)
    order = sorted(range(len(cut)), key=lambda i: (-len(cut[i]), cut[i].tobytes()))
    ordered = [cut[i] for i in order]
    rows = [kept[i] for i in order]
    units = None if groups is None else _units([groups[i] for i in rows], ordered)
    notes += _group_notes(texts, units)
    contents = [ids.tobytes() for ids in ordered]
    is_bos = [] if bos_id is None or include_bos else [int((s == bos_id).sum()) for s in ordered]
    counts = Counts(
        n_texts=len(raw),
        n_empty=n_empty,
        n_short=len(raw) - len(two_tokens) - n_empty,
        n_cut=sum(len(ids) > longest for ids in long_enough),
        n_duplicates=len(contents) - len(set(contents)),
        n_sequences=len(ordered),
        n_tokens=sum(map(len, ordered)),
        n_bos=sum(is_bos),
    )
    if counts.n_tokens == counts.n_bos:
        raise CorpusError("all tokens of the texts are BOS: give texts, or pass include_bos=True")
    if counts.n_cut and longest < max_length:
        notes.append(
            f"{counts.n_cut} of {counts.n_sequences} texts are longer than the model's context of "
            f"{longest} tokens and were cut to it"
        )
    if counts.n_duplicates and units is None:
        notes.append(
            f"{counts.n_duplicates} of {counts.n_sequences} sequences repeat another one: "
            "intervals are narrower than they should be"
        )
    ordered_choice = None if chosen is None else tuple(chosen[i][:longest] for i in rows)
    ordered_roles = None if tagged is None else tuple(tagged[i].roles[:longest] for i in rows)
    digest = hashlib.sha256()
    for content in (*contents, *(mask.tobytes() for mask in ordered_choice or ())):
        digest.update(len(content).to_bytes(8, "little") + content)
    corpus = Corpus(
        sequences=tuple(ordered),
        bos_id=None if include_bos else bos_id,
        max_length=longest,
        counts=counts,
        notes=tuple(notes),
        sha256=digest.hexdigest(),
        groups=units,
        unpadded=unpadded,
        chosen=ordered_choice,
        roles=ordered_roles,
        turns=None if tagged is None else tuple(tagged[i].turn for i in rows),
        context_length=context_length,
    )
    return replace(corpus, reading=_describe_reading(corpus, template, reading))


def _start(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts in front of a text: BOS, or nothing."""
    return [tokenizer.bos_token_id] if adds_bos(tokenizer) else []


def _chosen(
    raw: Sequence[np.ndarray], tagged: Sequence[Tagged] | None, reading: Reading
) -> list[Bool[np.ndarray, " pos"]] | None:
    """Which tokens of each text are counted, by their roles and by a mask or function.

    Raises:
        CorpusError: if there are no roles here, or the mask or the function does not fit.
    """
    if reading.roles is None and reading.tokens is None:
        return None
    chosen = [np.ones(len(ids), dtype=bool) for ids in raw]
    if reading.roles is not None:
        if tagged is None:
            raise CorpusError(
                "roles are of conversations, and the texts are none: give texts with messages, or "
                "prompts with completions, or choose tokens by a mask (tokens=)"
            )
        codes = [ROLES.index(role) for role in reading.roles]
        chosen = [np.isin(one.roles, codes) for one in tagged]
    if reading.tokens is None:
        return chosen
    if not callable(reading.tokens) and len(reading.tokens) != len(raw):
        raise CorpusError(
            f"tokens has {len(reading.tokens)} sequences of truth values for {len(raw)} texts: "
            "give one for each text"
        )
    return [
        mask & _truth(reading.tokens if callable(reading.tokens) else reading.tokens[i], i, raw[i])
        for i, mask in enumerate(chosen)
    ]


def _truth(given: Any, i: int, ids: np.ndarray) -> Bool[np.ndarray, " pos"]:
    """Truth values for one text, from a function or as they were given.

    Raises:
        CorpusError: if they are something else, or of another length.
    """
    if callable(given):
        try:
            given = given(torch.from_numpy(ids.copy()), torch.arange(len(ids)))
        except Exception as error:
            raise CorpusError(
                f"text {i}: the function given as tokens failed ({first_line(error)}): it takes "
                "token ids and positions, two tensors of one length"
            ) from error
    try:
        found = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
    except (TypeError, ValueError):
        found = np.zeros((1, 1))
    if found.shape != ids.shape or found.dtype != bool:
        raise CorpusError(
            f"text {i}: expected {len(ids)} truth values from tokens, one for each token of the "
            f"text, got {found.dtype} of shape {found.shape}"
        )
    return found


def _has_counted(ids: np.ndarray, chosen: np.ndarray, bos_id: int | None) -> bool:
    return bool((chosen if bos_id is None else chosen & (ids != bos_id)).any())


def _choice_notes(n: int, n_kept: int, longest: int) -> list[str]:
    """How many texts have no token that is counted.

    Raises:
        CorpusError: if none has.
    """
    if not n_kept:
        raise CorpusError(
            f"none of the {n} texts has a chosen token (roles, tokens) among its first {longest}: "
            "choose others, or raise max_length"
        )
    if n_kept == n:
        return []
    return [
        f"{n - n_kept} of {n} texts have no chosen token among their first {longest} and were "
        "left out"
    ]


def _describe_reading(
    corpus: Corpus, template: ChatTemplate | None, reading: Reading
) -> dict[str, Any]:
    """Template, roles and choice of tokens as JSON values; nothing for plain texts."""
    found: dict[str, Any] = {}
    if template is not None:
        found["chat_template"] = {"from": template.origin, "sha256": template.sha256}
    if corpus.roles is not None:
        n = np.bincount(np.concatenate(corpus.roles), minlength=len(ROLES))
        found["n_tokens_by_role"] = dict(zip(ROLES, n.tolist(), strict=True))
    if reading.roles is not None:
        found["roles"] = list(reading.roles)
    if reading.tokens is not None:
        found["tokens"] = describe_tokens(reading.tokens)
    if corpus.chosen is not None:
        found["n_counted"] = sum(int(corpus.counted(i).sum()) for i in range(len(corpus.sequences)))
    return found


def _units(groups: Sequence[Hashable], sequences: Sequence[np.ndarray]) -> tuple[int, ...] | None:
    """Groups as numbers from 0; None where each has one sequence only.

    More groups than are kept apart are united at random (by content): variances over random groups
    of independent units are right too, with fewer degrees of freedom.
    """
    keys: dict[Hashable, int] = {}
    for group, sequence in zip(groups, sequences, strict=True):
        keys[group] = min(keys.get(group, 2**64), _hash(sequence, 0))
    if len(keys) == len(sequences):
        return None
    ranked = sorted(keys, key=lambda group: keys[group])
    number = {group: rank % MAX_GROUPS for rank, group in enumerate(ranked)}
    return tuple(number[group] for group in groups)


def _group_notes(texts: Any, units: Sequence[int] | None) -> list[str]:
    """What is taken as independent, where that is not each text."""
    if units is None:
        return []
    n, how = len(set(units)), texts.source.get("groups")
    if isinstance(how, int):
        return [
            f"intervals count every {how} consecutive texts as one ({n} in all), since neighbours "
            "in one document resemble each other: read_texts(…, groups=1), or --groups 1, takes "
            "each by itself"
        ]
    return [f"intervals are over {n} independent groups of texts"]


def check_max_length(max_length: Any) -> None:
    """Raise unless `max_length` leaves something to measure.

    Raises:
        CorpusError: below two tokens.
    """
    if not isinstance(max_length, Integral) or max_length < 2:
        raise CorpusError(
            f"max_length must be at least 2 tokens (a whole number), got {max_length}"
        )


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts BOS in front of a text."""
    if tokenizer.bos_token_id is None:
        return False
    return list(tokenizer("a")["input_ids"][:1]) == [tokenizer.bos_token_id]


def tokenize(texts: Sequence[str], tokenizer: Any) -> list[np.ndarray]:
    """Ids of every text, with BOS in front where the tokenizer itself puts it.

    A text that begins with the BOS token's own text, as chat templates write it, gets no second.

    Raises:
        CorpusError: if there is no tokenizer.
    """
    if tokenizer is None:
        raise CorpusError(
            "no tokenizer was found for the base model: pass (model, tokenizer) instead of the "
            "model, or token ids instead of texts"
        )
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    start = _start(tokenizer)
    return [
        np.array(ids if ids[:1] == start or not ids else start + ids, dtype=np.int64)
        for ids in map(list, encoded)
    ]


def _bos_notes(texts: Sequence[str], tokenizer: Any) -> list[str]:
    """Says how many texts, such as chats, begin with BOS themselves."""
    if not adds_bos(tokenizer):
        return []
    n = sum(text.startswith(tokenizer.bos_token) for text in texts)
    if n == 0:
        return []
    return [
        f"{n} of {len(texts)} texts begin with {tokenizer.bos_token!r} themselves: no second BOS "
        "was put in front"
    ]


def are_token_ids(texts: Any) -> bool:
    """Whether texts are token ids already: a list of id sequences, or a tensor of them.

    >>> are_token_ids([[1, 2], [3]]), are_token_ids(["some text"])
    (True, False)
    """
    if getattr(texts, "ndim", 1) == 0:
        return False
    if isinstance(texts, Tensor):
        return True
    if isinstance(texts, np.ndarray):
        return texts.dtype.kind not in "OUST" or are_token_ids(list(texts))
    if not isinstance(texts, list | tuple) or not texts:
        return False
    return not isinstance(texts[0], str) and isinstance(texts[0], Sequence | Tensor | np.ndarray)


# So many equal ids at the end of a text are likely to be padding.
MANY_EQUAL = 4


def read_token_ids(texts: Any, pad_id: int | None) -> list[np.ndarray]:
    """Token id sequences as arrays.

    Raises:
        CorpusError: if one is no flat list of whole numbers, or is padded.
    """
    sequences = []
    for i, sequence in enumerate(texts):
        try:
            ids = np.asarray(sequence.cpu() if isinstance(sequence, Tensor) else sequence)
        except (TypeError, ValueError):  # ragged, or of a kind that numpy does not know
            ids = np.zeros((1, 1))
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise CorpusError(
                f"text {i}: expected a flat list of integer token ids, as every text in a list of "
                "token ids must be"
            )
        sequences.append(ids.astype(np.int64))
    _check_unpadded(sequences, pad_id)
    return sequences


def _padding_notes(sequences: list[np.ndarray]) -> list[str]:
    """What looks like padding where no tokenizer tells which id that is: one end repeated."""
    lengths = {len(ids) for ids in sequences}
    if len(sequences) < 2 or len(lengths) > 1 or max(lengths) < MANY_EQUAL:
        return []
    for what, ends in (
        ("end", [ids[-MANY_EQUAL:] for ids in sequences]),
        ("begin", [ids[:MANY_EQUAL] for ids in sequences]),
    ):
        repeated = [int(end[0]) for end in ends if (end == end[0]).all()]
        if repeated:
            likely = max(set(repeated), key=repeated.count)
            return [
                f"{repeated.count(likely)} of {len(sequences)} texts, all of one length, {what} in "
                f"{MANY_EQUAL} times id {likely} or more: if that is padding it was measured as "
                "text; give token ids without it"
            ]
    return []


def _check_unpadded(sequences: list[np.ndarray], pad_id: int | None) -> None:
    """Raise for a padded rectangle: its pads would be measured as text.

    Texts of several lengths were not padded to one: what ends them was put there.
    """
    if pad_id is None or len({len(ids) for ids in sequences}) > 1:
        return
    for i, ids in enumerate(sequences):
        # A single one may be intended: many tokenizers pad with EOS.
        if len(ids) > 2 and any((ends == pad_id).all() for ends in (ids[:2], ids[-2:])):
            raise CorpusError(
                f"text {i} is padded (with id {pad_id}): give a list of the token ids without "
                "padding, or the texts themselves"
            )


def check_ids(sequences: list[np.ndarray], d_vocab: int | None, is_shared: bool = False) -> None:
    """Raise if an id is outside the model's vocabulary.

    Args:
        sequences: token ids of each text.
        d_vocab: rows of the vocabulary; None where it is unknown.
        is_shared: whether these are the rows that two models have in common.

    Raises:
        CorpusError: naming the id.
    """
    lowest, highest = min(int(s.min()) for s in sequences), max(int(s.max()) for s in sequences)
    if lowest < 0 or (d_vocab is not None and highest >= d_vocab):
        bad = lowest if lowest < 0 else highest
        if is_shared:
            raise CorpusError(
                f"token id {bad} is not among the {d_vocab} tokens that both models have: leave "
                "out of the texts what only one of them knows, such as a chat template with "
                "tokens of its own"
            )
        raise CorpusError(
            f"token id {bad} is outside the model's vocabulary of {d_vocab}: "
            "give the texts, or the token ids, of this model's own tokenizer"
        )


def _content_length(ids: np.ndarray, bos_id: int | None) -> int:
    return len(ids) - (1 if len(ids) and ids[0] == bos_id else 0)


def _hash(sequence: np.ndarray, seed: int) -> int:
    salt = (seed % 2**128).to_bytes(16, "little")
    digest = hashlib.blake2b(sequence.tobytes(), digest_size=8, salt=salt)
    return int.from_bytes(digest.digest(), "little")
