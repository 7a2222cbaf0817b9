"""Which model's text does a judge prefer? (arXiv 2605.22579, Table 5 and Appendix G)"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..checks import check_counts, check_seed, check_types
from ..decoding.generate import continuations
from ..decoding.prompts import (
    batch_size_for,
    choose_examples,
    open_prompts,
    opening_and_texts,
    prompt_lengths,
)
from ..errors import CorpusError, JudgeError
from ..hooks.loading import parse_device, parse_dtype
from ..models.adapters import adapter_folder
from ..models.sources import OpenedModel, open_source
from ..pair import Pair
from ..render.blocks import (
    Axis,
    Block,
    Chart,
    Details,
    Heading,
    Role,
    Sample,
    Samples,
    Table,
    Text,
    Verdict,
)
from ..render.format import (
    PERCENT,
    Form,
    complement,
    count,
    ends,
    interval,
    number,
    one_line,
    p_value,
    signed,
)
from ..results.fingerprint import versions
from ..results.result import Result
from .answers import AnswerCache, ask
from .judges import FunctionJudge, Judge, as_judge
from .labelled import LabelledPrompt, open_prompt, read_labelled
from .pairs import (
    SIDES,
    Answer,
    JudgedPair,
    TextPair,
    labelled_outcomes,
    labelled_rows,
    pairs_sha256,
    read_pairs,
    result_rows,
)
from .prompt import (
    CRITERIA,
    FORM,
    PLACES,
    SCORED,
    TEMPLATE,
    TIE,
    Judgement,
    UnreadableAnswer,
    write_prompt,
)


@check_types
def judge_models(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    judge: Any,
    n_prompts: int = 32,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    tries: int = 3,
    prompt: str | Path | None = None,
    cache: str | Path | None = None,
    n_examples: int = 4,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> JudgeResult:
    """Let a judge compare two models' continuations of the same prompts.

    Both models decode greedily; a continuation ends where its model ends it, or after
    `max_new_tokens`. The judge sees the prompt and both texts, without names, in both orders.

    Args:
        base, tuned: the models A and B: what `compare_models` takes, but no hooked models; or an
            open `Pair` and the texts. Two adapters may be compared: each goes on the base that it
            names.
        texts: what `compare_models` takes; their first tokens are the prompts.
        judge: what `judge_continuations` takes. A local judge is held beside both models.
        n_prompts: how many texts, drawn at random, are continued.
        prompt_tokens: how many of a text's first tokens are the prompt, BOS included; of
            conversations all before the assistant's last turn is.
        max_new_tokens: the longest continuation, in tokens.
        tries: how often to ask until an answer can be read; pairs without one are left out then.
        prompt: ask about each pair once more in the paper's protocol, in one order with the texts
            labelled A and B: "paper" for its own prompt (Appendix G), or a text file with the
            placeholders {context}, {continuation_a} and {continuation_b} that asks for the same
            form of answer.
        cache: see `judge_continuations`.
        n_examples: how many pairs, drawn at random, are kept as text with what the judge said.
        batch_size: prompts per forward pass.
        seed: decides which prompts and examples are drawn.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        HyperlensError: if a model cannot be opened, texts do not fit, or the judge cannot be asked.
    """
    check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens)
    check_seed(seed)
    # A problem with the judge is reported before two models have generated for it.
    asking = _Asking.checked(judge, device, tries, prompt, cache, n_examples, progress)
    adapter = None if isinstance(base, Pair) else _on_its_own_base(tuned, device, dtype)
    inputs, prompts = open_prompts(
        base,
        tuned if adapter is None else (adapter.model, adapter.tokenizer),
        texts,
        n_prompts=n_prompts,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    pairs = _generated(inputs.pair, prompts, max_new_tokens, batch_size, progress)
    options = {
        "n_prompts": len(prompts),
        "prompt_tokens": prompt_lengths(inputs.corpus, prompts, prompt_tokens),
        "max_new_tokens": max_new_tokens,
    }
    meta = inputs.metadata(seed=seed, options=options)
    if adapter is not None:
        name = Path(adapter.name).name
        meta["tuned"] |= {"name": name, "source": adapter.name, "kind": adapter.kind}
    return asking.result(pairs, meta, shown=choose_examples(len(pairs), len(pairs), seed))


@check_types
def judge_continuations(
    pairs: Any,
    *,
    judge: Any,
    names: Sequence[str] = ("a", "b"),
    tries: int = 3,
    prompt: str | Path | None = None,
    cache: str | Path | None = None,
    n_examples: int = 4,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> JudgeResult:
    """Let a judge compare continuations that are already written.

    Args:
        pairs: mappings with the texts `context`, `a` and `b`, or a JSONL file of them.
        judge: an `Endpoint`, a local chat model (folder, hub id, (model, tokenizer) or
            `LocalJudge`), or a function from prompt to answer.
        names: what to call the two sides.
        tries: how often to ask until an answer can be read; pairs without one are left out then,
            and counted.
        prompt: ask about each pair once more in the paper's protocol, in one order with the texts
            labelled A and B: "paper" for its own prompt (Appendix G), or a text file with the
            placeholders {context}, {continuation_a} and {continuation_b} that asks for the same
            form of answer.
        cache: a folder where every answer is kept, and found again by another run that asks the
            same judge the same; None keeps none. For a function see `FunctionJudge`.
        n_examples: how many pairs, the first ones, are kept as text with what the judge said.
        device: for a local judge.
        progress: show progress bars.

    Raises:
        HyperlensError: if the pairs cannot be read, or the judge cannot be asked.

    >>> from hyperlens.judging import FewerRepeatedBigrams
    >>> pairs = [{"context": "Once", "a": " upon a time", "b": " upon a time upon a time"}]
    >>> result = judge_continuations(pairs, judge=FewerRepeatedBigrams(), progress=False)
    >>> result.value(criterion="overall", metric="a_wins")
    1.0
    """
    if len(names) != len(SIDES):
        raise JudgeError(f"expected the names of two sides, got {len(names)}")
    texts = read_pairs(pairs)
    asking = _Asking.checked(judge, device, tries, prompt, cache, n_examples, progress)
    sides = dict(zip(("base", "tuned"), ({"name": name} for name in names), strict=True))
    source = {"file": Path(pairs).name} if isinstance(pairs, str | Path) else {}
    meta = {**sides, "options": {}, "corpus": source, "notes": [], "versions": versions()}
    return asking.result(texts, meta, shown=range(len(texts)))


def _on_its_own_base(
    source: Any, device: str | torch.device | None, dtype: str | torch.dtype | None
) -> OpenedModel | None:
    """An adapter opened for itself; by default it would be put on the other model."""
    if adapter_folder(source) is None:
        return None
    return open_source(source, device=parse_device(device), dtype=parse_dtype(dtype))


def _generated(
    pair: Pair, prompts: list[list[int]], max_new_tokens: int, batch_size: int, progress: bool
) -> list[TextPair]:
    """Both models' continuations of every prompt."""
    tokenizer = pair.tokenizer
    if tokenizer is None:
        raise CorpusError("a judge reads text, and the models have no tokenizer: give one of them")
    generations = [
        continuations(
            loaded.model,
            loaded.tokenizer or tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size_for(loaded, prompts, batch_size),
            progress=progress,
        )
        for loaded in (pair.base, pair.tuned)
    ]
    pairs = []
    for prompt, *tokens in zip(prompts, *generations, strict=True):
        context, (a, b) = opening_and_texts(tokenizer, prompt, tokens)
        pairs.append(TextPair(context, a, b))
    return pairs


