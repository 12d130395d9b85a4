"""One model for each method of ``fit``, with the posterior in closed form or by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flows.inference.verdict import methods

REAL = torch.float64
X = torch.linspace(-1.0, 2.0, 12, dtype=REAL)
NOISE = torch.tensor([0.3, -0.5, 0.2, 0.8, -0.9, 0.1, 0.4, -0.2, -0.6, 0.5, 0.0, -0.1], dtype=REAL)
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=REAL)  # Rubin 1981
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=REAL)


def zeros(*size: int) -> Tensor:
    """Zeros in double precision."""
    return torch.zeros(*size, dtype=REAL)


@dataclass(frozen=True)
class Known:
    """A model that one method answers, what it is told, and what is known of its posterior.

    ``moments`` are means and standard deviations by site; ``gradients`` is how many a fit may take.
    """

    model: Callable[..., None]
    args: tuple[Any, ...]
    moments: dict[str, tuple[Any, Any]]
    evidence: float
    gradients: int
    slow: bool = False


# a normal posterior ---------------------------------------------------------------------------------------------------


def line(x: Tensor, y: Tensor) -> None:
    """A regression with a known standard deviation: the posterior is normal."""
    b = pyro.sample("b", dist.Normal(zeros(2), 3.0).to_event(1))
    pyro.sample("y", dist.Normal(b[0] + b[1] * x, 0.5).to_event(1), obs=y)


def of_line() -> Known:
    """By the normal equations."""
    y = 1.0 + 2.0 * X + NOISE
    design = torch.stack([torch.ones_like(X), X], 1)
    covariance = torch.linalg.inv(design.mT @ design / 0.25 + torch.eye(2, dtype=REAL) / 9.0)
    mean = covariance @ design.mT @ y / 0.25
    marginal = dist.MultivariateNormal(zeros(12), 0.25 * torch.eye(12, dtype=REAL) + 9.0 * design @ design.mT)
    return Known(line, (X, y), {"b": (mean, covariance.diagonal().sqrt())}, float(marginal.log_prob(y)), 4_000)


# hierarchies of normal distributions ----------------------------------------------------------------------------------


def schools(y: Tensor, sigma: Tensor) -> None:
    """Rubin's eight schools."""
    mu = pyro.sample("mu", dist.Normal(zeros(1)[0], 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zeros(1)[0] + 5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def of_schools() -> Known:
    """By quadrature over log tau: given tau, mu and all effects are normal."""
    log_tau = torch.linspace(-14.0, 9.0, 20_001, dtype=REAL)
    tau = log_tau.exp()[:, None]
    variance = tau.square() + ERRORS.square()
    precision = (1.0 / variance).sum(1) + 1.0 / 25.0
    mu = (EFFECTS / variance).sum(1) / precision
    height = dist.Normal(zeros(8), variance.sqrt()).log_prob(EFFECTS).sum(1) - 0.5 * (25.0 * precision).log()
    height = height + 0.5 * precision * mu.square() + dist.HalfCauchy(5.0).log_prob(tau[:, 0]) + log_tau
    share = tau.square() / variance
    theta = share * EFFECTS + (1.0 - share) * mu[:, None]
    inside = share * ERRORS.square() + (1.0 - share).square() / precision[:, None]
    evidence = torch.logsumexp(height, 0) + (log_tau[1] - log_tau[0]).log()
    weight = torch.softmax(height, 0)

    def moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        first = weight @ mean
        return first, (weight @ (variance + mean.square()) - first.square()).sqrt()

    known = {"mu": moments(mu, 1.0 / precision), "theta": moments(theta, inside)}
    return Known(schools, (EFFECTS, ERRORS), known, float(evidence), 40_000)


def slopes(x: Tensor, y: Tensor) -> None:
    """Coefficients with an unknown scale and unknown noise: all coefficients are normal, given these two."""
    tau = pyro.sample("tau", dist.LogNormal(zeros(1)[0], 1.0))
    s = pyro.sample("s", dist.LogNormal(zeros(1)[0], 1.0))
    b = pyro.sample("b", dist.Normal(zeros(x.shape[1]), tau).to_event(1))
    pyro.sample("y", dist.Normal(x @ b, s).to_event(1), obs=y)


def of_slopes() -> Known:
    """By quadrature over log tau and log s."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 6, generator=generator, dtype=REAL)
    y = x @ torch.tensor([0.5, -1.0, 0.2, 0.0, 1.5, -0.4], dtype=REAL)
    y = y + 1.5 * torch.randn(30, generator=generator, dtype=REAL)
    sides = [torch.linspace(-4.0, 4.0, 161, dtype=REAL), torch.linspace(-1.5, 2.5, 161, dtype=REAL)]
    log_tau, log_s = torch.cartesian_prod(*sides).T
    tau, s = log_tau.exp(), log_s.exp()
    covariance = s.square()[:, None, None] * torch.eye(30, dtype=REAL) + tau.square()[:, None, None] * (x @ x.mT)
    height = dist.MultivariateNormal(zeros(30), covariance).log_prob(y)
    height = height + dist.Normal(0.0, 1.0).log_prob(log_tau) + dist.Normal(0.0, 1.0).log_prob(log_s)
    cell = (sides[0][1] - sides[0][0]) * (sides[1][1] - sides[1][0])
    weight = torch.softmax(height, 0)
    precision = (x.mT @ x) / s.square()[:, None, None] + torch.eye(6, dtype=REAL) / tau.square()[:, None, None]
    inverse = torch.linalg.inv(precision)
    b = inverse @ (x.mT @ y) / s.square()[:, None]
    mean = weight @ b
    second = weight @ (inverse.diagonal(dim1=1, dim2=2) + b.square())
    first = weight @ log_tau.exp()
    sd = (weight @ log_tau.mul(2.0).exp() - first.square()).sqrt()
    known = {"b": (mean, (second - mean.square()).sqrt()), "tau": (first, sd)}
    return Known(slopes, (x, y), known, float(torch.logsumexp(height, 0) + cell.log()), 40_000)


# several modes --------------------------------------------------------------------------------------------------------

AT = torch.tensor([[-3.0, 0.0], [3.0, 1.0]], dtype=REAL)
ROOTS = torch.tensor([[[1.0, 0.0], [0.8, 0.6]], [[0.5, 0.0], [-0.2, 0.7]]], dtype=REAL)
SHARES = torch.tensor([0.3, 0.7], dtype=REAL)


def two_modes() -> None:
    """Two normal distributions, each with a correlation of its own."""
    z = pyro.sample("z", dist.Normal(zeros(2), 10.0).to_event(1))
    both = dist.MultivariateNormal(AT, scale_tril=ROOTS).log_prob(z) + SHARES.log()
    pyro.factor("modes", torch.logsumexp(both, -1) - dist.Normal(zeros(2), 10.0).log_prob(z).sum(-1))


def of_two_modes() -> Known:
    """In closed form."""
    mean = SHARES @ AT
    second = SHARES @ ((ROOTS @ ROOTS.mT).diagonal(dim1=1, dim2=2) + AT.square())
    return Known(two_modes, (), {"z": (mean, (second - mean.square()).sqrt())}, 0.0, 75_000)


def two_places(z: Tensor, share: float) -> Tensor:
    """Log density of a mixture of two normal distributions, at -3 and 3 with sds of .5."""
    parts = [dist.Normal(side, 0.5).log_prob(z) for side in (-3.0, 3.0)]
    return torch.logsumexp(torch.stack(parts, -1) + torch.tensor([share, 1.0 - share], dtype=REAL).log(), -1)


def of_places(*shares: float) -> Known:
    """A product of mixtures, in closed form."""
    size = len(shares)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(zeros(size), 10.0).to_event(1))
        each = torch.stack([two_places(z[i], share) for i, share in enumerate(shares)])
        pyro.factor("modes", each.sum() - dist.Normal(zeros(size), 10.0).log_prob(z).sum())

    mean = torch.tensor([3.0 - 6.0 * share for share in shares], dtype=REAL)
    return Known(model, (), {"z": (mean, (9.25 - mean.square()).sqrt())}, 0.0, 40_000)


# bent posteriors ------------------------------------------------------------------------------------------------------


def of_bent(dim: int, gradients: int, slow: bool) -> Known:
    """Pairs (a, b) with a ~ N(0, 1) and b ~ N(a^2 / 2, 1)."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(zeros(dim), 1.0).to_event(1))
        bent = z[1::2] - 0.5 * z[::2].square()
        pyro.factor("bend", 0.5 * z[1::2].square().sum() - 0.5 * bent.square().sum())

    mean, sd = torch.tensor([0.0, 0.5], dtype=REAL), torch.tensor([1.0, math.sqrt(1.5)], dtype=REAL)
    return Known(model, (), {"z": (mean.repeat(dim // 2), sd.repeat(dim // 2))}, 0.0, gradients, slow=slow)


KNOWN = {
    methods.GAUSSIAN: of_line(),
    methods.GRID: of_schools(),
    methods.CONDITIONALS: of_slopes(),
    methods.MIXTURE: of_two_modes(),
    methods.INDEPENDENT: of_places(0.3, 0.6),
    methods.TABULATED: of_places(0.3),
    methods.TRAINED: of_bent(2, 80_000, slow=False),
    methods.MCMC: of_bent(40, 400_000, slow=True),
}
