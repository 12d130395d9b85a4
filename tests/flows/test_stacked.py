"""Affine parts of a mixture, all at once: as one after the other."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.correction.latent import Latent
from pyro_flows.flows.mixture import Component, FlowMixture
from pyro_flows.flows.parts import location_scale, student_mixture
from pyro_flows.flows.stacked import stacked
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


def points():
    k = torch.arange(CHAINS) % PARTS
    return normal(CHAINS, DIM, seed=3), torch.where(k == 1, 2, k)  # a part without points


def both(monkeypatch):
    """The same mixture with its parts at once, and one after the other."""
    together = Latent(mixture(), pf.LogDensity(quartic))
    with monkeypatch.context() as patched:
        patched.setattr("pyro_flows.correction.latent.stacked", lambda *_: None)
        apart = Latent(mixture(), pf.LogDensity(quartic))
    assert together.stacked is not None
    assert apart.stacked is None
    return together, apart


def test_points_and_gradients_are_the_same(monkeypatch):
    found = [latent.look(*points()) for latent in both(monkeypatch)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_places_are_the_same(monkeypatch):
    z, found = normal(CHAINS, DIM, seed=4), []
    for latent in both(monkeypatch):
        torch.manual_seed(0)
        found.append(latent.place(z))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-12)
    assert torch.equal(found[0][1], found[1][1])


def test_gradients_are_those_of_the_target(monkeypatch):
    """By differences of log pi, one coordinate after the other."""
    x, k = points()
    for latent in both(monkeypatch):
        slope, step = latent.look(x, k).slope, 1e-6
        for axis in range(DIM):
            away = step * torch.eye(DIM, dtype=torch.float64)[axis]
            change = (latent.look(x + away, k).log_pi - latent.look(x - away, k).log_pi) / (2.0 * step)
            torch.testing.assert_close(slope[:, axis], change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", ["another base", "another df", "a flow", "an image", "a diagonal"])
def test_other_mixtures_are_done_one_part_after_the_other(what):
    flows = [location_scale(DIM, df=5.0).double() for _ in range(2)]
    parts = [Component(0), Component(1)]
    if what == "another base":
        flows[1] = location_scale(DIM, base="normal").double()
    elif what == "another df":
        flows[1] = location_scale(DIM, df=6.0).double()
    elif what == "a flow":
        flows[1] = randomize(pf.realnvp(DIM, layers=2).double(), sd=0.1)
    elif what == "a diagonal":
        flows[1] = location_scale(DIM, df=5.0, diagonal=True).double()
    else:
        parts[1] = Component(1, order=torch.arange(DIM).flip(0), signs=-torch.ones(DIM).double())
    assert stacked(flows, parts) is None
    assert stacked(flows[:1], [Component(0), Component(0)]) is not None
    latent = Latent(FlowMixture(flows, parts), pf.LogDensity(quartic))
    x, k = normal(6, DIM, seed=5), torch.tensor([0, 1, 1, 0, 1, 0])
    step = 1e-6 * torch.eye(DIM, dtype=torch.float64)[0]
    change = (latent.look(x + step, k).log_pi - latent.look(x - step, k).log_pi) / 2e-6
    torch.testing.assert_close(latent.look(x, k).slope[:, 0], change, rtol=1e-5, atol=1e-6)


def test_a_mixture_is_scored_the_same_with_and_without_gradients():
    far = torch.tensor([1e200, torch.inf], dtype=torch.float64)
    z = torch.cat([normal(CHAINS, DIM, seed=5), far[:, None].expand(2, DIM)])
    found = mixture()
    with torch.no_grad():
        together = found.log_prob(z)
    apart = found.log_prob(z)
    assert apart.requires_grad
    torch.testing.assert_close(together, apart.detach(), rtol=1e-12, atol=1e-12, equal_nan=True)
