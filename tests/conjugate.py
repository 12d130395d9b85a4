"""Models with closed forms: evidence, leave-one-out by refits, posteriors, for the tests of comparison."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from torch import Tensor

A, B, G = 2.0, 1.0, 1.0  # tau ~ Gamma(A, B), beta ~ N(0, 1 / (G tau))
COUNTS = torch.tensor([0.0, 1.0, 2.0, 1.0, 3.0, 2.0])
COUNTS_LOO = -9.38260  # of six negative binomials
PINE = {"density": -310.12829, "adjusted_density": -301.70460}


def regression_data(dim: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x (rows, dim) and y (rows,), double precision."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    slopes = 0.5 * torch.randn(dim, generator=generator, dtype=torch.float64)
    return x, x @ slopes + 0.7 * torch.randn(rows, generator=generator, dtype=torch.float64)


def regression(x: Tensor, y: Tensor) -> None:
    """y ~ N(x beta, 1 / tau), with conjugate priors."""
    tau = pyro.sample("tau", dist.Gamma(y.new_tensor(A), y.new_tensor(B)))
    with pyro.plate("column", x.shape[1]):
        beta = pyro.sample("beta", dist.Normal(y.new_tensor(0.0), (G * tau) ** -0.5))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, tau**-0.5), obs=y)


def _posterior(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float, float]:
    precision = x.T @ x + G * torch.eye(x.shape[1], dtype=x.dtype)
    mean = torch.linalg.solve(precision, x.T @ y)
    return precision, mean, A + len(y) / 2, float(B + 0.5 * (y @ y - mean @ precision @ mean))


def regression_evidence(x: Tensor, y: Tensor) -> float:
    """The log evidence, nats."""
    precision, _, shape, rate = _posterior(x, y)
    volume = 0.5 * (x.shape[1] * math.log(G) - float(torch.logdet(precision)))
    gammas = A * math.log(B) - shape * math.log(rate) + math.lgamma(shape) - math.lgamma(A)
    return -len(y) / 2 * math.log(2 * math.pi) + volume + gammas


def regression_loo(x: Tensor, y: Tensor) -> Tensor:
    """The log predictive density of each row by a fit without it."""
    found = []
    for row in range(len(y)):
        kept = torch.arange(len(y)) != row
        precision, mean, shape, rate = _posterior(x[kept], y[kept])
        spread = math.sqrt(rate / shape * (1 + float(x[row] @ torch.linalg.solve(precision, x[row]))))
        found.append(stats.t.logpdf(float(y[row]), 2 * shape, float(x[row] @ mean), spread))
    return torch.tensor(found)


def regression_guide(stretch: float = 1.0, shift: float = 0.0) -> Any:
    """The exact posterior of :func:`regression`, its slopes stretched and moved by ``shift`` sds."""

    def guide(x: Tensor, y: Tensor) -> None:
        precision, mean, shape, rate = _posterior(x, y)
        tau = pyro.sample("tau", dist.Gamma(y.new_tensor(shape), y.new_tensor(rate)))
        root = torch.linalg.cholesky(torch.linalg.inv(precision))
        scale = stretch * tau**-0.5
        whole = dist.MultivariateNormal(mean + shift * scale * root.diagonal(), scale_tril=scale * root)
        beta = pyro.sample("all", whole, infer={"is_auxiliary": True})
        with pyro.plate("column", x.shape[1]):
            pyro.sample("beta", dist.Delta(beta))

    return guide


def counts(y: Tensor) -> None:
    """Counts with one rate ~ Gamma(1, 1): the posterior is Gamma(10, 7)."""
    rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def counts_guide(shape: float = 10.0, rate: float = 7.0) -> Any:
    """A Gamma distribution for :func:`counts`."""

    def guide(y: Tensor) -> None:
        pyro.sample("rate", dist.Gamma(shape, rate))

    return guide


def pine_data(column: str) -> tuple[Tensor, Tensor]:
    """The centered covariate and the strength of 42 specimens of radiata pine."""
    path = Path(__file__).parent / "data" / "radiata_pine.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    x, y = (torch.tensor([float(row[name]) for row in rows], dtype=torch.float64) for name in (column, "strength"))
    return x - x.mean(), y


def pine(x: Tensor, y: Tensor) -> None:
    """The strength of timber by its density (Williams 1959), with conjugate priors."""
    tau = pyro.sample("tau", dist.Gamma(y.new_tensor(3.0), y.new_tensor(2.0 * 300.0**2)))
    a = pyro.sample("a", dist.Normal(y.new_tensor(3000.0), (0.06 * tau) ** -0.5))
    b = pyro.sample("b", dist.Normal(y.new_tensor(185.0), (6.0 * tau) ** -0.5))
    with pyro.plate("specimen", len(y)):
        pyro.sample("y", dist.Normal(a + b * x, tau**-0.5), obs=y)


def pine_guide(x: Tensor, y: Tensor) -> None:
    """The exact posterior of :func:`pine`: x is centered, so a and b are independent given tau."""
    n, sum_x2 = len(y), float(x.square().sum())
    a_mean = float((0.06 * 3000.0 + y.sum()) / (0.06 + n))
    b_mean = float((6.0 * 185.0 + (x * y).sum()) / (6.0 + sum_x2))
    rest = float(y.square().sum()) + 0.06 * 3000.0**2 + 6.0 * 185.0**2
    rest -= (0.06 + n) * a_mean**2 + (6.0 + sum_x2) * b_mean**2
    tau = pyro.sample("tau", dist.Gamma(y.new_tensor(3.0 + n / 2), y.new_tensor(2.0 * 300.0**2 + rest / 2)))
    pyro.sample("a", dist.Normal(y.new_tensor(a_mean), ((0.06 + n) * tau) ** -0.5))
    pyro.sample("b", dist.Normal(y.new_tensor(b_mean), ((6.0 + sum_x2) * tau) ** -0.5))
