"""Tempering measures known masses; wandering draws leave a distribution as it is, and leave a guide that is too small.

Standard errors are stated; bounds are about four of them.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.inference.modes import climbs, unverified_modes
from pyro_flows.inference.modes.missed_modes import missed_modes
from pyro_flows.inference.modes.missed_regions import Guide
from pyro_flows.inference.modes.tempering import Tempered, move_walkers, temper
from pyro_flows.inference.modes.unverified_modes import UnverifiedMode, modes_with_mass
from pyro_flows.inference.starts.gaussians import Gaussians, Start
from pyro_flows.inference.starts.pathfinder import Paths
from pyro_flows.inference.verdict.weighing import log_mean
from tests.models import real
from tests.registry import normal


def flat(log_density, dim):
    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
        pyro.factor("density", real(1.0) * log_density(z))

    return pf.LogDensity(model)


def gaussians(loc, sd):
    """Normals with these locations (K, D) and one sd."""
    loc = torch.tensor(loc, dtype=torch.float64)
    basis = torch.zeros(*loc.shape, 1, dtype=torch.float64)
    return Gaussians(loc, torch.ones_like(loc), torch.full_like(loc, sd), basis, torch.ones_like(basis[:, :1]))


def check_mass(dim=4):
    """A normal density times e^5, from normals that are off by a sd and half or twice as wide."""

    def peak(z):
        return 5.0 - 0.5 * ((z - 1.0) / 0.7).square().sum(-1)

    truth = 5.0 + 0.5 * dim * math.log(2.0 * math.pi) + dim * math.log(0.7)
    walk = temper(flat(peak, dim), gaussians([[0.3] * dim, [1.7] * dim], 1.0), seed=0)
    assert walk.ends.shape == (2, 48, dim)
    for number in range(2):
        weights = walk.log_weights[number].exp() / math.exp(truth)
        error = float(weights.std()) / math.sqrt(48)
        assert error < 0.1
        assert float(log_mean(walk.log_weights[number])) == pytest.approx(truth, abs=4.0 * error + 0.02)
    torch.testing.assert_close(walk.log_p, peak(walk.ends))
    ends = walk.ends.flatten(0, 1)
    # 96 points: standard errors .07 and .05
    assert float((ends.mean(0) - 1.0).abs().max()) < 0.29
    assert float((ends.std(0) - 0.7).abs().max()) < 0.2


def test_the_mass_of_a_normal():
    check_mass()


def test_only_the_mass_of_its_own_region_counts():
    """Of two modes with masses 1 and 1/3, each normal measures the one where it begins."""

    def both(z):
        first = -0.5 * (z - 10.0).square().sum(-1)
        return torch.logaddexp(first, -math.log(3.0) - 0.5 * (z + 10.0).square().sum(-1)) - math.log(2.0 * math.pi)

    walk = temper(flat(both, 2), gaussians([[9.5, 9.5], [-9.5, -9.5]], 1.2), seed=1)
    masses = log_mean(walk.log_weights)
    errors = (walk.log_weights - masses[:, None]).exp().std(1) / math.sqrt(48)
    assert float(errors.max()) < 0.1
    assert float(masses[0]) == pytest.approx(0.0, abs=4.0 * float(errors[0]) + 0.02)
    assert float(masses[1]) == pytest.approx(-math.log(3.0), abs=4.0 * float(errors[1]) + 0.02)


@pytest.mark.parametrize(
    ("covered", "base", "there", "exact", "counts"),
    [
        (0.0, 0.0, -3.0, -3.0, True),  # .05 of the mass; a fiftieth counts
        (0.0, 0.0, -5.0, -5.0, False),
        (0.0, 0.0, -6.0, -3.5, True),  # tempering falls short there, and finds .03 of the mass where it goes slowly
        (0.0, 0.0, -4.5, -4.5, False),  # .011 of the mass, and nothing is lacking
        (0.0, 0.0, -6.0, -4.5, True),  # slow tempering finds so much more that as much may be lacking again
        (0.0, 0.0, -15.0, 0.0, False),  # it never falls short of so much
        (0.0, -9.0, -12.0, -3.0, True),  # it falls short by the same in both regions
        (0.0, -30.0, -20.0, 0.0, True),  # it falls short of so much that it is made anew, which finds equal masses
        (-3.0, 0.0, -6.0, -6.0, True),  # the guide's own figure is the lower one
    ],
)
def test_a_place_is_compared_with_what_tempering_makes_of_the_guides_own_region(covered, base, there, exact, counts):
    def two(z):
        terms = -0.5 * z[..., 0].square(), exact - 0.5 * (z[..., 0] - 50.0).square()
        return torch.logaddexp(*terms) - 0.5 * math.log(2.0 * math.pi)

    density = flat(two, 1)
    score = lambda z: -0.5 * z[:, 0].square() - 0.5 * math.log(2.0 * math.pi)  # noqa: E731
    guide = Guide(density, score, covered)
    ends = real([0.0], [50.0])
    start = Start("mode", ends[1], torch.ones_like(ends[1]))
    walk = Tempered(ends[:, None], density(ends)[:, None], real([base], [there]))
    normals = gaussians(ends.tolist(), 1.0)
    found = modes_with_mass(guide, ends, [UnverifiedMode(1, 0.0, True, start)], normals, walk)
    assert bool(found) is counts


@pytest.mark.parametrize(("short", "counts"), [(9.0, True), (30.0, False)])
def test_points_that_have_not_come_to_rest_are_no_place(short, counts):
    """They lie in a tail where the guide is too thin, and slow tempering carries them to its middle."""
    density = flat(lambda z: -0.5 * z.square().sum(-1), 2)
    guide = Guide(density, lambda z: -0.5 * (z / 0.7).square().sum(1) - math.log(2.0 * math.pi * 0.49), 0.0)
    ends = real([0.0, 0.0], [6.0, -3.0])
    start = Start("mode", ends[1], torch.ones_like(ends[1]))
    walk = Tempered(ends[:, None], density(ends)[:, None], real([-short], [5.0 - short]))
    found = modes_with_mass(guide, ends, [UnverifiedMode(1, 0.0, True, start)], gaussians(ends.tolist(), 1.0), walk)
    assert bool(found) is counts


@pytest.mark.parametrize(("slowly", "counts"), [(-9.0, True), (-12.0, False)])
def test_a_region_counts_unless_slow_tempering_finds_clearly_less(slowly, counts, monkeypatch):
    """Of two equal modes in 120 dimensions, one had 7.5 nats less by slow tempering, and was left out."""
    density = flat(lambda z: torch.logaddexp(-0.5 * z[..., 0].square(), -0.5 * (z[..., 0] - 50.0).square()), 1)
    guide = Guide(density, lambda z: -0.5 * z[:, 0].square() - 0.5 * math.log(2.0 * math.pi), 0.0)
    ends = real([0.0], [50.0])
    start = Start("mode", ends[1], torch.ones_like(ends[1]))

    def walk(there):
        return Tempered(ends[:, None], density(ends)[:, None], real([0.0], [there]))

    monkeypatch.setattr(unverified_modes, "temper", lambda *_, **__: walk(slowly))
    fast = Tempered(ends[:, None], density(ends)[:, None], real([-20.0], [-21.0]))
    found = modes_with_mass(guide, ends, [UnverifiedMode(1, 0.0, True, start)], gaussians(ends.tolist(), 1.0), fast)
    assert bool(found) is counts


@pytest.mark.parametrize(("beside", "found"), [(True, [0, 1]), (False, [0])])
def test_mass_beside_the_guides_own_mode_hides_no_other_mode(beside, found, monkeypatch):
    """Beside a banana in 40 dimensions, chains had that mass, and a funnel that lacked .2 nats was left out."""
    places = real([0.0], [50.0], [90.0])
    density = flat(lambda z: torch.logsumexp(-0.5 * (z[..., :1] - places[:, 0]).square(), -1), 1)
    guide = Guide(density, lambda z: -0.5 * z[:, 0].square() - 0.5 * math.log(2.0 * math.pi), 0.0)
    starts = [Start("mode", place, torch.ones_like(place)) for place in places[1:]]
    worth = [
        UnverifiedMode(1 + number, 0.0, True, start, number == 0 and beside) for number, start in enumerate(starts)
    ]
    asked = []

    def slowly(density, normals, **_):
        asked.append(normals.loc[1:, 0].tolist())
        return Tempered(places[[0, 2], None], density(places[[0, 2]])[:, None], real([0.0], [-3.5]))

    monkeypatch.setattr(unverified_modes, "temper", slowly)
    fast = Tempered(places[:, None], density(places)[:, None], real([0.0], [-1.0], [-4.5]))
    regions = modes_with_mass(guide, places, worth, gaussians(places.tolist(), 1.0), fast)
    assert [region.start for region in regions] == [starts[number] for number in found]
    assert asked == ([[90.0]] if beside else [])


def test_a_tail_of_a_scale_in_many_dimensions_is_no_place():
    """Tempering fell 70 nats short of all masses, and a tail of mass e^-20 was told as a mode that is missed."""
    dim = 60

    def log_density(z):  # of the log of a scale, whose size shows in a few numbers only, and of others
        return z[..., 0] - z[..., 0].exp() - 0.5 * (z[..., 1:] / 0.01).square().sum(-1)

    covered = (dim - 1) * (0.5 * math.log(2.0 * math.pi) + math.log(0.01))
    density = flat(log_density, dim)
    guide = Guide(density, lambda z: log_density(z.clamp(-15.0)) - covered - 1e3 * (z[:, 0] < -15.0), covered)
    ends = torch.zeros(2, dim, dtype=torch.float64)
    ends[1, 0] = -25.0
    units = torch.full((2, dim), 0.05, dtype=torch.float64)  # of poor normals, the guide's own the poorer one
    units[1], units[:, 0] = 0.02, 1.0
    normals = Gaussians.of(ends, units)
    walk = temper(density, normals, seed=0)
    assert covered - float(log_mean(walk.log_weights[0])) > 10.0
    start = Start("mode", ends[1], torch.ones_like(ends[1]))
    assert modes_with_mass(guide, ends, [UnverifiedMode(1, 0.0, True, start)], normals, walk) == []


def test_weights_that_are_not_finite_weigh_nothing():
    given = real([[0.0, math.nan, -math.inf, math.log(3.0)]])
    assert float(log_mean(given)) == pytest.approx(0.0)


# wandering ------------------------------------------------------------------------------------------------------------

DRAWS = 1500


def skewed(z):
    """A normal coordinate, and an exponential one in its logarithm."""
    return -0.5 * z[..., 0].square() + z[..., 1] - z[..., 1].exp()


@pytest.mark.parametrize("full", [False, True], ids=["sds", "matrix"])
def test_exact_draws_stay_exact_draws(full):
    z = torch.stack([normal(DRAWS, seed=1), torch.rand(DRAWS, generator=torch.Generator().manual_seed(2)).double()], 1)
    z[:, 1] = (-z[:, 1].log()).log()
    units = torch.tensor([[1.0, 0.0], [0.3, 1.2]]).double() if full else torch.tensor([1.0, 1.2]).double()
    ends, log_p = (part[0] for part in move_walkers(flat(skewed, 2), z[None], units[None], seed=0))
    assert float((ends - z).abs().median()) > 0.1  # they do move
    torch.testing.assert_close(log_p, skewed(ends))
    # standard errors of mean and sd: .026 and .018; 1 / 39 and about .03 for the exponential
    values = torch.stack([ends[:, 0], ends[:, 1].exp()], 1)
    for column, mean in ((0, 0.0), (1, 1.0)):
        assert float(values[:, column].mean()) == pytest.approx(mean, abs=0.105)
        assert float(values[:, column].std()) == pytest.approx(1.0, abs=0.14)
    assert float((ends[:, 0] * ends[:, 1]).mean()) == pytest.approx(0.0, abs=0.14)


def funnel(z):
    x, rest = z[..., 0], z[..., 1:]
    return -0.5 * x.square() / 9.0 - 0.5 * (rest.square() * torch.exp(-x)[..., None]).sum(-1) - 0.5 * rest.shape[-1] * x


def check_neck():
    """Draws of a funnel without its neck: wanderers go on into it, and those of the whole funnel find nothing."""
    density, x = flat(funnel, 4), 3.0 * normal(4000, seed=3)
    whole = torch.cat([x[:, None], torch.exp(x / 2)[:, None] * normal(4000, 3, seed=4)], 1)
    cut = whole[x > -0.5]

    def log_q(z):
        return funnel(z) - 2.0 * math.log(2.0 * math.pi) - math.log(3.0)

    def cut_log_q(z):
        return torch.where(z[:, 0] > -0.5, log_q(z) - math.log(len(cut) / 4000), -1e4)

    ends = move_walkers(density, cut[None, :1000], cut.std(0)[None], seed=0)[0][0]
    assert float((ends[:, 0] < -0.5).double().mean()) > 0.05
    missing_mass = missed_modes(density, [], cut[:1000], cut_log_q(cut[:1000]), cut_log_q)
    assert len(missing_mass.failures) == 1
    assert not missing_mass.passed
    assert float(missing_mass.missed[0].place[0]) < -0.5
    right = missed_modes(density, [], whole[:1000], log_q(whole[:1000]), log_q)
    assert right.failures == []
    assert right.passed


def test_the_neck_of_a_funnel():
    check_neck()


@pytest.mark.parametrize(
    ("width", "share", "found", "doubts"),
    [(1.0, 0.03, 1, 0), (1.0, 0.015, 0, 0), (0.75, 0.03, 1, 0), (0.75, 0.015, 0, 1), (0.75, 0.003, 0, 0)],
)
def test_a_mass_that_is_nearly_enough_by_uneven_weights_is_measured_again(width, share, found, doubts):
    """Weights from a normal that a funnel is wider than give up to five times too little, with k-hats below .7."""
    places = torch.tensor([[0.0] * 4, [20.0] * 4], dtype=torch.float64)
    shares = torch.tensor([1.0 - share, share], dtype=torch.float64)

    def log_density(z):
        return torch.logsumexp(shares.log() + dist.Normal(places, 1.0).log_prob(z[..., None, :]).sum(-1), -1)

    guide = Guide(flat(log_density, 4), lambda z: dist.Normal(0.0, 1.0).log_prob(z).sum(-1), math.log(1.0 - share))
    paths = Paths.at(places, width * torch.eye(4, dtype=torch.float64).expand(2, 4, 4), shares.log())
    regions, doubtful = climbs._weighed(guide, paths, 1, torch.ones(4, dtype=torch.float64), seed=0)
    assert (len(regions), len(doubtful)) == (found, doubts)
