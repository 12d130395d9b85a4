"""The benchmark of amortized posteriors makes rows, and a table of them."""

from __future__ import annotations

import math

import pyro
import pytest
import torch

import pyro_flows as pf
from benchmarks import records
from benchmarks.amortized import running
from benchmarks.amortized.models import TASKS, exact, values
from benchmarks.amortized.quadrature import Counts, schools


@pytest.mark.slow
def test_a_row_says_what_was_measured(tmp_path):
    file = tmp_path / "rows.csv"
    options = [
        "--only",
        "conjugate regression",
        "--methods",
        running.OURS,
        "--sets",
        "10",
        "--simulations",
        "3000",
        "--out",
        str(file),
    ]
    running.main(options)
    (row,) = records.read(file)
    assert int(row["right"]) + int(row["lies"]) == int(row["usable"])
    assert int(row["named"]) == int(row["changed"]) == 10
    running.main(options)
    assert records.read(file) == [row]


def test_the_exact_answer_is_that_of_the_model():
    task = TASKS["conjugate regression"]
    y = torch.linspace(-1.0, 2.0, 40)
    generator = torch.Generator().manual_seed(0)
    shape, (mean, sd) = 3.0 + 20.0, exact(y)
    x, y = task.args[0].double(), y.double()
    precision = x.T @ x + torch.eye(3).to(x)
    center = torch.linalg.solve(precision, x.T @ y)
    rate = float(3.0 + 0.5 * (y @ y - center @ precision @ center))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tau = torch.distributions.Gamma(shape, rate).sample((200_000,)).double()
    noise = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    b = center + tau[:, None] ** -0.5 * noise @ torch.linalg.cholesky(torch.linalg.inv(precision)).T
    found = running.moments(values({"tau": tau, "b": b}, ["b", "tau"]))
    assert torch.allclose(found[0], mean, atol=0.01)
    assert torch.allclose(found[1], sd, rtol=0.01)
    assert running.is_right(found, (mean, sd))
    assert not running.is_right((found[0] + 0.2 * sd, found[1]), (mean, sd))
    assert not running.is_right((found[0], 1.2 * found[1]), (mean, sd))
    assert running.largest_errors((mean + 0.2 * sd, 0.5 * sd), (mean, sd)) == pytest.approx((0.2, math.log(2.0)))


def by_prior_draws(log_likelihood, values):
    return running.moments(values, torch.softmax(log_likelihood, 0))


def test_sums_over_grids_are_the_moments_of_weighted_draws_of_the_prior():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, 12, generator=generator, dtype=torch.float64)
    y, sigma = torch.tensor([12.0, -4.0, 3.0]), torch.tensor([9.0, 7.0, 11.0])
    tau, mu, eta = 5.0 * (noise[:, 0] / noise[:, 1]).abs(), 5.0 * noise[:, 2], noise[:, 3:6]
    log_p = -0.5 * ((y - mu[:, None] - tau[:, None] * eta) / sigma).square().sum(1)
    found = by_prior_draws(log_p, torch.column_stack([tau.log(), eta, mu]))
    assert running.is_right(found, schools(y, sigma))
    x, group, y = torch.tensor([-1.0, 0.5, 1.0, -0.3]), torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 3.0, 7.0, 4.0])
    a, slope, s = 1.0 + 0.7 * noise[:, 6], 0.5 * noise[:, 7], 0.7 * noise[:, 8].abs()
    b = s[:, None] * noise[:, 9:11]
    rate = a[:, None] + b[:, group] + slope[:, None] * x
    found = by_prior_draws((y * rate - rate.exp()).sum(1), torch.column_stack([s.log(), a, b, slope]))
    assert running.is_right(found, Counts(x, group)(y))


def test_changed_data_stay_counts():
    y = torch.arange(6.0)
    all_, one, other = (running.changed(y, 0.6, kind, 2) for kind in running.CHANGES)
    assert (all_ - y).tolist() == [600.0] * 6
    assert (one - y).tolist() == [0.0, 0.0, 600.0, 0.0, 0.0, 0.0]
    assert (other - y).tolist() == [600.0, 0.0] * 3


@pytest.mark.parametrize(
    "name", ["two outcomes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("AR(1) series", "change point"))]
)
def test_exact_answers_are_those_of_weighted_prior_draws(name):
    """Within 3.6 Monte Carlo errors of 2000 effective draws; means before and after a change have heavy tails."""
    task = TASKS[name]
    y = torch.sin(torch.arange(60.0))[: task.args[0].numel()].reshape(task.args[0].shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        density = pf.LogDensity(task.model, task.with_data(y))
        drawn = density.prior(400_000 if name == "change point" else 100_000, seed=1)
        prior = pf.LogDensity(lambda *args: pyro.poutine.block(task.model, hide=["y"])(*args), task.with_data(y))
        z = density.unconstrain({site: drawn[site] for site in density.names})
    found = by_prior_draws((density(z) - prior(z)).double(), values(drawn, density.names))
    mean_off, sd_off = running.largest_errors(found, task.exact(y))
    assert mean_off < 0.08
    assert sd_off < 0.06
