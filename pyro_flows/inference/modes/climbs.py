"""Missed regions at the ends of paths that climb from many points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from pyro_flows.inference.modes.missed_regions import Guide, MissedRegion
from pyro_flows.inference.modes.survey import can_be_surveyed, distances, survey
from pyro_flows.inference.modes.symmetric_modes import symmetric_modes_of
from pyro_flows.inference.modes.tempering import temper
from pyro_flows.inference.modes.terms import places_of_terms
from pyro_flows.inference.modes.tops import MODE_REACHES
from pyro_flows.inference.modes.unverified_modes import (
    UnverifiedMode,
    by_curvature,
    distinct,
    modes_with_mass,
    worth_measuring,
)
from pyro_flows.inference.starts.curvature import lower_triangular
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.starts.pathfinder import Paths, pathfinder
from pyro_flows.inference.starts.portfolio import SAME_END
from pyro_flows.inference.starts.prior import PATHS, in_units, prior_draws, units_of
from pyro_flows.inference.verdict.deciding import CHECKED, COMPARED_DRAWS, SEARCHED_DRAWS
from pyro_flows.inference.verdict.psis import psis
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import (
    K_HAT_GOOD,
    K_HAT_MOST,
    MISSED_MASS_ERRORS,
    MISSED_MASS_SHARE,
    REGION_MASS_SHARE,
)

INFLATED = (3.0, 10.0, 30.0)  # factors by which a few draws are moved outwards
SCREENED_AT = (1.5, 2.5, 4.0, 8.0)  # factors by which all draws are moved outwards
# paths for each factor, and from the guide's own draws; four times as many from draws of the prior, or half of that
CLIMBERS = 6


def climbed(
    guide: Guide, modes: Sequence[Start], z: Tensor, log_q: Tensor, unresolved: list[MissedRegion], *, seed: int
) -> list[MissedRegion]:
    """Climb from many points; return the regions at the ends of the paths that the guide lacks.

    ``z`` (S, D) are draws of the guide, ``log_q`` (S,) their log densities. Places whose mass could not be estimated
    are added to ``unresolved``.
    """
    density = guide.density
    own, far = z[: CLIMBERS if density.batched else 1], _dispersed(guide, modes, z, seed=seed)
    if not len(far):
        return []
    units = units_of(z)
    again = far[-4 * CLIMBERS :] if _is_cheap(density) else far[:0]
    points = torch.cat([own, far, again])
    shares = torch.ones(len(points), *[1] * units.dim()).to(units)
    shares[len(own) + len(far) :] = 0.01  # a second path from each: long first steps leap over modes
    longer = len(own) if _is_cheap(density) else 0
    paths = pathfinder(density, points, shares * units, seed=derive(seed, "modes"), own=longer)
    drawn = z[:COMPARED_DRAWS], log_q[:COMPARED_DRAWS], units
    found = symmetric_modes_of(guide, paths, len(own), *drawn) if density.batched else []
    if found:
        return found
    found, doubtful = _weighed(guide, paths, len(own), units, seed=seed)
    if density.batched and _are_beside(found):
        worth = worth_measuring(guide, paths, len(own), doubtful, units)
        found = found or _tempered(guide, paths, *worth, seed=seed)
        curved = by_curvature(guide, paths, worth[0], doubtful, units, unresolved) if _are_beside(found) else None
        if curved is not None:
            more = symmetric_modes_of(guide, curved, 1, *drawn)
            if not more:  # normals at tops are weighed, the guide's own one first; where they are poor, tempered from
                more, poor = _weighed(guide, curved, 1, units, seed=seed)
                more = more or _tempered(guide, curved, *worth_measuring(guide, curved, 1, poor, units), seed=seed)
            found += more
    return [found[number] for number in distinct([region.place for region in found], units, by=MODE_REACHES)]


def _are_beside(missed: Sequence[MissedRegion]) -> bool:
    """Whether the guide covers the modes of all these regions, so that a missed mode may still be found."""
    return all(region.beside for region in missed)


def surveyed(guide: Guide, z: Tensor, doubts: list[Start], *, seed: int) -> list[MissedRegion]:
    """Survey the modes near the guide's draws and far from them; return those that it lacks.

    Where the normal at a place is too poor to estimate its mass, a start there is added to ``doubts``.
    """
    density = guide.density
    if not can_be_surveyed(density):
        return []
    seed = derive(seed, "a search")
    climbs = 96 if density.dim <= 30 else 32
    found = survey(density, z, seed=seed, rounds=2, climbs=climbs, known=guide.score).likely()
    if not len(found):
        return []
    thin = guide.is_under_covered(found.modes, density(found.modes).detach())
    looked_at = found.of_terms | thin
    covered = (~thin).nonzero()[:, 0]
    if not len(covered):  # a flow may be thin at the very top of what it covers, far from all of its draws
        covered = distances(found, z[:COMPARED_DRAWS]).median(1).values.argmin()[None]
        looked_at[covered] = False
    if not bool(looked_at.any()):
        return []
    own, rows = len(covered), torch.cat([covered, looked_at.nonzero()[:, 0]])
    paths = Paths.at(found.modes[rows], found.roots[rows], found.evidence[rows])
    units = units_of(z)
    missed, doubtful = _weighed(guide, paths, own, units, seed=seed, apart=True)
    elsewhere = [path for path in doubtful if path.elsewhere]
    if not missed and elsewhere:
        tops = [path for path in elsewhere if bool(thin[rows[path.number]])]  # a wide term may be covered at its top
        missed = _tempered(guide, paths, *worth_measuring(guide, paths, own, tops or elsewhere, units), seed=seed)
    doubts += [path.start for path in elsewhere[:12]]
    return missed


def _is_cheap(density: LogDensity) -> bool:
    """Whether more paths cost little."""
    return density.batched and density.numbers <= 2000


def _weighed(
    guide: Guide, paths: Paths, own: int, units: Tensor, *, seed: int, apart: bool = False
) -> tuple[list[MissedRegion], list[UnverifiedMode]]:  # fmt: skip
    """Weigh draws of the normals at the ends of paths, from number ``own`` on; return what the guide lacks, and doubts.

    A doubt is a normal whose weights are too uneven to estimate a mass. Where the region has longer tails than the
    normal, the estimate is too low: so weights have to be more even to rule out a mass elsewhere that may be half of
    what counts. If all ends are ``apart``, masses that are too small by themselves are added up, and the largest of
    these regions is returned.
    """
    density, ends = guide.density, paths.ends
    chosen = own + torch.tensor(_ends(paths, own, units), dtype=torch.long, device=ends.device)
    best = paths.best.some(chosen)
    with seeded(derive(seed, "weighing"), density.device), torch.no_grad():
        each = density.affordable(2 * COMPARED_DRAWS * len(chosen)) // max(len(chosen), 1)
        count = max(each, CHECKED) if density.batched else CHECKED
        noise = torch.randn(count, density.dim, dtype=ends.dtype, device=ends.device)
        draws, log_q = best.map(noise)
        log_p = density(draws.flatten(0, 1)).unflatten(0, draws.shape[:2])
    scales = best.scale()
    scales = lower_triangular(scales) if scales.dim() == 3 else scales
    doubtful = []
    small: list[tuple[float, MissedRegion]] = []
    at_ends = guide.is_under_covered(ends, density(ends).detach())
    for place, number in enumerate(chosen.tolist()):
        missing_mass = guide.missing_mass(draws[place], log_p[place], log_q[place])
        thin = missing_mass > 0.0
        if not bool(thin.any()):
            continue
        log_weights, k_hat = psis(missing_mass.log())
        start = Start("mode", best.loc[place], scales[place])
        mass, beside = float(missing_mass.mean()), not bool(at_ends[number]) or _is_top(ends[number], ends[:own], units)
        elsewhere = bool(at_ends[number]) or float(thin.double().mean()) > 0.5
        error = MISSED_MASS_ERRORS * float(missing_mass.std()) / math.sqrt(len(missing_mass))
        nearly = mass <= MISSED_MASS_SHARE and mass + error > REGION_MASS_SHARE * MISSED_MASS_SHARE
        if not k_hat < (K_HAT_GOOD if nearly and elsewhere else K_HAT_MOST):
            doubtful.append(UnverifiedMode(number, float(paths.elbo[number]), elsewhere, start, beside))
        if k_hat < K_HAT_MOST:
            drawn = draws[place][int(log_weights.argmax())]
            region = MissedRegion(ends[number] if bool(at_ends[number]) else drawn, start, beside=beside, drawn=drawn)
            small.append((mass, region))
    found = [region for mass, region in small if mass > MISSED_MASS_SHARE]
    if apart and not found and sum(mass for mass, _ in small) > MISSED_MASS_SHARE:
        found = [max(small, key=itemgetter(0))[1]]
    return found, doubtful


def _ends(paths: Paths, own: int, units: Tensor) -> list[int]:
    """Return the numbers of paths from ``own`` on, of which at most two end at one place, the best ELBOs first.

    Most paths of a posterior with few modes end where others do, with the same normal.
    """
    order = paths.elbo[own:].nan_to_num(nan=-torch.inf).argsort(descending=True)
    away = in_units(paths.ends[own:][order], units)
    same = torch.cdist(away, away) < SAME_END
    earlier = same.tril(-1).sum(1)
    return order[earlier < 2].tolist()


def _is_top(end: Tensor, own: Tensor, units: Tensor) -> bool:
    """Whether half of the guide's own draws climb to an end (D,) too: their ends are (K, D).

    In many dimensions, the top of a region lies far from all of its draws.
    """
    same = in_units(own - end, units).norm(dim=1) < SAME_END
    return len(own) > 0 and float(same.double().mean()) >= 0.5


def _tempered(
    guide: Guide, paths: Paths, chosen: list[int], worth: Sequence[UnverifiedMode], *, seed: int
) -> list[MissedRegion]:
    """Estimate masses by tempering from the normals at the ends of the chosen paths, the guide's own region among them.

    Many paths end at one place. So the mass of each place is estimated once, and places where the guide is thin at most
    draws come first: see :func:`worth_measuring`.
    """
    if not worth:
        return []
    normals = paths.best.some(chosen)
    walk = temper(guide.density, normals, seed=derive(seed, "tempering"))
    return modes_with_mass(guide, paths.ends, worth, normals, walk)


def _dispersed(guide: Guide, modes: Sequence[Start], z: Tensor, *, seed: int) -> Tensor:
    """Return points to climb from: draws moved away from their center, prior draws, known modes; of finite density."""
    density = guide.density
    center = z.median(0).values
    parts = zip(INFLATED, z.split(CLIMBERS), strict=False)
    outwards = [center + factor * (part - center) for factor, part in parts]
    if density.batched:
        some = z[: density.affordable(SEARCHED_DRAWS * len(SCREENED_AT)) // len(SCREENED_AT)]
        outwards += [_denser(guide, center + factor * (some - center)) for factor in SCREENED_AT]
    flipped = []
    for latent in density.structure.latents[:CLIMBERS]:
        changed = z[-1:].clone()
        changed[:, latent.offset : latent.offset + latent.size] *= -1.0
        flipped.append(changed)
    count = (4 if _is_cheap(density) else 2) * CLIMBERS
    prior = prior_draws(density, count, seed=derive(seed, "modes from the prior"))
    terms = prior[:0] if can_be_surveyed(density) else places_of_terms(density, prior)
    terms = terms[distinct([*terms], units_of(z), by=1.0)[:count]]
    points = torch.cat([*(mode.loc[None] for mode in modes), terms, *outwards, *flipped, prior])
    with torch.no_grad():
        points = points[torch.isfinite(density(points)) & torch.isfinite(points).all(1)]
    return points if density.batched else points[:PATHS]


@torch.no_grad()
def _denser(guide: Guide, points: Tensor) -> Tensor:
    """Return the few of many points (S, D) at which the density is farthest above what the guide says of it.

    From far away, paths end at the widest mode. Only paths from a cone of directions lead to a narrower one. The cone
    is small in many dimensions, but the ratio of the densities is large there.
    """
    log_p = guide.density(points)
    usable = torch.isfinite(log_p) & torch.isfinite(points).all(1)
    points, log_p = points[usable], log_p[usable]
    if not len(points):
        return points
    ratios = (log_p - guide.score(points)).double().nan_to_num(nan=-torch.inf)
    return points[ratios.topk(min(CLIMBERS, len(points))).indices]
