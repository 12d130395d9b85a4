"""Unverified modes: places at which a guide may miss mass, where a path's normal distribution cannot estimate it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from pyro_flows.inference.modes.missed_regions import Guide, MissedRegion, is_resolved
from pyro_flows.inference.modes.survey import NUMBERS
from pyro_flows.inference.modes.tempering import POINTS, TEMPERATURES, Tempered, temper
from pyro_flows.inference.modes.tops import MODE_REACHES, NEGLIGIBLE_GAIN
from pyro_flows.inference.starts.climb import NEWTON, newton
from pyro_flows.inference.starts.curvature import inverse_roots, lower_triangular
from pyro_flows.inference.starts.gaussians import Gaussians, Start
from pyro_flows.inference.starts.pathfinder import Paths
from pyro_flows.inference.starts.prior import in_units
from pyro_flows.inference.verdict.weighing import log_mean
from pyro_flows.support.process.seeding import derive
from pyro_flows.support.thresholds import (
    DENSITY_GAP_OF_MODES,
    MASS_GAP_OF_LAPLACE_A_DIM,
    MASS_GAP_OF_TEMPERING,
    MISSED_MASS_SHARE,
)

UNWEIGHED = (
    "the search for missed modes found a region whose mass it could not estimate: Hessians cost too much for this model"
)
MEASURED_PLACES = 4  # places whose mass is measured by tempering, the best first; missed modes that get a run


@dataclass(frozen=True)
class UnverifiedMode:
    """A path at whose end the guide may lack mass, and whose normal is too poor to estimate it."""

    number: int
    elbo: float
    elsewhere: bool  # the guide is too thin at most draws of the normal, and not only at some of their tail
    start: Start
    beside: bool = False  # the end is the top of what the guide covers, or covered itself


def worth_measuring(
    guide: Guide, paths: Paths, own: int, doubtful: Sequence[UnverifiedMode], units: Tensor
) -> tuple[list[int], list[UnverifiedMode]]:
    """Return the numbers of paths to temper from, one of the guide's own region first, and the doubts on the others."""
    ends = paths.ends
    base = int(paths.elbo[:own].nan_to_num(nan=-torch.inf).argmax())
    reach = guide.covered + math.log(MISSED_MASS_SHARE) - max(0.0, guide.covered - float(paths.elbo[base]))
    worth = [path for path in doubtful if path.elbo > reach - DENSITY_GAP_OF_MODES]
    worth.sort(key=lambda path: (not path.elsewhere, -path.elbo))
    order = _apart(paths, [path.number for path in worth], units)
    worth = [*islice((worth[i] for i in order if not _is_spike(guide, ends[worth[i].number])), MEASURED_PLACES)]
    return [base, *(path.number for path in worth)], worth


def by_curvature(
    guide: Guide, paths: Paths, tempered: Sequence[int], doubtful: Sequence[UnverifiedMode], units: Tensor,
    unresolved: list[MissedRegion],
) -> Paths | None:  # fmt: skip
    """Return Laplace's normals at the guide's own mode, first, and at places that only poor normals came to.

    In hundreds of dimensions a path from afar comes to a mode with a normal that is tens of nats too poor, and the
    place seems to be worth nothing. A few of Newton's steps lead to its top. A Hessian takes D gradients, as much as
    two steps of all paths. None if there is no such place, or if Hessians cost too much: then places are added to
    ``unresolved``. None too where the normal at the guide's own mode has next to none of its mass, as in funnels: there
    masses by Laplace's method are wrong.

    ``tempered`` are the numbers of paths that were tempered from, one to the guide's own mode first.
    """
    density, ends = guide.density, paths.ends
    base, *worth = tempered
    heights = density(ends).detach()
    elsewhere = [path.number for path in doubtful if path.elsewhere]
    elsewhere.sort(key=lambda number: -float(heights[number]))
    poor = [elsewhere[number] for number in _apart(paths, elsewhere, units)]
    left = (number for number in poor if number not in worth and not _is_spike(guide, ends[number]))
    poor = [*islice(left, MEASURED_PLACES)]
    if density.dim * density.numbers > NUMBERS:
        starts = {path.number: path.start for path in doubtful}
        unresolved += [MissedRegion(ends[number], starts[number]) for number in poor]
        return None
    if not poor:
        return None
    chosen = [base, *poor]
    modes = ends[chosen] if bool(paths.settled[chosen].all()) else newton(density, ends[chosen], NEWTON)
    roots = inverse_roots(density, modes)[0]
    top, slopes = density.value_and_grad(modes)
    to_gain = (roots.mT @ slopes[..., None])[..., 0].square().sum(1)
    away = torch.linalg.solve(roots, (modes - modes[0])[..., None])[..., 0].norm(dim=1)
    # neither places without a top, nor the guide's own top once more, within three standard deviations
    kept = (to_gain < NEGLIGIBLE_GAIN) & (away > 3.0)
    kept[0] = True
    size = torch.linalg.slogdet(roots)[1] + 0.5 * density.dim * math.log(2.0 * math.pi)
    tells = guide.covered - float((top + size)[0]) < MASS_GAP_OF_LAPLACE_A_DIM * density.dim
    if not tells or int(kept.sum()) < 2:
        return None
    return Paths.at(modes[kept], lower_triangular(roots[kept]), (top + size)[kept])


