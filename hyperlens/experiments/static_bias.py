"""Is it just a fixed bias? The mean logit shift, added to the base model (arXiv 2605.22579, 3.5).

The paper adds α times the mean shift of the 500 most promoted tokens to the base model's logits
and finds that text only gets worse (Table 2). Here controls stand beside it, the bias that the
hypothesis is about (the shift of all tokens, at α = 1), and one fitted to the tuned model's
predictions, read on texts that it was not fitted on: what a bias can do at most.

Logits are centred first, context by context: a shift of all of them changes no prediction.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from ..checks import check_counts, check_seed, check_types
from ..decoding.diversity import REPETITION_METRICS
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import check_room, choose_prompts, prompt_lengths
from ..errors import ProbeError, ResultsError
from ..models.tokenizers import special_ids, token_names
from ..pair import Pair, open_inputs
from ..passes.contexts import Contexts, read_contexts
from ..render.blocks import (
    Axis,
    Block,
    Chart,
    Details,
    Grid,
    Heading,
    Reference,
    Role,
    Scale,
    Table,
    Text,
    Verdict,
)
from ..render.format import (
    FRACTION,
    MISSING,
    NATS,
    NUMBER,
    PERCENT,
    POINTS,
    SIGNED,
    SIGNED_FRACTION,
    SIGNED_NATS,
    count,
    ends,
    interval,
    p_value,
    span,
)
from ..results.result import Result, matching
from ..statistics.distances import winner
from ..statistics.rank_correlation import average_ranks
from ..statistics.significance import difference, estimate, trend
from .fitted_bias import fit_biases, halves

EXAMPLES = (
    "hyperlens static-bias ./base ./tuned --texts held_out.txt --out static-bias",
    "hyperlens static-bias ./base ./tuned --texts held_out.txt --k 200 --alphas 0.5,1",
)

# The paper's, and 1: where a tuned model that is base + bias would be reproduced exactly.
ALPHAS = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
CONTROLS = ("random", "shuffled", "constant")
BIASES = ("promoted", "uncentred", "all", *CONTROLS)
TESTED = ("promoted", "uncentred", "all")
FITTED = ("fitted", 1.0)
# How many of the most promoted tokens are listed in the result.
LISTED = 30

Condition = tuple[str, float]
"""A bias ("none" for the base as it is, "tuned" for the tuned model) and its α."""

Biases = Mapping[Condition, Float[Tensor, "*half d_vocab"]]
"""What each condition adds to the base's logits: the same everywhere, or one for either half."""

Units = dict[tuple[str, float, str], list[float]]
"""Bias, α and metric to one value per text or prompt."""


