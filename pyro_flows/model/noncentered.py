r"""Non-centered coordinates: a site's location and scale taken out, where they depend on other latents.

The coordinate u of an unconstrained value y with prior location m and scale s is (y - m) / s. What the data say about y
is taken out as well. With a precision t and a center c, as if c had been observed with variance 1 / t,

.. math:: y = m' + s' u, \qquad s'^{-2} = s^{-2} + t, \qquad m' = s'^2\,(m / s^2 + t\,c).

Given location and scale, u is then about standard normal, whatever they are. It is non-centered in the neck of a
funnel, where s is small, and centered where s is large. t = 0 is non-centered everywhere. For a multivariate normal
with covariance :math:`\Sigma = L L^\top` and precisions T (a diagonal), likewise
:math:`\Sigma'^{-1} = \Sigma^{-1} + T`.

This is the degree of centering of Gorinova, Moore and Hoffman 2020, "Automatic Reparameterisation of Probabilistic
Programs" (arXiv 1906.03028), made a function of the scale.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

ELEMENTWISE = (dist.Normal, dist.StudentT, dist.Laplace, dist.Cauchy, dist.Logistic, dist.Gumbel, dist.LogNormal)
WRAPPERS = (torch.distributions.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)


def location_scale(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Return location and scale of a location-scale distribution on the unconstrained scale, or None for any other.

    The scale has the location's shape, or is a lower triangular matrix over the last axis (multivariate normal).
    """
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    if isinstance(fn, ELEMENTWISE):
        return torch.broadcast_tensors(fn.loc, fn.scale)
    return (fn.loc, fn.scale_tril) if isinstance(fn, dist.MultivariateNormal) else None


@dataclass(frozen=True)
class Information:
    """What the data say of a site's unconstrained value: precisions and centers, each of its shape."""

    precision: Tensor
    center: Tensor

    @property
    def options(self) -> dict[str, Tensor]:
        """The same as :class:`LogDensity` takes it."""
        return {"precision": self.precision, "center": self.center}


def spread(fn: Any, x: Tensor, data: Information | None) -> tuple[Tensor, Tensor]:
    """Return the unconstrained value of coordinates ``x``, and the log determinant of each event of ``fn``."""
    middle, root, log_diagonal = _normal(fn, x, data)
    x = x.to(root.dtype)
    moved = middle + ((root @ x.unsqueeze(-1)).squeeze(-1) if root.dim() > middle.dim() else root * x)
    return moved, _summed(log_diagonal.expand(moved.shape), fn.event_dim)


def standardize(fn: Any, y: Tensor, data: Information | None) -> Tensor:
    """Return the coordinates of an unconstrained value ``y``: the inverse of :func:`spread`."""
    middle, root, _ = _normal(fn, y, data)
    if root.dim() > middle.dim():
        return torch.linalg.solve(root, (y - middle).unsqueeze(-1)).squeeze(-1)
    return (y - middle) / root


def _normal(fn: Any, like: Tensor, data: Information | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return location, scale (a matrix for a multivariate normal) and the logarithms of the scale's diagonal.

    They have the highest precision of their own, of values ``like`` and of data: products of matrices mix none.
    """
    parts = [*_parts(fn), like, *([] if data is None else [data.precision])]
    precise = functools.reduce(torch.promote_types, [part.dtype for part in parts])
    loc, scale = (part.to(precise) for part in parts[:2])
    if scale.dim() == loc.dim():
        if data is None:
            return loc, scale, scale.log()
        share = 1.0 / (1.0 + data.precision * scale.square())  # of the prior, in the location
        return loc + (1.0 - share) * (data.center - loc), scale * share.sqrt(), scale.log() + 0.5 * share.log()
    log_diagonal = scale.diagonal(dim1=-2, dim2=-1).log()
    if data is None:
        return loc, scale, log_diagonal
    # 1. With A = I + L' T L = R R', the covariance is L A^-1 L', and L R'^-1 is a root of it.
    identity = torch.eye(scale.shape[-1], dtype=scale.dtype, device=scale.device)
    inner = torch.linalg.cholesky_ex(identity + scale.mT @ (data.precision.unsqueeze(-1) * scale)).L
    root = torch.linalg.solve_triangular(inner, scale.mT, upper=False).mT
    # 2. The center pulls the location by the covariance times T (c - m).
    pull = (data.precision * (data.center - loc)).unsqueeze(-1)
    middle = loc + (root @ (root.mT @ pull)).squeeze(-1)
    return middle, root, log_diagonal - inner.diagonal(dim1=-2, dim2=-1).log()


def moves(first: Any, second: Any) -> bool:
    """Whether location or scale of a site differ between two runs."""
    before, after = location_scale(first), location_scale(second)
    if before is None or after is None:
        return False
    return any(a.shape == b.shape and not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _parts(fn: Any) -> tuple[Tensor, Tensor]:
    parts = location_scale(fn)
    assert parts is not None  # sites are chosen by ``moves``
    return parts


def _summed(values: Tensor, event_dim: int) -> Tensor:
    return values.flatten(-event_dim).sum(-1) if event_dim else values
