"""Sums of terms in a density: what each term leads to, and what is no sum of densities."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.fitting.multimodal import multimodal
from pyro_flows.inference.modes.survey import survey
from pyro_flows.inference.modes.terms import Terms, tops_of_terms
from pyro_flows.inference.starts.prior import prior_draws
from pyro_flows.support.process.progress import Bar
from tests.models import real
from tests.registry import normal

ROWS = 4000
DIM = 60
CENTERS = 5.0 * torch.nn.functional.normalize(normal(4, DIM, seed=5), dim=1)
SDS = real(1.5, 0.6, 0.7, 1.2)
LOGS = real(0.1, 0.2, 0.3, 0.4).log()


def joint(x, centers=CENTERS, sds=SDS, logs=LOGS):
    """Log weight and log density of each normal (K,)."""
    away = (x - centers).square().sum(-1) / sds.square()
    return logs - 0.5 * away - x.shape[-1] * (sds.log() + 0.5 * math.log(2.0 * math.pi))


def flat():
    return pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (DIM,))).to(CENTERS)


def as_factor():
    pyro.factor("mixture", torch.logsumexp(joint(flat()), 0))


def as_method():
    pyro.factor("mixture", joint(flat()).logsumexp(dim=(0,), keepdim=True).sum())


def as_pairs():
    a, b, c, d = joint(flat())
    pyro.factor("mixture", torch.logaddexp(torch.logaddexp(a, b), torch.logaddexp(c, d)))


def as_prior():
    parts = dist.Normal(CENTERS, SDS[:, None]).to_event(1)
    pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=LOGS), parts))


def as_enumerated():
    part = pyro.sample("part", dist.Categorical(logits=LOGS), infer={"enumerate": "parallel"})
    pyro.sample("x", dist.Normal(CENTERS[part], SDS[part][..., None]).to_event(1))


def draws(density, seed=0):
    return prior_draws(density, 100, seed=seed)


@pytest.mark.parametrize("model", [as_factor, as_method, as_prior, as_enumerated])
def test_each_term_has_its_mode_and_its_mass(model):
    density = pf.LogDensity(model)
    tops = tops_of_terms(density, draws(density), ROWS)
    away = torch.cdist(CENTERS, tops.places)
    assert float(away.amin(1).max()) < 1e-3
    found = away.argmin(1)
    torch.testing.assert_close(tops.evidence[found], LOGS, atol=1e-4, rtol=0.0)
    torch.testing.assert_close(
        tops.roots[found].diagonal(dim1=-2, dim2=-1), SDS[:, None].expand(-1, DIM), rtol=1e-4, atol=0.0
    )


def _shifted(a, b):
    top = torch.maximum(a, b)
    return top + torch.log(torch.exp(a - top) + torch.exp(b - top))


def _in_place(a, b):
    total = torch.zeros_like(a)
    total = total + a.exp()
    total += b.exp()
    return total.log()


BY_HAND = {
    "shifted": _shifted,
    "in place": _in_place,
    "plain": lambda a, b: torch.log(0.5 * torch.exp(a) + 0.5 * torch.exp(b)),
    "log1p": lambda a, b: a + torch.log1p(torch.exp(b - a)),
    "lesser": lambda a, b: torch.maximum(a, b) + torch.log1p(torch.exp(-(a - b).abs())),
    "greater": lambda a, b: torch.max(a, b) + torch.log1p(torch.exp(-(a - b).abs())),
    "builtin": lambda a, b: torch.log(sum(x.exp() for x in (a, b)) / 2),
    "stacked": lambda a, b: (torch.tensor([0.5, 0.5]) * torch.stack([a, b]).exp()).sum(0).log(),
    "of stack": lambda a, b: torch.stack([a.exp(), b.exp()]).mean(0, keepdim=True).log()[0],
    "vectors": lambda a, b: torch.log(torch.tensor([0.5, 0.5]) @ torch.exp(torch.stack([a, b]))),
}


@pytest.mark.parametrize("how", BY_HAND)
def test_sums_by_hand_are_followed_though_terms_underflow(how):
    """In ten dimensions, at a width of 1/20: no point leads there but by the term itself."""
    wide, narrow = (dist.Normal(torch.full((10,), at), sd).to_event(1) for at, sd in ((0.0, 1.0), (2.0, 0.05)))

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(10), 5.0).to_event(1))
        pyro.factor("sum", BY_HAND[how](wide.log_prob(x), narrow.log_prob(x)))

    density = pf.LogDensity(model)
    found = survey(density, draws(density), seed=0, rounds=1, climbs=32).likely()
    middles = found.modes.mean(1)
    assert float((middles - 2.0).abs().min()) < 0.01
    assert float(middles.abs().min()) < 0.01


def test_a_difference_has_no_terms():
    def model():
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.factor("none", torch.log((x + 9.0).exp() - 0.5 * x.exp()))

    density = pf.LogDensity(model)
    assert len(tops_of_terms(density, draws(density), ROWS).places) == 0


def test_pairs_are_taken_one_sum_at_a_time():
    density = pf.LogDensity(as_pairs)
    assert Terms(density, draws(density)).branches.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]


def test_a_survey_begins_with_wide_terms_that_have_no_maximum_of_their_own():
    density = pf.LogDensity(as_factor)
    found = survey(density, draws(density), seed=0, rounds=1, climbs=32)
    assert int(found.of_terms.sum()) == 4
    assert float(torch.cdist(CENTERS, found.modes).amin(1).max()) < 1e-3
    centers = density.value_and_grad(CENTERS)[1].norm(dim=1)
    assert float(centers.max()) > 0.1  # a climb leads away from one of them


@pytest.mark.slow  # each term, with its mass, is found by the test above
def test_a_fit_has_all_terms_and_their_masses():
    posterior = pf.fit(as_factor, progress=False)
    assert posterior.verdict.status == "corrected"
    x = posterior.samples["x"].double()
    shares = torch.bincount(torch.stack([joint(row).argmax() for row in x]), minlength=4) / len(x)
    torch.testing.assert_close(shares.double(), LOGS.exp(), atol=0.03, rtol=0.0)
    assert abs(posterior.log_evidence) < 0.02


def test_terms_of_several_results_are_combined():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 5.0).to_event(1))
        pyro.factor("each", torch.logsumexp(torch.stack([-((x - 3.0) ** 2), -((x + 3.0) ** 2)], -1), -1).sum())

    density = pf.LogDensity(model)
    terms = Terms(density, draws(density))
    assert len(terms.branches) == 8
    tops = tops_of_terms(density, draws(density), ROWS)
    assert len({tuple(row) for row in tops.places.sign().tolist()}) == 8


def test_data_with_a_mixture_each_have_too_many_terms():
    def model(y):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(loc, 1.0)), obs=y)

    density = pf.LogDensity(model, (torch.linspace(-3.0, 3.0, 30),))
    assert len(tops_of_terms(density, draws(density), ROWS).places) == 0


def chain(y):
    """Two hidden states along a series: sums of sums, whose terms are no modes."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    stay = pyro.sample("stay", dist.Beta(real(2.0), 2.0))
    move = torch.stack([torch.stack([stay, 1.0 - stay]), torch.stack([1.0 - stay, stay])]).log()
    state = torch.zeros(2, dtype=torch.float64)
    for seen in y:
        state = torch.logsumexp(state[:, None] + move, 0) + dist.Normal(loc, 1.0).log_prob(seen)
    pyro.factor("series", torch.logsumexp(state, 0))


