"""What experiments say of a planted pair, read from the words of their verdicts.

A verdict is read where people read it: in its sentence. Each reader knows every sentence that its
experiment can write; one that it does not know is an error, never a miss. Where the sentence gives
a number and no conclusion, the number is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import PairError, PatchError, ResultsError

NOTHING = "nothing changed"
# 4 statistics are tested in a null test: with 99 controls a corrected p can be 0.04.
N_CONTROLS = 99
ENOUGH_ALIKE = 0.999

ANSWERS: dict[str, tuple[str, ...]] = {
    "change": ("changed", NOTHING),
    "dimension": ("grew", "fell", "unclear"),
    "dimension after the norm": ("grew", "fell", "unclear"),
    "greedy text": ("more diverse", "less diverse", "the same", "unclear"),
    "sampled text": ("more diverse", "less diverse", "the same", "unclear"),
    "picks": ("the base's own", "others"),
    "temperature": ("temperature", "ranks below the first", "more than temperature"),
    "text at equal entropy": ("different", "unclear"),
    "bias": ("the base plus a bias", "a part", "no clear gain", NOTHING),
    "fitted bias": ("the base plus a bias", "a part", "no clear gain", NOTHING),
    "random changes": ("beyond", "not beyond", NOTHING),
    "blocks": (
        *("what enters the last block", "the last block", "mostly the head", "the head alone"),
        *("none", NOTHING),
    ),
    "interaction": ("together", "overlap", "none"),
    "attention": ("block 0", "block 1", "block 2", "none", NOTHING),
    "part alone": (
        *("embedding", "block 0", "block 1", "block 2", "final norm", "unembedding"),
        NOTHING,
    ),
    "smallest suffix": ("no block", "some blocks", "none suffices", "cannot tell", NOTHING),
    "positions": ("position 5", "a position", "a token", "an offset", "none", NOTHING),
    "expansion": ("supported", "contradicted", "cannot tell", NOTHING),
    "norm": ("all", "some", "none", NOTHING),
}
"""Every answer that is read, by the name of the verdict."""

Answers = dict[str, str]
"""The name of a verdict to what it says."""

Texts = list[list[int]]
"""Token ids."""


class Experiment(NamedTuple):
    """An experiment, and what it says of a pair.

    Attributes:
        name: what it is called.
        ask: runs it on an open pair's texts and reads its verdicts.
    """

    name: str
    ask: Callable[[Any, Texts, int], Answers]


def answers_of(base: Any, tuned: Any, texts: Texts, seed: int, with_null_test: bool) -> Answers:
    """Run every experiment on a pair, and read what it says.

    Args:
        base, tuned: models in memory.
        texts: token ids.
        seed: of every experiment.
        with_null_test: run the null test, too: by far the slowest.

    Raises:
        ResultsError: if a verdict is worded in a way that is not known here.
    """
    from ..pair import open_pair

    pair = open_pair(base, tuned)
    chosen = [one for one in EXPERIMENTS if with_null_test or one.name != "null_test"]
    return {name: answer for one in chosen
            for name, answer in one.ask(pair, texts, seed).items()}  # fmt: skip


def phrase(result: Any, topic: str, known: Mapping[str, str], starts: str = "") -> str:
    """What the verdict on a topic says: the answer whose words are in its sentence, the first.

    Args:
        result: of an experiment.
        topic: of the verdict.
        known: words of the sentence to the answer they stand for.
        starts: how the sentence begins, where a topic has several.

    Raises:
        ResultsError: if there is no such verdict, or it has none of the words.
    """
    sentences = [v.answer for v in result.verdicts()
                 if v.topic == topic and v.answer.startswith(starts)]  # fmt: skip
    for words, answer in known.items():
        if any(words in sentence for sentence in sentences):
            return answer
    raise ResultsError(
        f"the verdict of {result.name} on {topic!r} has none of the known words: expected "
        f"{' | '.join(known)}; got {sentences}"
    )


def _sign(row: Mapping[str, Any]) -> str:
    """Whether an interval lies above or below 0."""
    if row["low"] > 0:
        return "grew"
    return "fell" if row["high"] < 0 else "unclear"


def _comparison(pair: Any, texts: Texts, seed: int) -> Answers:
    from ..compare import compare_models
    from ..probes import LogitLens, ParticipationRatio, RankReordering, ResidualDrift

    # A temperature changes no stream and no rank: only the entropy of the last layer's logits.
    probes = [ResidualDrift(), ParticipationRatio(), RankReordering(), LogitLens(layers=(-1,))]
    result = compare_models(pair, texts, probes=probes, batch_size=48, seed=seed, progress=False)
    topics = {verdict.topic for verdict in result.verdicts()}
    (delta,) = (
        row
        for row in result.measured("participation_ratio", "delta", "raw")
        if row.layer == result.n_layers
    )
    return {
        "change": NOTHING if "changed?" in topics else "changed",
        "dimension": _sign(delta._asdict()),
    }


def _behaviour(pair: Any, texts: Texts, seed: int) -> Answers:
    from ..experiments.behaviour import measure_behaviour

    result = measure_behaviour(
        pair, texts, n_prompts=24, prompt_tokens=6, max_new_tokens=12, n_examples=0,
        batch_size=24, seed=seed, progress=False,
    )  # fmt: skip
    known = {
        "equally diverse on every prompt": "the same",
        "text is more diverse": "more diverse",
        "text is less diverse": "less diverse",
        "no clear difference": "unclear",
        "cannot tell": "unclear",
    }
    return {
        "greedy text": phrase(result, "behaviour", known, "Greedy decoding"),
        "sampled text": phrase(result, "behaviour", known, "Sampling"),
    }


def _provenance(pair: Any, texts: Texts, seed: int) -> Answers:
    from ..experiments.provenance import TEACHER_FORCED, trace_provenance

    result = trace_provenance(
        pair, texts, n_prompts=2, prompt_tokens=6, max_new_tokens=2, n_examples=0,
        batch_size=48, seed=seed, progress=False,
    )  # fmt: skip
    share = result.at(mode=TEACHER_FORCED, bucket="1", metric="share")["value"]
    return {"picks": "the base's own" if share > ENOUGH_ALIKE else "others"}


def _temperature(pair: Any, texts: Texts, seed: int) -> Answers:
    from ..experiments.temperature import match_temperature

    result = match_temperature(
        pair, texts, n_prompts=24, prompt_tokens=6, max_new_tokens=12, batch_size=48,
        seed=seed, progress=False,
    )  # fmt: skip
    of_predictions = {
        "is no more than a temperature does": "temperature",
        "but the ranks below them changed": "ranks below the first",
        "tuning did more than sharpen": "more than temperature",
    }
    of_text = {
        "texts differ when": "different",
        "No clear difference": "unclear",
        "cannot tell whether entropy": "unclear",
    }
    return {
        "temperature": phrase(result, "predictions", of_predictions),
        "text at equal entropy": phrase(result, "sampled text", of_text),
    }


def _static_bias(pair: Any, texts: Texts, seed: int) -> Answers:
    from ..experiments.static_bias import inject_static_bias

    result = inject_static_bias(
        pair, texts, k=30, alphas=(0.5, 1.0), n_prompts=2, prompt_tokens=6,
        max_new_tokens=2, batch_size=48, seed=seed, progress=False,
    )  # fmt: skip
    of_predictions = {
        "there is no change to explain": NOTHING,
        "the tuned model is the base plus a bias": "the base plus a bias",
        "no clear gain": "no clear gain",
        "the bias accounts for": "a part",
    }
    of_fitted = {
        "the tuned model is the base plus this bias": "the base plus a bias",
        "no clear gain": "no clear gain",
        "it accounts for": "a part",
    }
    has_fitted = any(verdict.topic == "fitted bias" for verdict in result.verdicts())
    return {
        "bias": phrase(result, "predictions", of_predictions),
        "fitted bias": phrase(result, "fitted bias", of_fitted) if has_fitted else NOTHING,
    }


def _null_test(pair: Any, texts: Texts, seed: int) -> Answers:
    from ..experiments.null_test import run_null_test

    try:
        result = run_null_test(
            pair, texts[:4], controls=["rows_and_columns"], n_controls=N_CONTROLS, n_prompts=4,
            prompt_tokens=4, max_new_tokens=4, seed=seed, progress=False,
        )  # fmt: skip
    except PairError as error:
        return {"random changes": _refused(error, "the same weights")}
    least = min(p for p in result.corrected_p("rows_and_columns").values() if not math.isnan(p))
    return {"random changes": "beyond" if least < 0.05 else "not beyond"}


def _refused(error: Exception, words: str) -> str:
    """An experiment that says there is nothing to measure; any other refusal is an error."""
    if words not in str(error):
        raise error
    return NOTHING


def _blocks(pair: Any, texts: Texts, seed: int) -> Answers:
    from ..patching.blocks import patch_blocks

    result = patch_blocks(
        pair, texts, controls=False, max_new_tokens=0, batch_size=48, seed=seed, progress=False
    )
    known = {
        "Tuning changed no decision": NOTHING,
        "no block is needed for them": "the head alone",
        "By itself what enters the last block does most": "what enters the last block",
        "By itself the last block does most": "the last block",
        "By itself the head (final norm and unembedding) does most": "mostly the head",
        "None can be told to do most by itself": "none",
    }
    together = {"beyond the sum of what each does alone": "together", "shares overlap": "overlap"}
    has_interaction = any(verdict.topic == "interaction" for verdict in result.verdicts())
    return {
        "blocks": phrase(result, "cause", known),
        "interaction": phrase(result, "interaction", together) if has_interaction else "none",
    }


def _attention(pair: Any, texts: Texts, seed: int) -> Answers:
    """Which block's attention brings about most; nothing where blocks are not made of two parts."""
    from ..patching.blocks import patch_blocks
    from ..patching.outcomes import INTO_BASE

    if pair.base.hooked.structure.branches is None:
        return {}
    result = patch_blocks(
        pair, texts, site="attn_out", controls=False, max_new_tokens=0, batch_size=48, seed=seed,
        progress=False,
    )  # fmt: skip
    rows = result.along(INTO_BASE, "to_tuned")
    return {"attention": _strongest(rows, result.extras["changed"])}


