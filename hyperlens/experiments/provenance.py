"""Where do the tuned model's picks come from? (arXiv 2605.22579, sections 3.4 and 6)

The base model's rank of every token the tuned model picks, teacher-forced and along what the tuned
model writes by itself, and what kind of tokens those are.
"""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..checks import check_counts, check_seed, check_types
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import check_room, choose_prompts, prompt_lengths
from ..models.kinds import plain_model
from ..models.tokenizers import token_names, token_texts
from ..offloading import value_of
from ..pair import Pair, open_inputs
from ..passes.contexts import Contexts, ranks_in, read_contexts
from ..probes.rank_reordering import rank_bins
from ..render.blocks import Axis, Block, Chart, Details, Grid, Heading, Table, Text, Verdict
from ..render.format import PERCENT, POINTS, count, ends, interval, one_line
from ..results.result import Result
from ..statistics import distances, significance
from ..statistics.moments import in_full_float32
from ..statistics.rank_buckets import DEEP_TAIL, RANK_BUCKETS, bucket_of

EXAMPLES = (
    "hyperlens provenance ./base ./tuned --texts held_out.txt --out provenance",
    "hyperlens provenance ./base ./tuned --texts held_out.txt --n-prompts 100 --n-examples 20",
)

# Of base ranks, as in the paper's Figure 4.
BUCKETS = tuple(bucket.label for bucket in RANK_BUCKETS)
TEACHER_FORCED, FREE_RUNNING = MODES = ("teacher-forced", "free-running")
KINDS = ("function word", "content word", "subword", "number", "punctuation", "other")
# A pick is a near-synonym of the base's if it is among so many nearest neighbours of it.
NEIGHBOURS = 10
# An n-gram of this length, met again, is a repetition.
NGRAM = 3
WORDS_BEFORE = 12


