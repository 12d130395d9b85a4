r"""The units of a sampler's moves: a scale for each coordinate, and a few directions that are longer or shorter.

Points are :math:`x = S\,(I + U (R - 1) U^\top)\,y`, with scales S, orthonormal directions U and their lengths R; in y
the posterior is to be as wide in each direction. Both draws and gradients of the log density tell of it: for a normal
distribution, the covariance of the gradients is the inverse of that of the draws. Long directions show in the draws,
short ones in the gradients. In the space spanned by both, the covariance :math:`\Sigma` is the one with
:math:`\Sigma\, G\, \Sigma = C`, where C and G are the covariances of draws and gradients there.

Reference: nutpie's low-rank adaptation (Seyboldt et al. 2026, arXiv 2603.18845), which does so for a single chain.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MOST_DIM = 1200  # dimensions up to which directions are looked for: an eigendecomposition takes the cube of them
APART_FROM_ONE = 1.2  # a direction is kept if draws and gradients together say a variance above it, or below 1 / 1.2
SCALES = 0.01, 100.0


class Metric(NamedTuple):
    """Scales (D,), directions (D, K) and their lengths (K,)."""

    scale: Tensor
    axes: Tensor
    roots: Tensor

    @classmethod
    def of(cls, scale: Tensor) -> Metric:
        """Return the metric with a scale for each coordinate and no directions."""
        return cls(scale, scale.new_zeros(len(scale), 0), scale.new_zeros(0))

    def out(self, y: Tensor) -> Tensor:
        """Return x of steps or points y (C, D)."""
        return self.scale * self._stretched(y, self.roots)

    def back(self, slope: Tensor) -> Tensor:
        """Return the gradient with respect to y of one with respect to x (C, D)."""
        return self._stretched(self.scale * slope, self.roots)

    def units(self, x: Tensor) -> Tensor:
        """Return y of points x (C, D)."""
        return self._stretched(x / self.scale, 1.0 / self.roots)

    def _stretched(self, y: Tensor, by: Tensor) -> Tensor:
        return y + ((y @ self.axes) * (by - 1.0)) @ self.axes.mT if len(by) else y


def scale_of(x: Tensor) -> Tensor:
    """Return a scale for each coordinate (D,) from points of all chains (N, D): robust, and within a factor of 100."""
    return _spread(x).nan_to_num(nan=1.0).clamp(*SCALES).to(x.dtype)


def _spread(x: Tensor) -> Tensor:
    low, high = (torch.quantile(x.double(), level, dim=0) for level in (0.159, 0.841))
    return 0.5 * (high - low)


def learned(x: Tensor, slope: Tensor) -> Metric:
    """Return the metric of points (N, D) of all chains and the gradients of the log density there (N, D)."""
    if not 1 < x.shape[1] <= MOST_DIM:
        return Metric.of(scale_of(x))
    scale = (_spread(x) / _spread(slope)).sqrt().nan_to_num(nan=1.0, posinf=SCALES[1])  # a long direction is in both
    scale = scale.clamp(*SCALES).to(x.dtype)
    units = scale.double()
    y, h = x.double() / units, slope.double() * units
    usable = torch.isfinite(y).all(1) & torch.isfinite(h).all(1)
    if int(usable.sum()) < 2:
        return Metric.of(scale)
    draws, slopes = (torch.cov(part[usable].mT, correction=0) for part in (y, h))
    # a long direction has twice the variance, and more than noise alone comes to: half of the draws are independent
    edge = max(2.0, (1.0 + math.sqrt(x.shape[1] / (0.5 * len(y)))) ** 2)
    both = torch.cat([_longest(draws, edge), _longest(slopes, edge)], 1)
    if not both.shape[1]:
        return Metric.of(scale)
    basis = torch.linalg.qr(both).Q
    inside = _between(basis.mT @ draws @ basis, basis.mT @ slopes @ basis)
    if not bool(torch.isfinite(inside).all()):
        return Metric.of(scale)
    values, turned = torch.linalg.eigh(inside)
    values = values.clamp(1e-6, 1e6)
    kept = values.log().abs() > math.log(APART_FROM_ONE)  # noise shows in draws or in gradients, not in both
    values, turned = values[kept], turned[:, kept]
    return Metric(scale, (basis @ turned).to(x), values.sqrt().to(x))


def _longest(covariance: Tensor, edge: float) -> Tensor:
    """Return the directions (D, K) of the largest variances, those above ``edge``, 50 at most."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors[:, (values > edge).nonzero()[:, 0][-50:]]


def _between(draws: Tensor, slopes: Tensor) -> Tensor:
    """Return the matrix M with M slopes M = draws: the geometric mean of ``draws`` and the inverse of ``slopes``."""
    root, inverse = _roots(slopes)
    return inverse @ _roots(root @ draws @ root)[0] @ inverse


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root and the inverse root of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(1e-12 * float(values.max().clamp_min(torch.finfo(values.dtype).tiny)))
    return vectors * values.sqrt() @ vectors.mT, vectors * values.rsqrt() @ vectors.mT
