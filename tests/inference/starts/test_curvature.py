"""Hessians: by differences of recorded gradients where these have digits, by automatic differentiation elsewhere."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.inference.starts import curvature

Y = torch.tensor([1.0, 0.3, -2.0, 0.5], dtype=torch.float64)


def effects(y):
    zero = y.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(zero + 2.0))
    with pyro.plate("n", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


@pytest.fixture
def automatic(monkeypatch):
    """Points at which second derivatives are taken by autograd."""
    points = []
    own = curvature._automatic

    def noted(density, some, second):
        points.extend(some)
        return own(density, some, second)

    monkeypatch.setattr(curvature, "_automatic", noted)
    return points


def points_of(density, count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, density.dim, generator=generator).to(density.dtype)


def in_units(found, expected):
    scale = expected.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    return float(((found - expected) / (scale[:, :, None] * scale[:, None])).abs().max())


def test_differences_are_what_autograd_says(automatic):
    density = pf.LogDensity(effects, (Y,))
    z = points_of(density)
    found = curvature.second_derivatives(density, z)
    assert not automatic
    expected = curvature.second_derivatives(density, z, exact=True)
    assert len(automatic) == len(z)
    assert in_units(found, expected) < 1e-7
    diagonal = curvature._diagonals(density, z)
    assert len(automatic) == len(z)
    assert torch.allclose(diagonal, expected.diagonal(dim1=-2, dim2=-1), rtol=1e-6)


def test_single_precision_has_too_few_digits(automatic):
    density = pf.LogDensity(effects, (Y.float(),))
    z = points_of(density)
    assert density.dtype == torch.float32
    curvature.second_derivatives(density, z)
    curvature._diagonals(density, z)
    assert len(automatic) == 2 * len(z)


def narrow(width):
    def model():
        pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), width))
        pyro.sample("y", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    return model


@pytest.mark.parametrize(("width", "taken"), [(1e-3, 0), (1e-6, 2)])
def test_where_steps_are_too_long_for_a_scale_autograd_takes_over(automatic, width, taken):
    density = pf.LogDensity(narrow(width))
    z = torch.zeros(2, 2, dtype=torch.float64)
    found = curvature.second_derivatives(density, z)
    assert len(automatic) == taken
    assert torch.allclose(found, -torch.diag(torch.tensor([width**-2, 1.0]).double()).expand(2, 2, 2), rtol=1e-6)


def edged():
    x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    pyro.factor("edge", 0.0 * (1.0 - x).sqrt())


def test_only_points_at_an_edge_are_left_to_autograd(automatic):
    density = pf.LogDensity(edged)
    edge = 1.0 - 1e-7
    z = torch.tensor([[0.0], [edge], [0.5]], dtype=torch.float64)
    found = curvature.second_derivatives(density, z)
    assert [float(point) for point in automatic] == [edge]
    assert torch.allclose(found, torch.full((3, 1, 1), -1.0, dtype=torch.float64), rtol=1e-6)