@dataclass(frozen=True)
class _Asking:
    """Whom to ask and how, checked."""

    judge: Judge
    tries: int
    prompt: LabelledPrompt | None
    cache: str | Path | None
    n_examples: int
    progress: bool

    @classmethod
    def checked(
        cls,
        judge: Any,
        device: str | torch.device | None,
        tries: int,
        prompt: str | Path | None,
        cache: str | Path | None,
        n_examples: int,
        progress: bool,
    ) -> _Asking:
        judge = as_judge(judge, device)
        check_counts(tries=tries)
        check_counts(0, n_examples=n_examples)
        if cache is not None and isinstance(judge, FunctionJudge) and not judge.is_identified:
            raise JudgeError(
                "answers of a function cannot be kept without knowing which function gave them: "
                "give it an attribute `identity`, a mapping of JSON values, or leave cache out"
            )
        labelled = None if prompt is None else open_prompt(prompt)
        return cls(judge, tries, labelled, cache, n_examples, progress)

    def result(
        self, pairs: list[TextPair], meta: Mapping[str, Any], shown: Sequence[int]
    ) -> JudgeResult:
        """Ask about all pairs; the first that could be judged, in the order `shown`, are examples.

        Args:
            pairs: the texts.
            meta: what is known of models and texts.
            shown: indices of pairs.
        """
        answers = AnswerCache(self.judge.identity, self.cache)
        judged = self._judged(pairs, answers)
        labelled = self._labelled(pairs, answers)
        notes = list(meta["notes"])
        if answers.damaged:
            notes.append(f"{answers.damaged} kept answers were damaged and asked for again")
        about = {
            **meta,
            "judge": dict(self.judge.identity),
            "options": {
                **meta["options"],
                "tries": self.tries,
                **({} if self.prompt is None else {"prompt": self.prompt.name}),
            },
            "corpus": {
                **meta["corpus"],
                "n_pairs": len(pairs),
                "pairs_sha256": pairs_sha256(pairs),
            },
            "notes": notes,
        }
        extras = _extras(judged, shown, self.n_examples)
        rows = result_rows(judged)
        if labelled is not None and self.prompt is not None:
            rows += labelled_rows(labelled)
            extras["labelled"] = _labelled_extras(labelled, self.prompt)
        return JudgeResult(tuple(rows), extras, about)

    def _labelled(self, pairs: list[TextPair], answers: AnswerCache) -> list[Answer] | None:
        """The answer about every pair in the paper's protocol, where it is asked for."""
        if self.prompt is None:
            return None
        prompts = [None if one.is_identical else self.prompt.write(*one) for one in pairs]
        questions = [prompt for prompt in prompts if prompt is not None]
        found = ask(
            self.judge,
            questions,
            answers,
            tries=self.tries,
            progress=self.progress,
            read=read_labelled,
        )
        return [None if prompt is None else found[prompt] for prompt in prompts]

    def _judged(self, pairs: list[TextPair], answers: AnswerCache) -> list[JudgedPair]:
        # About equal texts nobody is asked: there is nothing to prefer.
        prompts = {
            pair: (
                write_prompt(pair.context, pair.a, pair.b),
                write_prompt(pair.context, pair.b, pair.a),
            )
            for pair in pairs
            if not pair.is_identical
        }
        questions = [prompt for orders in prompts.values() for prompt in orders]
        found = ask(self.judge, questions, answers, tries=self.tries, progress=self.progress)
        judged = []
        for pair in pairs:
            orders = prompts.get(pair)
            both = None if orders is None else (found[orders[0]], found[orders[1]])
            judged.append(JudgedPair(pair, both))
        return judged


