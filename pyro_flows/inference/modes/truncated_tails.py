"""Marginal tails that the draws truncate, estimated on a grid of conditional Laplace approximations.

The scale of a few groups has a long tail. Its effects are pinned down there, so that in non-centered coordinates they
lie in a neck that narrows as the scale grows; centered ones have a neck at its other end. A flow that was trained on
its own draws ends before such a tail, and its weights are even. Chains enter it so seldom that R-hat does not show it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter

import torch
from torch import Tensor

from pyro_flows.inference.modes.laplace_grid import Marginal, all_grids, can_have_grid, closer
from pyro_flows.inference.modes.missed_modes import Search, sentence_on
from pyro_flows.inference.modes.missed_regions import BY_WALKERS, TRUNCATED_TAIL, MissedRegion
from pyro_flows.inference.modes.tops import covariance_roots
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.verdict.deciding import ESTIMATED_DRAWS
from pyro_flows.inference.verdict.weighing import LEVELS, in_order, weighted_quantiles
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import MISSED_MASS_ERRORS, MISSED_MASS_OF_TAILS, TAIL_SHARE
from pyro_flows.transforms.splines import between


def with_truncated_tails(
    search: Search, density: LogDensity, draw: Callable[[], tuple[Tensor, Tensor]], *, worth: float = math.inf,
    seed: int,
) -> Search:  # fmt: skip
    """Go on with a search that has found no mode: look for a tail that the draws truncate.

    ``draw`` gives draws z (S, D) and their log weights (S,); they are worth so many independent ones at most.
    """
    modes = [region for region in search.missed if region.start.name != BY_WALKERS]
    if modes or not can_have_grid(density):
        return search
    with torch.no_grad(), seeded(derive(seed, "draws of tails"), density.device):
        z, log_weights = draw()
    usable = torch.isfinite(log_weights) & torch.isfinite(z).all(1)
    region = truncated_tail(density, z[usable], log_weights[usable], worth=worth, seed=seed)
    if region is None:
        return search
    return replace(search, missed=(region,), sentence=sentence_on(density, [region], z), passed=False)


def truncated_tail(
    density: LogDensity, z: Tensor, log_weights: Tensor, *, worth: float = math.inf, seed: int
) -> MissedRegion | None:
    """Return a place in the tail that weighted draws z (S, D) truncate most; None if they truncate none."""
    found = all_grids(density, z, log_weights, seed=seed)
    mass = torch.softmax(log_weights.double(), 0)
    effective = min(max(worth, 1.0) if worth == worth else 1.0, float(1.0 / mass.square().sum()))
    limit = _limit(effective)
    short = [_truncated_by(one, z[:, one.coordinate].double(), mass) for one in found]
    for amount, worst in sorted(zip(short, found, strict=True), key=itemgetter(0), reverse=True):
        if not amount > limit:
            break
        values = z[:, worst.coordinate].double()
        again = closer(density, worst, seed=seed)  # with other draws: grid points are known to a few per cent each
        if again is None or not (amount := _truncated_by(again, values, mass)) > limit:
            continue
        near = _near_grid(again, z, mass)
        own, seen = _truncated_by(again, values, near), _limit(effective * float((mass @ mass) / (near @ near)))
        if not (-math.inf < own <= MISSED_MASS_OF_TAILS and seen < amount):  # other modes do not explain what is short
            return _place(again, values, mass)
    return None


def _limit(effective: float) -> float:
    """Return the mass that has to be short in a tail of so many independent draws."""
    return MISSED_MASS_OF_TAILS + MISSED_MASS_ERRORS * math.sqrt(TAIL_SHARE * (1.0 - TAIL_SHARE) / effective)


def _near_grid(marginal: Marginal, z: Tensor, mass: Tensor) -> Tensor:
    r"""Return normalized weights (S,) with which weighted draws z (S, D) are draws of the grid's density near its tops.

    That density g is normal across the coordinate. Its draws within a ball B about the tops have the marginal of the
    grid. So have draws of p with the weights :math:`g(z)\,1_B(z) / p(z)`, however many modes p has.
    """
    density, coordinate = marginal.tails.density, marginal.coordinate
    values, distance = z[:, coordinate].double(), z.new_zeros(len(z), dtype=torch.float64)
    near = (values[:, None] - marginal.places).abs().argmin(1)
    for number, (top, root) in enumerate(zip(marginal.tops, marginal.roots, strict=True)):
        away = (z[near == number] - top).double()
        away[:, coordinate] = 0.0
        distance[near == number] = (away @ root).square().sum(1)
    grid, height = marginal.density()
    along = between(values, grid, height[:, None], torch.zeros_like(height)[:, None])[:, 0]
    log_g = along + marginal.roots.diagonal(dim1=1, dim2=2).log().sum(1)[near] - 0.5 * distance
    log_p = torch.cat([density(part) for part in z.to(marginal.tails.middle).split(ESTIMATED_DRAWS)]).double()
    within = (distance < z.shape[1]) & (values >= marginal.places[0]) & (values <= marginal.places[-1])
    return torch.softmax(torch.where(within & (mass > 0.0), mass.log() + log_g - log_p, -torch.inf), 0)


def _quantiles(values: Tensor, mass: Tensor, levels: Sequence[float]) -> Tensor:
    rows = values[None]
    return weighted_quantiles(rows, in_order(rows), mass, values.new_tensor(levels))[:, 0]


def _truncated_by(marginal: Marginal, values: Tensor, mass: Tensor) -> float:
    """Return the mass that weighted draws (S,) lack in a tail; -inf if grid points disagree about the middle."""
    inner = [TAIL_SHARE + (1.0 - 2.0 * TAIL_SHARE) * part for part in LEVELS[1:-1]]
    found = _quantiles(values, mass, [TAIL_SHARE, *inner, 1.0 - TAIL_SHARE])
    if not marginal.places[0] < found[0] < found[-1] < marginal.places[-1]:
        return -math.inf
    below = marginal.below(found)
    quarters = (below[1:-1] - below[0]) / (below[-1] - below[0])
    if float((quarters - quarters.new_tensor(LEVELS[1:-1])).abs().max()) > TAIL_SHARE:
        return -math.inf
    short = max(float(below[0]), float(1.0 - below[-1])) - TAIL_SHARE
    return short if math.isfinite(short) else -math.inf


def _place(marginal: Marginal, values: Tensor, mass: Tensor) -> MissedRegion:
    """Return the mode at the grid point next to the middle of the mass beyond the tail that is short."""
    low, high = _quantiles(values, mass, (TAIL_SHARE, 1.0 - TAIL_SHARE))
    below = marginal.below(torch.stack([low, high, *marginal.places]))
    target = 0.5 * below[0] if below[0] > 1.0 - below[1] else 0.5 * (1.0 + below[1])
    number = int((below[2:] - target).abs().argmin())
    top, root = (part[number].to(marginal.tails.density.dtype) for part in (marginal.tops, covariance_roots(marginal)))
    return MissedRegion(top, Start(TRUNCATED_TAIL, top, root), beside=True)
