"""Densities of one or two numbers on fine grids: log masses, and independent draws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from benchmarks.zoo.case import Array

COARSE, FINE = 4001, 8001  # points in one dimension
COARSE2, FINE2 = 161, 401  # points along each axis in two
DROP = 35.0  # nats below the maximum that no longer count


class Grid:
    """n independent numbers, each with a density on an interval.

    Args:
        log_density: numbers (m, n) -> log densities (m, n), up to nothing: their integrals are the masses. It is -inf
            where there is none.
        low, high: the intervals, numbers or (n,); the density is looked for on a coarse grid, then on a fine one where
            it counts.
    """

    def __init__(self, log_density: Callable[[Array], Array], low: ArrayLike, high: ArrayLike, n: int = 1) -> None:
        first: Array = np.broadcast_to(np.asarray(low, dtype=float), (n,))
        last: Array = np.broadcast_to(np.asarray(high, dtype=float), (n,))
        for points in (COARSE, FINE, FINE):
            x = first + (last - first) * np.linspace(0.0, 1.0, points)[:, None]
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                values = np.broadcast_to(log_density(x), x.shape)
            values = np.where(np.isnan(values), -np.inf, values)
            counts = values > values.max(0) - DROP
            below = np.maximum(counts.argmax(0) - 1, 0)
            above = np.minimum(points - counts[::-1].argmax(0), points - 1)
            each = np.arange(n)
            first, last = x[below, each], x[above, each]
        self.n = n
        top = values.max(0)
        density = np.exp(values - top)
        pieces = 0.5 * (density[1:] + density[:-1]) * np.diff(x, axis=0)
        self._cdf = np.concatenate([np.zeros((1, n)), pieces.cumsum(0)])
        self.log_masses: Array = np.log(self._cdf[-1]) + top
        self._x = x

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        """Return draws (count, n)."""
        u = rng.random((count, self.n)) * self._cdf[-1]
        found = np.empty((count, self.n))
        for i in range(self.n):
            found[:, i] = np.interp(u[:, i], self._cdf[:, i], self._x[:, i])
        return found


class Grid2:
    """Two numbers with a joint density on a rectangle: ``log_density(a (m, 1), b (1, m))`` gives (m, m)."""

    def __init__(
        self, log_density: Callable[[Array, Array], Array], low: tuple[float, float], high: tuple[float, float]
    ) -> None:
        for points in (COARSE2, FINE2, FINE2):
            axes = [np.linspace(low[k], high[k], points) for k in range(2)]
            values = log_density(axes[0][:, None], axes[1][None])
            values = np.where(np.isnan(values), -np.inf, values)
            counts = values > values.max() - DROP / 2
            bounds = []
            for k in range(2):
                along = np.flatnonzero(counts.any(1 - k))
                bounds.append((max(along[0] - 1, 0), min(along[-1] + 1, points - 1)))
            low = (float(axes[0][bounds[0][0]]), float(axes[1][bounds[1][0]]))
            high = (float(axes[0][bounds[0][1]]), float(axes[1][bounds[1][1]]))
        self._axes = axes
        self._steps = [float(axis[1] - axis[0]) for axis in axes]
        weights = np.exp(values - values.max())
        self.log_mass = float(np.log(weights.sum() * self._steps[0] * self._steps[1]) + values.max())
        self._cdf = weights.ravel().cumsum()

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Return draws (count,) of each: a point of the grid, and a step of a triangular density about it."""
        cells = np.searchsorted(self._cdf, rng.random(count) * self._cdf[-1], side="right")
        a, b = np.unravel_index(np.minimum(cells, len(self._cdf) - 1), (len(self._axes[0]), len(self._axes[1])))
        shifts = [step * (rng.random(count) - rng.random(count)) for step in self._steps]
        return self._axes[0][a] + shifts[0], self._axes[1][b] + shifts[1]
