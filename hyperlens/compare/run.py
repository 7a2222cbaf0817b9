"""compare_models: one call that tells what fine-tuning changed, block by block."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import processes
from ..checks import check_counts, check_seed, check_types
from ..data.corpus import Corpus
from ..data.reading import read_as
from ..errors import CorpusError, PairError, ProbeError, ResultsError
from ..files import check_new_folder, expand_user, partial_folder
from ..models.kinds import Backend
from ..pair import Inputs, Pair, open_inputs
from ..passes.kept_sums import KeptSums
from ..passes.multi_pass import run_passes
from ..passes.streaming import PassOptions, PassResult
from ..probes import (
    LinearCKA,
    LogitProbe,
    MeanShift,
    OutputByPosition,
    OutputByRole,
    Probe,
    Procrustes,
    default_probes,
)
from ..render.format import count
from ..results.loggers import check_loggers
from ..results.result import unknown
from .audit import without_doubt
from .comparison import Comparison
from .loggers import report_comparison

EXAMPLES = (
    "hyperlens compare ./base ./tuned --texts held_out.txt --out comparison",
    "hyperlens compare ./base ./lora-adapter --texts owner/dataset --split test --limit 200",
    "hyperlens compare ./base ./tuned --texts t.jsonl --text-column story --probes drift",
)


@check_types
def compare_models(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    probes: Sequence[Probe | str] | None = None,
    max_length: int = 256,
    batch_size: int = 8,
    include_bos: bool = False,
    chat_template: str | Path | None = None,
    roles: Sequence[str] | None = None,
    tokens: Any = None,
    sink_threshold: float = 10.0,
    lens_tokens: int | float | None = None,
    backend: Backend | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    report_to: str | Sequence[str] = (),
    progress: bool = True,
) -> Comparison:
    """Compare a base causal LM with a fine-tuned one on some text, at every block.

    Both models read the same tokens in one streaming pass, or in several where the sums of all
    layers do not fit in memory, which does not grow with the number of texts. The statistics are
    those of arXiv 2605.22579 (sections 3 and 4), each in three views so that what a block does can
    be told from what the final norm does.

    Args:
        base, tuned: hub id, local folder, `PreTrainedModel`, `PeftModel`, hooked model, or a
            pair (model, tokenizer); `tuned` may also be an adapter, by folder or hub id, which is
            put on `base`.
        texts: list of strings, of token ids or of conversations, a .txt / .jsonl / .csv / .parquet
            file, a `datasets.Dataset`, or a hub dataset name. With an open `Pair` as `base` the
            texts are the second argument.
        probes: what to measure: built-in probes by name (drift, participation_ratio, logit_lens,
            rank_reordering; mean_shift tells what of the change all tokens have alike,
            linear_cka and procrustes whether the streams have the same shape,
            output_by_position the output along answers, and output_by_role for each role, which
            conversations have anyway) or probes of one's own; None for all of the first four.
        max_length: tokens per text, BOS included; longer texts are cut and counted.
        batch_size: texts per forward pass; does not change the result.
        include_bos: measure BOS positions too. They are left out, by id, by default.
        chat_template, roles, tokens: of conversations, what writes them as text and whose tokens
            are counted; of any texts, which tokens are counted: see `read_examples`. A decision
            counts where the token that it follows does.
        sink_threshold: positions whose norm exceeds this many times their sequence's median are
            masked as attention sinks, layer by layer; 0 masks none.
        lens_tokens: below the output, read the logit lens at so many tokens of each text, or at
            this share of them (0.1), drawn at random; intervals include the sampling. All else is
            measured at every token.
        backend: how models are hooked, "residual" (the default), "bridge" or
            "hooked_transformer".
        device: None leaves objects where they are and puts folders on the best device.
        dtype: of the forward passes, for both models; None keeps the checkpoints' own.
            Statistics are always float32 with float64 sums.
        seed: of the token samples that participation-ratio intervals are computed from, and that
            `lens_tokens` draws.
        out: a new folder to save the result in. In a long run, sums are kept beside it, in
            `out.partial`, about every minute: the same call goes on after an interruption, and
            ends with the same numbers.
        report_to: loggers that get every number by layer, the figures and the page:
            "tensorboard", "wandb", "mlflow". One that fails then leaves a note.
        progress: show a progress bar.

    Returns:
        A `Comparison`: `to_frame()`, `summary()`, `plot()`, `save(folder)`.

    Raises:
        HyperlensError: LoadingError, ParityError, PairError, CorpusError, ActivationError,
            ProbeError, ResourceError, or ResultsError where `out` cannot be written or a logger is
            not there, each with one line that says what to do.
    """
    if out is not None:
        check_new_folder(expand_user(out))
    loggers = check_loggers(report_to)
    chosen = checked_probes(probes)
    options = checked_options(batch_size, sink_threshold, seed, progress, lens_tokens)
    _check_is_one(base, tuned, texts)
    reading = read_as(chat_template, roles, tokens)
    inputs = open_inputs(
        base,
        tuned,
        texts,
        max_length=max_length,
        include_bos=include_bos,
        generates=False,
        backend=backend,
        device=device,
        dtype=dtype,
        reading=reading,
    )
    tokenized_as = {"max_length": max_length, "include_bos": include_bos}
    kept = None if out is None else _kept_beside(expand_user(out), inputs, chosen, options)
    comparison = compare_inputs(inputs, chosen, replace(options, kept=kept), tokenized_as)
    if not processes.is_heard():
        return comparison
    comparison = _reported(comparison, loggers)
    if out is not None and kept is not None:
        comparison.save(out)
        kept.forget()
    return comparison


def compare_inputs(
    inputs: Inputs,
    probes: Sequence[Probe],
    options: PassOptions,
    tokenized_as: dict[str, Any],
) -> Comparison:
    """Compare a pair that is open on texts that are tokenized.

    Args:
        inputs: the pair and its texts.
        probes: what the comparison is of; each is used up.
        options: how the texts are read.
        tokenized_as: how they were tokenized, for the record.
    """
    pair = inputs.pair
    if inputs.corpus.roles is not None and _reads_output(probes):
        probes = [*probes, OutputByRole()]
    outcome = run_passes(pair.base.hooked, pair.tuned.hooked, inputs.corpus, probes, options)
    meta = inputs.metadata(
        seed=options.seed,
        options={
            "batch_size": options.batch_size,
            "sink_threshold": options.sink_threshold,
            "lens_tokens": options.lens_tokens,
            **tokenized_as,
        },
        notes=[*_passes_note(outcome), *_sample_note(inputs.corpus, probes, options)],
    )
    meta["excluded"] = {
        "bos": inputs.corpus.counts.n_bos,
        "sinks_per_layer": list(outcome.sinks_per_layer),
    }
    meta["probes"] = {probe.name: _json_options(probe) for probe in probes}
    rows = (row for result in outcome.results.values() for row in result.rows)
    same = meta["base"]["sha256"] == meta["tuned"]["sha256"]
    return Comparison.of(
        rows=without_doubt(rows) if same else rows,
        extras={name: dict(r.extras) for name, r in outcome.results.items() if r.extras},
        meta=meta,
    )


def _reported(comparison: Comparison, loggers: Sequence[str]) -> Comparison:
    """Sent to these loggers; what was measured is not lost where one fails."""
    failures = []
    for name in loggers:
        try:
            report_comparison(comparison, name)
        except ResultsError as error:
            failures.append(str(error))
    if not failures:
        return comparison
    notes = [*comparison.meta["notes"], *failures]
    return replace(comparison, meta={**comparison.meta, "notes": notes})


def _kept_beside(
    out: Path, inputs: Inputs, probes: Sequence[Probe], options: PassOptions
) -> KeptSums:
    """Where sums are kept, by everything that decides them."""
    corpus = inputs.corpus
    tags = [] if corpus.roles is None else [of_one.tolist() for of_one in corpus.roles]
    tags_and_groups = json.dumps([corpus.groups, tags]).encode()
    identity = {
        "models": inputs.pair.describe(),
        "corpus": corpus.describe(),
        "groups": hashlib.sha256(tags_and_groups).hexdigest(),
        "batch_size": options.batch_size,
        "sink_threshold": options.sink_threshold,
        "seed": options.seed,
        "lens_tokens": options.lens_tokens,
        "probes": [[type(one).__qualname__, one.name, _json_options(one)] for one in probes],
    }
    return KeptSums(partial_folder(out), identity)


def _check_is_one(base: Any, tuned: Any, texts: Any) -> None:
    """Several models, where one is expected, have functions of their own."""
    several = list(tuned.values()) if isinstance(tuned, Mapping) else tuned
    if texts is None or isinstance(base, Pair) or not isinstance(several, list):
        return
    if all(isinstance(one, str | Path | torch.nn.Module) for one in several):
        raise PairError(
            f"expected one tuned model, got {len(tuned)}: the "
            "checkpoints of a training run are for hyperlens.trace_trajectory, variants for "
            "hyperlens.experiments.compare_variants"
        )


def checked_probes(given: Sequence[Probe | str] | None) -> list[Probe]:
    """Probes by name or as they are given, copied: a run leaves the caller's as they were.

    Raises:
        ProbeError: if there are none, or a name is unknown or there twice.
    """
    if given is None:
        return default_probes()
    if not given:
        raise ProbeError("there are no probes: name at least one, or pass None")
    more = (MeanShift(), LinearCKA(), Procrustes(), OutputByRole(), OutputByPosition())
    built_in = {one.name: one for one in (*default_probes(), *more)}
    for name in given:
        if isinstance(name, str) and name not in built_in:
            raise ProbeError(unknown("probe", name, list(built_in)))
    probes = [built_in[probe] if isinstance(probe, str) else probe for probe in given]
    for probe in probes:
        if not isinstance(getattr(probe, "name", None), str):
            raise ProbeError(f"{type(probe).__name__} has no name: give its class name = '...'")
        _json_options(probe)  # now rather than after the run
    chosen = [copy.deepcopy(probe) for probe in probes]
    names = [probe.name for probe in chosen]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ProbeError(f"two probes are named {repeated[0]!r}: give each its own name")
    return chosen


def _reads_output(probes: Sequence[Probe]) -> bool:
    """Whether what the models predict is measured, which is then told by role as well."""
    names = {probe.name for probe in probes}
    return OutputByRole.name not in names and any(isinstance(p, LogitProbe) for p in probes)


def _json_options(probe: Probe) -> Any:
    try:
        return json.loads(json.dumps(probe.options(), default=str))
    except (TypeError, ValueError) as error:
        raise ProbeError(
            f"the options of probe {probe.name!r} cannot be recorded ({error}): keep what is no "
            "option in an attribute whose name begins with an underscore"
        ) from None


def checked_options(
    batch_size: int,
    sink_threshold: float,
    seed: int,
    progress: bool,
    lens_tokens: int | float | None = None,
) -> PassOptions:
    """How the texts are read, if it can be so.

    Raises:
        HyperlensError: naming the option that cannot be.
    """
    check_counts(batch_size=batch_size)
    check_seed(seed)
    if not (sink_threshold == 0 or 1 < sink_threshold < math.inf):
        raise CorpusError(
            f"sink_threshold must be 0 (off) or more than 1 median norm, got {sink_threshold}"
        )
    is_share = isinstance(lens_tokens, float)
    if lens_tokens is not None and not (0 < lens_tokens <= 1 if is_share else lens_tokens >= 1):
        raise ProbeError(
            "lens_tokens must be a number of tokens of each text, such as 32, or a share of them, "
            f"such as 0.1, got {lens_tokens}"
        )
    return PassOptions(batch_size, float(sink_threshold), seed, progress, lens_tokens=lens_tokens)


def _passes_note(outcome: PassResult) -> list[str]:
    notes = []
    if outcome.n_passes > 1:
        notes.append(f"read {outcome.n_passes} times: the sums of all layers did not fit in memory")
    shared = outcome.shared.blocks
    if shared:
        notes.append(
            f"the first {count(shared, 'block')} and the embedding are the same in both models, "
            "bit for bit: they were run once"
        )
    return notes


def _sample_note(corpus: Corpus, probes: Sequence[Probe], options: PassOptions) -> list[str]:
    """What is read at some tokens only."""
    names = [probe.name for probe in probes if getattr(probe, "samples", False)]
    if options.lens_tokens is None or not names:
        return []
    n_read, n = corpus.n_read_by_lens(options.lens_tokens)
    if n_read == n:
        return []
    return [
        f"below the output, {' and '.join(names)} read {n_read:,} of {n:,} tokens, drawn at random "
        "from each text (lens_tokens); intervals include the sampling"
    ]
