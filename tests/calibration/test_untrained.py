"""Slices of many data sets at once: tables are right, nothing is trained, and where they do not fit, none is taken."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows import LogDensity
from pyro_flows.calibration.batch import CORRECTED_GRID, _Trial, _weighed
from pyro_flows.fitting.laplace_grid import AT_ONCE
from pyro_flows.flows.parts import location_scale
from pyro_flows.inference.modes.laplace_grid import Bent, bent, grids_together
from pyro_flows.inference.modes.tops import flow_along
from pyro_flows.inference.starts.portfolio import starts_together
from pyro_flows.model.stack import Stack
from tests.calibration.models import data_sets, regression

COUNT = 6
SEEDED = SimpleNamespace(seed=0)  # what a trial reads of a plan
SD, AT = "sd", 2  # the site of one coordinate, and where it stands


def noisy(x: Tensor, y: Tensor) -> None:
    """A regression whose noise is not known: given its sd, coefficients are normal."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ b, sd), obs=y)


def marginal(x: Tensor, y: Tensor, log_sd: Tensor) -> Tensor:
    """Return the log density of data and log sd (N,), coefficients integrated out, in closed form."""
    x, y, sd = x.double(), y.double(), log_sd.exp()
    covariance = x @ x.T + sd[:, None, None].square() * torch.eye(len(y)).double()
    likelihood = dist.MultivariateNormal(torch.zeros(len(y)).double(), covariance).log_prob(y)
    return likelihood + dist.HalfNormal(torch.tensor(1.0).double()).log_prob(sd) + log_sd


