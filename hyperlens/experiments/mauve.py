"""How close are two sets of texts? MAUVE with the features of any causal model.

A model turns each text into a vector (`Featurizer`). The package `mauve-text` (Pillutla et al.
2021) puts the vectors of both sets into clusters and compares the two histograms by their
divergences from every mixture of both: 1 for equal histograms, towards 0 for disjoint ones. It is
licensed under the GPL, version 3: an optional extra, never imported unless MAUVE is asked for.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_counts, check_types
from ..data.corpus import check_max_length, pad, tokenize
from ..data.texts import Texts, read_texts
from ..decoding.prompts import as_text
from ..errors import ActivationError, CorpusError, ProbeError
from ..hooks.loading import LoadedModel, hook, parse_device, parse_dtype
from ..hooks.surface import evaluating, final_norm, input_device, run_last_residual
from ..models.sources import check_source, open_source
from ..render.blocks import Axis, Block, Chart, Details, Role, Table, Text, Verdict
from ..render.format import FRACTION, count, span
from ..render.labels import label_of
from ..results.fingerprint import texts_sha256, versions
from ..results.result import Result
from ..statistics import significance

EXAMPLES = (
    "hyperlens mauve human.txt written.jsonl --features openai-community/gpt2-large --out mauve",
    "hyperlens mauve human.txt written.txt --features ./base --seeds 0,1,2",
)

# Five are enough to see whether the clustering matters; ours.
SEEDS = (0, 1, 2, 3, 4)
# Its authors use about 5,000 texts in each set, and say that few texts make MAUVE too high.
ENOUGH_TEXTS = 1000

Tokens = Sequence[Sequence[int]]


@check_types
def measure_mauve(
    p_texts: Any,
    q_texts: Any,
    features: Any,
    *,
    seeds: Sequence[int] = SEEDS,
    max_length: int = 1024,
    batch_size: int = 16,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> MauveResult:
    """How close are two sets of texts? (MAUVE)

    MAUVE is 1 for the same distribution and towards 0 for disjoint ones (Pillutla et al. 2021,
    arXiv 2102.01454). It needs `pip install 'hyperlens[mauve]'` (GPL), and at least a thousand
    texts in each set to mean much.

    There is one value per seed of the k-means clustering inside MAUVE and no interval: resampled
    texts hold repetitions, which move MAUVE by themselves. Nothing is downloaded unless a hub name
    is given.

    Args:
        p_texts, q_texts: what `compare_models` takes, but no token ids; human texts and a model's,
            say. Both should have about the same length: MAUVE sees length, too.
        features: the model that reads the texts: hub id, folder, model, pair (model, tokenizer),
            or an open `Featurizer`, whose own options then count. The paper of MAUVE takes GPT-2
            large; values of different models cannot be compared.
        seeds: of the clustering.
        max_length: tokens per text; a longer one is read up to there.
        batch_size: texts per forward pass.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        ProbeError: if `mauve-text` is not installed, or the seeds make no sense.
        HyperlensError: if a source cannot be opened, or the texts leave nothing to compare.
    """
    compute_mauve()  # whoever lacks the package should not wait for anything
    check_seeds(seeds)
    texts = {"p": read_texts(p_texts), "q": read_texts(q_texts)}
    reader = open_featurizer(
        features, max_length=max_length, batch_size=batch_size, device=device, dtype=dtype
    )
    vectors = {side: reader.features(of_side, progress) for side, of_side in texts.items()}
    for of_side in vectors.values():
        if not len(of_side.vectors):
            raise CorpusError(
                f"none of the {count(of_side.n_empty, 'text')} has a token: there is nothing to "
                "read"
            )
    scores = mauve_scores(vectors["p"].vectors, vectors["q"].vectors, seeds)
    names = {side: str(t.source.get("name", side.upper())) for side, t in texts.items()}
    meta = {
        "title": f"{names['p']} and {names['q']}",
        **{side: _describe(texts[side], vectors[side]) for side in texts},
        "features": reader.describe(),
        "options": {"seeds": list(seeds), "n_clusters": scores.n_clusters},
        "versions": versions(),
        "notes": [
            *few_texts_notes(*(len(of_side.vectors) for of_side in vectors.values())),
            *(note for side in texts for note in feature_notes(names[side], vectors[side])),
        ],
    }
    rows = zip(seeds, scores.values, scores.smoothed, strict=True)
    return MauveResult(
        table=tuple({"seed": s, "value": v, "smoothed": smooth} for s, v, smooth in rows),
        extras={"curves": list(scores.curves)},
        meta=meta,
    )


def _describe(texts: Texts, features: Features) -> dict[str, Any]:
    return dict(texts.source) | {
        "n": len(features.vectors),
        "n_empty": features.n_empty,
        "n_cut": features.n_cut,
        "texts_sha256": texts_sha256(texts),
    }


# Texts as vectors


class Features(NamedTuple):
    """Texts as vectors.

    Attributes:
        vectors: one row per text that has a token, in the order of the texts.
        n_empty: texts without any token, which have no vector.
        n_cut: texts longer than the limit, read up to there.
    """

    vectors: Float[Tensor, "n d_model"]
    n_empty: int
    n_cut: int


@dataclass(frozen=True)
class Featurizer:
    """A model that turns texts into vectors.

    The vector of a text is the last layer's residual at the text's last token, after the model's
    own final norm: what Hugging Face gives there as `hidden_states[-1]` by default, and what the
    package `mauve-text` takes of GPT-2. Texts begin with BOS where the tokenizer puts one.

    Attributes:
        loaded: the model, hooked and checked.
        max_length: tokens per text, BOS included; a longer text is read up to there.
        batch_size: texts per forward pass; changes nothing but rounding.
    """

    loaded: LoadedModel
    max_length: int
    batch_size: int

    def describe(self) -> dict[str, Any]:
        """Which model, which token and how many, as JSON values."""
        return self.loaded.describe() | {
            "dtype": str(self.loaded.hooked.cfg.dtype).removeprefix("torch."),
            "max_length": self.max_length,
            "position": "last token, after the final norm",
        }

    def features(self, texts: Sequence[str], progress: bool = False) -> Features:
        """The vectors of some texts.

        Raises:
            CorpusError: if the model has no tokenizer.
            ActivationError: if the model overflows.
        """
        ids = tokenize(texts, self.loaded.tokenizer)
        sequences = [tokens[: self.max_length] for tokens in ids if len(tokens)]
        vectors = torch.empty(len(sequences), self.loaded.hooked.cfg.d_model)
        longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        starts = range(0, len(sequences), self.batch_size)
        for start in tqdm(starts, desc="reading texts", disable=not progress, leave=False):
            rows = longest_first[start : start + self.batch_size]
            vectors[rows] = self._last([sequences[i] for i in rows]).cpu()
        n_cut = sum(len(tokens) > self.max_length for tokens in ids)
        return Features(vectors, len(ids) - len(sequences), n_cut)

    def _last(self, batch: Sequence[np.ndarray]) -> Float[Tensor, "batch d_model"]:
        """Padded on the right: what comes after a text's last token cannot change it."""
        model = self.loaded.hooked
        tokens, mask = pad(batch)
        lengths = mask.sum(-1)
        device = input_device(model)
        with evaluating(model):
            residual = run_last_residual(model, tokens.to(device), mask.to(device))
            last = residual[torch.arange(len(batch)), lengths - 1]
            vectors = final_norm(model, last).float()
        if not bool(torch.isfinite(vectors).all()):
            raise ActivationError(
                "the model that reads the texts has NaN or infinite activations: load it in a "
                "wider dtype, as in dtype='float32'"
            )
        return vectors


