"""Data that lie in the tail of a fitted prior, of which no draw told: the posterior is no answer, and says so."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.flows.recipe import BUILDERS, with_affine
from pyro_flows.inference.scoring import BEYOND
from pyro_flows.priors.errors import PriorError
from pyro_flows.priors.parts import Part, PriorDistribution


def prior_of(dim):
    """A prior that is known exactly, standard normal over ``dim`` coordinates."""
    torch.manual_seed(0)
    flow = with_affine(BUILDERS["planar"](dim, layers=1, base="normal"), "diagonal")
    part = Part("theta", torch.Size([dim]), dist.constraints.independent(dist.constraints.real, 1), (None,))
    return lambda: PriorDistribution(flow, [part], PriorError(0.01, 0.01, 1))


def model(y, prior):
    theta = pyro.sample("theta", prior())
    pyro.sample("y", dist.Normal(theta, 0.1).to_event(1), obs=y)


def exact(y, prior):
    """The posterior under a standard normal prior."""
    pyro.sample("theta", dist.Normal(y / 1.01, 0.01**0.5 / 1.01**0.5).to_event(1))


def judged(y, prior):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pf.UnreliableWarning)
        return pf.diagnose(model, exact, y, prior, draws=400)


@pytest.mark.parametrize("dim", [1, 5])
def test_data_in_the_tail_of_a_fitted_prior_are_told_apart(dim):
    near, far = torch.zeros(dim), torch.zeros(dim)
    near[0], far[0] = 2.5, 5.0
    assert not any(reason.startswith(BEYOND) for reason in judged(near, prior_of(dim)).verdict.reasons)
    found = judged(far, prior_of(dim))
    assert found.verdict.status == "unreliable"
    assert any(reason.startswith(f"{BEYOND} the fitted prior 'theta'") for reason in found.verdict.reasons)


def test_the_distance_is_along_principal_axes_too():
    """Two coordinates with correlation .98: two sds each, with opposite signs, are far out."""
    prior = prior_of(2)()
    mixed = torch.tensor([[1.0, 0.0], [0.98, (1.0 - 0.98**2) ** 0.5]])
    drawn = prior.flow.draw(10_000)[0] @ mixed.T
    prior.flow.draw = lambda count: (drawn[:count], None)
    equal = torch.full((2,), 0.5)
    away, most = prior.sds_away(torch.tensor([[2.0, -2.0], [2.0, -2.0]]), equal)
    assert away == pytest.approx(20.0, rel=0.05)
    assert most == pytest.approx(3.48, abs=0.01)
    assert prior.sds_away(torch.tensor([[2.0, 2.0], [2.0, 2.0]]), equal)[0] == pytest.approx(2.0, rel=0.05)
