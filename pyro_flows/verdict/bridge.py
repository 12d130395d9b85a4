"""Meng and Wong's optimal bridge estimator, from draws of both densities."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bridge_value(at_p: Tensor, at_q: Tensor, share: float) -> tuple[float, bool]:
    r"""Return :math:`\log Z` and whether the iteration settled, from log ratios :math:`\log \tilde p - \log q`.

    .. math:: Z = \frac{\frac 1{N_q} \sum_{z \sim q} e^\ell / (s e^\ell + (1 - s) Z)}
                       {\frac 1{N_p} \sum_{z \sim p} 1 / (s e^\ell + (1 - s) Z)}

    Ratios are at draws of p (N_p,) and of q (N_q,), in double precision; s is the share of those of p.

    Reference: Meng and Wong 1996, "Simulating ratios of normalizing constants via a simple identity".
    """
    value, settled = 0.0, False
    for _ in range(1000):
        above, below = bridge_terms(at_p, at_q, value, share)
        new = _log_mean(above) - _log_mean(below)
        settled = abs(new - value) < 1e-10  # nats
        value = new
        if settled or not math.isfinite(value):
            break
    return value, settled


def bridge_terms(at_p: Tensor, at_q: Tensor, value: float, share: float) -> tuple[Tensor, Tensor]:
    """Return the logarithms of the terms of numerator (N_q,) and denominator (N_p,), at log Z = ``value``."""
    log_p_share, log_q_share = math.log(share), math.log1p(-share)
    other_q, other_p = (torch.full_like(at, log_q_share + value) for at in (at_q, at_p))
    return at_q - torch.logaddexp(log_p_share + at_q, other_q), -torch.logaddexp(log_p_share + at_p, other_p)


def _log_mean(logs: Tensor) -> float:
    return float(torch.logsumexp(logs, 0)) - math.log(len(logs))
