"""Tops of one height and what lies between them: exact images by any exchange, and modes that a wide region hides."""

from __future__ import annotations

import math
import sys
from itertools import permutations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

import pyro_flows as pf
from pyro_flows.inference.chains.untrained import chains_of_gaussian
from pyro_flows.inference.modes import missed_regions
from pyro_flows.inference.modes.missed_regions import Guide, are_separated
from pyro_flows.inference.modes.symmetric_modes import _assigned, symmetric_modes_of
from pyro_flows.inference.modes.unverified_modes import _apart
from pyro_flows.inference.starts.climb import climb
from pyro_flows.inference.starts.gaussians import Gaussians, Start
from pyro_flows.inference.starts.pathfinder import Paths, pathfinder
from pyro_flows.support.process.progress import Bar
from tests.registry import normal


def skewed(x):
    """Log density (...) of independent skewed coordinates x (..., D), each of another scale."""
    sds = torch.linspace(0.5, 2.0, x.shape[-1], dtype=x.dtype)
    y = x / sds
    return (-0.5 * y.square() + torch.nn.functional.logsigmoid(2.0 * y) - sds.log()).sum(-1)


def two(order, signs, center, share=0.5, shape=skewed):
    """A density over a vector: a shape about a center, and its image under a signed permutation."""
    back = torch.tensor(order).argsort()

    def log_prob(z):
        home = (torch.tensor(signs).to(z) * z)[..., back]
        parts = [math.log(share) + shape(z - center), math.log(1.0 - share) + shape(home - center)]
        return torch.logaddexp(*parts)

    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (len(order),)))
        pyro.factor("both", log_prob(z))

    return pf.LogDensity(model)


