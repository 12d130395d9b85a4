"""Pyro ports of seventeen posteriors of posteriordb, with their reference draws.

    problem = load("eight_schools_noncentered")
    problem.model(*problem.args)

Models take float64 tensors, keep Pyro's site names equal to the parameter names of posteriordb and read neither values
nor shapes of latent variables in Python, so that they run under ``torch.func.vmap`` and ``make_fx``. "Flat" in a
docstring is an improper uniform prior on the support; the second parameter of ``normal`` is a standard deviation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from benchmarks.posteriors.reference import load_data, load_draws

Data = dict[str, Any]
Draws = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A model with its data, reference draws (S, *site shape) of every latent site and, where known, log evidence."""

    name: str
    model: Callable[..., None]
    args: tuple[Tensor, ...]
    reference: Draws
    log_evidence: float | None


# ---- helpers ---------------------------------------------------------------------------------------------------------


def flat(support: constraints.Constraint, *event_shape: int) -> dist.ImproperUniform:
    """Return the improper uniform distribution on ``support``."""
    return dist.ImproperUniform(support, (), event_shape)


def observe_normal(mean: Tensor, sigma: Tensor, y: Tensor) -> None:
    """Observe ``y_n ~ normal(mean_n, sigma_n)``, independent over n."""
    with pyro.plate("observation", len(y)):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


# ---- hierarchical: eight schools -------------------------------------------------------------------------------------


def eight_schools_centered(y: Tensor, sigma: Tensor) -> None:
    """``theta_j ~ normal(mu, tau), y_j ~ normal(theta_j, sigma_j); mu ~ normal(0, 5), tau ~ cauchy+(0, 5)``."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    """As the centered model, with ``theta_j = mu + tau theta_trans_j, theta_trans_j ~ normal(0, 1)``."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("school", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(y.new_tensor(0.0), 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


# ---- regressions -----------------------------------------------------------------------------------------------------


def flat_regression(design: Tensor, y: Tensor) -> None:
    """``y ~ normal(design beta, sigma)``, all flat."""
    beta = pyro.sample("beta", flat(constraints.real_vector, design.shape[-1]))
    sigma = pyro.sample("sigma", flat(constraints.positive))
    observe_normal(design @ beta, sigma, y)


def kidscore_regression(design: Tensor, y: Tensor) -> None:
    """``y ~ normal(design beta, sigma); beta flat, sigma ~ cauchy+(0, 2.5)``."""
    beta = pyro.sample("beta", flat(constraints.real_vector, design.shape[-1]))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    observe_normal(design @ beta, sigma, y)


def blr(design: Tensor, y: Tensor) -> None:
    """``y ~ normal(design beta, sigma); beta_k ~ normal(0, 10), sigma ~ normal+(0, 10)``."""
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(design.shape[-1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_tensor(10.0)))
    observe_normal(design @ beta, sigma, y)


