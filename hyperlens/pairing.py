"""Open two models so that they can be compared: same kind of hooks, dtype, device, attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .errors import PairError
from .fingerprint import Known, versions, weights_sha256
from .hooked import Backend, backend_of
from .loading import Loaded, check_backend, hook, parse_device, parse_dtype
from .shells import converted, plain_model
from .sources import Opened, open_source


@dataclass(frozen=True)
class ModelPair:
    """Two hooked models with the same sizes, and what a reader should know about them."""

    base: Loaded
    tuned: Loaded
    notes: tuple[str, ...]


def open_pair(
    base: Any,
    tuned: Any,
    *,
    backend: Backend = "residual",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> ModelPair:
    """Open, align, hook and check two models.

    An adapter as `tuned` is put on the base's own weights, which are then held only once.

    Raises:
        LoadingError: if a source cannot be opened.
        ParityError: if a hooked model does not reproduce its source.
        PairError: if the models differ in depth, width, vocabulary or kind.
    """
    check_backend(backend)
    where, cast = parse_device(device), parse_dtype(dtype)
    first = open_source(base, device=where, dtype=cast)
    second = open_source(tuned, device=where, dtype=cast, base=first)
    first, second, notes = _aligned(first, second)
    kinds = {backend_of(o.model) for o in (first, second)} - {None}
    if len(kinds) > 1:
        raise PairError(
            f"the base is a {backend_of(first.model)} model and the tuned one a "
            f"{backend_of(second.model)} model, whose numbers differ: load both the same way"
        )
    # A hooked model given on one side decides how the other is hooked.
    chosen = next((kind for kind in kinds if kind is not None), backend)
    pair = ModelPair(hook(first, chosen), hook(second, chosen), first.notes + second.notes + notes)
    _check_sizes(pair)
    return pair


def _aligned(first: Opened, second: Opened) -> tuple[Opened, Opened, tuple[str, ...]]:
    """The same device, dtype and attention on both sides; a difference there is not tuning."""
    if any(backend_of(o.model) is not None for o in (first, second)):
        if _dtype(first) != _dtype(second) or _device(first) != _device(second):
            raise PairError(
                f"base is {_dtype(first)} on {_device(first)}, tuned is {_dtype(second)} on "
                f"{_device(second)}: load both with the same dtype and device"
            )
        return first, second, ()
    notes = []
    wider = torch.promote_types(_dtype(first), _dtype(second))
    if _dtype(first) != _dtype(second):
        notes.append(f"dtypes differ ({_dtype(first)}, {_dtype(second)}): both run in {wider}")
    if _device(second) != _device(first):
        second = replace(second, model=converted(second.model, _device(first), None))
    # A model that runs in this dtype already keeps what it has in others, such as an adapter's
    # float32 on a half-precision base.
    first, second = (
        o if _dtype(o) == wider else replace(o, model=converted(o.model, None, wider))
        for o in (first, second)
    )
    attention = [plain_model(o.model).config._attn_implementation for o in (first, second)]
    if attention[0] != attention[1]:
        plain_model(second.model).set_attn_implementation(attention[0])
        notes.append(f"attention differs ({attention[0]}, {attention[1]}): both run {attention[0]}")
    return first, second, tuple(notes)


def _dtype(opened: Opened) -> torch.dtype:
    dtype: torch.dtype = next(p.dtype for p in opened.model.parameters() if p.is_floating_point())
    return dtype


def _device(opened: Opened) -> torch.device:
    device: torch.device = next(opened.model.parameters()).device
    return device


def _check_sizes(pair: ModelPair) -> None:
    base, tuned = pair.base.hooked.cfg, pair.tuned.hooked.cfg
    for what, advice, a, b in (
        ("depth", "compare models with the same blocks", base.n_layers, tuned.n_layers),
        ("width", "compare models of one size", base.d_model, tuned.d_model),
        (
            "vocabulary",
            "if tokens were added, resize the base with resize_token_embeddings too",
            base.d_vocab,
            tuned.d_vocab,
        ),
    ):
        if a != b:
            raise PairError(f"the models differ in {what}: base {a}, tuned {b}; {advice}")


def check_tokenizers(pair: ModelPair, texts: list[str]) -> tuple[str, ...]:
    """Hold the two tokenizers against each other, in vocabulary and on some of the texts.

    Returns:
        Notes on differences that do not matter here.

    Raises:
        PairError: if the same text, or the same id, means different things to the two models.
    """
    ours, theirs = pair.base.opened.tokenizer, pair.tuned.opened.tokenizer
    if ours is None or theirs is None or ours is theirs:
        return ()
    vocabularies = ours.get_vocab(), theirs.get_vocab()
    shared = set(vocabularies[0]) & set(vocabularies[1])
    moved = sorted(t for t in shared if vocabularies[0][t] != vocabularies[1][t])
    only = [sorted(set(v) - shared, key=v.__getitem__) for v in vocabularies]
    encoded = [
        t(texts, add_special_tokens=False, verbose=False)["input_ids"] for t in (ours, theirs)
    ]
    changed = sum(a != b for a, b in zip(*encoded, strict=True))
    if moved or only[0] or changed:
        details = []
        if moved:
            token = moved[0]
            details.append(
                f"{len(moved)} tokens have other ids ({token!r} is {vocabularies[0][token]} and "
                f"{vocabularies[1][token]})"
            )
        if only[0]:
            details.append(f"{len(only[0])} base tokens are gone ({only[0][0]!r})")
        if changed:
            details.append(f"{changed} of {len(texts)} texts are split differently")
        raise PairError(
            f"the tokenizers differ: {'; '.join(details)}: compare models that share a tokenizer"
        )
    if only[1]:
        return (
            f"the tuned tokenizer adds {len(only[1])} tokens ({only[1][0]!r}, …): "
            "the base's is used",
        )
    return ()


def describe_pair(pair: ModelPair) -> dict[str, Any]:
    """What the `meta` of every result says of the models, and of the libraries that ran them."""
    cfg = pair.base.hooked.cfg
    known: Known = {}
    return {
        "n_layers": cfg.n_layers,
        "d_model": cfg.d_model,
        "d_vocab": cfg.d_vocab,
        "base": describe_model(pair.base, known),
        "tuned": describe_model(pair.tuned, known),
        "backend": pair.base.backend,
        "device": str(cfg.device),
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def describe_model(loaded: Loaded, known: Known | None = None) -> dict[str, Any]:
    """A model's name, where it came from, and the hash of its weights, as JSON values.

    Args:
        loaded: the model.
        known: see `weights_sha256`.
    """
    source = loaded.opened.name
    # A folder is called by its own name: where it lay is a fact for the record, not for titles.
    is_path = loaded.opened.kind in ("folder", "adapter") and Path(source).is_dir()
    is_path = is_path or Path(source).is_absolute()
    return {
        "name": Path(source).resolve().name if is_path else source,
        "source": source,
        "kind": loaded.opened.kind,
        "sha256": weights_sha256(loaded.opened.model, known),
    }
