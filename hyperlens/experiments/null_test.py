"""Is it more than a random change would do? The tuned model beside random changes of its size.

Any change of the weights moves the residual stream, changes its effective dimension and reorders
ranks. What tuning did is what it did beyond that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import check_choice, check_counts, check_seed
from ..decoding.diversity import REPETITION_METRICS
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import check_room, choose_prompts
from ..errors import PairError
from ..hooks.loading import LoadedModel, hook
from ..models.sources import OpenedModel
from ..models.weight_sharing import is_tied, merged, token_tables, untie, weight_sharing_copy
from ..pair import Inputs, Pair, open_inputs
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
    span,
)
from ..results.result import Result
from ..statistics.significance import estimate

EXAMPLES = (
    "hyperlens null-test ./base ./tuned --texts held_out.txt --out null-test",
    "hyperlens null-test ./base ./lora-adapter --texts owner/dataset --limit 200 --n-controls 9",
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
SHUFFLES = ("rows_and_columns", "entries")


def run_null_test(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    n_controls: int = 3,
    shuffle: str = "rows_and_columns",
    max_length: int = 256,
    n_prompts: int = 32,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> NullTestResult:
    """Does the tuned model do more than random changes of the same size?

    A control is the base plus the tuned model's change, with rows and columns of each tensor's
    change shuffled: norm, rank, singular values and entries stay, what was learned is lost. With k
    controls the smallest p value that a permutation test could give is 1 / (k + 1).

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; or an open `Pair` and the
            texts. Adapters are merged.
        texts: what `compare_models` takes; prompts are their first tokens.
        n_controls: how many random changes; one is held in memory at a time.
        shuffle: "rows_and_columns" keeps the rank of each change, and which tokens it is about
            (in embeddings and unembeddings only columns are shuffled); "entries" shuffles single
            entries, which makes a change of low rank, as LoRA's, one of full rank.
        max_length: tokens per text, BOS included.
        n_prompts: how many texts, drawn at random, are continued greedily.
        prompt_tokens: how many of their first tokens are the prompt, BOS included.
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
    check_choice("shuffle", shuffle, SHUFFLES)
    check_seed(seed)
    inputs = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    check_room(inputs.pair, prompt_tokens, max_new_tokens)
    prompts = choose_prompts(inputs.corpus, n_prompts, prompt_tokens, seed)
    generation = GenerationRunner(prompts, max_new_tokens, batch_size, seed, progress=False)
    plain_base, plain_tuned = merged(inputs.pair.base.model), merged(inputs.pair.tuned.model)
    if is_tied(plain_base) and not is_tied(plain_tuned):
        untie(plain_base)  # as merging an adapter of one of two tied weights does
    changes = changed_tensors(plain_base, plain_tuned)
    if not changes:
        raise PairError(
            "the two models have the same weights: there is no change to compare random changes to"
        )
    options = PassOptions(batch_size, SINK_THRESHOLD, seed, False)
    seeds = list(range(seed, seed + n_controls))
    measured = []
    with tqdm(total=n_controls + 1, desc="null test", unit="model", disable=not progress) as bar:
        for model in _models(inputs.pair, plain_base, changes, seeds, shuffle):
            measured.append(_measure(inputs, model, options, generation))
            bar.update()
    base_text = generation.run(inputs.pair.base)
    meta = inputs.metadata(
        seed=seed,
        options={
            "n_controls": n_controls,
            "shuffle": shuffle,
            "max_length": max_length,
            "n_prompts": len(prompts),
            "prompt_tokens": prompt_tokens,
            "max_new_tokens": max_new_tokens,
        },
    )
    norms = [float(change.norm()) for change in changes.values()]
    extras = {
        "base": {
            metric: estimate(base_text.metrics[metric]).value for metric in REPETITION_METRICS
        },
        "changed_tensors": len(changes),
        "norm_of_change": math.sqrt(sum(norm**2 for norm in norms)),
        "control_seeds": seeds,
    }
    return NullTestResult(tuple(_table(measured[0], measured[1:])), extras, meta)


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
    base: nn.Module, changes: dict[str, Tensor], seed: int, shuffle: str = "rows_and_columns"
) -> Any:
    """The base with every change shuffled inside its tensor.

    Its norm and the values in it stay, and by rows and columns its rank and singular values; which
    unit gets which value, all that training has decided, is lost. Unchanged tensors are shared with
    the base.
    """
    generator = torch.Generator().manual_seed(seed)
    model = weight_sharing_copy(base)
    parameters = dict(model.named_parameters())
    by_token = _token_tables(base)
    with torch.no_grad():
        for name, change in changes.items():
            if shuffle == "entries":
                shuffled = _permuted(change.flatten(), 0, generator).view_as(change)
            else:
                # Of the last two axes: a mixture of experts has one matrix per expert.
                has_rows = change.ndim > 1 and name not in by_token
                rows = _permuted(change, -2, generator) if has_rows else change
                shuffled = _permuted(rows, -1, generator)
            old = parameters[name]
            old.data = (old.detach().float() + shuffled).to(old.dtype)  # new storage: base stays
    return model


