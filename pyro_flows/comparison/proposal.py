"""A Student t with the moments of draws, in the latent space of a flow if there is one: to draw from, and to score by.

A flow whose own weights are poor may still be a good map: one that moves the posterior near a normal distribution.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.model.log_density import LogDensity
from pyro_flows.starts.gaussians import Gaussians

DF = 7.0  # of a Student t: the tails of most posteriors lie between it and a normal distribution
PIECE = 4096  # draws at a time


class Proposal(NamedTuple):
    """A multivariate Student t with the location and the scale of draws, of ``df`` degrees of freedom."""

    normal: Gaussians
    df: float = DF

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return ``count`` draws (count, D) and their log densities (count,); uses torch's global generator."""
        dim = self.normal.loc.shape[-1]
        noise = torch.randn(count, dim, dtype=torch.float64)
        mixing = torch.distributions.Chi2(torch.tensor(self.df, dtype=torch.float64)).sample((count,)) / self.df
        z = self.normal.map(noise / mixing.sqrt()[:, None])[0][0]
        return z, self.log_prob(z)

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log q(z)` (N,): the normal density of the same squares, with the t's tails."""
        dim, df = self.normal.loc.shape[-1], self.df
        log_normal = self.normal.log_prob(z.double().cpu())[0]
        at_mode = self.normal.log_prob(self.normal.loc)[0, 0]
        squares = 2.0 * (at_mode - log_normal)
        constant = math.lgamma(0.5 * (df + dim)) - math.lgamma(0.5 * df) + 0.5 * dim * math.log(2.0 / df)
        return at_mode + constant - 0.5 * (df + dim) * torch.log1p(squares / df)


def enough(count: float, dim: int) -> bool:
    """Whether there are enough draws for :func:`fit_proposal`."""
    return count >= 2 * dim + 10


def fit_proposal(z: Tensor, df: float = DF, log_weights: Tensor | None = None) -> Proposal:
    """Return the Student t with the mean and the covariance of draws (N, D), N above D, weighted or not."""
    count, dim = z.shape
    if not enough(count, dim):
        raise ValueError(f"draws: expected at least {2 * dim + 10} for a covariance of {dim} coordinates, got {count}.")
    z = z.detach().double().cpu()
    weights = torch.softmax(z.new_zeros(count) if log_weights is None else log_weights, 0)
    loc = weights @ z
    away = (z - loc) * (weights / (1.0 - weights.square().sum())).sqrt()[:, None]
    scale = away.norm(dim=0).clamp_min(torch.finfo(z.dtype).tiny)
    away = away / scale
    ridge = 1e-9 * torch.eye(dim, dtype=z.dtype)
    root = scale[:, None] * torch.linalg.cholesky(away.mT @ away + ridge) * math.sqrt((df - 2.0) / df)
    ones, eye = torch.ones(1, dim, dtype=z.dtype), torch.eye(dim, dtype=z.dtype)[None]
    normal = Gaussians(loc[None], root[None], ones, eye[..., :1], torch.ones(1, 1, 1, dtype=z.dtype))
    return Proposal(normal, df)


class Latent:
    """A log density in the latent space of a flow; in its own coordinates for what is no single flow, as ``like``."""

    def __init__(self, density: LogDensity, flow: object, like: Tensor) -> None:
        self.density, self.like = density, like
        self.bijection = flow.bijection if isinstance(flow, Flow) and flow.base != "uniform" else None

    def points(self, z: Tensor) -> Tensor:
        """Return base points x (S, D) of draws."""
        return z if self.bijection is None else self.bijection.inverse_and_ladj(z)[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the log density (S,) of base points."""
        return torch.cat([self._piece(part.to(self.like)) for part in x.split(PIECE)])

    def _piece(self, x: Tensor) -> Tensor:
        z, ladj = (x, x.new_zeros(len(x))) if self.bijection is None else self.bijection.forward_and_ladj(x)
        usable = torch.isfinite(z).all(1)
        value = (self.density(torch.where(usable[:, None], z, self.like[:1])) + ladj).double()
        return torch.where(usable, value, -torch.inf).cpu()
