"""Pareto-smoothed importance sampling, against ArviZ and against what is known."""

import math

import numpy as np
import pytest
import torch

from pyro_flows.inference.verdict.psis import fit_pareto, psis


def by_arviz(log_weights: torch.Tensor) -> tuple[np.ndarray, float]:
    from arviz_stats.base import array_stats

    with np.errstate(all="ignore"):
        return array_stats.psislw(-log_weights.double().numpy())  # the array function takes minus the log weights


def student(count: int, df: float, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.distributions.StudentT(torch.tensor(df).double()).sample((count,))


@pytest.mark.parametrize("count", [50, 100, 225, 226, 1000, 40_000])
@pytest.mark.parametrize("df", [2.0, 3.0, 30.0])
def test_agrees_with_arviz(count, df):
    log_weights = 0.5 * student(count, df, seed=count)
    smoothed, k_hat = psis(log_weights)
    expected, k_expected = by_arviz(log_weights)
    assert k_hat == pytest.approx(float(k_expected), abs=1e-9)
    np.testing.assert_allclose(smoothed.numpy(), expected, atol=1e-9)


def test_ties_at_the_start_of_a_tail_are_no_pareto_tail():
    values = torch.zeros(2000)
    values[:60] = torch.linspace(1.0, 3.0, 60)
    assert psis(values)[1] == math.inf
    assert all(map(math.isnan, fit_pareto(torch.tensor([0.1, 0.1, 0.1, 0.4, 0.8, 1.0]).double())))


def test_too_few_draws_have_no_tail():
    for count in (1, 4, 20, 29):
        log_weights, k_hat = psis(torch.linspace(-1.0, 1.0, count))
        assert k_hat == math.inf
        assert float(log_weights.exp().sum()) == pytest.approx(1.0)


def test_float32_weights_come_back_in_double_precision():
    log_weights, _ = psis(torch.randn(1000))
    assert log_weights.dtype == torch.float64
