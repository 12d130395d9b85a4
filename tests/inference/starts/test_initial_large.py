"""Starts above 200 dimensions: L-BFGS paths with diagonal scales, and one Hessian at the highest end up to 1000."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.inference.starts.gaussians import Start, divergence
from pyro_flows.inference.starts.portfolio import portfolio
from tests.inference.starts.test_initial import best, names
from tests.inference.starts.test_pathfinder import gaussian
from tests.invariants import close
from tests.models import real
from tests.registry import normal


@pytest.mark.slow
def test_a_large_gaussian_with_scales_of_all_sizes():
    """D = 300, scales of 1e-6 to 1e6, correlated: the Gaussian itself, and the best diagonal one within 0.5 nats."""
    scales_ = 10.0 ** torch.linspace(-6.0, 6.0, 300, dtype=torch.float64)
    density, loc, factor = gaussian(scales_)
    found = portfolio(density, seed=0, df=1e6)
    precision = torch.cholesky_inverse(factor / scales_[:, None])
    reachable = 0.5 * (precision.logdet() - precision.diagonal().log().sum())
    assert reachable < -10.0, "nothing to lose by a diagonal"
    exact = Start("exact", loc, factor)
    assert found[0].scale.shape == (300, 300)
    assert divergence(found[0], exact) < 0.1
    diagonal = best(found, "laplace diagonal")
    assert diagonal.scale.shape == (300,)
    assert -divergence(diagonal, exact) > reachable - 0.5
    assert {"laplace diagonal", "standard", "prior"} <= set(names(found))
    assert best(found, "standard").elbo < -1e6


def test_a_large_regression():
    """250 coefficients under flat priors, columns of sizes 1e-3 to 1e3: the mode to 0.01 of the conditional scales."""
    size = 10.0 ** torch.linspace(-3.0, 3.0, 250, dtype=torch.float64)
    design = normal(400, 250, seed=101) * size
    data = design @ (normal(250, seed=102) / size) + 0.5 * normal(400, seed=103)

    def model(y):
        beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (250,)))
        pyro.sample("y", dist.Normal(design @ beta, 0.5).to_event(1), obs=y)

    density = pf.LogDensity(model, (data,))
    found = best(portfolio(density, seed=0), "laplace diagonal")
    exact = torch.linalg.lstsq(design, data[:, None]).solution[:, 0]
    conditional = 0.5 / design.norm(dim=0)
    assert ((found.loc - exact) / conditional).abs().max() < 1e-2
    close(found.scale / conditional, torch.ones(250, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("centered", [True, False])
def test_a_large_hierarchical_model(centered):
    """250 groups: the mode is at zero spread, where Laplace's start is hundreds of nats off; Pathfinder's is within 60.

    The log evidence is by quadrature over the two parameters that are left when the group means are integrated out.
    """
    y = 2.0 + 1.8 * normal(250, seed=101)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(real(5.0)))
        with pyro.plate("group", 250):
            if centered:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * pyro.sample("z", dist.Normal(real(0.0), 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    mu = torch.linspace(-1.0, 5.0, 200, dtype=torch.float64)[:, None, None]
    log_tau = torch.linspace(-6.0, 3.0, 300, dtype=torch.float64)[None, :, None]
    joint = dist.Normal(mu, (1.0 + (2.0 * log_tau).exp()).sqrt()).log_prob(y).sum(-1)
    joint = joint + dist.Normal(real(0.0), 5.0).log_prob(mu[..., 0]) + log_tau[..., 0]
    joint = joint + dist.HalfCauchy(real(5.0)).log_prob(log_tau[..., 0].exp())
    log_evidence = float(torch.logsumexp(joint.flatten(), 0) + math.log(6.0 / 199) + math.log(9.0 / 299))

    found = portfolio(pf.LogDensity(model, (y,)), seed=0, df=500.0)
    assert found[0].name == "pathfinder"
    assert log_evidence - 60.0 < found[0].elbo < log_evidence
    assert best(found, "laplace diagonal").elbo < log_evidence - 200.0
