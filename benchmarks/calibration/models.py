"""The models: eight schools as users write it, regressions, and one with a correlated posterior."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ROWS, COLUMNS = 40, 3


def schools(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, non-centered."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def regression(x: Tensor, y: Tensor) -> None:
    """A linear regression with unknown noise."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(a + x @ b, sd), obs=y)


def poisson(x: Tensor, y: Tensor) -> None:
    """A Poisson regression."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[1]), 0.5).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Poisson((a + x @ b).exp()), obs=y)


def correlated(x: Tensor, y: Tensor) -> None:
    """A regression on two columns that are nearly the same, with known noise."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


def _columns(count: int) -> Tensor:
    return torch.randn(ROWS, count, generator=torch.Generator().manual_seed(0))


def _alike() -> Tensor:
    x = _columns(2)
    return torch.stack([x[:, 0], x[:, 0] + 0.3 * x[:, 1]], 1)


MODELS = {
    "schools": (schools, (EFFECTS, ERRORS)),
    "regression": (regression, (_columns(COLUMNS), torch.linspace(-1.0, 1.0, ROWS))),
    "poisson": (poisson, (_columns(COLUMNS), torch.arange(ROWS).remainder(5).float())),
    "correlated": (correlated, (_alike(), torch.linspace(-1.0, 1.0, ROWS))),
}