def feature_notes(name: str, *sets: Features) -> list[str]:
    """What a reader of the result should know of texts that were left out or cut."""
    n_empty, n_cut = sum(one.n_empty for one in sets), sum(one.n_cut for one in sets)
    total = count(sum(len(one.vectors) for one in sets) + n_empty, "text")
    notes = []
    if n_empty:
        notes.append(f"{name}: {n_empty:,} of {total} without a token, left out")
    if n_cut:
        notes.append(f"{name}: {n_cut:,} of {total} longer than what is read, cut")
    return notes


def open_featurizer(
    source: Any,
    *,
    max_length: int = 1024,
    batch_size: int = 16,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Featurizer:
    """Open a model to read texts with.

    Args:
        source: whatever a model can be opened from; or a `Featurizer`, which is returned.
        max_length: tokens per text; the model's own context bounds it.
        batch_size: texts per forward pass.
        device, dtype: as in `compare_models`.

    Raises:
        LoadingError: if the source cannot be opened.
        ParityError: if it does not read as its plain model does.
        CorpusError: if it has no tokenizer, or an option makes no sense.

    >>> from hyperlens.embedded import embedded_base
    >>> reader = open_featurizer(embedded_base())
    >>> len(reader.features(["The old mill.", ""]).vectors)
    1
    """
    if isinstance(source, Featurizer):
        return source
    check_max_length(max_length)
    check_counts(batch_size=batch_size)
    opened = open_source(source, device=parse_device(device), dtype=parse_dtype(dtype))
    if opened.tokenizer is None:
        raise CorpusError(
            f"{opened.name} has no tokenizer to read texts with: pass (model, tokenizer)"
        )
    loaded = hook(opened, "residual")
    context = getattr(loaded.hooked.cfg, "n_ctx", None)
    return Featurizer(loaded, min(max_length, context or max_length), batch_size)


# MAUVE of two sets of vectors


class Scores(NamedTuple):
    """MAUVE under several seeds of its k-means clustering.

    Attributes:
        values: MAUVE, one per seed, in (0, 1].
        smoothed: the same with smoothed histograms (Pillutla et al. 2023, arXiv 2212.14578).
        curves: the divergence curve of each seed: exp(-5 KL(q ‖ r)) and exp(-5 KL(p ‖ r)) for
            mixtures r of the two histograms p and q.
        n_clusters: how many clusters; a tenth of the texts of the smaller set.
    """

    values: tuple[float, ...]
    smoothed: tuple[float, ...]
    curves: tuple[list[list[float]], ...]
    n_clusters: int

    @property
    def mean(self) -> float:
        """Over seeds."""
        return significance.estimate(self.values).value


def mauve_scores(
    p: Float[Tensor, "n d"], q: Float[Tensor, "m d"], seeds: Sequence[int] = SEEDS
) -> Scores:
    """MAUVE of two sets of vectors, once per seed; all its own settings are left as they are.

    Raises:
        ProbeError: if `mauve-text` is not installed, or the seeds make no sense.
        CorpusError: below two vectors in a set, or if all of them are the same.
    """
    compute = compute_mauve()
    check_seeds(seeds)
    if min(len(p), len(q)) < 2:
        raise CorpusError(
            f"MAUVE needs at least two texts in each set, and a thousand to mean much; got "
            f"{len(p)} and {len(q)}"
        )
    normalized = torch.nn.functional.normalize(torch.cat([p, q]).double(), dim=-1)
    if float((normalized - normalized[0]).abs().max()) < 1e-6:
        raise CorpusError(
            f"all {len(normalized)} texts have the same features, so MAUVE has nothing to compare: "
            "give texts that differ"
        )
    answers = []
    for seed in seeds:
        with _without_remarks():
            answers.append(compute(p_features=p.numpy(), q_features=q.numpy(), seed=seed))
    return Scores(
        values=tuple(float(answer.mauve) for answer in answers),
        smoothed=tuple(float(answer.mauve_star) for answer in answers),
        curves=tuple(answer.divergence_curve.tolist() for answer in answers),
        n_clusters=int(answers[0].num_buckets),
    )


def compute_mauve() -> Callable[..., Any]:
    """The function of `mauve-text`.

    Raises:
        ProbeError: if it is not installed.
    """
    before = random.getstate()
    try:
        package = import_module("mauve")
    except ImportError as error:
        raise _missing(str(error)) from None
    finally:
        random.setstate(before)  # rich, which is imported with it, draws a number
    function: Callable[..., Any] | None = getattr(package, "compute_mauve", None)
    if function is None:  # another package of this name
        raise _missing("the installed package 'mauve' has no compute_mauve")
    return function


def _missing(reason: str) -> ProbeError:
    return ProbeError(
        f"MAUVE needs the package mauve-text, licensed under the GPL ({reason}): "
        "pip install 'hyperlens[mauve]'"
    )


def check_seeds(seeds: Sequence[Any]) -> None:
    """Raise unless `seeds` are different integers of at least 0.

    Raises:
        ProbeError: if there are none, or one is no such number, or is there twice.
    """
    values = list(seeds)
    are_seeds = all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in values)
    if not values or not are_seeds or len(set(values)) < len(values):
        raise ProbeError(
            f"seeds must be at least one whole number from 0 on, each given once; got {seeds}"
        )


