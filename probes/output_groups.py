"""What the output statistics are for each role of a conversation, and along an answer."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from ..checks import check_counts
from ..data.reading import ASSISTANT, ROLES
from ..errors import ProbeError
from ..passes.logits_reader import LogitChunk
from ..passes.streams import StreamPair, StreamSpec
from ..results.rows import ProbeResult, Row
from .base import LogitProbe
from .logit_lens import LENS_BOUNDS, LENS_METRICS, read_lenses

# A group's own sums, among those of all groups.
SUM = "{}/{}"


class GroupedOutput(LogitProbe):
    """Agreement, divergence and entropies at the output, apart for groups of decisions.

    Metrics: those of the logit lens at layer L, the group's name after each, as in `kl_user`.
    Groups without decisions have none.

    Attributes:
        groups: names of the groups.
    """

    metrics = LENS_METRICS
    bounds = LENS_BOUNDS
    overwrites = True
    groups: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__(layers=(-1,))

    @abstractmethod
    def group_of(self, pair: StreamPair) -> Int[Tensor, "batch pos"]:
        """The number of the group of every token; others are in none."""

    def sum_shapes(self, spec: StreamSpec) -> dict[str, tuple[int, ...]]:
        """The means' sums, of every group."""
        of_one = super().sum_shapes(spec)
        return {SUM.format(g, name): shape for g in self.groups for name, shape in of_one.items()}

    def read(self, chunk: LogitChunk) -> dict[str, Shaped[Tensor, " chunk"]]:
        """Agreement, divergence and entropies of every next-token decision."""
        return read_lenses(chunk)

    def finish(self, pair: StreamPair, layer: int, numbers: Mapping[str, Tensor]) -> None:
        """Add the means to those of each decision's group."""
        counted = pair.mask(layer, self.token_set)
        group = self.group_of(pair)
        for number, name in enumerate(self.groups):
            inside = counted & (group == number)
            rows = (group[counted] == number).to(numbers[self.metrics[0]].device)
            of_group = {metric: numbers[metric][rows] for metric in self.metrics}
            measured = dict.fromkeys(self.views, of_group)
            self._of(name).add(replace(pair, chosen=inside), layer, measured)

    def compute(self) -> ProbeResult:
        """The means' rows of every group that has decisions."""
        return ProbeResult(tuple(self._rows_of_groups()))

    def _rows_of_groups(self) -> Iterator[Row]:
        counted = [name for name in self.groups if bool(self._of(name).sums["n"].any())]
        for name in counted or self.groups:  # without any decision, all are absent numbers
            rows = self._of(name)._rows()
            yield from (row._replace(metric=f"{row.metric}_{name}") for row in rows)

    def _of(self, name: str) -> GroupedOutput:
        """A probe of one group, with the same sums."""
        part = copy.copy(self)
        part.sums = {one: self.sums[SUM.format(name, one)] for one in super().sum_shapes(self.spec)}
        return part


class OutputByRole(GroupedOutput):
    """The output statistics by who speaks the token that a decision follows.

    The groups are the roles of a conversation: template, system, user and assistant.
    """

    name = "output_by_role"
    groups = ROLES

    def group_of(self, pair: StreamPair) -> Int[Tensor, "batch pos"]:
        """The role of every token."""
        if pair.roles is None:
            raise ProbeError("output_by_role needs conversations: the texts have no roles")
        return pair.roles


class OutputByPosition(GroupedOutput):
    """The output statistics along an answer, by how many of its tokens stand before a decision.

    The decision that begins an answer is made at the last token before it, and so is in group 0; it
    is counted where tokens of all roles are. Of texts that are no conversations the whole is the
    answer, BOS apart.

    Args:
        k: the groups are 0 to k.
    """

    name = "output_by_position"

    def __init__(self, k: int = 20) -> None:
        super().__init__()
        check_counts(k=k)
        self.k = k

    @property
    def groups(self) -> tuple[str, ...]:  # type: ignore[override]
        """0 to k."""
        return tuple(map(str, range(self.k + 1)))

    def group_of(self, pair: StreamPair) -> Int[Tensor, "batch pos"]:
        """Tokens of the answer up to and including this one; -1 outside answers."""
        if pair.roles is None:
            return (pair.real & ~pair.bos).cumsum(-1)
        spoken = (pair.roles == ASSISTANT) & pair.real
        place = torch.arange(spoken.shape[1], device=spoken.device).expand(spoken.shape)
        before = torch.where(spoken, -1, place).cummax(-1).values
        begins = torch.zeros_like(spoken)
        begins[:, :-1] = pair.real[:, :-1] & ~spoken[:, :-1] & spoken[:, 1:]
        outside = torch.where(begins, 0, -1)
        return torch.where(spoken, place - before, outside)
