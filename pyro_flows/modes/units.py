"""The scales of draws: units in which paths are measured."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MATRICES_UP_TO = 100  # dimensions, for full units and for Hessians at hundreds of places
LEVEL = 2.0  # nats: heights that differ by less are one level, and a valley that is deeper is a barrier
SAME = 0.5  # of :func:`unit_of_modes`: places nearer than that are one mode


def units_of(z: Tensor, *, full: bool = True) -> Tensor:
    """Return the scale of draws (S, D): the Cholesky factor of their covariance where there are enough, or their sds.

    Sds (D,) only, unless ``full``.
    """
    if full and z.shape[1] <= MATRICES_UP_TO and len(z) > 4 * z.shape[1]:
        root, fault = torch.linalg.cholesky_ex(torch.cov(z.mT.double()).reshape(z.shape[1], z.shape[1]))
        if int(fault) == 0 and bool(torch.isfinite(root).all()):
            return root.to(z.dtype)
    spread = z.std(0) if len(z) > 1 else torch.ones_like(z[0])
    return torch.where((spread > 0.0) & torch.isfinite(spread), spread, 1.0)


def in_units(points: Tensor, units: Tensor) -> Tensor:
    """Return points (..., S, D) in units that are sds (..., D) or lower triangular matrices (..., D, D)."""
    if units.dim() < points.dim():
        return points / units.unsqueeze(-2)
    return torch.linalg.solve_triangular(units, points.mT, upper=False).mT


def unit_of_modes(dim: int, *, ridges: bool = False) -> float:
    """Return the standard deviations that distances of modes are counted in: the root of the dimension, and at most 2.

    Two modes of a hundred dimensions may differ in one of them. Points of a ridge do so in all.
    """
    return math.sqrt(dim if ridges else min(dim, 4))


def factors(ends: tuple[float, float], noise: Tensor) -> Tensor:
    """Factors (N, 1) whose logarithms are uniform between two ends."""
    low, high = (math.log(end) for end in ends)
    return (low + (high - low) * torch.rand_like(noise[:, :1])).exp()
