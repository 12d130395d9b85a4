"""Bridge sampling: the evidence from draws of the posterior and draws of a proposal.

The proposal is a flow, or a Student t with the moments of draws, in the latent space of a flow if there is one: a flow
whose own weights are poor may still be a good map, which moves the posterior near a normal distribution.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pyro.distributions import MultivariateStudentT
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.inference.verdict.weighing import bridge_terms, bridge_value
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support import arviz

DF = 7.0  # of a Student t: the tails of most posteriors lie between it and a normal distribution


class Bridged(NamedTuple):
    """Log evidence and its standard error, nats, and whether the iteration settled."""

    value: float
    standard_error: float
    settled: bool


def bridge(posterior_ratio: Tensor, proposal_ratio: Tensor, chains: int = 1) -> Bridged:
    r"""Estimate :math:`\log Z` from log ratios :math:`\ell = \log \tilde p(z) - \log q(z)` at draws of both.

    .. math::
        Z = \frac{\frac 1{N_q} \sum_{z \sim q} e^\ell / (s_p e^\ell + s_q Z)}
                 {\frac 1{N_p} \sum_{z \sim p} 1 / (s_p e^\ell + s_q Z)}

    is the fixed point of Meng and Wong's optimal bridge; the shares :math:`s_p, s_q` count effective draws. The error
    is that of Frühwirth-Schnatter (2004): the relative variances of numerator and denominator, the latter over the
    effective sample size of its own series.

    Args:
        posterior_ratio: log ratios (N_p,) at draws of the posterior, which must not have been used to make q; chain
            after chain.
        proposal_ratio: log ratios (N_q,) at independent draws of q.
        chains: how many chains the draws of the posterior come from.

    References: Meng and Wong 1996; Frühwirth-Schnatter 2004; Gronau et al. 2017.

    >>> import torch
    >>> from torch.distributions import Normal
    >>> _ = torch.manual_seed(0)
    >>> p, q = Normal(0.0, 1.0), Normal(0.2, 1.2)
    >>> ratios = [p.log_prob(z) + 3.0 - q.log_prob(z) for z in (p.sample((4000,)), q.sample((4000,)))]
    >>> found = bridge(*ratios)
    >>> abs(found.value - 3.0) < 4 * found.standard_error, found.standard_error < 0.01
    (True, True)
    """
    at_p, at_q = finite(posterior_ratio), finite(proposal_ratio)
    shift = float(at_p.median())
    at_p, at_q = at_p - shift, at_q - shift
    effective = _effective((-torch.logaddexp(at_p, torch.zeros_like(at_p))).exp(), chains)
    share = effective / (effective + len(at_q))
    value, settled = bridge_value(at_p, at_q, share)
    above, below = bridge_terms(at_p, at_q, value, share)
    denominator = (below - below.max()).exp()
    variance = _relative_variance(above) / len(above)
    variance += _relative_variance(below) / _effective(denominator, chains)
    return Bridged(value + shift, math.sqrt(variance), settled)


def finite(ratio: Tensor) -> Tensor:
    """Return ratios in double precision; a draw that the model cannot score has density zero."""
    ratio = ratio.detach().double().cpu()
    return torch.where(torch.isfinite(ratio), ratio, -torch.inf)


def _relative_variance(logs: Tensor) -> float:
    values = (logs - logs.max()).exp()
    return float(values.var() / values.mean().square())


def _effective(series: Tensor, chains: int) -> float:
    """Return the effective sample size of the mean of a series that is one chain after the other."""
    return arviz.effective_draws(series.reshape(chains, -1))


# the proposal ---------------------------------------------------------------------------------------------------------


class Proposal(NamedTuple):
    """The multivariate Student t of ``df`` degrees of freedom at ``loc`` (D,), with the scale matrix root root^T."""

    loc: Tensor
    root: Tensor  # (D, D), lower triangular
    df: float

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return ``count`` draws (count, D) and their log densities (count,); uses torch's global generator."""
        z = self._law().sample(torch.Size((count,)))
        return z, self.log_prob(z)

    def log_prob(self, z: Tensor) -> Tensor:
        r"""Return :math:`\log q(z)` (N,)."""
        return self._law().log_prob(z.double().cpu())

    def _law(self) -> MultivariateStudentT:
        df = torch.tensor(self.df, dtype=torch.float64)
        return MultivariateStudentT(df, self.loc, scale_tril=self.root, validate_args=False)


def enough(count: float, dim: int) -> bool:
    """Whether there are enough draws for :func:`fit_proposal`."""
    return count >= 2 * dim + 10


def fit_proposal(z: Tensor, df: float = DF, log_weights: Tensor | None = None) -> Proposal:
    """Return the Student t with the mean and the covariance of draws (N, D), N above D, weighted or not."""
    count, dim = z.shape
    if not enough(count, dim):
        raise ValueError(f"draws: expected at least {2 * dim + 10} for a covariance of {dim} coordinates, got {count}.")
    z = z.detach().double().cpu()
    weights = torch.softmax(z.new_zeros(count) if log_weights is None else log_weights, 0)
    loc = weights @ z
    away = (z - loc) * (weights / (1.0 - weights.square().sum())).sqrt()[:, None]
    scale = away.norm(dim=0).clamp_min(torch.finfo(z.dtype).tiny)
    away = away / scale
    ridge = 1e-9 * torch.eye(dim, dtype=z.dtype)
    root = scale[:, None] * torch.linalg.cholesky(away.mT @ away + ridge) * math.sqrt((df - 2.0) / df)
    return Proposal(loc, root, df)


class Latent:
    """A log density in the latent space of a flow; in its own coordinates for what is no single flow, as ``like``."""

    def __init__(self, density: LogDensity, flow: object, like: Tensor) -> None:
        self.density, self.like = density, like
        self.bijection = flow.bijection if isinstance(flow, Flow) and flow.base != "uniform" else None

    def back(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the base points x (S, D) of draws, and the log Jacobian (S,) of the way to the draws."""
        if self.bijection is None:
            return z, z.new_zeros(len(z))
        x, ladj = self.bijection.inverse_and_ladj(z)
        return x, -ladj

    def at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z at base points (S, D), and the log density (S,) of these, -inf where it is not finite."""
        x = x.to(self.like)
        z, ladj = (x, x.new_zeros(len(x))) if self.bijection is None else self.bijection.forward_and_ladj(x)
        usable = torch.isfinite(z).all(1)
        z = torch.where(usable[:, None], z, self.like[:1])
        found = (self.density(z) + ladj).double().cpu()
        return z, torch.where(usable.cpu() & torch.isfinite(found), found, -torch.inf)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the log density (S,) of base points, which are taken some at a time."""
        return torch.cat([self.at(part)[1] for part in x.split(4096)])
