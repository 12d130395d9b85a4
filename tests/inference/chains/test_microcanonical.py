"""Microcanonical moves: a turn in closed form, and the target that many moves keep."""

import pyro
import pyro.distributions as dist
import torch

import pyro_flows as pf
from pyro_flows.inference.chains.adaptation import Metric
from pyro_flows.inference.chains.hmc import microcanonical, turned
from pyro_flows.inference.chains.latent import Latent
from pyro_flows.inference.chains.starts import affine_flow
from tests.registry import normal

SDS = torch.tensor([0.5, 1.0, 2.0, 1.0])


def target():
    pyro.sample("x", dist.StudentT(8.0, torch.ones(4), SDS).to_event(1))
    pyro.factor("seen", torch.tensor(0.0))


def test_a_turn_is_that_of_the_paper():
    u, slope = normal(50, 7, seed=1).double(), 3.0 * normal(50, 7, seed=2).double()
    u = u / u.norm(dim=1, keepdim=True)
    new, gained = turned(u, slope, 0.4)
    size = slope.norm(dim=1, keepdim=True)
    towards, delta = slope / size, 0.4 * size / 6
    cosine = (towards * u).sum(1, keepdim=True)
    below = delta.cosh() + cosine * delta.sinh()
    torch.testing.assert_close(new, (u + towards * (delta.sinh() + cosine * (delta.cosh() - 1.0))) / below)
    torch.testing.assert_close(gained, 6.0 * below.log()[:, 0])
    assert bool(torch.isfinite(turned(u, 1e6 * slope, 0.4)[1]).all())


def test_moves_keep_the_target():
    """600 moves of 64 chains: some 10,000 effective draws, sds of heavy tails to 2 %."""
    density = pf.LogDensity(target)
    torch.manual_seed(0)
    z = 1.0 + SDS * dist.StudentT(8.0).sample((64, 4))
    latent = Latent(affine_flow(z, torch.zeros(len(z))), density)
    points, seen = latent.look(*latent.place(z.to(density.dtype))), []
    chances = []
    for number in range(600):
        moved = microcanonical(latent, points, step=0.9, leaps=1 + number % 3, metric=Metric.of(torch.ones(4)))
        points = moved.points
        chances.append(moved.chance.mean())
        seen.append(points.z)
    drawn = (torch.cat(seen) - 1.0) / SDS
    assert 0.6 < float(torch.stack(chances).mean()) < 0.99
    assert float((drawn.std(0) / (8.0 / 6.0) ** 0.5 - 1.0).abs().max()) < 0.04
    inner = float((drawn.abs() < 0.7064).double().mean())  # half of the mass
    assert abs(inner - 0.5) < 0.01
