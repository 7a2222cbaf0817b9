"""Is it more than a random change would do? The tuned model beside random changes of its size.

Any change of the weights moves the residual stream, changes its effective dimension and reorders
ranks. What tuning did is what it did beyond that. What counts as a change of the same kind is a
choice, so there are several controls: of the same size in the weights or in the stream, with or
without the same rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import check_choice, check_counts, check_seed, check_types
from ..data.corpus import Corpus
from ..decoding.diversity import REPETITION_METRICS
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import check_room, choose_prompts, lengths_in_words, prompt_lengths
from ..errors import HyperlensError, PairError, ResultsError
from ..hooks.loading import LoadedModel, hook
from ..models.sources import OpenedModel
from ..models.weight_sharing import is_tied, merged, token_tables, untie, weight_sharing_copy
from ..pair import Inputs, open_inputs
from ..passes.multi_pass import run_passes
from ..passes.streaming import PassOptions
from ..passes.streams import View
from ..probes import LogitLens, ParticipationRatio, Probe, RankReordering, ResidualDrift
from ..render.blocks import Axis, Block, Chart, Grid, Role, Table, Text, Verdict
from ..render.format import (
    COSINE,
    DIMENSIONS,
    DISTANCE,
    FRACTION,
    MISSING,
    NATS,
    PERCENT,
    Form,
    count,
    p_value,
    span,
)
from ..results.result import Result, unknown
from ..statistics.significance import estimate, holm
from ..statistics.spectrum import orthogonal

EXAMPLES = (
    "hyperlens null-test ./base ./tuned --texts held_out.txt --out null-test",
    "hyperlens null-test ./base ./lora-adapter --texts owner/dataset --limit 200 --n-controls 99",
    "hyperlens null-test ./base ./tuned --texts held_out.txt --controls rotations,entries",
)

VIEWS: tuple[View, ...] = ("raw", "final_norm")
GREEDY = "greedy text"
MEASURED = {
    "drift": ("cosine", "relative_l2"),
    "participation_ratio": ("delta",),
    "rank_reordering": ("top1_agreement", "spearman", "rank_gt_10"),
    "logit_lens": ("kl",),
}
SINK_THRESHOLD = 10.0
RESCALED = "_rescaled"
CONTROLS = (
    *("rows_and_columns", "rotations", "entries"),
    *("rows_and_columns_rescaled", "rotations_rescaled", "entries_rescaled"),
)
DEFAULT_CONTROLS = ("rows_and_columns", "rows_and_columns_rescaled")
# The factor of a rescaled control is found on so many texts, to this share of the distance.
SCALED_ON, SCALED_WITHIN, MOST_STEPS = 16, 0.02, 8


@check_types
def run_null_test(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    controls: Sequence[str] = DEFAULT_CONTROLS,
    n_controls: int = 19,
    max_length: int = 256,
    n_prompts: int = 32,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> NullTestResult:
    """Does the tuned model do more than random changes of the same size?

    A control is the base plus the tuned model's change with its structure lost, tensor by tensor.
    In embeddings and unembeddings rows stay where they are: a change stays with its tokens. p is
    the share of all models, the tuned one among them, that lie as far from their common mean: with
    k controls never below 1 / (k + 1).

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; or an open `Pair` and the
            texts. Adapters are merged.
        texts: what `compare_models` takes; prompts are their first tokens.
        controls: kinds of control. "rows_and_columns" shuffles rows and columns of each change,
            which keeps its norm, rank, singular values and entries; "rotations" rotates it at
            random from both sides, which keeps all of these but the entries; "entries" shuffles
            single entries, which makes a change of low rank, as LoRA's, one of full rank. With
            "_rescaled" at the end, all tensors' changes are scaled by one factor until the raw
            stream at the last layer moves as far as in the tuned model.
        n_controls: how many random changes of each kind; one is held in memory at a time.
        max_length: tokens per text, BOS included.
        n_prompts: how many texts, drawn at random, are continued greedily.
        prompt_tokens: how many of their first tokens are the prompt, BOS included; of
            conversations all before the assistant's last turn is.
        max_new_tokens: how many are added to it.
        batch_size: texts per forward pass.
        seed: of the first control, of the choice of prompts and of the token sample; the other
            controls count on from it.
        device, dtype: as in `compare_models`.
        progress: show a progress bar.

    Returns:
        A `NullTestResult`: every statistic of the tuned model beside its range over the controls.

    Raises:
        PairError: if nothing changed, or the models differ in the shapes of their weights.
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    check_counts(n_controls=n_controls, batch_size=batch_size)
    check_seed(seed)
    kinds = _checked_kinds(controls)
    inputs = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    check_room(inputs.pair, prompt_tokens, max_new_tokens)
    prompts = choose_prompts(
        inputs.corpus, n_prompts, prompt_tokens, seed, max_new_tokens=max_new_tokens
    )
    generation = GenerationRunner(prompts, max_new_tokens, batch_size, seed, progress=False)
    options = PassOptions(batch_size, SINK_THRESHOLD, seed, False)
    random = RandomChanges(inputs, options)
    seeds = list(range(seed, seed + n_controls))
    measured: dict[str, list[dict[Key, float]]] = {kind: [] for kind in kinds}
    factors: dict[str, list[float]] = {kind: [] for kind in kinds}
    total = 1 + len(kinds) * n_controls
    with tqdm(total=total, desc="null test", unit="model", disable=not progress) as bar:
        tuned_values = _measure(inputs, inputs.pair.tuned, options, generation)
        bar.update()
        for kind in kinds:
            for one in seeds:
                model, factor = random.model(kind, one)
                measured[kind].append(_measure(inputs, model, options, generation))
                factors[kind].append(factor)
                bar.update()
    base_text = generation.run(inputs.pair.base)
    meta = inputs.metadata(
        seed=seed,
        options={
            "controls": list(kinds),
            "n_controls": n_controls,
            "max_length": max_length,
            "n_prompts": len(prompts),
            "prompt_tokens": prompt_lengths(inputs.corpus, prompts, prompt_tokens),
            "max_new_tokens": max_new_tokens,
        },
    )
    norms = [float(change.norm()) for change in random.changes.values()]
    extras = {
        "base": {
            metric: estimate(base_text.metrics[metric]).value for metric in REPETITION_METRICS
        },
        "changed_tensors": len(random.changes),
        "norm_of_change": math.sqrt(sum(norm**2 for norm in norms)),
        "control_seeds": seeds,
        "factors": factors,
    }
    table = (row for kind in kinds for row in _table(kind, tuned_values, measured[kind]))
    return NullTestResult(tuple(table), extras, meta)


