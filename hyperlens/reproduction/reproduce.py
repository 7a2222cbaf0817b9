"""`reproduce`: every stage of the paper on one base model, each kept on disk once it is done.

A stage is a training run or an experiment. Its folder has the hash of everything that decides it in
its name: the same call goes on where it stopped, and after an option has changed only what depends
on it runs again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..checks import check_choice, check_types
from ..compare import Comparison, compare_models
from ..costs import config_of
from ..data.texts import Texts, read_texts
from ..decoding.generate import keeping_continuations
from ..errors import CorpusError, HyperlensError, LoadingError, PairError, ResultsError, shortened
from ..experiments.cross_domain import CrossDomainResult, compare_domains
from ..experiments.decoding import DecodingResult, compare_decoding
from ..experiments.mauve import Featurizer, check_mauve
from ..experiments.null_test import NullTestResult, run_null_test
from ..experiments.provenance import ProvenanceResult, trace_provenance
from ..experiments.static_bias import StaticBiasResult, inject_static_bias
from ..experiments.temperature import TemperatureResult, match_temperature
from ..experiments.variants import VariantsResult, compare_variants
from ..experiments.weights import WeightChangesResult, compare_weights
from ..files import expand_user
from ..hooks.loading import parse_device, parse_dtype
from ..judging.judge import JudgeResult, judge_models
from ..judging.judges import as_judge
from ..models.sources import check_source
from ..pair import Pair, open_pair
from ..render.page import write_report
from ..results.fingerprint import texts_sha256, versions
from ..results.result import Result
from ..results.resume import WorkFolder, source_identity
from ..training.course import TrainingResult, compare_training
from ..training.history import read_run
from ..training.hyperfitting import hyperfit
from .claims import judge_claims
from .paper import STAGES, exhibits, stages_of
from .protocol import METHODS, SCALES, Protocol, Scale, protocol_for
from .readings import beside, readings, said
from .result import ReproductionResult, side_by_side

STAMP = "reproduction-folder.json"
# Below so many parameters a reader is told that the model is a demonstration.
SMALL = 100_000_000


@check_types
def reproduce(
    base: Any,
    texts: Any,
    *,
    out: str | Path,
    scale: Scale = "paper",
    protocol: Protocol | None = None,
    only: Sequence[str] | None = None,
    trained: Mapping[str, Any] | None = None,
    judge: Any = None,
    mauve_features: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda step: None,
) -> ReproductionResult:
    """Carry out arXiv 2605.22579 on a base model, and set its numbers beside the paper's.

    Trains the paper's three variants (all weights, LoRA on all blocks, LoRA on the last blocks),
    measures what its tables and figures show, judges the claims of its abstract by stated rules,
    and writes one page. Everything is kept in `out`: the same call goes on after an interruption,
    and with other options runs again only what depends on them.

    Args:
        base: the model before: a folder or hub id.
        texts: what `read_texts` takes, or name to texts for several domains. The last
            `protocol.n_held_out` of each are measured on, the others trained on. Everything but
            the cross-domain table is of the first domain.
        out: the folder for models, results and report: a new one, or that of an earlier call.
        scale: "paper", "demo" (minutes for the embedded model) or "smoke" (every step once).
        protocol: all settings, instead of those of the scale.
        only: exhibits such as "Table 1" or "Figure 5"; None for all.
        trained: method ("full", "lora", "late_lora") to the folder of a model of the first domain
            that is trained already.
        judge: what `judge_models` takes, for Table 5; None leaves it out.
        mauve_features: a model that reads texts, for MAUVE in Tables 6 and 7; None leaves it out.
        device: as in `compare_models`.
        dtype: of measurements and of the frozen weights under LoRA; all weights are trained in
            float32.
        progress: show progress bars.
        say: told each stage before it begins.

    Returns:
        A `ReproductionResult`, also written to `out` with the page of all results.

    Raises:
        HyperlensError: if a source cannot be opened, texts do not suffice, or the folder is in use
            by something else.
    """
    check_choice("scale", scale, tuple(SCALES), HyperlensError)
    settings = protocol or protocol_for(scale)
    wanted = _wanted(only)
    given = dict(trained or {})
    for method, source in given.items():
        check_choice("trained", method, METHODS, HyperlensError)
        if not isinstance(source, str | Path) or not expand_user(source).is_dir():
            raise PairError(
                f"trained must map methods to folders of models, got {shortened(source)} for "
                f"{method}"
            )
        check_source(source)
    if not isinstance(base, str | Path):
        raise LoadingError(
            "expected a folder or hub id as base, because its variants are saved and opened again "
            f"beside it; got {type(base).__name__}: save it with save_pretrained"
        )
    check_source(base)
    parse_device(device)
    parse_dtype(dtype)
    if mauve_features is not None:
        check_mauve(mauve_features)
    asked = None if judge is None else as_judge(judge, device)
    domains = _domains(texts, settings.n_held_out)
    _check_context(base, settings)
    run = _Run(
        base=base,
        domains=domains,
        folder=expand_user(out),
        protocol=settings,
        trained=given,
        judge=asked,
        mauve_features=mauve_features,
        device=device,
        dtype=dtype,
        progress=progress,
        say=say,
    )
    run.claim()
    with keeping_continuations(run.folder / "written"):
        results, not_run = run.measure(wanted)
    return _finish(run, results, not_run)


def _check_context(base: Any, protocol: Protocol) -> None:
    """Raise before any training where what is generated or trained on would not fit the model."""
    context = getattr(config_of(base).get_text_config(), "max_position_embeddings", None)
    longest = max(protocol.prompt_tokens + protocol.max_new_tokens, protocol.sequence_length)
    if isinstance(context, int) and 0 < context < longest:
        raise CorpusError(
            f"the model has {context} positions, and the protocol needs {longest}: lower "
            "max_new_tokens, prompt_tokens or sequence_length"
        )


def _wanted(only: Sequence[str] | None) -> tuple[str, ...]:
    """The stages that the exhibits need, in order."""
    if only is None:
        return STAGES
    for exhibit in only:
        check_choice("only", exhibit, exhibits(), ResultsError)
    needed = {stage for exhibit in only for stage in stages_of(exhibit)}
    if not needed:
        raise ResultsError(f"nothing is measured for {', '.join(only)}: name other exhibits")
    return tuple(stage for stage in STAGES if stage in needed)


@dataclass(frozen=True)
class Domain:
    """The texts of one domain.

    Attributes:
        name: what it is called; "" for the only one.
        train: for training.
        held_out: for every measurement.
    """

    name: str
    train: Texts
    held_out: Texts


def _domains(texts: Any, n_held_out: int) -> list[Domain]:
    named = texts if isinstance(texts, Mapping) else {"": texts}
    if not named:
        raise CorpusError("texts must map names to texts, at least one")
    return [split_domain(name, read_texts(source), n_held_out) for name, source in named.items()]


def split_domain(name: str, texts: Texts, n_held_out: int) -> Domain:
    """The first texts for training, the last `n_held_out` for measurements; no group is split.

    Raises:
        CorpusError: if that leaves no text to train on.

    >>> from hyperlens.data.texts import read_texts
    >>> domain = split_domain("", read_texts(["a", "b", "c"]), 2)
    >>> list(domain.train), list(domain.held_out)
    (['a'], ['b', 'c'])
    """
    cut = len(texts) - n_held_out
    groups = texts.groups
    while groups is not None and cut > 0 and groups[cut] == groups[cut - 1]:
        cut -= 1
    if cut < 1:
        of = f"domain {name!r} has" if name else "there are"
        raise CorpusError(
            f"{of} {len(texts)} texts, and {n_held_out} are held out: give more texts, or lower "
            "n_held_out"
        )
    parts = [
        Texts(texts[where], dict(texts.source), None if groups is None else groups[where])
        for where in (slice(0, cut), slice(cut, None))
    ]
    return Domain(name, *parts)


@dataclass
class _Run:
    """One reproduction: its inputs, its folder, and the pair that is open."""

    base: Any
    domains: list[Domain]
    folder: Path
    protocol: Protocol
    trained: dict[str, Any]
    judge: Any
    mauve_features: Any
    device: Any
    dtype: Any
    progress: bool
    say: Callable[[str], None]
    opened: tuple[Any, Pair] | None = None

    @cached_property
    def base_identity(self) -> Any:
        """What tells the base from another model."""
        return source_identity(self.base)

    def claim(self) -> None:
        """Refuse a folder that holds something else."""
        WorkFolder(self.folder, STAMP, {"hyperlens": "reproduction"}, "a reproduction").claim()

    def measure(self, wanted: Sequence[str]) -> tuple[dict[str, Result], dict[str, str]]:
        """Every stage that is wanted, and why others were not run."""
        results: dict[str, Result] = {}
        not_run = {stage: "not asked for (only)" for stage in STAGES if stage not in wanted}
        for stage in wanted:
            if stage == "judge" and self.judge is None:
                not_run[stage] = "needs a judge (--judge-url, --judge-folder or --judge-rule)"
            elif stage == "cross_domain":
                for domain in self.domains:
                    results[f"{stage}/{domain.name}"] = self._cross_domain(domain)
            else:
                results[stage] = getattr(self, f"_{stage}")()
        if self.mauve_features is None and "cross_domain" in wanted:
            not_run["MAUVE"] = "needs a model that reads texts (--mauve-features)"
        return results, not_run

    # Training

    def model(self, method: str, domain: Domain | None = None) -> Path:
        """The folder of a trained variant, trained first where there is none yet."""
        domain = domain or self.domains[0]
        folder = self.folder_of(method, domain)
        if not folder.is_dir():
            self.say(f"training {METHOD_WORDS[method]}{f' on {domain.name}' * bool(domain.name)}")
            hyperfit(
                self.base,
                domain.train,
                method,  # type: ignore[arg-type]  # checked to be one of METHODS
                recipe=self.protocol.recipe,
                validation=domain.held_out if self.protocol.record_every else None,
                out=folder,
                device=self.device,
                dtype=self._training_dtype(method),
                progress=self.progress,
                **self.protocol.recipe_changes(method),
            )
        return folder

    def _training_dtype(self, method: str) -> Any:
        """Of the weights in training: small steps of all weights vanish in half precision."""
        return None if method == "full" else self.dtype

    def folder_of(self, method: str, domain: Domain) -> Path:
        """Where a trained variant is or will be."""
        if domain is self.domains[0] and method in self.trained:
            return expand_user(self.trained[method])
        # The last part is what the model is called in tables and charts.
        return self.folder / "models" / self._key(method, domain) / self._label(method, domain)

    def _label(self, stage: str, domain: Domain) -> str:
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in domain.name)
        return stage if domain is self.domains[0] else f"{stage}-{name}"

    def _key(self, method: str, domain: Domain) -> str:
        """What decides a trained variant."""
        if domain is self.domains[0] and method in self.trained:
            return _hash({"given": source_identity(self.trained[method])})
        return _hash(
            {
                "base": self.base_identity,
                "texts": [texts_sha256(domain.train), texts_sha256(domain.held_out)],
                "recipe": [self.protocol.recipe, self.protocol.recipe_changes(method), method],
                "where": [str(self.device), str(self._training_dtype(method))],
                # No versions: what was trained stays what it is when a library is updated.
            }
        )

    def notes_on(self, method: str) -> list[str]:
        """What was noted when a variant of the first domain was trained, if it was."""
        folder = self.folder_of(method, self.domains[0])
        notes = read_run(folder).get("manifest", {}).get("notes", [])
        return [f"training {METHOD_WORDS[method]}: {note}" for note in notes]

    # Measurements

    def _stage(
        self,
        name: str,
        kind: type[Result],
        models: Sequence[str],
        options: Mapping[str, Any],
        make: Callable[[], Result],
        domain: Domain | None = None,
    ) -> Any:
        """The result of a stage, measured first where there is none for these inputs.

        Args:
            name: of the stage.
            kind: of its result.
            models: the trained variants that it reads.
            options: everything else that decides it.
            make: measures it.
            domain: whose texts; None for the first.
        """
        domain = domain or self.domains[0]
        identity = {
            "stage": name,
            "base": self.base_identity,
            "models": [self._key(method, domain) for method in models],
            "texts": texts_sha256(domain.held_out),
            "groups": repr(domain.held_out.groups),
            "options": dict(options),
            "where": [str(self.device), str(self.dtype)],
            "versions": versions(),
        }
        folder = self.folder / "results" / f"{self._label(name, domain)}-{_hash(identity)}"
        if not folder.is_dir():
            for method in models:
                self.model(method, domain)
            self.say(f"measuring {name.replace('_', ' ')}")
            make().save(folder)
        return kind.load(folder)

    def _pair(self, method: str, domain: Domain | None = None) -> Pair:
        """The base and a variant; only the pair used last stays open."""
        tuned = self.model(method, domain)
        if self.opened is None or self.opened[0] != tuned:
            self.opened = None
            pair = open_pair(self.base, tuned, device=self.device, dtype=self.dtype)
            self.opened = (tuned, pair)
        return self.opened[1]

    def _of_full(
        self,
        name: str,
        kind: type[Result],
        function: Callable[..., Any],
        options: Mapping[str, Any],
    ) -> Any:
        """An experiment on the base and the model with all weights trained."""

        def make() -> Result:
            pair = self._pair("full")
            result: Result = function(
                pair, self.domains[0].held_out, progress=self.progress, **options
            )
            return result

        return self._stage(name, kind, ["full"], _plain(options), make)

    def _temperature(self) -> Any:
        options = self.protocol.generation() | {"max_length": self.protocol.max_length}
        return self._of_full("temperature", TemperatureResult, match_temperature, options)

    def _static_bias(self) -> Any:
        options = self.protocol.generation() | {
            "max_length": self.protocol.max_length,
            "k": self.protocol.bias_tokens,
            "alphas": self.protocol.alphas,
        }
        return self._of_full("static_bias", StaticBiasResult, inject_static_bias, options)

    def _provenance(self) -> Any:
        options = self.protocol.generation() | {"max_length": self.protocol.max_length}
        return self._of_full("provenance", ProvenanceResult, trace_provenance, options)

    def _geometry(self) -> Any:
        options = {
            "max_length": self.protocol.max_length,
            "batch_size": self.protocol.batch_size,
            "seed": self.protocol.seed,
        }
        return self._of_full("geometry", Comparison, compare_models, options)

    def _null_test(self) -> Any:
        options = self.protocol.generation() | {
            "max_length": self.protocol.max_length,
            # The stricter kind: as large in the stream, not only in the weights.
            "controls": ("rows_and_columns_rescaled",),
            "n_controls": self.protocol.n_controls,
        }
        return self._of_full("null_test", NullTestResult, run_null_test, options)

    def _decoding(self) -> Any:
        options = self.protocol.generation() | {
            "methods": ("greedy", "min_p", "guard"),
            "min_p": self.protocol.min_p,
            "guard_window": self.protocol.guard_window,
            "mauve_features": self.mauve_features,
        }
        return self._of_full("decoding", DecodingResult, compare_decoding, options)

    def _cross_domain(self, domain: Domain) -> Any:
        length = self.protocol.prompt_tokens + self.protocol.max_new_tokens
        needed = 0 if self.mauve_features is None else length
        options = self.protocol.generation() | {
            "max_length": max(self.protocol.max_length, needed),
            "mauve_features": self.mauve_features,
        }
        name = domain.name or "texts"

        def make() -> Result:
            pair = self._pair("full", domain)
            return compare_domains(
                {"full": pair}, {name: domain.held_out}, progress=self.progress, **options
            )

        identity = {**_plain(options), "name": name}
        return self._stage("cross_domain", CrossDomainResult, ["full"], identity, make, domain)

    def _weights(self) -> Any:
        """Of the model with all weights trained, from the files."""
        seed = self.protocol.seed

        def make() -> Result:
            return compare_weights(self.base, self.model("full"), seed=seed, progress=self.progress)

        return self._stage("weights", WeightChangesResult, ["full"], {"seed": seed}, make)

    def _training(self) -> Any:
        def make() -> Result:
            return compare_training({method: self.model(method) for method in METHODS})

        return self._stage("training", TrainingResult, METHODS, {}, make)

    def _variants(self) -> Any:
        options = self.protocol.generation() | {"max_length": self.protocol.max_length}

        def make() -> Result:
            self.opened = None
            return compare_variants(
                self.base,
                {method: self.model(method) for method in METHODS},
                self.domains[0].held_out,
                device=self.device,
                dtype=self.dtype,
                progress=self.progress,
                **options,
            )

        return self._stage("variants", VariantsResult, METHODS, options, make)

    def _judge(self) -> Any:
        options: dict[str, Any] = {
            **self.protocol.generation(),
            "n_prompts": self.protocol.n_judged,
            "prompt": "paper",
        }

        def make() -> Result:
            self.opened = None
            return judge_models(
                self.model("late_lora"),
                self.model("lora"),
                self.domains[0].held_out,
                judge=self.judge,
                device=self.device,
                dtype=self.dtype,
                progress=self.progress,
                **options,
            )

        identity = {**options, "judge": _described(self.judge)}
        return self._stage("judge", JudgeResult, ["late_lora", "lora"], identity, make)


METHOD_WORDS = {
    "full": "all weights",
    "lora": "LoRA on all blocks",
    "late_lora": "LoRA on the last blocks",
}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON values, models by what tells them apart."""
    found = dict(options)
    if found.get("mauve_features") is not None:
        found["mauve_features"] = _described(found["mauve_features"])
    return found


