"""Surveys of modes: which are met, and what is fitted to them."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.inference.modes import climbs
from pyro_flows.inference.modes.missed_modes import missed_modes
from pyro_flows.inference.modes.missed_regions import Guide
from pyro_flows.inference.modes.population_monte_carlo import Parts, begun, fitted, generation
from pyro_flows.inference.modes.survey import Survey, can_be_surveyed, climbed_from, has_new, survey
from pyro_flows.inference.starts.prior import prior_draws


def normals(centers, sds, weights=None):
    """A mixture of round normals as a density on a flat latent, normalized; its sum is written so that none is seen."""
    centers, sds = (torch.as_tensor(part, dtype=torch.float64) for part in (centers, sds))
    count, dim = centers.shape
    weights = torch.full((count,), 1.0 / count).double() if weights is None else torch.as_tensor(weights).double()
    size = weights.log() - dim * (sds.log() + 0.5 * math.log(2.0 * math.pi))

    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
        away = (z - centers).square().sum(-1) / sds.square()
        terms = size - 0.5 * away
        pyro.factor("modes", (terms - terms.amax()).exp().pow(1.0).sum().log() + terms.amax())

    return pf.LogDensity(model)


def tempered_mixture(count, dim, distance, seed):
    """Places at one distance from 0: in a row, on a regular polygon, or in random directions, none near another."""
    if dim == 1:
        return distance * torch.arange(count, dtype=torch.float64)[:, None]
    if dim == 2:
        angles = 2.0 * math.pi * torch.arange(count, dtype=torch.float64) / count
        return distance * torch.stack([angles.cos(), angles.sin()], 1)
    directions = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return distance * directions / directions.norm(dim=1, keepdim=True)


def met(density, seed=0, **options):
    return survey(density, prior_draws(density, 200, seed=seed), seed=seed, **options)


@pytest.mark.parametrize("dim", [1, 2, 4, 20, 100])
def test_modes_that_differ_in_one_of_many_coordinates_are_two(dim):
    """Four sds apart: two in each of four coordinates, and as much in one of a hundred."""
    centers = torch.zeros(2, dim, dtype=torch.float64)
    centers[1, 0] = 4.0
    found = met(normals(centers, [1.0, 1.0]))
    assert len(found) == 2
    assert float((torch.cdist(centers, found.modes)).amin(1).max()) < 0.1


@pytest.mark.parametrize(("count", "dim", "distance"), [(8, 1, 20.0), (7, 2, 10.0), (7, 10, 15.0), (4, 20, 12.0)])
def test_all_modes_are_met(count, dim, distance):
    centers = tempered_mixture(count, dim, distance, seed=dim)
    found = met(normals(centers, [1.0] * count))
    apart = torch.cdist(centers, found.modes)
    assert found.over
    assert len(found) == count
    assert float(apart.amin(1).max()) < 0.01
    assert float((found.evidence - math.log(1.0 / count)).abs().max()) < 0.05  # each has its mass
    assert int(found.met.min()) >= 1


def test_one_mode_is_one():
    found = met(normals([[3.0, -2.0]], [0.1]))
    assert len(found) == 1
    assert found.over
    torch.testing.assert_close(found.roots[0], 0.1 * torch.eye(2).double(), rtol=1e-3, atol=1e-6)


def test_a_mode_without_mass_is_not_weighty():
    found = met(normals([[0.0], [10.0]], [1.0, 1.0], [1.0 - 1e-9, 1e-9]))
    assert len(found.likely()) == 1


def test_what_a_climb_adds_is_new():
    density = normals([[0.0], [10.0]], [1.0, 1.0])
    nothing = met(density, rounds=0)
    one = climbed_from(density, nothing, torch.tensor([[0.3]]).double())
    two = climbed_from(density, one, torch.tensor([[-0.3], [9.0]]).double())
    assert (len(nothing), len(one), len(two)) == (0, 1, 2)
    assert two.met.tolist() == [2, 1]
    assert has_new(one, nothing)
    assert has_new(two, one)
    assert not has_new(two, two)


@pytest.mark.slow
def test_a_survey_goes_on_from_where_its_sampler_is_thin():
    """Two touching normals hid a narrow one: what is known of the pair must not be a normal at its mode alone."""
    centers = torch.zeros(5, 11).double()
    for number, row in enumerate(tempered_mixture(5, 11, 6.0, seed=3)):
        centers[number] = row
    centers[1] = centers[0] + 1.3 * torch.nn.functional.normalize(centers[0] - centers[2], dim=0)
    density = normals(centers, [0.5, 0.9, 0.45, 0.9, 0.9])
    found = met(density, seed=2)
    grown = fitted(density, begun(found.modes, found.roots, found.evidence), seed=0)

    def known(points):
        return torch.logsumexp(grown.parts.log_prob(points), 0)

    found = survey(density, grown.z, seed=0, known=known, before=found)
    assert float(torch.cdist(centers[2:], found.modes).amin(1).max()) < 0.1


def test_it_is_the_same_with_the_same_seed():
    density = normals(tempered_mixture(4, 3, 8.0, seed=0), [1.0] * 4)
    one, two = met(density, seed=5), met(density, seed=5)
    assert torch.equal(one.modes, two.modes)
    assert one.met.tolist() == two.met.tolist()


@pytest.mark.falls_back
def test_a_model_that_runs_draw_by_draw_is_not_surveyed():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("y", dist.Normal(x.item() * x, 1.0), obs=torch.tensor(1.0))

    density = pf.LogDensity(model)
    assert not density.batched
    assert not can_be_surveyed(density)


def test_the_search_finds_what_few_paths_do_not():
    """Seven normals, of which the guide has the three that paths had led to: the verdict was ``corrected``."""
    centers = tempered_mixture(7, 10, 15.0, seed=7)
    density = normals(centers, [1.4, 0.8, 0.7, 0.9, 0.75, 1.0, 0.85])
    known = [0, 2, 4]
    guide = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(3).double()),
        dist.Normal(centers[known], torch.tensor([1.4, 0.7, 0.75]).double()[:, None]).to_event(1),
    )
    torch.manual_seed(0)
    z = guide.sample((500,))
    found = missed_modes(density, [], z, guide.log_prob(z), guide.log_prob)
    assert found.missed  # one is enough: a fit then surveys all
    assert "misses a mode" in found.failures[0]


# what is fitted to them -----------------------------------------------------------------------------------------------


def test_densities_of_parts_are_those_of_their_draws():
    parts = Parts(torch.tensor([[0.0], [4.0]]).double(), torch.tensor([[[1.0]], [[0.5]]]).double(),
                  torch.tensor([0.25, 0.75]).double().log(), 15.0)  # fmt: skip
    line = torch.linspace(-60.0, 60.0, 400_001, dtype=torch.float64)[:, None]
    mass = torch.logsumexp(parts.log_prob(line), 0).exp()
    assert abs(float(torch.trapezoid(mass, line[:, 0])) - 1.0) < 1e-6
    torch.manual_seed(0)
    draws = parts.draw(20_000)
    assert abs(float((draws > 2.2).double().mean()) - 0.75) < 0.03


def test_a_population_learns_places_scales_and_masses():
    density = normals([[0.0, 0.0], [6.0, 0.0], [0.0, 9.0]], [1.0, 0.3, 2.0], [0.2, 0.3, 0.5])
    wrong = begun(torch.tensor([[0.5, 0.5], [6.3, 0.2], [1.0, 8.0]]).double(), torch.eye(2).double().repeat(3, 1, 1),
                  torch.zeros(3).double())  # fmt: skip
    before, after = generation(density, wrong), fitted(density, wrong, seed=0)
    assert after.share > 0.9 > before.share
    assert after.k_hat < 0.5
    sides = torch.cdist(after.z, torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 9.0]]).double()).argmin(1)
    masses = torch.zeros(3).double().index_add(0, sides, after.weights)
    assert float((masses - torch.tensor([0.2, 0.3, 0.5]).double()).abs().max()) < 0.03


def test_parts_are_added_where_one_is_not_enough():
    """A ring is one mode or many; normals of its width cover it together."""

    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        pyro.factor("ring", -0.5 * ((z.double().norm() - 2.0) / 0.15) ** 2)

    density = pf.LogDensity(model)
    found = fitted(density, begun(torch.tensor([[2.0, 0.0]]).to(density.dtype),
                                  torch.eye(2)[None].to(density.dtype), torch.zeros(1)), seed=0)  # fmt: skip
    assert len(found.parts) > 4
    assert found.share > 0.6


def test_no_draw_with_any_density_is_no_population():
    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (1,)))
        pyro.factor("nowhere", torch.where(z[0].abs() < 1e-3, 0.0, -torch.inf))

    far = torch.full((1, 1), 100.0)
    assert fitted(pf.LogDensity(model), begun(far, torch.ones(1, 1, 1), torch.zeros(1)), seed=0) is None


def test_an_empty_survey_has_nothing_weighty():
    nothing = torch.zeros(0, 2)
    none = nothing[:, 0]
    assert len(Survey(nothing, torch.zeros(0, 2, 2), none, none.long(), none.bool()).likely()) == 0


def test_a_guide_that_is_thin_at_the_top_of_its_own_mode_is_compared_all_the_same(monkeypatch):
    """In many dimensions no draw comes near a top. Where no normal can be weighed, tempering compares with it."""
    centers = torch.zeros(2, 40, dtype=torch.float64)
    centers[1, 0] = 30.0
    density = normals(centers, [1.0, 1.0])
    z = torch.randn(400, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = dist.Normal(0.0, 1.0)

    def score(points):
        return own.log_prob(points).sum(-1) - 9.0 * (points.square().sum(-1) < 4.0)

    monkeypatch.setattr(climbs, "K_HAT_MOST", -math.inf)
    guide = Guide(density, score, math.log(0.5))
    (region, *_) = climbs.surveyed(guide, z, [], seed=0)
    assert float((region.place - centers[1]).abs().max()) < 4.0


def test_the_only_mode_is_not_held_against_a_guide_that_is_thin_at_its_top(monkeypatch):
    """The joint maximum of a model with scales is next to none of its mass. It had been compared with itself."""
    density = normals(torch.zeros(1, 40, dtype=torch.float64), [1.0])
    z = torch.randn(400, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = dist.Normal(0.0, 1.0)

    def score(points):
        return own.log_prob(points).sum(-1) - 9.0 * (points.square().sum(-1) < 4.0)

    monkeypatch.setattr(climbs, "K_HAT_MOST", -math.inf)
    assert climbs.surveyed(Guide(density, score, 0.0), z, [], seed=0) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_narrow_mode_without_a_sum_is_found_by_many_points(seed):
    """Its ball has a hundred-thousandth of the space of 3 dimensions: 20,000 points did not meet it."""
    sds, centers = torch.tensor([1.0, 0.1]), torch.tensor([[0.0, 0.0, 0.0], [3.0, 3.0, 3.0]])

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 5.0).to_event(1))
        logs = -0.5 * ((x - centers) / sds[:, None]).square().sum(-1) - 3.0 * sds.log()
        pyro.factor("two", torch.where(logs[0] > logs[1], logs[0], logs[1]))

    density = pf.LogDensity(model)
    z = torch.randn(1000, 3, generator=torch.Generator().manual_seed(seed))
    first = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    found = missed_modes(density, [], z, first.log_prob(z), first.log_prob, seed=seed, wandering=False)
    assert min(float((region.place - 3.0).norm()) for region in found.missed) < 0.5
