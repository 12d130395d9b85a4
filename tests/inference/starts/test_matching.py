"""Starts at the moments that weights tell."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.starts.portfolio import NAME, matched


def real(*values):
    return torch.tensor(values, dtype=torch.float64)


MEAN = real(1.0, -2.0, 0.5)
ROOT = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.2, 2.0]], dtype=torch.float64)


def normal_model():
    pyro.sample("x", dist.MultivariateNormal(MEAN, scale_tril=ROOT))


def test_the_moments_of_a_normal_distribution():
    """Standard errors of means are 1 / sqrt(20000) sds = .007, of log sds .005; those of the first round are small."""
    density = pf.LogDensity(normal_model)
    start = Start("off", MEAN + 0.3 * ROOT.norm(dim=1), 1.2 * ROOT)
    found = matched(density, start, 60.0, seed=0)
    assert found.name == NAME
    sds = ROOT.norm(dim=1)
    assert float(((found.loc - MEAN) / sds).abs().max()) < 0.03
    torch.testing.assert_close(found.scale @ found.scale.mT / sds / sds[:, None], ROOT @ ROOT.mT / sds / sds[:, None],
                               atol=0.05, rtol=0.0)  # fmt: skip
    assert density.evaluations == 0, "no gradients"
    assert found.elbo > start.elbo


def test_where_the_noise_of_a_covariance_would_cost_too_much_its_diagonal_is_matched():
    dim = 60
    sds = torch.linspace(0.5, 2.0, dim, dtype=torch.float64)
    density = pf.LogDensity(lambda: pyro.sample("x", dist.Normal(torch.zeros(dim).double(), sds).to_event(1)))
    start = Start("off", 0.05 * sds, torch.diag(1.06 * sds))
    found = matched(density, start, 120.0, seed=0)
    assert found.name == NAME
    assert torch.equal(found.scale, torch.diag(found.scale.diagonal())), "correlations stay those of the start"
    assert float((found.scale.diagonal() / sds).log().abs().max()) < 0.025  # standard error .005, 60 of them
    assert float((found.loc / sds).abs().max()) < 0.04  # standard error .01


def test_what_is_right_already_gets_no_noise():
    dim = 60
    density = pf.LogDensity(lambda: pyro.sample("x", dist.Normal(torch.zeros(dim).double(), 1.0).to_event(1)))
    even = Start("even", torch.zeros(dim).double(), torch.ones(dim).double())
    assert matched(density, even, 1000.0, seed=0) is even, "weights are even"
    off = Start("off", torch.zeros(dim).double(), torch.where(torch.arange(dim) < 5, 1.2, 1.0).double())
    found = matched(density, off, 120.0, seed=0)
    # of normal errors, 68 % are within one standard error (.007, .005); shrinking leaves a third of the variance
    assert float((found.loc == 0.0).double().mean()) > 0.3
    assert float(found.loc.square().mean().sqrt()) < 0.9 / math.sqrt(19_000.0)
    assert float((found.scale[5:] == 1.0).double().mean()) > 0.3
    assert float((found.scale[:5] - 1.0).abs().max()) < 0.03


@pytest.mark.parametrize("away", [8.0, math.inf])
def test_poor_weights_leave_the_start_as_it_is(away):
    density = pf.LogDensity(normal_model)
    start = Start("far", MEAN + min(away, 1e6), 0.1 * ROOT)
    assert matched(density, start, 15.0, seed=0) is start


def test_one_seed_one_start():
    density = pf.LogDensity(normal_model)
    start = Start("off", MEAN + 0.2, ROOT)
    one, again, other = (matched(density, start, 15.0, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.loc, again.loc)
    assert not torch.equal(one.loc, other.loc)


@pytest.mark.parametrize("seed", range(3))
def test_nearly_even_weights_tell_moments_without_the_noise_of_the_draws(seed):
    """The moments of 4000 draws alone have errors of .016 sds; those of weights of .98 S effective draws have .003."""
    density = pf.LogDensity(normal_model)
    found = matched(density, Start("off", MEAN + 0.1 * ROOT.norm(dim=1), ROOT), 1e6, seed=seed, draws=1000)
    assert found.name == NAME
    assert float(((found.loc - MEAN) / ROOT.norm(dim=1)).abs().max()) < 0.01


def test_checks_of_a_model_of_many_rows_take_fewer_draws():
    x = torch.linspace(-1.0, 1.0, 50_000)

    def model(y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(slope * x[: len(y)], 1.0), obs=y)

    many, few = (pf.LogDensity(model, (torch.zeros(rows),)) for rows in (50_000, 500))
    assert few.affordable(20_000) == 20_000
    assert 400 <= many.affordable(20_000) < 20_000
    assert many.affordable(400) == 400
