"""Models with known posteriors, for many data sets."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

X = torch.tensor([[1.0, 0.9], [1.0, -1.1], [1.0, 0.2], [1.0, 1.4], [1.0, -0.6]])
NOISE = 0.7


def regression(x: Tensor, y: Tensor) -> None:
    """A regression with known noise."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ b, NOISE), obs=y)


def exact(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (2,) and covariance (2, 2) of its posterior."""
    precision = torch.eye(2) + x.T @ x / NOISE**2
    covariance = torch.linalg.inv(precision)
    return covariance @ x.T @ y / NOISE**2, covariance


def counts(y: Tensor) -> None:
    """Counts as whole numbers."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def branching(y: Tensor) -> None:
    """A number is taken out of the data."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sd = 1.0 if float(y.mean()) > -50.0 else 2.0
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, sd), obs=y)


def two_modes(y: Tensor) -> None:
    """The sign of x is not known."""
    x = pyro.sample("x", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(x.square(), 0.5), obs=y)


def data_sets(count: int, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return arguments of :func:`regression`."""
    generator = torch.Generator().manual_seed(seed)
    return [(X, torch.randn(len(X), generator=generator) * 1.5) for _ in range(count)]
