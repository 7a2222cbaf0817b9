"""Does it hold on other texts? Several pairs on several corpora (arXiv 2605.22579, Table 6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..checks import check_counts, check_seed
from ..data.corpus import are_token_ids, check_max_length
from ..data.texts import read_texts
from ..decoding.diversity import REPETITION_METRICS
from ..decoding.prompts import check_room
from ..errors import CorpusError, HyperlensError, PairError
from ..files import check_new_folder
from ..models.sources import check_source
from ..pair import check_generates, open_pair, tokenized
from ..results.fingerprint import texts_sha256, versions
from ..statistics import significance
from .cross_domain_finding import CrossDomainResult
from .cross_domain_row import RowOptions, measure_row, prompts_of
from .kept_rows import KeptRows, model_identity
from .mauve_scores import SEEDS, few_texts
from .mauve_written import check_mauve, check_writes_text
from .text_features import Featurizer, open_featurizer

Pairs = Mapping[str, Any]
Identities = Mapping[tuple[str, str], Mapping[str, Any]]


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
    """Every pair on every corpus: what both models write greedily, and what changed inside.

    All texts are read, and what can be told of the models without opening them is checked,
    before anything else. A pair is opened once, whatever the number of corpora.

    Args:
        pairs: name to (base, tuned), each what `compare_models` takes, but no hooked models.
        corpora: name to texts, each what `compare_models` takes. Which of them a model was trained
            on is for the caller to know.
        n_prompts: how many texts of each corpus, drawn at random, are continued greedily.
        prompt_tokens: how many of their first tokens are the prompt, BOS included.
        max_new_tokens: how many are added; an end-of-text token is a token like any other.
        max_length: tokens per text, teacher-forced.
        mauve_features: a model that reads texts, for MAUVE between continuations and the texts' own
            ones, as many tokens long; None leaves it out. Only texts that long are continued then.
        batch_size: texts or prompts per forward pass.
        seed: of the choice of prompts and of the token sample of intervals.
        out: a new folder to save the result in. Rows that are done are kept beside it, in
            `out.partial`, until then: the same call goes on after an interruption.
        device, dtype: as in `compare_models`.
        progress: show a progress bar.

    Raises:
        HyperlensError: naming the pair or the corpus, if a source cannot be opened, texts do not
            fit the models, or there is no room for the continuations.
    """
    options = RowOptions(n_prompts, prompt_tokens, max_new_tokens, max_length, batch_size, seed)
    _check_options(options, mauve_features)
    if out is not None:
        check_new_folder(Path(out))
    _check_pairs(pairs)
    texts = _read_all(corpora)
    kept = KeptRows.beside(out)
    with_mauve = mauve_features is not None
    identities = _identities(pairs, texts, options, mauve_features, device, dtype)
    found = {key: kept.find(identity) for key, identity in identities.items()}
    done = {key: record for key, record in found.items() if record is not None}
    reader: Featurizer | None = None
    bar = tqdm(
        total=len(identities), initial=len(done), desc="cross-domain", unit="row",
        disable=not progress,
    )  # fmt: skip
    with bar:
        for name, sources in pairs.items():
            missing = {c: t for c, t in texts.items() if (name, c) not in done}
            if missing and with_mauve and reader is None:
                reader = open_featurizer(
                    mauve_features, batch_size=batch_size, device=device, dtype=dtype
                )
            rows = _rows_of_pair(name, sources, missing, options, reader, device, dtype)
            for corpus, record in rows:
                done[name, corpus] = record
                kept.keep(identities[name, corpus], record)
                bar.update()
    finding = _finding(pairs, texts, done, options)
    if out is not None:
        finding.save(Path(out).expanduser())
        kept.forget(identities.values())
    return finding


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


def _check_pairs(pairs: Any) -> None:
    if not isinstance(pairs, Mapping) or not pairs:
        raise PairError(f"pairs must map names to (base, tuned), one at least; got {pairs!r}")
    for name, sources in pairs.items():
        if not isinstance(sources, tuple | list) or len(sources) != 2:
            raise PairError(f"pair {name!r} must be (base, tuned), got {sources!r}")
        with _naming(f"pair {name!r}"):
            check_generates(*sources)
            for source in sources:
                check_source(source)


def _read_all(corpora: Any) -> dict[str, Any]:
    if not isinstance(corpora, Mapping) or not corpora:
        raise CorpusError(f"corpora must map names to texts, one at least; got {corpora!r}")
    texts = {}
    for name, source in corpora.items():
        with _naming(f"corpus {name!r}"):
            texts[name] = source if are_token_ids(source) else read_texts(source)
    return texts


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say which of many an error is about."""
    try:
        yield
    except HyperlensError as error:
        raise type(error)(f"{what}: {error}") from error


