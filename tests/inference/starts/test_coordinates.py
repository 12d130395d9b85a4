"""Coordinates that take out what the data say: maps and Jacobians for each family, their limits, and the choice."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.inference.starts import coordinates
from pyro_flows.inference.starts.coordinates import choose_coordinates
from pyro_flows.model.noncentered import Information, exact, location_scale, spread, standardize
from pyro_flows.model.reading import read_structure
from pyro_flows.support.process.stages import PARAMETERIZATION
from tests.models import real
from tests.registry import normal

TRIL = real([[1.5, 0.0, 0.0], [0.4, 0.6, 0.0], [-0.8, 0.3, 2.0]])
LOC = real(0.5, -1.0, 2.0)
FAMILIES = {
    "Normal": dist.Normal(LOC, real(0.3, 1.0, 4.0)),
    "StudentT": dist.StudentT(4.0, LOC, real(0.3, 1.0, 4.0)),
    "LogNormal": dist.LogNormal(LOC, real(0.3, 1.0, 4.0)),  # its unconstrained value is normal
    "event": dist.Normal(LOC, real(0.3, 1.0, 4.0)).to_event(1),
    "masked": dist.Normal(LOC, real(0.3, 1.0, 4.0)).mask(torch.tensor([True, False, True])),
    "MultivariateNormal": dist.MultivariateNormal(LOC, scale_tril=TRIL),
}
DATA = Information(real(0.0, 2.0, 50.0), real(1.0, 0.0, -1.0))


def check_map(fn, data):
    """The inverse goes back, the log determinant is that of finite differences, the density that of values."""
    x = normal(4, 3, seed=1)
    found = spread(fn, x, data)
    y, ladj, _ = found
    value = y.exp() if isinstance(fn, dist.LogNormal) else y
    known = exact(fn, value, found)
    assert known.batch_shape == fn.batch_shape
    torch.testing.assert_close(known.log_prob(value), fn.log_prob(value))
    other = value + 0.1
    assert torch.equal(known.log_prob(other), fn.log_prob(other))
    torch.testing.assert_close(standardize(fn, y, data), x)
    assert ladj.shape == (4, *fn.batch_shape)
    step = 1e-6
    for row, given in zip(x, ladj, strict=True):
        shifts = step * torch.eye(3).double()
        columns = [(spread(fn, row + h, data)[0] - spread(fn, row - h, data)[0]) / (2.0 * step) for h in shifts]
        jacobian = torch.stack(columns, 1)
        torch.testing.assert_close(given.sum(), torch.linalg.slogdet(jacobian).logabsdet, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("data", [None, DATA], ids=["no data", "data"])
@pytest.mark.parametrize("name", FAMILIES)
def test_map(name, data):
    check_map(FAMILIES[name], data)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_precision_is_non_centered(name):
    fn, x = FAMILIES[name], normal(4, 3, seed=2)
    nothing = Information(torch.zeros(3).double(), DATA.center)
    for ours, plain in zip(spread(fn, x, nothing), spread(fn, x, None), strict=True):
        torch.testing.assert_close(ours, plain)
    loc, scale = location_scale(fn)
    moved = (scale @ x[..., None])[..., 0] if name == "MultivariateNormal" else scale * x
    torch.testing.assert_close(spread(fn, x, None)[0], loc + moved)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_large_precision_is_a_fixed_affine_map(name):
    """Then location and scale of the prior are forgotten: y = c + u / sqrt(t)."""
    fn, x, center = FAMILIES[name], normal(4, 3, seed=3), DATA.center
    y, ladj, _ = spread(fn, x, Information(torch.full((3,), 1e8).double(), center))
    distance = (y - center).square().sum(-1).sqrt() * 1e4
    torch.testing.assert_close(distance, x.square().sum(-1).sqrt(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        ladj.reshape(4, -1).sum(1), torch.full((4,), -3.0 * math.log(1e4)).double(), atol=1e-3, rtol=0.0
    )


@pytest.mark.parametrize("name", ["Normal", "MultivariateNormal"])
def test_coordinates_are_standard_normal_given_the_prior_and_the_data(name):
    """y = m' + s' u is the conjugate posterior: with the density of prior and data, u is standard normal exactly."""
    fn, x = FAMILIES[name], normal(6, 3, seed=4)
    y, ladj, _ = spread(fn, x, DATA)
    prior = fn.log_prob(y).reshape(6, -1).sum(1)
    data = -0.5 * (DATA.precision * (y - DATA.center).square()).sum(1)
    total = prior + data + ladj.reshape(6, -1).sum(1) + 0.5 * x.square().sum(1)
    torch.testing.assert_close(total, total[:1].expand(6))


# the choice -----------------------------------------------------------------------------------------------------------


def two_levels(y, group):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(real(2.0)))
    with pyro.plate("groups", int(group.max()) + 1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(theta[group], 1.0), obs=y)


def check_choice(rows, low, high):
    """The precision that is learned for a group is about the number of its rows, as each has unit variance."""
    counts = torch.tensor(rows)
    group = torch.arange(len(rows)).repeat_interleave(counts)
    y = normal(len(rows), seed=5)[group] + normal(int(counts.sum()), seed=6)
    density, start, entry = choose_coordinates(pf.LogDensity(two_levels, (y, group)), seed=0)
    assert start is not None
    said = entry["noncentered"]["theta"]
    precision = torch.zeros(len(rows)).double() if said is None else torch.as_tensor(said["precision"])
    assert bool((precision >= torch.tensor(low)).all()), precision
    assert bool((precision <= torch.tensor(high)).all()), precision
    assert entry["elbo"] >= max(entry["elbo_centered"], entry["elbo_noncentered"]) - 0.5
    z = normal(5, density.dim, seed=7)
    values = density.constrain(z)
    torch.testing.assert_close(density.unconstrain(values), z, rtol=1e-6, atol=1e-6)


def test_many_rows_for_each_group():
    check_choice([60] * 4, [20.0] * 4, [200.0] * 4)


def test_one_row_for_each_group():
    check_choice([1] * 6, [0.0] * 6, [4.0] * 6)


def test_groups_with_many_rows_and_with_one():
    check_choice([80, 1, 80, 1], [25.0, 0.0, 25.0, 0.0], [250.0, 6.0, 250.0, 6.0])


@pytest.mark.parametrize(("rows", "learned"), [(400, 0), (3, 2)])
def test_nothing_is_learned_where_the_elbo_of_a_plain_normal_is_the_log_evidence(rows, learned, monkeypatch):
    learn, sides = coordinates._Family.learn, []

    def counted(family, side):
        sides.append(side)
        return learn(family, side)

    monkeypatch.setattr(coordinates._Family, "learn", counted)
    group = torch.arange(40).repeat_interleave(rows)
    y = normal(40, seed=5)[group] + normal(40 * rows, seed=6)
    density, start, _ = choose_coordinates(pf.LogDensity(two_levels, (y, group)), seed=0)
    assert len(sides) == learned
    assert start is not None
    assert (density.structure.noncentered == {}) == (learned == 0)  # centered: rows say where each group is


def test_a_normal_with_impossible_draws_is_never_enough():
    """Its ELBO is minus infinity, however good the weights of its possible draws are."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("half", torch.where(x[0] > -0.4, 0.0, -math.inf))

    found = coordinates._diagonal(pf.LogDensity(model), torch.zeros(2), torch.ones(2), seed=0)
    assert found.start.elbo == -math.inf
    assert not found.is_enough


