"""Several fine-tuned variants of one base, side by side (arXiv 2605.22579, Tables 3, 4, 10, 12).

The paper's variants are the original, full fine-tuning, LoRA on all blocks and late-stage LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..checks import check_counts, check_seed, check_types
from ..data.conversations import read_examples
from ..data.corpus import are_token_ids
from ..decoding.diversity import REPETITION_METRICS
from ..decoding.entropy_matching import entropy_at
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import check_room, choose_prompts, lengths_in_words, prompt_lengths
from ..errors import PairError, ResultsError
from ..pair import Inputs, Pair, check_generates, open_pair, tokenized
from ..passes.contexts import Contexts, logits_along, read_contexts
from ..render.blocks import Axis, Block, Chart, Details, Role, Table, Text, Verdict
from ..render.format import (
    COSINE,
    FRACTION,
    MISSING,
    NATS,
    PERCENT,
    SIGNED_FRACTION,
    Form,
    count,
    ends,
    interval,
    number,
    one_line,
    p_value,
)
from ..results.result import Result
from ..statistics import significance
from ..statistics.distances import winner
from ..statistics.rank_correlation import spearman
from ..training.history import called, read_run

EXAMPLES = (
    "hyperlens variants ./base --variant full ./full --variant late ./late-lora \\",
    "    --texts held_out.txt --out variants",
)

ORIGINAL = "original"
TEACHER_FORCED = ("entropy", "top1_agreement", "spearman")
# The same along the greedy text that the variant itself writes.
WRITTEN = tuple(f"written_{metric}" for metric in TEACHER_FORCED)
# From the record of the run that made a variant; one number each, without an interval.
OF_TRAINING = ("final_loss", "trained_parameters")

Units = dict[str, list[float]]
"""Metric to one value per text or prompt."""


@check_types
def compare_variants(
    base: Any,
    variants: Mapping[str, Any],
    texts: Any,
    *,
    n_prompts: int = 32,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    max_length: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> VariantsResult:
    """How do several fine-tuned variants of one base compare?

    The variants table of arXiv 2605.22579 (Tables 3, 4, 10, 12 and 14 to 16) for any models.
    Repetition is that of greedy continuations. Entropy, agreement with the base and Spearman's ρ
    are teacher-forced, in every context of the texts, and beside that along the greedy text that
    each variant writes. Loss and number of trained parameters are known where `hyperfit` saved the
    variant.

    Args:
        base: what `compare_models` takes, but no hooked model.
        variants: name to a fine-tuned model, as `compare_models` takes it, or to an open `Pair` of
            the base and that model.
        texts: what `compare_models` takes.
        n_prompts: how many texts, drawn at random, are continued greedily.
        prompt_tokens: how many of their first tokens are the prompt, BOS included; of
            conversations all before the assistant's last turn is.
        max_new_tokens: how many are added to it; an end-of-text token counts as any other.
        max_length: tokens per text of the teacher-forced statistics.
        batch_size: texts or prompts per forward pass.
        seed: of the choice of prompts.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Returns:
        A `VariantsResult`: every metric of the base and of each variant, with intervals, the
        difference from the base, and that between every two variants.

    Raises:
        HyperlensError: naming the variant, if a model cannot be opened or the texts do not fit it.
    """
    check_counts(n_prompts=n_prompts, batch_size=batch_size)
    check_seed(seed)
    _check_variants(variants)
    texts = texts if are_token_ids(texts) else read_examples(texts)
    units: dict[str, Units] = {}
    described: dict[str, Any] = {}
    notes: dict[str, None] = {}
    meta: dict[str, Any] = {}
    for name, source in variants.items():
        try:
            pair = _opened(base, source, device, dtype)
            check_generates(pair.base.model, pair.tuned.model)
            check_room(pair, prompt_tokens, max_new_tokens)
            inputs = tokenized(pair, texts, max_length)
            _check_same_template(meta, inputs)
            prompts = choose_prompts(
                inputs.corpus, n_prompts, prompt_tokens, seed, max_new_tokens=max_new_tokens
            )
        except PairError as error:
            raise PairError(f"variant {name!r}: {error}") from error
        runner = GenerationRunner(prompts, max_new_tokens, batch_size, seed, progress)
        of_base, of_variant = _measure(inputs, runner, batch_size, progress, bool(units))
        units.setdefault(ORIGINAL, of_base)
        units[name] = of_variant | _of_training(pair)
        described[name] = pair.tuned.describe()
        notes |= dict.fromkeys(inputs.notes)
        meta = meta or inputs.metadata(
            seed=seed,
            options={
                "n_prompts": len(prompts),
                "prompt_tokens": prompt_lengths(inputs.corpus, prompts, prompt_tokens),
                "max_new_tokens": max_new_tokens,
                "max_length": inputs.corpus.max_length,
                "batch_size": batch_size,
            },
        )
    meta.pop("tuned", None)
    meta |= {"variants": described, "notes": list(notes)}
    meta["title"] = f"{meta['base']['name']} and {', '.join(map(one_line, variants))}"
    return VariantsResult(tuple(_rows(units)), {"between": _between(units)}, meta)


def _check_same_template(meta: Mapping[str, Any], inputs: Inputs) -> None:
    """Raise where a variant's own chat template writes conversations otherwise than others'."""
    before = meta.get("corpus", {}).get("chat_template", {}).get("sha256")
    now = inputs.corpus.describe().get("chat_template", {}).get("sha256")
    if meta and before != now:
        raise PairError(
            "its chat template differs from that of the variants before it, and all read the same "
            'text: choose one template for all (chat_template="base", or a file)'
        )


def _check_variants(variants: Mapping[str, Any]) -> None:
    if not variants or ORIGINAL in variants:
        raise PairError(
            f"variants must map names other than {ORIGINAL!r} (the base) to models, at least one; "
            f"got {', '.join(map(repr, variants)) or 'none'}"
        )


def _opened(base: Any, source: Any, device: Any, dtype: Any) -> Pair:
    if isinstance(source, Pair):
        return source
    return open_pair(base, source, device=device, dtype=dtype)


def _measure(
    inputs: Inputs, runner: GenerationRunner, batch_size: int, progress: bool, knows_base: bool
) -> tuple[Units, Units]:
    """What the base and one variant of it do; of the base only once."""
    pair = inputs.pair
    contexts = read_contexts(
        pair.base.hooked, pair.tuned.hooked, inputs.corpus, batch_size, progress
    )
    of_base, of_variant = _teacher_forced(contexts, progress)
    if not knows_base:
        of_base |= runner.run(pair.base).metrics
    written = runner.run(pair.tuned)
    of_variant |= written.metrics | _along_written(pair, runner.prompts, written.tokens)
    return of_base, of_variant


def _teacher_forced(contexts: Contexts, progress: bool) -> tuple[Units, Units]:
    """Entropy, agreement and ρ of both models in every context, text by text."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in ("base", *TEACHER_FORCED)}
    for _, base, tuned in contexts.rows("comparing predictions", progress):
        parts["base"].append(_entropy(base))
        for name, values in _against_base(base, tuned).items():
            parts[name].append(values)
    per_text = {name: contexts.per_text(torch.cat(values)) for name, values in parts.items()}
    entropy = per_text.pop("base")
    ones = [1.0] * len(entropy)
    return {"entropy": entropy, "top1_agreement": ones, "spearman": ones}, per_text