@check_types
def trace_provenance(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    n_prompts: int = 32,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    max_length: int = 256,
    n_examples: int = 5,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> ProvenanceResult:
    """Where did the base model rank the tokens the tuned model picks, and what are they?

    A pick is the tuned model's top-1 token: after every token of the given texts (teacher-forced),
    and along what it writes by itself when decoding greedily (free-running).

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; or an open `Pair` and the
            texts.
        texts: what `compare_models` takes; their first tokens are the prompts.
        n_prompts: how many texts, drawn at random, the tuned model continues.
        prompt_tokens: how many of their first tokens are the prompt, BOS included; of
            conversations all before the assistant's last turn is.
        max_new_tokens: how many are added to it.
        max_length: tokens per text, teacher-forced.
        n_examples: picks kept with their context, per mode and bucket of base ranks.
        batch_size: texts per forward pass.
        seed: of the choice of prompts and examples.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Returns:
        A `ProvenanceResult`: shares of picks by base rank and by kind, means over texts with
        intervals.

    Raises:
        HyperlensError: if a source cannot be opened, the texts do not fit the models, or there
            is no room for the continuations.
    """
    check_counts(batch_size=batch_size)
    check_counts(0, n_examples=n_examples)
    check_seed(seed)
    inputs = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    pair = inputs.pair
    check_room(pair, prompt_tokens, max_new_tokens)
    prompts = choose_prompts(
        inputs.corpus, n_prompts, prompt_tokens, seed, max_new_tokens=max_new_tokens
    )
    contexts = read_contexts(
        pair.base.hooked, pair.tuned.hooked, inputs.corpus, batch_size, progress
    )
    generation = GenerationRunner(prompts, max_new_tokens, batch_size, seed, progress)
    generated = generation.run(pair.tuned)
    decisions = {
        TEACHER_FORCED: along_texts(contexts, progress),
        FREE_RUNNING: along_continuations(pair, prompts, generated.tokens),
    }
    table: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    for mode, of_mode in decisions.items():
        picks = _picks(pair, of_mode)
        table += _rows(mode, picks)
        examples += _examples(mode, picks, of_mode, pair.tokenizer, n_examples, seed)
    meta = inputs.metadata(
        seed=seed,
        options={
            "n_prompts": len(prompts),
            "prompt_tokens": prompt_lengths(inputs.corpus, prompts, prompt_tokens),
            "max_new_tokens": max_new_tokens,
            "max_length": max_length,
            "neighbours": NEIGHBOURS,
            "ngram": NGRAM,
        },
    )
    d_vocab = pair.base.hooked.cfg.d_vocab
    histograms = {mode: _histogram(of_mode, d_vocab) for mode, of_mode in decisions.items()}
    extras = {"rank_histogram": histograms, "examples": examples}
    return ProvenanceResult(tuple(table), extras, meta)


@dataclass(frozen=True)
class Decisions:
    """The tuned model's next-token decisions along one text, in order.

    Attributes:
        ids: the whole text; the decision at i follows `ids[: position[i]]`.
        position: where each decision is made.
        picked: the tuned model's top-1 token.
        base_top1: the base model's.
        rank: the base model's rank of `picked`, from 1; tied logits share the best rank.
    """

    ids: list[int]
    position: list[int]
    picked: list[int]
    base_top1: list[int]
    rank: list[int]


def along_texts(contexts: Contexts, progress: bool) -> list[Decisions]:
    """Teacher-forced: what both models would write next at every context of the texts."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for _, base, tuned in contexts.rows("provenance", progress):
        picked = distances.winner(tuned)
        parts.append((picked, distances.winner(base), distances.rank_of(base, picked)))
    columns = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
    text = contexts.text.cpu()
    decisions = []
    for number, sequence in enumerate(contexts.corpus.sequences):
        of_text = text == number
        if not bool(of_text.any()):
            continue
        ids = sequence.tolist()
        # A decision follows every token that is counted, as no BOS is.
        position = (np.flatnonzero(contexts.corpus.counted(number)) + 1).tolist()
        decisions.append(
            Decisions(ids, position, *(column[of_text].tolist() for column in columns))
        )
    return decisions


def along_continuations(
    pair: Pair, prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]]
) -> list[Decisions]:
    """Free-running: what the tuned model wrote, and where the base ranked each of its tokens."""
    decisions = []
    for prompt, tokens in zip(prompts, written, strict=True):
        ids = [*prompt, *tokens]
        rank, base_top1 = ranks_in(pair.base.hooked, prompt, tokens)
        position = list(range(len(prompt), len(ids)))
        decisions.append(Decisions(ids, position, list(tokens), base_top1, rank))
    return decisions


def neighbours(
    unembedding: Float[Tensor, "d_vocab d_model"], tokens: Sequence[int], n: int
) -> dict[int, set[int]]:
    """The n nearest tokens of each token by cosine of the unembedding's rows, mean removed."""
    rows = unembedding.detach().float()
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=-1)
    wanted = sorted(set(tokens))
    near: dict[int, set[int]] = {}
    for start in range(0, len(wanted), 256):
        some = wanted[start : start + 256]
        with in_full_float32():
            similar: Float[Tensor, "n d_vocab"] = rows[some] @ rows.T
        itself: Bool[Tensor, "n d_vocab"] = torch.zeros_like(similar, dtype=torch.bool)
        itself[torch.arange(len(some)), torch.tensor(some)] = True
        best: Int[Tensor, "n count"] = similar.masked_fill(itself, -torch.inf).topk(n).indices
        near |= {token: set(row) for token, row in zip(some, best.tolist(), strict=True)}
    return near


Pick = dict[str, Any]


def _picks(pair: Pair, decisions: Sequence[Decisions]) -> list[list[Pick]]:
    """What there is to say of every decision, text by text."""
    changed = [
        top1
        for one in decisions
        for top1, rank in zip(one.base_top1, one.rank, strict=True)
        if rank > 1
    ]
    unembedding = value_of(plain_model(pair.base.model).get_output_embeddings(), "weight")
    near = neighbours(unembedding, changed, min(NEIGHBOURS, len(unembedding) - 1))
    return [list(_picks_of(one, near, pair.tokenizer)) for one in decisions]


