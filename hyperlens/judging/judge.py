"""Which model's text does a judge prefer? (arXiv 2605.22579, Table 5 and Appendix G)"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checks import check_counts, check_seed
from ..decoding.generate import continuations
from ..decoding.prompts import check_room, choose_examples, choose_prompts, opening_and_texts
from ..errors import CorpusError, JudgeError
from ..hooks.loading import parse_device, parse_dtype
from ..models.adapters import adapter_folder
from ..models.sources import OpenedModel, open_source
from ..pair import open_inputs
from ..results.fingerprint import versions
from .asking import ask
from .cache import Answers
from .finding import JudgeResult
from .judges import FunctionJudge, Judge, as_judge
from .pairs import Pair, pairs_sha256, read_pairs
from .prompt import FORM, TEMPLATE, write_prompt
from .tally import SIDES, Judged, tally
from .verdict import CRITERIA, PLACES, SCORED, TIE, Verdict


def judge_models(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    judge: Any,
    n_prompts: int = 100,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    tries: int = 3,
    cache: str | Path | None = None,
    n_examples: int = 4,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> JudgeResult:
    """Let two models continue the same prompts, greedily, and a judge compare what they write.

    A continuation ends where its model ends it, or after `max_new_tokens`. The judge sees the
    prompt and both texts, without names, in both orders.

    Args:
        base, tuned: the models A and B: what `compare_models` takes, but no hooked models. Two
            adapters may be compared: each goes on the base that it names.
        texts: what `compare_models` takes; their first tokens are the prompts.
        judge: what `judge_continuations` takes. A local judge is held beside both models.
        n_prompts: how many texts, drawn at random, are continued.
        prompt_tokens: how many of their first tokens are the prompt, BOS included.
        max_new_tokens: how many are added to it at most.
        tries, cache: as in `judge_continuations`.
        n_examples: pairs, drawn at random, kept as text with what the judge said.
        batch_size: prompts per forward pass.
        seed: of the choice of prompts and examples.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        HyperlensError: if a model cannot be opened, texts do not fit, or the judge cannot be asked.
    """
    check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens)
    check_seed(seed)
    # Whatever is wrong with the judge is said before two models have written for it.
    asked = as_judge(judge, device)
    _check_asking(asked, tries, cache, n_examples)
    adapter = _on_its_own_base(tuned, device, dtype)
    opened = open_inputs(
        base,
        tuned if adapter is None else (adapter.model, adapter.tokenizer),
        texts,
        max_length=max(prompt_tokens, 2),
        device=device,
        dtype=dtype,
    )
    pair = opened.pair
    tokenizer = pair.tokenizer
    if tokenizer is None:
        raise CorpusError("a judge reads text, and the models have no tokenizer: give one of them")
    check_room(pair, prompt_tokens, max_new_tokens)
    prompts = choose_prompts(opened.corpus, n_prompts, prompt_tokens, seed)
    written = [
        continuations(
            loaded.model,
            loaded.tokenizer or tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
        for loaded in (pair.base, pair.tuned)
    ]
    pairs = []
    for prompt, *tokens in zip(prompts, *written, strict=True):
        context, (a, b) = opening_and_texts(tokenizer, prompt, tokens)
        pairs.append(Pair(context, a, b))
    meta = pair.describe() | {
        "seed": seed,
        "options": {
            "n_prompts": len(prompts),
            "prompt_tokens": prompt_tokens,
            "max_new_tokens": max_new_tokens,
        },
        "data": opened.corpus.describe(),
        "notes": list(opened.notes),
    }
    if adapter is not None:
        known = {"name": Path(adapter.name).name, "source": adapter.name, "kind": adapter.kind}
        meta["tuned"] |= known
    shown = choose_examples(len(pairs), len(pairs), seed)
    return _judged(pairs, asked, meta, tries, cache, shown, n_examples, progress)


def judge_continuations(
    pairs: Any,
    *,
    judge: Any,
    names: Sequence[str] = ("a", "b"),
    tries: int = 3,
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
        tries: how often to ask until an answer can be read; pairs that have none then are left
            out, and counted.
        cache: a folder where every answer is kept, and found again by another run that asks the
            same judge the same; None keeps none. For a function see `FunctionJudge`.
        n_examples: pairs kept as text, with what the judge said: the first ones.
        device: for a local judge.
        progress: show progress bars.

    Raises:
        HyperlensError: if the pairs cannot be read, or the judge cannot be asked.
    """
    if len(names) != len(SIDES):
        raise JudgeError(f"expected the names of two sides, got {len(names)}")
    read = read_pairs(pairs)
    asked = as_judge(judge, device)
    _check_asking(asked, tries, cache, n_examples)
    sides = dict(zip(("base", "tuned"), ({"name": name} for name in names), strict=True))
    source = {"file": Path(pairs).name} if isinstance(pairs, str | Path) else {}
    meta = {**sides, "options": {}, "data": source, "notes": [], "versions": versions()}
    return _judged(read, asked, meta, tries, cache, range(len(read)), n_examples, progress)


