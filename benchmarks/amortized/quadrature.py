"""Means and standard deviations of hierarchical posteriors by sums over grids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEP = 0.02  # of the grid of log rates; every third point is one of a too
WIDE = 6.0  # standard deviations that a grid of slopes reaches to either side
NEWTON = 30  # steps to the middle of that grid


def _moments(weights: Tensor, mean: Tensor, variance: Tensor | float = 0.0) -> tuple[float, float]:
    """Return mean and standard deviation of a mixture, whose parts have these weights, means and variances."""
    middle = (weights * mean).sum()
    return float(middle), float((weights * (variance + (mean - middle).square())).sum().sqrt())


def _columns(found: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    mean, sd = torch.tensor(found, dtype=torch.float64).T
    return mean, sd


def schools(y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations of log tau, eta and mu: given tau, all others are normal."""
    y, sigma = y.double(), sigma.double()
    log_tau = torch.linspace(-9.0, 9.0, 1801, dtype=torch.float64)
    tau = log_tau.exp()[:, None]
    noise = sigma.square() + tau.square()
    precision = 1.0 / 25.0 + (1.0 / noise).sum(1)
    mu = (y / noise).sum(1) / precision
    log_p = mu.square() * precision - precision.log() - (noise.log() + y.square() / noise).sum(1)
    weights = torch.softmax(0.5 * log_p - torch.log1p((tau[:, 0] / 5.0).square()) + log_tau, 0)
    eta = tau * (y - mu[:, None]) / noise
    spread = sigma.square() / noise + (tau / noise).square() / precision[:, None]
    effects = [_moments(weights, *parts) for parts in zip(eta.T, spread.T, strict=True)]
    return _columns([_moments(weights, log_tau), *effects, _moments(weights, mu, 1.0 / precision)])


def series(y: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations of log tau and phi of an AR(1) series: given tau, phi is normal."""
    y = y.double()
    log_tau = torch.linspace(-8.0, 8.0, 3201, dtype=torch.float64)
    tau = log_tau.exp()
    precision = 4.0 + tau * y[:-1].square().sum()  # of phi, with a prior sd of .5
    mean = tau * (y[1:] @ y[:-1]) / precision
    log_p = (a + 0.5 * len(y)) * log_tau - tau * (b + 0.5 * y.square().sum())
    weights = torch.softmax(log_p + 0.5 * mean.square() * precision - 0.5 * precision.log(), 0)
    return _columns([_moments(weights, log_tau), _moments(weights, mean, 1.0 / precision)])


def change(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations of both means and the time of a change.

    Given which data come before the change, the means are normal, and the time is uniform between two data.
    """
    y = y.double()
    before = torch.arange(len(y) + 1)[:, None] > torch.arange(len(y))
    parts = []
    for those in (before, ~before):
        precision = 0.25 + those.sum(1)  # of a mean, with a prior sd of 2
        parts.append((precision, (those * y).sum(1) / precision))
    ends = torch.cat([torch.zeros(1), torch.arange(len(y)) + 0.5, torch.tensor([float(len(y))])]).double()
    widths, middles = ends.diff(), 0.5 * (ends[1:] + ends[:-1])
    log_p = sum(0.5 * mean.square() * precision - 0.5 * precision.log() for precision, mean in parts)
    weights = torch.softmax(log_p + widths.log(), 0)
    means = [_moments(weights, mean, 1.0 / precision) for precision, mean in parts]
    return _columns([*means, _moments(weights, middles, widths.square() / 12.0)])


class Counts:
    """Poisson regression with effects of groups, whose log rates u = a + b at x = 0 are normal given a and s.

    Given the slope, a and s, groups are independent, and each has one integral over u.
    """

    def __init__(self, x: Tensor, group: Tensor) -> None:
        self.x, self.groups = x.double(), torch.nn.functional.one_hot(group).double()
        self.u = torch.arange(-250, 301, dtype=torch.float64) * STEP
        self.a, self.log_s = self.u[124:476:3], torch.arange(-12.0, 1.5, 0.2, dtype=torch.float64)
        away = (self.u[:, None, None] - self.a[:, None]) / self.log_s.exp()
        self.prior = torch.softmax(-0.5 * away.square(), 0).flatten(1)  # of u, (U, A * S)

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations of log s, a, b and the slope."""
        total, tilt = y.double() @ self.groups, float(y.double() @ self.x)
        slope = self._slopes(total, tilt)
        exposure = (slope[:, None] * self.x).exp() @ self.groups
        log_p = total[:, None] * self.u - exposure[..., None] * self.u.exp()  # (slopes, groups, U)
        top = log_p.amax(2, keepdim=True)
        powers = torch.stack([torch.ones_like(self.u), self.u, self.u.square()])
        sums = ((log_p - top).exp() * powers[:, None, None]) @ self.prior
        zeroth, first, second = sums.unflatten(-1, (len(self.a), -1))
        zeroth = zeroth.clamp_min(torch.finfo(sums.dtype).tiny)
        a, log_s = self.a[:, None], self.log_s
        joint = (zeroth.log() + top[..., None]).sum(1) + (slope * tilt - 2.0 * slope.square())[:, None, None]
        joint = joint - 0.5 * ((a - 1.0) / 0.7).square() - 0.5 * (log_s.exp() / 0.7).square() + log_s
        weights = torch.softmax(joint.flatten(), 0).view_as(joint)
        means, squares = first / zeroth, second / zeroth
        effects = [_moments(weights, means[:, g] - a, squares[:, g] - means[:, g].square()) for g in range(len(total))]
        ends = _moments(weights, log_s.expand_as(joint)), _moments(weights, a.expand_as(joint))
        return _columns([*ends, *effects, _moments(weights.sum((1, 2)), slope)])

    def _slopes(self, total: Tensor, tilt: float) -> Tensor:
        """Return a grid around the mode given the totals of groups, of which each is a multinomial."""
        slope = torch.zeros((), dtype=torch.float64)
        for _ in range(NEWTON):
            share = (slope * self.x).exp()[:, None] * self.groups
            share = share / share.sum(0)
            mean = self.x @ share
            precision = float(total @ (self.x.square() @ share - mean.square())) + 4.0  # of a prior with sd .5
            slope = slope + (tilt - total @ mean - 4.0 * slope) / precision
        return slope + torch.linspace(-WIDE, WIDE, 17, dtype=torch.float64) / math.sqrt(precision)