def _against_base(base: torch.Tensor, tuned: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each row of logits: the tuned model's entropy, and agreement and ρ with the base."""
    return {
        "entropy": _entropy(tuned),
        "top1_agreement": (winner(base) == winner(tuned)).double().cpu(),
        "spearman": spearman(base, tuned).cpu(),
    }


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    return entropy_at(logits, torch.zeros(len(logits))).cpu()


def _along_written(
    pair: Pair, prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]]
) -> Units:
    """The same at every token that the tuned model wrote: means over each continuation."""
    found: Units = {metric: [] for metric in WRITTEN}
    for prompt, tokens in zip(prompts, written, strict=True):
        base, tuned = (
            logits_along(side.hooked, prompt, tokens) for side in (pair.base, pair.tuned)
        )
        for metric, values in _against_base(base, tuned).items():
            found[f"written_{metric}"].append(float(values.mean()))
    return found


def _of_training(pair: Pair) -> Units:
    """From the record that `hyperfit` saved beside a model, where there is one."""
    is_folder = pair.tuned.kind in ("folder", "adapter")
    run = read_run(Path(pair.tuned.name).expanduser()) if is_folder else {}
    losses, manifest = run.get("history") or [], run.get("manifest", {})
    found: Units = {}
    if losses:
        found["final_loss"] = [float(losses[-1])]
    if "trained_parameters" in manifest:
        found["trained_parameters"] = [float(manifest["trained_parameters"])]
    return found


