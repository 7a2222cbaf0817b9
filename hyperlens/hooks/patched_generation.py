"""Patch a model while it generates: a source model reads the same tokens and lends activations.

    with donating(base, tuned, [Site("resid_post", 9)]):
        tokens = continuations(base, tokenizer, prompts, max_new_tokens=64)

Whatever the target model is given, the source model is given too, with a cache of its own; the
source activations at the sites replace the target's. Works with transformers' `generate`, greedy
or sampled, any batch with any padding; beam search, which reorders caches, is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..checks import check_types
from ..errors import PatchError
from ..models.kinds import plain_model
from ..models.structure import ModelStructure, find_structure
from .attach import attach
from .sites import Positions, Site, check_block, counts_from_the_end, mask_of_existing
from .surface import evaluating

Mix = Callable[
    [Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"]],
    Float[Tensor, "batch pos d_model"],
]
"""Makes what replaces the target's activation, from (target activation, source activation)."""


@check_types
@contextmanager
def donating(
    target: nn.Module,
    source: nn.Module,
    where: Sequence[Site],
    *,
    positions: Positions = None,
    mix: Mix | None = None,
) -> Iterator[None]:
    """Inside, source activations replace the target's at these sites; nothing is left afterwards.

    Args:
        target, source: `PreTrainedModel` or `PeftModel`, of the same sizes.
        where: sites to patch.
        positions: which tokens, prompt and new ones counted together from 0.
        mix: what is put there, from (target activation, source activation); None puts the source
            activation.

    Raises:
        PatchError: if positions count from an end that is not known yet, the two are one model,
            or a model takes no `past_key_values`; inside, if the target generates with beams, or
            continues a text that the source has not read.
        LoadingError: if an architecture has no such site.
    """
    if counts_from_the_end(positions):
        raise PatchError(
            f"positions {positions} count from the end of a text that is still being generated: "
            "count from its start"
        )
    if plain_model(target) is plain_model(source):
        raise PatchError(
            "target and source are one model, which cannot read along with itself: give a copy "
            "(copy.deepcopy), or load it twice"
        )
    for model in (target, source):
        check_takes_past(model)
    reader = _SourceReader(plain_model(source), positions)
    with ExitStack() as changes:
        changes.enter_context(evaluating(source))
        to, of = find_structure(target), find_structure(source)
        for site in where:
            changes.enter_context(_attached(of, site, partial(reader.keep, site)))
            changes.enter_context(_attached(to, site, partial(reader.replacement, site, mix)))
        plain = plain_model(target)
        changes.enter_context(plain.register_forward_pre_hook(reader.read, with_kwargs=True))
        changes.enter_context(_without_beams(plain))
        yield


def check_takes_past(model: Any) -> None:
    """Raise unless a model keeps what it has read in `past_key_values`.

    Raises:
        PatchError: if its forward pass takes none.
    """
    if not takes_past(model):
        raise PatchError(
            f"{type(plain_model(model)).__name__} takes no past_key_values, in which a source "
            "model keeps what it has read: patch while texts are read (patch_hooks, or "
            "max_new_tokens=0)"
        )


def takes_past(model: Any) -> bool:
    """Whether a model takes `past_key_values`; state-space models often do not."""
    return "past_key_values" in inspect.signature(plain_model(model).forward).parameters


@check_types
@contextmanager
def changing(
    model: nn.Module, site: Site, change: Callable[[Float[Tensor, "batch pos d_model"]], Tensor]
) -> Iterator[None]:
    """Inside, a function of the model's own activation replaces it; no source model is needed.

    Args:
        model: `PreTrainedModel` or `PeftModel`.
        site: where.
        change: takes the activation and returns what replaces it.

    Raises:
        PatchError: if the model has no such block.
        LoadingError: if its architecture has no such site.
    """
    with _attached(find_structure(model), site, change):
        yield


@contextmanager
def _without_beams(plain: Any) -> Iterator[None]:
    """Inside, `generate` cannot reorder the model's cache: the source's would not follow."""

    def refuse(*_: Any) -> None:
        raise PatchError(
            "the source model cannot follow beams, whose caches are reordered: generate greedily, "
            "or sample (num_beams=1)"
        )

    before = vars(plain).get("_reorder_cache")
    plain._reorder_cache = refuse  # `generate` asks the model before anything else
    try:
        yield
    finally:
        del plain._reorder_cache
        if before is not None:
            plain._reorder_cache = before


def _attached(structure: ModelStructure, site: Site, change: Any) -> Any:
    check_block(site.block, len(structure.blocks))
    return attach(structure, site.kind, site.block or 0, change)


class _SourceReader:
    """The source model reading along, and its activations for the target's current call."""

    def __init__(self, source: Any, positions: Positions) -> None:
        self.source = source
        self.positions = positions
        self.activations: dict[Site, Tensor] = {}
        self.here: Bool[Tensor, "batch pos"] | None = None
        self.cache: Any = None

    def read(self, module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Before the target reads some tokens, the source does."""
        tokens = args[0] if args else inputs.get("input_ids")
        if tokens is None:
            raise PatchError(
                "the source model reads token ids, and the target was given none: pass input_ids"
            )
        n_read = self._check_follows(inputs.get("past_key_values"))
        shared = {
            name: inputs[name]
            for name in ("attention_mask", "position_ids")
            if inputs.get(name) is not None
        }
        if self.positions is not None:
            # Without a mask nothing is padded.
            every = torch.ones(len(tokens), n_read + tokens.shape[1], device=tokens.device).long()
            mask = shared.get("attention_mask", every)
            self.here = mask_of_existing(self.positions, mask)[:, -tokens.shape[1] :]
        with torch.no_grad():
            self.source(
                input_ids=tokens,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
                **shared,
            )

    def _check_follows(self, target_cache: Any) -> int:
        """How many tokens both models have read; a new cache where there are none."""
        from transformers import DynamicCache

        n_read = 0 if target_cache is None else int(target_cache.get_seq_length())
        if n_read == 0:
            self.cache = DynamicCache(config=self.source.config)
        n_kept = 0 if self.cache is None else int(self.cache.get_seq_length())
        if n_kept != n_read:
            raise PatchError(
                f"the target continues after {n_read} tokens, of which the source has kept "
                f"{n_kept}: let the target read the text from its start, and do not crop its cache"
            )
        return n_read

    def keep(self, site: Site, value: Tensor) -> None:
        """Keep the source activation at a site."""
        self.activations[site] = value.detach()

    def replacement(self, site: Site, mix: Mix | None, own: Tensor) -> Tensor:
        """What replaces the target's own activation at a site."""
        source = self.activations[site].to(own)
        new = source if mix is None else mix(own, source).to(own)
        return new if self.here is None else torch.where(self.here[..., None], new, own)
