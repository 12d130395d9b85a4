"""The latent space of Pyro's own continuous guides: weights, gradients, and the way back."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import affine_coupling, iterated
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormalizingFlow,
)

import pyro_flows as pf
from pyro_flows.fitting.programs import space_of
from pyro_flows.inference.chains.latent import Latent


def model():
    """A scalar, a vector and a plated site."""
    scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(1.0)))
    pyro.sample("vector", dist.StudentT(5.0, torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 3):
        x = pyro.sample("x", dist.Normal(torch.tensor(0.5), scale))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor([0.3, -1.0, 2.0]))


@pytest.fixture(autouse=True)
def double():
    """Differences of numbers need more than single precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


GUIDES = {
    "diagonal": AutoDiagonalNormal,
    "full": AutoMultivariateNormal,
    "couplings": lambda given: AutoNormalizingFlow(given, partial(iterated, 3, affine_coupling)),
    "autoregressive": AutoIAFNormal,
    "ours": pf.AutoRealNVP,
}


@pytest.mark.parametrize("name", GUIDES)
def test_points_in_the_space_of_a_guide(name):
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    guide = GUIDES[name](model)
    guide()
    density = pf.LogDensity(model)
    space = space_of(guide, density, (), {})
    assert isinstance(space, Latent) is (name == "ours")
    with torch.no_grad():
        posterior = guide.get_posterior()
        z = posterior.sample((6,))
        log_q = posterior.log_prob(z)
        x, k = space.place(z)
        points = space.look(x, k)
    torch.testing.assert_close(points.z, z, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(points.log_weight, density(z) - log_q, rtol=1e-6, atol=1e-8)
    step = 1e-6
    for axis in torch.eye(density.dim):
        low, high = (space.look(x + sign * step * axis, k) for sign in (-1.0, 1.0))
        for value, slope in (("log_pi", points.slope), ("log_ref", points.ref_slope)):
            change = (getattr(high, value) - getattr(low, value)) / (2.0 * step)
            torch.testing.assert_close(slope @ axis, change, rtol=1e-5, atol=1e-6)


def test_a_guide_without_a_base_has_no_space():
    pyro.clear_param_store()
    guide = AutoLowRankMultivariateNormal(model, rank=2)
    guide()
    assert space_of(guide, pf.LogDensity(model), (), {}) is None
