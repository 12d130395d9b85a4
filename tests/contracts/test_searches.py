"""Each search for missed modes: it finds the region that is planted for it, and none for an exact guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.inference.modes.missed_modes import Search, missed_modes
from pyro_flows.support.process import ledger

DRAWS, SEEDS = 400, (0, 1, 2)
REAL = torch.float64


def normal(at: float, sd: float, dim: int) -> dist.Distribution:
    """A round normal distribution, off zero along the first axis."""
    center = torch.zeros(dim, dtype=REAL)
    center[0] = at
    return dist.Normal(center, sd * torch.ones(dim, dtype=REAL)).to_event(1)


def mixed(parts: list[tuple[float, float, float]], dim: int) -> dist.Distribution:
    """A mixture of round normal distributions: (share, place, sd) each."""
    shares, places, sds = torch.tensor(parts, dtype=REAL).T
    centers = torch.zeros(len(parts), dim, dtype=REAL)
    centers[:, 0] = places
    each = dist.Normal(centers, sds[:, None].expand(-1, dim)).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(probs=shares), each)


def model_of(target: dist.Distribution) -> Callable[[], None]:
    """A model with this posterior."""

    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), target.event_shape))
        pyro.factor("target", target.log_prob(z))

    return model


@dataclass(frozen=True)
class Planted:
    """A posterior, a guide that lacks a region of it, and whether a place is in it."""

    target: dist.Distribution
    guide: dist.Distribution
    near: Callable[[Tensor], Tensor]


DIM = 3
HEAVY = dist.StudentT(1.5, torch.zeros(DIM, dtype=REAL)).to_event(1)
PLANTED = {
    "mirrored": Planted(mixed([(0.5, -5.0, 1.0), (0.5, 5.0, 1.0)], DIM), normal(-5.0, 1.0, DIM), lambda z: z[0] > 3.0),
    "survey": Planted(mixed([(0.7, 0.0, 1.0), (0.3, 7.0, 0.4)], DIM), normal(0.0, 1.0, DIM), lambda z: z[0] > 6.0),
    "paths": Planted(normal(0.0, 1.0, DIM), normal(0.0, 0.5, DIM), lambda z: z.norm() > 1.0),
    "walks": Planted(HEAVY, normal(0.0, 1.2, DIM), lambda z: z.norm() > 2.4),
}
EXACT = {
    "normal": normal(0.0, 1.0, 5),
    "heavy tails": dist.StudentT(3.0, torch.zeros(4, dtype=REAL)).to_event(1),
    "two modes": mixed([(0.3, -4.0, 1.0), (0.7, 4.0, 0.5)], DIM),
    "a narrow part in a wide one": mixed([(0.5, 0.0, 1.0), (0.5, 0.0, 0.1)], 2),
}


def searched(target: dist.Distribution, guide: dist.Distribution, seed: int) -> tuple[Search, ledger.Ledger]:
    """Search with draws of the guide."""
    density = pf.LogDensity(model_of(target))
    torch.manual_seed(seed)
    z = guide.sample((DRAWS,))
    with ledger.ledger() as kept:
        return missed_modes(density, [], z, guide.log_prob(z), guide.log_prob, seed=seed), kept


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PLANTED)
def test_it_finds_what_is_planted_for_it(name, seed):
    planted = PLANTED[name]
    search, kept = searched(planted.target, planted.guide, seed)
    assert set(kept.found) == {name}
    assert search.sentence is not None
    assert not search.passed
    assert any(bool(planted.near(region.place)) for region in search.missed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", EXACT)
def test_an_exact_guide_lacks_nothing(name, seed):
    search, kept = searched(EXACT[name], EXACT[name], seed)
    assert not kept.found
    assert search.passed
    assert search.failures == []