def _extras(judged: Sequence[JudgedPair], shown: Sequence[int], n_examples: int) -> dict[str, Any]:
    problems = [problem for one in judged for problem in one.problems]
    identical = sum(one.answers is None for one in judged)
    usable = [judged[i] for i in shown if judged[i].judgements is not None]
    return {
        "counts": {
            "pairs": len(judged),
            "judged": len(usable),
            "identical": identical,
            "left_out": len(judged) - len(usable) - identical,
        },
        "outcomes": {c: [one.outcome(c) for one in judged] for c in CRITERIA},
        "examples": [_example(one) for one in usable[:n_examples]],
        "problems": dict(Counter(str(problem).split(" (")[0] for problem in problems)),
        "unreadable": [
            {"problem": str(problem), "answer": problem.answer} for problem in problems[:n_examples]
        ],
        "prompt": TEMPLATE.replace("{form}", FORM),
    }


def _labelled_extras(answers: Sequence[Answer], prompt: LabelledPrompt) -> dict[str, Any]:
    """The question, whether it is the paper's, and what became of each pair."""
    unread = [one for one in answers if isinstance(one, UnreadableAnswer)]
    return {
        "name": prompt.name,
        "is_paper": prompt.is_paper,
        "prompt": prompt.template,
        "outcomes": {criterion: labelled_outcomes(answers, criterion) for criterion in CRITERIA},
        "left_out": len(unread),
        "problems": dict(Counter(str(problem).split(" (")[0] for problem in unread)),
    }


