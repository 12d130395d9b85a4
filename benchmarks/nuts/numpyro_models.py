"""NumPyro ports of the models of :mod:`benchmarks.posteriors.models`.

Names, arguments and coordinates are those of the Pyro models, whose docstrings say what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.nn import logsumexp
from numpyro.distributions import constraints

JITTER = 1e-9
STEPS_TO_FIRST = 6
ORDER = 5


# ---- helpers ---------------------------------------------------------------------------------------------------------


def flat(support: Any, *event_shape: int) -> dist.ImproperUniform:
    """Return the improper uniform distribution on ``support``."""
    return dist.ImproperUniform(support, (), event_shape)


def normals(size: int, scale: float) -> dist.Distribution:
    """Return ``size`` independent normals of mean 0."""
    return dist.Normal(0.0, scale).expand([size]).to_event(1)


def observe_normal(mean: Array, sigma: Array, y: Array) -> None:
    """Observe ``y_n ~ normal(mean_n, sigma_n)``."""
    numpyro.sample("y", dist.Normal(mean, sigma), obs=y)


# ---- models ----------------------------------------------------------------------------------------------------------


def eight_schools_centered(y: Array, sigma: Array) -> None:
    """A hierarchical normal model."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Array, sigma: Array) -> None:
    """The same in other coordinates."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(y)):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * theta_trans, sigma), obs=y)


def flat_regression(design: Array, y: Array) -> None:
    """A regression with flat priors."""
    beta = numpyro.sample("beta", flat(constraints.real_vector, design.shape[-1]))
    sigma = numpyro.sample("sigma", flat(constraints.positive))
    observe_normal(design @ beta, sigma, y)


def kidscore_regression(design: Array, y: Array) -> None:
    """A regression with a prior of sigma only."""
    beta = numpyro.sample("beta", flat(constraints.real_vector, design.shape[-1]))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    observe_normal(design @ beta, sigma, y)


def blr(design: Array, y: Array) -> None:
    """A regression with normal priors."""
    beta = numpyro.sample("beta", normals(design.shape[-1], 10.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    observe_normal(design @ beta, sigma, y)


def autoregression(lags: Array, y: Array) -> None:
    """A regression of a series on its past."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", normals(lags.shape[-1], 10.0))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    observe_normal(alpha + lags @ beta, sigma, y)


def kilpisjarvi(x: Array, y: Array, alpha_loc: Array, alpha_scale: Array, beta_loc: Array, beta_scale: Array) -> None:
    """A regression on one covariate with priors of the data."""
    alpha = numpyro.sample("alpha", dist.Normal(alpha_loc, alpha_scale))
    beta = numpyro.sample("beta", dist.Normal(beta_loc, beta_scale))
    sigma = numpyro.sample("sigma", flat(constraints.positive))
    observe_normal(alpha + beta * x, sigma, y)


def diamonds(design: Array, y: Array) -> None:
    """A regression on many correlated columns."""
    b = numpyro.sample("b", normals(design.shape[-1], 1.0))
    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = numpyro.sample("sigma", flat(constraints.positive))
    numpyro.factor("sigma_prior", dist.StudentT(3.0, 0.0, 10.0).log_prob(sigma) + math.log(2.0))
    observe_normal(intercept + design @ b, sigma, y)


def gp_regr(x: Array, y: Array) -> None:
    """A Gaussian process with a squared exponential kernel."""
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    kernel = alpha**2 * jnp.exp(-0.5 * (x[:, None] - x) ** 2 / rho**2)
    covariance = kernel + (sigma + JITTER) * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros_like(y), covariance), obs=y)


def linear_recursion(a: Array, b: Array) -> Array:
    """Solve ``x_t = a_t + b x_{t-1}, x_0 = 0`` for all t at once in log2(T) doublings."""
    x, step = a, 1
    while step < len(a):
        x = x + b**step * jnp.pad(x, (step, 0))[: len(a)]
        step *= 2
    return x


def garch11(y: Array, sigma1: Array) -> None:
    """A series whose variance follows its past; the support of beta1 depends on alpha1."""
    mu = numpyro.sample("mu", flat(constraints.real))
    alpha0 = numpyro.sample("alpha0", flat(constraints.positive))
    alpha1 = numpyro.sample("alpha1", flat(constraints.unit_interval))
    beta1 = numpyro.sample("beta1", flat(constraints.interval(0.0, 1.0 - alpha1)))
    innovation = alpha0 + alpha1 * (y[:-1] - mu) ** 2
    variance = linear_recursion(jnp.concatenate([jnp.square(sigma1).reshape(1), innovation]), beta1)
    observe_normal(mu, jnp.sqrt(variance), y)