@check_types
def inject_static_bias(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    k: int = 500,
    alphas: Sequence[float] = ALPHAS,
    n_prompts: int = 32,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    max_length: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> StaticBiasResult:
    """Is the tuned model just the base plus a fixed bias on some tokens? Add it and see.

    Table 2 of arXiv 2605.22579 for any pair, with controls: the mean shifts of random tokens, those
    of the promoted tokens shuffled among them, and one number for every token. Agreement with the
    tuned model is teacher-forced, in every context of the texts; repetition is that of greedy
    continuations. Beside these stands the bias over all tokens that brings the base nearest to the
    tuned model (in KL), fitted on either half of the texts and read on the other.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; or an open `Pair` and the
            texts.
        texts: what `compare_models` takes; the shift and the agreement are measured on them.
        k: how many of the most promoted tokens get a bias; special tokens never do.
        alphas: strengths of the bias.
        n_prompts: how many texts, drawn at random, are continued greedily.
        prompt_tokens: how many of their first tokens are the prompt, BOS included; of
            conversations all before the assistant's last turn is.
        max_new_tokens: how many are added to it; an end-of-text token counts as any other.
        max_length: tokens per text.
        batch_size: texts or prompts per forward pass.
        seed: of the choice of prompts and of the controls.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Returns:
        A `StaticBiasResult`: agreement and repetition for every bias and α, what each bias adds to
        the agreement, and how repetition changes with α.

    Raises:
        HyperlensError: if a source cannot be opened, the texts do not fit the models, there is
            no room for the continuations, or an option makes no sense.
    """
    check_counts(k=k, batch_size=batch_size)
    check_seed(seed)
    strengths = check_alphas(alphas)
    inputs = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    pair = inputs.pair
    check_room(pair, prompt_tokens, max_new_tokens)
    prompts = choose_prompts(
        inputs.corpus, n_prompts, prompt_tokens, seed, max_new_tokens=max_new_tokens
    )
    contexts = read_contexts(
        pair.base.hooked, pair.tuned.hooked, inputs.corpus, batch_size, progress
    )
    shift = mean_shift(contexts, progress)
    allowed = _allowed(pair, len(shift.delta))
    chosen = promoted(shift.rank_gain, allowed, k)
    bias = biases(shift, chosen, allowed, seed)
    conditions: dict[Condition, Tensor] = {
        (name, alpha): alpha * bias[name] for name in BIASES for alpha in strengths
    }
    fitted = fit_biases(contexts, progress)
    tested = conditions if fitted is None else {**conditions, FITTED: fitted}
    units = _predictions(contexts, tested, progress)
    runner = GenerationRunner(prompts, max_new_tokens, batch_size, seed, progress)
    units |= dict(_repetitions(pair, conditions, runner))
    options = {
        "k": k,
        "alphas": list(strengths),
        "n_prompts": len(prompts),
        "prompt_tokens": prompt_lengths(inputs.corpus, prompts, prompt_tokens),
        "max_new_tokens": max_new_tokens,
        "max_length": inputs.corpus.max_length,
        "batch_size": batch_size,
    }
    notes = _notes(k, len(chosen), int(allowed.sum()), shift.rank_gain[chosen])
    meta = inputs.metadata(seed=seed, options=options, notes=notes)
    meta["corpus"]["n_contexts"] = len(contexts)
    return StaticBiasResult(
        table=tuple(
            {"bias": bias, "alpha": alpha, "metric": metric} | estimate(values)._asdict()
            for (bias, alpha, metric), values in units.items()
        ),
        extras={
            "static_share": shift.static_share,
            "gains": _gains(units, "agreement_tuned"),
            "kl_gains": _gains(units, "kl_tuned"),
            "trends": _trends(units, strengths),
            "k_used": len(chosen),
            "promoted": _listed(pair, shift, chosen[:LISTED].tolist()),
        },
        meta=meta,
    )


def check_alphas(alphas: Any) -> tuple[float, ...]:
    """Strengths of a bias, in order.

    Raises:
        ProbeError: if there is none, or one is 0, repeated or no finite number.

    >>> check_alphas([0.5, 0.1])
    (0.1, 0.5)
    """
    try:
        numbers = [float(alpha) for alpha in alphas]
    except (TypeError, ValueError):
        numbers = []
    distinct = sorted(set(numbers))
    is_valid = numbers and len(distinct) == len(numbers) and 0.0 not in distinct
    if not is_valid or not all(map(math.isfinite, distinct)):
        raise ProbeError(
            "alphas must be different finite numbers other than 0 (the base itself is always "
            f"measured), got {alphas}"
        )
    return tuple(distinct)


class Shift(NamedTuple):
    """How tuning moves each token on average over contexts.

    Attributes:
        delta: mean shift of its centred logit.
        rank_gain: mean number of places that it rises.
        level: mean shift of the mean logit, which centring takes away.
        static_share: share of the mean squared shift that all contexts have in common, 1 for a
            constant bias and about 0 for shifts that cancel out. The squared mean is estimated
            by the product of two halves of the texts, or noise would count as common to all; so
            it can be slightly negative.
    """

    delta: Float[Tensor, " d_vocab"]
    rank_gain: Float[Tensor, " d_vocab"]
    level: float
    static_share: float


def mean_shift(contexts: Contexts, progress: bool) -> Shift:
    """The mean shift from base to tuned over all contexts."""
    halves = torch.zeros(2, contexts.d_vocab, dtype=torch.float64)
    gain = torch.zeros_like(halves[0])
    counts, square, level = torch.zeros(2, dtype=torch.float64), 0.0, 0.0
    for rows, base, tuned in contexts.rows("logit shift", progress):
        shift = centred(tuned) - centred(base)
        half = (contexts.text[rows] % 2).to(shift.device)
        halves += torch.stack([shift[half == i].sum(0) for i in (0, 1)]).cpu()
        counts += torch.bincount(half.cpu(), minlength=2)
        square += float(shift.square().sum())
        level += float((tuned.double().mean(-1) - base.double().mean(-1)).sum())
        gain += (average_ranks(tuned).double() - average_ranks(base).double()).sum(0).cpu()
    n = counts.sum()
    product = float((halves[0] / counts[0]) @ (halves[1] / counts[1]))
    share = product / (square / float(n)) if square else float("nan")
    return Shift(halves.sum(0) / n, gain / n, level / float(n), share)


def centred(logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
    """Each row minus its mean, in float64.

    >>> centred(torch.tensor([[1.0, 2.0, 6.0]])).tolist()
    [[-2.0, -1.0, 3.0]]
    """
    z = logits.to(torch.float64)
    return z - z.mean(-1, keepdim=True)


def _allowed(pair: Pair, d_vocab: int) -> Bool[Tensor, " d_vocab"]:
    """Which tokens may get a bias: all but the special ones."""
    allowed = torch.ones(d_vocab, dtype=torch.bool)
    special = special_ids(pair.base.model, pair.tokenizer, d_vocab)
    allowed[[i for i in sorted(special) if i < d_vocab]] = False
    return allowed


def promoted(
    rank_gain: Float[Tensor, " d_vocab"], allowed: Bool[Tensor, " d_vocab"], k: int
) -> Int[Tensor, " k"]:
    """The k allowed tokens that rise most, or all of them; ties in the order of their ids.

    >>> promoted(torch.tensor([5.0, 1.0, 3.0]), torch.tensor([False, True, True]), k=1).tolist()
    [2]
    """
    ids = allowed.nonzero()[:, 0]
    return ids[rank_gain[ids].sort(descending=True, stable=True).indices[:k]]


def biases(
    shift: Shift,
    chosen: Int[Tensor, " k"],
    allowed: Bool[Tensor, " d_vocab"],
    seed: int,
) -> dict[str, Float[Tensor, " d_vocab"]]:
    """The paper's bias in two forms, the largest static bias, and three controls.

    Softmax does not see a constant that is added to all logits, so a model's own level of logits
    means nothing. The paper's δ is not centred: added to some tokens only, that level counts.

    Returns:
        promoted: δ of the chosen tokens, centred, 0 elsewhere.
        uncentred: the same with the level left in, as the paper has it.
        all: δ of every token: what the hypothesis of a static bias says.
        random: δ of as many tokens drawn from the allowed ones.
        shuffled: the δ of the chosen tokens, permuted among them.
        constant: the mean of the chosen δ, the same for every token: no effect at all.
    """
    delta = shift.delta
    generator = torch.Generator().manual_seed(seed)
    ids = allowed.nonzero()[:, 0]
    drawn = ids[torch.randperm(len(ids), generator=generator)[: len(chosen)]]
    permuted = chosen[torch.randperm(len(chosen), generator=generator)]
    return {
        "promoted": _only(chosen, delta[chosen], len(delta)),
        "uncentred": _only(chosen, delta[chosen] + shift.level, len(delta)),
        "all": delta,
        "random": _only(drawn, delta[drawn], len(delta)),
        "shuffled": _only(chosen, delta[permuted], len(delta)),
        "constant": torch.full_like(delta, float(delta[chosen].mean())),
    }


def _only(
    ids: Int[Tensor, " k"], values: Float[Tensor, " k"], d_vocab: int
) -> Float[Tensor, " d_vocab"]:
    return torch.zeros(d_vocab, dtype=values.dtype).index_copy(0, ids, values)


class LogitBias(LogitsProcessor):
    """Add the same numbers to the logits at every step (z + αδ, equation 3 of the paper).

    Works in plain transformers: `model.generate(..., logits_processor=[LogitBias(bias)])`.

    Args:
        bias: one number per token.

    >>> add = LogitBias(torch.tensor([0.0, 2.0]))
    >>> add(torch.tensor([[1]]), torch.tensor([[1.0, 1.0]])).tolist()
    [[1.0, 3.0]]
    """

    def __init__(self, bias: Float[Tensor, " d_vocab"]) -> None:
        self.bias = bias

    def __call__(
        self, input_ids: Int[Tensor, "batch pos"], scores: Float[Tensor, "batch d_vocab"]
    ) -> Float[Tensor, "batch d_vocab"]:
        if scores.shape[-1] != len(self.bias):
            raise ProbeError(
                f"the bias has {len(self.bias)} tokens and the model {scores.shape[-1]}: make it "
                "for this model"
            )
        return scores + self.bias.to(scores)


def _predictions(contexts: Contexts, conditions: Biases, progress: bool) -> Units:
    """How near each condition is to the tuned model and to the base, text by text.

    How often its top-1 token is that of either, and for the biases that are no controls
    KL(tuned ‖ condition) in nats.
    """
    every: list[Condition] = [("none", 0.0), *conditions, ("tuned", 0.0)]
    parts: dict[tuple[str, float, str], list[Tensor]] = defaultdict(list)
    for rows, base, tuned in contexts.rows("agreement", progress):
        expected = {"agreement_tuned": winner(tuned), "agreement_base": winner(base)}
        half = halves(contexts.text[rows])
        tuned_p, log_z = tuned.softmax(-1), tuned.logsumexp(-1)
        for condition in every:
            logits = tuned if condition[0] == "tuned" else base
            if condition in conditions:
                bias = conditions[condition]
                logits = base + (bias if bias.ndim == 1 else bias[half]).to(base)
            top1 = winner(logits)
            for metric, of in expected.items():
                parts[*condition, metric].append((top1 == of).double().cpu())
            if condition[0] in ("none", FITTED[0], *TESTED):
                # A weighted sum of differences, so that equal rows give exactly 0.
                shifts: Tensor = torch.linalg.vecdot(tuned - logits, tuned_p)
                kl = (shifts + logits.logsumexp(-1) - log_z).clamp_min(0.0)
                parts[*condition, "kl_tuned"].append(kl.double().cpu())
    return {key: contexts.per_text(torch.cat(values)) for key, values in parts.items()}


def _repetitions(
    pair: Pair,
    conditions: Mapping[Condition, Float[Tensor, " d_vocab"]],
    runner: GenerationRunner,
) -> Iterator[tuple[tuple[str, float, str], list[float]]]:
    runs = {condition: (pair.base, [LogitBias(bias)]) for condition, bias in conditions.items()}
    runs |= {("none", 0.0): (pair.base, []), ("tuned", 0.0): (pair.tuned, [])}
    for condition, (loaded, processors) in runs.items():
        generations = runner.run(loaded, processors)
        for metric in REPETITION_METRICS:
            yield (*condition, metric), generations.metrics[metric]


def _gains(units: Units, metric: str) -> list[dict[str, Any]]:
    """What each bias adds to a metric of the base, paired by text."""
    return [
        {"bias": bias, "alpha": alpha} | difference(values, units["none", 0.0, metric])._asdict()
        for (bias, alpha, measured), values in units.items()
        if measured == metric and bias not in ("none", "tuned")
    ]


def _trends(units: Units, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """Whether repetition rises or falls steadily with α, from the base itself (α = 0) on."""
    every = sorted([0.0, *alphas])
    trends = []
    for bias in BIASES:
        for metric in REPETITION_METRICS:
            columns = [units[bias if alpha else "none", alpha, metric] for alpha in every]
            trends.append({"bias": bias, "metric": metric} | trend(every, columns))
    return trends


def _listed(pair: Pair, shift: Shift, ids: list[int]) -> list[dict[str, Any]]:
    """The most promoted tokens with their gains."""
    return [
        {"id": i, "token": token, "rank_gain": gain, "delta": delta}
        for i, token, gain, delta in zip(
            ids,
            token_names(pair.tokenizer, ids),
            shift.rank_gain[ids].tolist(),
            shift.delta[ids].tolist(),
            strict=True,
        )
    ]


def _notes(k: int, used: int, allowed: int, gains: Float[Tensor, " k"]) -> list[str]:
    notes = [
        "δ is measured on the texts that agreement is judged on, which favours the bias; the "
        "fitted bias is judged on texts that it was not fitted on"
    ]
    if used < k:
        notes.append(
            f"K = {k} is more than the {allowed} tokens that are not special: all of them get a "
            "bias, and a random set of that size is the same set"
        )
    elif used > allowed / 2:
        notes.append(
            f"K = {k} is {used / allowed:.0%} of the {allowed} tokens that are not special: a "
            "random set of that size overlaps much with it"
        )
    fell = int((gains <= 0).sum())
    if fell:
        notes.append(f"{fell} of the {used} tokens with a bias did not rise on average")
    return notes


WORDS = {
    "promoted": "top K",
    "uncentred": "top K, uncentred",
    "all": "all tokens",
    "random": "random K",
    "shuffled": "shuffled δ",
    "constant": "constant",
    "none": "none",
    "fitted": "fitted on other texts",
    "ttr": "greedy TTR",
    "rep_2": "repeated bigrams, greedy",
    "agreement_tuned": "top-1 agreement with the tuned model",
    "kl_tuned": "KL(tuned ‖ base + bias), nats",
}
FORMS = {"agreement_tuned": PERCENT, "kl_tuned": NUMBER}
# A cell of a table whose caption names the unit.
CELL_POINTS = replace(POINTS, unit="")
TOP = 8
CONTROL_BAND = "controls, lowest to highest mean"


class StaticBiasResult(Result):
    """The base model with a fixed bias on its logits, beside controls and the tuned model.

    The table has a row per bias ("none", the base itself; "promoted", the paper's with δ centred;
    "uncentred", as the paper has it; "all"; the controls "random", "shuffled" and "constant";
    "tuned", the tuned model), α and metric (`ttr`, `rep_2`, `rep_3`: means over prompts;
    `agreement_tuned`, `agreement_base`, and for the biases that are no controls `kl_tuned`,
    KL(tuned ‖ base + bias) in nats: means over texts). The bias "fitted" (α = 1) was fitted on one
    half of the texts and read on the other, both ways; no text is generated with it.

    Extras: the static share of the logit change, what each bias adds to agreement and to the KL
    (`gains`, `kl_gains`), the trends over α, the most promoted tokens.
    """

    name: ClassVar[str] = "static_bias"
    title: ClassVar[str] = "Is it just a bias on some tokens?"
    columns: ClassVar[tuple[str, ...]] = (
        *("bias", "alpha", "metric"),
        *("value", "low", "high", "se", "n"),
    )

    @property
    def biases(self) -> list[str]:
        """The biases that were tried; results of earlier versions lack "uncentred"."""
        found = {row["bias"] for row in self.table}
        return [bias for bias in BIASES if bias in found]

    @property
    def tested(self) -> list[str]:
        """Those that are no controls."""
        return [bias for bias in self.biases if bias in TESTED]

    @property
    def alphas(self) -> list[float]:
        """The strengths that were tried, without 0."""
        alphas: list[float] = self.meta["options"]["alphas"]
        return alphas

    def trend(self, bias: str, metric: str) -> Mapping[str, Any]:
        """How a metric changes with α: see `hyperlens.statistics.significance.trend`.

        Raises:
            ResultsError: if it was not measured.
        """
        return self._extra("trends", bias=bias, metric=metric)

    def gain(self, bias: str, alpha: float) -> Mapping[str, Any]:
        """What a bias adds to the base's agreement with the tuned model, paired by text.

        Raises:
            ResultsError: if it was not measured.
        """
        return self._extra("gains", bias=bias, alpha=alpha)

    def kl_gain(self, bias: str, alpha: float) -> Mapping[str, Any]:
        """What a bias adds to KL(tuned ‖ base), paired by text: below 0 where it brings it nearer.

        Raises:
            ResultsError: if it was not measured.
        """
        return self._extra("kl_gains", bias=bias, alpha=alpha)

    @property
    def fitted(self) -> Mapping[str, Any] | None:
        """Agreement with the fitted bias; None if there is none, as in results of version 0.1."""
        bias, alpha = FITTED
        return next(iter(self.rows(bias=bias, alpha=alpha, metric="agreement_tuned")), None)

    def _extra(self, key: str, **wanted: Any) -> Mapping[str, Any]:
        for row in matching(self.extras[key], wanted):
            return dict(row)
        raise ResultsError(
            f"no {key} of {wanted}: biases are {', '.join(self.biases)}, alphas "
            f"{', '.join(map(str, self.alphas))} and metrics {', '.join(REPETITION_METRICS)}"
        )

    def best(self) -> Mapping[str, Any]:
        """The bias, controls left out, whose top-1 tokens agree most with the tuned model's."""
        return self._highest(self.tested, "agreement_tuned")

    def _highest(self, of: Sequence[str], metric: str) -> Mapping[str, Any]:
        rows = [self.at(bias=bias, alpha=a, metric=metric) for bias in of for a in self.alphas]
        return max(rows, key=lambda row: row["value"])

    def _reference(self, side: str, metric: str) -> Mapping[str, Any]:
        return self.at(bias=side, alpha=0.0, metric=metric)

    def verdicts(self) -> list[Verdict]:
        """How far the best bias gets in predictions, and what biases and controls do to text."""
        return [
            Verdict("predictions", self._predictions()),
            *self._of_fitted(),
            Verdict("generated text", self._text()),
            Verdict(
                "not to be concluded",
                "Not to be concluded: that more diverse text resembles the tuned model's, which "
                "only agreement measures; or, from α below 1 alone, that the tuned model is not "
                "base plus bias: that is reproduced at α = 1.",
                caution=True,
            ),
        ]

    def _predictions(self) -> str:
        base, best = self._reference("none", "agreement_tuned"), self.best()
        gain = self.gain(best["bias"], best["alpha"])
        if base["value"] == 1.0:
            return (
                "The two models' top-1 predictions are the same in every context: there is no "
                "change to explain."
            )
        if best["value"] > 0.999:
            return (
                "As far as top-1 predictions tell, the tuned model is the base plus a bias: they "
                f"agree in {PERCENT(best['value'])} of contexts with the bias "
                f"({_condition(best)}), in {PERCENT(base['value'])} without."
            )
        control = self._highest(CONTROLS, "agreement_tuned")
        adds = (
            f"The best of {len(self.tested) * len(self.alphas)} biases tried ({_condition(best)}) "
            f"adds {interval(gain, POINTS)} to the {PERCENT(base['value'])} of top-1 predictions "
            "that agree with the tuned model's without one, the best control "
            f"({_condition(control)}) "
            f"{interval(self.gain(control['bias'], control['alpha']), POINTS)}"
        )
        if not gain["low"] > 0:
            return f"{adds}: no clear gain."
        explained = gain["value"] / (1 - base["value"])
        return f"{adds}: net, the bias accounts for {PERCENT(explained)} of what changed."

    def _of_fitted(self) -> list[Verdict]:
        base, fitted = self._reference("none", "agreement_tuned"), self.fitted
        if fitted is None or base["value"] == 1.0:
            return []
        gain, nearer = self.gain(*FITTED), self.kl_gain(*FITTED)
        before, after = (self.value(bias=bias, alpha=alpha, metric="kl_tuned")
                         for bias, alpha in (("none", 0.0), FITTED))  # fmt: skip
        found = (
            "The bias that brings the base nearest to the tuned model, fitted on one half of the "
            f"texts and read on the other, both ways: agreement {PERCENT(base['value'])} → "
            f"{PERCENT(fitted['value'])} ({interval(gain, POINTS)}), KL(tuned ‖ base) "
            f"{NATS(before)} → {NATS(after)} ({interval(nearer, SIGNED_NATS)})"
        )
        if fitted["value"] > 0.999:
            end = "as far as top-1 predictions tell, the tuned model is the base plus this bias."
        elif gain["low"] > 0:
            explained = gain["value"] / (1 - base["value"])
            end = (
                f"net, it accounts for {PERCENT(explained)} of what changed. With more texts to "
                "fit it on it may account for somewhat more."
            )
        else:
            end = "no clear gain in predictions."
        return [Verdict("fitted bias", f"{found}: {end}")]

    def _text(self) -> str:
        base, tuned = (self._reference(side, "ttr") for side in ("none", "tuned"))
        bias, control = (self._highest(of, "ttr") for of in (self.tested, CONTROLS))
        return (
            f"Greedy TTR is {FRACTION(base['value'])} for the base and {FRACTION(tuned['value'])} "
            f"for the tuned model. The most diverse bias tried ({_condition(bias)}) reaches "
            f"{interval(bias, FRACTION)}, the most diverse control ({_condition(control)}) "
            f"{interval(control, FRACTION)}."
        )

    def evidence(self) -> list[Block]:
        """What was added, what it does to predictions and text at every α, and trends."""
        return [
            Text(self._method()),
            Heading("Predictions on the same texts"),
            self._gain_table(),
            *self._nearest(),
            Heading("Generated text"),
            self._text_table(),
            Grid([self._chart(metric) for metric in ("ttr", "rep_2", "agreement_tuned")]),
            Details(
                "every bias at every α",
                [self._full_table(metric) for metric in ("ttr", "rep_2", "agreement_tuned")],
            ),
            Details("trends over α", [self._trend_table(metric) for metric in ("ttr", "rep_2")]),
            Details("the most promoted tokens", [self._promoted_table()]),
        ]

    def _method(self) -> str:
        tokens = ", ".join(repr(token["token"]) for token in self.extras["promoted"][:TOP])
        k = self.extras["k_used"]
        return (
            "α times the mean logit shift δ is added to the base model's logits, for the "
            f"{count(k, 'most promoted token')} (top K; first {tokens}) or for all tokens. "
            f"Controls: δ of {count(k, 'random token')}, the top K's δ shuffled among them, their "
            "mean on every token. "
            f"{PERCENT(self.extras['static_share'])} of the mean squared change of the centred "
            "logits is the same in every context; tokens that are never predicted count in it as "
            "much as others."
        )

    def _gain_table(self) -> Table:
        rows = [
            [
                _alpha(alpha),
                *(interval(self.gain(bias, alpha), CELL_POINTS) for bias in self.biases),
            ]
            for alpha in self.alphas
        ]
        base = self._reference("none", "agreement_tuned")
        caption = (
            "percentage points that a bias adds to top-1 agreement with the tuned model, mean over "
            f"{base['n']:,} texts [95% interval, paired by text]; the base alone agrees in "
            f"{interval(base, PERCENT)}. Of many biases one is highest by chance: the best one's "
            "interval is optimistic."
        )
        return Table(["", *(WORDS[bias] for bias in self.biases)], rows, caption)

    def _nearest(self) -> list[Block]:
        """The best α of either injected bias beside the fitted one."""
        if self.fitted is None:
            return []
        best = [self._highest([bias], "agreement_tuned") for bias in self.tested]
        tried = [("none", 0.0), *((row["bias"], row["alpha"]) for row in best), FITTED]
        rows = [
            [
                f"{WORDS[bias]}{f', {_alpha(alpha)}' if bias in self.tested else ''}",
                self._cell(bias, alpha, "agreement_tuned"),
                self._cell(bias, alpha, "kl_tuned"),
            ]
            for bias, alpha in tried
        ]
        caption = (
            "mean over texts [95% interval]; α with the highest agreement. The fitted bias is the "
            "one of least KL, with a Gaussian prior (σ = 3 nats), each text read with the bias "
            "of the half that it is not in"
        )
        head = ["bias", WORDS["agreement_tuned"], WORDS["kl_tuned"]]
        return [Table(head, rows, caption)]

    def _text_table(self) -> Table:
        """TTR of the biases, and the range of the controls."""
        base, tuned = (self._reference(side, "ttr") for side in ("none", "tuned"))
        rows = [
            [
                _alpha(alpha),
                *(self._cell(bias, alpha, "ttr") for bias in self.tested),
                span(*self._control_range(alpha, "ttr"), FRACTION),
            ]
            for alpha in self.alphas
        ]
        caption = (
            f"{WORDS['ttr']} (distinct tokens / tokens), mean over {base['n']:,} prompts [95% "
            f"interval]; {self.base_name} {interval(base, FRACTION)}, {self.tuned_name} "
            f"{interval(tuned, FRACTION)}"
        )
        return Table(["", *(WORDS[bias] for bias in self.tested), CONTROL_BAND], rows, caption)

    def _cell(self, bias: str, alpha: float, metric: str) -> str:
        return interval(self.at(bias=bias, alpha=alpha, metric=metric), FORMS.get(metric, FRACTION))

    def _control_range(self, alpha: float, metric: str) -> tuple[float, float]:
        means = [self.value(bias=bias, alpha=alpha, metric=metric) for bias in CONTROLS]
        return min(means), max(means)

    def _chart(self, metric: str) -> Chart:
        """A metric over α: both biases, the range of the controls, base and tuned model."""
        rows = [
            {"series": WORDS[bias], "alpha": alpha, **ends(row), "n": row["n"]}
            for bias in self.tested
            for alpha in self.alphas
            for row in [self.at(bias=bias, alpha=alpha, metric=metric)]
        ]
        for alpha in self.alphas:
            low, high = self._control_range(alpha, metric)
            middle = sorted(self.value(bias=b, alpha=alpha, metric=metric) for b in CONTROLS)[1]
            band = {"value": middle, "low": low, "high": high}
            rows.append({"series": CONTROL_BAND, "alpha": alpha, **band, "n": len(CONTROLS)})
        roles: dict[str, Role] = {CONTROL_BAND: "control"}
        roles |= {WORDS[bias]: "other" for bias in self.tested}
        scale: Scale = "log" if min(self.alphas) > 0 else "data"
        x = Axis("alpha", "α, strength of the bias", scale)
        title = f"{WORDS[metric]} [95%]"
        alt = f"{title}, over α from {self.alphas[0]:g} to {self.alphas[-1]:g}"
        y = Axis("value", "0 to 1, no unit", "share")
        return Chart("lines", title, alt, rows, x, y, roles, self._references(metric))

    def _references(self, metric: str) -> list[Reference]:
        sides: tuple[tuple[str, str, Role], ...] = (
            ("none", self.base_name, "base"),
            ("tuned", self.tuned_name, "tuned"),
        )
        return [
            Reference(name, **ends(self._reference(side, metric)), role=role)
            for side, name, role in sides
        ]

    def _full_table(self, metric: str) -> Table:
        rows = [
            [_alpha(alpha), *(self._cell(bias, alpha, metric) for bias in self.biases)]
            for alpha in self.alphas
        ]
        base, tuned = (self._cell(side, 0.0, metric) for side in ("none", "tuned"))
        caption = (
            f"{WORDS[metric]} [95% interval]; {self.base_name} {base}, {self.tuned_name} {tuned}"
        )
        return Table(["", *(WORDS[bias] for bias in self.biases)], rows, caption)

    def _trend_table(self, metric: str) -> Table:
        trends = [self.trend(bias, metric) for bias in self.biases]
        rows = [
            ["ρ of the means with α", *map(_trend, trends)],
            [
                "mean of each prompt's ρ [95%]",
                *(interval(t["per_unit"], SIGNED_FRACTION) for t in trends),
            ],
        ]
        caption = (
            f"Spearman's ρ between α, from 0 on, and {WORDS[metric]}; n/a where nothing varies. p "
            "counts all orders of the means; it ignores how much prompts differ, so that such a "
            "trend alone is weak evidence."
        )
        return Table(["", *(WORDS[bias] for bias in self.biases)], rows, caption)

    def _promoted_table(self) -> Table:
        rows = [
            [repr(token["token"]), SIGNED(token["rank_gain"]), SIGNED(token["delta"])]
            for token in self.extras["promoted"]
        ]
        return Table(["token", "mean places gained", "mean logit shift"], rows)


def _condition(row: Mapping[str, Any]) -> str:
    return f"{WORDS[row['bias']]}, {_alpha(row['alpha'])}"


def _alpha(alpha: float) -> str:
    return f"α = {alpha:g}"


def _trend(trend: Mapping[str, Any]) -> str:
    if math.isnan(trend["rho"]):
        return MISSING
    p = trend["p_exact"] if math.isfinite(trend["p_exact"]) else trend["p"]
    return f"{SIGNED_FRACTION(trend['rho'])}, {p_value(p)}"