def _picks_of(one: Decisions, near: Mapping[int, set[int]], tokenizer: Any) -> Iterator[Pick]:
    texts = token_texts(tokenizer, one.ids)
    for i, (at, token, top1, rank) in enumerate(
        zip(one.position, one.picked, one.base_top1, one.rank, strict=True)
    ):
        context = one.ids[:at]
        tuned_repeats, base_repeats = (repeats(context, t, NGRAM) for t in (token, top1))
        (text,) = token_texts(tokenizer, [token])
        yield {
            "index": i,
            "bucket": bucket_of(rank).label,
            "kind": kind_of(text, texts[at - 1]) if tokenizer is not None else "other",
            "near_synonym": rank > 1 and token in near[top1],
            "avoids": base_repeats and not tuned_repeats,
            "falls_into": tuned_repeats and not base_repeats,
            "deep": DEEP_TAIL.holds(rank),
        }


def _histogram(decisions: Sequence[Decisions], d_vocab: int) -> list[dict[str, int]]:
    """How many decisions had each base rank, in bins that widen with rank."""
    lows = rank_bins(d_vocab)
    highs = [*(low - 1 for low in lows[1:]), d_vocab]
    found = Counter(bisect_right(lows, rank) - 1 for one in decisions for rank in one.rank)
    return [
        {"low": low, "high": high, "count": found[i]}
        for i, (low, high) in enumerate(zip(lows, highs, strict=True))
    ]


def _rows(mode: str, picks: Sequence[Sequence[Pick]]) -> Iterator[dict[str, Any]]:
    """Shares per text, then their mean over texts: of each bucket, and of what is in it."""
    for bucket in (*BUCKETS, "changed", "all"):
        inside = [[p for p in text if _belongs(p, bucket)] for text in picks]
        if bucket != "all":
            shares = [len(i) / len(t) for i, t in zip(inside, picks, strict=True)]
            yield _row(mode, bucket, "share", shares)
        for kind in KINDS:
            yield _row(mode, bucket, kind, [_share(i, "kind", kind) for i in inside])
        if bucket == "1":
            continue
        for flag in ("near_synonym", "avoids", "falls_into"):
            yield _row(mode, bucket, flag, [_share(i, flag, True) for i in inside])
    yield _row(mode, "all", DEEP_TAIL.metric, [_share(text, "deep", True) for text in picks])
    differences = [
        _share(i, "avoids", True) - _share(i, "falls_into", True)
        for i in ([p for p in text if _belongs(p, "changed")] for text in picks)
    ]
    yield _row(mode, "changed", "avoids_minus_falls_into", differences)


def _belongs(pick: Pick, bucket: str) -> bool:
    if bucket == "all":
        return True
    return bool(pick["bucket"] != "1" if bucket == "changed" else pick["bucket"] == bucket)


def _share(picks: Sequence[Pick], key: str, value: object) -> float:
    """NaN of a text without any such decision, which is then left out of the mean."""
    return sum(pick[key] == value for pick in picks) / len(picks) if picks else math.nan


def _row(mode: str, bucket: str, metric: str, values: Sequence[float]) -> dict[str, Any]:
    found = significance.estimate(values)._asdict()
    return {"mode": mode, "bucket": bucket, "metric": metric, **found}


