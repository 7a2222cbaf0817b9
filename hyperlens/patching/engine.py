"""What every patching experiment shares: texts, batches, comparisons with both models, generation.

Experiments differ in what they put where. How texts are drawn, how decisions of patched models are
compared with those of the two unpatched ones, and how repetition of greedy text is measured under
a patch is the same for all of them, and is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..data.corpus import Corpus
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import check_room, choose_prompts
from ..errors import CorpusError
from ..hooks.loading import LoadedModel
from ..hooks.surface import HookedModel, evaluating, final_norm, float_logits
from ..pair import Inputs, Pair
from ..passes.streams import ModelStream, StreamPair, StreamSpec, logit_chunk_bytes, logit_rows
from ..results.rows import ProbeResult
from .outcomes import SIDES, Accumulator, Outcome, Side, measure, reference

# Outputs of patched models are kept until they take so many bytes, then compared together.
PENDING_BYTES = 256 * 2**20

Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")


# Texts


def subset(corpus: Corpus, chosen: Bool[Tensor, " text"]) -> Corpus:
    """Some of the texts of a corpus, in its order; the hash stays that of all."""
    return corpus.take([i for i, is_in in enumerate(chosen.tolist()) if is_in])


def draw_texts(inputs: Inputs, n_texts: int, seed: int) -> Inputs:
    """At most `n_texts` of the texts, drawn at random; a note says so."""
    n = len(inputs.corpus.sequences)
    if n <= n_texts:
        return inputs
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[torch.from_numpy(np.random.default_rng(seed).permutation(n)[:n_texts])] = True
    note = f"{n_texts} of {n} texts were drawn at random (n_texts)"
    return Inputs(inputs.pair, subset(inputs.corpus, chosen), (*inputs.notes, note))


def second_half(corpus: Corpus, seed: int) -> Bool[Tensor, " text"]:
    """A random half of the texts, one fewer than the rest if their number is odd.

    Where texts have groups, the half of the groups: the two halves share none.

    Raises:
        CorpusError: if there are fewer than four texts: intervals need two on each half.
    """
    n = corpus.n_units
    if n < 4:
        which = "texts" if corpus.groups is None else "groups of texts"
        raise CorpusError(
            f"expected at least 4 {which}, two to fit directions on and two to read decisions on, "
            f"got {n}: give more texts"
        )
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 2]
    half = torch.zeros(n, dtype=torch.bool)
    half[chosen] = True
    return half if corpus.groups is None else half[torch.tensor(corpus.groups)]


class Batch(NamedTuple):
    """Texts on the models' device.

    Attributes:
        tokens, mask: padded on the right.
        counted: True where a decision is counted: at chosen tokens that are not BOS.
        number: the index of each text in the corpus.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    counted: Bool[Tensor, "batch pos"]
    number: Int[Tensor, " batch"]

    @property
    def text(self) -> Int[Tensor, " n"]:
        """The index of the text of every counted token."""
        return self.number[:, None].expand_as(self.counted)[self.counted]


