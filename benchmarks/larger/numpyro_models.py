"""NumPyro ports of the models of :mod:`benchmarks.larger.models`, and their forms for long runs.

Names, arguments and coordinates are those of the Pyro models, whose docstrings say what they are. ``LONG_RUNS`` has
forms with the same sites that NUTS can explore: non-centered where the Pyro model is centered.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array, lax
from numpyro.handlers import reparam
from numpyro.infer.reparam import LocScaleReparam

Model = Callable[..., None]

# regressions with random effects -----------------------------------------------------------------------------------


def seeds(r: Array, n: Array, kind: Array, extract: Array) -> None:
    """A logistic regression with plate effects."""
    alpha = numpyro.sample("alpha", dist.Normal(jnp.zeros(4), 10.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(1.0))
    with numpyro.plate("plate", len(r)):
        b = numpyro.sample("b", dist.Normal(0.0, sigma))
        logits = alpha[0] + alpha[1] * kind + alpha[2] * extract + alpha[3] * kind * extract + b
        numpyro.sample("r", dist.Binomial(n.astype(int), logits=logits), obs=r)


def surgical(r: Array, n: Array) -> None:
    """Rates of hospitals."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1000.0))
    variance = numpyro.sample("variance", dist.InverseGamma(0.001, 0.001))
    with numpyro.plate("hospital", len(r)):
        b = numpyro.sample("b", dist.Normal(mu, jnp.sqrt(variance)))
        numpyro.sample("r", dist.Binomial(n.astype(int), logits=b), obs=r)


def radon_slopes(y: Array, basement: Array, county: Array) -> None:
    """An intercept and a slope of each county."""
    mu = numpyro.sample("mu", dist.Normal(jnp.zeros(2), 5.0).to_event(1))
    tau = numpyro.sample("tau", dist.HalfNormal(jnp.ones(2)).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("county", 85):
        alpha = numpyro.sample("alpha", dist.Normal(mu[0], tau[0]))
        beta = numpyro.sample("beta", dist.Normal(mu[1], tau[1]))
    with numpyro.plate("home", len(y)):
        numpyro.sample("y", dist.Normal(alpha[county] + beta[county] * basement, sigma), obs=y)


def _lkj_effects(y: Array, x: Array, group: Array, effects: Callable[[Array, Array], Array]) -> None:
    mu = numpyro.sample("mu", dist.Normal(jnp.zeros(3), 5.0).to_event(1))
    tau = numpyro.sample("tau", dist.HalfNormal(jnp.ones(3)).to_event(1))
    chol = numpyro.sample("chol", dist.LKJCholesky(3, 2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    b = effects(mu, tau[:, None] * chol)
    numpyro.sample("y", dist.Normal((x * b[group]).sum(-1), sigma), obs=y)


def lkj_effects(y: Array, x: Array, group: Array) -> None:
    """Three correlated effects of each group."""

    def effects(mu: Array, factor: Array) -> Array:
        with numpyro.plate("group", 20):
            b: Array = numpyro.sample("b", dist.MultivariateNormal(mu, scale_tril=factor))
        return b

    _lkj_effects(y, x, group, effects)


def lkj_effects_noncentered(y: Array, x: Array, group: Array) -> None:
    """The same, effects in standard normals."""

    def effects(mu: Array, factor: Array) -> Array:
        standard = numpyro.sample("b_standard", dist.Normal(jnp.zeros((20, 3)), 1.0).to_event(2))
        b: Array = numpyro.deterministic("b", mu + standard @ factor.T)
        return b

    _lkj_effects(y, x, group, effects)


# others --------------------------------------------------------------------------------------------------------------


def horseshoe(x: Array, y: Array) -> None:
    """A regression of which few coefficients matter."""
    tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    with numpyro.plate("column", x.shape[1]):
        local = numpyro.sample("local", dist.HalfCauchy(1.0))
        beta = numpyro.sample("beta", dist.Normal(0.0, tau * local))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def many_locals(y: Array) -> None:
    """Counts with a rate of their own each."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("row", len(y)):
        log_rate = numpyro.sample("log_rate", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Poisson(jnp.exp(log_rate)), obs=y)


def item_response(y: Array) -> None:
    """Two parameters of each item, one of each person; signs are free."""
    with numpyro.plate("item", y.shape[1], dim=-1):
        loading = numpyro.sample("loading", dist.Normal(0.0, 1.0))
        difficulty = numpyro.sample("difficulty", dist.Normal(0.0, 2.0))
    with numpyro.plate("person", len(y), dim=-2):
        ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
        with numpyro.plate("answer", y.shape[1], dim=-1):
            numpyro.sample("y", dist.Bernoulli(logits=loading * ability - difficulty), obs=y)


def stochastic_volatility(y: Array) -> None:
    """Returns whose log variance is an autoregression."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    persistence = numpyro.sample("persistence", dist.Beta(20.0, 1.5))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(1.0))
    phi = 2.0 * persistence - 1.0
    with numpyro.plate("day", len(y)):
        innovation = numpyro.sample("innovation", dist.Normal(0.0, 1.0))

        def advance(h: Array, new: Array) -> tuple[Array, Array]:
            h = mu + phi * (h - mu) + sigma * new
            return h, h

        first = mu + sigma * innovation[0] / jnp.sqrt(1.0 - phi**2)
        _, rest = lax.scan(advance, first, innovation[1:])
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(0.5 * jnp.concatenate([first[None], rest]))), obs=y)


def lotka_volterra(y: Array, times: Array) -> None:
    """Hares and lynxes, by Runge-Kutta steps."""
    rates = numpyro.sample("rates", dist.LogNormal(jnp.array([0.0, -3.5, 0.0, -3.5]), 0.5).to_event(1))
    initial = numpyro.sample("initial", dist.LogNormal(math.log(10.0), 1.0).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
    a, b, c, d = rates
    step = times[1] - times[0]

    def slope(state: Array) -> Array:
        return state * jnp.stack([a - b * state[1], d * state[0] - c])

    def advance(state: Array, _: None) -> tuple[Array, Array]:
        k1 = slope(state)
        k2 = slope(state + 0.5 * step * k1)
        k3 = slope(state + 0.5 * step * k2)
        k4 = slope(state + step * k3)
        state = state + step / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        return state, state

    _, states = lax.scan(advance, initial, None, length=len(times) - 1)
    observed = jnp.concatenate([initial[None], states])[::10]
    numpyro.sample("y", dist.LogNormal(jnp.log(observed), sigma).to_event(2), obs=y)


def _noncentered(model: Model, *sites: str) -> Model:
    return reparam(model, config={site: LocScaleReparam(0.0) for site in sites})


MODELS: dict[str, Model] = {
    model.__name__: model
    for model in (
        *(radon_slopes, seeds, surgical, lkj_effects, horseshoe, many_locals, item_response),
        *(stochastic_volatility, lotka_volterra),
    )
}
LONG_RUNS: dict[str, Model] = {
    **MODELS,
    "radon_slopes": _noncentered(radon_slopes, "beta"),
    "seeds": _noncentered(seeds, "b"),
    "surgical": _noncentered(surgical, "b"),
    "lkj_effects": lkj_effects_noncentered,
    "horseshoe": _noncentered(horseshoe, "beta"),
}