def _apart(paths: Paths, numbers: Sequence[int], units: Tensor) -> list[int]:
    """Return which of some paths ended apart, those first that ended far apart.

    A standard deviation in each coordinate is far in many dimensions: there may be two modes within it. Tops, at which
    paths came to rest, are other ones where a few standard deviations lie between them.
    """
    far = distinct([paths.ends[number] for number in numbers], units)
    rest = [*far, *(place for place in range(len(numbers)) if bool(paths.settled[numbers[place]]) and place not in far)]
    near = distinct([paths.ends[numbers[place]] for place in rest], units, by=MODE_REACHES)
    return [rest[place] for place in near]


def _is_spike(guide: Guide, end: Tensor) -> bool:
    """Whether a path ended where the density grows into what numbers cannot resolve, and the guide has no share."""
    thin = bool(guide.is_under_covered(end[None], guide.density(end[None]).detach()))
    return thin and not is_resolved(guide.density, end)


def modes_with_mass(
    guide: Guide, ends: Tensor, worth: Sequence[UnverifiedMode], normals: Gaussians, walk: Tempered
) -> list[MissedRegion]:
    """Return the places with a good part of the mass, by tempering from the guide's own region, first, and there.

    Where tempering falls far short of what the guide's own weights say, points have not come to rest, and figures tell
    little. Then the regions that seem to have mass, and the guide's own, are tempered ten times as slowly from their
    ``normals``, one for each part of the ``walk``. A region that then has as much less is left out: its figure may
    still be off by several nats. If no mode seems to have enough mass, those that may only lack it because the walk was
    fast are tempered as slowly, where the model is cheap. What this adds to their mass, a nat at most, may be lacking
    once more.
    """
    least, slowly = math.log(MISSED_MASS_SHARE), round(MASS_GAP_OF_TEMPERING) * TEMPERATURES
    fast = _shares(guide, walk)
    there = [number for number, share in fast.items() if share > least]
    lacks = bool(there) and guide.covered - float(log_mean(walk.log_weights[0])) > MASS_GAP_OF_TEMPERING
    again = there if lacks else []
    if not lacks and all(worth[number].beside for number in there):
        # where there is mass beside the guide's own mode, only other modes may be missed yet
        others = [number for number in fast if not there or not worth[number].beside]
        near = [number for number in others if fast[number] > least - MASS_GAP_OF_TEMPERING]
        cost = (1 + len(near)) * POINTS * slowly
        again = near if guide.density.affordable(cost) == cost else []
    found = [] if lacks else [_region(guide, ends, worth[number], walk, number) for number in there]
    if again:
        parts = normals.some([0, *(1 + number for number in again)])
        walk = temper(guide.density, parts, seed=derive(worth[again[0]].number, "slow tempering"), temperatures=slowly)
        slow = _shares(guide, walk)
        # what is lacking falls as one over the number of temperatures: from 10 nats to one
        left = [min(max(share - fast[again[number]], 0.0), 1.0) for number, share in slow.items()]
        enough = [-MASS_GAP_OF_TEMPERING if lacks else least - lacking for lacking in left]
        there = [number for number, share in slow.items() if share > enough[number]]
        found += [_region(guide, ends, worth[again[number]], walk, number) for number in there]
    return found


def _region(guide: Guide, ends: Tensor, path: UnverifiedMode, walk: Tempered, number: int) -> MissedRegion:
    """Return what is missed about the end of a path, which is a part of a walk, the guide's own region not counted."""
    end, log_weights = ends[path.number], _thin(guide, walk, number)
    thin_end = bool(guide.is_under_covered(end[None], guide.density(end[None]).detach()))
    drawn = walk.ends[1 + number][int(log_weights.argmax())]
    place = end if thin_end else drawn
    return MissedRegion(place, path.start, beside=path.beside or not thin_end, drawn=drawn)


def _shares(guide: Guide, walk: Tempered) -> dict[int, float]:
    """Return, for the parts of a walk after the first, how much mass they have where the guide is thin.

    As the logarithm of a part of what the guide covers.
    """
    covered = min(float(log_mean(walk.log_weights[0])), guide.covered)
    return {
        number: float(log_mean(_thin(guide, walk, number))) - covered for number in range(len(walk.log_weights) - 1)
    }


def _thin(guide: Guide, walk: Tempered, number: int) -> Tensor:
    """Return the log weights (S,) of a part of a walk where the guide is too thin, and no weight elsewhere."""
    ends, log_p, log_weights = (part[1 + number] for part in walk)
    return torch.where(guide.is_under_covered(ends, log_p), log_weights, -torch.inf)


def distinct(places: Sequence[Tensor], units: Tensor, *, by: float | None = None) -> list[int]:
    """Return the numbers of places (D,) that do not lie within a standard deviation of an earlier one of them.

    In many dimensions, modes may lie closer than that: where no other search follows, ``by`` says how many units (the
    norm of all coordinates together) count as apart.
    """
    kept: list[int] = []
    for number, place in enumerate(places):
        away = [in_units((place - places[other])[None], units) for other in kept]
        if all(float(x.norm()) > (math.sqrt(len(place)) if by is None else by) for x in away):
            kept.append(number)
    return kept