def _checked_kinds(controls: Sequence[str]) -> tuple[str, ...]:
    kinds = (controls,) if isinstance(controls, str) else tuple(dict.fromkeys(controls))
    if not kinds:
        raise HyperlensError(f"controls is empty: give some of {', '.join(CONTROLS)}")
    for kind in kinds:
        check_choice("controls", kind, CONTROLS)
    return kinds


def changed_tensors(base: nn.Module, tuned: nn.Module) -> dict[str, Tensor]:
    """tuned - base of every parameter that differs, float32; tied weights once.

    Raises:
        PairError: if the parameters differ in name or shape.
    """
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    if {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in after.items()}:
        raise PairError(
            "the two models have weights of other shapes: controls need a pair of one architecture"
        )
    changes = {name: after[name].detach().float() - before[name].detach().float() for name in after}
    return {name: change for name, change in changes.items() if bool(change.any())}


def randomly_changed(
    base: nn.Module,
    changes: dict[str, Tensor],
    seed: int,
    kind: str = "rows_and_columns",
    factor: float = 1.0,
) -> Any:
    """The base with every change shuffled or rotated inside its tensor, times a factor.

    Unchanged tensors are shared with the base.

    Args:
        base: the plain model.
        changes: of its tensors, by name.
        seed: of the random change.
        kind: "rows_and_columns", "rotations" or "entries".
        factor: what every change is multiplied by.
    """
    generator = torch.Generator().manual_seed(seed)
    model = weight_sharing_copy(base)
    parameters = dict(model.named_parameters())
    by_token = _token_tables(base)
    with torch.no_grad():
        for name, change in changes.items():
            # Of the last two axes: a mixture of experts has one matrix per expert.
            has_rows = change.ndim > 1 and name not in by_token
            if kind == "entries":
                made = _permuted(change.flatten(), 0, generator).view_as(change)
            elif kind == "rotations" and change.ndim > 1:
                turned = change @ _rotation(change.shape[-1], generator).to(change)
                rows = _rotation(change.shape[-2], generator) if has_rows else None
                made = turned if rows is None else rows.to(change) @ turned
            else:
                rows = _permuted(change, -2, generator) if has_rows else change
                made = _permuted(rows, -1, generator)
            old = parameters[name]
            new = old.detach().float() + factor * made
            old.data = new.to(old.dtype)  # new storage: base stays
    return model


