r"""Whether a posterior with improper priors has a finite integral, as far as its tails tell.

With coordinate k held at c, the density over all others is about a normal one at its top, so that its mass is

.. math:: \log f(c) = \max_{z : z_k = c} \log p(z) - \tfrac12 \log |H_{-k}| + \text{const},

H the Hessian of -log p over the others. A finite integral asks for a marginal that falls faster than 1/c: by
more than log 2 where the distance doubles. The posterior of a regression with a flat prior and separated data does not,
nor that of a scale with too few data.

Reference: Hobert and Casella 1996, "The effect of improper priors on Gibbs sampling in hierarchical linear mixed
models" (JASA 91, doi:10.1080/01621459.1996.10476714): chains of an improper posterior may look as if all was well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pyro_flows._seeding import derive, seeded
from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.held import SMALL, Held, Tops, tops_at
from pyro_flows.starts.climb import climb
from pyro_flows.starts.curvature import second_derivatives
from pyro_flows.starts.prior import spread_of

PART = "a look at the tails of improper priors"  # of a fit
STEPS = tuple(6.0 * 2.0**power for power in range(20))  # spreads from the middle, at which marginals are looked at
LOWEST = 12.0  # nats below the middle, under which rounding of a likelihood may look like a tail
NUMBERS_END, HUGE = 3.0, math.log(1e15)  # spreads; change of a log value, beyond which numbers may end
ALIKE = 1e-3  # changes of a density are the same, up to such a share of them
LEVEL, FLATTER = 1e-3, 1e-6  # curvature over a spread, and as a share of the largest: there may be none
MOST, UP_TO = 32, 100  # coordinates that are looked at; dimensions, for Hessians
TICKS = 60
FALLS = 2  # that have to be known in the end: one may be due to rounding
FARTHEST, RIDGE = 6.0, 1e-12  # spreads of draws, to which others are cut; added to the diagonal of a correlation matrix


@torch.no_grad()
def improper_tails(density: LogDensity, draw: Callable[[], Tensor], *, seed: int) -> list[str]:
    """Return a sentence on the first coordinate with an improper prior along which the tails tell of no integral.

    ``draw`` gives draws (S, D) that tell where the posterior is, and how wide; it is called if a prior is improper.

    Cost: five climbs of up to 60 gradients for each such coordinate, and 5 to 20 Hessians; eight times as many if in
    doubt.
    """
    found = _coordinates(density)[:MOST]
    if not found or not density.batched or density.dim > UP_TO:
        return []
    with seeded(derive(seed, "the tails of improper priors"), density.device):
        z = draw().to(density.device, density.dtype)
    z = z[torch.isfinite(z).all(1)]
    if len(z) <= 1:
        return []
    tails = Tails(density, finer(density, z))
    slow = tails.fall_too_slowly([coordinate for coordinate, *_ in found])
    for (coordinate, name, label), too_slow in zip(found, slow, strict=True):
        if too_slow or _ends_numbers(density, coordinate, name, tails):
            return _said(name, label)
    names = tails.level_direction({coordinate: name for coordinate, name, _ in found})
    return _said(names[0], f"a direction of {', '.join(names)}") if names else []


def finer(density: LogDensity, z: Tensor) -> Tensor:
    """Return draws in double precision where the model takes these: far out, single tells no digit of a sum."""
    if z.dtype == torch.float64:
        return z
    try:
        finer, _ = density.unrecorded(z[:1].double())
    except (RuntimeError, TypeError, ValueError):  # products of a matrix of data, in single precision, with latents
        return z
    return z.double() if finer.dtype == torch.float64 else z


def _said(name: str, label: str) -> list[str]:
    said = f"the posterior seems to have no finite integral: along {label}, whose prior is improper, its density falls"
    return [f"{said} no faster than one over the distance. Give {name!r} a proper prior"]


def _coordinates(density: LogDensity) -> list[tuple[int, str, str]]:
    """Return number, site and label of each coordinate without a proper prior."""
    return [
        (latent.offset + number, latent.name, latent.name if latent.size == 1 else f"a coordinate of {latent.name}")
        for latent in density.structure.latents
        for number in latent.improper
    ]


class Tails:
    """Log marginal densities far out, each at a place where one coordinate is held.

    Places are counted from the draw (of S, D) that is next to their medians, in units of their spread: the point of all
    medians may lie off a ridge.
    """

    def __init__(self, density: LogDensity, z: Tensor) -> None:
        self.density, self.other = density, z[-1]
        self.spread = spread_of(z)
        scaled = ((z - z.median(0).values) / self.spread).double().clamp(-FARTHEST, FARTHEST)
        self.middle = z[scaled.square().sum(1).argmin()]
        products = scaled.mT @ scaled / len(z)
        inverse = torch.linalg.inv_ex(products + RIDGE * torch.eye(density.dim).to(products)).inverse
        self.slopes = (products / products.diagonal()).nan_to_num(nan=0.0).to(z.dtype)
        self.units = self.spread * inverse.diagonal().rsqrt().nan_to_num(nan=1.0).clamp(max=1.0).to(z.dtype)

    def fall_too_slowly(self, coordinates: list[int]) -> list[bool]:
        """Whether marginals fall no faster than one over the distance, wherever that is known on one side.

        Places beyond the first two are looked at only where these tell of a slow fall: between two modes, a density is
        level as well, and draws may be too narrow.
        """
        slow = [_has_slow_side(masses) for masses in self.masses(coordinates, STEPS[:2])]
        doubtful = [number for number, found in enumerate(slow) if found]
        if doubtful:
            masses = self.masses([coordinates[number] for number in doubtful], STEPS, recorded=False)
            for number, found in zip(doubtful, masses, strict=True):
                slow[number] = _has_slow_side(found, falls=FALLS)
        return slow

    def level_direction(self, improper: Mapping[int, str]) -> list[str]:
        """Return the sites of a direction along which the density is level, those of ``improper`` coordinates.

        Given one coordinate, others may have no top: of three whose sum alone is known, or of effects beside a level.
        """
        hessian = -second_derivatives(self.density, self.middle[None], exact=True)[0].double()
        scaled = self.spread.double()[:, None] * hessian * self.spread.double()
        if not bool(scaled.isfinite().all()):
            return []
        curvatures, directions = torch.linalg.eigh(0.5 * (scaled + scaled.mT))
        level = curvatures.abs() < max(LEVEL, FLATTER * float(curvatures.abs().max()))
        for direction in directions.mT[level][:MOST].to(self.middle):
            sites = [name for number, name in improper.items() if abs(float(direction[number])) > SMALL]
            masses = self._alone(direction[None], STEPS, recorded=False)[0] if sites else None
            if masses is not None and _has_slow_side(masses, falls=FALLS):
                return list(dict.fromkeys(sites))
        return []

    def masses(self, coordinates: list[int], steps: Sequence[float], *, recorded: bool = True) -> list[Tensor]:
        """Return log marginals (N) of each coordinate: in the middle, so many spreads above it, and below it.

        NaN stands for what is not known. Without ``recorded``, no graph is checked at places so far out.
        """
        unit = torch.eye(self.density.dim, dtype=self.middle.dtype, device=self.middle.device)
        found = self._alone(unit[coordinates], steps, recorded=recorded)
        others = [number for number, masses in enumerate(found) if masses is None]
        if others:
            climbed = self._climbed([coordinates[number] for number in others], steps, recorded=recorded)
            for number, masses in zip(others, climbed, strict=True):
                found[number] = masses
        return [masses for masses in found if masses is not None]

    def _alone(self, directions: Tensor, steps: Sequence[float], *, recorded: bool) -> list[Tensor | None]:
        """Return log marginals along directions (K, D), which are unit vectors in spreads, of those that stand alone.

        There, the density changes in the same way whatever the values across are.
        """
        away = (self.other - self.middle) / self.spread
        across = self.middle + self.spread * (away - (directions @ away)[:, None] * directions)
        bases = torch.cat([self.middle.expand_as(across), across])
        own, other = self._heights(bases, directions.repeat(2, 1), steps, recorded=recorded).chunk(2)
        return [one if _agree(one, two) else None for one, two in zip(own, other, strict=True)]

    def _heights(self, bases: Tensor, directions: Tensor, steps: Sequence[float], *, recorded: bool) -> Tensor:
        """Return log densities (K, N) along directions from bases; NaN where numbers end, or are too coarse."""
        points = bases[:, None] + _distances(steps, self.middle)[:, None] * (self.spread * directions)[:, None]
        points = points.flatten(0, 1)
        heights = self._values(points, recorded=recorded).double()
        ended = _have_ended(self.density, points, self.middle) | (self._noise(points, recorded=recorded) >= SMALL)
        return heights.masked_fill(ended, torch.nan).view(len(bases), -1)

    def _climbed(self, coordinates: list[int], steps: Sequence[float], *, recorded: bool) -> list[Tensor]:
        """Return log marginals by the top over all other coordinates, and a normal distribution there."""
        tops, nothing = self.tops(coordinates, steps, recorded=recorded)
        masses = torch.where(nothing, -torch.inf, tops.normal_masses())
        return list(masses.view(len(coordinates), -1))

    def tops(self, coordinates: list[int], steps: Sequence[float], *, recorded: bool) -> tuple[Tops, Tensor]:
        """Return tops over all other coordinates, as :meth:`masses` orders places, and where there is a hard edge.

        Paths begin with the others in the middle, or where they are on average, given the one that is held.
        """
        density = Held(self.density, recorded=recorded)
        held = torch.tensor(coordinates, device=self.middle.device).repeat_interleave(1 + 2 * len(steps))
        distances = _distances(steps, self.middle).repeat(len(coordinates))[:, None]
        there = self.middle[held, None] + distances * self.spread[held, None]
        others = self.middle.expand(len(held), -1), self.middle + self.spread * self.slopes[:, held].mT * distances
        points, led = (each.scatter(1, held[:, None], there) for each in others)
        heights = torch.stack([self._values(each, recorded=recorded) for each in (points, led)])
        points = torch.where((heights[1] > heights[0].nan_to_num(nan=-torch.inf))[:, None], led, points)
        points = torch.cat([points, held[:, None].to(points)], 1)
        found = Tops(points, heights[0].double(), points.new_full((*points.shape, self.density.dim), torch.nan)[:, :-1])
        found = found._replace(roots=found.roots.double())
        usable = heights.isfinite().any(0).nonzero()[:, 0]
        if len(usable):
            units = torch.cat([self.units, self.units.new_ones(1)]).expand(len(usable), -1)
            ends = climb(density, points[usable], units, ticks=TICKS)
            known = ends.points.isfinite().all(1)
            known[known.clone()] = self._noise(ends.points[known][:, :-1], recorded=recorded) < SMALL
            usable = usable[known]
        if len(usable):
            tops = tops_at(density, ends.points[known], ends.settled[known])
            for whole, part in zip(found, tops, strict=True):
                whole[usable] = part
        return found, heights.isneginf().all(0)  # as far as can be seen

    def _noise(self, points: Tensor, *, recorded: bool) -> Tensor:
        """Return by how much log densities change where coordinates change by their last digits, alike or not."""
        odd = (1.0 - 2.0 * (torch.arange(points.shape[1]) % 2)).to(points).expand_as(points)
        moved = [torch.nextafter(points, signs * torch.inf) for signs in (torch.ones_like(points), odd)]
        here, *heights = (self._values(each, recorded=recorded) for each in (points, *moved))
        return torch.stack([(height - here).abs() for height in heights]).amax(0)

    def values(self, points: Tensor) -> Tensor:
        """Return log densities (S,) of points (S, D)."""
        return self._values(points, recorded=True)

    def _values(self, points: Tensor, *, recorded: bool) -> Tensor:
        return self.density(points) if recorded else self.density.unrecorded(points)[0]


def _distances(steps: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor([0.0, *steps, *(-step for step in steps)])


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether log densities (N) change alike from the first on, wherever both are known."""
    change = one - one[0]
    apart = (change - (other - other[0])).abs() > SMALL + ALIKE * change.abs()
    known = one.isfinite() & other.isfinite()
    ended = one.isneginf() != other.isneginf()
    return bool(known[0]) and not bool((known & apart | ended).any())


