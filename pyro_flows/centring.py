"""Non-centred coordinates: a site's location and scale taken out, where they move with other latents."""

from __future__ import annotations

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


def spread(fn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return loc + scale x (unconstrained), and the log determinant of each event of ``fn``."""
    loc, scale = _parts(fn)
    if scale.dim() > loc.dim():
        moved = loc + (scale @ x.unsqueeze(-1)).squeeze(-1)
        return moved, _summed(scale.diagonal(dim1=-2, dim2=-1).log().expand(moved.shape), fn.event_dim)
    moved = loc + scale * x
    return moved, _summed(scale.log().expand(moved.shape), fn.event_dim)


def standardise(fn: Any, y: Tensor) -> Tensor:
    """Return (y - loc) / scale: the inverse of :func:`spread`."""
    loc, scale = _parts(fn)
    if scale.dim() > loc.dim():
        return torch.linalg.solve_triangular(scale, (y - loc).unsqueeze(-1), upper=False).squeeze(-1)
    return (y - loc) / scale


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