def _permuted(values: Tensor, axis: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(values.shape[axis], generator=generator).to(values.device)
    return values.index_select(axis, order)


def _token_tables(model: Any) -> set[str]:
    """Names of the embedding's and the unembedding's weights, [d_vocab, d_model].

    Their rows stay in place: moved to tokens that no text has, a change would do nothing.
    """
    weights = {id(table.weight) for table in token_tables(model)}
    return {name for name, weight in model.named_parameters() if id(weight) in weights}


def _models(
    pair: Pair,
    plain_base: Any,
    changes: dict[str, Tensor],
    seeds: Sequence[int],
    shuffle: str,
) -> Iterator[LoadedModel]:
    """The tuned model, then the controls, one at a time."""
    yield pair.tuned
    for number, seed in enumerate(seeds):
        model = randomly_changed(plain_base, changes, seed, shuffle)
        opened = OpenedModel(model, pair.base.tokenizer, f"control {number}", "object")
        yield hook(opened, "residual")


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
    tuned: dict[Key, float], controls: Sequence[dict[Key, float]]
) -> Iterator[dict[str, Any]]:
    for (metric, layer, view), value in tuned.items():
        others = [one[metric, layer, view] for one in controls]
        yield {
            "metric": metric,
            "layer": layer,
            "view": view,
            "tuned": value,
            "control_mean": sum(others) / len(others),
            "control_low": min(others),
            "control_high": max(others),
            "n_controls": len(others),
        }


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


