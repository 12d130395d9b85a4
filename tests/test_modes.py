"""Modes that a guide lacks."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.initial import Start
from pyro_flows.modes import missed_modes
from tests.registry import normal


def apart(places, dim=1):
    """Equal unit normals at these places along the first axis, on a flat latent."""

    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
        centres = torch.zeros(len(places), dim, dtype=torch.float64)
        centres[:, 0] = torch.as_tensor(places, dtype=torch.float64)
        pyro.factor("modes", torch.logsumexp(-0.5 * (z - centres).square().sum(-1), 0))

    return pf.LogDensity(model)


def lacking(density, guide, modes=()):
    z = guide.sample((200,))
    return missed_modes(density, modes, z, guide.log_prob(z), guide.log_prob)


def gauss(loc, sd, dim=1):
    loc = torch.cat([torch.tensor([loc]), torch.zeros(dim - 1)]).double()
    return dist.Normal(loc, sd).to_event(1)


def test_a_saddle_says_nothing():
    """The guide is thick between two modes, where there is no mass, and covers both: none is missed."""
    torch.manual_seed(0)
    one = torch.ones(1, dtype=torch.float64)
    modes = [Start("", at * one, one, evidence=evidence) for at, evidence in ((5.0, 0.9), (-5.0, 0.9), (0.0, -11.6))]
    assert lacking(apart([-5.0, 5.0]), gauss(0.0, 5.0), modes) == []


def test_a_mode_of_the_portfolio_that_the_guide_lacks_is_named():
    torch.manual_seed(0)
    one = torch.ones(1, dtype=torch.float64)
    modes = [Start("", at * one, one.diag(), evidence=0.9) for at in (5.0, -5.0)]
    (found,) = lacking(apart([-5.0, 5.0]), gauss(5.0, 1.0), modes)
    assert "lacks a mode near z = -5" in found


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_a_mode_that_nobody_knew_of_is_found_from_outside(dim):
    torch.manual_seed(0)
    (found,) = lacking(apart([0.0, 10.0], dim), gauss(0.0, 1.0, dim))
    assert "lacks a mode near z = 10" in found


def test_a_guide_that_is_right_lacks_nothing():
    torch.manual_seed(0)
    assert lacking(apart([0.0], 4), gauss(0.0, 1.0, 4)) == []


def test_a_small_mode_does_not_count():
    """One part in a thousand of the mass, ten sds away."""

    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (1,)))
        ends = torch.stack([-0.5 * z[0] ** 2, -0.5 * (z[0] - 10.0) ** 2 - 7.0])
        pyro.factor("modes", torch.logsumexp(ends, 0) + 0.0 * normal(1, seed=1)[0])

    torch.manual_seed(0)
    assert lacking(pf.LogDensity(model), gauss(0.0, 1.0)) == []


def test_two_modes_of_which_the_start_is_one():
    """Flat priors are searched around zero: the mode there is found at once, the other only from outside."""

    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.factor("modes", torch.logsumexp(-0.5 * torch.stack([z, z - 7.0]).square().sum(-1), 0))

    posterior = pf.fit(model, progress=False, max_steps=1200, escalate=False, draws=2000)
    share = float((posterior.samples["z"][:, 0] < 3.5).double().mean())
    assert 0.4 < share < 0.6 or "lacks a mode" in str(posterior.verdict)
    assert 0.4 < share < 0.6 or posterior.verdict.status == "unreliable"
