"""Conditional modes: maxima over all coordinates but one, which is fixed, Hessians there, and tables of such grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.parts import of_grid
from pyro_flows.inference.starts.climb import FEW_TICKS, NEWTON, climb
from pyro_flows.inference.starts.curvature import second_derivatives
from pyro_flows.inference.starts.prior import spread_of
from pyro_flows.model.log_density import LogDensity
from pyro_flows.transforms.splines import between, smooth_slopes

NEGLIGIBLE_GAIN = 0.1  # nats
NUMBERS_AT_ONCE = 2e7  # in Hessians that are computed together
MODE_REACHES = 6.0  # units: draws are cut there, and beyond, a tail begins, and another top is apart


class Held:
    """A log density of points with the number of a coordinate behind them, along which no path is to move."""

    def __init__(self, density: LogDensity) -> None:
        self.density, self.dim, self.numbers, self.written = density, density.dim + 1, density.numbers, density.written

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log densities (S,) and gradients (S, D + 1), zero at the coordinate that is held and at its number."""
        value, grad = self.density.value_and_grad(z[:, :-1])
        grad = torch.cat([grad, torch.zeros_like(grad[:, :1])], 1)
        return value, grad.scatter(1, z[:, -1:].nan_to_num(nan=0.0).long(), 0.0)


class Tops(NamedTuple):
    """Tops over all coordinates but the one held (K, D + 1), and roots (K, D, D) of Hessians, NaN where there is none.

    Hessians are those where the last step of Newton's method began, which gains next to nothing. Their roots are the
    identity along the coordinate that is held.
    """

    points: Tensor
    roots: Tensor


def tops_at(density: Held, points: Tensor, settled: Tensor) -> Tops:
    """Return the tops at points (K, D + 1).

    Paths that have not settled take some steps of Newton's method: in the neck of a funnel, units are others than far
    from it. They are at the top where one more step would gain next to nothing.
    """
    left = torch.arange(len(points), device=points.device)
    height, grad = density.value_and_grad(points)
    size = len(points), density.dim - 1, density.dim - 1
    tops = Tops(points.clone(), points.new_full(size, torch.nan, dtype=torch.float64))
    for _ in range(NEWTON):
        roots = _roots(density.density, points[:, :-1], points[:, -1].long())
        usable, slope = ~roots.isnan().any(2).any(1), grad[:, :-1, None].double()
        step = torch.cholesky_solve(slope, roots.nan_to_num(nan=1.0))
        known = usable & (settled | ((slope * step).sum((1, 2)) / 2.0 < NEGLIGIBLE_GAIN))
        moved = points + torch.cat([step[:, :, 0].to(points), torch.zeros_like(points[:, -1:])], 1)
        above, slopes = density.value_and_grad(moved)
        better = above > height
        tops.points[left[known]] = torch.where(better[:, None], moved, points)[known]
        tops.roots[left[known]] = roots[known]
        going = usable & ~known & better
        if not bool(going.any()):
            break
        points, left, settled, height, grad = (each[going] for each in (moved, left, settled, above, slopes))
    return tops


