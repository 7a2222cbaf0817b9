"""patch_blocks: each block's activation of one model put into the other, and what it does.

The causal question behind arXiv 2605.22579, which only correlates: does what leaves the last
blocks of the tuned model bring about its decisions, and does the base's undo them?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ...checks import check_counts
from ...decoding.diversity import REPETITION_METRICS as WRITTEN
from ...decoding.generate import GenerationRunner
from ...decoding.prompts import check_room, choose_prompts
from ...errors import PatchError
from ...pair import Pair, open_inputs
from ...passes.failures import explaining_out_of_memory
from ...statistics import significance
from ..choosing import drawn
from ..directions import DIRECTIONS, INTO_BASE, INTO_TUNED
from ..hooks.generating import check_keeps, donating
from ..hooks.positions import Positions, counts_from_the_end
from ..hooks.sites import Site, check_kind, in_blocks
from ..outcomes import METRICS, Outcome, p_value
from .finding import BlocksResult
from .placebos import PLACEBOS, random_rotation, rotated
from .sweep import DONOR, Cell, Outcomes, Sweep, run_sweep
from .two_by_two import Cut, cells, effects

# What is held against the placebos: the donor's decisions brought about, and the distance to it.
TOWARDS = {INTO_BASE: ("to_tuned", "kl_tuned"), INTO_TUNED: ("to_base", "kl_base")}


def patch_blocks(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    site: str = "resid_post",
    positions: Positions = None,
    placebos: bool = True,
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
) -> BlocksResult:
    """Sweep a patch over all blocks, in both directions, teacher-forced and free-running.

    "Tuned into base" puts the tuned model's activation into the base (what does it bring about?),
    "base into tuned" the other way round (what does it undo?). Patches of the residual stream at
    all positions also give the 2 x 2 of every cut between blocks, because such a patch *is* the
    one model's state in the other's late blocks. A patch of layer l carries all that happened
    before it: read where its effect changes from one layer to the next, not how large it is at
    the last.

    Beside the donor's activation stand placebos: the donor's activation on another text, a move
    as far in a random direction, and the donor's own change rotated.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models.
        texts: what `compare_models` takes.
        site: "resid_post" (with the embedding output as layer 0), "resid_pre", "attn_out",
            "mlp_out" or "final_norm".
        positions: which tokens are patched: None, a list, or a slice (see `Positions`).
        placebos: whether to run them; they cost three times what the donor costs.
        n_texts: how many texts are read, drawn at random.
        max_length: tokens per text.
        n_prompts, prompt_tokens, max_new_tokens: of the greedy continuations; 0 new tokens writes
            none.
        batch_size: texts per forward pass; does not change the result.
        seed: of the choice of texts and prompts, and of the placebos.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        PatchError: if the models lack the site, blocks hand on more than the residual stream, or
            text is to be written and the models keep no `past_key_values`.
        ActivationError: if a model, or what a patch makes of it, overflows.
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    check_kind(site)
    check_counts(n_texts=n_texts, batch_size=batch_size)
    if max_new_tokens and counts_from_the_end(positions):
        raise PatchError(
            f"positions {positions} count from the end of a text, and a text that is being "
            "written has none yet: count from the start, or pass max_new_tokens=0"
        )
    opened = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    opened = drawn(opened, n_texts, seed)
    pair = opened.pair
    swept = swept_sites(site, pair.base.hooked.cfg.n_layers)
    sweep = Sweep(swept, positions, placebos, seed)
    prompts: list[list[int]] = []
    if max_new_tokens:
        check_room(pair, prompt_tokens, max_new_tokens)
        for loaded in (pair.base, pair.tuned):
            check_keeps(loaded.model)
        prompts = choose_prompts(opened.corpus, n_prompts, prompt_tokens, seed)
    with explaining_out_of_memory(batch_size, ", or max_length"):
        outcomes = run_sweep(pair, opened.corpus, sweep, batch_size, progress)
    continuing = GenerationRunner(prompts, max_new_tokens, max(batch_size, 16), seed, False)
    written = _write(pair, sweep, continuing, progress) if prompts else {}
    cuts = _cuts(outcomes, swept) if positions is None and site.startswith("resid") else []
    meta = pair.describe() | {
        "seed": seed,
        "options": {
            "site": site,
            "positions": None if positions is None else str(positions),
            "placebos": placebos,
            "n_texts": len(opened.corpus.sequences),
            "max_length": max_length,
            "n_prompts": len(prompts),
            "prompt_tokens": prompt_tokens,
            "max_new_tokens": max_new_tokens,
        },
        "data": opened.corpus.describe(),
        "notes": list(opened.notes),
    }
    changed = outcomes.models["base"]
    extras = {
        "decisions": int(changed.decisions.sum()),
        "changed": int(changed.changed.sum()),
        "contrasts": [*_contrasts(outcomes, sweep), *_written_contrasts(written, sweep)],
        "two_by_two": list(cells(cuts)),
        "effects": list(effects(cuts)),
    }
    return BlocksResult((*_rows(outcomes), *_written_rows(written)), extras, meta)


