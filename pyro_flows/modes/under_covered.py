"""Posterior mass next to the draws of q that q under-represents: a tail, or the neck of a funnel."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows._seeding import derive, seeded
from pyro_flows.modes.missed_regions import Guide, MissedRegion, regions_of_walkers
from pyro_flows.modes.tempering import move_walkers
from pyro_flows.modes.umbrella import HIGH, Point, Space, excess, walked
from pyro_flows.modes.units import units_of
from pyro_flows.verdict.deciding import resample
from pyro_flows.verdict.thresholds import (
    DENSITY_GAP_OF_WALKERS,
    ESS_SHARE_LEAST,
    MASS_HARDLY_REACHED,
    MISSED_MASS_SHARE,
    WALKERS_OUT_SHARE,
)

MANY_WALKERS, FEWER = 256, 64  # the less where a look at one is dear
BY_WALKERS = "wandered"
FIRST, OUT, BACK = 16, 48, 64  # moves: to see whether there is any way out, farther out, and under the density itself
LOOKS = 8  # at the way back


@torch.no_grad()
def under_covered_region(
    guide: Guide, space: Space | None, z: Tensor, weights: Tensor, log_q: Tensor, *, seed: int
) -> list[MissedRegion]:
    """Let weighted draws wander; return a place where the guide is too thin, if more of them come there than before.

    Weights know of places where the guide is thin as long as it has a draw there; only what exceeds that counts. Where
    the latent space of the guide is known, and the weights are good enough for a verdict, wanderers are first drawn out
    to where it is thin; see ``umbrella.py``. Elsewhere they move under the density itself; see :func:`move_walkers`.

    Args:
        guide: its density, and what it covers.
        space: its latent space, if it has one.
        z: draws (S, D) of the guide, or of another distribution.
        weights: their log weights (S,).
        log_q: their log densities (S,).
        seed: of the walk.
    """
    log_mass = torch.log_softmax((weights - guide.covered).double(), 0)
    count = FEWER if space is not None and space.dear else MANY_WALKERS
    chosen = z[resample(log_mass, count, seed=derive(seed, "wanderers"))]
    if space is None or not is_usable(log_mass):
        ends, log_p = move_walkers(guide.density, chosen, units_of(z), seed=derive(seed, "wandering"))
        thin, there = (
            guide.is_under_covered(ends, log_p, by=DENSITY_GAP_OF_WALKERS),
            guide.is_under_covered(z, weights + log_q, by=DENSITY_GAP_OF_WALKERS),
        )
    else:
        over = (weights + log_q - guide.score(z)).double()
        found = _drawn_out(space, chosen, over, log_mass, seed=seed)
        if found is None:
            return []
        ends, thin, there = found
    return regions_of_walkers(ends, thin, log_mass.exp(), there, BY_WALKERS)


def is_usable(log_mass: Tensor) -> bool:
    """Whether a verdict may rest on draws with these normalized log weights, or on a larger sample of their kind."""
    return bool(1.0 / log_mass.exp().square().sum() > ESS_SHARE_LEAST * len(log_mass))


def _drawn_out(
    space: Space, chosen: Tensor, over: Tensor, log_mass: Tensor, *, seed: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Draw points outwards in latent space, and let those that are out there go back, or stay.

    Return where they are, which of them (N,) are where the guide is thin, and which of the weighted draws (S,) are. A
    place is thin if its excess is one that the draws hardly reach. None if there is no way out, or as soon as no more
    wanderers than draws are left there: they were drawn to there, so that their share falls to what it is.
    """
    with seeded(derive(seed, "umbrella"), chosen.device):
        points: Point = space.look(*space.place(chosen))
        level = level_of(points)
        points = walked(space, points, FIRST, level=level, height=HIGH)
        if float((excess(points, level) > DENSITY_GAP_OF_WALKERS).double().mean()) <= WALKERS_OUT_SHARE:
            return None
        points = walked(space, points, OUT, level=level, height=HIGH)
        points = space.look(points.x.repeat(2, 1), points.k.repeat(2))
        by = max(DENSITY_GAP_OF_WALKERS, _hardly_reached(over - level, log_mass))
        there = over - level > by
        known = float(log_mass.exp()[there].sum()) + MISSED_MASS_SHARE
        for _ in range(LOOKS):
            points = walked(space, points, BACK // LOOKS, level=level)
            thin = excess(points, level) > by
            if float(thin.double().mean()) <= known:
                return None
    return points.z, thin, there


def level_of(points: Point) -> float:
    """Return the median of the log weights."""
    known = points.log_weight[torch.isfinite(points.log_weight)]
    return float(known.median()) if len(known) else 0.0


def _hardly_reached(over: Tensor, log_mass: Tensor) -> float:
    """Return the excess beyond which weighted draws have next to no mass."""
    ordered, places = over.sort()
    below = log_mass[places].exp().cumsum(0)
    return float(ordered[int((below < 1.0 - MASS_HARDLY_REACHED).sum().clamp_max(len(ordered) - 1))])
