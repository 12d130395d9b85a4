"""The tests of ranks: right under uniformity, and with power where ranks are not uniform."""

from __future__ import annotations

import numpy as np
import pytest
from arviz_stats.ecdf_utils import ecdf_pit

from pyro_flows.calibration.result import NULLS, covered, envelope, symmetry

N, L = 200, 99


def ranks_from(p, draws=L):
    return np.floor(np.clip(p, 0.0, 1.0 - 1e-12) * (draws + 1)).astype(int)


def uniform(count, seed=0):
    return np.random.default_rng(seed).integers(0, L + 1, size=(count, N))


def test_p_values_of_uniform_ranks_are_right():
    """Of 2000 p-values, the share below .05 is .05, with a standard error of .005; that below .01 is .01, .0022."""
    test = envelope(N, L)
    found = np.array([test.p_value(row) for row in uniform(2000)])
    assert (found < 0.05).mean() == pytest.approx(0.05, abs=0.02)
    assert (found < 0.01).mean() == pytest.approx(0.01, abs=0.009)


def test_the_band_is_like_that_of_arviz():
    test = envelope(N, L)
    low, high = test.band(0.95)
    at, _, expected_low, expected_high = ecdf_pit(np.linspace(0.0, 1.0, N), 0.95, 2000)
    index = [int(np.argmin(np.abs(at - point))) for point in test.at]
    assert low == pytest.approx(expected_low[index], abs=0.02)
    assert high == pytest.approx(expected_high[index], abs=0.02)


def test_the_band_holds_as_many_as_it_says():
    test = envelope(N, L)
    low, high = test.band(0.9)
    counts = np.array([test.counts(row) for row in uniform(2000, seed=3)]) / N
    inside = ((counts >= low) & (counts <= high)).all(1).mean()
    assert inside == pytest.approx(0.9, abs=0.03)


def test_p_values_and_the_band_agree():
    test = envelope(N, L)
    low, high = test.band(0.95)
    rows = uniform(300, seed=4) // 2 + np.random.default_rng(0).integers(0, 50, size=(300, 1))
    for row in [*uniform(200, seed=5), *rows[:50]]:
        ecdf = test.counts(row) / N
        inside = bool(((ecdf >= low) & (ecdf <= high)).all())
        assert inside == (test.p_value(row) > 0.05) or abs(test.p_value(row) - 0.05) < 0.005


def test_no_p_value_is_below_the_number_of_nulls():
    assert envelope(N, L).p_value(np.zeros(N, dtype=int)) == pytest.approx(1.0 / (NULLS + 1))


@pytest.mark.parametrize("draws", [999, 100, 9])
def test_coverage_counts_central_ranks_exactly(draws):
    ranks = np.arange(draws + 1)
    for prob in (0.5, 0.8, 0.9, 0.95):
        share, error = covered(ranks, draws, prob)
        assert share == pytest.approx(prob)
        assert error == pytest.approx((prob * (1.0 - prob) / (draws + 1)) ** 0.5)


def test_coverage_looks_at_both_ends():
    shares = [covered(np.array([rank]), 999, 0.9)[0] for rank in (0, 49, 50, 500, 949, 950, 999)]
    assert shares == pytest.approx([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0])


def test_symmetric_ranks_are_symmetric_whatever_their_spread():
    """P-values of symmetric, overdispersed ranks are uniform: of 400, the share below .1 has standard error .015."""
    generator = np.random.default_rng(6)
    found = [symmetry(ranks_from(generator.beta(0.5, 0.5, size=N)), L) for _ in range(400)]
    assert np.mean(np.array(found) < 0.1) == pytest.approx(0.1, abs=0.05)