def log_matrix_product(factors: Array) -> Array:
    """Return the log of ``exp(M_1) @ ... @ exp(M_T)``, (K, K, T) -> (K, K), pair by pair in log2(T) rounds."""
    while (length := factors.shape[-1]) > 1:
        even = length - length % 2
        left, right, rest = factors[..., 0:even:2], factors[..., 1:even:2], factors[..., even:]
        products = logsumexp(left[:, :, None] + right[None, :, :], axis=1)
        factors = jnp.concatenate([products, rest], axis=-1)
    return factors[..., 0]


def hmm_drive_0(u: Array, v: Array, alpha: Array) -> None:
    """A hidden Markov model of two states, summed out."""
    theta1 = numpyro.sample("theta1", dist.Dirichlet(alpha[0]))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(alpha[1]))
    phi = numpyro.sample("phi", flat(constraints.positive_ordered_vector, 2))
    rate = numpyro.sample("lambda", flat(constraints.positive_ordered_vector, 2))
    prior = dist.Normal(jnp.array([0.0, 3.0]), 1.0).to_event(1)
    numpyro.factor("phi_prior", prior.log_prob(phi))
    numpyro.factor("lambda_prior", prior.log_prob(rate))
    log_transition = jnp.log(jnp.stack([theta1, theta2]))[:, :, None]
    log_emission = dist.Exponential(phi[:, None]).log_prob(u) + dist.Exponential(rate[:, None]).log_prob(v)
    log_path = log_matrix_product(log_transition + log_emission[:, 1:])
    numpyro.factor("likelihood", logsumexp(log_emission[:, :1] + log_path))


def low_dim_gauss_mix(y: Array) -> None:
    """A mixture of two normals."""
    mu = numpyro.sample("mu", flat(constraints.ordered_vector, 2))
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(probs=jnp.stack([theta, 1.0 - theta]))
    numpyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


def concentration(k_a: Array, k_m: Array, v_m: Array, times: Array, t0: Array, dose: Array, volume: Array) -> Array:
    """Solve the compartment's equation by the scheme of :func:`benchmarks.posteriors.models.concentration`."""
    bend = k_m * volume / (k_a * dose)
    fraction = jnp.arange(STEPS_TO_FIRST) / STEPS_TO_FIRST
    start = bend * jnp.expm1(fraction * jnp.log1p((times[0] - t0) / bend))
    mesh = jnp.concatenate([t0 + start, times])
    lane = jnp.arange(1.0, ORDER + 1)
    done = jnp.minimum(jnp.arange(ORDER + 1)[:, None] / lane, 1.0)
    substeps = mesh[:-1, None, None] + jnp.diff(mesh)[:, None, None] * done
    absorbed = jnp.diff(-dose / volume * jnp.expm1(-k_a * substeps), axis=-2)
    drop = k_m + v_m / volume * jnp.diff(substeps, axis=-2)
    weights = (lane[:, None] / (lane[:, None] - lane + jnp.diag(lane))).prod(-1)

    def advance(value: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        lanes = value * jnp.ones(ORDER)
        for index in range(ORDER):
            total = lanes + step[0][index]
            middle = total - step[1][index]
            lanes = 0.5 * (middle + jnp.sqrt(middle * middle + 4.0 * k_m * total))
        value = lanes @ weights
        return value, value

    _, path = jax.lax.scan(advance, jnp.zeros(()), (absorbed, drop))
    return path[STEPS_TO_FIRST - 1 :]


def one_comp_mm_elim_abs(c_hat: Array, times: Array, t0: Array, dose: Array, volume: Array) -> None:
    """A compartment with first-order absorption and Michaelis-Menten elimination."""
    k_a, k_m, v_m, sigma = (numpyro.sample(name, dist.HalfCauchy(1.0)) for name in ("k_a", "K_m", "V_m", "sigma"))
    c = jnp.maximum(concentration(k_a, k_m, v_m, times, t0, dose, volume), 1e-12)
    numpyro.sample("C_hat", dist.LogNormal(jnp.log(c), sigma), obs=c_hat)


MODELS: dict[str, Callable[..., None]] = {
    model.__name__: model
    for model in (
        *(eight_schools_centered, eight_schools_noncentered, flat_regression, kidscore_regression, blr),
        *(autoregression, kilpisjarvi, diamonds, gp_regr, garch11, hmm_drive_0, low_dim_gauss_mix),
        one_comp_mm_elim_abs,
    )
}