def moved(dim, seed):
    """A signed permutation without order, and a center far from its image."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(dim, generator=generator).tolist()
    signs = (1.0 - 2.0 * torch.randint(2, (dim,), generator=generator)).tolist()
    return order, signs, 4.0 * normal(dim, seed=seed) / math.sqrt(dim / 10.0)


def draws_about(center, count=300):
    """Draws of the shape about a center: with coordinates of one sign more often than not."""
    sds = torch.linspace(0.5, 2.0, len(center), dtype=torch.float64)
    first, second = normal(count, len(center), seed=31), normal(count, len(center), seed=32)
    return center + sds * torch.where(second < 2.0 * first, first, -first)  # about a skew normal


def found_by_twins(density, center):
    z = draws_about(center)

    def score(points):
        return skewed(points - center)

    log_q = score(z)
    guide = Guide(density, score, float((density(z) - log_q).median()))
    image = torch.cat([z[:4], normal(24, density.dim, seed=33) * 3.0])
    paths = pathfinder(density, image, z.std(0).expand_as(image), seed=0)
    return symmetric_modes_of(guide, paths, 4, z, log_q, z.std(0))


@pytest.mark.parametrize("dim", [4, 60, 230])
def test_any_signed_permutation_between_two_tops_is_found(dim):
    """No site, no axis and no block tells of it."""
    order, signs, center = moved(dim, seed=dim)
    found = found_by_twins(two(order, signs, center), center)
    assert len(found) == 1
    assert found[0].move is None, "what is done twice leads elsewhere"
    z = draws_about(center)
    takes = z[:, list(found[0].symmetry[0])] * torch.tensor(found[0].symmetry[1]).double()
    there = torch.tensor(signs).double() * z[:, order]
    assert float((takes - there).abs().max()) == 0.0


@pytest.mark.parametrize("share", [0.5, 0.2, 0.99])
def test_a_twin_may_have_another_mass_and_is_a_symmetry_if_it_has_not(share):
    dim = 20
    order, center = [*range(10, dim), *range(10)], torch.linspace(-3.0, 3.0, dim, dtype=torch.float64)
    found = found_by_twins(two(order, [1.0] * dim, center, share=share), center)
    if share == 0.99:
        assert found == [], "next to nothing is lacked"
        return
    assert found[0].symmetry == (tuple(order), (1.0,) * dim)
    assert found[0].move == (found[0].symmetry if share == 0.5 else None)


def test_a_single_draw_tells_of_no_scale_and_ends_in_no_error():
    order, center = [*range(10, 20), *range(10)], torch.linspace(-3.0, 3.0, 20, dtype=torch.float64)
    density = two(order, [1.0] * 20, center)
    z = draws_about(center)[:1]
    guide = Guide(density, lambda points: skewed(points - center), 0.0)
    ends = torch.stack([center, center[order]])
    paths = pathfinder(density, ends, torch.ones_like(ends), seed=0)
    assert len(symmetric_modes_of(guide, paths, 1, z, guide.score(z), torch.ones(20, dtype=torch.float64))) == 1


def test_tops_that_are_no_images_are_no_twins():
    center = moved(30, seed=5)[2]

    def other(x):
        return skewed(torch.cat([x[..., :1], x[..., :-1] + x[..., 1:]], -1))

    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (30,)))
        pyro.factor("both", torch.logaddexp(skewed(z - center), other(-z - center)))

    assert found_by_twins(pf.LogDensity(model), center) == []


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_chains_get_copies_at_twins(share):
    """No flow is trained, though the blocks that change places belong to sites of unequal lengths."""
    dim, part = 60, 20
    order = [*range(dim - part, dim), *range(part, dim - part), *range(part)]
    center = 3.0 * torch.linspace(-1.0, 1.0, dim, dtype=torch.float64)

    def model():
        left = pyro.sample("left", dist.ImproperUniform(constraints.real_vector, (), (28,)))
        right = pyro.sample("right", dist.ImproperUniform(constraints.real_vector, (), (32,)))
        z = torch.cat([left, right], -1)
        parts = math.log(share) + skewed(z - center), math.log(1.0 - share) + skewed(z[..., order] - center)
        pyro.factor("both", torch.logaddexp(*parts))

    density = pf.LogDensity(model)
    z = draws_about(center)
    names = [f"z[{i}]" for i in range(dim)]
    start = Start("given", z.mean(0), z.std(0))
    found = chains_of_gaussian(start, density, names, 4000, seed=0, bar=Bar("", False))
    assert len(found.copies.components) == 2
    assert float((found.chains.z[..., 0] < 0.0).double().mean()) == pytest.approx(share, abs=0.05)


# valleys --------------------------------------------------------------------------------------------------------------


def heavy(x):
    return -1.5 * torch.log1p(x.square() / 2.0).sum(-1)


@pytest.mark.slow
def test_a_mode_within_a_wide_region_lies_apart():
    dim = 150
    order, signs, center = moved(dim, seed=7)
    density = two(order, signs, center, shape=heavy)
    here = center + torch.distributions.StudentT(torch.tensor(2.0).double()).sample((100, dim))
    there = torch.tensor(signs).double() * center[order]
    assert float((there - center).norm()) < math.sqrt(dim) * float(here.std(0).mean()), "one place, by these units"
    assert are_separated(density, there[None], here) == [True]
    assert are_separated(density, (center + 0.5)[None], here) == [False]
    both = torch.cat([here[:50], torch.tensor(signs).double() * here[50:, order]])
    assert are_separated(density, there[None], both) == [False]


def test_all_places_are_asked_about_in_one_climb(monkeypatch):
    """Each by itself cost half a second; an intrinsic autoregression asked about 160, and took 90 seconds."""
    dim, climbs = 30, []
    order, signs, center = moved(dim, seed=7)
    density = two(order, signs, center, shape=heavy)
    here = center + torch.distributions.StudentT(torch.tensor(2.0).double()).sample((100, dim))
    there = torch.tensor(signs).double() * center[order]
    home = torch.tensor(signs).double() * here[:, order]
    z = torch.cat([here, home])
    near = torch.zeros(4, 200, dtype=torch.bool)
    near[0, :100] = near[1, 100:] = near[2, 50:150] = True  # the last is compared with none, which is no answer
    monkeypatch.setattr(missed_regions, "climb", lambda *given, **options: climbs.append(1) or climb(*given, **options))
    assert are_separated(density, there.expand(4, -1), z, near) == [True, False, False, False]
    assert len(climbs) == 1


def test_a_place_without_a_top_does_not_lie_apart():
    """In a funnel, climbs go into the neck without end."""

    def model():
        scale = pyro.sample("scale", dist.Normal(torch.tensor(0.0).double(), 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(20).double(), scale.exp()).to_event(1))

    density = pf.LogDensity(model)
    z = density.unconstrain({"scale": normal(50, seed=1), "x": normal(50, 20, seed=2)})
    assert are_separated(density, torch.zeros(1, 21).double(), z) == [False]


def test_tops_count_as_apart_and_points_under_way_do_not():
    dim = 100
    places = torch.zeros(4, dim, dtype=torch.float64)
    places[1, 0], places[2, 0], places[3, 0] = 8.0, 8.5, 30.0
    one, none = torch.ones_like(places), torch.zeros_like(places[..., None])
    normals = Gaussians(places, one, one, none, torch.ones_like(none[:, :1]))
    for settled, kept in ((True, [0, 3, 1]), (False, [0, 3])):
        rest = torch.full((4,), settled)
        assert _apart(Paths(normals, torch.zeros(4), places, rest), range(4), one[0]) == kept


@pytest.mark.parametrize("alike", [False, True])
def test_an_assignment_has_the_least_cost(alike, monkeypatch):
    """Where each row has a column of its own that is cheapest, nothing has to be imported."""
    order = [3, 0, 2, 1]
    cost = 1.0 + normal(4, 4, seed=5).abs()
    cost[range(4), order] = 0.1
    if alike:
        cost[1] = cost[0] + 0.5
    else:
        monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    found = _assigned(cost)
    every = {choice: float(cost[range(4), choice].sum()) for choice in permutations(range(4))}
    assert every[tuple(found)] == pytest.approx(min(every.values()))
    assert alike or found == order


# paths that have come nowhere -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_paths_that_are_still_low_go_on():
    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (200,)))
        x = z / torch.linspace(0.5, 2.0, 200, dtype=torch.float64)
        pyro.factor("flat from afar", -(1.0 + x.square()).pow(0.25).sum(-1))

    density = pf.LogDensity(model)
    points, units = 50.0 * normal(6, 200, seed=3), torch.ones(6, 200, dtype=torch.float64)
    pathfinder(density, points, units, seed=0)  # whose first gradients are not yet those of a recorded graph
    short = pathfinder(density, points, units, seed=0)
    assert not bool(short.settled.any())
    known = torch.cat([0.1 * points[:1], points]), torch.ones(7, 200, dtype=torch.float64)
    long = pathfinder(density, *known, seed=0, own=1)
    assert bool(long.settled.all())
    assert float((density(long.ends) + 200.0).abs().max()) < 1e-6
    lower = pathfinder(density, torch.cat([1e3 * points[:1], points]), known[1], seed=0, own=1)
    heights = density(lower.ends[1:]), density(short.ends)
    assert torch.allclose(*heights, rtol=0.01), "all are above what is known: going on gains a fifth and more"
