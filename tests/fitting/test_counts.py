"""Counts over seeds: a fit that always says ``unreliable`` fails here, and so does one that never does."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from tests.models import real

DRAWS = 1000


def line(x, y):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2).double(), 2.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ slope, 1.0).to_event(1), obs=y)


X = real([[1.0, 0.2], [1.0, -0.7], [1.0, 1.5], [1.0, 0.4], [1.0, -1.1]])
Y = real(0.3, -1.2, 1.9, 0.1, -0.4)


def right(posterior):
    """Whether means are within .1 sd and sds within 10 % of the exact ones, by the guide's own draws."""
    precision = X.T @ X + 0.25 * torch.eye(2).double()
    covariance = torch.linalg.inv(precision)
    mean, sd = covariance @ (X.T @ Y), covariance.diagonal().sqrt()
    draws = posterior.samples["slope"]
    # standard errors of 1000 draws: .032 sd and 2.2 %
    off = ((draws.mean(0) - mean) / sd).abs().max()
    return bool(off < 0.1 + 0.06) and float((draws.std(0) / sd).log().abs().max()) < math.log(1.1) + 0.04


def ok_and_right(seeds):
    fits = [
        pf.fit(line, X, Y, seed=seed, layers=2, max_steps=900, draws=DRAWS, escalate=False, progress=False)
        for seed in seeds
    ]
    return sum(fit.verdict.status == "ok" and right(fit) for fit in fits), [str(fit.verdict) for fit in fits]


def two_modes():
    z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 10.0).to_event(1))
    ends = torch.stack([(z - 6.0).square().sum(-1), (z + 6.0).square().sum(-1)])
    pyro.factor("modes", torch.logsumexp(-0.5 * ends / 0.5**2, 0))


def unreliable(seeds):
    fits = [
        pf.fit(two_modes, seed=seed, layers=2, max_steps=200, draws=DRAWS, escalate=False, progress=False)
        for seed in seeds
    ]
    return sum(fit.verdict.status == "unreliable" for fit in fits), [str(fit.verdict) for fit in fits]


def test_three_fits_of_three_are_ok_and_right():
    count, said = ok_and_right(range(3))
    assert count == 3, said


@pytest.mark.slow
def test_three_fits_of_three_that_lack_a_mode_are_unreliable():
    count, said = unreliable(range(3))
    assert count == 3, said


@pytest.mark.slow
def test_nine_fits_of_ten_are_ok_and_right():
    count, said = ok_and_right(range(10, 20))
    assert count >= 9, said


@pytest.mark.slow
def test_ten_fits_of_ten_that_lack_a_mode_are_unreliable():
    count, said = unreliable(range(10, 20))
    assert count == 10, said
    assert all("misses a mode" in sentence for sentence in said), said
