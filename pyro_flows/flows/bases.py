"""Base distributions at location 0 and scale 1: log densities by coordinate, their derivatives, and finite draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def log_density(base: str, x: Tensor, df: float) -> Tensor:
    """Return the log density of each coordinate of ``x``: there is less to compute than in torch's distributions."""
    if base == "normal":
        return -0.5 * x.square() - 0.5 * math.log(2.0 * math.pi)
    if base == "logistic":
        return 2.0 * logsigmoid(x) - x
    if base != "student_t":
        raise ValueError(f"base: expected 'normal', 'logistic' or 'student_t', got {base!r}.")
    half = 0.5 * (df + 1.0)
    constant = math.lgamma(half) - math.lgamma(0.5 * df) - 0.5 * math.log(math.pi * df)
    return constant - half * torch.log1p(x.square() / df)


def score(base: str, x: Tensor, df: float) -> Tensor:
    """Return the derivative of the log density at each coordinate of ``x``."""
    if base == "normal":
        return -x
    if base == "logistic":
        return -torch.tanh(0.5 * x)
    return x * (-(df + 1.0)) / (x.square() + df)


def cdf(base: str, x: Tensor, df: float) -> Tensor:
    """Return the distribution function at each coordinate of ``x``."""
    if base == "normal":
        return torch.special.ndtr(x)
    if base == "logistic":
        return torch.sigmoid(x)
    if base == "uniform":
        return (0.5 * (x + 1.0)).clamp(0.0, 1.0)
    from scipy.special import stdtr

    return torch.as_tensor(stdtr(df, x.detach().cpu().double().numpy())).to(x)


def icdf(base: str, u: Tensor, df: float) -> Tensor:
    """Return quantiles for probabilities."""
    if base == "normal":
        return torch.special.ndtri(u)
    if base == "logistic":
        return torch.logit(u)
    if base == "uniform":
        return 2.0 * u - 1.0
    from scipy.special import stdtrit

    return torch.as_tensor(stdtrit(df, u.detach().cpu().double().numpy())).to(u)


class Logistic(dist.Logistic):
    """Pyro's logistic distribution, whose draws are finite: one of 16 million single-precision uniform draws is 0."""

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        u = self.loc.new_empty(shape).uniform_().clamp(min=0.25 * torch.finfo(self.loc.dtype).eps)
        found: Tensor = self.icdf(u)
        return found
