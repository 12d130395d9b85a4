r"""Whether a posterior with improper priors has a finite integral, as far as its tails tell.

With coordinate k held at c, the density over all others is about a normal one at its top, so that its mass is

.. math:: \log f(c) = \max_{z : z_k = c} \log p(z) - \tfrac12 \log |H_{-k}| + \text{const},

H the Hessian of -log p over the others. A finite integral asks for a marginal that falls faster than 1/c. The posterior
of a regression whose data are separated does not, nor that of a scale with too few data.

Reference: Hobert and Casella 1996, "The effect of improper priors on Gibbs sampling in hierarchical linear mixed
models" (JASA 91, doi:10.1080/01621459.1996.10476714): chains of an improper posterior may look as if all was well.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_flows._seeding import derive, seeded
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import improper_sites
from pyro_flows.starts.curvature import second_derivatives
from pyro_flows.starts.pathfinder import climb
from pyro_flows.starts.prior import spread_of
from pyro_flows.verdict.own_values import element

NEAR, FAR = 6.0, 12.0  # spreads from the middle between which the marginal has to fall
NUMBERS_END, HUGE = 3.0, 1e15  # spreads; values above it, or below one over it, are where numbers end
MOST, UP_TO = 32, 100  # coordinates that are looked at; dimensions, for Hessians
TICKS = 60


class _Held:
    """A log density of points with the number of a coordinate behind them, along which no path is to move."""

    def __init__(self, density: LogDensity) -> None:
        self.density = density
        self.dim, self.numbers, self.written = density.dim + 1, density.numbers, density.written

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log densities (S,) and gradients (S, D + 1), zero at the coordinate that is held and at its number."""
        value, grad = self.density.value_and_grad(z[:, :-1])
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
        z = draw().to(density.dtype)
    middle, spread = z.median(0).values, spread_of(z)
    found = _coordinates(density, sites)[:MOST]
    slow = _fall_too_slowly(density, [coordinate for coordinate, *_ in found], middle, spread)
    for (coordinate, name, label), too_slow in zip(found, slow, strict=True):
        if too_slow or _ends_numbers(density, coordinate, name, middle, spread):
            return [
                f"the posterior seems to have no finite integral: along {label}, whose prior is improper, its density "
                f"falls no faster than one over the distance. Give {name!r} a proper prior"
            ]
    return []


def _coordinates(density: LogDensity, sites: list[str]) -> list[tuple[int, str, str]]:
    """Return number, site and label of each coordinate of these sites."""
    found = []
    for latent in density.structure.latents:
        for number in range(latent.size if latent.name in sites else 0):
            index = () if latent.size == 1 else (number,)
            found.append((latent.offset + number, latent.name, element(latent.name, index)))
    return found


def _fall_too_slowly(density: LogDensity, coordinates: list[int], middle: Tensor, spread: Tensor) -> list[bool]:
    """Whether marginals (K) fall no faster than one over the distance, on one side, between two places far out."""
    held = torch.tensor(coordinates, device=middle.device).repeat_interleave(4)
    distances = middle.new_tensor([NEAR, FAR, -NEAR, -FAR]).repeat(len(coordinates))
    points = middle.repeat(len(held), 1)
    points = points.scatter_add(1, held[:, None], (distances * spread[held])[:, None])
    masses = torch.full((len(held),), torch.nan, dtype=torch.float64, device=middle.device)
    usable = torch.isfinite(density(points))
    if bool(usable.any()):
        points = torch.cat([points, held[:, None].to(points)], 1)[usable]
        units = torch.cat([spread, spread.new_ones(1)]).expand_as(points)
        ends = climb(_Held(density), points, units, ticks=TICKS)
        found = ends.heights.double() - _log_roots(density, ends.points[:, :-1], held[usable])
        masses[usable] = torch.where(ends.settled, found, torch.nan)
    near, far = masses.view(-1, 2, 2).unbind(-1)
    return (near - far < math.log(FAR / NEAR)).any(1).tolist()  # no comparison holds of what is not known


def _log_roots(density: LogDensity, points: Tensor, held: Tensor) -> Tensor:
    """Return halves of the log determinants (K,) of Hessians over all coordinates but one; NaN where there is none."""
    hessians = -second_derivatives(density, points).double()
    rows = torch.arange(len(held), device=held.device)
    hessians[rows, held] = 0.0
    hessians[rows, :, held] = 0.0
    hessians[rows, held, held] = 1.0
    roots, faults = torch.linalg.cholesky_ex(0.5 * (hessians + hessians.mT))
    return torch.where(faults == 0, roots.diagonal(dim1=1, dim2=2).log().sum(1), torch.nan)


def _ends_numbers(density: LogDensity, coordinate: int, name: str, middle: Tensor, spread: Tensor) -> bool:
    """Whether draws go about until the numbers of the model end, where no density can be told any more."""
    points = middle.repeat(2, 1)
    points[:, coordinate] += torch.tensor([1.0, -1.0]).to(middle) * NUMBERS_END * spread[coordinate]
    values = density.constrain(points)[name].abs().reshape(len(points), -1)
    beyond = ~torch.isfinite(values) | (values > HUGE) | (values < 1.0 / HUGE)
    return bool((beyond.any(1) & ~torch.isfinite(density(points))).any())
