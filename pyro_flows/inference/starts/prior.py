"""Draws of the prior, points at which the density is finite, and the scales of draws."""

from __future__ import annotations

import math

import torch
from pyro import poutine
from torch import Tensor

from pyro_flows.model.batching import apart, where_possible
from pyro_flows.model.faults import defined, place_of
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import messages
from pyro_flows.model.start import FromPrior
from pyro_flows.support.process.seeding import seeded

PRIOR_DRAWS = 200  # that starts begin with; charts, and each round of a survey, with half of them
# draws of the prior from which modes are looked for, or places that walkers come to and that chains begin at; points
# from which normals are looked for, and modes that are kept
SEARCHES, PATHS = 8, 4
TRIES = 16  # moves by last digits
NOISE = 0.5  # nats that they may change


def path_starts(draws: Tensor) -> Tensor:
    """Return the points (4, D) at which paths begin: the median of draws of the prior (S, D), and the first of them."""
    return torch.cat([draws.median(0).values[None], draws[: PATHS - 1]])


@torch.no_grad()
def possible_points(density: LogDensity, draws: Tensor) -> Tensor:
    """Return points (N, D) where the density is finite: draws of the prior, or one put together from their coordinates.

    Supports that depend on latents may rule out nearly all draws: eight unknown bounds of uniform data have to hold at
    once. So from the draw at which the fewest terms are impossible, a coordinate at a time takes the value of
    another draw, or one from farther out, that leaves fewer of them. Empty if none is found.
    """
    finite = torch.isfinite(density(draws))
    if bool(finite.any()):
        return draws[finite][:SEARCHES]
    middle, few = draws.median(0).values, draws[: PRIOR_DRAWS // 5]
    values = torch.cat([few, middle + 4.0 * (few - middle)])
    faults = _impossible_terms(density, draws)
    best, fewest = draws[int(faults.argmin())].clone(), int(faults.min())
    for _ in range(3 if density.batched else 1):
        before = fewest
        for coordinate in range(density.dim):
            tried = best.repeat(len(values), 1)
            tried[:, coordinate] = values[:, coordinate]
            faults = _impossible_terms(density, tried)
            if int(faults.min()) < fewest:
                # of the values that are possible, one that is far from the edge: the median of them
                as_good = tried[faults == faults.min()]
                chosen = as_good[:, coordinate].argsort()[len(as_good) // 2]
                best, fewest = as_good[chosen], int(faults.min())
        if fewest == 0 or fewest == before:
            break
    return best[None] if bool(torch.isfinite(density(best[None])).all()) else draws[:0]


def _impossible_terms(density: LogDensity, z: Tensor) -> Tensor:
    """Count the terms (S,) of the density that are not finite, the density itself among them."""
    terms = [density(z)[:, None], *density.log_likelihood(z).values(), *density.log_prior(z).values()]
    return torch.stack([(~torch.isfinite(term)).reshape(len(z), -1).sum(1) for term in terms]).sum(0)


def spread_of(draws: Tensor) -> Tensor:
    """Return the scaled median absolute deviations (D,) of draws (S, D): sds, if normal; 1 where there is no spread."""
    spread = 1.4826 * (draws - draws.median(0).values).abs().median(0).values
    return torch.where((spread > 0) & torch.isfinite(spread), spread, 1.0)


def prior_draws(density: LogDensity, draws: int, *, seed: int) -> Tensor:
    """Draw (draws, D) unconstrained coordinates from the prior; others stand where they are not finite."""
    like = torch.zeros(1, dtype=density.dtype, device=density.device)

    def draw(row: Tensor) -> dict[str, Tensor]:
        handler = FromPrior(like)
        with apart(), density.writing(row), handler, defined(lambda: place_of(handler.last, density.order)):
            trace = poutine.trace(density.model).get_trace(*density.args, **density.kwargs)
        sites = messages(trace)
        return {name: sites[name]["value"] for name in density.names}

    def unconstrained(rows: Tensor) -> tuple[Tensor]:
        return (density.unconstrain(density.map(draw, rows, randomness="different")),)

    with torch.no_grad(), seeded(seed, density.device):
        (z,) = where_possible(unconstrained, like.expand(draws, 1), (density.dim,))
    finite = torch.isfinite(z).all(-1)
    good = z[finite] if bool(finite.any()) else density.structure.points(0.0)[:1]
    return z.index_copy(0, (~finite).nonzero()[:, 0], good[torch.arange(int((~finite).sum())) % len(good)])


@torch.no_grad()
def without_noise(density: LogDensity, points: Tensor) -> Tensor:
    """Say at which points (K, D) moves by up to eight units in the last place leave the log density as it is (K,).

    At large concentrations, a Beta density is a difference of numbers of which no digit is left: a climb ends at a peak
    of thousands of nats that is none. Next to a scale below the rounding of what it scales, density and digits are lost
    alike. At places of the posterior that matter, such moves change next to nothing.

    Cost: 17 densities for each point. Models that run draw by draw are too slow for that: all of their points count.
    """
    if not len(points) or not density.batched:
        return torch.ones(len(points), dtype=torch.bool, device=points.device)
    with seeded(0, points.device):
        moves = 2.0 * torch.rand(TRIES, *points.shape, dtype=points.dtype, device=points.device) - 1.0
    moved = points * (1.0 + 8.0 * torch.finfo(points.dtype).eps * moves)
    values = density(torch.cat([points[None], moved]).flatten(0, 1)).view(1 + TRIES, -1).double()
    return (values - values[0]).abs().amax(0) <= NOISE  # no number is, where there is none


# the scales of draws: units in which paths are measured ---------------------------------------------------------------

MATRICES_UP_TO = 100  # dimensions, for full units and for Hessians at hundreds of places
LEVEL = 2.0  # nats: heights that differ by less are one level, and a valley that is deeper is a barrier
SAME = 0.5  # of :func:`unit_of_modes`: places nearer than that are one mode


def units_of(z: Tensor, *, full: bool = True) -> Tensor:
    """Return the scale of draws (S, D): the Cholesky factor of their covariance where there are enough, or their sds.

    Sds (D,) only, unless ``full``.
    """
    if full and z.shape[1] <= MATRICES_UP_TO and len(z) > 4 * z.shape[1]:
        root, fault = torch.linalg.cholesky_ex(torch.cov(z.mT.double()).reshape(z.shape[1], z.shape[1]))
        if int(fault) == 0 and bool(torch.isfinite(root).all()):
            return root.to(z.dtype)
    spread = z.std(0) if len(z) > 1 else torch.ones_like(z[0])
    return torch.where((spread > 0.0) & torch.isfinite(spread), spread, 1.0)


def in_units(points: Tensor, units: Tensor) -> Tensor:
    """Return points (..., S, D) in units that are sds (..., D) or lower triangular matrices (..., D, D)."""
    if units.dim() < points.dim():
        return points / units.unsqueeze(-2)
    return torch.linalg.solve_triangular(units, points.mT, upper=False).mT


def unit_of_modes(dim: int, *, ridges: bool = False) -> float:
    """Return the standard deviations that distances of modes are counted in: the root of the dimension, and at most 2.

    Two modes of a hundred dimensions may differ in one of them. Points of a ridge do so in all.
    """
    return math.sqrt(dim if ridges else min(dim, 4))


def factors(ends: tuple[float, float], noise: Tensor) -> Tensor:
    """Factors (N, 1) whose logarithms are uniform between two ends."""
    low, high = (math.log(end) for end in ends)
    return (low + (high - low) * torch.rand_like(noise[:, :1])).exp()
