"""Walks in latent space, inpainting, neighbors and the spectrum."""

import math

import pytest
import torch
from torch.distributions import Normal

import pyro_flows as pf
from pyro_flows import plots
from pyro_flows.transforms.fixed import Preprocess


def image_flow(dim, base, dtype):
    """A deep flow with large random weights and the map to the scale of data."""
    torch.manual_seed(0)
    flow = pf.realnvp(dim, layers=4, base=base).to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    scale = torch.linspace(0.5, 1.5, dim, dtype=dtype)
    return pf.Flow(pf.transforms.Compose([*flow.bijection.layers, Preprocess(scale, scale)]), base=base)


@pytest.mark.parametrize("base", ["normal", "logistic"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_corners_are_the_four_points(base, dtype, tolerance):
    flow = image_flow(48, base, dtype)
    points = flow().sample((4,))
    walk = plots.interpolate(flow, points, steps=8)
    assert walk.shape == (8, 8, 48)
    corners = torch.stack([walk[0, 0], walk[0, -1], walk[-1, 0], walk[-1, -1]])
    assert (corners - points).abs().max() < tolerance


@pytest.mark.parametrize("base", ["normal", "logistic"])
def test_latents_stay_typical(base):
    """In 12288 dimensions the norm of one draw has a standard deviation of 0.6 %; a straight blend falls to a half."""
    flow = pf.Flow(pf.transforms.DiagonalAffine(12288), base=base)
    torch.manual_seed(3)
    walk = plots.interpolate(flow, flow().sample((4,)), steps=8)
    norms = plots.to_normal(flow, walk).norm(dim=-1) / math.sqrt(12288)
    assert (norms - 1.0).abs().max() < 0.03
    own = walk.norm(dim=-1) / (math.sqrt(12288) * float(flow().base_dist.base_dist.stddev[0]))
    assert (own - 1.0).abs().max() < 0.03
    straight = flow().sample((4,)).mean(0).norm() / (math.sqrt(12288) * float(flow().base_dist.base_dist.stddev[0]))
    assert straight < 0.55


def test_the_copula_of_the_logistic_base():
    flow = pf.spline(1, layers=1, base="logistic")
    x = torch.tensor([-700.0, -30.0, -1.5, -1e-3, 0.0, 0.2, 4.0, 90.0], dtype=torch.float64)
    z = plots.to_normal(flow, x)
    assert torch.allclose(plots.from_normal(flow, z), x, rtol=1e-12, atol=1e-12)
    middle = x.abs() < 5
    assert torch.allclose(Normal(0.0, 1.0).cdf(z[middle]), torch.sigmoid(x[middle]), atol=1e-12)
    assert bool((z.diff() > 0).all())


def test_blend_has_norm_one_coefficients():
    angles = torch.linspace(0.0, math.pi / 2, 5, dtype=torch.float64)
    weights = plots.blend(torch.eye(4, dtype=torch.float64), angles[None], angles[:, None])
    assert torch.allclose(weights.norm(dim=-1), torch.ones(5, 5, dtype=torch.float64))


def test_interpolation_with_context_and_errors():
    flow = pf.realnvp(3, context_dim=2)
    assert plots.interpolate(flow, torch.randn(4, 3), context=torch.ones(2)).shape == (8, 8, 3)
    with pytest.raises(ValueError, match=r"points: expected shape \(4, 3\), got \(3, 3\)"):
        plots.interpolate(flow, torch.randn(3, 3), context=torch.ones(2))
    with pytest.raises(ValueError, match="steps: expected"):
        plots.interpolate(pf.realnvp(3), torch.randn(4, 3), steps=1)
    with pytest.raises(ValueError, match="normal or logistic base"):
        plots.interpolate(pf.realnvp(3, base="student_t"), torch.randn(4, 3))
    with pytest.raises(ValueError, match="expected four"):
        plots.blend(torch.zeros(3, 2), torch.zeros(()), torch.zeros(()))


def test_inpainting_finds_the_conditional_mode():
    """Of a Gaussian, where it is the regression line."""
    flow = pf.Flow(pf.transforms.LowerTriangularAffine(2, loc=[1.0, 2.0], scale_tril=[[2.0, 0.0], [1.5, 0.5]]))
    points = torch.tensor([[0.0, math.nan], [3.0, math.nan]])
    filled = plots.inpaint(flow, points, torch.tensor([True, False]), steps=400, step_size=0.1)
    assert torch.equal(filled[:, 0], points[:, 0])
    assert torch.allclose(filled[:, 1], 2.0 + 0.75 * (points[:, 0] - 1.0), atol=0.02)
    bounded = plots.inpaint(flow, points, torch.tensor([True, False]), steps=50, bounds=(0.0, 1.0))
    assert bool(((bounded[:, 1] >= 0) & (bounded[:, 1] <= 1)).all())
    with pytest.raises(ValueError, match="points: expected shape"):
        plots.inpaint(flow, torch.zeros(2, 3), torch.tensor(True))


def test_nearest():
    training = torch.randn(300, 2, 2, generator=torch.Generator().manual_seed(0))
    found = plots.nearest(training[[7, 100]] + 1e-3, training, count=2)
    assert found.shape == (2, 2)
    assert found[:, 0].tolist() == [7, 100]


def test_spectrum():
    flow = pf.nice(3)
    with torch.no_grad():
        flow.bijection.layers[0].conditioner.values.copy_(torch.tensor([0.0, 2.0, -1.0]))
    assert torch.allclose(plots.scale_spectrum(flow), torch.tensor([2.0, 0.0, -1.0]).exp())
    with pytest.raises(ValueError, match="Rescale"):
        plots.scale_spectrum(pf.realnvp(3))