def hessians(density: LogDensity, points: Tensor, *, exact: bool = False) -> Tensor:
    """Return Hessians (K, D, D) of -log p, in pieces that fit into the memory."""
    many = int(max(1, NUMBERS_AT_ONCE // (density.dim * max(1, density.numbers))))
    return torch.cat([-second_derivatives(density, part, exact=exact).double() for part in points.split(many)])


def _roots(density: LogDensity, points: Tensor, held: Tensor) -> Tensor:
    """Return roots (K, D, D) of Hessians over all coordinates but the one held; NaN where there is none."""
    curvatures = hessians(density, points)
    roots = roots_across(curvatures, held)
    pivots = roots.diagonal(dim1=1, dim2=2).square() / curvatures.diagonal(dim1=1, dim2=2)
    level = (pivots < 1e-6).any(1).nonzero()[:, 0]  # little is left given other coordinates: last digits decide
    if len(level):
        roots = roots.index_copy(0, level, roots_across(hessians(density, points[level], exact=True), held[level]))
    return roots


def roots_across(hessians: Tensor, held: Tensor) -> Tensor:
    """Return roots (K, D, D) of Hessians, changed to the identity along the one held (K,); NaN if there is none."""
    rows = torch.arange(len(held), device=held.device)
    hessians[rows, held] = 0.0
    hessians[rows, :, held] = 0.0
    hessians[rows, held, held] = 1.0
    roots, faults = torch.linalg.cholesky_ex(0.5 * (hessians + hessians.mT))
    return torch.where((faults == 0)[:, None, None], roots, torch.nan)


class Tails:
    """Log marginal densities far out, each at a place where one coordinate is held.

    Places are counted from the draw (of S, D) that is next to their medians, in units of their spread: the point of all
    medians may lie off a ridge.
    """

    def __init__(self, density: LogDensity, z: Tensor) -> None:
        self.density = density
        self.spread = spread_of(z)
        scaled = ((z - z.median(0).values) / self.spread).double().clamp(-MODE_REACHES, MODE_REACHES)
        self.middle = z[scaled.square().sum(1).argmin()]
        products = scaled.mT @ scaled / len(z)
        inverse = torch.linalg.inv_ex(products + 1e-12 * torch.eye(density.dim).to(products)).inverse
        self.slopes = (products / products.diagonal()).nan_to_num(nan=0.0).to(z.dtype)
        self.units = self.spread * inverse.diagonal().rsqrt().nan_to_num(nan=1.0).clamp(max=1.0).to(z.dtype)

    def tops(self, coordinates: list[int], steps: Sequence[float]) -> Tops:
        """Return tops over all other coordinates, a coordinate after the other.

        Paths begin with the others in the middle, or where they are on average, given the one that is held.
        """
        density = Held(self.density)
        held = torch.tensor(coordinates, device=self.middle.device).repeat_interleave(1 + 2 * len(steps))
        distances = self.middle.new_tensor([0.0, *steps, *(-step for step in steps)]).repeat(len(coordinates))[:, None]
        there = self.middle[held, None] + distances * self.spread[held, None]
        others = self.middle.expand(len(held), -1), self.middle + self.spread * self.slopes[:, held].mT * distances
        points, led = (each.scatter(1, held[:, None], there) for each in others)
        heights = torch.stack([self.density(each) for each in (points, led)])
        points = torch.where((heights[1] > heights[0].nan_to_num(nan=-torch.inf))[:, None], led, points)
        points = torch.cat([points, held[:, None].to(points)], 1)
        size = len(points), self.density.dim, self.density.dim
        found = Tops(points, points.new_full(size, torch.nan, dtype=torch.float64))
        usable = heights.isfinite().any(0).nonzero()[:, 0]
        if len(usable):
            units = torch.cat([self.units, self.units.new_ones(1)]).expand(len(usable), -1)
            ends = climb(density, points[usable], units, ticks=FEW_TICKS)
            known = ends.points.isfinite().all(1)
            known[known.clone()] = self._noise(ends.points[known][:, :-1]) < NEGLIGIBLE_GAIN
            usable = usable[known]
        if len(usable):
            tops = tops_at(density, ends.points[known], ends.settled[known])
            for whole, part in zip(found, tops, strict=True):
                whole[usable] = part
        return found

    def _noise(self, points: Tensor) -> Tensor:
        """Return by how much log densities change where coordinates change by their last digits, alike or not."""
        odd = (1.0 - 2.0 * (torch.arange(points.shape[1]) % 2)).to(points).expand_as(points)
        moved = [torch.nextafter(points, signs * torch.inf) for signs in (torch.ones_like(points), odd)]
        here, *heights = (self.density(each) for each in (points, *moved))
        return torch.stack([(height - here).abs() for height in heights]).amax(0)


# a marginal density as a table, from a grid of conditional modes; and the flow of the grid ----------------------------

POINTS = 4001  # at which the density is tabulated
DF = 30.0  # degrees of freedom of the base of a flow, times a factor
OUTSIDE = 1e-4  # share of the mass that may lie beyond the ends of a flow's table


@dataclass(frozen=True)
class Table:
    """Grid points of a coordinate: places (N,), rising, log masses (N,), tops (N, D), roots of Hessians (N, D, D)."""

    coordinate: int
    places: Tensor
    log_masses: Tensor
    tops: Tensor
    roots: Tensor

    def density(self) -> tuple[Tensor, Tensor]:
        """Return values of the coordinate (G,), as many between any two places, and normalized log densities there."""
        height, each = self.log_masses - self.log_masses.max(), POINTS // (len(self.places) - 1)
        parts = self.places[:-1, None] + self.places.diff()[:, None] * torch.arange(each).to(self.places) / each
        grid = torch.cat([parts.flatten(), self.places[-1:]])
        slopes = smooth_slopes(self.places, height, limited=True)
        height = between(grid, self.places, height[:, None], slopes[:, None])[:, 0]
        return grid, height - torch.trapezoid(height.exp(), grid).log()

    @property
    def log_evidence(self) -> float:
        """Log of the integral of the density, nats: masses are those of grid points over (2 pi)^((D - 1) / 2)."""
        highest = self.log_masses.max()
        within = torch.trapezoid((self.log_masses - highest).exp(), self.places).log() + highest
        return float(within) + 0.5 * (self.tops.shape[1] - 1) * math.log(2.0 * math.pi)

    def beyond(self) -> float:
        """Return the share of the mass beyond the ends, if the density falls on as it does there; infinite if not."""
        return sum(self.beyond_each())

    def beyond_each(self) -> tuple[float, float]:
        """Return that share below the first place, and above the last one."""
        grid, height = self.density()
        low, high = ((height[1] - height[0]) / (grid[1] - grid[0]), (height[-2] - height[-1]) / (grid[-1] - grid[-2]))
        pairs = (height[0], low), (height[-1], high)
        first, second = (float(end.exp() / fall) if float(fall) > 0.0 else math.inf for end, fall in pairs)
        return first, second

    def below(self, values: Tensor) -> Tensor:
        """Return the share of the mass below some values (V,)."""
        grid, height = self.density()
        mass = height.exp()
        summed = torch.cat([mass[:1] * 0.0, torch.cumsum(0.5 * grid.diff() * (mass[1:] + mass[:-1]), 0)])
        summed = (summed / summed[-1])[:, None]
        return between(values.to(grid), grid, summed, torch.zeros_like(summed))[:, 0]


def covariance_roots(table: Table) -> Tensor:
    """Return lower triangular roots (N, D, D) of covariances of grid points, a one at their coordinate."""
    unit = torch.eye(table.tops.shape[1]).to(table.roots)
    inner = torch.linalg.solve_triangular(table.roots, unit, upper=False)
    return torch.linalg.cholesky_ex(inner.mT @ inner)[0]


@torch.no_grad()
def flow_along(table: Table, *, lighter: float = 1.0) -> Flow:
    """Return the flow of the grid; a factor of the base's degrees of freedom makes its tails lighter.

    Raises:
        ValueError: for a marginal that is too narrow for a table, or has mass beyond it: no draw would come there, and
            weights would not show it.
    """
    if not table.beyond() < OUTSIDE:
        raise ValueError("grid: expected a density that has fallen off at both ends.")
    places, height = table.density()
    df = DF * lighter
    return of_grid(table.coordinate, (places, height), table.places, table.tops, covariance_roots(table), df=df)
