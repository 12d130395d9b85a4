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
from pyro_flows.model.sites import improper_sites
from pyro_flows.starts.curvature import second_derivatives
from pyro_flows.starts.pathfinder import climb
from pyro_flows.starts.prior import spread_of

STEPS = tuple(6.0 * 2.0**power for power in range(8))  # spreads from the middle, at which marginals are looked at
LOWEST = 12.0  # nats below the middle, under which rounding of a likelihood may look like a tail
NUMBERS_END, HUGE = 3.0, math.log(1e15)  # spreads; change of a log value, beyond which numbers may end
MOST, UP_TO = 32, 100  # coordinates that are looked at; dimensions, for Hessians
HESSIANS = 2e7  # numbers that are worked on at once
TICKS = 60


class _Held:
    """A log density of points with the number of a coordinate behind them, along which no path is to move."""

    def __init__(self, density: LogDensity, *, recorded: bool) -> None:
        self._evaluate = density.value_and_grad if recorded else density.unrecorded
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
    sites = improper_sites(density.structure)
    if not sites or not density.batched or density.dim > UP_TO:
        return []
    with seeded(derive(seed, "the tails of improper priors"), density.device):
        z = draw().to(density.device, density.dtype)
    z = z[torch.isfinite(z).all(1)]
    if len(z) <= 1:
        return []
    middle, spread = z.median(0).values, spread_of(z)
    found = _coordinates(density, sites)[:MOST]
    tails = _Tails(density, middle, spread)
    slow = tails.fall_too_slowly([coordinate for coordinate, *_ in found])
    for (coordinate, name, label), too_slow in zip(found, slow, strict=True):
        if too_slow or _ends_numbers(density, coordinate, name, middle, spread):
            return [
                f"the posterior seems to have no finite integral: along {label}, whose prior is improper, its density "
                f"falls no faster than one over the distance. Give {name!r} a proper prior"
            ]
    return []


def _coordinates(density: LogDensity, sites: list[str]) -> list[tuple[int, str, str]]:
    """Return number, site and label of each coordinate of these sites."""
    return [
        (latent.offset + number, latent.name, latent.name if latent.size == 1 else f"a coordinate of {latent.name}")
        for latent in density.structure.latents
        if latent.name in sites
        for number in range(latent.size)
    ]


class _Tails:
    """Log marginal densities far out, each at a place where one coordinate is held."""

    def __init__(self, density: LogDensity, middle: Tensor, spread: Tensor) -> None:
        self.density, self.middle, self.spread = density, middle, spread

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
        held = torch.tensor(coordinates, device=self.middle.device).repeat_interleave(1 + 2 * len(steps))
        distances = self.middle.new_tensor([0.0, *steps, *(-step for step in steps)]).repeat(len(coordinates))
        away = distances * self.spread[held]
        points = self.middle.repeat(len(held), 1).scatter_add(1, held[:, None], away[:, None])
        points = torch.cat([points, held[:, None].to(points)], 1)
        masses = torch.full((len(held),), torch.nan, dtype=torch.float64, device=self.middle.device)
        density = _Held(self.density, recorded=recorded)
        usable = torch.isfinite(density.value_and_grad(points)[0]).nonzero()[:, 0]
        if len(usable):
            units = torch.cat([self.spread, self.spread.new_ones(1)]).expand_as(points[usable])
            ends = climb(density, points[usable], units, ticks=TICKS)
            known = usable[ends.settled]
            roots = _log_roots(self.density, ends.points[ends.settled][:, :-1], held[known])
            masses[known] = ends.heights[ends.settled].double() - roots
        return list(masses.view(len(coordinates), -1))


def _has_slow_side(masses: Tensor) -> bool:
    """Whether masses fall too slowly on one side: of the middle, then of places on one side and on the other."""
    return any(_is_slow(masses[0], side) for side in masses[1:].chunk(2))


def _is_slow(middle: Tensor, masses: Tensor) -> bool:
    """Whether all falls that are known between two neighbors are too slow, and the first place is not too far down."""
    falls = masses[:-1] - masses[1:]
    falls = falls[~falls.isnan()]
    too_low = bool(middle - masses[0] > LOWEST)  # no comparison holds of what is not known
    return len(falls) > 0 and bool((falls < math.log(2.0)).all()) and not too_low


def _log_roots(density: LogDensity, points: Tensor, held: Tensor) -> Tensor:
    """Return halves of the log determinants (K,) of Hessians over all coordinates but one; NaN where there is none."""
    if density.dim == 1 or not len(points):
        return torch.zeros(len(points), dtype=torch.float64, device=points.device)
    many = int(max(1, HESSIANS // (density.dim * max(1, density.numbers))))
    hessians = torch.cat([-second_derivatives(density, part).double() for part in points.split(many)])
    rows = torch.arange(len(held), device=held.device)
    hessians[rows, held] = 0.0
    hessians[rows, :, held] = 0.0
    hessians[rows, held, held] = 1.0
    roots, faults = torch.linalg.cholesky_ex(0.5 * (hessians + hessians.mT))
    return torch.where(faults == 0, roots.diagonal(dim1=1, dim2=2).log().sum(1), torch.nan)


def _ends_numbers(density: LogDensity, coordinate: int, name: str, middle: Tensor, spread: Tensor) -> bool:
    """Whether draws go about until the numbers of the model end, where no density can be told any more."""
    points = middle.repeat(3, 1)
    points[:, coordinate] += middle.new_tensor([0.0, NUMBERS_END, -NUMBERS_END]) * spread[coordinate]
    values = density.constrain(points)[name].double().abs().reshape(len(points), -1).log()
    change = (values[1:] - values[0]).abs()
    beyond = torch.isfinite(values[0]) & ~(change <= HUGE)
    return bool((beyond.any(1) & ~torch.isfinite(density(points[1:]))).any())
