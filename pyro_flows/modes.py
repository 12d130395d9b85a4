"""Modes that a guide lacks: what no draw of it can show."""

from __future__ import annotations

import itertools
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
LINES = 400  # coordinates that are followed,
LINE_POINTS = 24  # by as many points a side,
NEAR, FAR = 2.0, 40.0  # standard deviations away
MOVES = 8
MOVED_DRAWS = 200


def missed_modes(
    density: LogDensity, modes: Sequence[Start], z: Tensor, log_q: Tensor, score: Callable[[Tensor], Tensor]
) -> list[str]:
    """Name the modes that hold a good part of the mass and that a guide lacks.

    At its own draws, log p - log q of a guide is about the log of the mass that it covers. A mode is missed if its
    mass, by Laplace's method, is a good part of that, and if the guide is much thinner there than it ought to be. Those
    looked at are the modes of the portfolio, and others found by climbing from the guide's draws moved outwards. Where
    the density has further maxima along a coordinate, all draws are moved there: see :func:`_across`.

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
    large = [mode.loc for mode in known if float(mode.evidence or 0.0) - covered > math.log(SHARE)]
    found: list[Tensor] = []
    if large:
        places = torch.stack(large)
        found = list(places[_is_thin(density, score, places, covered)])
    if not found and density.batched:
        found = _across(density, z[:MOVED_DRAWS], log_q[:MOVED_DRAWS], score, covered)
    if not found:
        return []
    names = sorted({_named(density, place, z[:MOVED_DRAWS]) for place in found})
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"the guide lacks a mode near {names[0]}{more}; try runs=4"]


@torch.no_grad()
def _named(density: LogDensity, place: Tensor, z: Tensor) -> str:
    """Describe a place by up to three of its values that are farthest from the draws ``z``, in standard deviations."""
    drawn, here = density.constrain(z), density.constrain(place[None])
    entries = []
    for name in density.names:
        values, value = drawn[name].flatten(1).double(), here[name].flatten().double()
        distance = (value - values.mean(0)).abs() / values.std(0).clamp_min(torch.finfo(torch.float64).tiny)
        for number, index in enumerate(itertools.product(*map(range, here[name].shape[1:]))):
            label = f"{name}[{','.join(map(str, index))}]" if index else name
            entries.append((float(distance[number]), label, float(value[number])))
    entries.sort(key=lambda entry: -entry[0])
    return ", ".join(f"{label} = {value:.3g}" for far, label, value in entries[:3] if far >= 0.5 * entries[0][0])


@torch.no_grad()
def _is_thin(density: LogDensity, score: Callable[[Tensor], Tensor], z: Tensor, covered: float) -> Tensor:
    """Whether the guide has far less than it ought to have at each row of ``z``."""
    return (density(z) - score(z)).double() - covered > THINNER


@torch.no_grad()
def _across(
    density: LogDensity, z: Tensor, log_q: Tensor, score: Callable[[Tensor], Tensor], covered: float
) -> list[Tensor]:
    r"""Return a place in each region that has much of the mass, but no draws until they are moved along a coordinate.

    Candidates for the move :math:`\delta` are further maxima of the density on the lines through the best draw. The
    mass of the region is :math:`E_q\, p(z + \delta) / q(z)`; here each draw counts as one at most. The number of modes
    does not matter: with two wells in each of many coordinates, one mode alone is next to nothing.
    """
    log_p = density(z)
    best = z[int(torch.nan_to_num(log_p, nan=-torch.inf).argmax())]
    found = []
    for move in _further_maxima(density, best, z.std(0)):
        moved = z + move
        shares = (density(moved) - log_q - covered).double().nan_to_num(nan=-torch.inf).exp().clamp(max=1.0)
        lacking = shares * _is_thin(density, score, moved, covered)
        if float(lacking.mean()) > SHARE:
            found.append(moved[int(lacking.argmax())])
    return found


def _further_maxima(density: LogDensity, centre: Tensor, sd: Tensor) -> list[Tensor]:
    """Return moves from ``centre`` along single coordinates to maxima two to forty ``sd`` away, the highest first."""
    far = torch.logspace(0.0, math.log10(FAR), LINE_POINTS, dtype=centre.dtype, device=centre.device)
    offsets = torch.cat([-far.flip(0), far])
    lines = [axis * size for axis, size in zip(torch.eye(len(centre)).to(centre)[:LINES], sd[:LINES], strict=False)]
    if not lines:
        return []
    points = centre + offsets[:, None] * torch.stack(lines)[:, None]
    heights = density(points.flatten(0, 1)).nan_to_num(nan=-torch.inf).reshape(len(lines), -1)
    peaks = (heights[:, 1:-1] > heights[:, :-2]) & (heights[:, 1:-1] > heights[:, 2:])
    peaks &= offsets[1:-1].abs() >= NEAR
    moves = []
    for line, place in peaks.nonzero().tolist():
        between = torch.linspace(0.0, 1.0, LINE_POINTS).to(centre)
        near = offsets[place] + (offsets[place + 2] - offsets[place]) * between
        fine = density(centre + near[:, None] * lines[line]).nan_to_num(nan=-torch.inf)
        moves.append((float(fine.max()), near[int(fine.argmax())] * lines[line]))
    return [move for _, move in sorted(moves, key=lambda pair: -pair[0])[:MOVES]]


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
