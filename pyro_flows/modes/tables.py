"""A marginal density as a table, from a grid of conditional Laplace approximations; and the flow of the grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.parts import of_grid
from pyro_flows.transforms.splines import between, smooth_slopes

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
