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
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_flows._seeding import derive, seeded
from pyro_flows.model.log_density import LogDensity
from pyro_flows.starts.curvature import second_derivatives
from pyro_flows.starts.pathfinder import climb
from pyro_flows.starts.prior import spread_of

PART = "a look at the tails of improper priors"  # of a fit
STEPS = tuple(6.0 * 2.0**power for power in range(8))  # spreads from the middle, at which marginals are looked at
LOWEST = 12.0  # nats below the middle, under which rounding of a likelihood may look like a tail
NUMBERS_END, HUGE = 3.0, math.log(1e15)  # spreads; change of a log value, beyond which numbers may end
SAME, ALIKE, SMALL = 16, 1e-3, 0.1  # changes agree up to: last digits of a log density, a share of them; nats at most
MOST, UP_TO = 32, 100  # coordinates that are looked at; dimensions, for Hessians
HESSIANS = 2e7  # numbers that are worked on at once
TICKS, NEWTON = 60, 4
FARTHEST, RIDGE = 6.0, 1e-12  # spreads of draws, to which others are cut; added to the diagonal of a correlation matrix


class _Held:
    """A log density of points with the number of a coordinate behind them, along which no path is to move."""

    def __init__(self, density: LogDensity, *, recorded: bool) -> None:
        self.density, self._evaluate = density, density.value_and_grad if recorded else density.unrecorded
        self.dim, self.numbers, self.written = density.dim + 1, density.numbers, density.written

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log densities (S,) and gradients (S, D + 1), zero at the coordinate that is held and at its number."""
        value, grad = self._evaluate(z[:, :-1])
        grad = torch.cat([grad, torch.zeros_like(grad[:, :1])], 1)
        return value, grad.scatter(1, z[:, -1:].long(), 0.0)


@torch.no_grad()
def improper_tails(density: LogDensity, draw: Callable[[], Tensor], *, seed: int) -> list[str]:
    """Return a sentence on the first coordinate with an improper prior along which the tails tell of no integral.

    ``draw`` gives draws (S, D) that tell where the posterior is, and how wide; it is called if a prior is improper.

    Cost: four climbs of up to 60 gradients for each such coordinate, and four Hessians.
    """
    found = _coordinates(density)[:MOST]
    if not found or not density.batched or density.dim > UP_TO:
        return []
    with seeded(derive(seed, "the tails of improper priors"), density.device):
        z = draw().to(density.device, density.dtype)
    z = z[torch.isfinite(z).all(1)]
    if len(z) <= 1:
        return []
    tails = _Tails(density, z)
    slow = tails.fall_too_slowly([coordinate for coordinate, *_ in found])
    for (coordinate, name, label), too_slow in zip(found, slow, strict=True):
        if too_slow or _ends_numbers(density, coordinate, name, tails):
            return [_said(name, label)]
    return []


def _said(name: str, label: str) -> str:
    return (
        f"the posterior seems to have no finite integral: along {label}, whose prior is improper, its density "
        f"falls no faster than one over the distance. Give {name!r} a proper prior"
    )


def _coordinates(density: LogDensity) -> list[tuple[int, str, str]]:
    """Return number, site and label of each coordinate without a proper prior."""
    return [
        (latent.offset + number, latent.name, latent.name if latent.size == 1 else f"a coordinate of {latent.name}")
        for latent in density.structure.latents
        for number in latent.improper
    ]


class _Tails:
    """Log marginal densities far out, each at a place where one coordinate is held.

    Places are counted from the median of draws (S, D), in units of their spread.
    """

    def __init__(self, density: LogDensity, z: Tensor) -> None:
        self.density, self.other = density, z[-1]
        self.middle, self.spread = z.median(0).values, spread_of(z)
        scaled = ((z - self.middle) / self.spread).double().clamp(-FARTHEST, FARTHEST)
        products = scaled.mT @ scaled / len(z)
        inverse = torch.linalg.inv(products + RIDGE * torch.eye(density.dim, dtype=products.dtype, device=z.device))
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
                slow[number] = _has_slow_side(found)
        return slow

    def masses(self, coordinates: list[int], steps: Sequence[float], *, recorded: bool = True) -> list[Tensor]:
        """Return log marginals (N) of each coordinate: in the middle, so many spreads above it, and below it.

        NaN stands for what is not known. Without ``recorded``, no graph is checked at places so far out.
        """
        found = self.alone(coordinates, steps)
        others = [number for number, masses in enumerate(found) if masses is None]
        if others:
            climbed = self._climbed([coordinates[number] for number in others], steps, recorded=recorded)
            for number, masses in zip(others, climbed, strict=True):
                found[number] = masses
        return [masses for masses in found if masses is not None]

    def alone(self, coordinates: list[int], steps: Sequence[float]) -> list[Tensor | None]:
        """Return log marginals as :meth:`masses` does, of coordinates that nothing depends on; None for the others."""
        pairs = zip(*(self._heights(base, coordinates, steps) for base in (self.middle, self.other)), strict=True)
        return [own if _agree(own, other, self.middle.dtype) else None for own, other in pairs]

    def _heights(self, base: Tensor, coordinates: list[int], steps: Sequence[float]) -> Tensor:
        """Return log densities (K, N) where one coordinate is moved away from the middle, all others are as in base."""
        points, _ = self._places(base, coordinates, steps)
        return self.density(points).double().view(len(coordinates), -1)

    def _places(self, base: Tensor, coordinates: list[int], steps: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return points (K N, D), and which coordinate of each is held away from the middle."""
        held = torch.tensor(coordinates, device=base.device).repeat_interleave(1 + 2 * len(steps))
        distances = base.new_tensor([0.0, *steps, *(-step for step in steps)]).repeat(len(coordinates))
        values = self.middle[held] + distances * self.spread[held]
        return base.repeat(len(held), 1).scatter(1, held[:, None], values[:, None]), held

    def _climbed(self, coordinates: list[int], steps: Sequence[float], *, recorded: bool) -> list[Tensor]:
        """Return log marginals by the top over all other coordinates, and a normal distribution there.

        Paths begin with the others in the middle, or where they are on average, given the one that is held.
        """
        density = _Held(self.density, recorded=recorded)
        points, held = self._places(self.middle, coordinates, steps)
        away = (points.gather(1, held[:, None]) - self.middle[held, None]) / self.spread[held, None]
        led = self.middle + self.spread * self.slopes[:, held].mT * away
        led = led.scatter(1, held[:, None], points.gather(1, held[:, None]))
        heights = torch.stack([self.density(each).nan_to_num(nan=-torch.inf) for each in (points, led)])
        points = torch.where((heights[1] > heights[0])[:, None], led, points)
        usable = (heights.amax(0) > -torch.inf).nonzero()[:, 0]
        masses = torch.full((len(held),), torch.nan, dtype=torch.float64, device=points.device)
        if len(usable):
            points = torch.cat([points, held[:, None].to(points)], 1)[usable]
            units = torch.cat([self.units, self.units.new_ones(1)]).expand_as(points)
            ends = climb(density, points, units, ticks=TICKS)
            noisy = self._noise(ends.points) >= SMALL
            masses[usable] = _normal_masses(density, ends.points, ends.settled).masked_fill(noisy, torch.nan)
        return list(masses.view(len(coordinates), -1))

    def _noise(self, points: Tensor) -> Tensor:
        """Return by how much log densities change where each coordinate changes by its last digit."""
        heights = [self.density(each[:, :-1]) for each in (points, torch.nextafter(points, points + 1.0))]
        return (heights[1] - heights[0]).abs()


