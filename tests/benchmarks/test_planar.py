"""The benchmark of planar flows: its density, its measure, resuming."""

import math

import pytest
import torch

import pyro_flows as pf
from benchmarks.toys import planar


def test_the_constant_of_the_density():
    line = (torch.arange(600, dtype=torch.float64) + 0.5) / 600 * 12 - 6
    mass = planar.log_density(torch.cartesian_prod(line, line)).exp().sum() * (12 / 600) ** 2
    assert math.log(float(mass)) == pytest.approx(planar.LOG_Z, abs=1e-4)


def test_the_gap_is_the_divergence(monkeypatch):
    """Of a standard Gaussian from one with another mean: half of the squared distance."""
    monkeypatch.setattr(planar, "log_density", lambda z: -0.5 * (z - 1.0).square().sum(-1))
    monkeypatch.setattr(planar, "LOG_Z", math.log(2 * math.pi))
    torch.manual_seed(0)
    value, error = planar.gap(pf.Flow(pf.transforms.DiagonalAffine(2)))
    assert abs(value - 1.0) < 4 * error < 0.05


@pytest.mark.parametrize("base", planar.BASES)
def test_training_closes_the_gap(base):
    start, end = (planar.gap(planar.train(2, base, 0, steps=steps, batch=64), 4000)[0] for steps in (1, 250))
    assert 0.0 < end < 0.7 * start