def _described(source: Any) -> Any:
    """A judge or a model that reads texts, as JSON values."""
    if isinstance(source, Featurizer):
        return source.describe()
    identity = getattr(source, "identity", None)
    if isinstance(identity, Mapping):
        return dict(identity)
    return source_identity(source) if isinstance(source, str | Path) else repr(source)


def _hash(identity: Mapping[str, Any]) -> str:
    text = json.dumps(identity, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _finish(
    run: _Run, results: Mapping[str, Result], not_run: Mapping[str, str]
) -> ReproductionResult:
    """The table of all exhibits, saved with the page of every result."""
    found = readings(results)
    first = next(iter(results.values()))
    about: Mapping[str, Any] = next(
        (one.meta["base"] for one in results.values() if isinstance(one.meta.get("base"), Mapping)),
        {},
    )
    meta = {
        "title": f"{about.get('name', run.base)} and the paper's models",
        "base": dict(about),
        "options": {"domains": [domain.name for domain in run.domains]},
        "seed": run.protocol.seed,
        "corpus": {
            domain.name or "texts": {
                "train": dict(domain.train.source),
                "n_train_texts": len(domain.train),
                "n_held_out_texts": len(domain.held_out),
                "held_out_sha256": texts_sha256(domain.held_out),
            }
            for domain in run.domains
        },
        "versions": first.meta["versions"],
        "small": _small(results),
        "notes": [note for method in METHODS for note in run.notes_on(method)],
    }
    extras = {
        "said": said(results),
        "beside": beside(results),
        "claims": [claim._asdict() for claim in judge_claims(results)],
        "not_run": dict(not_run),
        "protocol": run.protocol.to_json(),
        "origins": run.protocol.origins(),
    }
    result = ReproductionResult(tuple(side_by_side(found, run.protocol)), extras, meta)
    result.write_texts(run.folder)
    write_report(run.folder / "report.html", [result, *results.values()], title=meta["title"])
    return result


def _small(results: Mapping[str, Result]) -> str:
    """A sentence for models of a size that is a demonstration only."""
    geometry = results.get("geometry")
    trained = results.get("training")
    if isinstance(trained, TrainingResult) and "full" in trained.runs:
        weights = trained.known("full").get("trained_parameters", float(SMALL))
    else:
        weights = 0.0 if geometry is not None and geometry.meta["d_model"] < 512 else float(SMALL)
    if weights >= SMALL:
        return ""
    return "The model is tiny: a demonstration, not evidence about large models."