def _on_its_own_base(
    source: Any, device: str | torch.device | None, dtype: str | torch.dtype | None
) -> OpenedModel | None:
    """An adapter opened for itself; by default it would be put on the other model."""
    if adapter_folder(source) is None:
        return None
    return open_source(source, device=parse_device(device), dtype=parse_dtype(dtype))


def _check_asking(judge: Judge, tries: int, cache: Any, n_examples: int) -> None:
    check_counts(tries=tries)
    check_counts(0, n_examples=n_examples)
    if cache is not None and isinstance(judge, FunctionJudge) and not judge.says_who_it_is:
        raise JudgeError(
            "answers of a function cannot be kept without knowing which function gave them: give "
            "it an attribute `identity`, a mapping of JSON values, or leave cache out"
        )


def _judged(
    pairs: list[Pair],
    judge: Judge,
    meta: Mapping[str, Any],
    tries: int,
    cache: str | Path | None,
    shown: Sequence[int],
    n_examples: int,
    progress: bool,
) -> JudgeResult:
    """Ask the judge about all pairs; the first usable ones in the order `shown` are examples."""
    answers = Answers(judge.identity, cache)
    # Equal texts need no judge: there is nothing to prefer.
    prompts = {
        pair: (
            write_prompt(pair.context, pair.a, pair.b),
            write_prompt(pair.context, pair.b, pair.a),
        )
        for pair in pairs
        if not pair.is_identical
    }
    questions = [prompt for both in prompts.values() for prompt in both]
    found = ask(judge, questions, answers, tries=tries, progress=progress)
    judged = []
    for pair in pairs:
        both = prompts.get(pair)
        judged.append(Judged(pair, None if both is None else (found[both[0]], found[both[1]])))
    notes = list(meta["notes"])
    if answers.damaged:
        notes.append(f"{answers.damaged} kept answers were damaged and asked for again")
    about = {
        **meta,
        "judge": dict(judge.identity),
        "options": {**meta["options"], "tries": tries},
        "data": {**meta["data"], "n_pairs": len(pairs), "pairs_sha256": pairs_sha256(pairs)},
        "notes": notes,
    }
    return JudgeResult(tuple(tally(judged)), _extras(judged, shown, n_examples), about)


def _extras(judged: Sequence[Judged], shown: Sequence[int], n_examples: int) -> dict[str, Any]:
    problems = [problem for one in judged for problem in one.problems]
    identical = sum(one.found is None for one in judged)
    usable = [judged[i] for i in shown if judged[i].verdicts is not None]
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


def _example(one: Judged) -> dict[str, Any]:
    """A pair with both verdicts, told by side and not by place."""
    orders = zip((SIDES, SIDES[::-1]), one.verdicts or (), strict=True)
    return {
        **one.pair._asdict(),
        "outcome": {criterion: one.outcome(criterion) for criterion in CRITERIA},
        "verdicts": [_told(verdict, shown) for shown, verdict in orders],
    }


def _told(verdict: Verdict, shown: Sequence[str]) -> dict[str, Any]:
    by_place = dict(zip(PLACES, shown, strict=True)) | {TIE: TIE}
    scores = {
        criterion: dict(zip(shown, verdict.scores(criterion), strict=True)) for criterion in SCORED
    }
    return {
        "shown_first": shown[0],
        "winner": by_place[verdict.winner],
        **scores,
        "reason": verdict.reason,
    }
