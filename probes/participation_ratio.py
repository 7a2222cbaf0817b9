"""How many directions share the variance of each residual stream, before and after tuning."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ProbeError
from ..passes.streams import (
    VIEWS,
    StreamPair,
    StreamSpec,
    TokenSet,
    View,
    checked_layers,
    checked_token_set,
    checked_views,
)
from ..results.rows import ProbeResult, Row
from ..statistics.intervals import (
    RatioInfluence,
    SampledTokens,
    influence_half_width,
    ratio_influence,
)
from ..statistics.moments import Moments, corrected_traces, moments_of, naive_traces
from .base import Probe

MOMENTS = tuple(f.name for f in fields(Moments) if f.name != "n")
MODELS = ("base", "tuned")


class ParticipationRatio(Probe):
    """PR = tr(Σ)² / ‖Σ‖²_F of both streams and its change (paper, section 4).

    Metrics:
        base, tuned, delta: the row estimator of Chun et al. 2025 (arXiv 2509.26560), corrected
            for the finite number of tokens.
        base_naive, tuned_naive, delta_naive: from the sample covariance, as most code has it;
            biased, therefore without intervals.

    The intervals cover the ratio of the distribution the texts come from. They also take out
    what the row estimator cannot know, that tokens of one sequence resemble each other; with few
    or short sequences they can therefore lie to one side of the value.

    The moments are the largest state of a comparison, d_model² numbers per layer, view and
    model: where they do not fit, `compare_models` takes them in several passes.
    """

    name = "participation_ratio"
    float32_sums = frozenset({"sample"})

    def __init__(
        self,
        views: Sequence[View] = VIEWS,
        layers: Sequence[int] | None = None,
        token_set: TokenSet = "geometry",
    ) -> None:
        self.views = checked_views(views)
        self.layers = checked_layers(layers)
        self.token_set = checked_token_set(token_set)

    def sum_shapes(self, spec: StreamSpec) -> dict[str, tuple[int, ...]]:
        """Moments of every (model, layer, view) about an origin, and the sampled tokens."""
        d, n_layers = spec.d_model, len(spec.resolve_layers(self.layers))
        each = (2, n_layers, len(self.views))
        sampled = (spec.n_sampled_sequences, spec.n_sampled_tokens)
        return {
            "n": (n_layers,),
            "nn": (n_layers,),
            "sequences": (n_layers,),
            "origin": (*each, d),
            "total": (*each, d),
            "outer": (*each, d, d),
            "square": each,
            "fourth": each,
            "cubic": (*each, d),
            "sample": (*each, *sampled, d),
            "sample_valid": (n_layers, *sampled),
            "sample_length": (n_layers, sampled[0]),
        }

    def split(self, spec: StreamSpec, n: int) -> list[ParticipationRatio]:
        """At most n unopened probes of some layers each, the first of as many as any."""
        layers = spec.resolve_layers(self.layers)
        size = -(-len(layers) // n)
        parts = [copy.copy(self) for _ in range(0, len(layers), size)]
        for i, part in enumerate(parts):
            part.layers = layers[i * size : (i + 1) * size]
        return parts

    def update(self, pair: StreamPair) -> None:
        """Add one batch's moments and put its sampled tokens in their places."""
        s = self.sums
        for i, layer in enumerate(self.spec.resolve_layers(self.layers)):
            mask = pair.mask(layer, self.token_set)
            n = mask.sum(-1).to(self.spec.device, torch.float64)
            places = _sampled_places(pair, mask) if self.spec.n_sampled_sequences else None
            if places is not None:
                slot, valid, _ = places
                s["sample_valid"][i, slot] += valid.to(torch.float64)
                s["sample_length"][i, slot] += n[pair.sample.slot.to(n.device) >= 0]
            for j, view in enumerate(self.views):
                for k, x in enumerate(pair.vectors(layer, view, self.token_set)):
                    self._add(x, (k, i, j), first=bool(s["n"][i] == 0), places=places)
            s["n"][i] += n.sum()
            s["nn"][i] += n.square().sum()
            s["sequences"][i] += (n > 0).sum()

    def _add(
        self,
        x: Float[Tensor, "n d_model"],
        at: tuple[int, int, int],
        first: bool,
        places: tuple[Tensor, Tensor, Tensor] | None,
    ) -> None:
        s = self.sums
        if first and len(x):
            # Any point near the data will do; float32, so that subtracting it is exact.
            s["origin"][at] = x.mean(0, dtype=torch.float64).to(torch.float32)
        origin = s["origin"][at]
        moments = moments_of(x, origin)
        for name in MOMENTS:
            s[name][at].add_(getattr(moments, name))
        if places is not None and len(x):
            slot, valid, row = places
            chosen = x.index_select(0, row.flatten()).view(*row.shape, -1)
            s["sample"][at][slot] += (chosen - origin.to(x.dtype)) * valid[..., None]

    def merge(self, other: Probe) -> None:
        """Add another shard's sums, first moved to this shard's origin (exact algebra).

        Raises:
            ProbeError: if the other shard is none of the same texts.
        """
        self._check_mergeable(other)
        filled = [(probe.sums["sample_valid"] > 0).any(-1) for probe in (self, other)]
        if bool((filled[0] & filled[1]).any()):
            raise ProbeError(
                "both shards sampled tokens for the same places: they are not two parts of one "
                "corpus; compare each corpus by itself"
            )
        if not bool(self.sums["n"].any()):
            self.sums["origin"].copy_(other.sums["origin"])
        moved = cast(ParticipationRatio, other)._about(self.sums["origin"])
        for name, value in moved.items():
            if name != "origin":
                self.sums[name] += value

    def all_reduce(self) -> None:
        """Agree on the first rank's origin that has seen tokens, then add the sums up."""
        group = torch.distributed
        seen = torch.where(
            self.sums["n"].any(), group.get_rank(), group.get_world_size() - 1
        ).reshape(1)
        group.all_reduce(seen, op=group.ReduceOp.MIN)
        origin = self.sums["origin"].clone()
        group.broadcast(origin, src=int(seen))
        self.sums = self._about(origin)
        for name, value in self.sums.items():
            if name != "origin":
                group.all_reduce(value)

    def _about(self, origin: Float[Tensor, "models layers views d"]) -> dict[str, Tensor]:
        """The same sums taken about another origin."""
        s = self.sums
        step = s["origin"] - origin
        if not bool(step.any()):
            return dict(s)
        moved = self._moments().shifted(step)
        sample_step = step[..., None, None, :] * s["sample_valid"][None, :, None, :, :, None]
        return {
            **s,
            **{name: getattr(moved, name) for name in MOMENTS},
            "sample": s["sample"] + sample_step.to(torch.float32),
            "origin": origin,
        }

    def _moments(self) -> Moments:
        s = self.sums
        return Moments(
            n=s["n"][None, :, None].expand_as(s["square"]), **{name: s[name] for name in MOMENTS}
        )

    def _moments_at(self, model: int, i: int, j: int) -> Moments:
        s = self.sums
        return Moments(n=s["n"][i], **{name: s[name][model, i, j] for name in MOMENTS})

    def compute(self) -> ProbeResult:
        """Six rows per layer and view."""
        return ProbeResult(tuple(self._rows()))

    def _rows(self) -> Iterator[Row]:
        none = (float("nan"), float("nan"))
        for i, layer in enumerate(self.spec.resolve_layers(self.layers)):
            n = int(self.sums["n"][i])
            for j, view in enumerate(self.views):
                intervals = self._intervals(layer, view)
                # One set at a time: the squares of all moments would double the memory.
                moments = [self._moments_at(k, i, j) for k in range(2)]
                values = {
                    "": [corrected_traces(m).ratio for m in moments],
                    "_naive": [naive_traces(m).ratio for m in moments],
                }
                for suffix, (base, tuned) in ((k, map(float, v)) for k, v in values.items()):
                    numbers = {"base": base, "tuned": tuned, "delta": tuned - base}
                    for metric, value in numbers.items():
                        ends = none if suffix else intervals[metric]
                        yield Row(self.name, metric + suffix, layer, view, value, *ends, n)

    def linearised(
        self, layer: int, view: View
    ) -> tuple[tuple[RatioInfluence, RatioInfluence], SampledTokens] | None:
        """How each sampled token moves the base's and the tuned model's ratio at one layer.

        For intervals of any sum of ratios over the same tokens. None if there are too few.
        """
        i = self.spec.resolve_layers(self.layers).index(layer)
        j = self.views.index(view)
        s = self.sums
        if float(s["n"][i]) < 4 or int((s["sample_valid"][i] > 0).any(-1).sum()) < 2:
            return None
        influences, samples = [], []
        for k in range(2):
            sample = SampledTokens(
                vectors=s["sample"][k, i, j].to(torch.float64),
                valid=s["sample_valid"][i] > 0,
                length=s["sample_length"][i],
                sum_nn=float(s["nn"][i]),
            )
            influences.append(ratio_influence(self._moments_at(k, i, j), sample))
            samples.append(sample)
        return (influences[0], influences[1]), samples[0]

    def _intervals(self, layer: int, view: View) -> dict[str, tuple[float, float]]:
        """95% intervals of base, tuned and delta at one layer and view."""
        linear = self.linearised(layer, view)
        if linear is None:
            return dict.fromkeys(("base", "tuned", "delta"), (float("nan"), float("nan")))
        (base, tuned), sample = linear
        n = float(self.sums["n"][self.spec.resolve_layers(self.layers).index(layer)])
        change = replace(
            tuned, centre=tuned.centre - base.centre, influence=tuned.influence - base.influence
        )
        return {
            name: _ends(ratio.centre, influence_half_width(ratio.influence, n, sample), relative)
            for name, ratio, relative in (
                ("base", base, True),
                ("tuned", tuned, True),
                ("delta", change, False),
            )
        }


def _ends(centre: float, half_width: float, relative: bool) -> tuple[float, float]:
    if relative and centre > 0:
        # A ratio of positive traces: its error is nearer to symmetric on the log scale.
        factor = float(torch.exp(torch.tensor(half_width / centre)))
        return centre / factor, centre * factor
    return centre - half_width, centre + half_width


def _sampled_places(
    pair: StreamPair, mask: Bool[Tensor, "batch pos"]
) -> (
    tuple[Int[Tensor, " chosen"], Bool[Tensor, "chosen sampled"], Int[Tensor, "chosen sampled"]]
    | None
):
    """(slot, valid, row among the counted tokens) of the batch's sampled tokens, if any."""
    chosen = pair.sample.slot >= 0
    if not bool(chosen.any()):
        return None
    position = pair.sample.position[chosen]
    valid = (position >= 0) & mask[chosen].gather(-1, position.clamp_min(0))
    rows = (mask.flatten().cumsum(0) - 1).view_as(mask)[chosen]
    row = rows.gather(-1, position.clamp_min(0)).clamp_min(0)
    device = pair.device
    return pair.sample.slot[chosen].to(device), valid.to(device), row.to(device)
