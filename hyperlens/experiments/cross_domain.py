"""Does it hold on other texts? Several pairs on several corpora (arXiv 2605.22579, Table 6)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm

from ..checks import check_counts, check_seed, check_types
from ..data.conversations import read_examples
from ..data.corpus import Corpus, are_token_ids, check_max_length
from ..decoding.diversity import REPETITION_METRICS
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import check_room, choose_openings
from ..errors import CorpusError, HyperlensError, PairError
from ..files import check_new_folder, expand_user
from ..models.sources import check_source
from ..pair import Inputs, Pair, check_generates, open_pair, tokenized
from ..passes.streaming import PassOptions, run_pass
from ..probes import ParticipationRatio, RankReordering
from ..render.blocks import Axis, Block, Chart, Details, Grid, Heading, Scale, Table, Text, Verdict
from ..render.format import (
    COSINE,
    DIMENSIONS,
    FRACTION,
    PERCENT,
    SIGNED_FRACTION,
    Form,
    count,
    interval,
    one_line,
    p_value,
    span,
)
from ..results.fingerprint import texts_sha256, versions
from ..results.result import Result
from ..results.resume import KeptRecords, source_identity
from ..statistics import significance
from .mauve import (
    SEEDS,
    Featurizer,
    ReferenceTexts,
    check_has_tokenizer,
    check_mauve,
    few_texts_notes,
    open_featurizer,
)

EXAMPLES = (
    "hyperlens cross-domain --pair full ./base ./tuned --pair lora ./base ./adapter \\",
    "    --texts stories stories.txt --texts news owner/news --out cross-domain",
    "hyperlens cross-domain --pair mine ./base ./tuned --texts a a.txt --texts b b.jsonl \\",
    "    --n-prompts 1000 --mauve-features openai-community/gpt2-large",
)

# What is measured inside the models at the last layer: metric and view in `compare_models`.
LAST_LAYER = {
    "top1_agreement": ("top1_agreement", "final_norm"),
    "spearman": ("spearman", "final_norm"),
    "delta_raw": ("delta", "raw"),
    "delta_final_norm": ("delta", "final_norm"),
}
SINK_THRESHOLD = 10.0

Key = tuple[str, str]
"""A row: the names of a pair and of a corpus."""


@check_types
def compare_domains(
    pairs: Mapping[str, Any],
    corpora: Mapping[str, Any],
    *,
    n_prompts: int = 32,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    max_length: int = 256,
    mauve_features: Any = None,
    batch_size: int = 16,
    seed: int = 0,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> CrossDomainResult:
    """Does it hold on other texts? Measure several pairs of models on several corpora.

    One row for each pair on each corpus: diversity and repetition of both models' greedy text,
    agreement and rank correlation with the base, change of effective dimension at the last layer,
    and MAUVE if a model is named for it. A pair is opened once, whatever the number of corpora.
    Where the result is saved in a folder, rows that are done are kept in FOLDER.partial: after an
    interruption the same call goes on.

    Args:
        pairs: name to (base, tuned), each what `compare_models` takes, but no hooked models; or to
            an open `Pair`.
        corpora: name to texts, each what `compare_models` takes. Which of them a model was trained
            on is for the caller to know.
        n_prompts: how many texts of each corpus, drawn at random, are continued greedily.
        prompt_tokens: how many of their first tokens are the prompt, BOS included; of
            conversations all before the assistant's last turn is.
        max_new_tokens: how many are added; an end-of-text token is a token like any other.
        max_length: tokens per text, BOS included; longer texts are cut.
        mauve_features: a model that reads texts, for MAUVE between continuations and the texts' own
            ones, as many tokens long; only texts that long are continued then. Without it there is
            no MAUVE.
        batch_size: texts or prompts per forward pass.
        seed: of the choice of prompts and of the token sample of intervals.
        out: a new folder to save the result in. Rows that are done are kept beside it, in
            `out.partial`, until then: the same call goes on after an interruption.
        device, dtype: as in `compare_models`.
        progress: show a progress bar.

    Returns:
        A `CrossDomainResult`, its p values Holm-corrected over all rows.

    Raises:
        HyperlensError: naming the pair or the corpus, if a source cannot be opened, texts do not
            fit the models, or there is no room for the continuations.
    """
    options = RowOptions(n_prompts, prompt_tokens, max_new_tokens, max_length, batch_size, seed)
    _check_options(options, mauve_features)
    if out is not None:
        check_new_folder(expand_user(out))
    _check_pairs(pairs, device, dtype)
    texts = _read_all(corpora)
    records = KeptRecords.beside(out)
    identities = _identities(pairs, texts, options, mauve_features, device, dtype)
    kept = {key: records.find(identity) for key, identity in identities.items()}
    done = {key: record for key, record in kept.items() if record is not None}
    reader: Featurizer | None = None
    bar = tqdm(
        total=len(identities), initial=len(done), desc="cross-domain", unit="row",
        disable=not progress,
    )  # fmt: skip
    with bar:
        for name, sources in pairs.items():
            missing = {c: t for c, t in texts.items() if (name, c) not in done}
            if missing and mauve_features is not None and reader is None:
                reader = open_featurizer(
                    mauve_features, batch_size=batch_size, device=device, dtype=dtype
                )
            rows = _rows_of_pair(name, sources, missing, options, reader, device, dtype)
            for corpus, record in rows:
                done[name, corpus] = record
                records.keep(identities[name, corpus], record)
                bar.update()
    result = _result(pairs, texts, done, options)
    if out is not None:
        result.save(expand_user(out))
        records.forget(identities.values())
    return result


@dataclass(frozen=True)
class RowOptions:
    """What is the same for all rows: see `compare_domains`."""

    n_prompts: int
    prompt_tokens: int
    max_new_tokens: int
    max_length: int
    batch_size: int
    seed: int


def _check_options(options: RowOptions, mauve_features: Any) -> None:
    check_max_length(options.max_length)
    check_seed(options.seed)
    check_counts(
        n_prompts=options.n_prompts,
        prompt_tokens=options.prompt_tokens,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
    )
    length = options.prompt_tokens
    if mauve_features is not None:
        check_mauve(mauve_features)
        length += options.max_new_tokens
    if length > options.max_length:
        raise CorpusError(
            f"texts are cut to {options.max_length} tokens, and {length} are needed of those that "
            f"are continued: raise max_length to {length}"
        )


def _check_pairs(pairs: Any, device: Any, dtype: Any) -> None:
    if not isinstance(pairs, Mapping) or not pairs:
        raise PairError(f"pairs must map names to (base, tuned), at least one; got {pairs!r}")
    for name, sources in pairs.items():
        with _naming(f"pair {name!r}"):
            if isinstance(sources, Pair):
                _check_open(sources, device, dtype)
            elif isinstance(sources, tuple | list) and len(sources) == 2:
                check_generates(*sources)
                for source in sources:
                    check_source(source)
            else:
                raise PairError(f"expected (base, tuned) or an open Pair, got {sources!r}")


def _check_open(pair: Pair, device: Any, dtype: Any) -> None:
    check_generates(pair.base.model, pair.tuned.model)
    for option, value in (("device", device), ("dtype", dtype)):
        if value is not None:
            raise PairError(f"{option} is decided when a pair is opened: pass it to open_pair")


def _read_all(corpora: Any) -> dict[str, Any]:
    if not isinstance(corpora, Mapping) or not corpora:
        raise CorpusError(f"corpora must map names to texts, at least one; got {corpora!r}")
    texts = {}
    for name, source in corpora.items():
        with _naming(f"corpus {name!r}"):
            texts[name] = source if are_token_ids(source) else read_examples(source)
    return texts


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say which of many an error is about."""
    try:
        yield
    except HyperlensError as error:
        raise type(error)(f"{what}: {error}") from error