def _rows(units: Mapping[str, Units]) -> list[dict[str, Any]]:
    """Every metric of every variant, and its difference from the base paired by text or prompt."""
    rows = []
    for variant, of_one in units.items():
        for metric, values in of_one.items():
            row: dict[str, Any] = {"variant": variant, "metric": metric}
            row |= significance.estimate(values)._asdict()
            tested = variant != ORIGINAL and metric in ("entropy", *REPETITION_METRICS)
            base = units[ORIGINAL][metric] if tested else values
            gap = significance.difference(values, base) if tested else None
            row |= {
                "difference": gap.value if gap else math.nan,
                "difference_low": gap.low if gap else math.nan,
                "difference_high": gap.high if gap else math.nan,
                "p": significance.paired_p(values, base) if tested else math.nan,
            }
            rows.append(row)
    return significance.holm_rows(rows)


def _between(units: Mapping[str, Units]) -> list[dict[str, Any]]:
    """The difference between every two variants, paired by text or prompt."""
    names = [name for name in units if name != ORIGINAL]
    return [
        {
            "first": first,
            "second": second,
            "metric": metric,
            **significance.difference(units[first][metric], units[second][metric])._asdict(),
        }
        for place, second in enumerate(names)
        for first in names[place + 1 :]
        for metric in ("entropy", "top1_agreement", *REPETITION_METRICS)
    ]


# Metric, what it is called, and its form, in the order of the paper's table.
SHOWN: tuple[tuple[str, str, Form], ...] = (
    ("entropy", "entropy", NATS),
    ("ttr", "TTR", FRACTION),
    ("rep_2", "repeated bigrams", FRACTION),
    ("top1_agreement", "base's top-1", PERCENT),
)
INSIDE: tuple[tuple[str, str, Form], ...] = (
    ("spearman", "Spearman's ρ", COSINE),
    ("rep_3", "repeated trigrams", FRACTION),
    ("written_entropy", "entropy, own text", NATS),
    ("written_top1_agreement", "base's top-1, own text", PERCENT),
    ("written_spearman", "ρ, own text", COSINE),
)


