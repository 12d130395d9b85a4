"""Rational quadratic splines: knots, tails, Pyro's spline as a second opinion; one-dimensional flows."""

import importlib

import pytest
import torch

import pyro_flows as pf
from pyro_flows.transforms import splines
from tests.invariants import close
from tests.registry import built, normal

BINS, BOUND = 6, 3.0
LINE = torch.linspace(-1.3 * BOUND, 1.3 * BOUND, 2001, dtype=torch.float64)


def random_knots(seed=1):
    return splines.knots(2.0 * normal(splines.count(BINS), seed=seed), BINS, BOUND)


@pytest.mark.parametrize("way", [splines.forward, splines.inverse])
def test_outside_of_the_interval_points_stay(way):
    x = torch.tensor([-1e30, -BOUND, BOUND, 5.0, 1e30], dtype=torch.float64)
    y, log_slope = way(x, random_knots(), BOUND)
    assert torch.equal(y, x)
    assert (log_slope == 0.0).all()


def test_pyro_has_the_same_spline():
    """In all bins but the outermost, where Pyro takes 0.999 for the slope at the ends."""
    raw = 2.0 * normal(splines.count(BINS), seed=1)
    knots = splines.knots(raw, BINS, BOUND)
    widths, heights, _ = raw.split([BINS, BINS, BINS - 1])
    theirs = importlib.import_module("pyro.distributions.transforms.spline")._monotonic_rational_spline
    inside = (knots[0, 1] < LINE) & (knots[0, -2] > LINE)
    x = LINE[inside]
    parts = (part.expand(len(x), -1) for part in (widths.softmax(0), heights.softmax(0), knots[2, 1:-1] - 1e-3))
    expected = theirs(x, *parts, bound=BOUND)
    for got, value in zip(splines.forward(x, knots, BOUND), expected, strict=True):
        close(got, value, 1e-6)  # Pyro looks bins up with a tolerance of 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sd", [5.0, 20.0, 60.0])
def test_rough_splines_come_back(sd, dtype):
    """With the narrowest bins and the flattest slopes: to rounding, relative to how steep the spline is there."""
    raw = sd * normal(20_000, splines.count(BINS), seed=2)
    knots = splines.knots(raw.to(dtype), BINS, BOUND)
    x = (BOUND * (2.0 * torch.rand(20_000, generator=torch.Generator().manual_seed(1)) - 1.0)).to(dtype)
    y, log_slope = splines.forward(x, knots, BOUND)
    again, log_slope_back = splines.inverse(y, knots, BOUND)
    assert all(tensor.isfinite().all() for tensor in (y, log_slope, again, log_slope_back))
    error = (again - x).abs() * log_slope.exp().clamp(max=1.0)
    assert error.max() <= 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [1e2, 1e6, 1e30])
def test_far_points_move(size):
    """By the affine map of the coupling, and back."""
    layer = built(
        lambda: pf.transforms.SplineCoupling(2, hidden=(4,), activation="tanh"), dtype=torch.float64, sd=0.3, seed=0
    )
    x = torch.tensor([[0.5, size], [0.5, -size]], dtype=torch.float64)
    y, ladj = layer.forward_and_ladj(x)
    log_scale, shift, _ = layer._parameters_at(x[:, :1], None)
    close(y[:, 1:], x[:, 1:] * log_scale.exp() + shift, 1e-12)
    close(ladj, log_scale.squeeze(-1), 1e-12)
    assert (log_scale.abs() > 1e-3).all()
    close(layer.inverse_and_ladj(y)[0], x, 1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [("bins", {"bins": 1}), ("bins", {"bins": 501}), ("bins", {"bins": 2.0}), ("bound", {"bound": 0.0})],
)
def test_bad_options(name, options):
    for build in (pf.transforms.SplineCoupling, pf.spline):
        with pytest.raises(ValueError, match=rf"^{name}: "):
            build(2, **options)