def _strongest(rows: Any, n_changed: int) -> str:
    """The block whose attention brings about most of the changed decisions."""
    if not n_changed:
        return NOTHING
    best = max(rows, key=lambda row: row["value"])
    return f"block {best['block']}" if best["low"] > 0 else "none"


def _weights(pair: Any, texts: Texts, seed: int) -> Answers:
    from ..patching.weights import patch_weights

    result = patch_weights(pair, texts, max_new_tokens=0, batch_size=48, seed=seed, progress=False)
    if not result.extras["changed"]:
        phrase(result, "weights", {"Tuning changed no decision": NOTHING})
        return {"part alone": NOTHING, "smallest suffix": NOTHING}
    (sentence,) = (v.answer for v in result.verdicts() if v.topic == "one part alone")
    part = re.search(r"tuned into base, (.+?) has the highest share", sentence)
    if part is None:
        raise ResultsError(f"no part alone is named by {result.name}: {sentence}")
    (suffix,) = (v.answer for v in result.verdicts()
                 if v.topic == "smallest suffix" and v.answer.startswith("Tuned"))  # fmt: skip
    with_head = suffix.partition(" To suffice:")[0].partition("with final norm and unembedding, ")
    known = {
        "no block at all is needed": "no block",
        "no suffix of blocks": "none suffices",
        "it cannot be told": "cannot tell",
        " suffice": "some blocks",
    }
    found = [answer for words, answer in known.items() if words in with_head[2]]
    if not found:
        raise ResultsError(f"the smallest suffix is worded in an unknown way: {suffix}")
    return {"part alone": part.group(1), "smallest suffix": found[0]}


