r"""Posterior mass next to the draws of q that q under-represents: a tail, or the neck of a funnel.

A region that holds a few percent of the mass, and where a flow has next to nothing, is entered seldom: in the flow's
latent space it is far away, and the way to it is narrow. Weights know nothing of it, and so do chains that begin at the
guide's draws. The excess :math:`\ell(x) = \log p(z) - \log q(z) - c` grows along the way. So points move under

.. math:: \pi_h(x) \propto \pi(x)\, \big(e^{-\ell(x)} + e^{-h}\big)^{-1},

which is the posterior :math:`\pi` times its excess over the guide, up to a factor :math:`e^h`. A region with a share m
of the mass gets up to :math:`e^h m` times as much as it had. After that, points move under :math:`\pi` itself. Where
the region has no mass, they leave it; where it has, they tell how much.

Reference: Torrie and Valleau 1977, "Nonphysical sampling distributions in Monte Carlo free-energy estimation: umbrella
sampling" (doi 10.1016/0021-9991(77)90121-8), here with the log weight as the coordinate.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_flows.inference.modes.missed_regions import Guide, MissedRegion, regions_of_walkers
from pyro_flows.inference.modes.tempering import LEAPS, move_walkers
from pyro_flows.inference.starts.prior import units_of
from pyro_flows.inference.verdict.deciding import COMPARED_DRAWS
from pyro_flows.inference.verdict.weighing import resample
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import (
    DENSITY_GAP_OF_WALKERS,
    ESS_SHARE_LEAST,
    MISSED_MASS_OF_TAILS,
    MISSED_MASS_SHARE,
    TAIL_SHARE,
)

HIGH = 5.0  # nats of excess, up to which points are drawn outwards
MOVES = 64  # outwards, a quarter of them to see whether there is any way out; and as many under the density itself
LOOKS = 8  # at the way back


class Points(NamedTuple):
    """Points of C chains in the latent space of a guide: x (C, D), parts k (C,), densities (C,), gradients (C, D)."""

    x: Tensor
    k: Tensor
    z: Tensor
    log_p: Tensor  # of the model, at z
    log_pi: Tensor  # the target
    slope: Tensor  # its gradient
    log_ref: Tensor  # of a draw from the guide
    ref_slope: Tensor

    @property
    def log_weight(self) -> Tensor:
        return self.log_pi - self.log_ref

    def where(self, taken: Tensor, other: Points) -> Points:
        pairs = zip(self, other, strict=True)
        return Points(*(torch.where(taken if a.dim() == 1 else taken[:, None], a, b) for a, b in pairs))


class Space(Protocol):
    """The latent space of a guide, with the posterior as its target; ``costly`` if a look at a point takes long."""

    @property
    def costly(self) -> bool: ...
    def place(self, z: Tensor) -> tuple[Tensor, Tensor]: ...
    def look(self, x: Tensor, k: Tensor) -> Points: ...


@torch.no_grad()
def walked(space: Space, points: Points, moves: int, *, level: float, height: float | None = None) -> Points:
    r"""Move points by Hamiltonian dynamics under :math:`\pi_h`, or under the posterior itself.

    The excess is counted from a log weight, the ``level``. Without a ``height``, points move under the posterior. Each
    point has a step size of its own in each move: they differ by 1.5 decades, since the way into a neck is narrow.

    Cost: five gradients for each move of a point. Random numbers come from torch's global generator.
    """
    for _ in range(moves):
        velocity = torch.randn_like(points.x)
        value, slope = _target(points, level, height)
        start = 0.5 * velocity.square().sum(1) - value
        step = 10.0 ** (-1.5 * torch.rand_like(velocity[:, :1])) * points.x.shape[1] ** -0.25
        new = points
        for _ in range(LEAPS):
            velocity = velocity + 0.5 * step * slope
            new = space.look(new.x + step * velocity, points.k)
            value, slope = _target(new, level, height)
            velocity = velocity + 0.5 * step * slope
        chance = (start - 0.5 * velocity.square().sum(1) + value).nan_to_num(nan=-math.inf).exp()
        points = new.where(torch.rand_like(chance) < chance, points)
    return points


def excess(points: Points, level: float) -> Tensor:
    """Return log p - log q - c (C,), very low where that is not finite."""
    return (points.log_weight - level).nan_to_num(nan=-1e6, posinf=1e6, neginf=-1e6)


def _target(points: Points, level: float, height: float | None) -> tuple[Tensor, Tensor]:
    """Return the log density (C,) that points move under, and its gradient (C, D)."""
    if height is None:
        return points.log_pi, points.slope
    over = excess(points, level)
    drawn = -torch.logaddexp(-over, torch.full_like(over, -height))
    share = torch.sigmoid(height - over)[:, None]  # of the pull outwards that is left
    value = torch.where(torch.isfinite(points.log_pi), points.log_pi + drawn, -math.inf)
    return value, points.slope + share * (points.slope - points.ref_slope)


@torch.no_grad()
def under_covered_region(
    guide: Guide, space: Space | None, z: Tensor, weights: Tensor, log_q: Tensor, *, seed: int
) -> list[MissedRegion]:
    """Move walkers from weighted draws; return places where the guide is too thin, if more come there than before.

    Weights count the mass where the guide is thin as long as it has a draw there; only what exceeds that counts. Where
    the latent space of the guide is known, and the weights are good enough for a verdict, walkers are first drawn out
    to where it is thin: 256, or a quarter of them where a look at a point is costly. Elsewhere they move under the
    density itself; see :func:`move_walkers`. Draws z (S, D) have log weights (S,) and log densities (S,).
    """
    log_mass = torch.log_softmax((weights - guide.covered).double(), 0)
    count = COMPARED_DRAWS // 4 if space is not None and space.costly else COMPARED_DRAWS
    chosen = z[resample(log_mass, count, seed=derive(seed, "wanderers"))]
    if space is None or not is_usable(log_mass):
        ends, log_p = move_walkers(guide.density, chosen[None], units_of(z)[None], seed=derive(seed, "wandering"))
        return regions_by_density(guide, (ends[0], log_p[0]), (z, weights + log_q), log_mass.exp())
    found = _drawn_out(space, chosen, (weights + log_q - guide.score(z)).double(), log_mass, seed=seed)
    if found is None:
        return []
    ends, thin, there = found
    return regions_of_walkers(ends, thin, log_mass.exp(), there)


def regions_by_density(
    guide: Guide, ends: tuple[Tensor, Tensor], draws: tuple[Tensor, Tensor], mass: Tensor
) -> list[MissedRegion]:
    """Return what :func:`regions_of_walkers` does, where ends of walkers and draws come with their log densities."""
    thin, there = (guide.is_under_covered(*points, by=DENSITY_GAP_OF_WALKERS) for points in (ends, draws))
    return regions_of_walkers(ends[0], thin, mass, there)


def is_usable(log_mass: Tensor) -> bool:
    """Whether a verdict may rest on draws with these normalized log weights, or on a larger sample of their kind."""
    return bool(1.0 / log_mass.exp().square().sum() > ESS_SHARE_LEAST * len(log_mass))


def _drawn_out(
    space: Space, chosen: Tensor, over: Tensor, log_mass: Tensor, *, seed: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Draw points outwards in latent space, and let those that are out there go back, or stay.

    Return where they are, which of them (N,) are where the guide is thin, and which of the weighted draws (S,) are. A
    place is thin if its excess is one that the draws hardly reach. None if there is no way out, or as soon as no more
    walkers than draws are left there: they were drawn to there, so that their share falls to what it is.
    """
    with seeded(derive(seed, "umbrella"), chosen.device):
        points = space.look(*space.place(chosen))
        level = level_of(points)
        points = walked(space, points, MOVES // 4, level=level, height=HIGH)
        if float((excess(points, level) > DENSITY_GAP_OF_WALKERS).double().mean()) <= TAIL_SHARE:
            return None
        points = walked(space, points, MOVES - MOVES // 4, level=level, height=HIGH)
        points = space.look(points.x.repeat(2, 1), points.k.repeat(2))
        ordered, places = (over - level).sort()  # beyond the excess that is hardly reached, draws have next to no mass
        reached = int((log_mass[places].exp().cumsum(0) < 1.0 - MISSED_MASS_OF_TAILS).sum())
        by = max(DENSITY_GAP_OF_WALKERS, float(ordered[min(reached, len(ordered) - 1)]))
        there = over - level > by
        known = float(log_mass.exp()[there].sum()) + MISSED_MASS_SHARE
        for _ in range(LOOKS):
            points = walked(space, points, MOVES // LOOKS, level=level)
            thin = excess(points, level) > by
            if float(thin.double().mean()) <= known:
                return None
    return points.z, thin, there


def level_of(points: Points) -> float:
    known = points.log_weight[torch.isfinite(points.log_weight)]
    return float(known.median()) if len(known) else 0.0
