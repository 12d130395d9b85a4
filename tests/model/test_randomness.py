"""Draws under vmap: distributions that torch draws in place keep their distribution, and rows differ."""

import pyro.distributions as dist
import pytest
import torch
from scipy.stats import kstest

from pyro_flows.model.batching import quiet
from pyro_flows.support.process.seeding import BatchedDraws

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
        dist.Beta(2.0, 0.7),
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


def test_counts_and_parts_of_a_whole_differ_by_row():
    """Three standard errors and a half of a mean: 5e-4."""
    shares = torch.tensor([0.2, 0.3, 0.5])
    for fn in (dist.Multinomial(10, shares), dist.DirichletMultinomial(4.0 * shares, 10), dist.Dirichlet(shares)):
        with quiet(), BatchedDraws():
            drawn = torch.func.vmap(lambda _, fn=fn: fn(), randomness="different")(torch.zeros(DRAWS))
        total = fn.sample().sum()
        torch.testing.assert_close(drawn.sum(-1), total.expand(DRAWS))
        error = 3.5 * (fn.variance / DRAWS).sqrt()
        assert ((drawn.mean(0) - total * shares).abs() < error).all()
        assert len(drawn.unique(dim=0)) > 20


def test_binomial_counts_with_chances_of_their_own():
    """vmap warned of an output that it resized, and a warning is an error here. 3.5 standard errors: 5e-4."""
    chances = torch.linspace(0.1, 0.9, 5)
    with BatchedDraws():
        drawn = torch.func.vmap(lambda p: dist.Binomial(20.0, p).sample(), randomness="different")(
            chances.expand(DRAWS, 5)
        )
    error = 3.5 * (20.0 * chances * (1.0 - chances) / DRAWS).sqrt()
    assert ((drawn.mean(0) - 20.0 * chances).abs() < error).all()


def test_gradients_of_draws_outside_of_transforms_are_kept():
    ones = torch.ones(3, requires_grad=True)
    with BatchedDraws():
        dist.Dirichlet(ones).rsample()[0].backward()
    assert ones.grad.abs().sum() > 0
