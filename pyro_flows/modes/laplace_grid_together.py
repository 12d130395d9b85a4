"""Grids of conditional Laplace approximations for many posteriors at once.

``laplace_grid.py`` finds the conditional modes of one posterior from far away, and weighs draws there. Here each mode
is next to a known start, and Newton's method finds it. Masses are those of normal distributions. What is not normal
shows in the weights of the flow's draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.model.stack import Stack
from pyro_flows.modes.laplace_grid import CURVATURE_CHANGE, FEWEST_POINTS, around, bending, sites_of_one
from pyro_flows.modes.tables import EMPTY, Table
from pyro_flows.modes.tops import NEGLIGIBLE_GAIN, NEWTON, roots_across
from pyro_flows.starts.curvature import SMALL_UP_TO
from pyro_flows.starts.start import Start

# spreads from the middle
SIDE = (*(0.5 * number for number in range(1, 9)), 5.0, 6.5, 8.0, 11.0, 15.0, 20.0, 30.0, 45.0)


class Bent(NamedTuple):
    """A coordinate along which curvatures change most, for each of K data sets, and by how much (K,)."""

    coordinates: Tensor
    strengths: Tensor


def _moments(starts: Sequence[Start]) -> tuple[Tensor, Tensor, Tensor]:
    """Return means (K, D), covariances (K, D, D) and standard deviations (K, D)."""
    roots = torch.stack([start.root for start in starts])
    covariance = roots @ roots.mT
    return torch.stack([start.loc for start in starts]), covariance, covariance.diagonal(dim1=1, dim2=2).sqrt()


@torch.no_grad()
def bent(stack: Stack, starts: Sequence[Start]) -> Bent | None:
    """Return the site of one coordinate along which each posterior is bent most; None if no site is of one coordinate.

    Cost: a Hessian at two points for each such site, up to 16.
    """
    alone = sites_of_one(stack.structure)
    if not alone or not 1 < stack.dim <= SMALL_UP_TO:
        return None
    loc, _, spread = _moments(starts)
    away = spread[:, None] * torch.eye(stack.dim).to(loc)[alone]
    points = torch.stack([loc[:, None] + away, loc[:, None] - away], 1)
    curvatures = stack.hessians(points.flatten(0, 2)).unflatten(0, (len(stack), 2, len(alone)))
    strengths, chosen = bending(curvatures, alone).max(1)
    return Bent(torch.tensor(alone, device=chosen.device)[chosen], strengths)


@torch.no_grad()
def grids_together(stack: Stack, starts: Sequence[Start], bent: Bent) -> list[Table | None]:
    """Return the grid of each posterior about its start; None where it is not bent, or few are known.

    Paths begin where the others are on average, given the coordinate, under the start's normal distribution. Where the
    others are normal, one step comes to the top.

    Cost: up to five Hessians and gradients at 33 places for each data set.
    """
    loc, covariance, spread = _moments(starts)
    rows, held = torch.arange(len(stack), device=loc.device), bent.coordinates
    steps = loc.new_tensor([*(-step for step in reversed(SIDE)), 0.0, *SIDE])
    slopes = covariance[rows, held] / covariance[rows, held, held, None]
    points = loc[:, None] + (spread[rows, held, None] * steps)[..., None] * slopes[:, None]
    tops, masses, roots, known = _tops(stack, points.flatten(0, 1), held.repeat_interleave(len(steps)))
    shape = len(stack), len(steps)
    parts = tops.view(*shape, -1), masses.view(shape), roots.view(*shape, stack.dim, stack.dim), known.view(shape)
    tables = (_table(int(number), *own) for number, *own in zip(held, *parts, strict=True))
    enough = (bent.strengths > CURVATURE_CHANGE).tolist()
    return [table if curved else None for table, curved in zip(tables, enough, strict=True)]


def _tops(stack: Stack, points: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tops (S, D) over all coordinates but the one held (S,), log masses (S,), roots of Hessians, what is known.

    A top is known where the Hessian has a root, and one more step would gain next to nothing.
    """
    height, slope = _slopes(stack, points, held)
    for number in range(NEWTON + 1):
        roots = roots_across(-stack.hessians(points).double(), held)
        step = torch.cholesky_solve(slope[..., None], roots.nan_to_num(nan=1.0))[..., 0]
        gain = 0.5 * (slope * step).sum(1)
        known = ~roots.isnan().any(2).any(1) & height.isfinite()
        if number == NEWTON or not bool((known & (gain > 0.01 * NEGLIGIBLE_GAIN)).any()):
            break
        moved = points + step.to(points)
        above, slopes = _slopes(stack, moved, held)
        better = known & (above > height)
        points = torch.where(better[:, None], moved, points)
        slope = torch.where(better[:, None], slopes, slope)
        height = torch.where(better, above, height)
    return points, height - roots.diagonal(dim1=1, dim2=2).log().sum(1), roots, known & (gain < NEGLIGIBLE_GAIN)


def _slopes(stack: Stack, points: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Return log densities (S,) and gradients (S, D), zero along the coordinate that is held, in double precision."""
    value, grad = stack.value_and_grad(points)
    return value.double(), grad.double().scatter(1, held[:, None], 0.0)


def _table(coordinate: int, tops: Tensor, masses: Tensor, roots: Tensor, known: Tensor) -> Table | None:
    """Return the table of the grid about the middle one, up to the first that are not known or have no mass."""
    places = tops[:, coordinate].double()
    near = masses > masses[known].max() - EMPTY if bool(known.any()) else known
    chosen = around(len(SIDE), places, known, near, gap=0)
    if len(chosen) < FEWEST_POINTS:
        return None
    return Table(coordinate, places[chosen], masses[chosen], tops[chosen], roots[chosen])