def _example(one: JudgedPair) -> dict[str, Any]:
    """A pair with both judgements, by side rather than by place."""
    orders = zip((SIDES, SIDES[::-1]), one.judgements or (), strict=True)
    return {
        **one.pair._asdict(),
        "outcome": {criterion: one.outcome(criterion) for criterion in CRITERIA},
        "verdicts": [_by_side(judgement, shown) for shown, judgement in orders],
    }


def _by_side(judgement: Judgement, shown: Sequence[str]) -> dict[str, Any]:
    side_of = dict(zip(PLACES, shown, strict=True)) | {TIE: TIE}
    scores = {
        criterion: dict(zip(shown, judgement.scores(criterion), strict=True))
        for criterion in SCORED
    }
    return {
        "shown_first": shown[0],
        "winner": side_of[judgement.winner],
        **scores,
        "reason": judgement.reason,
    }


OUTCOMES = {"a_wins": "A wins", "tie": "tie", "b_wins": "B wins"}
BIASES = {
    "first_position": "won by the text shown first",
    "longer_wins": "won by the longer text",
    "fewer_repeats_wins": "won by fewer repeated bigrams",
}
# Two decimals throughout, as numbers of the size of 5 have.
SCORE = Form(lambda x, _: number(x, 5.0), 1.0, 10.0)
SCORE_DIFFERENCE = Form(lambda x, _: signed(x, 5.0), -9.0, 9.0)
# Examples shown at once; the others are folded away.
SHOWN = 1


