"""A log density of +inf at some places is told, and no sampler or weight corrects it."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf

Y = torch.tensor([0.4, 1.2, -0.3])


def above(limit, value=torch.inf):
    """A normal model with a factor of +inf above a limit."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("spike", torch.where(mu > limit, value, 0.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model


@pytest.mark.slow
@pytest.mark.falls_back  # infinite values of a graph equal no others
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_fit_is_unreliable_and_says_where(limit):
    found = pf.fit(above(limit), Y, draws=1000, max_steps=300, progress=False)
    assert found.verdict.status == "unreliable"
    assert any("+inf" in reason and "spike" in reason for reason in found.verdict.reasons), found.verdict
    again = found.refine(max_steps=5, progress=False)
    assert again.verdict.status == "unreliable"


def test_a_guide_and_chains_are_told_too():
    guide = lambda y: pyro.sample("mu", dist.Normal(0.3, 0.5))  # noqa: E731
    found = pf.diagnose(above(1.0), guide, Y, draws=1000, progress=False)
    assert found.verdict.status == "unreliable"
    assert any("+inf" in reason for reason in found.verdict.reasons)
    chains = {"mu": 0.3 + 0.5 * torch.randn(4, 500, generator=torch.Generator().manual_seed(0))}
    found = pf.from_mcmc(chains, above(1.0), Y)
    assert found.verdict.status == "unreliable"
    assert any("+inf" in reason for reason in found.verdict.reasons)


def test_values_that_rounding_puts_onto_the_edge_do_not_count():
    """Half of the draws of log x are below the smallest number above 0."""

    def model():
        pyro.sample("x", dist.Gamma(0.01, 1.0))

    density = pf.LogDensity(model)
    z = torch.tensor([[-50.0], [-90.0], [-150.0], [-200.0]])
    from pyro_flows.inference.scoring import infinite_places

    assert infinite_places(density, z, torch.tensor([1.0, 1.0, torch.inf, torch.inf])) == []
