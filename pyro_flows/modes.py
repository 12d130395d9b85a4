"""Modes that a guide lacks: what no draw of it can show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_flows.initial import SEARCHES_UNBATCHED, Start, laplace
from pyro_flows.log_density import LogDensity

SHARE = 0.02  # of the mass that the guide covers
THINNER = 7.0  # nats by which the guide falls short at a mode that it lacks
INFLATED = (3.0, 10.0, 30.0)
CLIMBERS = 6  # for each factor
AT_REST = 0.01  # nats that another Newton step promises


def missed_modes(
    density: LogDensity, modes: Sequence[Start], z: Tensor, log_q: Tensor, score: Callable[[Tensor], Tensor]
) -> list[str]:
    """Name the modes that hold a good part of the mass and that a guide lacks.

    At its own draws, log p - log q of a guide is about the log of the mass that it covers. A mode is missed if its
    mass, by Laplace's method, is a good part of that, and if the guide is much thinner there than it ought to be. Those
    looked at are the modes of the portfolio, and others found by climbing from the guide's draws moved outwards.

    Args:
        density: log p, unnormalised.
        modes: starts with an ``evidence``.
        z: draws (S, D) of the guide.
        log_q: their log densities (S,).
        score: the guide's log density.
    """
    with torch.no_grad():
        weights = density(z) - log_q
    covered = float(weights[torch.isfinite(weights)].median()) if bool(torch.isfinite(weights).any()) else -math.inf
    known = [mode for mode in (*modes, *_beyond(density, z)) if mode.evidence is not None]
    large = [mode for mode in known if float(mode.evidence or 0.0) - covered > math.log(SHARE)]
    if not large:
        return []
    points = torch.stack([mode.loc for mode in large])
    with torch.no_grad():
        short = (density(points) - score(points)).double().cpu() - covered
        values = density.constrain(points)
    found = set()
    for row in (short > THINNER).nonzero().flatten().tolist():
        place = ", ".join(f"{name} = {value[row].flatten()[0]:.3g}" for name, value in list(values.items())[:3])
        found.add(f"the guide lacks a mode near {place}; try runs=4")
    return sorted(found)


def _beyond(density: LogDensity, z: Tensor) -> list[Start]:
    """Climb from draws that are moved away from their centre; return the modes that are reached."""
    centre = z.median(0).values
    parts = zip(INFLATED, z.split(CLIMBERS), strict=False)
    points = torch.cat([centre + factor * (part - centre) for factor, part in parts])
    with torch.no_grad():
        points = points[torch.isfinite(density(points))]
    points = points if density.batched else points[:SEARCHES_UNBATCHED]
    if not len(points):
        return []
    return [mode for mode in laplace(density, points) if mode.evidence is not None and _rests(density, mode)]


def _rests(density: LogDensity, mode: Start) -> bool:
    """Whether climbing ended at a mode, and not on its way."""
    gradient = density.value_and_grad(mode.loc[None])[1][0]
    return float((mode.scale.mT @ gradient).square().sum()) < AT_REST
