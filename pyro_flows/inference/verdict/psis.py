"""Pareto-smoothed importance sampling: importance weights whose largest ones follow a fitted tail, and its shape."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.support.thresholds import K_HAT_MOST


class Tail(NamedTuple):
    r"""The generalized Pareto distribution that was fitted to the largest weights.

    .. math:: P(w > x) = \frac MS \Big(1 + k \frac{x - u}\sigma\Big)^{-1/k}

    Attributes:
        k_hat: its shape k.
        scale: its scale sigma; NaN where no tail was fitted.
        cutoff: the weight u that the tail begins above, of weights of which the largest is 1.
        size: how many weights M it was fitted to.
    """

    k_hat: float
    scale: float
    cutoff: float
    size: int


def largest_k(draws: int) -> float:
    """Return what k-hat must be below, for weighted averages of so many draws to be trusted."""
    return min(1.0 - 1.0 / math.log10(max(draws, 11)), K_HAT_MOST)


def psis(log_weights: Tensor) -> tuple[Tensor, float]:
    r"""Return normalized, smoothed log weights (S,), in double precision, and the shape estimate :math:`\hat k`.

    The :math:`M = 3\sqrt S` largest weights (a fifth of them up to S = 225) are replaced by the quantiles of a
    generalized Pareto distribution fitted to what they exceed the next one by, none above the largest.

    Draws with log weight -inf keep weight zero and count as draws. Weights whose largest ones are equal up to rounding
    are bounded and have no tail to fit: they stay as they are, with k-hat 0. Where other ties leave nothing to fit,
    they stay as they are and k-hat is infinite, as for fewer than 30 draws. Cost: sorting, and :math:`O(M^{1.5})`.

    Args:
        log_weights: log importance ratios (S,), up to a constant; at least one of them finite.

    References: Vehtari et al., *Pareto smoothed importance sampling*, JMLR 2024; Zhang and Stephens 2009.

    >>> weights, k_hat = psis(torch.linspace(0.0, 1.0, 1000))
    >>> round(float(weights.exp().sum()), 6), k_hat < 0.5
    (1.0, True)
    """
    given = _relative(log_weights)
    ordered, places = given.sort()
    tail = _tail(ordered)
    smoothed, k_hat = given, tail.k_hat
    if not math.isnan(tail.scale):
        levels = (torch.arange(tail.size, dtype=given.dtype) + 0.5) / tail.size
        largest = (tail.cutoff + _quantiles(levels, k_hat, tail.scale)).log().clamp(max=0.0)
        if math.isfinite(k_hat) and bool(torch.isfinite(largest).all()):
            smoothed = given.index_copy(0, places[-tail.size :], largest)
        else:
            k_hat = math.inf
    smoothed = torch.where(torch.isfinite(given), smoothed, -torch.inf)
    return (smoothed - torch.logsumexp(smoothed, 0)).to(log_weights.device), k_hat


def fit_tail(log_weights: Tensor) -> Tail:
    """Return the fit that :func:`psis` makes to the largest of the weights (S,)."""
    return _tail(_relative(log_weights).sort().values)


def _relative(log_weights: Tensor) -> Tensor:
    """Return log weights less the largest one, -inf for all that are not finite."""
    given = log_weights.detach().double().cpu()
    given = torch.where(torch.isfinite(given), given, -torch.inf)
    return given - given.max()


def _tail(ordered: Tensor) -> Tail:
    """Fit the tail of sorted log weights (S,) of which the largest is 0."""
    count = len(ordered)
    tail = math.floor(3.0 * math.sqrt(count)) if count > 225 else count // 5
    if tail < 6:  # the first quartile would be the smallest point
        return Tail(math.inf, math.nan, math.nan, tail)
    cutoff = ordered[-tail - 1].exp()
    if float(ordered[-1] - ordered[-tail - 1]) < 1e-3:  # nats: weights that are the same have no tail
        return Tail(0.0, math.nan, float(cutoff), tail)
    k_hat, scale = fit_pareto(ordered[-tail:].exp() - cutoff)
    found = (k_hat, scale) if math.isfinite(k_hat) and math.isfinite(scale) else (math.inf, math.nan)
    return Tail(*found, float(cutoff), tail)


def fit_pareto(excesses: Tensor) -> tuple[float, float]:
    r"""Return shape k and scale of a generalized Pareto distribution for sorted excesses (M,) over a threshold.

    .. math:: p(x) = \frac 1\sigma \Big(1 + k \frac x\sigma\Big)^{-1/k - 1}

    The mean of :math:`\theta = -k / \sigma` under a quasi-posterior over a grid, its profile likelihood times an
    empirical prior; k is drawn towards 1/2 a little, as if ten more excesses had said so. NaN where a first quarter
    is one value, which no such distribution has.

    Reference: Zhang and Stephens 2009.
    """
    count = len(excesses)
    grid = 30 + math.isqrt(count)
    steps = torch.arange(1, grid + 1, dtype=excesses.dtype) - 0.5
    quartile, largest = excesses[int(count / 4 + 0.5) - 1], excesses[-1]
    if not quartile > excesses[0]:
        return math.nan, math.nan
    thetas = 1.0 / largest + (1.0 - (grid / steps).sqrt()) / (3.0 * quartile)
    shapes = torch.log1p(-thetas[:, None] * excesses).mean(1)
    profile = count * ((-thetas / shapes).log() - shapes - 1.0)
    weights = torch.softmax(profile, 0)
    weights = torch.where(weights < 10.0 * torch.finfo(weights.dtype).eps, 0.0, weights)  # NaN stays NaN
    theta = float((thetas * weights).sum() / weights.sum())
    shape = float(torch.log1p(-theta * excesses).mean())
    scale = -shape / theta if theta else math.nan
    return (count * shape + 10 * 0.5) / (count + 10), scale  # the authors' prior of the shape


def _quantiles(levels: Tensor, shape: float, scale: float) -> Tensor:
    """Return quantiles of the generalized Pareto distribution; NaN without a positive scale."""
    if not scale > 0.0:
        return torch.full_like(levels, torch.nan)
    exponents = -torch.log1p(-levels)
    return scale * (exponents if shape == 0.0 else torch.expm1(shape * exponents) / shape)