def _examples(
    mode: str,
    picks: Sequence[Sequence[Pick]],
    decisions: Sequence[Decisions],
    tokenizer: Any,
    n_examples: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """A random few of every bucket beyond rank 1, each with the words before it."""
    generator = torch.Generator().manual_seed(seed)
    for bucket in BUCKETS[1:]:
        places = [
            (number, pick)
            for number, text in enumerate(picks)
            for pick in text
            if pick["bucket"] == bucket
        ]
        for drawn in torch.randperm(len(places), generator=generator)[:n_examples].tolist():
            number, pick = places[drawn]
            one, i = decisions[number], pick["index"]
            before = one.ids[max(0, one.position[i] - WORDS_BEFORE) : one.position[i]]
            yield {
                "mode": mode,
                "bucket": bucket,
                "context": ("" if tokenizer is not None else " ").join(
                    token_names(tokenizer, before)
                ),
                "picked": token_names(tokenizer, [one.picked[i]])[0],
                "base_top1": token_names(tokenizer, [one.base_top1[i]])[0],
                "rank": one.rank[i],
                "kind": pick["kind"],
            }


# English; in other languages function words read as content words.
# Words that carry grammar rather than matter: articles, pronouns, prepositions, conjunctions,
# auxiliaries, and the adverbs that behave like them. Our own list.
FUNCTION_WORDS = frozenset(
    """
    a about above after again against all along although am among an and another any are
    around as at away back be because been before behind being below beneath beside besides
    between beyond both but by can cannot could did do does doing done down during each either
    else enough even ever every few for from had has have having he hence her here hers
    herself him himself his how however i if in indeed inside into is it its itself just least
    less lest like many may me might mine more most much must my myself near neither never
    nevertheless no none nor not now of off often on once one only onto or other others ought
    our ours ourselves out outside over own past perhaps quite rather same shall she should
    since so some still such than that the thee their theirs them themselves then thence there
    therefore these they thine this those thou though through throughout thus thy till to
    together too toward towards under underneath unless until unto up upon us very was we well
    were what whatever when whence where whereas wherever whether which while whither who
    whoever whole whom whose why will with within without would ye yet you your yours yourself
    yourselves
    """.split()  # noqa: SIM905 - as a list it would take a screen
)


def kind_of(token: str, before: str) -> str:
    """The kind of a token, given its text and the text right before it.

    A piece of letters that continues a word is a "subword"; the first piece of a word counts as
    that word, so a content word may be cut short. A piece of a character, whose text holds
    "\ufffd", is "other": it is no letter, whatever the tokenizer calls it.
    """
    bare = token.strip()
    if not bare or "\ufffd" in bare:
        return "other"
    if all(unicodedata.category(c)[0] in "PS" for c in bare):
        return "punctuation"
    if any(c.isdigit() for c in bare):
        return "number"
    if not bare[0].isalpha():
        # An apostrophe or a hyphen that leads into letters, as in 's or -like.
        return "subword" if before[-1:].isalnum() and token[0] == bare[0] else "other"
    if token[0] == bare[0] and before[-1:].isalnum():
        return "subword"
    return "function word" if bare.lower() in FUNCTION_WORDS else "content word"


def repeats(context: Sequence[int], token: int, n: int) -> bool:
    """Whether this token would complete an n-gram that the context already holds."""
    if len(context) < n - 1:
        return False
    start = [*context[len(context) - n + 1 :], token]
    return any(list(context[i : i + n]) == start for i in range(len(context) - n + 1))


# What a row of the table says, by metric.
IN_WORDS = {
    **dict(zip(KINDS, (f"{kind}s" for kind in KINDS[:4]), strict=False)),
    "punctuation": "punctuation",
    "other": "other tokens",
    "near_synonym": "near-synonym of the base's pick",
    "avoids": "avoids a repeated trigram",
    "falls_into": "makes one the base would not",
}
# Examples shown at once; the others are folded away, and contexts are cut to this length.
SHOWN, SHOWN_LENGTH = 6, 40


class ProvenanceResult(Result):
    """Base ranks of the tuned model's picks, and what kind of tokens they are.

    The table has a row per mode ("teacher-forced", "free-running"), bucket of base ranks ("1",
    "2-10", ">10"; "changed" for all beyond rank 1, "all") and metric: `share` of all decisions;
    of the decisions in the bucket the share of each kind of token, of near-synonyms (the pick is
    among the nearest neighbours of the base's top-1 token in the unembedding), of picks that avoid
    a repeated trigram the base's would have made (`avoids`), and of the reverse (`falls_into`).
    Values are means over texts.

    Extras: `rank_histogram`, mode to bins of base ranks ("low", "high", "count" of decisions);
    `examples`, picks of every bucket in their context.
    """

    name: ClassVar[str] = "provenance"
    title: ClassVar[str] = "Where did the base model rank the tuned model's picks?"
    columns: ClassVar[tuple[str, ...]] = (
        *("mode", "bucket", "metric", "value", "low", "high", "se", "n"),
    )
    renamed: ClassVar[Mapping[str, str]] = {"base_first": "base_top1"}

    def verdicts(self) -> list[Verdict]:
        """Base ranks, kinds of tokens, and whether picks avoid repetition."""
        return [
            Verdict("ranks", self._ranks()),
            *self._kinds(),
            Verdict("repetition", self._repetition()),
            *self._spread(),
            Verdict(
                "why",
                "Avoiding repetition is what a pick did, not why it was made. Token kinds come "
                "from an English word list.",
                caution=True,
            ),
        ]

    def _cell(self, mode: str, bucket: str, metric: str) -> str:
        return interval(self.at(mode=mode, bucket=bucket, metric=metric), PERCENT)

    def _ranks(self) -> str:
        (same, own_same), (far, own_far) = (
            [self._cell(mode, bucket, "share") for mode in MODES] for bucket in ("1", ">10")
        )
        return (
            f"On the given texts {same} of the picks are the base's own top-1 token and {far} come "
            f"from below its rank 10; in what the tuned model writes by itself, {own_same} and "
            f"{own_far} (means over texts)."
        )

    def _kinds(self) -> Iterator[Verdict]:
        rows = {kind: self._changed(FREE_RUNNING, kind) for kind in KINDS}
        measured = {kind: row for kind, row in rows.items() if math.isfinite(row["value"])}
        if measured:
            kind = max(measured, key=lambda one: float(measured[one]["value"]))
            near = self._cell(FREE_RUNNING, "changed", "near_synonym")
            yield Verdict(
                "kinds",
                "Of the picks beyond base rank 1 in the tuned model's own text, the largest kind "
                f"is {IN_WORDS[kind]} with {interval(measured[kind], PERCENT)}; {near} are "
                "near-synonyms of what the base would have picked.",
            )

    def _changed(self, mode: str, metric: str) -> Mapping[str, Any]:
        return self.at(mode=mode, bucket="changed", metric=metric)

    def _repetition(self) -> str:
        """What changed picks do to repetition, as far as the interval tells."""
        row = self._changed(FREE_RUNNING, "avoids_minus_falls_into")
        if not row["n"]:
            answer = "no pick is changed, so none avoids repetition or causes it"
        elif math.isnan(row["low"]):
            answer = "too few texts have a changed pick to tell whether such picks avoid repetition"
        elif row["low"] > 0:
            answer = "changed picks avoid repetition more often than they cause it"
        elif row["high"] < 0:
            answer = "changed picks cause repetition more often than they avoid it"
        else:
            answer = "changed picks avoid repetition not clearly more often than they cause it"
        number = f" (difference {interval(row, POINTS)})" if math.isfinite(row["low"]) else ""
        return f"In the tuned model's own text, {answer}{number}."

    def _spread(self) -> Iterator[Verdict]:
        """A warning where ranks look as if drawn at random."""
        deep = self.value(mode=TEACHER_FORCED, bucket="all", metric=DEEP_TAIL.metric)
        d_vocab, first = self.meta["d_vocab"], DEEP_TAIL.low
        if d_vocab > 2 * first and deep > 0.5 * (d_vocab - first) / d_vocab:
            yield Verdict(
                "vocabulary",
                f"{PERCENT(deep)} of base ranks are {first:.0f} or more, almost as if drawn at "
                "random: check that both models have the same vocabulary.",
                caution=True,
            )

    def evidence(self) -> list[Block]:
        """Shares by bucket, ranks and kinds in both modes, and picks in their context."""
        return [
            Text(
                "A pick is the tuned model's top-1 token: after every token of the given texts "
                "(teacher-forced), and along what it writes by itself, greedily (free-running). "
                "Base ranks count from 1; tied logits share the best rank. Changed: beyond base "
                f"rank 1. Near-synonym: among the {NEIGHBOURS} nearest neighbours of the base's "
                "top-1 token in the unembedding."
            ),
            self._overview(),
            Grid([self._rank_chart(mode) for mode in MODES]),
            Grid([self._kind_chart(mode) for mode in MODES]),
            Details("the same by base rank", [self._by_bucket(mode) for mode in MODES]),
            *self._in_context(),
        ]

    def _overview(self) -> Table:
        lines = [
            *((f"base rank {bucket}", bucket, "share") for bucket in BUCKETS),
            (f"of which from base rank {DEEP_TAIL.low:.0f} or lower", "all", DEEP_TAIL.metric),
            *((f"beyond rank 1: {words}", "changed", m) for m, words in IN_WORDS.items()),
        ]
        rows = [
            [words, *(self._cell(mode, b, metric) for mode in MODES)] for words, b, metric in lines
        ]
        return Table(
            ["mean over texts [95%]", *MODES],
            rows,
            "base rank: share of all picks; beyond rank 1: share of the picks that are not the "
            "base's top-1 token",
            joins=True,
        )

    def _rank_chart(self, mode: str) -> Chart:
        bins = self.extras["rank_histogram"][mode]
        total = sum(one["count"] for one in bins)
        rows = [
            {
                "series": self.tuned_name,
                "rank": _bin(one["low"], one["high"]),
                "value": 100 * one["count"] / max(1, total),
                "picks": one["count"],
            }
            for one in bins
        ]
        title = f"{mode}: base rank of the picks, % of all {total:,} picks together"
        alt = f"{title}; {rows[0]['value']:.1f}% at rank 1; bins widen with rank"
        x, y = Axis("rank", "base rank", is_category=True), Axis("value", "share, %", "zero")
        return Chart("bars", title, alt, rows, x, y)

    def _kind_chart(self, mode: str) -> Chart:
        rows = [
            {
                "series": self.tuned_name,
                "kind": IN_WORDS[kind],
                **ends(row),
                "texts": row["n"],
            }
            for kind in KINDS
            for row in [self._changed(mode, kind)]
        ]
        title = f"{mode}: kinds of the picks beyond base rank 1, mean over texts, 95% intervals"
        x, y = Axis("value", "share of picks", "share"), Axis("kind", "", is_category=True)
        return Chart("dots", title, title, rows, x, y)

    def _by_bucket(self, mode: str) -> Table:
        metrics = {"share": "share of all picks", **IN_WORDS}
        rows = [
            [
                words,
                *(
                    interval(found[0], PERCENT) if found else ""
                    for bucket in BUCKETS
                    for found in [self.rows(mode=mode, bucket=bucket, metric=metric)]
                ),
            ]
            for metric, words in metrics.items()
        ]
        head = [f"{mode} [95%]", *(f"base rank {b}" for b in BUCKETS)]
        return Table(head, rows)

    def _in_context(self) -> list[Block]:
        """Free-running examples at once, all of them folded away with longer contexts."""
        examples = self.extras["examples"]
        if not examples:
            return []
        own = [one for one in examples if one["mode"] == FREE_RUNNING] or examples
        return [
            Heading("Which tokens are these?"),
            _example_table(own[:SHOWN], SHOWN_LENGTH),
            Details(f"all {count(len(examples), 'example')}", [_example_table(examples)]),
        ]


def _example_table(examples: Sequence[Mapping[str, Any]], length: int = 0) -> Table:
    """Contexts are cut at their beginning to `length` characters; 0 cuts none."""
    rows = [
        [
            f"…{one_line(one['context'])[-length:]}",
            *(repr(str(one[key]).strip()) for key in ("picked", "base_top1")),
            f"{one['rank']:,}",
            one["kind"],
            one["mode"],
        ]
        for one in examples
    ]
    return Table(["context", "tuned pick", "base pick", "base rank", "kind", "mode"], rows)


def _bin(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"