class NullTestResult(Result):
    """Every statistic of the tuned model, and its range over random changes of the same size.

    The table has a row per metric, layer and view ("greedy text" for what continuations measure):
    the tuned model's value, and mean, least and greatest of the controls'.

    Extras: `base`, the base's own greedy text; how many `changed_tensors` there are and the
    `norm_of_change`; `control_seeds`.
    """

    name: ClassVar[str] = "null_test"
    title: ClassVar[str] = "Is it more than a random change would do?"
    columns: ClassVar[tuple[str, ...]] = (
        *("metric", "layer", "view", "tuned"),
        *("control_mean", "control_low", "control_high", "n_controls"),
    )
    renamed: ClassVar[Mapping[str, str]] = {
        "placebo_mean": "control_mean",
        "placebo_low": "control_low",
        "placebo_high": "control_high",
        "n_placebos": "n_controls",
        "placebo_seeds": "control_seeds",
    }

    @property
    def n_controls(self) -> int:
        """How many random changes there are."""
        return len(self.extras["control_seeds"])

    def last(self, metric: str, view: str) -> Mapping[str, Any] | None:
        """The row of the last layer; None if it was not measured."""
        rows = self.rows(metric=metric, view=view, layer=self.meta["n_layers"])
        return rows[0] if rows else None

    def share_of_change(self, metric: str, view: str) -> tuple[float, float]:
        """The least and greatest share of the tuned model's change that the controls give.

        The change is from the base's value at the last layer. NaN where nothing changed or was
        measured.
        """
        row = self.last(metric, view)
        if row is None:
            return math.nan, math.nan
        base = self._of_base(next(m for m in MEASURES if (m.metric, m.view) == (metric, view)))
        return share_of_change(base, row["tuned"], row["control_low"], row["control_high"])

    def _of_base(self, measure: Measure) -> float:
        if measure.of_base is None:
            return float(self.extras["base"][measure.metric])
        return measure.of_base

    def verdicts(self) -> list[Verdict]:
        """How much of what tuning changed random changes give too, greedy text first."""
        return [*self._judged(), Verdict("real?", self._limits(), caution=True)]

    def _judged(self) -> Iterator[Verdict]:
        measures = {(one.metric, one.view): one for one in MEASURES}
        for key, (topic, words) in JUDGED.items():
            row = self.last(*key)
            if row is not None:
                yield Verdict(topic, self._answer(measures[key], words, row))

    def _answer(self, measure: Measure, words: str, row: Mapping[str, Any]) -> str:
        form, base, tuned = measure.form, self._of_base(measure), float(row["tuned"])
        reach = _range(row, form)
        if tuned == base:
            return (
                f"Tuning does not change {words} ({form(base)}); random changes of the same size "
                f"reach {reach}."
            )
        noun = f"{'gain' if tuned > base else 'drop'} in {words}"
        share = self.share_of_change(measure.metric, measure.view)
        of_base = f", the base {form(base)}" if measure.of_base is None else ""
        return f"{_claim(share, noun)}: they reach {reach}, the tuned model {form(tuned)}{of_base}."

    def _limits(self) -> str:
        n = self.n_controls
        return (
            f"{count(n, 'control')}: no permutation test could give a p value below "
            f"{FRACTION(1 / (n + 1))}, so none is given.{self._what_is_lost()}"
        )

    @property
    def _by_entries(self) -> bool:
        """Results saved before there was a choice have their entries shuffled."""
        options: Mapping[str, Any] = self.meta.get("options", {})
        return bool(options.get("shuffle", "entries") == "entries")

    def _what_is_lost(self) -> str:
        if not self._by_entries:
            return ""
        return (
            " Shuffling entries gives a change of low rank, as LoRA's, full rank, and spreads one "
            "that is concentrated in a few rows over all of them: no fair control for either."
        )

    def evidence(self) -> list[Block]:
        """Base, controls and tuned model at the last layer and the output; then the layers."""
        about = Text(
            "Any change of the weights moves the stream and reorders ranks. A control is the base "
            f"plus the tuned model's change with the "
            f"{'entries' if self._by_entries else 'rows and columns'} of each of its "
            f"{count(self.extras['changed_tensors'], 'tensor')} shuffled: the same size"
            f"{'' if self._by_entries else ' and rank'}, nothing learned.{self._written()}"
        )
        blocks: list[Block] = [about, self._last_layer()]
        if text := self._text_chart():
            blocks.append(text)
        layers = [chart for which in LAYERS if (chart := self._layer_chart(*which)) is not None]
        return [*blocks, Grid(layers)] if layers else blocks

    def _written(self) -> str:
        options = self.meta.get("options", {})
        if "n_prompts" not in options:
            return ""
        return (
            f" Greedy text: {count(options['n_prompts'], 'prompt')} of "
            f"{count(options['prompt_tokens'], 'token')}, continued by "
            f"{options['max_new_tokens']}; mean over prompts."
        )

    def _last_layer(self) -> Table:
        rows = []
        for measure in MEASURES:
            row = self.last(measure.metric, measure.view)
            if row is not None:
                form = measure.form
                share = _share_cell(self.share_of_change(measure.metric, measure.view))
                cells = (form(self._of_base(measure)), form(row["tuned"]), _range(row, form))
                rows.append([measure.words, *cells, share])
        n = self.n_controls
        return Table(
            [
                "last layer and output",
                self.base_name,
                self.tuned_name,
                f"its {count(n, 'control')}",
                "controls' share",
            ],
            rows,
            "controls: random changes of the same size, least to greatest. Their share is of the "
            "change from base to tuned model: below 100% tuning goes beyond every control, above "
            "100% random changes do more than tuning. Greedy text: mean over prompts; all other "
            "rows: over all tokens, all blocks together.",
            joins=True,
        )

    @property
    def _controls_name(self) -> str:
        return f"random changes as large as {self.tuned_name}'s"

    def _text_chart(self) -> Chart | None:
        rows: list[dict[str, Any]] = []
        for measure in MEASURES:
            row = self.last(measure.metric, measure.view)
            if measure.view == GREEDY and row is not None:
                rows += [
                    {"series": series, "measure": measure.words, **values}
                    for series, values in (
                        (self.base_name, {"value": self._of_base(measure)}),
                        (self._controls_name, _band(row)),
                        (self.tuned_name, {"value": row["tuned"]}),
                    )
                ]
        if not rows:
            return None
        title = "Greedy text: base, range of random changes, tuned; mean over prompts"
        x, y = Axis("value", "0 to 1, no unit", "share"), Axis("measure", "", is_category=True)
        return Chart("dots", title, title, rows, x, y, self._roles())

    def _layer_chart(self, metric: str, view: str, title: str) -> Chart | None:
        found = sorted(self.rows(metric=metric, view=view), key=lambda row: row["layer"])
        if not found:
            return None
        rows = [
            {"series": series, "layer": row["layer"], **values}
            for row in found
            for series, values in (
                (self._controls_name, _band(row)),
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

    def _roles(self) -> dict[str, Role]:
        return {self.base_name: "base", self._controls_name: "control", self.tuned_name: "tuned"}


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


def _claim(share: tuple[float, float], noun: str) -> str:
    """What random changes give of a change, in words."""
    low, high = share
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"What random changes of the same size give of the {noun} cannot be told"
    if high <= 0:
        amount = f"none of the {noun}"
    elif high < 1:
        amount = f"{_share_cell(share)} of the {noun}"
    elif low > 1:
        amount = f"more than the whole {noun} ({_share_cell(share)} of it)"
    else:
        amount = f"as much of the {noun} as tuning ({_share_cell(share)} of it)"
    return f"Random changes of the same size give {amount}"


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
