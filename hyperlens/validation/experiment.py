"""validate: run every experiment on planted pairs, and count false alarms and detections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .. import __version__
from ..checks import check_choice, check_counts, check_seed, check_types
from ..errors import HyperlensError
from ..files import check_new_folder, expand_user
from ..render.format import count
from ..results.fingerprint import versions
from ..results.resume import KeptRecords
from .planted import KINDS, PlantedPair
from .result import OPEN, RIGHT, UNDECIDED, WRONG, ValidationResult
from .verdicts import N_CONTROLS, answers_of, contradictions

Job = tuple[str, int]
"""A kind of planted pair, and the number of the pair."""

Record = Mapping[str, Any]


@check_types
def validate(
    *,
    n_nulls: int = 5,
    n_planted: int = 2,
    only: Sequence[str] = (),
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> ValidationResult:
    """Do experiments name what was planted, and stay silent where nothing was?

    Small random models and copies of them with one known change are made without training, every
    experiment is run on each pair, and the words of its verdicts are held against the truth. A
    pair takes a few seconds, and every fifth of the kind "noise" half a minute for the controls of
    its null test: the default takes a few minutes.

    Args:
        n_nulls: pairs of each kind in which there is nothing to find: for false alarms. At 5% the
            interval is [2.4%, 9.0%] of 200 and [0.1%, 24.9%] of 20.
        n_planted: pairs of each other kind.
        only: these kinds alone; see `hyperlens.validation.planted.KINDS`.
        seed: of the first pair of each kind; the others count on from it.
        out: a new folder to save the result in. Pairs that are done are kept beside it, in
            `out.partial`, until then: the same call goes on after an interruption, and one with
            fewer pairs takes what there is.
        progress: show a progress bar.

    Returns:
        A `ValidationResult`: every answer, shares with exact intervals, contradictions.

    Raises:
        HyperlensError: if there is no such kind, or the folder is not a new one.
        ResultsError: if an experiment words a verdict in a way that is not known here.

    >>> result = validate(only=["same"], n_planted=1, progress=False)
    >>> result.detections("same").hits, result.false_alarms("same").hits
    (1, 0)
    """
    check_counts(n_nulls=n_nulls, n_planted=n_planted)
    check_seed(seed)
    kinds = _chosen(only)
    if out is not None:
        check_new_folder(expand_user(out))
    jobs = list(_jobs(kinds, n_nulls, n_planted))
    records = KeptRecords.beside(out)
    identities = {job: _identity(*job, seed) for job in jobs}
    done: dict[Job, Record] = {}
    for job in tqdm(jobs, desc="validation", unit="pair", disable=not progress):
        kept = records.find(identities[job])
        done[job] = _record(*job, seed) if kept is None else kept
        if kept is None:
            records.keep(identities[job], done[job])
    result = _result(done, kinds, seed, {"n_nulls": n_nulls, "n_planted": n_planted})
    if out is not None:
        result.save(expand_user(out))
        records.forget(identities.values())
    return result


def _chosen(only: Sequence[str]) -> list[str]:
    names = (only,) if isinstance(only, str) else tuple(dict.fromkeys(only))
    for name in names:
        check_choice("only", name, list(KINDS), HyperlensError)
    return [kind for kind in KINDS if not names or kind in names]


def _jobs(kinds: Sequence[str], n_nulls: int, n_planted: int) -> Iterator[Job]:
    """All kinds in turn, so that an interrupted run has some of each."""
    for number in range(max(n_nulls, n_planted)):
        for kind in kinds:
            if number < (n_nulls if KINDS[kind].is_null else n_planted):
                yield kind, number


def _identity(kind: str, number: int, seed: int) -> dict[str, Any]:
    return {
        "hyperlens": __version__,
        "kind": kind,
        "seed": seed + number,
        "n_controls": N_CONTROLS,
    }


def _record(kind: str, number: int, seed: int) -> Record:
    """What is said of one pair, and what was to be said."""
    planted = KINDS[kind].plant(seed + number)
    every = KINDS[kind].null_test_every
    with_null_test = bool(every) and number % every == 0
    pair = (planted.base, planted.tuned, planted.texts)
    answers = answers_of(*pair, seed=seed + number, with_null_test=with_null_test)
    return {
        "verdicts": [
            {
                "verdict": name,
                "answer": answer,
                "outcome": _outcome(planted, name, answer),
                "due": name in planted.right,
            }
            for name, answer in answers.items()
        ],
        "contradictions": list(contradictions(answers)),
    }


def _outcome(planted: PlantedPair, verdict: str, answer: str) -> str:
    if answer in planted.wrong.get(verdict, ()):
        return WRONG
    if answer in planted.right.get(verdict, ()):
        return RIGHT
    return UNDECIDED if verdict in {*planted.right, *planted.wrong} else OPEN


def _result(
    done: Mapping[Job, Record], kinds: Sequence[str], seed: int, options: Mapping[str, int]
) -> ValidationResult:
    jobs = sorted(done, key=lambda job: (list(KINDS).index(job[0]), job[1]))
    table = [
        {"kind": kind, "pair": number, **row}
        for kind, number in jobs
        for row in done[kind, number]["verdicts"]
    ]
    found = [
        {"kind": kind, "pair": number, "words": words}
        for kind, number in jobs
        for words in done[kind, number]["contradictions"]
    ]
    extras = {
        "contradictions": found,
        "kinds": {kind: KINDS[kind].words for kind in kinds},
        "nulls": [kind for kind in kinds if KINDS[kind].is_null],
    }  # fmt: skip
    meta = {
        "title": f"{count(len(jobs), 'planted pair')} of {count(len(kinds), 'kind')}",
        "seed": seed,
        "options": {**options, "kinds": list(kinds), "n_controls": N_CONTROLS},
        "versions": versions(),
        "notes": [],
    }
    return ValidationResult(tuple(table), extras, meta)
