r"""Symmetric modes: images of each other under a signed permutation of the coordinates, at least about the tops.

Where f(P z) = f(z) + c for a signed permutation P, at least about a top a, and b = P a, the density about b along one
axis is that about a along another, maybe the other way round:
:math:`f(b + t\,e_i) - f(b) = f(a + s\,t\,e_{\pi(i)}) - f(a)` for any t. So a few steps along each axis, from both tops,
tell P, whatever the dimension and however the model groups its values. The draws of a guide tell what the image holds,
and whether the density is the same there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_flows.inference.modes.missed_regions import Guide, MissedRegion, missed_regions_of
from pyro_flows.inference.modes.symmetries import SignedPermutation, are_the_same, identity, image_of, product
from pyro_flows.inference.modes.tops import MODE_REACHES
from pyro_flows.inference.modes.unverified_modes import MEASURED_PLACES, distinct
from pyro_flows.inference.starts.climb import climb
from pyro_flows.inference.starts.pathfinder import Paths
from pyro_flows.inference.starts.prior import units_of
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.thresholds import DENSITY_GAP_OF_LOST


@torch.no_grad()
def symmetric_modes_of(
    guide: Guide, paths: Paths, own: int, z: Tensor, log_q: Tensor, units: Tensor
) -> list[MissedRegion]:
    """Return the regions about images of the guide's own mode that hold a good part of the mass and no draws.

    The first ``own`` paths began at draws of the guide; ``z`` (S, D) are such, ``log_q`` (S,) their log densities. The
    mass of an image is that of :func:`~pyro_flows.inference.modes.missed_modes.mirrored`, exact even where the density
    there is another one. Cost: twelve densities for each coordinate of at most five tops.
    """
    heights = guide.density(paths.ends)
    at_rest = (paths.settled & torch.isfinite(heights)).nonzero()[:, 0].tolist()
    mine = [number for number in at_rest if number < own]
    if not mine:
        return []
    home = max(mine, key=lambda number: float(heights[number]))
    least = float(heights[home]) - DENSITY_GAP_OF_LOST
    others = [number for number in at_rest if number != home and float(heights[number]) > least]
    others.sort(key=lambda number: -float(heights[number]))
    places = [paths.ends[number] for number in (home, *others)]
    chosen = distinct(places, units, by=MODE_REACHES)[1 : 1 + MEASURED_PLACES]
    return [region for number in chosen for region in _region_about(guide, places[0], places[number], z, log_q)]


@torch.no_grad()
def with_symmetric_modes(guide: Guide, missed: Sequence[MissedRegion], z: Tensor, log_q: Tensor) -> list[MissedRegion]:
    """Return regions that any search found, those that are images of the guide's own mode with what takes it there.

    Its own mode is the highest top to which eight draws climb. Cost: a climb from each of these and from each region,
    beside that of :func:`symmetric_modes_of`.
    """
    if all(region.symmetry is not None or region.beside for region in missed):
        return list(missed)
    points = torch.cat([z[:8], torch.stack([region.place for region in missed])])
    own = len(points) - len(missed)
    ends = climb(guide.density, points, units_of(z, full=False).expand_as(points))
    mine = ends.heights[:own].where(ends.settled[:own], -torch.inf)
    if not bool(torch.isfinite(mine).any()):
        return list(missed)
    home = ends.points[int(mine.argmax())]
    found = []
    for number, region in enumerate(missed):
        there = own + number
        open_ = number < MEASURED_PLACES and region.symmetry is None and not region.beside
        known = open_ and bool(ends.settled[there])
        images = _region_about(guide, home, ends.points[there], z, log_q) if known else []
        found.append(replace(region, symmetry=images[0].symmetry, move=images[0].move) if images else region)
    return found


def _region_about(guide: Guide, home: Tensor, top: Tensor, z: Tensor, log_q: Tensor) -> list[MissedRegion]:
    """Return the region about a mode (D,), if it is an image of the guide's own one with a good part of the mass."""
    symmetry = _between(guide.density, home, top, units_of(z, full=False))
    if symmetry is None:
        return []
    moved = image_of(z, symmetry)
    log_p = guide.density(moved)
    missed = missed_regions_of(moved, log_p, guide.missing_mass(moved, log_p, log_q))
    back = (
        bool(missed)
        and product(symmetry, symmetry) == identity(z.shape[1])
        and bool(are_the_same(log_p, guide.density(z)).all())
    )
    move = symmetry if back else None
    return [replace(region, place=top, drawn=region.place, move=move, symmetry=symmetry) for region in missed]


def _between(density: LogDensity, top: Tensor, other: Tensor, spread: Tensor) -> SignedPermutation | None:
    """Return the order and signs that take ``top`` (D,) to ``other``; None if nothing of that kind does.

    Both are looked at along each axis, at six steps of each sign, from 0.3 of the least sd to three of the greatest.
    """
    steps = torch.logspace(0.0, 1.0, 6, base=float(3.0 * spread.max() / (0.3 * spread.min()))).to(top)
    steps = 0.3 * spread.min() * steps
    mine, theirs = _profiles(density, top, steps), _profiles(density, other, steps)
    away = torch.stack([(other[:, None] - sign * top).abs() / steps[0] for sign in (1.0, -1.0)])
    costs = away + torch.stack([torch.cdist(theirs, profile, p=1) for profile in (mine, mine.flip(1))])
    cost, which = costs.double().min(0)
    cost.diagonal().mul_(1.0 - 1e-6)  # of coordinates that cannot be told apart, none moves
    order = _assigned(cost)
    signs = [1.0 if int(which[row, column]) == 0 else -1.0 for row, column in enumerate(order)]
    symmetry = tuple(order), tuple(signs)
    return None if symmetry == identity(len(top)) else symmetry


def _assigned(cost: Tensor) -> list[int]:
    """Return the column of each row, all of them different, whose costs (D, D) have the least sum."""
    cheapest: list[int] = cost.argmin(1).tolist()
    if len(set(cheapest)) == len(cheapest):  # it takes a third of a second to import what else would tell
        return cheapest
    from scipy.optimize import linear_sum_assignment

    order: list[int] = linear_sum_assignment(cost.cpu().numpy())[1].tolist()
    return order


def _profiles(density: LogDensity, top: Tensor, steps: Tensor) -> Tensor:
    """Return how far the density falls from a top along each axis: (D, 2 K), from the farthest step down to that up."""
    offsets = torch.cat([-steps.flip(0), steps])
    points = top + offsets[:, None, None] * torch.eye(len(top), dtype=top.dtype, device=top.device)
    heights = density(points.flatten(0, 1)).reshape(len(offsets), -1).mT - density(top[None])
    return heights.nan_to_num(nan=-DENSITY_GAP_OF_LOST).clamp(-DENSITY_GAP_OF_LOST, DENSITY_GAP_OF_LOST)
