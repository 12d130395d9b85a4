"""Points that are drawn out to where a guide is too thin: what they draw, and what a search makes of them.

Targets are products of Student-t distributions of 3 degrees of freedom, the guide is a standard normal distribution.
"""

from __future__ import annotations

import math

import pytest
import torch

import pyro_flows as pf
from pyro_flows import Flow
from pyro_flows.flows.parts import sliced
from pyro_flows.inference.chains import latent
from pyro_flows.inference.chains.latent import Latent
from pyro_flows.inference.chains.starts import NoStart, dispersed_points
from pyro_flows.inference.modes.missed_regions import BY_WALKERS, Guide
from pyro_flows.inference.modes.under_covered import (
    HIGH,
    LOOKS,
    MOVES,
    excess,
    is_usable,
    level_of,
    under_covered_region,
    walked,
)
from pyro_flows.inference.starts.prior import SEARCHES
from pyro_flows.support.process.seeding import seeded
from pyro_flows.support.thresholds import DENSITY_GAP_OF_WALKERS, TAIL_SHARE
from pyro_flows.transforms.linear import LowerTriangularAffine
from tests.inference.modes.test_tempering import flat
from tests.registry import normal

T3 = math.log(2.0 / (math.pi * math.sqrt(3.0)))  # the log density of t with 3 degrees of freedom at 0


def student(z):
    return (T3 - 2.0 * torch.log1p(z.square() / 3.0)).sum(-1)


def exact(count, dim, seed):
    """Draws of the target: a normal number over the root of a third of a chi-square with 3 degrees of freedom."""
    return normal(count, dim, seed=seed) / (normal(count, dim, 3, seed=seed + 1).square().sum(-1) / 3.0).sqrt()


def standard(dim, scale=1.0):
    eye = torch.eye(dim, dtype=torch.float64)
    return Flow(LowerTriangularAffine(dim, loc=eye[0] * 0.0, scale_tril=scale * eye), base="normal")


@torch.no_grad()
def weighted(density, flow, z):
    log_q = flow.log_prob(z)
    return Guide(density, flow.log_prob, 0.0), density(z) - log_q, log_q


def begun(dim, z):
    space = Latent(standard(dim), flat(student, dim))
    return space, space.look(*space.place(z))


def test_draws_of_the_posterior_stay_draws_of_it():
    space, points = begun(2, exact(3000, 2, seed=1))
    with seeded(0, torch.device("cpu")):
        moved = walked(space, points, 8, level=0.0)
    assert float((moved.z - points.z).abs().median()) > 0.2  # they do move
    for level in (0.5, 1.5, 4.0):
        share = 2.0 * (1.0 - cdf(level))
        error = math.sqrt(share * (1.0 - share) / 6000)
        assert float((moved.z.abs() > level).double().mean()) == pytest.approx(share, abs=4.5 * error)


def cdf(x):
    """Of Student's t with 3 degrees of freedom."""
    u = x / math.sqrt(3.0)
    return 0.5 + (u / (1.0 + u * u) + math.atan(u)) / math.pi


def test_points_under_the_umbrella_have_its_distribution():
    """By quadrature in one dimension: shares beyond 2, 4 and 6, which are 14 %, 3 % and .9 % of the posterior."""
    grid = torch.linspace(-400.0, 400.0, 800_001, dtype=torch.float64)[:, None]
    log_q = -0.5 * grid.square().sum(-1) - 0.5 * math.log(2.0 * math.pi)
    over = student(grid) - log_q
    weight = torch.softmax(student(grid) - torch.logaddexp(-over, torch.full_like(over, -2.0)), 0)
    space, points = begun(1, exact(3000, 1, seed=2))
    with seeded(0, torch.device("cpu")):
        moved = walked(space, points, 60, level=0.0, height=2.0)
    for level, least in ((2.0, 0.2), (4.0, 0.1), (6.0, 0.03)):
        share = float(weight[grid[:, 0].abs() > level].sum())
        assert share > least
        error = math.sqrt(share * (1.0 - share) / 3000)
        assert float((moved.z.abs() > level).double().mean()) == pytest.approx(share, abs=5.0 * error)


def test_points_are_drawn_out_of_the_guide_and_go_back():
    """Of three numbers, one at least is beyond 4.3 with a chance of 7 %: there the guide falls short by 5 nats."""
    space, points = begun(3, normal(256, 3, seed=3))
    with seeded(0, torch.device("cpu")):
        out = walked(space, points, 16, level=level_of(points), height=HIGH)
        far = excess(out, level_of(points)) > DENSITY_GAP_OF_WALKERS
        back = walked(space, out, 64, level=level_of(points))
    assert float((excess(points, level_of(points)) > DENSITY_GAP_OF_WALKERS).double().mean()) < TAIL_SHARE
    assert float(far.double().mean()) > 0.3
    gone = float((back.z.abs().amax(1) > 4.3).double().mean())
    assert gone == pytest.approx(1.0 - (2.0 * cdf(4.3) - 1.0) ** 3, abs=0.075)  # three standard errors and a half