def autoregression(lags: Tensor, y: Tensor) -> None:
    """``y_t ~ normal(alpha + sum_k beta_k y_{t-k}, sigma); alpha, beta_k ~ normal(0, 10), sigma ~ cauchy+(0, 2.5)``."""
    alpha = pyro.sample("alpha", dist.Normal(y.new_tensor(0.0), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(lags.shape[-1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    observe_normal(alpha + lags @ beta, sigma, y)


def kilpisjarvi(
    x: Tensor, y: Tensor, alpha_loc: Tensor, alpha_scale: Tensor, beta_loc: Tensor, beta_scale: Tensor
) -> None:
    """``y ~ normal(alpha + beta x, sigma); alpha, beta normal with the given moments, sigma flat``."""
    alpha = pyro.sample("alpha", dist.Normal(alpha_loc, alpha_scale))
    beta = pyro.sample("beta", dist.Normal(beta_loc, beta_scale))
    sigma = pyro.sample("sigma", flat(constraints.positive))
    observe_normal(alpha + beta * x, sigma, y)


def diamonds(design: Tensor, y: Tensor) -> None:
    """``y ~ normal(Intercept + design b, sigma)`` with centered columns.

    ``b_k ~ normal(0, 1), Intercept ~ student_t(3; 8, 10), sigma ~ student_t+(3; 0, 10)``.
    """
    b = pyro.sample("b", dist.Normal(y.new_zeros(design.shape[-1]), 1.0).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(y.new_tensor(3.0), 8.0, 10.0))
    sigma = pyro.sample("sigma", flat(constraints.positive))
    pyro.factor("sigma_prior", dist.StudentT(y.new_tensor(3.0), 0.0, 10.0).log_prob(sigma) + math.log(2.0))
    observe_normal(intercept + design @ b, sigma, y)


# ---- Gaussian process ------------------------------------------------------------------------------------------------

JITTER = 1e-9  # keeps the Cholesky factor finite where sigma is next to nothing


def gp_regr(x: Tensor, y: Tensor) -> None:
    """``y ~ normal_n(0, K + sigma I), K_ij = alpha^2 exp(-(x_i - x_j)^2 / (2 rho^2))``: sigma is a variance here.

    ``rho ~ gamma(25, rate 4), alpha ~ normal+(0, 2), sigma ~ normal+(0, 1)``.
    """
    rho = pyro.sample("rho", dist.Gamma(y.new_tensor(25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(y.new_tensor(2.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_tensor(1.0)))
    squared_distance = (x[:, None] - x) ** 2
    kernel = alpha**2 * torch.exp(-0.5 * squared_distance / rho**2)
    identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    covariance = kernel + (sigma + JITTER) * identity
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), covariance), obs=y)


# ---- time series -----------------------------------------------------------------------------------------------------


def linear_recursion(a: Tensor, b: Tensor) -> Tensor:
    """Solve ``x_t = a_t + b x_{t-1}, x_0 = 0`` for all t at once in log2(T) doublings.

    ``x = (1 + b L + b^2 L^2 + ...) a`` with L the shift by one step, and the series is the product of all
    ``1 + (b L)^(2^k)``: nothing is divided, so small and large powers of b are equally safe.
    """
    x, step = a, 1
    while step < len(a):
        x = x + b**step * torch.nn.functional.pad(x, (step, 0))[: len(a)]
        step *= 2
    return x


def garch11(y: Tensor, sigma1: Tensor) -> None:
    """``y_t ~ normal(mu, s_t), s_t^2 = alpha0 + alpha1 (y_{t-1} - mu)^2 + beta1 s_{t-1}^2, s_1 = sigma1``, all flat.

    The support of beta1, (0, 1 - alpha1), depends on alpha1.
    """
    mu = pyro.sample("mu", flat(constraints.real))
    alpha0 = pyro.sample("alpha0", flat(constraints.positive))
    alpha1 = pyro.sample("alpha1", flat(constraints.unit_interval))
    beta1 = pyro.sample("beta1", flat(constraints.interval(0.0, 1.0 - alpha1)))
    innovation = alpha0 + alpha1 * (y[:-1] - mu) ** 2
    variance = linear_recursion(torch.cat([sigma1.square().reshape(1), innovation]), beta1)
    observe_normal(mu, variance.sqrt(), y)


def log_matrix_product(factors: Tensor) -> Tensor:
    """Return the log of ``exp(M_1) @ ... @ exp(M_T)``, (K, K, T) -> (K, K), pair by pair in log2(T) rounds."""
    while (length := factors.shape[-1]) > 1:
        even = length - length % 2
        left, right, rest = factors[..., 0:even:2], factors[..., 1:even:2], factors[..., even:]
        products = torch.logsumexp(left[:, :, None] + right[None, :, :], dim=1)
        factors = torch.cat([products, rest], dim=-1)
    return factors[..., 0]


def hmm_drive_0(u: Tensor, v: Tensor, alpha: Tensor) -> None:
    """Two-state hidden Markov model, states summed out; the first step has no initial-state term.

    ``theta_k ~ dirichlet(alpha_k)`` are the rows of the transition matrix; in state k, ``u_t ~ exponential(phi_k),
    v_t ~ exponential(lambda_k)``; ``phi, lambda`` positive ordered, first ~ normal(0, 1), second ~ normal(3, 1).
    """
    theta1 = pyro.sample("theta1", dist.Dirichlet(alpha[0]))
    theta2 = pyro.sample("theta2", dist.Dirichlet(alpha[1]))
    phi = pyro.sample("phi", flat(constraints.positive_ordered_vector, 2))
    rate = pyro.sample("lambda", flat(constraints.positive_ordered_vector, 2))
    prior = dist.Normal(u.new_tensor([0.0, 3.0]), 1.0).to_event(1)
    pyro.factor("phi_prior", prior.log_prob(phi))
    pyro.factor("lambda_prior", prior.log_prob(rate))

    log_transition = torch.stack([theta1, theta2]).log()[:, :, None]  # (from, to, time)
    log_emission = dist.Exponential(phi[:, None]).log_prob(u) + dist.Exponential(rate[:, None]).log_prob(v)
    log_path = log_matrix_product(log_transition + log_emission[:, 1:])
    pyro.factor("likelihood", torch.logsumexp(log_emission[:, :1] + log_path, dim=(0, 1)))


# ---- mixture ---------------------------------------------------------------------------------------------------------


def low_dim_gauss_mix(y: Tensor) -> None:
    """``y ~ theta normal(mu_1, sigma_1) + (1 - theta) normal(mu_2, sigma_2), mu_1 < mu_2``.

    ``mu_k ~ normal(0, 2), sigma_k ~ normal+(0, 2), theta ~ beta(5, 5)``.
    """
    mu = pyro.sample("mu", flat(constraints.ordered_vector, 2))
    pyro.factor("mu_prior", dist.Normal(y.new_zeros(2), 2.0).to_event(1).log_prob(mu))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_full((2,), 2.0)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(y.new_tensor(5.0), 5.0))
    weights = dist.Categorical(probs=torch.stack([theta, 1.0 - theta]))
    with pyro.plate("observation", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


# ---- differential equation -------------------------------------------------------------------------------------------

# Steps from the dose to the first observation, where the solution bends (later: one an interval), and the order of the
# extrapolation; together they keep the relative error over the reference draws below 2e-7.
STEPS_TO_FIRST = 6
ORDER = 5


def concentration(
    k_a: Tensor, k_m: Tensor, v_m: Tensor, times: Tensor, t0: Tensor, dose: Tensor, volume: Tensor
) -> Tensor:
    r"""Solve ``C' = k_a (dose / volume) exp(-k_a t) - (v_m / volume) C / (k_m + C), C(t0) = 0`` at ``times``.

    Backward Euler with the absorbed amount integrated exactly: a step of length h takes C to the positive root of
    ``C_new + h (v_m / volume) C_new / (k_m + C_new) = C + absorbed``, a quadratic. It is stable for any stiffness. Each
    step is done with 1, 2, ..., ORDER substeps side by side and the results extrapolated to substeps of length zero.

    For small ``k_m`` the solution bends at the scale of ``k_m / (k_a dose / volume)`` after the dose; the mesh up to
    the first observation is geometric from that scale on.
    """
    bend = k_m * volume / (k_a * dose)
    fraction = torch.arange(STEPS_TO_FIRST, dtype=times.dtype, device=times.device) / STEPS_TO_FIRST
    start = bend * torch.expm1(fraction * torch.log1p((times[0] - t0) / bend))
    mesh = torch.cat([t0 + start, times])

    # done[r, j]: the fraction of a step that lane j, of j + 1 substeps, has covered after r substeps
    lane = torch.arange(1, ORDER + 1, dtype=times.dtype, device=times.device)
    done = (torch.arange(ORDER + 1, dtype=times.dtype, device=times.device)[:, None] / lane).clamp(max=1.0)
    substeps = mesh[:-1, None, None] + mesh.diff()[:, None, None] * done  # (steps, ORDER + 1, ORDER)
    absorbed = (-dose / volume * torch.expm1(-k_a * substeps)).diff(dim=-2).flatten(0, 1).unbind()
    drop = (k_m + v_m / volume * substeps.diff(dim=-2)).flatten(0, 1).unbind()
    four_k_m = 4.0 * k_m * torch.ones_like(lane)

    weights = (lane[:, None] / (lane[:, None] - lane + torch.diag(lane))).prod(-1)  # prod_{i != j} n_j / (n_j - n_i)
    value, path = torch.zeros_like(k_a), []
    for step in range(len(mesh) - 1):
        lanes = value * torch.ones_like(lane)
        for index in range(step * ORDER, (step + 1) * ORDER):
            total = lanes + absorbed[index]
            middle = total - drop[index]
            lanes = 0.5 * (middle + torch.sqrt(middle * middle + four_k_m * total))
        value = lanes @ weights
        path.append(value)
    return torch.stack(path[STEPS_TO_FIRST - 1 :])


def one_comp_mm_elim_abs(c_hat: Tensor, times: Tensor, t0: Tensor, dose: Tensor, volume: Tensor) -> None:
    """One compartment, first-order absorption, Michaelis-Menten elimination: ``C_hat ~ lognormal(log C(t), sigma)``.

    ``k_a, K_m, V_m, sigma ~ cauchy+(0, 1)``; for C(t) see :func:`concentration`.
    """
    prior = dist.HalfCauchy(c_hat.new_tensor(1.0))
    k_a = pyro.sample("k_a", prior)
    k_m = pyro.sample("K_m", prior)
    v_m = pyro.sample("V_m", prior)
    sigma = pyro.sample("sigma", prior)
    # the floor only meets rounding errors of a compartment emptied to the last digit, far from any data
    c = concentration(k_a, k_m, v_m, times, t0, dose, volume).clamp(min=1e-12)
    with pyro.plate("observation", len(c_hat)):
        pyro.sample("C_hat", dist.LogNormal(c.log(), sigma), obs=c_hat)


# ---- data as the models take them ------------------------------------------------------------------------------------


def _columns(*columns: np.ndarray) -> np.ndarray:
    """Return the design matrix of an intercept and the given columns."""
    return np.column_stack([np.ones(len(columns[0])), *columns])


def _pick(*keys: str) -> Callable[[Data], tuple[Any, ...]]:
    """Return a function that takes the named entries of the data."""
    return lambda data: tuple(data[key] for key in keys)


def _lags(data: Data) -> tuple[Any, ...]:
    y, order = data["y"], data["K"]
    return np.column_stack([y[order - k : len(y) - k] for k in range(1, order + 1)]), y[order:]


def _earnings(data: Data) -> tuple[Any, ...]:
    height, male = data["height"], data["male"]
    return _columns(height, male, height * male), np.log(data["earn"])


def _kidiq_interaction(data: Data) -> tuple[Any, ...]:
    return _columns(data["mom_hs"], data["mom_iq"], data["mom_hs"] * data["mom_iq"]), data["kid_score"]


def _kidiq_momhs(data: Data) -> tuple[Any, ...]:
    return _columns(data["mom_hs"]), data["kid_score"]


_SIZES = ("diam1", "diam2", "canopy_height", "total_height", "density")


def _mesquite(data: Data) -> tuple[Any, ...]:
    return _columns(*(data[key] for key in _SIZES), data["group"]), data["weight"]


def _log_mesquite(data: Data) -> tuple[Any, ...]:
    return _columns(*(np.log(data[key]) for key in _SIZES), data["group"]), np.log(data["weight"])


def _nes(data: Data) -> tuple[Any, ...]:
    ages = [data["age_discrete"] == age for age in (2, 3, 4)]
    rest = (data[key] for key in ("educ1", "gender", "income"))
    return _columns(data["real_ideo"], data["race_adj"], *ages, *rest), data["partyid7"]


def _diamonds(data: Data) -> tuple[Any, ...]:
    design = data["X"][:, 1:]
    return design - design.mean(axis=0), data["Y"]


def _schools_noncentered(draws: Draws) -> Draws:
    mu, tau = draws["mu"], draws["tau"]
    return {"mu": mu, "tau": tau, "theta_trans": (draws["theta"] - mu[:, None]) / tau[:, None]}


# ---- the list --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Port:
    """How to make a `Problem`: its model, data -> arguments, log evidence, reference draws -> draws of latent sites."""

    model: Callable[..., None]
    arguments: Callable[[Data], tuple[Any, ...]]
    log_evidence: float | None = None
    latent: Callable[[Draws], Draws] = dict


_SCHOOLS = _pick("y", "sigma")
_KILPISJARVI = _pick("x", "y", "pmualpha", "psalpha", "pmubeta", "psbeta")

# Log evidence of the models as written here: proper densities normalized, flat priors of density 1, the density of the
# data with respect to the data itself; by bridge sampling between the reference draws and a Gaussian, good to 0.02.
_PORTS = {
    "eight_schools-eight_schools_noncentered": _Port(eight_schools_noncentered, _SCHOOLS, -31.31, _schools_noncentered),
    "eight_schools-eight_schools_centered": _Port(eight_schools_centered, _SCHOOLS, -31.32),
    "arK-arK": _Port(autoregression, _lags, 58.59),
    "earnings-logearn_interaction": _Port(flat_regression, _earnings, -1553.36),
    "kidiq-kidscore_interaction": _Port(kidscore_regression, _kidiq_interaction, -1872.82),
    "kidiq-kidscore_momhs": _Port(kidscore_regression, _kidiq_momhs),
    "kilpisjarvi_mod-kilpisjarvi": _Port(kilpisjarvi, _KILPISJARVI, -103.23),
    "mesquite-mesquite": _Port(flat_regression, _mesquite, -277.82),
    "mesquite-logmesquite": _Port(flat_regression, _log_mesquite),
    "nes1972-nes": _Port(flat_regression, _nes),
    "sblri-blr": _Port(blr, _pick("X", "y")),
    "diamonds-diamonds": _Port(diamonds, _diamonds, 3190.59),
    "gp_pois_regr-gp_regr": _Port(gp_regr, _pick("x", "y"), -27.56),
    "garch-garch11": _Port(garch11, _pick("y", "sigma1"), -451.01),
    "low_dim_gauss_mix-low_dim_gauss_mix": _Port(low_dim_gauss_mix, _pick("y"), -2115.68),
    "bball_drive_event_0-hmm_drive_0": _Port(hmm_drive_0, _pick("u", "v", "alpha")),
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": _Port(
        one_comp_mm_elim_abs, _pick("C_hat", "times", "t0", "D", "V"), -41.13
    ),
}

NAMES: tuple[str, ...] = tuple(_PORTS)


def load(name: str, root: str | os.PathLike[str] | None = None) -> Problem:
    """Return the problem ``name``, a full name of `NAMES` or its part after the dash, from the checkout at ``root``.

    Without ``root``, the checkout is looked for as in :func:`benchmarks.posteriors.reference.find_posteriordb`.
    """
    full = {alias: known for known in NAMES for alias in (known, known.split("-", 1)[1])}.get(name)
    if full is None:
        raise ValueError(f"expected the name of a ported posterior, got {name!r}; choose one of: {', '.join(NAMES)}")
    port = _PORTS[full]
    args = tuple(torch.as_tensor(value, dtype=torch.float64) for value in port.arguments(load_data(root, full)))
    draws = {site: torch.from_numpy(values) for site, values in load_draws(root, full).items()}
    return Problem(full, port.model, args, port.latent(draws), port.log_evidence)
