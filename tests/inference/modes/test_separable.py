"""Independent coordinates: seen by gradients, tabulated one by one, and made a flow."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_flows as pf
from benchmarks.toys import targets
from pyro_flows.flows.parts import student_mixture, tabulated
from pyro_flows.flows.recipe_json import from_json, not_rebuilt, to_json
from pyro_flows.inference.modes.separable import is_separable, marginals
from pyro_flows.inference.starts.prior import prior_draws


def flat(log_density, dim):
    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
        pyro.factor("density", log_density(z.double()))

    return pf.LogDensity(model)


def points(density):
    return prior_draws(density, 50, seed=0)


def wells(z):
    return (0.5 * z + 6.0 * z.square() - z.square().square()).sum(-1)


@pytest.mark.parametrize("coupling", [0.0, 1e-2, 1.0])
def test_a_product_is_told_from_what_is_none(coupling):
    density = flat(lambda z: wells(z) + coupling * z[..., 0] * z[..., 1], 4)
    assert is_separable(density, points(density), seed=0) == (coupling == 0.0)


def test_two_far_modes_are_no_product_though_each_is():
    """Points about one of them, and single coordinates of the other, all look like a product."""
    sides = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) * 20.0

    def two(z):
        return torch.logsumexp(-0.5 * (z - sides).square().sum(-1), 0)

    density = flat(two, 6)
    z = sides[0] + torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    modes = sides.expand(2, 6)
    assert is_separable(density, z, seed=0)
    assert not is_separable(density, z, seed=0, modes=modes)
    every = torch.tensor([[1.75, 1.75], [1.75, -1.75], [-1.75, 1.75]], dtype=torch.float64)
    assert is_separable(flat(wells, 2), every, seed=0, modes=every)


def test_one_coordinate_is_a_product_of_one():
    density = flat(wells, 1)
    assert is_separable(density, points(density), seed=0)


def test_tables_have_the_evidence_and_the_quantiles():
    """Two wells, a narrow normal far away and a heavy tail, each in a coordinate of its own."""

    def log_density(z):
        narrow = dist.Normal(30.0, 0.01).log_prob(z[..., 1])
        return wells(z[..., :1]) + narrow + dist.StudentT(5.0).log_prob(z[..., 2])

    density = flat(log_density, 3)
    line = torch.linspace(-6.0, 6.0, 200_001, dtype=torch.float64)
    evidence = float(torch.trapezoid(wells(line[:, None]).exp(), line).log())
    center = torch.tensor([1.75, 30.0, 0.0]).to(density.dtype)
    units = torch.tensor([0.2, 0.01, 1.0]).to(density.dtype)
    table = marginals(density, center, torch.stack([center, -center]), units)
    assert abs(table.log_evidence - evidence) < 1e-3
    flow = tabulated(table.values, table.log_density)
    torch.manual_seed(0)
    z, log_q = flow.draw(20_000)
    ratios = log_density(z) - log_q - evidence
    assert float(1.0 / torch.softmax(ratios, 0).square().sum()) / len(z) > 0.99
    left = float(torch.trapezoid(torch.where(line < 0.0, wells(line[:, None]).exp(), 0.0), line).log()) - evidence
    assert abs(float((z[:, 0] < 0.0).double().mean()) - math.exp(left)) < 0.01
    torch.testing.assert_close(flow.log_prob(z), log_q, rtol=1e-6, atol=1e-6)


def test_a_density_without_a_top_has_no_table():
    density = flat(lambda z: (z * 0.0).sum(-1), 2)
    zero = torch.zeros(2).to(density.dtype)
    table = marginals(density, zero, zero[None], torch.ones_like(zero))
    assert table is None or not math.isfinite(table.log_evidence) or table.log_evidence > 10.0  # as wide as was looked


def test_a_table_may_be_too_coarse():
    values = torch.linspace(-3.0, 3.0, 20, dtype=torch.float64)[None]
    with pytest.raises(ValueError, match="at least 129 values"):
        tabulated(values, -0.5 * values.square())


def test_a_table_is_followed_into_its_tails_and_valleys():
    """Weights of a product of wells were above 5 in the valleys, and above 6 beyond the last knots: k-hat was 1.3."""
    values = torch.linspace(-5.0, 5.0, 20_001, dtype=torch.float64)[None]
    log_p = torch.logaddexp(-0.5 * ((values - 2.8) / 0.18).square(), -0.5 * ((values + 2.8) / 0.18).square())
    log_p = log_p - torch.log(torch.trapezoid(log_p.exp(), values))
    flow = tabulated(values, log_p)
    near = log_p[0] > log_p.max() - 14.0
    found = flow.log_prob(values[0][near][:, None]).detach()
    modes_with_mass = (log_p[0][near] - found).exp()  # weight of a draw there
    mass = modes_with_mass * found.exp()
    assert float(modes_with_mass[log_p[0][near] > log_p.max() - 9.0].max()) < 1.1
    assert float((mass * (modes_with_mass - 1.0).square()).sum() / mass.sum()) < 1e-3
    beyond = torch.tensor([[-4.5], [4.5]], dtype=torch.float64)
    assert bool((flow.log_prob(beyond) > log_p[0, [1000, -1001]]).all())  # the tails are heavier


LINE = torch.linspace(-8.0, 8.0, 2000).double()[None]
PLACES, SCALES = torch.tensor([[0.0, 1.0], [5.0, 5.0]]), torch.tensor([[[1.0, 0.0], [0.5, 2.0]]] * 2)
MAKE = [lambda: tabulated(LINE, -LINE.abs()), lambda: student_mixture(PLACES, SCALES, [0.0, 1.0], df=20.0)]


@pytest.mark.parametrize("make", MAKE)
def test_both_are_rebuilt_from_what_files_say(make):
    flow = make()
    assert not_rebuilt(flow) is None
    again = from_json(to_json(flow)).to(flow.draw(1)[0])
    again.load_state_dict(flow.state_dict())
    z, log_q = flow.draw(7)
    torch.testing.assert_close(again.log_prob(z), log_q, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # eight modes on a line, in fitting/test_multimodal.py, are tabulated too
def test_many_well_has_65536_modes():
    target = targets.TARGETS["many_well"]
    posterior = pf.fit(target.model, progress=False)
    assert posterior.verdict.status == "corrected"
    assert abs(posterior.log_evidence - target.log_evidence) < 0.1
    shares = target.modes(posterior.samples["x"].double()).double().mean(0)
    assert float((shares / torch.tensor(target.shares).double() - 1.0).abs().max()) < 0.2
    assert not [stage for stage in posterior.history if stage["steps"]]