def test_a_guide_with_too_light_tails_has_too_little_mass():
    """Draws that wander under the density alone do not come there in as many moves."""
    density, flow = flat(student, 4), standard(4, scale=1.2)
    z = 1.2 * normal(1000, 4, seed=5)
    guide, weights, log_q = weighted(density, flow, z)
    found = under_covered_region(guide, Latent(flow, density), z, weights, log_q, seed=0)
    assert {region.start.name for region in found} == {BY_WALKERS}
    assert len(found) == SEARCHES
    assert all(float(region.place.abs().max()) > 3.0 for region in found)
    assert under_covered_region(guide, None, z, weights, log_q, seed=0) == []


def test_a_guide_that_is_right_is_nowhere_too_thin():
    flow = pf.realnvp(3, layers=2)
    density = flat(lambda z: flow.to(z).log_prob(z), 3)
    with torch.no_grad(), seeded(0, torch.device("cpu")):
        z, log_q = flow.to(torch.float64).draw(1000)
    guide = Guide(density, flow.log_prob, 0.0)
    looks = []

    class Counted(Latent):
        def look(self, x, k):
            looks.append(len(x))
            return super().look(x, k)

    assert under_covered_region(guide, Counted(flow, density), z, torch.zeros(len(z)), log_q, seed=0) == []
    assert len(looks) == 81  # the first sixteen moves, of five leaps each: there is no way out


@pytest.mark.parametrize(("dim", "wanderers"), [(20, 256), (30, 64)])
def test_where_a_look_is_dear_fewer_points_wander(dim, wanderers):
    flow = sliced(dim, slices=3).double()
    density = flat(lambda z: flow.log_prob(z), dim)
    with torch.no_grad(), seeded(0, torch.device("cpu")):
        z, log_q = flow.draw(400)
    looks = set()

    class Counted(Latent):
        def look(self, x, k):
            looks.add(len(x))
            return super().look(x, k)

    guide = Guide(density, flow.log_prob, 0.0)
    assert under_covered_region(guide, Counted(flow, density), z, torch.zeros(len(z)), log_q, seed=0) == []
    assert looks == {wanderers}


def test_where_a_model_handles_many_numbers_fewer_points_wander(monkeypatch):
    density = flat(student, 3)
    assert not Latent(standard(3), density).costly
    monkeypatch.setattr(latent, "WRITTEN_DEAR", density.written - 1)
    assert Latent(standard(3), density).costly


def test_the_way_back_ends_where_no_more_are_out_than_draws_know_of():
    """A normal distribution falls short of Student's t far out, where that has about 1 % of its mass."""
    density, flow = flat(student, 1), standard(1, scale=1.7)
    z = 1.7 * normal(2000, 1, seed=6)
    guide, weights, log_q = weighted(density, flow, z)
    looks = []

    class Counted(Latent):
        def look(self, x, k):
            looks.append(len(x))
            return super().look(x, k)

    assert under_covered_region(guide, Counted(flow, density), z, weights, log_q, seed=0) == []
    back = looks.count(512) - 1
    assert back > 0
    assert back < 5 * MOVES
    assert back % (5 * MOVES // LOOKS) == 0


def test_draws_that_no_verdict_rests_on_are_not_drawn_out():
    even = torch.zeros(100).double()
    assert is_usable(torch.log_softmax(even, 0))
    even[0] = 20.0
    assert not is_usable(torch.log_softmax(even, 0))


# where chains begin ---------------------------------------------------------------------------------------------------


def test_chains_begin_inside_and_outside():
    density = flat(student, 3)
    space = Latent(standard(3), density)
    z = normal(4000, 3, seed=7)
    with torch.no_grad():
        weights = density(z) - standard(3).log_prob(z)
    far = []
    for seed in range(8):
        places = dispersed_points(space, z, weights, 8, seed=seed)
        assert places.shape == (8, 3)
        inside = (places[:, None] == z).all(-1).any(1)
        assert inside.tolist() == [True] * 4 + [False] * 4
        far.append(places[4:].abs().amax(1) > 4.3)
    drawn = torch.cat(far).double().mean()
    assert 0.2 < float(drawn) < 0.9  # 7 % of the posterior


def test_chains_begin_nowhere_where_nothing_is_finite():
    space = Latent(standard(2), flat(student, 2))
    with pytest.raises(NoStart, match="no draw of the guide has a finite density"):
        dispersed_points(space, normal(100, 2, seed=1), torch.full((100,), -math.inf), 8, seed=0)
