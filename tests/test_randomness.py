"""Draws under vmap: distributions that torch draws in place keep their distribution, and rows differ."""

import pyro.distributions as dist
import pytest
import torch
from scipy.stats import kstest

from pyro_flows.batching import quiet
from pyro_flows.randomness import BatchedDraws

DRAWS = 4000


@pytest.mark.parametrize(
    "distribution",
    [
        dist.Normal(1.0, 2.0),
        dist.Uniform(-1.0, 3.0),
        dist.Exponential(2.0),
        dist.Cauchy(1.0, 2.0),
        dist.HalfCauchy(5.0),
        dist.StudentT(4.0, 1.0, 2.0),
        dist.Gamma(2.0, 3.0),
        dist.Laplace(0.5, 2.0),
        dist.Weibull(1.0, 2.0),
    ],
    ids=lambda distribution: type(distribution).__name__,
)
def test_same_distribution_one_draw_a_row(distribution):
    """Kolmogorov and Smirnov, each at level 1e-4."""
    with quiet(), BatchedDraws():
        drawn = torch.func.vmap(lambda _: distribution(), randomness="different")(torch.zeros(DRAWS))
    assert drawn.shape == (DRAWS,)
    assert len(drawn.unique()) > 0.99 * DRAWS
    assert kstest(drawn.numpy(), distribution.sample((20 * DRAWS,)).numpy()).pvalue > 1e-4


def test_only_inside():
    x = torch.empty(3)
    assert x.normal_() is x
    with BatchedDraws():
        assert x.normal_() is not x
