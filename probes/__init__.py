"""Probes: one statistic over pairs of residual streams per file."""

from __future__ import annotations

from .base import LogitProbe, MeanProbe, Probe
from .drift import ResidualDrift
from .linear_cka import LinearCKA
from .logit_lens import LogitLens
from .mean_shift import MeanShift
from .output_groups import GroupedOutput, OutputByPosition, OutputByRole
from .participation_ratio import ParticipationRatio
from .procrustes import Procrustes
from .rank_reordering import RankReordering

__all__ = [
    "GroupedOutput",
    "LinearCKA",
    "LogitLens",
    "LogitProbe",
    "MeanProbe",
    "MeanShift",
    "OutputByPosition",
    "OutputByRole",
    "ParticipationRatio",
    "Probe",
    "Procrustes",
    "RankReordering",
    "ResidualDrift",
    "default_probes",
]


def default_probes() -> list[Probe]:
    """The probes `compare_models` runs when none are named."""
    return [
        ResidualDrift(with_excluded=True),
        ParticipationRatio(with_excluded=True),
        LogitLens(),
        RankReordering(),
    ]