class JudgeResult(Result):
    """Which of two models' continuations a judge prefers, each pair asked in both orders.

    A is `meta["base"]`, B is `meta["tuned"]`, whatever they are. The table has a row per criterion
    ("coherence", "diversity": the higher score; "overall": the named winner) and metric:

    - `a_wins`, `b_wins`, `tie`: shares of pairs; a pair is won by the side that wins in both
      orders;
    - `a_of_decided`: A's share of the pairs that are no ties; p of the exact binomial test against
      one half, Holm-corrected over the criteria;
    - `first_position`: of the pairs whose two answers favour one place (both name it, or one does
      and the other is a tie), the share that favour the first; `orders_disagree`: share of pairs
      judged otherwise in the other order; `longer_wins`, `fewer_repeats_wins`: shares of decided
      pairs won by the text with more words, with fewer repeated bigrams of words;
    - `score_a`, `score_b`, `score_difference` (A - B): mean scores, 1 to 10 (not overall).

    - with `prompt`, `labelled_a_wins`, `labelled_b_wins`, `labelled_tie`, `labelled_a_of_decided`:
      the same in the paper's protocol, each pair asked once with the texts labelled A and B; with
      Clopper and Pearson's intervals, and p not corrected.

    Other shares have Wilson's 95% intervals, scores t intervals over pairs. n: pairs.

    Extras: `counts` of pairs, `outcomes` by criterion and pair ("a", "b", "tie"; None: left out),
    `examples` of pairs with both answers, `problems` with answers that could not be read,
    `unreadable` examples of them, and `prompt`, the question; `labelled`, of the paper's protocol
    the question, whether it is the paper's own (`is_paper`), and the outcomes.
    """

    name: ClassVar[str] = "judge"
    title: ClassVar[str] = "Which text does a judge prefer?"
    columns: ClassVar[tuple[str, ...]] = ("criterion", "metric", "value", "low", "high", "n", "p")

    @property
    def judge(self) -> str:
        """Who judged, in a few words."""
        about = self.meta["judge"]
        name = about.get("model") or about.get("name") or "unnamed"
        where = f" at {about['url']}" if "url" in about else ""
        return one_line(f"{name}{where} ({about['kind']})")

    @property
    def is_language_model(self) -> bool:
        """Whether a language model judged, as far as is known."""
        return self.meta["judge"]["kind"] in ("endpoint", "local")

    def verdicts(self) -> list[Verdict]:
        """Whom the judge prefers by each criterion, and whether the order of the texts matters."""
        counts = self.extras["counts"]
        if not counts["judged"] and not counts["identical"]:
            answer = "No pair could be judged: the judge gave no answer of the form asked for."
            return [Verdict("preferred", answer)]
        answers = [self._preference(criterion) for criterion in ("overall", *SCORED)]
        return [*answers, *self._order_bias(), *self._in_one_order(), *self._cautions()]

    def _in_one_order(self) -> list[Verdict]:
        """What the same judge says in the paper's protocol, where it was asked."""
        if "labelled" not in self.extras:
            return []
        decided = self._row("overall", "labelled_a_of_decided")
        if not decided["n"]:
            return [Verdict("one order", f"{self._protocol()}, no pair was decided.")]
        shares = ", ".join(
            f"{words} {interval(self._row('overall', f'labelled_{metric}'), PERCENT)}"
            for metric, words in OUTCOMES.items()
        )
        answer = (
            f"{self._protocol()}, overall: {shares} of "
            f"{count(self._row('overall', 'labelled_tie')['n'], 'pair')} ({p_value(decided['p'])}, "
            "uncorrected); a judge that favours a place shows in these."
        )
        return [Verdict("one order", answer)]

    def _protocol(self) -> str:
        about = self.extras["labelled"]
        whose = "the paper's prompt" if about["is_paper"] else f"the prompt {about['name']}"
        return f"Asked once, with {whose} and texts labelled A and B"

    def _preference(self, criterion: str) -> Verdict:
        row, label = self._row(criterion, "a_of_decided"), criterion.capitalize()
        if not row["n"]:
            return Verdict(criterion, f"{label}: no pair was decided, so there is no preference.")
        is_a = row["value"] >= 0.5
        side = _named("A", self.base_name) if is_a else _named("B", self.tuned_name)
        share = interval(row if is_a else complement(row), PERCENT)
        wins = f"{side} wins {share} of {count(row['n'], 'decided pair')}, {p_value(row['p'])}"
        answer = wins if row["p"] < 0.05 else f"no clear preference ({wins})"
        return Verdict(criterion, f"{label}: {answer}.")

    def _order_bias(self) -> list[Verdict]:
        """Whether the judge favours a place, and how often both orders agree."""
        place = self._row("overall", "first_position")
        agreement = self._agreement("overall")
        if not agreement["n"]:
            return []
        agree = f"both orders agree on {interval(agreement, PERCENT)} of pairs"
        share = (
            f"of {count(place['n'], 'pair')} judged by place, {interval(place, PERCENT)} went to "
            "the text shown first"
        )
        if not place["n"]:
            answer = f"No sign that the judge favours a place: {agree}."
        elif place["low"] > 0.5 or place["high"] < 0.5:
            favoured = "first" if place["value"] > 0.5 else "second"
            answer = (
                f"The judge favours the text shown {favoured} ({share}; {agree}); only pairs that "
                "it judged alike in both orders count as decided."
            )
        else:
            answer = f"No clear sign that the judge favours a place ({share}; {agree})."
        return [Verdict("order", answer)]

    def _cautions(self) -> list[Verdict]:
        cautions = []
        if not self.is_language_model:
            answer = (
                "As far as is known no language model judged: this tries out the set-up, and is "
                "not evidence about the models."
            )
            cautions.append(Verdict("judge", answer, caution=True))
        answer = "A judge's preference is not a measure of quality by itself: read the texts."
        return [*cautions, Verdict("quality", answer, caution=True)]

    def evidence(self) -> list[Block]:
        """Win rates, signs of bias, scores, and pairs with what the judge said."""
        return [
            Text(f"A is {self.base_name}, B is {self.tuned_name}. {self._about()}"),
            Heading("Win rates"),
            self._rates(),
            self._rates_chart(),
            *self._labelled_rates(),
            Heading("The judge's bias"),
            self._biases(),
            self._bias_chart(),
            Heading("Scores"),
            self._scores(),
            *self._texts(),
            *self._unreadable(),
            self._question(),
        ]

    def _about(self) -> str:
        """How it was judged, and what became of the pairs."""
        counts = self.extras["counts"]
        parts = [f"{counts['judged']} judged"]
        if counts["identical"]:
            parts.append(f"{counts['identical']} of two equal texts (ties, not asked)")
        if counts["left_out"]:
            problems = "; ".join(f"{n}x {what}" for what, n in self.extras["problems"].items())
            parts.append(
                f"{counts['left_out']} left out, because an answer could not be read ({problems})"
            )
        return (
            f"Judged by {self.judge}, who saw both texts of each pair without names, in both "
            "orders. A pair is won by the text preferred in both; otherwise it is a tie. Coherence "
            "and diversity go to the higher score (1 to 10), overall to the winner that the judge "
            f"names. {count(counts['pairs'], 'pair')}: {', '.join(parts)}."
        )

    def _rates(self) -> Table:
        rows = []
        for criterion in CRITERIA:
            cells = [interval(self._row(criterion, metric), PERCENT) for metric in OUTCOMES]
            p = p_value(self._row(criterion, "a_of_decided")["p"])
            rows.append([criterion, *cells, p])
        return Table(
            ["share of pairs", *OUTCOMES.values(), ""],
            rows,
            "With Wilson's 95% intervals. p: two-sided exact binomial test of A's wins among the "
            "decided pairs against one half, Holm-corrected over the three criteria.",
        )

    def _labelled_rates(self) -> list[Block]:
        """Win rates in the paper's protocol, where it was asked."""
        if "labelled" not in self.extras:
            return []
        about = self.extras["labelled"]
        rows = []
        for criterion in CRITERIA:
            cells = [
                interval(self._row(criterion, f"labelled_{metric}"), PERCENT) for metric in OUTCOMES
            ]
            p = p_value(self._row(criterion, "labelled_a_of_decided")["p"])
            rows.append([criterion, *cells, p])
        caption = (
            f"{self._protocol()}: A is always the first. With Clopper and Pearson's 95% intervals; "
            "p of the exact binomial test over the decided pairs, uncorrected."
        )
        if about["left_out"]:
            problems = "; ".join(f"{n}x {what}" for what, n in about["problems"].items())
            caption += f" {count(about['left_out'], 'pair')} left out ({problems})."
        lines = [Text(line) for line in about["prompt"].splitlines() if line]
        return [
            Heading("In one order, as the paper asks"),
            Table(["share of pairs", *OUTCOMES.values(), ""], rows, caption),
            Details("what the judge was asked there", lines),
        ]

    def _rates_chart(self) -> Chart:
        a, b = self.base_name, self.tuned_name
        names = dict(zip(OUTCOMES, (a, "tie", b), strict=True))
        rows = [
            {"series": series, "criterion": criterion, **self._numbers(criterion, metric)}
            for metric, series in names.items()
            for criterion in CRITERIA
        ]
        title = f"won and tied pairs, judged by {self.judge}: shares, 95% intervals"
        roles: dict[str, Role] = {a: "base", "tie": "other", b: "tuned"}
        x, y = Axis("value", "share of pairs", "share"), Axis("criterion", "", is_category=True)
        return Chart("dots", title, f"Share of pairs that {a} and {b} win", rows, x, y, roles)

    def _biases(self) -> Table:
        rows = [
            [words, *(interval(self._row(criterion, metric), PERCENT) for criterion in CRITERIA)]
            for metric, words in BIASES.items()
        ]
        agreement = [interval(self._agreement(criterion), PERCENT) for criterion in CRITERIA]
        return Table(
            ["share of pairs", *CRITERIA],
            [*rows, ["same verdict in both orders", *agreement]],
            "With Wilson's 95% intervals. 50% is no bias; agreement is best at 100%. Shown first: "
            "of pairs whose two answers together favour one place. Longer (in words) and fewer "
            "repeated bigrams (of words): of decided pairs whose texts differ in that.",
        )

    def _bias_chart(self) -> Chart:
        rows = [
            {"series": criterion, "bias": words, **self._numbers(criterion, metric)}
            for criterion in CRITERIA
            for metric, words in BIASES.items()
        ]
        title = f"bias of {self.judge}: shares of pairs, 95% intervals"
        roles: dict[str, Role] = dict.fromkeys(CRITERIA, "other")
        x, y = Axis("value", "share (0.5: no bias)", "share"), Axis("bias", "", is_category=True)
        return Chart("dots", title, f"{title}, by criterion", rows, x, y, roles)

    def _scores(self) -> Table:
        rows = [
            [
                criterion,
                interval(self._row(criterion, "score_a"), SCORE),
                interval(self._row(criterion, "score_b"), SCORE),
                interval(self._row(criterion, "score_difference"), SCORE_DIFFERENCE),
            ]
            for criterion in SCORED
        ]
        caption = "Mean over pairs of both orders' mean, 1 to 10, with 95% t intervals."
        return Table(["mean score", "A", "B", "A - B, paired"], rows, caption)

    def _texts(self) -> list[Block]:
        examples = [self._example(example) for example in self.extras["examples"]]
        if not examples:
            return []
        more = [block for blocks in examples[SHOWN:] for block in blocks]
        folded = [Details(f"{len(examples) - SHOWN} more", more)] if more else []
        first = [block for blocks in examples[:SHOWN] for block in blocks]
        return [Heading("The texts, and what the judge said"), *first, *folded]

    def _example(self, example: Mapping[str, Any]) -> list[Block]:
        names = (_named("A", self.base_name), _named("B", self.tuned_name))
        texts = [Sample(name, example[side]) for name, side in zip(names, SIDES, strict=True)]
        rows = [_example_row(judgement) for judgement in example["verdicts"]]
        reasons = [
            Text(f"With {judgement['shown_first'].upper()} first: “{judgement['reason']}”")
            for judgement in example["verdicts"]
        ]
        head = ["", "coherence A : B", "diversity A : B", "winner"]
        return [Samples(example["context"], texts), Table(head, rows), *reasons]

    def _unreadable(self) -> list[Block]:
        answers = [
            Text(f"“{one['answer']}”: {one['problem']}") for one in self.extras["unreadable"]
        ]
        return [Details("answers that could not be read", answers)] if answers else []

    def _question(self) -> Details:
        lines = self.extras["prompt"].splitlines()
        return Details("what the judge was asked", [Text(line) for line in lines if line])

    def _row(self, criterion: str, metric: str) -> Mapping[str, Any]:
        return self.at(criterion=criterion, metric=metric)

    def _numbers(self, criterion: str, metric: str) -> dict[str, Any]:
        """What a chart shows of a row."""
        row = self._row(criterion, metric)
        return {**ends(row), "pairs": row["n"]}

    def _agreement(self, criterion: str) -> Mapping[str, Any]:
        """The share of pairs judged alike in both orders."""
        return complement(self._row(criterion, "orders_disagree"))


def _named(side: str, name: str) -> str:
    """A side with its name, unless that says the same."""
    return side if name.upper() == side else f"{side} ({name})"


def _example_row(judgement: Mapping[str, Any]) -> list[str]:
    scores = [f"{judgement[c]['a']} : {judgement[c]['b']}" for c in SCORED]
    winner = judgement["winner"]
    shown_first = f"{judgement['shown_first'].upper()} shown first"
    return [shown_first, *scores, winner if winner == TIE else winner.upper()]