def integral(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return log evidence, and the mean of log sd."""
    grid = torch.linspace(-5.0, 4.0, 4001).double()
    height = marginal(x, y, grid)
    evidence = torch.logsumexp(height, 0) + (grid[1] - grid[0]).log()
    return evidence, (torch.softmax(height, 0) * grid).sum()


@pytest.fixture(scope="module")
def sets():
    return data_sets(COUNT, seed=3)


@pytest.fixture(scope="module")
def stack(sets):
    return Stack([LogDensity(noisy, args) for args in sets])


@pytest.fixture(scope="module")
def starts(stack):
    return starts_together(stack, seed=0, df=15.0)


@pytest.fixture(scope="module")
def tables(stack, starts):
    return grids_together(stack, starts, bent(stack, starts))


def test_the_coordinate_along_which_others_are_normal_is_found(stack, starts):
    found = bent(stack, starts)
    assert found.coordinates.tolist() == [AT] * COUNT
    assert (found.strengths > 0.3).all()


def test_tables_are_the_marginals(sets, tables):
    for args, table in zip(sets, tables, strict=True):
        expected = marginal(*args, table.places)
        near = expected > expected.max() - 20.0
        found = table.log_masses + 0.5 * 2 * math.log(2.0 * math.pi)
        torch.testing.assert_close(found[near], expected[near], rtol=0.0, atol=2e-3)
        evidence, _ = integral(*args)
        assert table.log_evidence == pytest.approx(float(evidence), abs=0.01)


def test_flows_of_slices_are_the_posteriors(stack, tables):
    for density, table in zip(stack.densities, tables, strict=True):
        weighing = _weighed(flow_along(table, lighter=4.0).to(density.dtype), density)
        assert weighing.ess > 0.98 * len(weighing.log_weights)


def test_no_flow_is_trained_and_each_is_right(sets):
    found = pf.fit_many(noisy, sets, draws=2000, progress=False)
    for args, posterior in zip(sets, found, strict=True):
        evidence, mean = integral(*args)
        assert len(posterior.losses) == 0
        assert posterior.settings["side_by_side"] == COUNT
        assert posterior.flow.recipe.builder == "sliced"
        assert posterior.history[-1]["why"] in (AT_ONCE, CORRECTED_GRID)
        assert posterior.verdict.status == "ok"
        assert posterior.log_evidence == pytest.approx(float(evidence), abs=0.02)
        log_sd = posterior.samples[SD].double().log()
        assert float((log_sd.mean() - mean) / log_sd.std()) == pytest.approx(0.0, abs=0.1)


def test_what_is_used_has_the_values_of_its_coordinates(sets):
    for posterior in pf.fit_many(noisy, sets, draws=300, progress=False):
        expected = posterior.density.constrain(posterior._used)
        assert all(torch.equal(posterior.samples[name], value) for name, value in expected.items())


def test_without_a_site_of_one_coordinate_there_are_no_slices():
    stack = Stack([LogDensity(regression, args) for args in data_sets(4)])
    assert bent(stack, starts_together(stack, seed=0, df=15.0)) is None


def test_a_posterior_that_is_not_bent_gets_no_slices(stack, starts):
    straight = Bent(torch.full((COUNT,), AT), torch.zeros(COUNT).double())
    assert grids_together(stack, starts, straight) == [None] * COUNT


def banana(y: Tensor) -> None:
    """Given the scale, w lies along a parabola: no slice is normal."""
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 0.3))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
    pyro.sample("y", dist.Normal(log_scale.exp() * (w[1] - w[0].square()), 0.4), obs=y)


BANANAS = [torch.tensor(y) for y in (0.0, 0.5, 1.0, -0.5, 0.3)]


def test_slices_that_are_not_normal_are_not_taken():
    stack = Stack([LogDensity(banana, (y,)) for y in BANANAS])
    starts = starts_together(stack, seed=0, df=15.0)
    tables = grids_together(stack, starts, bent(stack, starts))
    made = [part for part in zip(stack.densities, starts, tables, strict=True) if part[-1] is not None]
    assert made
    for density, start, table in made:
        assert _Trial(location_scale(stack.dim), SEEDED, density, start, table)._on_grid(table) is None


@pytest.mark.slow
def test_where_slices_are_not_normal_a_flow_is_trained():
    found = pf.fit_many(banana, BANANAS, draws=1000, progress=False)
    assert all(len(posterior.losses) > 0 or "side_by_side" not in posterior.settings for posterior in found)
    assert all(posterior.verdict.status != "unreliable" for posterior in found)


def forked(y: Tensor) -> None:
    """Given the noise, there are two values of x that no symmetry connects."""
    x = pyro.sample("x", dist.Normal(torch.tensor([2.0]), 20.0).to_event(1))[0]
    sd = pyro.sample("sd", dist.LogNormal(0.0, 0.3))
    near, far = (dist.Normal(center, 0.5).log_prob(x) for center in (-5.0, 9.0))
    pyro.factor("peaks", torch.logaddexp(near, far))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(0.0, sd), obs=y)


@pytest.mark.slow
def test_slices_with_one_top_do_not_pass_for_two_modes():
    generator = torch.Generator().manual_seed(0)
    found = pf.fit_many(forked, list(torch.randn(4, 6, generator=generator)), draws=1000, progress=False)
    for posterior in found:
        above = float((posterior.samples["x"] > 2.0).double().mean())
        # the prior's densities at -5 and 9 are equal
        assert 0.35 < above < 0.65 or posterior.verdict.status == "unreliable"


@pytest.fixture
def trial(stack, starts, tables):
    def of(number: int) -> _Trial:
        flow = location_scale(stack.dim)
        return _Trial(flow, SEEDED, stack.densities[number], starts[number], tables[number])

    return of


def test_weights_may_correct_slices_and_then_nothing_counts_as_converged(trial):
    one = trial(0)
    _, converged = one._on_grid(one.table)
    assert (converged.why, converged.converged) == (AT_ONCE, True)
    wider = replace(one.table, roots=0.85 * one.table.roots)
    _, corrected = one._on_grid(wider)
    assert (corrected.why, corrected.converged) == (CORRECTED_GRID, False)


@pytest.mark.parametrize("factor", [3.0, 0.2])
def test_slices_of_another_width_are_not_taken(trial, factor):
    one = trial(0)
    assert one._on_grid(replace(one.table, roots=factor * one.table.roots)) is None
