r"""A grid of conditional Laplace approximations along one coordinate: its marginal, and a flow.

With coordinate k fixed at c, the density of all others is approximately normal at its mode. Draws of this normal
distribution estimate its mass without bias,

.. math:: f(c) = \int p(z)\,dz_{-k} = E_g\Big[\frac{p(z)}{g(z)}\Big], \qquad g = N(m(c), H_{-k}(c)^{-1}),

and the masses at a few values of c give the marginal of coordinate k, up to a constant, far beyond all draws. Grids are
made along coordinates that predict the spread of others. A value of c counts only if its mass is known. One mode is
used at each c. If further modes have the same share of the mass at each c, the marginal is right without them.

The grid is a flow too, whose tail reaches as far: see ``tops.py``.

Reference: Rue, Martino and Chopin 2009, "Approximate Bayesian inference for latent Gaussian models by using integrated
nested Laplace approximations" (JRSS B 71, doi:10.1111/j.1467-9868.2008.00700.x).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.inference.modes.propriety import COORDINATES_LOOKED_AT, finer
from pyro_flows.inference.modes.tops import MODE_REACHES, NEGLIGIBLE_GAIN, OUTSIDE, Table, Tails, Tops, roots_across
from pyro_flows.inference.modes.under_covered import is_usable
from pyro_flows.inference.starts.climb import NEWTON
from pyro_flows.inference.starts.curvature import SMALL_UP_TO, second_derivatives
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.starts.prior import spread_of
from pyro_flows.inference.verdict.deciding import COMPARED_DRAWS, ESTIMATED_DRAWS, SEARCHED_DRAWS
from pyro_flows.inference.verdict.weighing import resample
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Structure
from pyro_flows.model.stack import Stack
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import DENSITY_GAP_OF_NOTHING

STEPS = (0.3, 0.6, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.5, 8.0, 11.0, 15.0, 20.0)  # spreads from the middle
CLOSE = (*(0.3 * number for number in range(1, 28)), 9.0, 10.0, 11.5, 13.0, 15.0, 17.5, 20.0)  # for a flow
MOST_COORDINATES = 4  # that get a grid; half as many before there is a flow
PREDICTS_SPREAD = 0.02  # sum of squared correlations with the distances of other coordinates from their medians
CURVATURE_CHANGE = 0.05  # of log curvatures over two spreads: less is none
ERROR_MOST = 0.15  # relative standard error of the mass of a grid point that is known; with more, it gets 2000 draws
STRETCH = 5.0  # by which steps are stretched, up to four times, where the marginal has not fallen off at the last
FEWEST_POINTS = 8  # of a grid


@dataclass(frozen=True)
class Marginal(Table):
    """A table of grid points along a coordinate, and what they were made of.

    Steps ``stretch`` times as long as usual were added, and ``reached`` says at which ends the last one is known.
    """

    tails: Tails = field(repr=False)
    stretch: float = 1.0
    reached: tuple[bool, bool] = (False, False)

    def goes_on(self) -> bool:
        """Whether there is mass beyond an end up to which all is known, so that longer steps may tell more."""
        pairs = zip(self.beyond_each(), self.reached, strict=True)
        return any(part >= OUTSIDE and reached for part, reached in pairs)


def can_have_grid(density: LogDensity) -> bool:
    """Whether hundreds of paths, and Hessians at their ends, can be had."""
    return density.batched and 1 < density.dim <= SMALL_UP_TO


@torch.no_grad()
def all_grids(density: LogDensity, z: Tensor, log_weights: Tensor, *, seed: int) -> list[Marginal]:
    """Return grids along the coordinates of weighted draws z (S, D) that predict the spread of others.

    Cost: for each of up to four coordinates, 58 paths of up to 60 gradients, 29 Hessians or a few more, 4000 densities;
    up to ten times that where a marginal has not fallen off, and 2000 densities for a noisy grid point.
    """
    log_mass = torch.log_softmax(log_weights.double(), 0)
    if not can_have_grid(density) or len(z) < SEARCHED_DRAWS // 2 or not is_usable(log_mass):
        return []
    sample = finer(density, z[resample(log_mass, ESTIMATED_DRAWS, seed=derive(seed, "looked at"))])
    return _grids(density, sample, predictors_of_spread(sample), seed=seed)


@torch.no_grad()
def grids_about(density: LogDensity, loc: Tensor, z: Tensor, *, seed: int) -> list[Marginal]:
    """Return grids along the scalar sites along which curvatures change most, about a point loc (D,).

    Draws z (S, D) of a normal distribution at loc give the units.

    Cost: that of :func:`all_grids` for two coordinates, and 64 Hessians at most.
    """
    alone = sites_of_one(density.structure)
    if not alone:
        return []
    away = spread_of(z).diag()[alone]
    curvatures = second_derivatives(density, torch.cat([loc + away, loc - away]))
    strength, order = bending(curvatures.unflatten(0, (2, -1)), alone).topk(min(MOST_COORDINATES // 2, len(alone)))
    coordinates = [alone[number] for number in order[strength > CURVATURE_CHANGE].tolist()]
    return _grids(density, finer(density, z[:ESTIMATED_DRAWS]), coordinates, seed=seed)


def sites_of_one(structure: Structure) -> list[int]:
    """Return the coordinates of the first sites that have one each."""
    return [latent.offset for latent in structure.latents if latent.size == 1][:COORDINATES_LOOKED_AT]


def bending(hessians: Tensor, alone: list[int]) -> Tensor:
    """Return the change of log curvatures along each of A coordinates: of its own one, and of the others in the mean.

    Hessians (..., 2, A, D, D) are those at two spreads from each other along each coordinate.
    """
    above, below = (-hessians.diagonal(dim1=-2, dim2=-1)).double().unbind(-3)
    change = (above / below).log().abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    own = change[..., torch.arange(len(alone)), alone]
    return own + (change.sum(-1) - own) / (change.shape[-1] - 1)


@torch.no_grad()
def closer(density: LogDensity, marginal: Marginal, *, seed: int) -> Marginal | None:
    """Return a finer grid, as a flow needs it."""
    with seeded(derive(seed, "close slices"), density.device):
        return _marginals(marginal.tails, [marginal.coordinate], CLOSE, marginal.stretch)[0]


def predictors_of_spread(z: Tensor) -> list[int]:
    """Return the coordinates of draws (S, D) that best predict how far the others are from their medians."""
    away = z.double() - z.double().median(0).values
    away = (away / away.abs().median(0).values.clamp_min(1e-300)).clamp(-1.5 * MODE_REACHES, 1.5 * MODE_REACHES)
    signed, size = ((part - part.mean(0)) / part.std(0).clamp_min(1e-300) for part in (away, away.abs()))
    correlation = (signed.mT @ size / len(z)).fill_diagonal_(0.0)
    correlation = torch.where(correlation.abs() > 5.0 / math.sqrt(len(z)), correlation, 0.0)  # standard errors
    strength, order = correlation.square().sum(1).topk(min(MOST_COORDINATES, z.shape[1]))
    return order[strength > PREDICTS_SPREAD].tolist()


def _grids(density: LogDensity, z: Tensor, coordinates: list[int], *, seed: int) -> list[Marginal]:
    """Return grids along some coordinates, in units of draws z (S, D), where enough neighbors have a known mass.

    Where a marginal has not fallen off at the last step, spreads may be those of draws that do not show its width:
    longer steps are added. Where these do not come to its end either, it has a heavy tail, and they are left out.
    """
    if not coordinates:
        return []
    with seeded(derive(seed, "slices"), density.device):
        tails = Tails(density, z)
        found = _marginals(tails, coordinates, STEPS)
        for number, coordinate in enumerate(coordinates):
            one = found[number]
            for _ in range(4):
                if one is None or not one.goes_on():
                    break
                one = _marginals(tails, [coordinate], STEPS, STRETCH * one.stretch)[0]
            found[number] = found[number] if one is None or one.goes_on() else one
    return [one for one in found if one is not None]


def _marginals(
    tails: Tails, coordinates: list[int], steps: Sequence[float], stretch: float = 1.0
) -> list[Marginal | None]:  # fmt: skip
    longer = [stretch * step for step in steps if stretch * step > steps[-1]]
    tops = tails.tops(coordinates, [*steps, *longer])
    log_masses, errors = _weighed(tails, tops)
    masses = log_masses.view(len(coordinates), -1)
    near = masses > masses.nan_to_num(nan=-torch.inf).amax(1, keepdim=True) - DENSITY_GAP_OF_NOTHING
    known = torch.isfinite(masses) & (errors.view_as(masses) < ERROR_MOST)
    last = len(steps) + len(longer)
    found = list[Marginal | None]()
    for number, coordinate in enumerate(coordinates):
        rows = torch.arange(known.shape[1], device=known.device) + number * known.shape[1]
        places = tops.points[rows, coordinate].double()
        order = around(0, places, known[number], near[number], gap=2)
        rows = rows[order]
        reached = 2 * last in order.tolist(), last in order.tolist()
        at = places[order], log_masses[rows], tops.points[rows, :-1], tops.roots[rows]
        found.append(Marginal(coordinate, *at, tails, stretch, reached) if len(order) >= FEWEST_POINTS else None)
    return found


def around(middle: int, places: Tensor, known: Tensor, near: Tensor, *, gap: int) -> Tensor:
    """Return the numbers of the places (N,) that are known, in order, from the middle one to the first wide gap.

    A gap is wide if more than ``gap`` places in a row are not known. A place that is known to have next to no mass is
    the end too: it is not ``near`` the highest one.
    """
    if not bool(known[middle] & near[middle]):
        return torch.zeros(0, dtype=torch.long, device=places.device)
    order = places.argsort()
    first = int((order == middle).nonzero()[0, 0])
    sides = order[: first + 1].flip(0).tolist(), order[first:].tolist()
    below, above = (_up_to_a_gap(side, known.tolist(), near.tolist(), gap) for side in sides)
    return torch.tensor([*reversed(below[1:]), *above], dtype=torch.long, device=places.device)


def _up_to_a_gap(side: list[int], known: list[bool], near: list[bool], gap: int) -> list[int]:
    """Return those of some places that are known, up to where more than a few are not, or where nothing is left."""
    found, missing = list[int](), 0
    for place in side:
        if known[place] and not near[place]:
            break
        missing = 0 if known[place] else missing + 1
        if missing > gap:
            break
        found += [place] if known[place] else []
    return found


def _weighed(tails: Tails, tops: Tops) -> tuple[Tensor, Tensor]:
    """Return log masses (K,) of grid points by draws of the normal distributions at their tops, and relative errors."""
    count = len(tops.roots)
    log_masses = torch.full((count,), torch.nan, dtype=torch.float64, device=tops.roots.device)
    errors = torch.full_like(log_masses, math.inf)
    known = (~tops.roots.isnan().any(2).any(1)).nonzero()[:, 0]
    if not len(known):
        return log_masses, errors
    points, roots, held = tops.points[known, :-1].double(), tops.roots[known], tops.points[known, -1].long()
    masses, relative = _drawn(tails, points, roots, held, COMPARED_DRAWS // 2)
    unsure = (
        (relative > ERROR_MOST) & (masses > masses.nan_to_num(nan=-math.inf).max() - DENSITY_GAP_OF_NOTHING)
    ).nonzero()[:, 0]
    for number in unsure.tolist():
        one = slice(number, number + 1)
        masses[one], relative[one] = _drawn(tails, points[one], roots[one], held[one], ESTIMATED_DRAWS)
    log_masses[known], errors[known] = masses, relative
    return log_masses, errors


def _drawn(tails: Tails, points: Tensor, roots: Tensor, held: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return log masses (K,) of grid points by draws at each mode (K, D), and relative errors, infinite if unknown."""
    dim = points.shape[1]
    noise = torch.randn(len(points), count // 2, dim, dtype=torch.float64, device=roots.device)
    noise = torch.cat([noise, -noise], 1)
    noise[torch.arange(len(points)), :, held] = 0.0
    away = torch.linalg.solve_triangular(roots.mT, noise.mT, upper=True).mT
    z = (points[:, None] + away).to(tails.middle).flatten(0, 1)
    values = torch.cat([tails.density(part) for part in z.split(ESTIMATED_DRAWS)]).double()
    ratios = values.view(len(points), -1).nan_to_num(nan=-math.inf) + 0.5 * noise.square().sum(2)
    size = roots.diagonal(dim1=1, dim2=2).log().sum(1)
    mean = torch.logsumexp(ratios, 1) - math.log(count)
    pairs = (ratios - mean[:, None]).exp().view(len(points), 2, -1).mean(1)  # of opposite draws
    return mean - size, (pairs.std(1) / math.sqrt(count // 2)).nan_to_num(nan=math.inf)


# many posteriors at once ----------------------------------------------------------------------------------------------


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

    Cost: a Hessian at two points for each such site, up to 32.
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

    Each mode is next to a known start, and Newton's method finds it. Masses are those of normal distributions: what is
    not normal shows in the weights of the flow's draws. Paths begin where the others are on average, given the
    coordinate, under the start's normal distribution. Where the others are normal, one step comes to the top.

    Cost: up to five Hessians and gradients at 29 places for each data set.
    """
    loc, covariance, spread = _moments(starts)
    rows, held = torch.arange(len(stack), device=loc.device), bent.coordinates
    steps = loc.new_tensor([*(-step for step in reversed(STEPS)), 0.0, *STEPS])
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
    near = masses > masses[known].max() - DENSITY_GAP_OF_NOTHING if bool(known.any()) else known
    chosen = around(len(STEPS), places, known, near, gap=0)
    if len(chosen) < FEWEST_POINTS:
        return None
    return Table(coordinate, places[chosen], masses[chosen], tops[chosen], roots[chosen])