def test_other_coordinates_are_those_of_a_density_made_anew():
    """The structure is read once for all coordinates, and those of one density are not changed by those of another."""
    density = pf.LogDensity(effects, (torch.tensor([1.0, 0.3, -2.0, 0.5]),))
    z = torch.linspace(-1.0, 1.0, 3 * density.dim, dtype=density.dtype).reshape(3, -1)
    before = density.unrecorded(z)
    for noncentered in (True, {"theta": {"precision": 2.0, "center": 0.5}}, ()):
        found = density.elsewhere(noncentered)
        expected = pf.LogDensity(density.model, density.args, noncentered=noncentered)
        assert found.structure.noncentered == expected.structure.noncentered
        for ours, theirs in zip(found.value_and_grad(z), expected.value_and_grad(z), strict=True):
            assert torch.equal(ours, theirs)
        assert found.evaluations == len(z)
    assert all(torch.equal(now, then) for now, then in zip(density.unrecorded(z), before, strict=True))


def test_other_coordinates_of_a_model_with_a_constrained_parameter_of_its_own():
    """They hold the very leaf, not its constrained value taken for a leaf once more."""

    def model():
        spread = pyro.param("spread", torch.tensor(3.0), constraint=dist.constraints.positive)
        theta = pyro.sample("theta", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), spread))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor(0.5))

    pyro.clear_param_store()
    density = pf.LogDensity(model)
    other = density.elsewhere(True)
    assert other.parameters()["spread"] is density.parameters()["spread"]
    z = torch.tensor([[0.2, -0.4], [1.0, 0.7]])
    same = density.unconstrain(other.constrain(z))
    torch.testing.assert_close(other(z) - other.log_jacobian(z), density(same) - density.log_jacobian(same))


@pytest.mark.slow
def test_a_fit_reads_the_structure_of_a_model_once(monkeypatch):
    read = []

    def counted(*given):
        read.append(given)
        return read_structure(*given)

    monkeypatch.setattr("pyro_flows.model.precision.read_structure", counted)
    monkeypatch.setattr("pyro_flows.guides.setup.read_structure", counted)
    y = torch.tensor([1.0, 0.3, -2.0, 0.5])
    found = pf.fit(effects, y, max_steps=30, draws=100, layers=2, escalate=False, refine=False, progress=False)
    assert PARAMETERIZATION in {entry["stage"] for entry in found.history}
    assert len(read) == 1


def effects(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("group", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