def swept_sites(kind: str, n_layers: int) -> list[Site]:
    """The sites of a sweep; that of `resid_post` begins with what enters the first block."""
    if kind == "final_norm":
        return [Site("final_norm")]
    start = [Site("resid_pre", 0)] if kind == "resid_post" else []
    return [*start, *in_blocks(kind, range(n_layers))]


def _cuts(outcomes: Outcomes, swept: Sequence[Site]) -> list[Cut]:
    """A patch of the stream at all positions is the donor's state in the host's late blocks."""
    found = []
    base, tuned = outcomes.models["base"], outcomes.models["tuned"]
    for site in swept:
        state, stack = (outcomes.cells[Cell(way, site, DONOR)] for way in DIRECTIONS)
        found.append(Cut(site.layer, base, stack, state, tuned))
    return found


def _rows(outcomes: Outcomes) -> Iterator[dict[str, Any]]:
    for name, outcome in outcomes.models.items():
        for metric in METRICS:
            yield _row("unpatched", None, name, metric, outcome.estimate(metric))
    for cell, outcome in outcomes.cells.items():
        for metric in METRICS:
            yield _row(cell.direction, cell.site, cell.activation, metric, outcome.estimate(metric))


def _row(
    direction: str, site: Site | None, activation: str, metric: str, found: significance.Estimate
) -> dict[str, Any]:
    return {
        "direction": direction,
        "layer": -1 if site is None else site.layer,
        "site": "" if site is None else site.kind,
        "block": -1 if site is None or site.block is None else site.block,
        "activation": activation,
        "metric": metric,
    } | found._asdict()


def _contrasts(outcomes: Outcomes, sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Donor less placebo, paired by text, p corrected over the sites (Holm)."""
    for direction in DIRECTIONS:
        for against in sweep.activations[1:]:
            for metric in TOWARDS[direction]:
                found = [
                    _of(outcomes, direction, site, DONOR).difference(
                        _of(outcomes, direction, site, against), metric
                    )
                    for site in sweep.sites
                ]
                yield from _corrected(direction, sweep.sites, against, metric, found)


def _of(outcomes: Outcomes, direction: str, site: Site, activation: str) -> Outcome:
    return outcomes.cells[Cell(direction, site, activation)]


def _corrected(
    direction: str,
    sites: Sequence[Site],
    against: str,
    metric: str,
    found: Sequence[significance.Estimate],
) -> Iterator[dict[str, Any]]:
    for site, one, p in zip(
        sites, found, significance.holm([p_value(one) for one in found]), strict=True
    ):
        yield _row(direction, site, against, metric, one) | {"p": p}


Written = Mapping[Cell | str, Mapping[str, list[float]]]


def _write(pair: Pair, sweep: Sweep, continuing: GenerationRunner, progress: bool) -> Written:
    """Repetition of what every patched model writes, and of what both models write as they are."""
    rotation = random_rotation(pair.base.hooked.cfg.d_model, sweep.seed)
    mixes = {DONOR: None, "rotation": lambda own, donated: rotated(own, donated, rotation)}
    chosen = [name for name in mixes if name in sweep.activations]
    every = [
        Cell(direction, site, activation)
        for direction in DIRECTIONS
        for site in sweep.sites
        for activation in chosen
    ]
    found: dict[Cell | str, Mapping[str, list[float]]] = {
        name: continuing.run(loaded).metrics
        for name, loaded in (("base", pair.base), ("tuned", pair.tuned))
    }
    for cell in tqdm(every, desc="writing", unit="model", disable=not progress):
        host, donor = (pair.base, pair.tuned)
        if cell.direction != INTO_BASE:
            host, donor = donor, host
        models = host.model, donor.model
        mix = mixes[cell.activation]
        with donating(*models, [cell.site], positions=sweep.positions, mix=mix):
            found[cell] = continuing.run(host).metrics
    return found


def _written_rows(written: Written) -> Iterator[dict[str, Any]]:
    for key, metrics in written.items():
        for metric in WRITTEN:
            found = significance.estimate(metrics[metric])
            if isinstance(key, str):
                yield _row("unpatched", None, key, metric, found)
            else:
                yield _row(key.direction, key.site, key.activation, metric, found)


def _written_contrasts(written: Written, sweep: Sweep) -> Iterator[dict[str, Any]]:
    """What a patched model writes less what its host and its placebo write, paired by prompt."""
    if not written:
        return
    for direction in DIRECTIONS:
        host = "base" if direction == INTO_BASE else "tuned"
        for against in ("unpatched", *(p for p in PLACEBOS if p == "rotation")):
            if against != "unpatched" and not sweep.with_placebos:
                continue
            for metric in WRITTEN:
                found = []
                for site in sweep.sites:
                    key = host if against == "unpatched" else Cell(direction, site, against)
                    donated = written[Cell(direction, site, DONOR)]
                    found.append(significance.difference(donated[metric], written[key][metric]))
                yield from _corrected(direction, sweep.sites, against, metric, found)
