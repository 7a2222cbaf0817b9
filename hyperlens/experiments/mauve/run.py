"""How close are two sets of texts? MAUVE with the features of any causal model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ...data.texts import Texts, read_texts
from ...errors import CorpusError
from ...render.blocks import Axis, Block, Chart, Details, Role, Table, Text, Verdict
from ...render.format import FRACTION, count, span
from ...render.labels import label_of
from ...results.fingerprint import texts_sha256, versions
from ...results.result import Result
from .features import Features, feature_notes, open_featurizer
from .scores import SEEDS, check_seeds, compute_mauve, few_texts_notes, mauve_scores

EXAMPLES = (
    "hyperlens mauve human.txt written.jsonl --features openai-community/gpt2-large --out mauve",
    "hyperlens mauve human.txt written.txt --features ./base --seeds 0,1,2",
)


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