def _normal_masses(density: _Held, points: Tensor, settled: Tensor) -> Tensor:
    """Return log masses of normal distributions over all coordinates but the one held; NaN where there is none.

    Paths that have not settled take some steps of Newton's method: in the neck of a funnel, units are others than far
    from it. They are at the top where one more step would gain next to nothing.
    """
    masses = torch.full((len(points),), torch.nan, dtype=torch.float64, device=points.device)
    left = torch.arange(len(points), device=points.device)
    for _ in range(NEWTON):
        height, grad = density.value_and_grad(points)
        roots = _roots(density.density, points[:, :-1], points[:, -1].long())
        slope = grad[:, :-1, None].double()
        step = torch.cholesky_solve(slope, roots.nan_to_num(nan=1.0))
        known = (settled | ((slope * step).sum((1, 2)) / 2.0 < SMALL)) & ~roots.isnan().any(2).any(1)
        masses[left[known]] = (height.double() - roots.diagonal(dim1=1, dim2=2).log().sum(1))[known]
        moved = points + torch.cat([step[:, :, 0].to(points), torch.zeros_like(points[:, -1:])], 1)
        going = ~known & (density.value_and_grad(moved)[0] > height)
        if not bool(going.any()):
            break
        points, left, settled = moved[going], left[going], settled[going]
    return masses


def _agree(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether log densities (N) change alike from the first on, as far as numbers of their type tell."""
    error = SAME * torch.finfo(dtype).eps * float(torch.stack([one[0], other[0]]).abs().amax())
    change, known = one - one[0], one.isfinite() & other.isfinite()
    same = (change - (other - other[0])).abs() <= error + ALIKE * change.abs()
    return error < SMALL and bool(torch.where(known, same, one.isfinite() == other.isfinite()).all())


def _has_slow_side(masses: Tensor) -> bool:
    """Whether masses fall too slowly on one side: of the middle, then of places on one side and on the other."""
    return any(_is_slow(masses[0], side) for side in masses[1:].chunk(2))


def _is_slow(middle: Tensor, masses: Tensor) -> bool:
    """Whether all falls that are known between two neighbors are too slow, and the first place is not too far down."""
    falls = masses[:-1] - masses[1:]
    falls = falls[~falls.isnan()]
    too_low = bool(middle - masses[0] > LOWEST)  # no comparison holds of what is not known
    return len(falls) > 0 and bool((falls < math.log(2.0)).all()) and not too_low


def _roots(density: LogDensity, points: Tensor, held: Tensor) -> Tensor:
    """Return roots (K, D, D) of Hessians over all coordinates but the one held; NaN where there is none."""
    many = int(max(1, HESSIANS // (density.dim * max(1, density.numbers))))
    hessians = torch.cat([-second_derivatives(density, part).double() for part in points.split(many)])
    rows = torch.arange(len(held), device=held.device)
    hessians[rows, held] = 0.0
    hessians[rows, :, held] = 0.0
    hessians[rows, held, held] = 1.0
    roots, faults = torch.linalg.cholesky_ex(0.5 * (hessians + hessians.mT))
    return torch.where((faults == 0)[:, None, None], roots, torch.nan)


def _ends_numbers(density: LogDensity, coordinate: int, name: str, tails: _Tails) -> bool:
    """Whether draws go about until the numbers of the model end, where no density can be told any more."""
    points = tails.middle.repeat(3, 1)
    points[:, coordinate] += points.new_tensor([0.0, NUMBERS_END, -NUMBERS_END]) * tails.spread[coordinate]
    numbers = density.constrain(points)[name].double().abs().reshape(len(points), -1)
    if not bool(numbers[0].isfinite().all()):
        return True
    values = numbers.log()
    change = (values[1:] - values[0]).abs()
    beyond = torch.isfinite(values[0]) & ~(change <= HUGE)
    return bool((beyond.any(1) & ~torch.isfinite(density(points[1:]))).any())
