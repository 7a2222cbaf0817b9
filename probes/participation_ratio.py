"""How many directions share the variance of each residual stream, before and after tuning."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import processes
from ..errors import ProbeError
from ..passes.streaming import MAX_SAMPLED_SEQUENCES
from ..passes.streams import (
    VIEWS,
    WIDER_SETS,
    StreamPair,
    StreamSpec,
    TokenSet,
    View,
    checked_layers,
    checked_token_set,
    checked_views,
)
from ..results.rows import ProbeResult, Row, joined
from ..statistics.moments import Moments, corrected_traces, moments_of, naive_traces
from ..statistics.ratios import (
    FEWEST_TEXTS,
    Ratio,
    SampledTokens,
    measured_ratio,
    ratio_ends,
    sum_ends,
    weighted_ratio,
)
from .base import WITH_EXCLUDED, Probe, views_with_excluded

MOMENTS = tuple(f.name for f in fields(Moments) if f.name != "n")
MODELS = ("base", "tuned")
# So little beyond 1 or d_model a ratio may be, as a share of it, by rounding alone.
ROUNDING = 1e-9


class ParticipationRatio(Probe):
    """PR = tr(Σ)² / ‖Σ‖²_F of both streams and its change (paper, section 4).

    Metrics:
        base, tuned, delta: from pairs of tokens of different texts, so that it depends neither on
            the number of tokens nor on how much tokens of one text resemble each other. Of a
            single text: the row estimator.
        base_row, tuned_row, delta_row: the row estimator of Chun et al. 2025 (arXiv 2509.26560),
            corrected for the number of tokens alone: too low where tokens of a text resemble each
            other.
        base_naive, tuned_naive, delta_naive: from the sample covariance, as most code has it; too
            low for few tokens.

    With the tokens that are left out counted in (`with_excluded`), at every layer raw and at the
    last one after the final norm too: `base_naive_with_sinks` and so on, from the sample covariance
    with attention sinks counted in, and `base_naive_with_sinks_and_bos` and so on, with BOS as
    well: every token, as most code has it.

    Only the first three have intervals: of the ratio of the distribution the texts come from. With
    less than 5 texts there are none.

    The moments are the largest state of a comparison, d_model² numbers per layer, view and
    model: where they do not fit, `compare_models` takes them in several passes.
    """

    name = "participation_ratio"
    # One direction makes most of what is left out, and naive ratios subtract nothing large from it:
    # float32 changes them in the seventh digit, and takes half the memory.
    float32_sums = frozenset({"sample", "excluded_outer"})

    # The layers whose origin another rank has chosen.
    _given: tuple[int, ...] = ()

    def __init__(
        self,
        views: Sequence[View] = VIEWS,
        layers: Sequence[int] | None = None,
        token_set: TokenSet = "geometry",
        with_excluded: bool = False,
    ) -> None:
        self.views = checked_views(views)
        self.layers = checked_layers(layers)
        self.token_set = checked_token_set(token_set)
        self.with_excluded = with_excluded

    def sum_shapes(self, spec: StreamSpec) -> dict[str, tuple[int, ...]]:
        """Moments of every (model, layer, view) about an origin, and the sampled tokens.

        Moments are sums, so the tokens that are left out, which are few, have sums of their own
        about the same origin: added to the others, they make those of a wider set.
        """
        d, n_layers = spec.d_model, len(spec.resolve_layers(self.layers))
        each = (2, n_layers, len(self.views))
        sampled = (spec.n_sampled_sequences, spec.n_sampled_tokens)
        more = (len(WIDER_SETS), 2, len(self._places(spec)), d)
        excluded = {
            "excluded_n": (len(WIDER_SETS), n_layers),
            "excluded_total": more,
            "excluded_outer": (*more, d),
            "excluded_square": more[:-1],
            "excluded_fourth": more[:-1],
            "excluded_cubic": more,
        }
        return (excluded if self.with_excluded else {}) | {
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

    def _places(self, spec: StreamSpec) -> list[tuple[int, int]]:
        """Where sums of what is left out are kept: numbers of the layer and the view."""
        return [
            (i, j)
            for i, layer in enumerate(spec.resolve_layers(self.layers))
            for j, view in enumerate(self.views)
            if view in views_with_excluded(layer, spec)
        ]

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
                s["sample_valid"][i].index_add_(0, slot, valid.to(torch.float64))
                s["sample_length"][i].index_add_(0, slot, n[pair.sample.slot.to(n.device) >= 0])
            first = self._has_no_origin(i)
            for j, view in enumerate(self.views):
                moments: Moments | None = None
                for k, x in enumerate(pair.vectors(layer, view, self.token_set)):
                    known = moments if pair.is_shared(layer, view) else None
                    moments = self._add(x, (k, i, j), first, places, known)
            s["n"][i] += n.sum()
            s["nn"][i] += n.square().sum()
            s["sequences"][i] += (n > 0).sum()
            if self.with_excluded:
                self._update_excluded(pair, i, layer)

    def _has_no_origin(self, i: int) -> bool:
        counted = bool(self.sums["n"][i] > 0) or i in self._given
        return not counted and not (
            self.with_excluded and bool(self.sums["excluded_n"][:, i].any())
        )

    def _update_excluded(self, pair: StreamPair, i: int, layer: int) -> None:
        s = self.sums
        for c, index in enumerate(pair.added(layer, self.token_set)):
            if not len(index):
                continue
            first = self._has_no_origin(i)
            for place, (of_layer, j) in enumerate(self._places(self.spec)):
                if of_layer != i:
                    continue
                for k, x in enumerate(pair.vectors_at(layer, self.views[j], index)):
                    self._choose_origin(x, (k, i, j), first)
                    moments = moments_of(x, s["origin"][k, i, j])
                    for name in MOMENTS:
                        s[f"excluded_{name}"][c, k, place].add_(getattr(moments, name))
            s["excluded_n"][c, i] += len(index)

    def _add(
        self,
        x: Float[Tensor, "n d_model"],
        at: tuple[int, int, int],
        first: bool,
        places: tuple[Tensor, Tensor, Tensor] | None,
        known: Moments | None,
    ) -> Moments:
        """Add vectors to the sums of a model, and return their moments, unless `known`."""
        s = self.sums
        self._choose_origin(x, at, first)
        origin = s["origin"][at]
        moments = moments_of(x, origin) if known is None else known
        for name in MOMENTS:
            s[name][at].add_(getattr(moments, name))
        if places is not None and len(x):
            slot, valid, row = places
            chosen = x.index_select(0, row.flatten()).view(*row.shape, -1)
            s["sample"][at].index_add_(0, slot, (chosen - origin.to(x.dtype)) * valid[..., None])
        return moments

    def _choose_origin(
        self, x: Float[Tensor, "n d_model"], at: tuple[int, int, int], first: bool
    ) -> None:
        if first and len(x):
            # Any point near the data will do; float32, so that subtracting it is exact.
            self.sums["origin"][at] = x.mean(0, dtype=torch.float64).to(torch.float32)

    def merge(self, other: Probe) -> None:
        """Add another shard's sums, first moved to this shard's origin (exact algebra).

        Raises:
            ProbeError: if the other shard is none of the same texts.
        """
        self._check_mergeable(other)
        filled = [probe.sums["sample_valid"] > 0 for probe in (self, other)]
        if bool((filled[0] & filled[1]).any()):
            raise ProbeError(
                "both shards sampled tokens for the same places: they are not two parts of one "
                "corpus; compare each corpus by itself"
            )
        if not self._has_seen_tokens():
            self.sums["origin"].copy_(other.sums["origin"])
        moved = cast(ParticipationRatio, other)._about(self.sums["origin"])
        for name, value in moved.items():
            if name != "origin":
                self.sums[name] += value

    def open(self, spec: StreamSpec) -> None:
        """Start from zero for models of these sizes."""
        super().open(spec)
        self._given = ()

    def share_origin(self) -> None:
        """Take the origins of the first rank, so that no rank's sums have to be moved to them.

        Moving rounds: the sampled tokens are float32.
        """
        group = torch.distributed
        chosen = torch.tensor(
            [not self._has_no_origin(i) for i in range(len(self.sums["n"]))],
            device=self.spec.device,
        )
        group.broadcast(chosen, src=0)
        group.broadcast(self.sums["origin"], src=0)
        self._given = tuple(chosen.nonzero()[:, 0].tolist())

    def all_reduce(self) -> None:
        """Agree on the first rank's origin that has seen tokens, then add the sums up."""
        group = torch.distributed
        rank = group.get_rank() if self._has_seen_tokens() else group.get_world_size() - 1
        seen = torch.tensor([rank], device=self.spec.device)
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
            **self._excluded_about(step),
            "sample": s["sample"] + sample_step.to(torch.float32),
            "origin": origin,
        }

    def _excluded_about(self, step: Float[Tensor, "models layers views d"]) -> dict[str, Tensor]:
        """The sums of what is left out, every token moved by `step`."""
        places = self._places(self.spec) if self.with_excluded else []
        if not places:
            return {}
        s = self.sums
        layers, views = (list(numbers) for numbers in zip(*places, strict=True))
        n = s["excluded_n"][:, None, layers].expand_as(s["excluded_square"])
        sums = {name: s[f"excluded_{name}"].to(torch.float64) for name in MOMENTS}
        moved = Moments(n=n, **sums).shifted(step[:, layers, views].expand_as(sums["total"]))
        return {
            f"excluded_{name}": getattr(moved, name).to(s[f"excluded_{name}"].dtype)
            for name in MOMENTS
        }

    def _has_seen_tokens(self) -> bool:
        return not all(self._has_no_origin(i) for i in range(len(self.sums["n"])))

    def _moments(self) -> Moments:
        s = self.sums
        return Moments(
            n=s["n"][None, :, None].expand_as(s["square"]), **{name: s[name] for name in MOMENTS}
        )

    def _moments_at(self, model: int, i: int, j: int) -> Moments:
        s = self.sums
        return Moments(n=s["n"][i], **{name: s[name][model, i, j] for name in MOMENTS})

    def _excluded_at(self, c: int, model: int, place: int) -> Moments:
        s = self.sums
        i, _ = self._places(self.spec)[place]
        sums = {name: s[f"excluded_{name}"][c, model, place] for name in MOMENTS}
        return Moments(n=s["excluded_n"][c, i], **sums)

    def compute(self) -> ProbeResult:
        """Nine rows per layer and view, and six where what is left out is counted in.

        Their intervals take time: where a comparison is shared among processes, so are they.
        """
        layers = self.spec.resolve_layers(self.layers)
        return joined(processes.divided(self.compute_layer, layers))

    def compute_layer(self, layer: int) -> ProbeResult:
        """What `compute` returns of one layer."""
        return ProbeResult(tuple(self._rows(layer)))

    def _rows(self, layer: int) -> Iterator[Row]:
        none = (math.nan, math.nan)
        i = self.spec.resolve_layers(self.layers).index(layer)
        n = int(self.sums["n"][i])
        for j, view in enumerate(self.views):
            # One set at a time: the squares of all moments would double the memory.
            moments = [self._moments_at(k, i, j) for k in range(2)]
            plain = {
                "_row": [float(corrected_traces(m).ratio) for m in moments],
                "_naive": [float(naive_traces(m).ratio) for m in moments],
            }
            measured = self.measured(layer, view)
            if measured is None:
                pairs = {"": plain["_row"]}
            else:
                pairs = {"": [self._possible(one) for one in measured]}
            for suffix, (base, tuned) in (pairs | plain).items():
                numbers = {"base": base, "tuned": tuned, "delta": tuned - base}
                for metric, value in numbers.items():
                    ends = none
                    if measured is not None and not suffix:
                        ends = self._ends(measured, metric, value)
                    yield Row(self.name, metric + suffix, layer, view, value, *ends, n)
            if self.with_excluded and (i, j) in self._places(self.spec):
                yield from self._rows_with_excluded(i, j)

    def _rows_with_excluded(self, i: int, j: int) -> Iterator[Row]:
        none = (math.nan, math.nan)
        place = self._places(self.spec).index((i, j))
        layer = self.spec.resolve_layers(self.layers)[i]
        moments = [self._moments_at(k, i, j) for k in range(2)]
        for c, words in enumerate(WITH_EXCLUDED):
            moments = [m + self._excluded_at(c, k, place) for k, m in enumerate(moments)]
            base, tuned = (float(naive_traces(m).ratio) for m in moments)
            for metric, value in {"base": base, "tuned": tuned, "delta": tuned - base}.items():
                name, n = f"{metric}_naive_{words}", int(moments[0].n)
                yield Row(self.name, name, layer, self.views[j], value, *none, n)

    def _possible(self, measured: Ratio) -> float:
        """A ratio within 1 and d_model, which the quotient of two noisy sums may leave.

        NaN where it does and there are too few texts to say how noisy it is.
        """
        value = min(max(measured.value, 1.0), float(self.spec.d_model))
        beyond = abs(measured.value - value) > ROUNDING * value
        has_interval = measured.draws is None or len(measured.draws.left_out) >= FEWEST_TEXTS
        return value if has_interval or not beyond else math.nan

    def _ends(
        self, measured: tuple[Ratio, Ratio], metric: str, value: float
    ) -> tuple[float, float]:
        """An interval that holds its own value, also where that was brought back into the range."""
        base, tuned = measured
        if metric == "delta":
            low, high = sum_ends(weighted_ratio([(1.0, tuned), (-1.0, base)]))
        else:
            low, high = ratio_ends(base if metric == "base" else tuned, self.spec.d_model)
        return min(low, value), max(high, value)

    def measured(self, layer: int, view: View) -> tuple[Ratio, Ratio] | None:
        """The base's and the tuned model's ratio at one layer, with what intervals need.

        For intervals of any sum of ratios over the same tokens. None if there are too few.
        """
        i = self.spec.resolve_layers(self.layers).index(layer)
        j = self.views.index(view)
        s = self.sums
        valid = s["sample_valid"][i] > 0
        n_sampled = int(valid.any(-1).sum())
        if float(s["n"][i]) < 4 or n_sampled < 2:
            return None
        length, sum_nn = s["sample_length"][i], float(s["nn"][i])
        if self.spec.grouped:
            all_sampled, sum_nn = n_sampled <= MAX_SAMPLED_SEQUENCES, float(length.square().sum())
        else:
            all_sampled = n_sampled == int(s["sequences"][i])
        # What both models share was summed once and added to both.
        kept = (*MOMENTS, "origin", "sample")
        is_shared = all(torch.equal(s[name][0, i, j], s[name][1, i, j]) for name in kept)
        ratios = []
        for k in range(1 if is_shared else 2):
            sample = SampledTokens(
                vectors=s["sample"][k, i, j].to(torch.float64),
                valid=valid,
                length=length,
                sum_nn=sum_nn,
            )
            ratios.append(measured_ratio(self._moments_at(k, i, j), sample, all_sampled))
        return ratios[0], ratios[-1]


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
