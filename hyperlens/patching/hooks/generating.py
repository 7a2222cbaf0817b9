"""Free-running: a model writes while another reads along and lends it its activations.

    with donating(base, tuned, [Site("resid_post", 9)]):
        tokens = continuations(base, tokenizer, prompts, max_new_tokens=64)

Whatever the host is given, the donor is given too, with a cache of its own; what the donor has at
the sites takes the place of what the host has. Works with transformers' `generate`, greedy or
sampled, any batch with any padding; beams, whose caches are reordered, are refused.
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

from ...errors import PatchError
from ...hooks.attach import attach
from ...hooks.surface import evaluating
from ...models.kinds import plain_model
from ...models.structure import ModelStructure, find_structure
from .positions import Positions, chosen_so_far, counts_from_the_end
from .sites import Site

Mix = Callable[
    [Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"]],
    Float[Tensor, "batch pos d_model"],
]
"""Makes what takes the place of the host's activation, from the host's own and the donor's."""


@contextmanager
def donating(
    host: Any,
    donor: Any,
    where: Sequence[Site],
    *,
    positions: Positions = None,
    mix: Mix | None = None,
) -> Iterator[None]:
    """Inside, the donor's activations stand in the host at these sites; afterwards nothing is left.

    Args:
        host, donor: `PreTrainedModel` or `PeftModel`, of the same sizes.
        where: sites to patch.
        positions: which tokens, prompt and new ones counted together from 0.
        mix: what is put there, from (own, donated); None puts the donated activation.

    Raises:
        PatchError: if positions count from an end that is not known yet, the two are one model,
            or a model takes no `past_key_values`; inside, if the host writes with beams, or goes
            on from a text that the donor has not read.
        LoadingError: if an architecture has no such site.
    """
    if counts_from_the_end(positions):
        raise PatchError(
            f"positions {positions} count from the end of a text that is still being written: "
            "count from its start"
        )
    if plain_model(host) is plain_model(donor):
        raise PatchError(
            "host and donor are one model, which cannot read along with itself: give a copy "
            "(copy.deepcopy), or load it twice"
        )
    for model in (host, donor):
        check_keeps(model)
    lent = _Lending(plain_model(donor), positions)
    with ExitStack() as changes:
        changes.enter_context(evaluating(donor))
        to, of = find_structure(host), find_structure(donor)
        for site in where:
            changes.enter_context(_attached(of, site, partial(lent.keep, site)))
            changes.enter_context(_attached(to, site, partial(lent.put, site, mix)))
        plain = plain_model(host)
        changes.enter_context(plain.register_forward_pre_hook(lent.read, with_kwargs=True))
        changes.enter_context(_without_beams(plain))
        yield


def check_keeps(model: Any) -> None:
    """Refuse a model that keeps what it has read in a way of its own.

    Raises:
        PatchError: if its forward pass takes no `past_key_values`.
    """
    if not takes_past(model):
        raise PatchError(
            f"{type(plain_model(model)).__name__} takes no past_key_values, in which a donor keeps "
            "what it has read: patch while texts are read (patch_hooks, or max_new_tokens=0)"
        )


def takes_past(model: Any) -> bool:
    """Whether a model can be given what it has read before; state-space models often cannot."""
    return "past_key_values" in inspect.signature(plain_model(model).forward).parameters


@contextmanager
def changing(
    model: Any, site: Site, change: Callable[[Float[Tensor, "batch pos d_model"]], Tensor]
) -> Iterator[None]:
    """Inside, a function of the model's own activation takes its place; no donor is needed."""
    with _attached(find_structure(model), site, change):
        yield


@contextmanager
def _without_beams(plain: Any) -> Iterator[None]:
    """Inside, `generate` cannot reorder what the model has kept: the donor's would stay behind."""

    def refuse(*_: Any) -> None:
        raise PatchError(
            "the donor cannot follow beams, whose caches are reordered: write greedily, or sample "
            "(num_beams=1)"
        )

    before = vars(plain).get("_reorder_cache")
    plain._reorder_cache = refuse  # before all others, `generate` asks the model
    try:
        yield
    finally:
        del plain._reorder_cache
        if before is not None:
            plain._reorder_cache = before


def _attached(structure: ModelStructure, site: Site, change: Any) -> Any:
    n = len(structure.blocks)
    if site.block is not None and not 0 <= site.block < n:
        raise PatchError(f"there is no block {site.block}: this model has blocks 0 to {n - 1}")
    return attach(structure, site.kind, site.block or 0, change)


class _Lending:
    """The donor reading along, and what it has lent for the host's current call."""

    def __init__(self, donor: Any, positions: Positions) -> None:
        self.donor = donor
        self.positions = positions
        self.lent: dict[Site, Tensor] = {}
        self.here: Bool[Tensor, "batch pos"] | None = None
        self.cache: Any = None

    def read(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        """Before the host reads some tokens, the donor does."""
        from transformers import DynamicCache

        tokens = args[0] if args else given.get("input_ids")
        if tokens is None:
            raise PatchError(
                "the donor reads token ids, and the host was given none: pass input_ids"
            )
        theirs = given.get("past_key_values")
        read = 0 if theirs is None else int(theirs.get_seq_length())
        if read == 0:
            self.cache = DynamicCache(config=self.donor.config)
        own = 0 if self.cache is None else int(self.cache.get_seq_length())
        if own != read:
            raise PatchError(
                f"the host goes on after {read} tokens, of which the donor has kept {own}: let the "
                "host read the text from its start, and take back nothing that it has read"
            )
        shared = {
            name: given[name]
            for name in ("attention_mask", "position_ids")
            if given.get(name) is not None
        }
        if self.positions is not None:
            # Without a mask nothing is padded.
            every = torch.ones(len(tokens), read + tokens.shape[1], device=tokens.device).long()
            mask = shared.get("attention_mask", every)
            self.here = chosen_so_far(self.positions, mask)[:, -tokens.shape[1] :]
        with torch.no_grad():
            self.donor(
                input_ids=tokens,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
                **shared,
            )

    def keep(self, site: Site, value: Tensor) -> None:
        """What the donor has at a site."""
        self.lent[site] = value.detach()

    def put(self, site: Site, mix: Mix | None, own: Tensor) -> Tensor:
        """What the host gets there."""
        donated = self.lent[site].to(own)
        new = donated if mix is None else mix(own, donated).to(own)
        return new if self.here is None else torch.where(self.here[..., None], new, own)