def _identities(
    pairs: Pairs,
    texts: Mapping[str, Any],
    options: RowOptions,
    mauve_features: Any,
    device: Any,
    dtype: Any,
) -> dict[tuple[str, str], dict[str, Any]]:
    """For every row everything that decides it."""
    models = {name: [model_identity(source) for source in both] for name, both in pairs.items()}
    hashes = {name: texts_sha256(of_one) for name, of_one in texts.items()}
    reader = None
    if isinstance(mauve_features, Featurizer):
        reader = mauve_features.describe()
    elif mauve_features is not None:
        reader = model_identity(mauve_features)
    same = {
        "options": asdict(options),
        "mauve": reader,
        "device": str(device),
        "dtype": str(dtype),
        "versions": versions(),
    }
    return {
        (pair, corpus): {"models": both, "texts": sha256} | same
        for pair, both in models.items()
        for corpus, sha256 in hashes.items()
    }


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
        pair = open_pair(*sources, device=device, dtype=dtype)
        check_room(pair, options.prompt_tokens, options.max_new_tokens)
        if reader is not None:
            check_writes_text(pair.tokenizer)
    ready = {}
    for corpus, of_one in texts.items():
        with _naming(f"pair {name!r} on corpus {corpus!r}"):
            opened = tokenized(pair, of_one, options.max_length)
            ready[corpus] = opened, prompts_of(opened.corpus, options, reader is not None)
    for corpus, (opened, prompts) in ready.items():
        with _naming(f"pair {name!r} on corpus {corpus!r}"):
            row, notes = measure_row(opened, prompts, options, reader)
            record = {
                "row": row,
                "pair": pair.describe(),
                "data": opened.corpus.describe(),
                "mauve": reader.describe() | {"seeds": list(SEEDS)} if reader else None,
                "notes": [*opened.notes, *notes],
            }
        yield corpus, record


def _finding(
    pairs: Pairs,
    texts: Mapping[str, Any],
    done: Mapping[tuple[str, str], Mapping[str, Any]],
    options: RowOptions,
) -> CrossDomainResult:
    keys = [(pair, corpus) for pair in pairs for corpus in texts]
    rows = [{"pair": p, "corpus": c, **done[p, c]["row"]} for p, c in keys]
    _correct(rows)
    reader = done[keys[0]]["mauve"]
    notes: dict[str, None] = {}
    if reader is not None:
        notes |= dict.fromkeys(few_texts(*(row["n"] for row in rows)))
    for p, c in keys:
        notes |= dict.fromkeys(f"{p} on {c}: {note}" for note in done[p, c]["notes"])
    meta = {
        "title": f"{len(pairs)} pair{'s' * (len(pairs) > 1)} of models on {', '.join(texts)}",
        "pairs": {p: done[p, next(iter(texts))]["pair"] for p in pairs},
        "corpora": {c: dict(getattr(of_one, "source", {})) for c, of_one in texts.items()},
        "data": {p: {c: done[p, c]["data"] for c in texts} for p in pairs},
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
