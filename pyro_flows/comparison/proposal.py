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

DF = 7.0  # of a Student t: the tails of most posteriors lie between it and a normal distribution


class Proposal(NamedTuple):
    """The multivariate Student t of ``df`` degrees of freedom at ``loc`` (D,), with the scale matrix root root^T."""

    loc: Tensor
    root: Tensor  # (D, D), lower triangular
    df: float

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return ``count`` draws (count, D) and their log densities (count,); uses torch's global generator."""
        noise = torch.randn(count, len(self.loc), dtype=torch.float64)
        mixing = torch.distributions.Chi2(torch.tensor(self.df, dtype=torch.float64)).sample((count,)) / self.df
        z = self.loc + noise / mixing.sqrt()[:, None] @ self.root.mT
        return z, self.log_prob(z)

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log q(z)` (N,)."""
        dim, df = len(self.loc), self.df
        away = torch.linalg.solve_triangular(self.root, (z.double().cpu() - self.loc).mT, upper=False)
        constant = math.lgamma(0.5 * (df + dim)) - math.lgamma(0.5 * df) - 0.5 * dim * math.log(math.pi * df)
        log_volume = self.root.diagonal().log().sum()
        return constant - log_volume - 0.5 * (df + dim) * torch.log1p(away.square().sum(0) / df)


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
    return Proposal(loc, root, df)


class Latent:
    """A log density in the latent space of a flow; in its own coordinates for what is no single flow, as ``like``."""

    def __init__(self, density: LogDensity, flow: object, like: Tensor) -> None:
        self.density, self.like = density, like
        self.bijection = flow.bijection if isinstance(flow, Flow) and flow.base != "uniform" else None

    def back(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the base points x (S, D) of draws, and the log Jacobian (S,) of the way to the draws."""
        if self.bijection is None:
            return z, z.new_zeros(len(z))
        x, ladj = self.bijection.inverse_and_ladj(z)
        return x, -ladj

    def at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z at base points (S, D), and the log density (S,) of these, -inf where it is not finite."""
        x = x.to(self.like)
        z, ladj = (x, x.new_zeros(len(x))) if self.bijection is None else self.bijection.forward_and_ladj(x)
        usable = torch.isfinite(z).all(1)
        z = torch.where(usable[:, None], z, self.like[:1])
        found = (self.density(z) + ladj).double().cpu()
        return z, torch.where(usable.cpu() & torch.isfinite(found), found, -torch.inf)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the log density (S,) of base points, which are taken some at a time."""
        return torch.cat([self.at(part)[1] for part in x.split(4096)])
