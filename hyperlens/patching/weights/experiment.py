"""transplant_weights: whose weights does it take to make one model behave as the other?

Activations carry all that happened before them; weights do not. Moving whole parts of the tuned
model into the base, and of the base into the tuned model, shows what parts suffice and what parts
are needed (arXiv 2605.22579 trains the last five blocks alone and takes them for the place of it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from ...checks import check_counts
from ...decoding.diversity import REPETITION_METRICS as WRITTEN
from ...decoding.generate import GenerationRunner
from ...decoding.prompts import check_room, choose_prompts
from ...errors import PatchError
from ...hooks.loading import LoadedModel, hook
from ...models.kinds import is_peft
from ...models.weight_sharing import merged
from ...pair import open_inputs
from ...passes.failures import explaining_out_of_memory
from ...statistics import significance
from ..choosing import drawn
from ..directions import DIRECTIONS, INTO_BASE
from ..outcomes import METRICS, p_value
from .finding import TransplantResult
from .hybrids import Forced, Host, Hybrid, Key, forced, hosts, hybrids, key_of
from .named import NAMED
from .parts import moved
from .smallest import smallest_suffixes

Written = Mapping[Key | str, Mapping[str, list[float]]]


def transplant_weights(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    enough: float = 0.9,
    n_texts: int = 64,
    max_length: int = 128,
    n_prompts: int = 16,
    prompt_tokens: int = 17,
    max_new_tokens: int = 48,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> TransplantResult:
    """Move parts of either model into the other: the last k blocks, every k, and each part alone.

    The last k blocks move with and without the final norm and the unembedding. What a mixed model
    decides is read teacher-forced; what it writes, greedily. Parts that tuning left as they were
    are not moved, so that mixed models with the same weights are run only once.

    The smallest suffix that reproduces the behaviour is the one of fewest blocks for which the 95%
    interval of the recovered share of changed decisions lies above `enough`, and, where text was
    written and tuning changed its type-token ratio (TTR), for which the interval of the TTR's
    difference to the donor holds 0 and reaches no further from it than half of what tuning
    changed. There may be none.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; adapters are merged.
        texts: what `compare_models` takes.
        enough: the share of changed decisions that a suffix must surely recover, from 0 to 1.
        n_texts: how many texts are read, drawn at random.
        max_length: tokens per text.
        n_prompts, prompt_tokens, max_new_tokens: of the greedy continuations; 0 new tokens writes
            none, which is most of the time that this takes.
        batch_size: texts per forward pass; does not change the result.
        seed: of the choice of texts and prompts.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        PatchError: if the models are of different architectures, blocks hand on more than the
            residual stream, or `enough` is no share.
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    if not 0 < enough < 1:
        raise PatchError(f"enough is a share of decisions between 0 and 1; got {enough}")
    check_counts(n_texts=n_texts, batch_size=batch_size)
    opened = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    opened = drawn(opened, n_texts, seed)
    prompts: list[list[int]] = []
    if max_new_tokens:
        check_room(opened.pair, prompt_tokens, max_new_tokens)
        prompts = choose_prompts(opened.corpus, n_prompts, prompt_tokens, seed)
    first, second = _plain(opened.pair.base), _plain(opened.pair.tuned)
    sides = hosts(first, second)
    moves = [
        one for way in DIRECTIONS for one in hybrids(way, opened.pair.base.hooked.cfg.n_layers)
    ]
    keys = list(dict.fromkeys(key_of(one, sides) for one in moves))
    with explaining_out_of_memory(batch_size, ", or max_length"):
        read = forced(sides, keys, opened.corpus, batch_size, progress)
    continuing = GenerationRunner(prompts, max_new_tokens, max(batch_size, 16), seed, False)
    written = _write(sides, keys, continuing, progress) if prompts else {}
    meta = opened.pair.describe() | {
        "seed": seed,
        "options": {
            "enough": enough,
            "n_texts": len(opened.corpus.sequences),
            "max_length": max_length,
            "n_prompts": len(prompts),
            "prompt_tokens": prompt_tokens,
            "max_new_tokens": max_new_tokens,
        },
        "data": opened.corpus.describe(),
        "notes": [*opened.notes, *_notes(opened.pair.base, opened.pair.tuned, sides, read)],
    }
    contrasts = list(_contrasts(moves, sides, written))
    outcome = read.models["base"]
    extras = {
        "decisions": int(outcome.decisions.sum()),
        "changed": int(outcome.changed.sum()),
        "changed_parts": sorted(map(str, sides[INTO_BASE].changed), key=_part_order),
        "contrasts": contrasts,
    }
    table = (*_rows(moves, sides, read), *_written_rows(moves, sides, written))
    extras["smallest"] = [one._asdict() for one in smallest_suffixes(table, contrasts, enough)]
    return TransplantResult(table, extras, meta)