def _have_ended(density: LogDensity, points: Tensor, middle: Tensor) -> Tensor:
    """Whether values of the model's own at points (S, D) are no numbers, or zero where they are not in the middle."""
    ended = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for values in density.constrain(torch.cat([middle[None], points])).values():
        flat = values.reshape(len(values), -1)
        ended = ended | (~flat[1:].isfinite() | (flat[1:] == 0.0) & (flat[:1] != 0.0)).any(1)
    return ended


def _has_slow_side(masses: Tensor, *, falls: int = 1) -> bool:
    """Whether masses fall too slowly on one side: of the middle, then of places on one side and on the other."""
    return any(_is_slow(masses[0], side, falls) for side in masses[1:].chunk(2))


def _is_slow(middle: Tensor, masses: Tensor, falls: int) -> bool:
    """Whether all falls that are known between two neighbors are too slow, and the first place is not too far down.

    At least so many falls have to be known.
    """
    found = masses[:-1] - masses[1:]
    found = found[~found.isnan()]
    too_low = bool(middle - masses[0] > LOWEST)  # no comparison holds of what is not known
    return len(found) >= falls and bool((found < math.log(2.0)).all()) and not too_low


def _ends_numbers(density: LogDensity, coordinate: int, name: str, tails: Tails) -> bool:
    """Whether draws go about until the numbers of the model end, where no density can be told any more."""
    points = tails.middle.repeat(3, 1)
    points[:, coordinate] += points.new_tensor([0.0, NUMBERS_END, -NUMBERS_END]) * tails.spread[coordinate]
    values = density.constrain(points)[name].double().abs().reshape(len(points), -1).log()
    if not bool((values[0] < torch.inf).all()):
        return True
    change = (values[1:] - values[0]).abs()
    beyond = torch.isfinite(values[0]) & ~(change <= HUGE)
    return bool((beyond.any(1) & ~torch.isfinite(density(points[1:]))).any())
