"""Affine parts of a mixture, and copies of one flow, all at once: as one after the other."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.flows.mixture import Component, FlowMixture
from pyro_flows.flows.parts import location_scale, student_mixture
from pyro_flows.flows.stacked import Stacked, stacked
from pyro_flows.inference.chains.adaptation import Metric
from pyro_flows.inference.chains.hmc import microcanonical
from pyro_flows.inference.chains.latent import Latent
from tests.registry import normal, randomize

DIM, PARTS, CHAINS = 4, 6, 40


def quartic():
    z = pyro.sample("z", dist.Normal(torch.zeros(DIM, dtype=torch.float64), 1.0).to_event(1))
    pyro.factor("narrower", -0.1 * z.pow(4).sum())


def mixture():
    tril = 0.5 * torch.eye(DIM).double() + 0.2 * normal(PARTS, DIM, DIM, seed=1).tril(-1)
    found = student_mixture(normal(PARTS, DIM, seed=2), tril, [0.5 * k for k in range(PARTS)], df=5.0)
    mirrored = [replace(part, signs=(-1.0) ** part.flow * part.signs) for part in found.components]
    return FlowMixture(found.members, mirrored)


def copies():
    torch.manual_seed(0)
    flow = randomize(pf.realnvp(DIM, layers=2, base="student_t", df=5.0).double(), sd=0.1)
    orders = [normal(DIM, seed=part).argsort() for part in range(PARTS)]
    signs = [normal(DIM, seed=10 + part).sign() for part in range(PARTS)]
    return FlowMixture([flow], [Component(0, 0.5 * part, orders[part], signs[part]) for part in range(PARTS)])


def copies_of_flows():
    """Three parts of one flow, two of another, and one of a map that is affine."""
    one, affine = copies(), location_scale(DIM, df=5.0).double()
    other = randomize(pf.realnvp(DIM, layers=3, base="student_t", df=5.0).double(), sd=0.1)
    which = [1, 0, 1, 2, 0, 0]
    parts = [replace(part, flow=number) for part, number in zip(one.components, which, strict=True)]
    return FlowMixture([*one.members, other, affine], parts)


MIXTURES = {"affine parts": mixture, "copies": copies, "copies of flows": copies_of_flows}
everywhere = pytest.mark.parametrize("make", MIXTURES.values(), ids=MIXTURES)


def points():
    k = torch.arange(CHAINS) % PARTS
    return normal(CHAINS, DIM, seed=3), torch.where(k == 1, 2, k)  # a part without points


def both(make, monkeypatch):
    """The same mixture with its parts at once, and one after the other."""
    together = Latent(make(), pf.LogDensity(quartic))
    with monkeypatch.context() as patched:
        patched.setattr("pyro_flows.inference.chains.latent.stacked", lambda *_: None)
        apart = Latent(make(), pf.LogDensity(quartic))
    assert together.stacked is not None
    assert apart.stacked is None
    return together, apart


@everywhere
def test_points_and_gradients_are_the_same(make, monkeypatch):
    together, apart = both(make, monkeypatch)
    expected = apart.look(*points())
    for _ in range(3):  # as torch does it, and as it was recorded
        for one, other in zip(together.look(*points()), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert together.graph(together.joined(*points())) is not None


@everywhere
def test_trajectories_are_the_same(make, monkeypatch):
    """The step is one recorded graph in the one, and none in the other."""
    axis = normal(DIM, 1, seed=6)
    metric = Metric(0.5 + normal(DIM, seed=7).abs(), axis / axis.norm(), 2.0 * torch.ones(1).double())
    ends = []
    for latent in both(make, monkeypatch):
        begun = latent.look(*points())
        torch.manual_seed(0)
        ends.append(microcanonical(latent, begun, step=0.1, leaps=3, metric=metric).points)
        assert [step is not None for step in latent.leaps.values()] == [latent.stacked is not None]
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@everywhere
def test_places_are_the_same(make, monkeypatch):
    z, found = normal(CHAINS, DIM, seed=4), []
    for latent in both(make, monkeypatch):
        torch.manual_seed(0)
        found.append(latent.place(z))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-12)
    assert torch.equal(found[0][1], found[1][1])


@everywhere
def test_gradients_are_those_of_the_target(make, monkeypatch):
    """By differences of log pi, one coordinate after the other."""
    x, k = points()
    for latent in both(make, monkeypatch):
        slope, step = latent.look(x, k).slope, 1e-6
        for axis in range(DIM):
            away = step * torch.eye(DIM, dtype=torch.float64)[axis]
            change = (latent.look(x + away, k).log_pi - latent.look(x - away, k).log_pi) / (2.0 * step)
            torch.testing.assert_close(slope[:, axis], change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", ["another base", "another df"])
def test_other_mixtures_are_done_one_part_after_the_other(what):
    flows = [location_scale(DIM, df=5.0).double() for _ in range(2)]
    parts = [Component(0), Component(1)]
    if what == "another base":
        flows[1] = location_scale(DIM, base="normal").double()
    else:
        flows[1] = location_scale(DIM, df=6.0).double()
    assert stacked(flows, parts) is None
    assert isinstance(stacked(flows[:1], [Component(0), Component(0)]), Stacked)
    latent = Latent(FlowMixture(flows, parts), pf.LogDensity(quartic))
    x, k = normal(6, DIM, seed=5), torch.tensor([0, 1, 1, 0, 1, 0])
    step = 1e-6 * torch.eye(DIM, dtype=torch.float64)[0]
    change = (latent.look(x + step, k).log_pi - latent.look(x - step, k).log_pi) / 2e-6
    torch.testing.assert_close(latent.look(x, k).slope[:, 0], change, rtol=1e-5, atol=1e-6)


@everywhere
def test_a_mixture_is_scored_the_same_with_and_without_gradients(make):
    far = torch.tensor([1e200, torch.inf], dtype=torch.float64)
    z = torch.cat([normal(CHAINS, DIM, seed=5), far[:, None].expand(2, DIM)])
    found = make()
    with torch.no_grad():
        together = found.log_prob(z)
    apart = found.log_prob(z)
    assert apart.requires_grad
    torch.testing.assert_close(together, apart.detach(), rtol=1e-12, atol=1e-12, equal_nan=True)


def test_copies_of_a_flow_with_edges():
    flow = pf.realnvp(2, layers=2, base="uniform")
    found = FlowMixture([flow], [Component(0), Component(0, signs=-torch.ones(2))])
    torch.manual_seed(0)
    z, log_q = found.draw(20)
    torch.testing.assert_close(log_q, found.log_prob(z).detach())
    assert bool(torch.isfinite(log_q).all())
