"""Mixtures that are brought from the prior to a posterior of few dimensions, with edges or many small modes."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.fitting.multimodal import multimodal
from pyro_flows.inference.modes.missed_modes import missed_modes
from pyro_flows.inference.modes.population_monte_carlo import (
    WIDE,
    Parts,
    begun,
    can_be_tempered,
    fitted,
    tempered_mixture,
)
from pyro_flows.inference.starts.prior import prior_draws
from pyro_flows.inference.verdict.weighing import tempered
from pyro_flows.support.process.progress import Bar
from pyro_flows.support.thresholds import ESS_SHARE_LEAST
from tests.models import normal, real

SMALL, EACH_HOLDS = 12, 0.005  # modes, and the mass of each


def change(y):
    """A mean that changes at an unknown time: the density has a jump at each datum, and is flat between."""
    early = pyro.sample("early", dist.Normal(real(0.0), 3.0))
    late = pyro.sample("late", dist.Normal(real(0.0), 3.0))
    when = pyro.sample("when", dist.Uniform(real(0.0), float(len(y))))
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(torch.where(torch.arange(len(y)) < when, early, late), 1.0), obs=y)


def series():
    return torch.where(torch.arange(24) < 9, 0.0, 1.5) + normal(24, seed=1)


def exact(y):
    """Masses of the intervals between data in which the change may lie, and the log evidence, in closed form."""

    def marginal(part):
        if not len(part):
            return real(0.0)
        covariance = torch.eye(len(part)).double() + 9.0
        return dist.MultivariateNormal(torch.zeros(len(part)).double(), covariance).log_prob(part)

    logs = torch.stack([marginal(y[: k + 1]) + marginal(y[k + 1 :]) for k in range(len(y))]) - math.log(len(y))
    return torch.softmax(logs, 0), torch.logsumexp(logs, 0)


def small_modes():
    """A normal of 94 % of the mass, and twelve narrow ones on a circle, each below what counts by itself."""
    angle = 2.0 * math.pi * torch.arange(SMALL).double() / SMALL
    loc = torch.cat([torch.zeros(1, 2).double(), 8.0 * torch.stack([angle.cos(), angle.sin()], 1)])
    scale = torch.tensor([1.0, *[0.2] * SMALL]).double()
    mass = torch.tensor([1.0 - SMALL * EACH_HOLDS, *[EACH_HOLDS] * SMALL]).double()

    def log_density(z):
        away = (z[..., None, :] - loc) / scale[:, None]
        parts = mass.log() - 0.5 * away.square().sum(-1) - 2.0 * scale.log() - math.log(2.0 * math.pi)
        top = parts.amax(-1)  # a sum of terms, which no search may see as one
        return top + (parts - top[..., None]).exp().sum(-1).log()

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 5.0).to_event(1))
        pyro.factor("rest", log_density(z) - dist.Normal(0.0, 5.0).log_prob(z).sum(-1))

    return model, log_density


def test_a_mixture_with_no_mass_but_in_its_wide_part_goes_on_from_there():
    def model():
        pyro.sample("x", dist.Normal(real(0.0), 0.1).expand([1]).to_event(1))

    loc, roots = torch.tensor([[-10.0], [10.0]]).double(), torch.full((2, 1, 1), 0.1).double()
    found = fitted(pf.LogDensity(model), begun(loc, roots, torch.zeros(2).double()), seed=0)
    assert found.share > 0.5
    assert float(found.weights @ found.z[:, 0]) == pytest.approx(0.0, abs=0.01)


def test_jumps_need_no_gradient():
    y = series()
    density = pf.LogDensity(change, (y,))
    found = fitted(density, tempered_mixture(density, seed=0), seed=0)
    assert found.share > 0.5
    assert found.k_hat < 0.5
    weights = found.weights
    when = density.constrain(found.z)["when"]
    masses = torch.stack([weights[(when > k) & (when <= k + 1)].sum() for k in range(len(y))])
    torch.testing.assert_close(masses, exact(y)[0], atol=0.02, rtol=0.0)


def test_one_seed_gives_one_mixture():
    density = pf.LogDensity(change, (series(),))
    first, second, other = (tempered_mixture(density, seed=seed).loc for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.slow
def test_a_change_of_unknown_time_is_fitted():
    y = series()
    posterior = pf.fit(change, y, seed=0, progress=False)
    assert posterior.verdict.status == "corrected", posterior.verdict
    assert any("a mixture of" in reason for reason in posterior.verdict.reasons)
    masses, evidence = exact(y)
    when = posterior.samples["when"]
    found = torch.stack([((when > k) & (when <= k + 1)).double().mean() for k in range(len(y))])
    torch.testing.assert_close(found, masses, atol=0.03, rtol=0.0)
    assert posterior.log_evidence == pytest.approx(float(evidence), abs=0.05)


def test_many_small_modes_count_together():
    model, log_density = small_modes()
    density = pf.LogDensity(model)
    z = normal(1000, 2, seed=3)

    def main(points):
        return dist.Normal(0.0, 1.0).log_prob(points).sum(-1)

    found = missed_modes(density, [], z, main(z), main)
    assert found.sentence.startswith("the guide misses a mode near z[")
    assert float(found.missed[0].place.norm()) == pytest.approx(8.0, abs=1.0)
    assert not missed_modes(density, [], z, log_density(z), log_density).missed


def test_of_two_mixtures_the_better_one_is_taken():
    """Tops do not show the edges of a density; a mixture about draws has them."""

    def edges():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        inside = (z.abs().amax(-1) < 3.0) & ((z[..., 0] < 0.0) | (z[..., 1] < 0.0))
        pyro.factor("corner", torch.where(inside, -0.1 * z.square().sum(-1), -30.0 - z.square().sum(-1)))

    density = pf.LogDensity(edges)
    found = multimodal(density, prior_draws(density, 500, seed=0), seed=0, bar=Bar("", False))
    assert found.enough
    assert found.stage.ess_ratio > 0.7


def test_no_tail_is_without_draws():
    """In a fit to a normal, parts that are not wide fall to .00003 of their top at 6 sds, the first wide one at 9."""

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))

    start = begun(torch.zeros(1, 2).double(), torch.eye(2).double()[None], torch.zeros(1).double())
    found = fitted(pf.LogDensity(model), start, seed=0)
    places = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, -6.0], [9.0, 0.0], [0.0, -9.0]]).double()
    heights = torch.logsumexp(found.parts.log_prob(places), 0)
    heights = (heights[1:] - heights[0]).exp()
    assert float(heights[:2].min()) > 0.0002
    assert float(heights[2:].min()) > 0.00006


def test_wide_parts_need_no_separate_scales():
    """Parts on a line that are 1e12 times narrower than the line is long: no covariance has a Cholesky factor."""
    loc = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()
    parts = Parts(loc, 1e-12 * torch.eye(2).double().repeat(2, 1, 1), torch.full((2,), 0.5).double().log(), 15.0)
    wide = parts.with_wide()
    for root, scale in zip(wide.roots[2:], WIDE, strict=True):
        torch.testing.assert_close(root @ root.mT, 0.25 * scale**2 * torch.ones(2, 2).double())
        assert bool((root.diagonal() > 0.0).all())
    torch.testing.assert_close(wide.loc[2:], torch.full((2, 2), 0.5).double())
    assert bool(torch.isfinite(wide.log_prob(wide.draw(10))).all())


def test_weights_are_tempered_until_a_tenth_is_left():
    ratios = 10.0 * normal(4000, seed=5)
    power = tempered(ratios)
    weights = torch.softmax(power * ratios, 0)
    assert float(1.0 / weights.square().sum()) / 4000 == pytest.approx(ESS_SHARE_LEAST, rel=1e-3)
    assert tempered(0.1 * normal(4000, seed=5)) == 1.0


@pytest.mark.parametrize(("dim", "expected"), [(6, True), (7, False)])
def test_only_few_dimensions_are_searched_so(dim, expected):
    density = pf.LogDensity(lambda: pyro.sample("z", dist.Normal(torch.zeros(dim).double(), 1.0).to_event(1)))
    assert can_be_tempered(density) is expected


def test_where_the_prior_has_no_spread_there_is_no_way():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.factor("nowhere", torch.where(z[..., 0] > 50.0, 0.0, -math.inf))

    assert tempered_mixture(pf.LogDensity(model), seed=0) is None