def _plain(loaded: LoadedModel) -> LoadedModel:
    """The model itself, or with its adapter merged."""
    if not is_peft(loaded.model):
        return loaded
    return hook(replace(loaded, model=merged(loaded.model)), "residual")


def _part_order(part: str) -> tuple[int, int]:
    return (1, NAMED.index(part)) if part in NAMED else (0, int(part))


# Of equal weights rounding leaves no more than this, nats.
ALIKE = 1e-4


def _notes(
    base: LoadedModel, tuned: LoadedModel, sides: Mapping[str, Host], read: Forced
) -> Iterator[str]:
    if any(is_peft(loaded.model) for loaded in (base, tuned)):
        yield "the adapter was merged: weights move between plain models"
    everything = read.hybrids[INTO_BASE, sides[INTO_BASE].changed]
    left = everything.estimate("kl_tuned").value
    if left > ALIKE:
        yield (
            f"with all weights of the tuned model the base is still {left:.2g} nats away from it: "
            "the two differ in more than their weights (in their configurations)"
        )


def _rows(
    moves: Sequence[Hybrid], sides: Mapping[str, Host], read: Forced
) -> Iterator[dict[str, Any]]:
    for name, outcome in read.models.items():
        for metric in METRICS:
            yield _row("unpatched", name, -1, metric, outcome.estimate(metric))
    for one in moves:
        outcome = read.hybrids[key_of(one, sides)]
        for metric in METRICS:
            yield _row(*one[:3], metric, outcome.estimate(metric))


def _row(
    direction: str, kind: str, number: int, metric: str, found: significance.Estimate
) -> dict[str, Any]:
    return {
        "direction": direction,
        "kind": kind,
        "number": number,
        "metric": metric,
    } | found._asdict()


def _write(
    sides: Mapping[str, Host], keys: Sequence[Key], continuing: GenerationRunner, progress: bool
) -> Written:
    """Repetition of what every mixed model writes, and of what both models write as they are."""
    found: dict[Key | str, Mapping[str, list[float]]] = {}
    none = frozenset[Any]()
    for name, direction in zip(("base", "tuned"), DIRECTIONS, strict=True):
        found[name] = found[direction, none] = continuing.run(sides[direction].loaded).metrics
    left = [key for key in keys if key not in found]
    for direction, parts in tqdm(left, desc="writing", unit="model", disable=not progress):
        host = sides[direction]
        with moved(host.slots, parts):
            found[direction, parts] = continuing.run(host.loaded).metrics
    return found


def _written_rows(
    moves: Sequence[Hybrid], sides: Mapping[str, Host], written: Written
) -> Iterator[dict[str, Any]]:
    if not written:
        return
    for name in ("base", "tuned"):
        for metric in WRITTEN:
            yield _row("unpatched", name, -1, metric, significance.estimate(written[name][metric]))
    for one in moves:
        metrics = written[key_of(one, sides)]
        for metric in WRITTEN:
            yield _row(*one[:3], metric, significance.estimate(metrics[metric]))


def _contrasts(
    moves: Sequence[Hybrid], sides: Mapping[str, Host], written: Written
) -> Iterator[dict[str, Any]]:
    """What is written less what host and donor write, paired by prompt.

    p is corrected over the different models of a direction (Holm). The donor itself is the first
    row of each.
    """
    if not written:
        return
    for direction, host, donor in zip(
        DIRECTIONS, ("base", "tuned"), ("tuned", "base"), strict=True
    ):
        those = [one for one in moves if one.direction == direction]
        keys = list(dict.fromkeys(key_of(one, sides) for one in those))
        for metric in WRITTEN:
            of_host, of_donor = (written[name][metric] for name in (host, donor))
            change = significance.difference(of_donor, of_host)
            yield _row(direction, "donor", -1, metric, change) | {
                "against": "host",
                "p": p_value(change),
            }
            for against, own in (("host", of_host), ("donor", of_donor)):
                found = {key: significance.difference(written[key][metric], own) for key in keys}
                corrected = significance.holm([p_value(one) for one in found.values()])
                p_of = dict(zip(found, corrected, strict=True))
                for one in those:
                    key = key_of(one, sides)
                    yield _row(*one[:3], metric, found[key]) | {"against": against, "p": p_of[key]}