def few_texts_notes(*sizes: int) -> list[str]:
    """A note for the reader of a result where sets of texts are small.

    >>> few_texts_notes(1000, 2000)
    []
    """
    fewest, most = min(sizes), max(sizes)
    if fewest >= ENOUGH_TEXTS:
        return []
    size = count(most, "text") if fewest == most else f"{fewest:,} to {count(most, 'text')}"
    return [
        f"MAUVE over {size} in each set: below {ENOUGH_TEXTS:,} it is too high and depends much on "
        "which texts they are; compare it only with MAUVE of equally many texts, read by the same "
        "model"
    ]


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence what faiss prints on the process's standard error about few texts per cluster.

    It does so for every MAUVE, whose number of clusters is not ours to choose.
    """
    stderr = None
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    with suppress(OSError):  # no standard error to be silenced
        stderr = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
    try:
        yield
    finally:
        if stderr is not None:
            os.dup2(stderr, 2)
            os.close(stderr)


def check_mauve(features: Any) -> None:
    """Raise what can be told before anything is opened.

    Args:
        features: whatever reads the texts.

    Raises:
        ProbeError: if `mauve-text` is not installed.
        LoadingError: if the reader is no model.
    """
    compute_mauve()
    if not isinstance(features, Featurizer):
        check_source(features)


def check_has_tokenizer(tokenizer: Any) -> None:
    """Raise unless the pair's tokens can be read as text.

    Raises:
        CorpusError: saying what to pass.
    """
    if tokenizer is None:
        raise CorpusError(
            "MAUVE compares texts, and the pair has no tokenizer to turn tokens into text: pass "
            "(model, tokenizer), or leave MAUVE out"
        )


class ReferenceTexts:
    """How texts go on after their prompts by themselves, to compare generations with.

    Args:
        reader: the model that reads the texts.
        tokenizer: of the pair that generates.
        continuations: for each text its own token ids after the prompt.

    Attributes:
        notes: which texts could not be read, for the reader of the result.
    """

    def __init__(self, reader: Featurizer, tokenizer: Any, continuations: Tokens) -> None:
        check_has_tokenizer(tokenizer)
        self._reader, self._tokenizer = reader, tokenizer
        self.notes: list[str] = []
        self._own = self._features("the texts themselves", [continuations])[0]

    def scores(self, who: str, samples: Sequence[Tokens]) -> list[Scores]:
        """MAUVE of each sample; none at all where a set has fewer than two texts to read.

        Args:
            who: generated them, as a note names it.
            samples: for each run over the prompts the tokens that were added, without the prompts.
        """
        features = self._features(who, samples)
        if min(len(one.vectors) for one in (self._own, *features)) < 2:
            self.notes.append(f"MAUVE of {who} is unknown: it needs two texts to read in each set")
            return []
        return [mauve_scores(self._own.vectors, one.vectors) for one in features]

    def _features(self, who: str, samples: Sequence[Tokens]) -> list[Features]:
        features = [
            self._reader.features([as_text(self._tokenizer, ids) for ids in tokens])
            for tokens in samples
        ]
        self.notes += feature_notes(f"MAUVE of {who}", *features)
        return features


# The result


class MauveResult(Result):
    """How close two sets of texts are.

    The table has a row per seed of the clustering: MAUVE, 1 for the same distribution and towards 0
    for disjoint ones, and its smoothed variant (arXiv 2212.14578).

    Extras: `curves`, the divergence curve of every seed.
    """

    name: ClassVar[str] = "mauve"
    title: ClassVar[str] = "How close are two sets of texts?"
    columns: ClassVar[tuple[str, ...]] = ("seed", "value", "smoothed")

    @property
    def mean(self) -> float:
        """MAUVE, mean over seeds."""
        return float(sum(row["value"] for row in self.table) / len(self.table))

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest MAUVE of all seeds: what the clustering alone does."""
        values = [row["value"] for row in self.table]
        return min(values), max(values)

    def verdicts(self) -> list[Verdict]:
        """The value, and how far it carries."""
        answer = (
            f"MAUVE is {FRACTION(self.mean)}, the mean of {count(len(self.table), 'clustering')} "
            f"({span(*self.spread, FRACTION)}); 1 is the same distribution, 0 nothing in common."
        )
        caution = "The range is that of the clustering alone: other texts would move MAUVE more."
        return [Verdict("MAUVE", answer), Verdict("MAUVE", caution, caution=True)]

    def evidence(self) -> list[Block]:
        """What was compared, the divergence curves, and every seed."""
        return [
            Text(
                "MAUVE compares two sets of texts by the last hidden states of a model that reads "
                "them. Its clusters are drawn at random, so it is computed with several seeds."
            ),
            self._facts(),
            self._curves(),
            Details("every seed", [self._seeds()]),
        ]

    def _facts(self) -> Table:
        p, q, features = (self.meta[key] for key in ("p", "q", "features"))
        rows = [
            ["MAUVE, mean over seeds", FRACTION(self.mean)],
            ["range over seeds", span(*self.spread, FRACTION)],
            ["texts", f"{p['n']:,} and {q['n']:,}"],
            ["clusters", f"{self.meta['options']['n_clusters']:,}"],
            ["read by", str(features["name"])],
            ["vector", str(features["position"])],
        ]
        return Table(["", "value"], rows, joins=True)

    def _curves(self) -> Chart:
        label = label_of(self)
        rows = [
            {"series": f"seed {row['seed']}", **point}
            for row, curve in zip(self.table, self.extras["curves"], strict=True)
            for point in _points(curve)
        ]
        roles: dict[str, Role] = dict.fromkeys((str(row["series"]) for row in rows), "other")
        return Chart(
            "lines",
            "Divergence curves; MAUVE is the area under them",
            f"divergence curves of {label}; the area under them is MAUVE, {FRACTION(self.mean)}",
            rows,
            Axis("q_in_p", "exp(-5 KL(Q ‖ mixture)): Q lies where P does", "share"),
            Axis("p_in_q", "exp(-5 KL(P ‖ mixture)): P lies where Q does", "share"),
            roles,
        )

    def _seeds(self) -> Table:
        rows = [
            [str(row["seed"]), FRACTION(row["value"]), FRACTION(row["smoothed"])]
            for row in self.table
        ]
        return Table(["seed", "MAUVE", "smoothed"], rows, joins=True)


def _points(curve: Sequence[Sequence[float]]) -> list[Mapping[str, float]]:
    """From left to right; the two ends of a curve are corners of the unit square."""
    ordered = sorted(curve, key=lambda point: (point[0], -point[1]))
    return [{"q_in_p": x, "p_in_q": y} for x, y in ordered]