def _identities(
    pairs: Mapping[str, Any],
    texts: Mapping[str, Any],
    options: RowOptions,
    mauve_features: Any,
    device: Any,
    dtype: Any,
) -> dict[Key, dict[str, Any]]:
    """For every row everything that decides it."""
    models = {name: _pair_identity(sources) for name, sources in pairs.items()}
    hashes = {name: _texts_identity(of_one) for name, of_one in texts.items()}
    reader = None
    if isinstance(mauve_features, Featurizer):
        reader = mauve_features.describe()
    elif mauve_features is not None:
        reader = source_identity(mauve_features)
    same = {
        "options": asdict(options),
        "mauve": reader,
        "device": str(device),
        "dtype": str(dtype),
        "versions": versions(),
    }
    return {
        (pair, corpus): {"models": both} | of_texts | same
        for pair, both in models.items()
        for corpus, of_texts in hashes.items()
    }


def _texts_identity(texts: Any) -> dict[str, Any]:
    """The texts, and how they are read where that was chosen."""
    reading = {} if are_token_ids(texts) else texts.reading.describe()
    return {"texts": texts_sha256(texts)} | ({"reading": reading} if reading else {})


def _pair_identity(sources: Any) -> Any:
    if isinstance(sources, Pair):
        return sources.describe()
    return [source_identity(source) for source in sources]