@pytest.mark.parametrize(("length", "branches"), [(4, 2), (40, 0)])
def test_sums_over_paths_are_left_alone(length, branches):
    y = torch.linspace(-2.0, 2.0, length).double()
    density = pf.LogDensity(chain, (y,))
    assert len(Terms(density, draws(density)).branches) == branches
    assert len(tops_of_terms(density, draws(density), ROWS).places) <= branches


def test_sums_of_different_sizes_stand_side_by_side():
    """A row of one sum has numbers of terms that another does not have."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3, dtype=torch.float64), 9.0).to_event(1))
        pyro.factor("two", torch.logaddexp(-((x[0] - 4.0) ** 2), -((x[0] + 4.0) ** 2)))
        pyro.factor("five", torch.logsumexp(-((x[1] - 8.0 * torch.arange(5)) ** 2), 0))
        pyro.factor("pairs", torch.logsumexp(-((x[1:, None] - real(-6.0, 6.0)) ** 2), 1).sum())

    density = pf.LogDensity(model)
    assert len(Terms(density, draws(density)).branches) == 7  # two and five; with three sums, not those of several
    tops = tops_of_terms(density, draws(density), ROWS)
    assert 2 <= len(tops.places) <= 7


def test_terms_that_are_alike_are_one():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 9.0).to_event(1))
        sizes = real(1.0, 1.0, 1.05, 3.0)
        pyro.factor("four", torch.logsumexp(-0.5 * (x.square().sum() / sizes.square()) - 2.0 * sizes.log(), 0))

    density = pf.LogDensity(model)
    assert len(Terms(density, draws(density)).branches) == 4
    assert len(tops_of_terms(density, draws(density), ROWS).places) == 2  # one narrow, one wide


def test_normalized_weights_are_no_sum_of_densities():
    def model(y):
        logits = pyro.sample("logits", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    density = pf.LogDensity(model, (torch.tensor([0, 0, 1, 2, 0]),))
    assert len(Terms(density, draws(density)).branches) == 3
    assert len(tops_of_terms(density, draws(density), ROWS).places) == 0


def test_no_sum_costs_nothing():
    density = pf.LogDensity(lambda: pyro.sample("x", dist.Normal(real(0.0), 1.0)))
    before = density.evaluations
    assert tops_of_terms(density, draws(density), ROWS).places.shape == (0, 1)
    assert density.evaluations == before


@pytest.mark.falls_back
def test_a_density_that_runs_draw_by_draw_is_left_alone():
    def model():
        x = pyro.sample("x", dist.Normal(real(0.0), 3.0))
        float(x)
        pyro.factor("two", torch.logaddexp(-((x - 2.0) ** 2), -((x + 2.0) ** 2)))

    density = pf.LogDensity(model)
    assert len(tops_of_terms(density, draws(density), ROWS).places) == 0


def test_scales_at_one_place_are_not_several_modes():
    def model():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ())).double()
        sds = real(1.0, 4.0)
        pyro.factor("scales", torch.logsumexp(-0.5 * (x / sds).square() - sds.log(), 0))

    density = pf.LogDensity(model)
    assert multimodal(density, draws(density), seed=0, bar=Bar("", False), barrier=3.0) is None


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_a_climb_that_is_lost_ends_no_fit(lost):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 3.0))
        pyro.factor("two", torch.logaddexp(-((x - 1.0) ** 2), -((x + 1.0) ** 2)))

    terms = Terms(pf.LogDensity(model), torch.zeros(1, 1))
    values, _ = terms.value_and_grad(torch.tensor([[1.0, 0.0], [lost, lost]]))
    assert torch.isfinite(values).tolist() == [True, False]