def _positions(pair: Any, texts: Texts, seed: int) -> Answers:
    from ..patching.positions import patch_positions

    try:
        result = patch_positions(
            pair, texts, offsets=6, n_texts=32, batch_size=64, seed=seed, progress=False
        )
    except PatchError as error:
        return {"positions": _refused(error, "changed")}
    _, sentence = (v.answer for v in result.verdicts() if v.answer.startswith("Tuned into base"))
    return {"positions": _earlier(sentence)}


def _earlier(sentence: str) -> str:
    """Which earlier token is named, the most telling first."""
    position = re.search(r"position (\d+) at layer", sentence)
    if position is not None:
        return "position 5" if position.group(1) == "5" else "a position"
    if re.search(r"token '.*' at layer", sentence):
        return "a token"
    if "move the decision at a corrected p below" in sentence:
        return "an offset"
    if "no fixed offset before the last token" in sentence:
        return "none"
    raise ResultsError(f"what is said of earlier tokens is worded in an unknown way: {sentence}")


def _expansion(pair: Any, texts: Texts, seed: int) -> Answers:
    from ..patching.expansion import patch_expansion

    result = patch_expansion(
        pair, texts, n_directions=[8], n_random=2, max_new_tokens=0, batch_size=32,
        seed=seed, progress=False,
    )  # fmt: skip
    known = {
        "tuning changed no decision": NOTHING,
        "Supported: that the expansion": "supported",
        "Contradicted: that the expansion": "contradicted",
        "Cannot tell whether the expansion": "cannot tell",
    }
    return {"expansion": phrase(result, "cause", known)}


def _norm(pair: Any, texts: Texts, seed: int) -> Answers:
    from ..patching.norm import patch_norm

    result = patch_norm(pair, texts, batch_size=48, seed=seed, progress=False)
    after = {"dimension after the norm": _sign(result.dimension("change"))}
    known = {"Tuning changed no decision": NOTHING, "what the norm's weights change": ""}
    if phrase(result, "decisions", known) == NOTHING:
        return {**after, "norm": NOTHING}
    share = result.decided("norm into base", "to_tuned")["value"]
    return {**after, "norm": {0.0: "none", 1.0: "all"}.get(share, "some")}


