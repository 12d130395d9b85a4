"""A start: an affine map from noise to coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.model.log_density import LogDensity

CLOSE = 10.0  # nats of ELBO between starts of which none is left out: they are pooled, and raced


@dataclass(frozen=True)
class Start:
    """An affine map z = loc + scale eps: ``scale`` is (D,) or lower triangular (D, D); ``elbo`` in nats, robust.

    ``evidence`` is Laplace's estimate of the log mass around ``loc``, for starts at a mode with full curvature.
    """

    name: str
    loc: Tensor
    scale: Tensor
    elbo: float = -math.inf
    evidence: float | None = None

    @property
    def volume(self) -> float:
        return float((self.scale if self.scale.dim() == 1 else self.scale.diagonal()).log().sum())

    @property
    def root(self) -> Tensor:
        """The scale as a matrix (D, D)."""
        return self.scale if self.scale.dim() == 2 else self.scale.diag()

    @property
    def sds(self) -> Tensor:
        """The standard deviations (D,)."""
        return self.scale.norm(dim=1) if self.scale.dim() == 2 else self.scale

    def map(self, noise: Tensor) -> Tensor:
        return self.loc + (self.scale * noise if self.scale.dim() == 1 else noise @ self.scale.mT)


def standard(density: LogDensity) -> Start:
    """Return the start that needs no work: zero, with unit scales."""
    zero = torch.zeros(density.dim, dtype=density.dtype, device=density.device)
    return Start("standard", zero, torch.ones_like(zero))


def divergence(one: Start, other: Start) -> float:
    """KL(one || other) of the two Gaussians."""
    away = one.loc - other.loc
    if one.scale.dim() == other.scale.dim() == 1:
        ratio, away = one.scale / other.scale, away / other.scale
        log_ratio = ratio.log().sum()
    else:
        ratio, away = (torch.linalg.solve_triangular(other.root, x, upper=False) for x in (one.root, away[:, None]))
        log_ratio = ratio.diagonal().log().sum()
    return float(0.5 * (ratio.square().sum() + away.square().sum() - len(one.loc)) - log_ratio)