class VariantsResult(Result):
    """A row per variant and metric; the base is the variant "original".

    Of greedy continuations, means over prompts: `ttr`, `rep_2`, `rep_3`. Teacher-forced over all
    texts, means over texts: `entropy` (nats), `top1_agreement` and `spearman` with the base; the
    same along the variant's own greedy text as `written_…`. `final_loss` (nats per token) and
    `trained_parameters` are of the training run. `difference` is from the base, paired, with its
    95% interval; `p` of the paired t test, Holm-corrected over the table.

    Extras: `between`, the paired difference first - second of every two variants.
    """

    name: ClassVar[str] = "variants"
    title: ClassVar[str] = "How do several fine-tuned variants compare?"
    columns: ClassVar[tuple[str, ...]] = (
        *("variant", "metric", "value", "low", "high", "se", "n"),
        *("difference", "difference_low", "difference_high", "p"),
    )

    @property
    def variants(self) -> list[str]:
        """Names of the variants in order, the base ("original") first."""
        return list(dict.fromkeys(row["variant"] for row in self.table))

    def between(self, first: str, second: str, metric: str) -> Mapping[str, Any]:
        """The paired difference first - second of two variants, with its 95% interval.

        Raises:
            ResultsError: if there is no such variant or metric.
        """
        for sign, one, other in ((1, first, second), (-1, second, first)):
            for row in self.extras["between"]:
                if (row["first"], row["second"], row["metric"]) == (one, other, metric):
                    low, high = sorted((sign * row["low"], sign * row["high"]))
                    return {**row, "value": sign * row["value"], "low": low, "high": high}
        for variant in (first, second):
            self.select(variant=variant, metric=metric)
        raise ResultsError(
            f"{metric} of {first!r} and {second!r} was not compared: name two different variants "
            "other than the base"
        )

    def verdicts(self) -> list[Verdict]:
        """Of each variant whether its greedy text is more diverse than the base's."""
        found = [self._verdict(name) for name in self.variants if name != ORIGINAL]
        caution = "Diversity is not quality, and one training run of each kind is one draw."
        return [*found, Verdict("quality", caution, caution=True)]

    def _verdict(self, variant: str) -> Verdict:
        row = self.at(variant=variant, metric="ttr")
        change = {
            "value": row["difference"], "low": row["difference_low"], "high": row["difference_high"]
        }  # fmt: skip
        if row["p"] < 0.05:
            words = f"is {'more' if row['difference'] > 0 else 'less'} diverse than the base's"
        else:
            words = "is not clearly more or less diverse than the base's"
        decided = f"{interval(change, SIGNED_FRACTION)} {p_value(row['p'])}".rstrip()
        return Verdict("behaviour", f"{called(variant)}: its greedy text {words} (TTR {decided}).")

    def evidence(self) -> list[Block]:
        """The paper's table, what it leaves out, and a chart of diversity and agreement."""
        options = self.meta["options"]
        about = Text(
            f"Each model continued {count(options['n_prompts'], 'prompt')} of "
            f"{lengths_in_words(options['prompt_tokens'])} greedily by {options['max_new_tokens']} "
            "tokens. Entropy and agreement with the base are teacher-forced, over all texts."
        )
        main = self._table(SHOWN, [*map(self._loss, self.variants)])
        more = self._table(INSIDE, [])
        return [about, main, self._chart(), Details("rank correlation, and own text", [more])]

    def _table(self, shown: Sequence[tuple[str, str, Form]], last: list[list[str]]) -> Table:
        cells = [
            [called(name), *(self._cell(name, metric, form) for metric, _, form in shown)]
            for name in self.variants
        ]
        for row, extra in zip(cells, last, strict=False):
            row += extra
        head = ["mean [95%]", *(words for _, words, _ in shown)]
        head += ["final loss", "trained weights"] if last else []
        return Table(head, cells, "intervals over prompts (repetition) or texts (all else)")

    def _cell(self, variant: str, metric: str, form: Form) -> str:
        rows = self.rows(variant=variant, metric=metric)
        return interval(rows[0], form) if rows else MISSING

    def _loss(self, variant: str) -> list[str]:
        """The last epoch's training loss, and how many weights were trained."""
        known = {row["metric"]: row["value"] for row in self.rows(variant=variant)}
        loss, weights = (known.get(metric) for metric in OF_TRAINING)
        return [
            MISSING if loss is None else number(loss),
            MISSING if weights is None else f"{weights:,.0f}",
        ]

    def _chart(self) -> Chart:
        title = "Greedy text and top-1 agreement: means with 95% intervals"
        rows = list(self._points())
        series = dict.fromkeys(row["series"] for row in rows)
        roles: dict[str, Role] = dict.fromkeys(series, "other")
        roles[called(ORIGINAL)] = "base"
        x, y = Axis("value", "0 to 1, no unit", "share"), Axis("measure", "", is_category=True)
        return Chart("dots", title, f"{title}, of every variant", rows, x, y, roles)

    def _points(self) -> Iterator[dict[str, Any]]:
        for metric, words, form in SHOWN:
            if form is NATS:
                continue
            for variant in self.variants:
                row = self.at(variant=variant, metric=metric)
                yield {"series": called(variant), "measure": words, **ends(row)}
