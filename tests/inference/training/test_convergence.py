"""The stop rule: what stands still, what climbs slowly, what is only noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_flows.inference.training.convergence import WINDOW, Monitor
from pyro_flows.support.thresholds import EVIDENCE_GAP_NEGLIGIBLE
from tests.registry import normal

DRAWS = normal(200, 2, seed=1)


def watch(elbos: Tensor, shifts: Tensor | None = None) -> tuple[bool, str]:
    """Checks with these ELBOs and shifts of the draws, in sds."""
    monitor = Monitor()
    shifts = torch.zeros(len(elbos)) if shifts is None else shifts
    for elbo, shift in zip(elbos, shifts, strict=True):
        monitor.add(DRAWS + shift, torch.full((len(DRAWS),), float(elbo), dtype=torch.float64))
    return monitor.stationary()


def test_needs_a_whole_window():
    still, why = watch(torch.zeros(WINDOW - 1))
    assert not still
    assert f"{WINDOW - 1} of {WINDOW}" in why


def test_small_noise_stands_still():
    assert watch(0.005 * normal(WINDOW, seed=2), 0.02 * normal(WINDOW, seed=3))[0]


def test_a_trend_does_not():
    assert not watch(torch.linspace(0.0, 1.0, WINDOW))[0]
    assert not watch(torch.zeros(WINDOW), torch.linspace(0.0, 1.0, WINDOW))[0]


@pytest.mark.parametrize("size", [1e3, 1e8])
def test_wild_noise_does_not_pass_for_standing_still(size):
    """Split R-hat alone would be near 1."""
    still = [watch(size * normal(WINDOW, seed=seed), size * normal(WINDOW, seed=seed + 50))[0] for seed in range(20)]
    assert not any(still)


def test_a_slow_climb_is_extrapolated():
    """A gap of 30 / steps rises by little in any window, but what is left is 30 / steps."""
    for checks in (20, 100):
        steps = 1.0 + torch.arange(checks, dtype=torch.float64)
        assert not watch(-30.0 / steps)[0]
    checks = int(4.0 / EVIDENCE_GAP_NEGLIGIBLE)
    steps = 1.0 + torch.arange(checks, dtype=torch.float64)
    assert watch(-1.0 / steps)[0]


def test_an_elbo_that_is_not_finite_is_no_rest():
    still, why = watch(torch.full((WINDOW,), -math.inf))
    assert not still
    assert "not finite" in why