EXPERIMENTS = (
    Experiment("comparison", _comparison),
    Experiment("behaviour", _behaviour),
    Experiment("null_test", _null_test),
    Experiment("provenance", _provenance),
    Experiment("temperature", _temperature),
    Experiment("static_bias", _static_bias),
    Experiment("patch_blocks", _blocks),
    Experiment("patch_blocks", _attention),
    Experiment("patch_positions", _positions),
    Experiment("patch_weights", _weights),
    Experiment("patch_expansion", _expansion),
    Experiment("patch_norm", _norm),
)


# Contradictions


class Contradiction(NamedTuple):
    """Two verdicts that cannot both be true of one pair.

    Attributes:
        words: what they say.
        first, second: the verdict, and those of its answers that the other excludes.
    """

    words: str
    first: tuple[str, tuple[str, ...]]
    second: tuple[str, tuple[str, ...]]


def _unlike(name: str) -> tuple[str, ...]:
    return tuple(answer for answer in ANSWERS[name] if answer != NOTHING)


# Verdicts that count the same decisions of the same texts.
COUNTING = ("blocks", "part alone", "norm")
BLOCKS = ("what enters the last block", "the last block")
HEADS = ("mostly the head", "the head alone")
ALL_BIAS = ("the base plus a bias",)
DIVERSE = ("more diverse", "less diverse")

CONTRADICTIONS = (
    Contradiction(
        "no change at all, yet top-1 predictions differ",
        ("change", (NOTHING,)), ("picks", ("others",)),
    ),
    Contradiction(
        "no change at all, yet more than a temperature",
        ("change", (NOTHING,)), ("temperature", ("ranks below the first", "more than temperature")),
    ),
    Contradiction(
        "no more than a temperature, yet top-1 predictions differ",
        ("temperature", ("temperature",)), ("picks", ("others",)),
    ),
    Contradiction(
        "no more than a temperature, yet greedy text is of another diversity",
        ("temperature", ("temperature",)), ("greedy text", DIVERSE),
    ),
    Contradiction(
        "no more than a temperature, yet the base plus a bias",
        ("temperature", ("temperature",)), ("bias", ALL_BIAS),
    ),
    Contradiction(
        "more than a temperature since other tokens are top-1, yet all are the base's own",
        ("temperature", ("more than temperature",)), ("picks", ("the base's own",)),
    ),
    *(
        Contradiction(
            f"no decision changed ({first}), yet some did ({second})",
            (first, (NOTHING,)), (second, _unlike(second)),
        )
        for first in COUNTING for second in (*COUNTING, "expansion") if first != second
    ),
    Contradiction(
        "the head alone brings about all, yet blocks are needed (patch_weights)",
        ("blocks", ("the head alone",)), ("smallest suffix", ("some blocks", "none suffices")),
    ),
    Contradiction(
        "a block or what enters it does most, yet no block is needed (patch_weights)",
        ("blocks", BLOCKS), ("smallest suffix", ("no block",)),
    ),
    Contradiction(
        "the last block does most, yet norm or unembedding does most alone",
        ("blocks", ("the last block",)), ("part alone", ("final norm", "unembedding")),
    ),
    Contradiction(
        "the head does most, yet a block or the embedding does most alone",
        ("blocks", HEADS), ("part alone", ("embedding", "block 0", "block 1", "block 2")),
    ),
    Contradiction(
        "the norm's weights bring about all, yet a block or what enters it does most",
        ("norm", ("all",)), ("blocks", BLOCKS),
    ),
    Contradiction(
        "the norm's weights bring about all, yet the unembedding does most alone",
        ("norm", ("all",)), ("part alone", ("unembedding",)),
    ),
    Contradiction(
        "no block is needed, yet an earlier token moves decisions",
        ("smallest suffix", ("no block",)),
        ("positions", ("position 5", "a position", "a token", "an offset")),
    ),
    Contradiction(
        "no block is needed, yet the expansion of the last block's output is the cause",
        ("smallest suffix", ("no block",)), ("expansion", ("supported",)),
    ),
    Contradiction(
        "the dimension fell, yet its expansion is the cause",
        ("dimension", ("fell",)), ("expansion", ("supported",)),
    ),
    Contradiction(
        "the same weights, yet a change",
        ("random changes", (NOTHING,)), ("change", ("changed",)),
    ),
)  # fmt: skip
"""All of them, whatever was planted."""


def contradictions(answers: Mapping[str, str]) -> Iterator[str]:
    """Which verdicts on one pair contradict each other, in words."""
    for one in CONTRADICTIONS:
        sides = (one.first, one.second)
        if all(answers.get(name) in excluded for name, excluded in sides):
            yield one.words
