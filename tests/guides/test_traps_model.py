"""Traps of models: a flow in the model, and dtypes. Shown in Pyro, absent here."""

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import affine_coupling, iterated
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from torch import nn

import pyro_flows as pf
from tests.guides.test_guides import KINDS, each_kind
from tests.guides.test_traps import four, train
from tests.invariants import close
from tests.models import normal, real

# a flow in the model --------------------------------------------------------------------------------------------------

DATA = 1.5 * normal(40, 2, seed=72, dtype=torch.float32) + 1.0


def likelihood(flow):
    """A density estimate: the same tensor is scored at each step."""

    def model():
        pyro.module("likelihood", flow)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        density = flow() if isinstance(flow, pf.Flow) else dist.TransformedDistribution(base, [flow])
        with pyro.plate("n", len(DATA)):
            pyro.sample("y", density, obs=DATA)

    return model


def prior(flow):
    """A learned prior, conditioned on a value that stays the same tensor."""

    def model():
        pyro.module("prior", flow)
        theta = pyro.sample("theta", flow())
        pyro.sample("y", dist.Normal(theta, 0.5).to_event(1), obs=DATA[0])

    return pyro.condition(model, {"theta": DATA[1]})


def nothing():
    """A guide without latents."""


def test_pyros_flow_in_the_model_fails_at_the_second_step():
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        train(likelihood(affine_coupling(2, hidden_dims=[8])), nothing)


def test_pyros_flow_in_the_model_answers_with_old_parameters():
    flow = affine_coupling(2, hidden_dims=[8])
    density = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow])
    with torch.no_grad():
        density.log_prob(DATA)
        for parameter in flow.parameters():
            parameter.add_(0.3)
        assert (density.log_prob(DATA) - density.log_prob(DATA.clone())).abs().max() > 0.1


@pytest.mark.parametrize("build", [pf.realnvp, pf.nice, pf.planar])
@pytest.mark.parametrize("place", [likelihood, prior])
def test_a_flow_in_the_model_trains(place, build):
    flow = build(2, layers=2)
    losses = train(place(flow), nothing, steps=60, rate=0.02)
    assert losses[-1] < losses[0] - 0.5
    score = flow().log_prob(DATA).sum() if place is likelihood else flow().log_prob(DATA[1])
    noise = 0.0 if place is likelihood else dist.Normal(DATA[1], 0.5).log_prob(DATA[0]).sum()
    final = Trace_ELBO().loss(place(flow), nothing)
    close(torch.tensor(final), -(score + noise).detach(), 1e-4)  # float32 sums of 40 terms


def test_a_flow_in_the_model_and_a_guide():
    """A likelihood with a context that depends on a latent: both are trained."""
    flow = pf.realnvp(2, layers=2, context_dim=1)

    def model():
        pyro.module("flow", flow)
        shift = pyro.sample("shift", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("n", len(DATA)):
            pyro.sample("y", flow(shift.expand(len(DATA), 1)), obs=DATA)

    guide = KINDS["realnvp"](model)
    before = [parameter.detach().clone() for parameter in flow.parameters()]
    losses = train(model, guide, steps=40)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all((new != old).any() for new, old in zip(flow.parameters(), before, strict=True))


# dtypes ---------------------------------------------------------------------------------------------------------------

Y = real(0.3, 1.2, -0.4)


def wide(y):
    mu = pyro.sample("mu", dist.Normal(real(0.0, 0.0), 1.0).to_event(1))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu.sum(-1), 1.0), obs=y)


def test_pyros_flow_guide_of_a_float64_model_is_float32():
    guide = AutoNormalizingFlow(wide, partial(iterated, 2, affine_coupling)).to(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide(Y)
    assert {parameter.dtype for parameter in guide.transform.parameters()} == {torch.float32}


@each_kind
def test_a_guide_follows_the_models_dtype(kind):
    guide = KINDS[kind](wide)
    assert guide(Y)["mu"].dtype == torch.float64
    assert {value.dtype for value in guide.state_dict().values() if value.is_floating_point()} == {torch.float64}


@pytest.mark.parametrize(
    "move", [lambda guide: guide.to(torch.float64), nn.Module.double, lambda guide: guide.to(dtype=torch.float64)]
)
def test_a_move_before_the_first_call_counts(move):
    model = pyro.poutine.uncondition(four)
    guide = move(KINDS["realnvp"](model))
    assert guide()["x"].dtype == torch.float64
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.float64}
    train(model, guide)


def test_a_move_keeps_what_it_leaves_out():
    """To a device without a dtype, or for sharing memory: the dtype still comes from the model."""
    for move in (lambda guide: guide.to("cpu"), nn.Module.cpu, nn.Module.share_memory):
        guide = KINDS["realnvp"](wide)
        move(guide)
        assert guide(Y)["mu"].dtype == torch.float64


def test_a_move_after_the_first_call_counts():
    guide = KINDS["realnvp"](wide)
    train(wide, guide, Y)
    guide.float()
    assert guide.sample_posterior(2)["mu"].dtype == torch.float32
    train(wide, guide, Y)
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.float32}
