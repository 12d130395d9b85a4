"""Tops of a density over all coordinates but one, which is held at places far from the middle of draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.held import SMALL, Held, Tops, tops_at
from pyro_flows.modes.propriety import FARTHEST
from pyro_flows.starts.climb import climb
from pyro_flows.starts.prior import spread_of

TICKS = 60
RIDGE = 1e-12  # added to the diagonal of a correlation matrix


class Tails:
    """Log marginal densities far out, each at a place where one coordinate is held.

    Places are counted from the draw (of S, D) that is next to their medians, in units of their spread: the point of all
    medians may lie off a ridge.
    """

    def __init__(self, density: LogDensity, z: Tensor) -> None:
        self.density = density
        self.spread = spread_of(z)
        scaled = ((z - z.median(0).values) / self.spread).double().clamp(-FARTHEST, FARTHEST)
        self.middle = z[scaled.square().sum(1).argmin()]
        products = scaled.mT @ scaled / len(z)
        inverse = torch.linalg.inv_ex(products + RIDGE * torch.eye(density.dim).to(products)).inverse
        self.slopes = (products / products.diagonal()).nan_to_num(nan=0.0).to(z.dtype)
        self.units = self.spread * inverse.diagonal().rsqrt().nan_to_num(nan=1.0).clamp(max=1.0).to(z.dtype)

    def tops(self, coordinates: list[int], steps: Sequence[float], *, recorded: bool) -> Tops:
        """Return tops over all other coordinates, a coordinate after the other.

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
        return found

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
