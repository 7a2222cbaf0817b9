"""The norm question: how much of a "terminal expansion" is block, and how much is final norm?

arXiv 2605.22579 (section 4) reads its last layer off hidden states that have passed the final
norm, and every other layer off raw ones. Here the norms' weights are exchanged: either model's
last output is read through either model's norm, so that both parts are measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ...checks import check_counts
from ...pair import open_inputs
from ...passes.streaming import PassOptions, run_pass
from ...passes.streams import VIEWS, ModelStream, StreamPair, StreamSpec, View, logit_chunk_bytes
from ...probes import ParticipationRatio
from ..outcomes import METRICS, Outcome, Tally, measure, reference
from ..outputs import OutputReader
from .finding import NormResult
from .ratios import CrossedNorms, Dimension, Side, dimensions, less, total

SINK_THRESHOLD = 10.0
SIDES: tuple[Side, Side] = ("base", "tuned")
SWAPS = ("norm", "stream")

Row = dict[str, Any]


def norm_question(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    max_length: int = 256,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> NormResult:
    """Read both models' last outputs through both models' final norms: a 2 x 2 of dimensions.

    One pass over the texts, as `compare_models` makes it, with the same numbers where they are of
    the same quantity; memory does not grow with the number of texts.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models.
        texts: what `compare_models` takes.
        max_length: tokens per text.
        batch_size: texts per forward pass; does not change the result.
        seed: of the token sample that intervals are computed from.
        device, dtype: as in `compare_models`.
        progress: show a progress bar.

    Raises:
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    check_counts(batch_size=batch_size)
    opened = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    pair, corpus, notes = opened
    plain = ParticipationRatio(views=VIEWS, layers=(-2, -1))
    crossed, swapped = CrossedNorms(), Swapped(len(corpus.sequences))
    options = PassOptions(batch_size, SINK_THRESHOLD, seed, progress)
    run_pass(pair.base.hooked, pair.tuned.hooked, corpus, [plain, crossed, swapped], options)
    found = {name: _row("dimension", name, one) for name, one in quantities(plain, crossed).items()}
    outcomes = swapped.outcomes()
    meta = pair.describe() | {
        "seed": seed,
        "options": {
            "max_length": max_length,
            "batch_size": batch_size,
            "sink_threshold": SINK_THRESHOLD,
        },
        "data": corpus.describe(),
        "notes": list(notes),
    }
    unchanged = outcomes["base"]
    extras = {
        "decisions": int(unchanged.decisions.sum()),
        "changed": int(unchanged.changed.sum()),
        "same_norm": same_norm(pair.base.hooked, pair.tuned.hooked),
    }
    return NormResult((*found.values(), *_decisions(outcomes)), extras, meta)


def quantities(plain: ParticipationRatio, crossed: CrossedNorms) -> dict[str, Dimension]:
    """The cells, their effects, and the steps from the raw change to the one after the norm.

    Args:
        plain: measured raw, at unit RMS and after each model's own norm, at the last layers.
        crossed: measured after the other model's norm.
    """
    own, other = dimensions(plain), dimensions(crossed)
    *before, last = plain.spec.resolve_layers(plain.layers)

    def change(view: View, layer: int) -> Dimension:
        return less(own["tuned", layer, view], own["base", layer, view])

    # By stream, then norm.
    bb, tt = (own[side, last, "final_norm"] for side in SIDES)
    bt, tb = (other[side, last, "final_norm"] for side in SIDES)
    raw, unit = change("raw", last), change("unit_rms", last)
    stream = total([(0.5, less(tb, bb)), (0.5, less(tt, bt))])
    weights = total([(0.5, less(bt, bb)), (0.5, less(tt, tb))])
    whole = less(tt, bb)
    found = {
        f"{view}_{side}": own[side, last, view] for view in ("raw", "unit_rms") for side in SIDES
    }
    found |= {
        "base_stream_base_norm": bb,
        "base_stream_tuned_norm": bt,
        "tuned_stream_base_norm": tb,
        "tuned_stream_tuned_norm": tt,
        "stream": stream,
        "weights": weights,
        "interaction": less(less(tt, tb), less(bt, bb)),
        "raw_change": raw,
        "unit_rms_change": unit,
        "change": whole,
        "rescaling": less(unit, raw),
        "weighting": less(stream, unit),
    }
    for layer in before:
        earlier = change("raw", layer)
        found |= {f"before_{side}": own[side, layer, "raw"] for side in SIDES}
        found |= {
            "before_change": earlier,
            "jump_as_read": less(whole, earlier),
            "jump_raw": less(raw, earlier),
        }
    return found


class Swapped(OutputReader):
    """What each model decides with the other's final norm, or the other's last output."""

    name = "swapped norms"

    def open(self, spec: StreamSpec) -> None:
        """Begin to count."""
        keys = [*SIDES, *(f"{swap} into {side}" for side in SIDES for swap in SWAPS)]
        self._tallies = {key: Tally(self._n_texts) for key in keys}

    def decide(self, pair: StreamPair, index: Int[Tensor, " n"], text: Int[Tensor, " n"]) -> None:
        """Swap norms and outputs, and count what is decided."""
        streams = {"base": pair.base, "tuned": pair.tuned}
        x = {side: stream.residuals[-1].flatten(0, 1)[index] for side, stream in streams.items()}

        def logits(host: ModelStream, norm: ModelStream, of: Tensor) -> Tensor:
            return host.unembed(norm.final_norm(of)).float().to(pair.device)

        own = {side: logits(host, host, x[side]) for side, host in streams.items()}
        models = reference(own["base"], own["tuned"])
        made = dict(own)
        for side, guest in (("base", "tuned"), ("tuned", "base")):
            host = streams[side]
            made[f"norm into {side}"] = logits(host, streams[guest], x[side])
            made[f"stream into {side}"] = logits(host, host, x[guest])
        for key, found in made.items():
            self._tallies[key].add(measure(found, models), models.changed, text)

    def outcomes(self) -> dict[str, Outcome]:
        """By what was swapped into whom, and of both models as they are."""
        return {key: tally.outcome() for key, tally in self._tallies.items()}

    def state_bytes(self, spec: StreamSpec) -> int:
        """Memory of the logits of some rows, and of what is made of them."""
        return 16 * logit_chunk_bytes(spec.d_vocab, spec.device)


def same_norm(base: Any, tuned: Any) -> bool:
    """Whether the two final norms have the same weights, bit for bit."""
    own, other = (list(model.ln_final.parameters()) for model in (base, tuned))
    return len(own) == len(other) and all(map(torch.equal, own, other))


def _row(what: str, name: str, found: Dimension) -> Row:
    return {
        "what": what,
        "name": name,
        "metric": "participation_ratio",
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "naive": found.naive,
        "n": found.n,
    }


def _decisions(outcomes: Mapping[str, Outcome]) -> Iterator[Row]:
    for name, outcome in outcomes.items():
        for metric in METRICS:
            found = outcome.estimate(metric)._asdict()
            found.pop("se")
            yield {
                "what": "decisions",
                "name": name,
                "metric": metric,
                "naive": float("nan"),
            } | found