def _permuted(values: Tensor, axis: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(values.shape[axis], generator=generator).to(values.device)
    return values.index_select(axis, order)


def _rotation(n: int, generator: torch.Generator) -> Tensor:
    """A random rotation or reflection (float32, Haar measure)."""
    return orthogonal(torch.randn(n, n, generator=generator))


def _token_tables(model: Any) -> set[str]:
    """Names of the embedding's and the unembedding's weights, [d_vocab, d_model].

    Their rows stay in place: moved to tokens that no text has, a change would do nothing.
    """
    weights = {id(table.weight) for table in token_tables(model)}
    return {name for name, weight in model.named_parameters() if id(weight) in weights}


class RandomChanges:
    """Makes controls, and finds the factors of rescaled ones.

    Args:
        inputs: the pair, whose change is made random, and texts to rescale on.
        options: of the passes over them.

    Raises:
        PairError: if nothing changed, or the models differ in the shapes of their weights.
    """

    def __init__(self, inputs: Inputs, options: PassOptions) -> None:
        self._inputs, self._options = inputs, options
        self._base, tuned = merged(inputs.pair.base.model), merged(inputs.pair.tuned.model)
        if is_tied(self._base) and not is_tied(tuned):
            untie(self._base)  # as merging an adapter of one of two tied weights does
        self.changes = changed_tensors(self._base, tuned)
        if not self.changes:
            raise PairError(
                "the two models have the same weights: there is no change to compare random "
                "changes to"
            )
        self._corpus = _some(inputs.corpus, SCALED_ON)
        self._wanted: float | None = None

    def model(self, kind: str, seed: int) -> tuple[LoadedModel, float]:
        """A control, hooked, and the factor that its changes are multiplied by."""
        plain = kind.removesuffix(RESCALED)
        model = self._hooked(plain, seed, 1.0)
        if plain == kind:
            return model, 1.0
        if self._wanted is None:
            self._wanted = self._distance(self._inputs.pair.tuned)
        # The secant method on log scales, where the distance is nearly a straight line of slope 1.
        factor, slope, nearest = 1.0, 1.0, (math.inf, 1.0, model)
        last: tuple[float, float] | None = None
        for _ in range(MOST_STEPS):
            distance = self._distance(model)
            if not distance > 0:
                break
            gap, at = math.log(distance / self._wanted), math.log(factor)
            nearest = min(nearest, (abs(gap), factor, model), key=lambda one: one[0])
            if abs(gap) <= SCALED_WITHIN:
                break
            if last is not None and at != last[0]:
                slope = min(max((gap - last[1]) / (at - last[0]), 0.5), 8.0)
            last, factor = (at, gap), math.exp(at - gap / slope)
            model = self._hooked(plain, seed, factor)
        _, factor, model = nearest
        return model, factor

    def _hooked(self, kind: str, seed: int, factor: float) -> LoadedModel:
        model = randomly_changed(self._base, self.changes, seed, kind, factor)
        tokenizer = self._inputs.pair.base.tokenizer
        return hook(OpenedModel(model, tokenizer, f"control {seed}", "object"), "residual")

    def _distance(self, model: LoadedModel) -> float:
        """Relative L2 distance of the raw streams at the last layer."""
        base, probes = self._inputs.pair.base.hooked, [ResidualDrift(layers=(-1,))]
        outcome = run_passes(base, model.hooked, self._corpus, probes, self._options)
        rows = outcome.results["drift"].rows
        return next(r.value for r in rows if (r.metric, r.view) == ("relative_l2", "raw"))


def _some(corpus: Corpus, n: int) -> Corpus:
    """Some of the texts, of all lengths."""
    return corpus.take(range(0, len(corpus.sequences), -(-len(corpus.sequences) // n)))


Key = tuple[str, int, str]


def _measure(
    inputs: Inputs, model: LoadedModel, options: PassOptions, generation: GenerationRunner
) -> dict[Key, float]:
    """Every statistic of one model against the base."""
    base = inputs.pair.base.hooked
    probes: list[Probe] = [
        ResidualDrift(),
        ParticipationRatio(views=VIEWS),
        RankReordering(),
        LogitLens(layers=(-1,)),
    ]
    outcome = run_passes(base, model.hooked, inputs.corpus, probes, options)
    statistics = {
        (row.metric, row.layer, row.view): row.value
        for result in outcome.results.values()
        for row in result.rows
        if row.metric in MEASURED[row.probe] and row.view in VIEWS
    }
    text = generation.run(model).metrics
    return statistics | {
        (metric, base.cfg.n_layers, GREEDY): estimate(text[metric]).value
        for metric in REPETITION_METRICS
    }


def _table(
    kind: str, tuned: dict[Key, float], controls: Sequence[dict[Key, float]]
) -> Iterator[dict[str, Any]]:
    for (metric, layer, view), value in tuned.items():
        others = [one[metric, layer, view] for one in controls]
        yield {
            "metric": metric,
            "layer": layer,
            "view": view,
            "control": kind,
            "tuned": value,
            "control_mean": sum(others) / len(others),
            "control_low": min(others),
            "control_high": max(others),
            "n_controls": len(others),
            "p": rank_p(value, others),
        }


def rank_p(value: float, others: Sequence[float]) -> float:
    """Two-sided p that a value is one of the others, from how far all lie from their common mean.

    The share of all, this one among them, that lie at least as far: exact where they are
    exchangeable, and never below 1 / (n + 1). NaN where one is not finite.

    >>> rank_p(9.0, [1.0, 2.0, 3.0])
    0.25
    """
    every = [value, *others]
    if not all(map(math.isfinite, every)):
        return math.nan
    mean = sum(every) / len(every)
    far = [abs(one - mean) for one in every]
    rounding = 1e-12 * max(map(abs, every))
    return sum(one >= far[0] - rounding for one in far) / len(every)


class Measure(NamedTuple):
    """A statistic at the last layer: how it is called and written.

    Attributes:
        metric, view: as in the table.
        words: its row of the table that is shown.
        form: how its values are written.
        of_base: its value for the base compared with itself; None for what is measured on the
            base's own text.
    """

    metric: str
    view: str
    words: str
    form: Form
    of_base: float | None = None


# What greedy decoding writes comes first: it is what people notice of a tuned model.
MEASURES = (
    Measure("ttr", GREEDY, "greedy type-token ratio (TTR)", FRACTION),
    Measure("rep_2", GREEDY, "greedy repeated bigrams", FRACTION),
    Measure("rep_3", GREEDY, "greedy repeated trigrams", FRACTION),
    Measure("top1_agreement", "final_norm", "top-1 prediction is the base's", PERCENT, 1.0),
    Measure("rank_gt_10", "final_norm", "top-1 from below base rank 10", PERCENT, 0.0),
    Measure("spearman", "final_norm", "Spearman's ρ over the vocabulary", COSINE, 1.0),
    Measure("kl", "final_norm", "KL(model ‖ base)", NATS, 0.0),
    Measure("delta", "raw", "Δ effective dimension, raw", DIMENSIONS, 0.0),
    Measure("delta", "final_norm", "Δ effective dimension, final norm", DIMENSIONS, 0.0),
    Measure("relative_l2", "raw", "relative L2 distance, raw", DISTANCE, 0.0),
)
# What the verdicts are about: (metric, view) to topic and words in a sentence.
JUDGED = {
    ("ttr", GREEDY): ("real?", "greedy TTR"),
    ("rep_2", GREEDY): ("real?", "greedy repeated bigrams"),
    ("top1_agreement", "final_norm"): ("output", "the share of the base's top-1 predictions"),
    ("delta", "raw"): (
        "dimension",
        "the raw stream's effective dimension at the last layer, all blocks together",
    ),
}
LAYERS = (
    ("relative_l2", "raw", "relative L2 distance of the raw streams"),
    ("delta", "raw", "Δ effective dimension, raw residual stream"),
    ("delta", "final_norm", "Δ effective dimension, after the final norm"),
)


# What a kind of control is called in a sentence, and in a table.
IN_WORDS = {
    "rows_and_columns": "random changes of the same size and rank",
    "rotations": "random changes of the same size and rank (rotated)",
    "entries": "random changes of the same size (entries shuffled)",
}
AS_FAR = "scaled to move the stream as far as tuning does"
IN_TABLE = {
    "rows_and_columns": "rows and columns shuffled",
    "rotations": "rotated",
    "entries": "entries shuffled",
}


class NullTestResult(Result):
    """Every statistic of the tuned model, and its range over random changes of the same size.

    The table has a row per kind of control, metric, layer and view ("greedy text" for what
    continuations measure): the tuned model's value, mean, least and greatest of the controls', and
    the rank `p` of the tuned model among them, not corrected for the number of rows.

    Extras: `base`, the base's own greedy text; how many `changed_tensors` there are and the
    `norm_of_change`; `control_seeds`; the `factors` of each kind.
    """

    name: ClassVar[str] = "null_test"
    title: ClassVar[str] = "Is it more than a random change would do?"
    columns: ClassVar[tuple[str, ...]] = (
        *("metric", "layer", "view", "control", "tuned"),
        *("control_mean", "control_low", "control_high", "n_controls", "p"),
    )
    renamed: ClassVar[Mapping[str, str]] = {
        "placebo_mean": "control_mean",
        "placebo_low": "control_low",
        "placebo_high": "control_high",
        "n_placebos": "n_controls",
        "placebo_seeds": "control_seeds",
    }

    @classmethod
    def from_format_1(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Version 0.1 knew one kind of control, and no p."""
        found = super().from_format_1(data)
        row = {"control": "entries", "p": math.nan}
        return found | {"table": [one | row for one in found["table"]]}

    @property
    def controls(self) -> list[str]:
        """The kinds of control, as they were asked for."""
        return list(dict.fromkeys(row["control"] for row in self.table))

    @property
    def n_controls(self) -> int:
        """How many random changes of each kind there are."""
        return len(self.extras["control_seeds"])

    def last(self, metric: str, view: str, control: str | None = None) -> Mapping[str, Any] | None:
        """The row of the last layer, of the first kind of control; None if not measured."""
        wanted = {"metric": metric, "view": view, "layer": self.meta["n_layers"]}
        rows = self.rows(**wanted, control=self.controls[0] if control is None else control)
        return rows[0] if rows else None

    def share_of_change(
        self, metric: str, view: str, control: str | None = None
    ) -> tuple[float, float]:
        """The least and greatest share of the tuned model's change that the controls give.

        The change is from the base's value at the last layer. NaN where nothing changed or was
        measured.

        Raises:
            ResultsError: if the null test has no such measure.
        """
        row = self.last(metric, view, control)
        if row is None:
            return math.nan, math.nan
        measures = {(one.metric, one.view): one for one in MEASURES}
        if (metric, view) not in measures:
            raise ResultsError(unknown("measure", (metric, view), list(measures)))
        base = self._of_base(measures[metric, view])
        return share_of_change(base, row["tuned"], row["control_low"], row["control_high"])

    def _last_of_all(self, measure: Measure) -> dict[str, Mapping[str, Any]]:
        """Kind of control to its row of the last layer; empty if the statistic was not measured."""
        rows = {kind: self.last(measure.metric, measure.view, kind) for kind in self.controls}
        return {kind: row for kind, row in rows.items() if row is not None}

    def _of_base(self, measure: Measure) -> float:
        if measure.of_base is None:
            return float(self.extras["base"][measure.metric])
        return measure.of_base

    def corrected_p(self, control: str) -> dict[tuple[str, str], float]:
        """p of what the verdicts are about, corrected over them by Holm, for one kind of control.

        Returns:
            (metric, view) to p; what was not measured is left out.
        """
        rows = {key: self.last(*key, control) for key in JUDGED}
        found = {key: float(row["p"]) for key, row in rows.items() if row is not None}
        return dict(zip(found, holm(list(found.values())), strict=True))

    def verdicts(self) -> list[Verdict]:
        """How much of what tuning changed random changes give too, greedy text first."""
        return [*self._judged(), Verdict("real?", self._limits(), caution=True)]

    def _judged(self) -> Iterator[Verdict]:
        measures = {(one.metric, one.view): one for one in MEASURES}
        for key, (topic, words) in JUDGED.items():
            if self._last_of_all(measures[key]):
                yield Verdict(topic, self._answer(measures[key], words))

    def _answer(self, measure: Measure, words: str) -> str:
        """What every kind of control does to one statistic, beside the tuned model."""
        form, base = measure.form, self._of_base(measure)
        rows = self._last_of_all(measure)
        tuned = float(rows[self.controls[0]]["tuned"])
        if tuned == base:
            reach = "; ".join(
                f"{_subject(kind)} reach {_range(row, form)}" for kind, row in rows.items()
            )
            return f"Tuning does not change {words} ({form(base)}); {reach}."
        noun = f"{'gain' if tuned > base else 'drop'} in {words}"
        parts: list[str] = []
        for kind, row in rows.items():
            share = self.share_of_change(measure.metric, measure.view, kind)
            is_named = bool(parts) and kind.removesuffix(RESCALED) in rows
            subject = f"{AS_FAR}, they" if is_named else _subject(kind)
            claim = _claim(share, "" if parts else noun, subject)
            p = ""
            if self._least_p() < 1:
                p = p_value(self.corrected_p(kind)[measure.metric, measure.view])
            parts.append(f"{claim}, {_range(row, form)}{', ' * bool(p)}{p}")
        of_base = f", the base {form(base)}" if measure.of_base is None else ""
        found = "; ".join(parts)
        return f"{found[0].upper()}{found[1:]}. The tuned model has {form(tuned)}{of_base}."

    def _least_p(self) -> float:
        """The least that a corrected p could be with so many controls."""
        return len(self.corrected_p(self.controls[0])) / (self.n_controls + 1)

    def _limits(self) -> str:
        controls = f"With {count(self.n_controls, 'control')} of a kind"
        least = self._least_p()
        if least < 1:
            said = (
                f"{controls} no p, corrected over what is tested here (Holm), can be below "
                f"{FRACTION(least)}: more controls can say more."
            )
        else:
            said = f"{controls} no p value could say anything, so none is given."
        return f"{said}{self._what_is_lost()}"

    def _what_is_lost(self) -> str:
        if not any(kind.startswith("entries") for kind in self.controls):
            return ""
        return (
            " Shuffling entries gives a change of low rank, as LoRA's, full rank, and spreads one "
            "that is concentrated in a few rows over all of them: no fair control for either."
        )

    def evidence(self) -> list[Block]:
        """Base, controls and tuned model at the last layer and the output; then the layers."""
        about = Text(
            "Any change of the weights moves the stream and reorders ranks. A control is the base "
            f"plus the tuned model's change of {count(self.extras['changed_tensors'], 'tensor')}, "
            f"nothing of what was learned left in it: {self._kinds()}.{self._written()}"
        )
        blocks: list[Block] = [about, self._last_layer()]
        if text := self._text_chart():
            blocks.append(text)
        layers = [chart for which in LAYERS if (chart := self._layer_chart(*which)) is not None]
        return [*blocks, Grid(layers)] if layers else blocks

    def _kinds(self) -> str:
        return "; or ".join(map(_in_table, self.controls))

    def _written(self) -> str:
        options = self.meta.get("options", {})
        if "n_prompts" not in options:
            return ""
        return (
            f" Greedy text: {count(options['n_prompts'], 'prompt')} of "
            f"{lengths_in_words(options['prompt_tokens'])}, continued by "
            f"{options['max_new_tokens']}; mean over prompts."
        )

    def _last_layer(self) -> Table:
        rows = []
        for measure in MEASURES:
            found = self._last_of_all(measure)
            if not found:
                continue
            form, tuned = measure.form, next(iter(found.values()))["tuned"]
            cells = [measure.words, form(self._of_base(measure)), form(tuned)]
            for kind, row in found.items():
                share = self.share_of_change(measure.metric, measure.view, kind)
                cells += [_range(row, form), _share_cell(share)]
            rows.append(cells)
        n = count(self.n_controls, "control")
        heads = [head for kind in self.controls for head in (f"{n}: {_in_table(kind)}", "share")]
        return Table(
            ["last layer and output", self.base_name, self.tuned_name, *heads],
            rows,
            "controls: least to greatest. Their share is of the change from base to tuned model: "
            "below 100% tuning goes beyond every control, above 100% random changes do more than "
            "tuning. Greedy text: mean over prompts; all other rows: over all tokens, all blocks "
            "together.",
            joins=True,
        )

    def _text_chart(self) -> Chart | None:
        rows: list[dict[str, Any]] = []
        for measure in MEASURES:
            row = self.last(measure.metric, measure.view)
            if measure.view == GREEDY and row is not None:
                rows += [
                    {"series": series, "measure": measure.words, **values}
                    for series, values in (
                        (self.base_name, {"value": self._of_base(measure)}),
                        *self._bands(measure.metric, measure.view, self.meta["n_layers"]),
                        (self.tuned_name, {"value": row["tuned"]}),
                    )
                ]
        if not rows:
            return None
        title = "Greedy text: base, range of random changes, tuned; mean over prompts"
        x, y = Axis("value", "0 to 1, no unit", "share"), Axis("measure", "", is_category=True)
        return Chart("dots", title, title, rows, x, y, self._roles())

    def _layer_chart(self, metric: str, view: str, title: str) -> Chart | None:
        rows_of = self.rows(metric=metric, view=view, control=self.controls[0])
        found = sorted(rows_of, key=lambda row: row["layer"])
        if not found:
            return None
        rows = [
            {"series": series, "layer": row["layer"], **values}
            for row in found
            for series, values in (
                *self._bands(metric, view, row["layer"]),
                (self.tuned_name, {"value": row["tuned"]}),
            )
        ]
        form = DISTANCE if metric == "relative_l2" else DIMENSIONS
        alt = (
            f"{title}, by layer; at the last one {form(found[-1]['tuned'])} for "
            f"{self.tuned_name}, {_range(found[-1], form)} for random changes of the same size"
        )
        x = Axis("layer", "layer (0 = embedding, l = output of block l - 1)")
        y = Axis("value", title.partition(",")[0], "zero")
        roles: dict[str, Role] = {k: v for k, v in self._roles().items() if v != "base"}
        return Chart("lines", f"{title}; band: random changes", alt, rows, x, y, roles)

    def _bands(self, metric: str, view: str, layer: int) -> Iterator[tuple[str, dict[str, float]]]:
        for kind in self.controls:
            for row in self.rows(metric=metric, view=view, layer=layer, control=kind):
                yield _in_table(kind), _band(row)

    def _roles(self) -> dict[str, Role]:
        roles: dict[str, Role] = {self.base_name: "base"}
        roles |= {_in_table(kind): "control" for kind in self.controls}
        return roles | {self.tuned_name: "tuned"}


def _subject(kind: str) -> str:
    """A kind of control in a sentence."""
    words = IN_WORDS[kind.removesuffix(RESCALED)]
    return f"{words}, {AS_FAR}," if kind.endswith(RESCALED) else words


def _in_table(kind: str) -> str:
    """A kind of control in tables and legends."""
    words = IN_TABLE[kind.removesuffix(RESCALED)]
    return f"{words}, as far in the stream" if kind.endswith(RESCALED) else words


def share_of_change(base: float, tuned: float, low: float, high: float) -> tuple[float, float]:
    """Which share of the change from base to tuned is reached at each end of a range, ascending.

    NaN where nothing changed.

    >>> [round(x, 2) for x in share_of_change(base=0.466, tuned=0.68, low=0.589, high=0.626)]
    [0.57, 0.75]
    >>> [round(x, 2) for x in share_of_change(base=0.4, tuned=0.1, low=0.5, high=0.25)]
    [-0.33, 0.5]
    """
    if tuned == base:
        return math.nan, math.nan
    least, greatest = sorted((end - base) / (tuned - base) for end in (low, high))
    return least, greatest


def _claim(share: tuple[float, float], noun: str, subject: str) -> str:
    """What random changes give of a change, in words; of what was named before without `noun`."""
    low, high = share
    of_it, whole = (f"the {noun}", f"the whole {noun}") if noun else ("it", "all of it")
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"what {subject} give of {of_it} cannot be told"
    if high <= 0:
        amount = f"none of {of_it}"
    elif high < 1:
        amount = f"{_share_cell(share)} of {of_it}"
    elif low > 1:
        amount = f"more than {whole} ({_share_cell(share)})"
    else:
        amount = f"as much of {of_it} as tuning ({_share_cell(share)})"
    return f"{subject} give {amount}"


def _share_cell(share: tuple[float, float]) -> str:
    low, high = share
    if not (math.isfinite(low) and math.isfinite(high)):
        return MISSING
    if high <= 0:
        return "none"
    if low < 0:
        return f"at most {PERCENT(high)}"
    return PERCENT(low) if low == high else span(low, high, PERCENT)


def _range(row: Mapping[str, Any], form: Form) -> str:
    """The controls' values, least to greatest; one value where there is one control."""
    low, high = float(row["control_low"]), float(row["control_high"])
    return form(low) if low == high else span(low, high, form)


def _band(row: Mapping[str, Any]) -> dict[str, float]:
    return {end: row[f"control_{key}"] for end, key in
            (("value", "mean"), ("low", "low"), ("high", "high"))}  # fmt: skip
