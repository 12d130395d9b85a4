"""NumPyro ports of the models of :mod:`benchmarks.scale.regressions`, with the same names and coordinates."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array


def logistic_rows(x: Array, y: Array) -> None:
    """A logistic regression."""
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def poisson_groups(group: Array, x: Array, y: Array) -> None:
    """Counts whose log rate has an intercept for each of 85 groups, and a slope."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with numpyro.plate("group", 85):
        level = numpyro.sample("level", dist.Normal(mu, tau))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Poisson(jnp.exp(level[group] + slope * x)), obs=y)


MODELS: dict[str, Callable[..., None]] = {"logistic_rows": logistic_rows, "poisson_groups": poisson_groups}
