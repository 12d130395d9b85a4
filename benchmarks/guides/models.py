"""Twelve models for guides, in single precision, written so that Pyro can run many particles at once.

Scalars are drawn outside of plates and vectors inside, so that particles go in front. The correlated normal, the funnel
and the banana have an evidence of 1, that is 0 nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.larger import models as larger
from benchmarks.named import models as named
from benchmarks.posteriors.models import JITTER

SCHOOLS = ([28, 8, -3, 7, -1, 1, 18, 12], [15, 10, 16, 11, 9, 11, 10, 18])


def single(*values: Any) -> tuple[Tensor, ...]:
    """Return arrays as tensors in single precision."""
    return tuple(torch.as_tensor(value, dtype=torch.float32) for value in values)


def schools_centered(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, with the effects themselves as latents."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, with standard normal latents."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def banana(pairs: int) -> None:
    """Bent pairs: a parabola of standard deviation 1/2 across."""
    with pyro.plate("pair", pairs):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a * a, 0.5))


def logistic(x: Tensor, y: Tensor) -> None:
    """A logistic regression whose coefficients share a scale."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("column", x.shape[1]):
        beta = pyro.sample("beta", dist.Normal(0.0, scale))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=beta @ x.T), obs=y)


def logistic_data() -> tuple[Tensor, ...]:
    """Two hundred rows of 25 columns, simulated."""
    rng = np.random.default_rng(5)
    x, beta = rng.normal(size=(200, 25)), 0.5 * rng.normal(size=25)
    return single(x, rng.random(200) < 1.0 / (1.0 + np.exp(-x @ beta)))


def counts(y: Tensor) -> None:
    """Counts with a log rate of their own each, centered."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("row", len(y)):
        log_rate = pyro.sample("log_rate", dist.Normal(mu, tau))
        pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)


def correlated_normal(scale_tril: Tensor) -> None:
    """A normal distribution, nothing else."""
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(len(scale_tril)), scale_tril=scale_tril))


def correlated_normal_data(dim: int) -> tuple[Tensor, ...]:
    """The factor of an autoregression's covariance, correlation .9, in units from 1/3 to 3."""
    place, unit = np.arange(dim), np.geomspace(1.0 / 3.0, 3.0, dim)
    return single(np.linalg.cholesky(0.9 ** abs(place[:, None] - place) * unit[:, None] * unit))


def funnel(width: int) -> None:
    """Neal's funnel: a log variance of standard deviation 3, and the coordinates that have it."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("coordinate", width):
        pyro.sample("x", dist.Normal(0.0, (0.5 * v).exp()))


def item_response(y: Tensor) -> None:
    """Two-parameter logistic item response with free signs, of which there are two mirrored modes."""
    with pyro.plate("item", y.shape[1], dim=-1):
        loading = pyro.sample("loading", dist.Normal(0.0, 1.0))
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 2.0))
    with pyro.plate("person", len(y), dim=-2):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with pyro.plate("answer", y.shape[1], dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=loading * ability - difficulty), obs=y)


def gp(x: Tensor, y: Tensor) -> None:
    """A Gaussian process with three free numbers: length, height, variance of the noise."""
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    rho, alpha, sigma = rho[..., None, None], alpha[..., None, None], sigma[..., None, None]
    kernel = alpha**2 * torch.exp(-0.5 * (x[:, None] - x) ** 2 / rho**2)
    covariance = kernel + (sigma + max(JITTER, 1e-5)) * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), covariance), obs=y)


def gp_data() -> tuple[Tensor, ...]:
    """Eleven values along a line, simulated."""
    rng, x = np.random.default_rng(6), np.arange(-10.0, 11.0, 2.0)
    covariance = 9.0 * np.exp(-0.5 * (x[:, None] - x) ** 2 / 5.5**2) + 0.3 * np.eye(len(x))
    return single(x, np.linalg.cholesky(covariance) @ rng.normal(size=len(x)))


def volatility(y: Tensor) -> None:
    """Returns whose log variance is an autoregression, in standard normal innovations."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    persistence = pyro.sample("persistence", dist.Beta(20.0, 1.5))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    phi = 2.0 * persistence - 1.0
    with pyro.plate("day", len(y)):
        innovation = pyro.sample("innovation", dist.Normal(0.0, 1.0))
        h = [mu + sigma * innovation[..., :1] / (1.0 - phi**2).sqrt()]
        for t in range(1, len(y)):
            h.append(mu + phi * (h[-1] - mu) + sigma * innovation[..., t : t + 1])
        pyro.sample("y", dist.Normal(0.0, (0.5 * torch.cat(h, -1)).exp()), obs=y)


def horseshoe(x: Tensor, y: Tensor) -> None:
    """A regression of which few coefficients matter, centered."""
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("column", x.shape[1]):
        local = pyro.sample("local", dist.HalfCauchy(1.0))
        beta = pyro.sample("beta", dist.Normal(0.0, tau * local))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(beta @ x.T, sigma), obs=y)


@dataclass(frozen=True)
class Case:
    """A model, its arguments, the number of its latents, and the log evidence where it is known."""

    model: Callable[..., None]
    arguments: Callable[[], tuple[Any, ...]]
    latents: int
    log_evidence: float | None = None


MODELS = {
    "schools_centered": Case(schools_centered, lambda: single(*SCHOOLS), 10, -31.31),
    "schools_noncentered": Case(schools_noncentered, lambda: single(*SCHOOLS), 10, -31.31),
    "banana": Case(banana, lambda: (5,), 10, 0.0),
    "logistic": Case(logistic, logistic_data, 26),
    "counts_60": Case(counts, lambda: single(*larger.many_locals_data(60)), 62),
    "counts_500": Case(counts, lambda: single(*larger.many_locals_data(500)), 502),
    "normal": Case(correlated_normal, lambda: correlated_normal_data(100), 100, 0.0),
    "funnel": Case(funnel, lambda: (9,), 10, 0.0),
    "item_response": Case(item_response, lambda: single(*named.item_data(200, 8)), 216),
    "gp": Case(gp, gp_data, 3),
    "volatility": Case(volatility, lambda: single(*larger.stochastic_volatility_data(100)), 103),
    "horseshoe": Case(horseshoe, lambda: single(*larger.horseshoe_data()), 62),
}