def batches(corpus: Corpus, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """All texts of a corpus, the longest first."""
    first = 0
    for batch in corpus.batches(batch_size):
        number = torch.arange(first, first + len(batch.tokens))
        first += len(number)
        parts = (batch.tokens, batch.real.long(), batch.counted, number)
        yield Batch(*(x.to(device) for x in parts))


# Comparison of patched models with both unpatched ones


@dataclass(frozen=True)
class PatchedOutput(Generic[Key]):
    """The output of a patched model on a batch, before its unembedding.

    Attributes:
        vectors: at the counted tokens.
        logits: by key, how rows of them become logits: models that differ only in their final norm
            or unembedding share the vectors.
    """

    vectors: Float[Tensor, "n d_model"]
    logits: Mapping[Key, Callable[[Float[Tensor, "n d_model"]], Float[Tensor, "n d_vocab"]]]


@dataclass(frozen=True)
class BatchOutputs(Generic[Key]):
    """What all models put out on a batch.

    Attributes:
        batch: the texts.
        last: last-layer residuals of the unpatched models at the counted tokens.
        patched: the patched models, made one after another.
    """

    batch: Batch
    last: Mapping[Side, Float[Tensor, "n d_model"]]
    patched: Iterable[PatchedOutput[Key]]


@dataclass(frozen=True)
class Outcomes(Generic[Key]):
    """Outcomes of every patched model, and of the two unpatched ones ("base", "tuned")."""

    patched: Mapping[Key, Outcome]
    models: Mapping[Side, Outcome]


def compare_patched(
    outputs: Iterable[BatchOutputs[Key]],
    models: Mapping[Side, HookedModel],
    corpus: Corpus,
    progress: bool,
) -> Outcomes[Key]:
    """Compare every patched model with both unpatched ones, batch by batch.

    Args:
        outputs: of every batch.
        models: the unpatched models.
        corpus: the texts of all batches.
        progress: show a progress bar.
    """
    n_texts, groups = len(corpus.sequences), corpus.groups
    patched: dict[Key, Accumulator] = defaultdict(lambda: Accumulator(n_texts))
    unpatched: dict[Side, Accumulator] = {side: Accumulator(n_texts) for side in SIDES}
    with tqdm(total=n_texts, desc="patching", unit="text", disable=not progress) as bar:
        for of_batch in outputs:
            # The unpatched models are counted once per batch, with its first piece.
            counted: Mapping[Side, Accumulator] = unpatched
            for piece in pieces(of_batch.patched, lambda output: output.vectors.nbytes):
                _compare(of_batch, models, piece, patched, counted)
                counted = {}
            bar.update(len(of_batch.batch.tokens))
    return Outcomes(
        {key: accumulator.outcome(groups) for key, accumulator in patched.items()},
        {side: accumulator.outcome(groups) for side, accumulator in unpatched.items()},
    )


def _compare(
    outputs: BatchOutputs[Key],
    models: Mapping[Side, HookedModel],
    piece: Sequence[PatchedOutput[Key]],
    patched: Mapping[Key, Accumulator],
    unpatched: Mapping[Side, Accumulator],
) -> None:
    """Compare some patched models, a few rows of logits at a time."""
    text = outputs.batch.text
    with evaluating(models["base"]), evaluating(models["tuned"]):
        for rows in logit_rows(len(text), models["base"].cfg.d_vocab, text.device):
            own = {
                side: float_logits(model, final_norm(model, outputs.last[side][rows]))
                for side, model in models.items()
            }
            known = reference(own["base"], own["tuned"])
            for side, accumulator in unpatched.items():
                accumulator.add(measure(own[side], known), known.changed, text[rows])
            for output in piece:
                for key, logits in output.logits.items():
                    values = measure(logits(output.vectors[rows]), known)
                    patched[key].add(values, known.changed, text[rows])


def pieces(items: Iterable[T], nbytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Group items until they take `PENDING_BYTES` of memory, at least one at a time."""
    piece: list[T] = []
    held = 0
    for item in items:
        piece.append(item)
        held += nbytes(item)
        if held >= PENDING_BYTES:
            yield piece
            piece, held = [], 0
    if piece:
        yield piece


class ChangedOutput(NamedTuple):
    """A changed last-layer residual, and whose final norm and unembedding read it."""

    residual: Float[Tensor, "n d_model"]
    norm: Side
    unembedding: Side


class OutputReader(ABC, Generic[Key]):
    """Compare changed last-layer residuals with both models, in a streaming pass over texts.

    Args:
        corpus: the texts the pass reads; its batches follow their order.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._n_texts, self._groups = len(corpus.sequences), corpus.groups

    def open(self, spec: StreamSpec) -> None:
        """Start to count."""
        self._seen = 0
        self._changed: dict[Key, Accumulator] = defaultdict(lambda: Accumulator(self._n_texts))
        self._unchanged = {side: Accumulator(self._n_texts) for side in SIDES}

    @abstractmethod
    def changes(
        self, residuals: Mapping[Side, Float[Tensor, "n d_model"]]
    ) -> Iterator[tuple[Key, ChangedOutput]]:
        """Every change of some last-layer residuals."""

    def update(self, pair: StreamPair) -> None:
        """Add one batch."""
        index = pair.index(pair.n_layers, "decisions")
        text = index // pair.tokens.shape[1] + self._seen
        self._seen += pair.n_sequences
        for rows in logit_rows(len(index), pair.base.d_vocab, index.device):
            self._compare(pair, index[rows], text[rows])

    def _compare(self, pair: StreamPair, index: Int[Tensor, " n"], text: Int[Tensor, " n"]) -> None:
        streams: dict[Side, ModelStream] = {"base": pair.base, "tuned": pair.tuned}
        residuals = {
            side: stream.residuals[-1].flatten(0, 1)[index] for side, stream in streams.items()
        }

        def logits(output: ChangedOutput) -> Float[Tensor, "n d_vocab"]:
            normed = streams[output.norm].final_norm(output.residual)
            return streams[output.unembedding].unembed(normed).float().to(pair.device)

        own = {side: logits(ChangedOutput(x, side, side)) for side, x in residuals.items()}
        models = reference(own["base"], own["tuned"])
        for side, accumulator in self._unchanged.items():
            accumulator.add(measure(own[side], models), models.changed, text)
        for key, output in self.changes(residuals):
            self._changed[key].add(measure(logits(output), models), models.changed, text)

    def outcomes(self) -> Outcomes[Key]:
        """What has been counted."""
        return Outcomes(
            {key: accumulator.outcome(self._groups) for key, accumulator in self._changed.items()},
            {side: one.outcome(self._groups) for side, one in self._unchanged.items()},
        )

    def compute(self) -> ProbeResult:
        """A pass asks for rows; this reader has outcomes instead."""
        return ProbeResult(())

    def state_bytes(self, spec: StreamSpec) -> int:
        """Memory of some rows of logits, and of the intermediate results of comparing them."""
        return 16 * logit_chunk_bytes(spec.d_vocab, spec.device)


# Generation


Repetition = Mapping[str, list[float]]
"""Per metric (TTR, rep-2, rep-3), one value per prompt."""


def greedy_generation(
    pair: Pair,
    corpus: Corpus,
    *,
    n_prompts: int,
    prompt_tokens: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> GenerationRunner | None:
    """Prompts drawn from a corpus, to be continued greedily; None for `max_new_tokens=0`.

    Raises:
        CorpusError: if too few texts are long enough, or the models' context is too short.
    """
    if not max_new_tokens:
        return None
    check_room(pair, prompt_tokens, max_new_tokens)
    prompts = choose_prompts(corpus, n_prompts, prompt_tokens, seed, max_new_tokens=max_new_tokens)
    return GenerationRunner(prompts, max_new_tokens, batch_size, seed, progress=False)


def patched_repetition(
    generation: GenerationRunner | None,
    models: Mapping[Side, LoadedModel],
    keys: Sequence[Key],
    patch: Callable[[Key], tuple[LoadedModel, AbstractContextManager[Any]]],
    progress: bool,
) -> dict[Key | Side, Repetition]:
    """Repetition of greedy text of both unpatched models and of every patched one.

    Args:
        generation: what is generated; None generates nothing.
        models: the unpatched models.
        keys: of the patched models.
        patch: the model that generates for a key, and a context inside which it is patched.
        progress: show a progress bar.
    """
    if generation is None:
        return {}
    found: dict[Key | Side, Repetition] = {}
    for side, loaded in models.items():
        found[side] = generation.run(loaded).metrics
    for key in tqdm(keys, desc="generating", unit="model", disable=not progress):
        loaded, patched = patch(key)
        with patched:
            found[key] = generation.run(loaded).metrics
    return found
