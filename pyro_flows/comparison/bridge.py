"""Bridge sampling: the evidence from draws of the posterior and draws of a proposal."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows import _arviz
from pyro_flows.verdict.bridge import bridge_terms, bridge_value


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
    return _arviz.effective_draws(series.reshape(chains, -1))