def _rows_of_pair(
    name: str,
    sources: Any,
    texts: Mapping[str, Any],
    options: RowOptions,
    reader: Featurizer | None,
    device: Any,
    dtype: Any,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Open a pair and measure it; every corpus is tokenized before the first one is measured."""
    if not texts:
        return
    with _naming(f"pair {name!r}"):
        is_open = isinstance(sources, Pair)
        pair = sources if is_open else open_pair(*sources, device=device, dtype=dtype)
        check_room(pair, options.prompt_tokens, options.max_new_tokens)
        if reader is not None:
            check_has_tokenizer(pair.tokenizer)
    ready = {}
    for corpus, of_one in texts.items():
        with _naming(f"pair {name!r} on corpus {corpus!r}"):
            inputs = tokenized(pair, of_one, options.max_length)
            ready[corpus] = inputs, draw_prompts(inputs.corpus, options, reader is not None)
    for corpus, (inputs, prompts) in ready.items():
        with _naming(f"pair {name!r} on corpus {corpus!r}"):
            row, notes = measure_row(inputs, prompts, options, reader)
            record = {
                "row": row,
                "pair": pair.describe(),
                "corpus": inputs.corpus.describe(),
                "mauve": reader.describe() | {"seeds": list(SEEDS)} if reader else None,
                "notes": [*inputs.notes, *notes],
            }
        yield corpus, record


@dataclass(frozen=True)
class Prompts:
    """Beginnings of texts, and how the texts themselves go on (empty without MAUVE)."""

    starts: list[list[int]]
    continuations: list[list[int]]


def draw_prompts(corpus: Corpus, options: RowOptions, with_continuations: bool) -> Prompts:
    """Draw the texts to be continued.

    Raises:
        CorpusError: if fewer than two texts are long enough.
    """
    openings = choose_openings(
        corpus,
        options.n_prompts,
        options.prompt_tokens,
        options.seed,
        n_after=options.max_new_tokens if with_continuations else 0,
        max_new_tokens=options.max_new_tokens,
    )
    return Prompts([one.prompt for one in openings], [one.after for one in openings])


def measure_row(
    inputs: Inputs, prompts: Prompts, options: RowOptions, reader: Featurizer | None
) -> tuple[dict[str, Any], list[str]]:
    """Everything of the row but its two names, and notes on it.

    Args:
        inputs: the pair, and the corpus as it reads it.
        prompts: what is continued; with the texts' own continuations if there is a reader.
        options: of all rows.
        reader: for MAUVE; None leaves it out (NaN).
    """
    pair = inputs.pair
    runner = GenerationRunner(
        prompts.starts, options.max_new_tokens, options.batch_size, options.seed, False
    )
    generated = {"base": runner.run(pair.base), "tuned": runner.run(pair.tuned)}
    counts = inputs.corpus.counts
    row: dict[str, Any] = {
        "n": len(prompts.starts),
        "n_texts": counts.n_sequences,
        "n_tokens": counts.n_tokens,
    }
    for metric in REPETITION_METRICS:
        base, tuned = (generated[side].metrics[metric] for side in ("base", "tuned"))
        gap = significance.difference(tuned, base)
        row |= {
            f"{metric}_base": significance.estimate(base).value,
            f"{metric}_tuned": significance.estimate(tuned).value,
            f"{metric}_difference": gap.value,
            f"{metric}_low": gap.low,
            f"{metric}_high": gap.high,
            f"{metric}_p": significance.paired_p(tuned, base),
        }
    tokens = {side: of_side.tokens for side, of_side in generated.items()}
    mauve, notes = _mauve(inputs, prompts, tokens, reader)
    return row | _last_layer(inputs, options) | mauve, notes


def _last_layer(inputs: Inputs, options: RowOptions) -> dict[str, float]:
    """Teacher-forced, at the last layer: agreement, ρ and change of effective dimension."""
    results = run_pass(
        inputs.pair.base.hooked,
        inputs.pair.tuned.hooked,
        inputs.corpus,
        [ParticipationRatio(views=("raw", "final_norm"), layers=(-1,)), RankReordering()],
        PassOptions(options.batch_size, SINK_THRESHOLD, options.seed, False),
    ).results
    rows = {(r.metric, r.view): r for result in results.values() for r in result.rows}
    row: dict[str, float] = {}
    for name, (metric, view) in LAST_LAYER.items():
        one = rows[metric, view]
        row |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    return row


def _mauve(
    inputs: Inputs,
    prompts: Prompts,
    generated: Mapping[str, Sequence[Sequence[int]]],
    reader: Featurizer | None,
) -> tuple[dict[str, float], list[str]]:
    """How close each model's continuations are to the texts' own, and notes on what was read."""
    row = {f"mauve_{side}{end}": math.nan for side in generated for end in ("", "_low", "_high")}
    if reader is None:
        return row, []
    reference = ReferenceTexts(reader, inputs.pair.tokenizer, prompts.continuations)
    for side, tokens in generated.items():
        for scores in reference.scores(side, [tokens]):
            row[f"mauve_{side}"] = scores.mean
            row[f"mauve_{side}_low"] = min(scores.values)
            row[f"mauve_{side}_high"] = max(scores.values)
    return row, reference.notes


def _result(
    pairs: Mapping[str, Any],
    texts: Mapping[str, Any],
    done: Mapping[Key, Mapping[str, Any]],
    options: RowOptions,
) -> CrossDomainResult:
    keys = [(pair, corpus) for pair in pairs for corpus in texts]
    rows = [{"pair": p, "corpus": c, **done[p, c]["row"]} for p, c in keys]
    _correct(rows)
    reader = done[keys[0]]["mauve"]
    notes: dict[str, None] = {}
    if reader is not None:
        notes |= dict.fromkeys(few_texts_notes(*(row["n"] for row in rows)))
    for p, c in keys:
        notes |= dict.fromkeys(f"{p} on {c}: {note}" for note in done[p, c]["notes"])
    meta = {
        "title": f"{count(len(pairs), 'pair')} of models on {', '.join(texts)}",
        "pairs": {p: done[p, next(iter(texts))]["pair"] for p in pairs},
        "corpora": {c: dict(getattr(of_one, "source", {})) for c, of_one in texts.items()},
        "corpus": {p: {c: done[p, c]["corpus"] for c in texts} for p in pairs},
        "mauve": reader,
        "seed": options.seed,
        "options": {key: value for key, value in asdict(options).items() if key != "seed"},
        "versions": versions(),
        "notes": list(notes),
    }
    return CrossDomainResult(tuple(rows), {}, meta)


def _correct(rows: list[dict[str, Any]]) -> None:
    """Holm's correction over all tests of the table."""
    places = [(row, f"{metric}_p") for row in rows for metric in REPETITION_METRICS]
    corrected = significance.holm([row[key] for row, key in places])
    for (row, key), p in zip(places, corrected, strict=True):
        row[key] = p


GENERATED_PARTS = ("base", "tuned", "difference", "low", "high", "p")
# Column, what it is called, its form, and the scale of its axis.
DRAWN: tuple[tuple[str, str, Form, Scale], ...] = (
    ("ttr_difference", "TTR of greedy text, tuned - base", SIGNED_FRACTION, "zero"),
    ("top1_agreement", "top-1 prediction is the base's, share of tokens", FRACTION, "share"),
    ("delta_raw", "change of effective dimension, raw", DIMENSIONS, "zero"),
    ("delta_final_norm", "change of effective dimension, after the final norm", DIMENSIONS, "zero"),
)


class CrossDomainResult(Result):
    """A row per pair of models and corpus (arXiv 2605.22579, Table 6, and what it leaves out).

    Of greedy continuations, means over `n` prompts: `ttr`, `rep_2` and `rep_3` of `_base` and
    `_tuned`, their paired `_difference` with its 95% interval `_low` to `_high`, and `_p` of the
    paired t test, Holm-corrected over the table. Teacher-forced over `n_texts` texts, with
    intervals over texts: `top1_agreement`, `spearman`, and the change of effective dimension at the
    last layer, `delta_raw` and `delta_final_norm`. `mauve_base` and `mauve_tuned`: of the
    continuations and the texts' own; `_low` to `_high` is no interval but the range over seeds of
    the clustering. NaN where MAUVE was left out.
    """

    name: ClassVar[str] = "cross_domain"
    title: ClassVar[str] = "Does it hold on other texts?"
    columns: ClassVar[tuple[str, ...]] = (
        *("pair", "corpus", "n", "n_texts", "n_tokens"),
        *(f"{metric}_{part}" for metric in REPETITION_METRICS for part in GENERATED_PARTS),
        *(f"{name}{end}" for name in LAST_LAYER for end in ("", "_low", "_high")),
        *(f"mauve_{side}{end}" for side in ("base", "tuned") for end in ("", "_low", "_high")),
    )

    @property
    def pairs(self) -> list[str]:
        """Names of the pairs, in order."""
        return list(dict.fromkeys(row["pair"] for row in self.table))

    @property
    def corpora(self) -> list[str]:
        """Names of the corpora, in order."""
        return list(dict.fromkeys(row["corpus"] for row in self.table))

    @property
    def has_mauve(self) -> bool:
        """Whether MAUVE was computed."""
        return self.meta["mauve"] is not None

    def verdicts(self) -> list[Verdict]:
        """What the rows have in common, and what that is worth."""
        caution = (
            "Rows of a pair share their models and rows of a corpus their texts: they are not "
            "independent repetitions. Diversity is not quality, and texts that a model was trained "
            "on do not test it."
        )
        return [
            self._diversity(),
            *map(self._dimension, ("raw", "final_norm")),
            Verdict("independence", caution, caution=True),
        ]

    def _diversity(self) -> Verdict:
        ups, downs = (
            sum(row["ttr_p"] < 0.05 and sign * row["ttr_difference"] > 0 for row in self.table)
            for sign in (1, -1)
        )
        unknown = sum(math.isnan(row["ttr_low"]) for row in self.table)
        few = f"; too few prompts to tell in {unknown}" if unknown else ""
        return Verdict(
            "behaviour",
            f"The tuned model's greedy text is more diverse than the base's in {ups} of "
            f"{self._n_rows} and less diverse in {downs}{few} (TTR, tuned - base: "
            f"{self._extent('ttr_difference', SIGNED_FRACTION)}; p < 0.05 after Holm's "
            "correction).",
        )

    def _dimension(self, view: str) -> Verdict:
        name = f"delta_{view}"
        grew = sum(row[f"{name}_low"] > 0 for row in self.table)
        shrank = sum(row[f"{name}_high"] < 0 for row in self.table)
        where = {"raw": "of the raw residual", "final_norm": "after the final norm"}[view]
        return Verdict(
            "dimension",
            f"Effective dimension {where} at the last layer, all blocks together, grows in {grew} "
            f"of {self._n_rows} and shrinks in {shrank} "
            f"({self._extent(name, DIMENSIONS)}; 95% intervals without 0).",
        )

    @property
    def _n_rows(self) -> str:
        return count(len(self.table), "row")

    def _extent(self, column: str, form: Form) -> str:
        """The range over rows; of one row its interval."""
        if len(self.table) == 1:
            return interval(_estimate(self.table[0], column), form)
        values = [row[column] for row in self.table if math.isfinite(row[column])]
        return span(min(values), max(values), form) if values else form(math.nan)

    def _of_chats(self) -> str:
        """What prompts are in corpora of conversations, if there are any."""
        described = [one for of in self.meta.get("corpus", {}).values() for one in of.values()]
        is_chat = any("n_tokens_by_role" in one for one in described)
        return " (of conversations all before the assistant's last turn)" * is_chat

    def evidence(self) -> list[Block]:
        """What was generated and what changed inside, for each pair; charts over all rows."""
        options = self.meta["options"]
        intro = Text(
            f"Greedy text: up to {count(options['n_prompts'], 'prompt')} of "
            f"{count(options['prompt_tokens'], 'token')}{self._of_chats()} from each corpus, "
            f"{options['max_new_tokens']} tokens added. TTR: distinct tokens / tokens, 1 repeats "
            "nothing. Repeated n-grams: the share that occurred before."
        )
        tables = [block for pair in self.pairs for block in self._tables(pair)]
        charts = [self._chart(*of_one) for of_one in DRAWN]
        trigrams = Details("repeated trigrams, and p of every test", [self._all_tests()])
        return [intro, *tables, Grid(charts[:2]), Grid(charts[2:]), trigrams]

    def _tables(self, pair: str) -> list[Block]:
        rows = self.select(pair=pair)
        blocks: list[Block] = [Heading(one_line(pair)), _generated(rows), _inside(rows)]
        return [*blocks, self._mauve(rows)] if self.has_mauve else blocks

    def _mauve(self, rows: Sequence[Mapping[str, Any]]) -> Table:
        caption = (
            "MAUVE of continuations and the texts' own, read by "
            f"{one_line(self.meta['mauve']['name'])}: mean (and range) over seeds of the "
            "clustering, no interval"
        )
        cells = [
            [one_line(row["corpus"]), *(_ranged(row, f"mauve_{s}") for s in ("base", "tuned"))]
            for row in rows
        ]
        return Table(["MAUVE", "base", "tuned"], cells, caption)

    def _chart(self, column: str, words: str, form: Form, scale: Scale) -> Chart:
        rows = [
            {
                "series": one_line(row["pair"]),
                "corpus": one_line(row["corpus"]),
                **_possible(_estimate(row, column), form),
            }
            for row in self.table
        ]
        return Chart(
            "dots",
            f"{words}: 95% intervals",
            f"{words}, of every pair on every corpus",
            rows,
            Axis("value", words, scale),
            Axis("corpus", "", is_category=True),
        )

    def _all_tests(self) -> Table:
        rows = [
            [
                f"{one_line(row['pair'])}, {one_line(row['corpus'])}",
                _change(row, "rep_3"),
                _gap(row, "rep_3"),
                *(p_value(row[f"{metric}_p"]) for metric in REPETITION_METRICS),
            ]
            for row in self.table
        ]
        head = [
            *("", "repeated trigrams", "tuned - base [95%]"),
            *("p, TTR", "p, bigrams", "p, trigrams"),
        ]
        return Table(head, rows, "p: paired t test over prompts, Holm-corrected over all rows")


def _generated(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = [
        [
            one_line(row["corpus"]),
            str(row["n"]),
            _change(row, "ttr"),
            f"{_gap(row, 'ttr')} {p_value(row['ttr_p'])}".rstrip(),
            _change(row, "rep_2"),
        ]
        for row in rows
    ]
    head = ["greedy text", "prompts", "TTR", "tuned - base [95%]", "repeated bigrams"]
    caption = (
        "base → tuned, means over prompts; differences paired by prompt; p: paired t test, "
        "Holm-corrected over all rows"
    )
    return Table(head, cells, caption)


def _inside(rows: Sequence[Mapping[str, Any]]) -> Table:
    forms = {"top1_agreement": PERCENT, "spearman": COSINE}
    cells = [
        [
            one_line(row["corpus"]),
            *(interval(_estimate(row, name), forms.get(name, DIMENSIONS)) for name in LAST_LAYER),
        ]
        for row in rows
    ]
    head = ["last layer", "base's top-1", "Spearman's ρ", "Δ dimension, raw", "after final norm"]
    caption = (
        "over all tokens of the texts, teacher-forced, 95% intervals over texts; base's top-1: "
        "share of tokens whose top-1 prediction is the base's; Δ dimension: change of effective "
        "dimension, all blocks together"
    )
    return Table(head, cells, caption)


def _estimate(row: Mapping[str, Any], column: str) -> dict[str, float]:
    """A column and its interval; that of a difference belongs to its metric."""
    stem = column.removesuffix("_difference")
    return {"value": row[column], "low": row[f"{stem}_low"], "high": row[f"{stem}_high"]}


def _possible(estimate: Mapping[str, float], form: Form) -> dict[str, float]:
    """An interval without the values that no mean can have."""
    low, high = max(estimate["low"], form.lowest), min(estimate["high"], form.highest)
    return {"value": estimate["value"], "low": low, "high": high}


def _change(row: Mapping[str, Any], metric: str) -> str:
    return f"{FRACTION(row[f'{metric}_base'])} → {FRACTION(row[f'{metric}_tuned'])}"


def _gap(row: Mapping[str, Any], metric: str) -> str:
    return interval(_estimate(row, f"{metric}_difference"), SIGNED_FRACTION)


def _ranged(row: Mapping[str, Any], name: str) -> str:
    """`0.930 (0.910 to 0.950)`, without the range where there is no value."""
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    known = math.isfinite(value)
    return f"{FRACTION(value)} ({span(low, high, FRACTION)})" if known else FRACTION(value)
