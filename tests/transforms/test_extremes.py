"""Far from the identity: planar layers at the edge of invertibility, couplings that scale a thousandfold."""

import itertools
import math

import pytest
import torch

import pyro_flows as pf
from tests.invariants import check_gradients, check_round_trip, close
from tests.registry import normal, randomize

SIZES = [0.0, 1e-12, 1e-6, 1e-3, 1.0, 1e2, 1e6, 1e12]


def planar(u, w, b, dtype=torch.float64):
    layer = pf.transforms.Planar(len(w)).to(dtype)
    with torch.no_grad():
        layer.conditioner.values.copy_(torch.cat([u, w, torch.tensor([b], dtype=u.dtype)]))
    return layer


def check_residual(layer, y, tolerance):
    """y -> x -> y comes back relative to the size of each group of y and of the layer's shift; finite gradients."""
    y = y.requires_grad_()
    x, ladj = layer.inverse_and_ladj(y)
    again, ladj_there = layer.forward_and_ladj(x)
    size = y.abs().amax((-2, -1)) + layer._parameters_at(None)[0].abs().max()
    assert ((again - y).abs().amax((-2, -1)) <= tolerance * size).all()
    assert ladj.isfinite().all()
    close(ladj_there.detach(), -ladj.detach(), 1e3 * tolerance)
    for output in (x.sum() + ladj.sum(), again.sum() + ladj_there.sum()):
        for gradient in torch.autograd.grad(output, [y, *layer.parameters()], retain_graph=True):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-4)], ids=str)
def test_planar_at_the_edge(dtype, tolerance, dim):
    """u = -c w: the larger c, the nearer is w.u to -1; for points of any size, float64 to 1e-7, float32 to 1e-4."""
    points = torch.tensor(SIZES, dtype=torch.float64)[:, None, None] * normal(8, dim, seed=3)
    for c, length, b in itertools.product((0.0, 1.0, 3.0, 30.0, 1e3, 1e6), (1e-3, 1.0, 1e2), (0.0, 0.5, -20.0)):
        w = length * normal(dim, seed=dim)
        check_residual(planar(-c * w, w, b, dtype), points.to(dtype), tolerance)


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("c", [3.0, 1e3, 1e6])
def test_planar_with_a_steep_slope(c, dim):
    """u = c w: x -> y -> x comes back to the rounding of y, whose size is that of u."""
    w = normal(dim, seed=dim)
    for dtype in (torch.float64, torch.float32):
        layer = planar(c * w, w, 0.5, dtype)
        for size in SIZES:
            x = (size * normal(8, dim, seed=3)).to(dtype)
            y, ladj = layer.forward_and_ladj(x)
            again, ladj_back = layer.inverse_and_ladj(y)
            assert (again - x).abs().max() <= 16.0 * torch.finfo(dtype).eps * y.abs().max()
            close(ladj_back, -ladj, 1e3 * torch.finfo(dtype).eps * c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_planar_slope_stays_positive(dtype):
    """w.u > -1 whatever the parameters, and the forward map is increasing along w to rounding."""
    w = normal(3, seed=1)
    for c in (0.0, 1.0, 1e2, 1e4, 1e6):
        layer = planar(-c * w, w, 0.0, dtype)
        u, _, _, slope = layer._parameters_at(None)
        assert slope > 0.0
        close(1.0 + (w.to(dtype) * u).sum(-1, keepdim=True), slope, 8.0 * torch.finfo(dtype).eps)
        line = torch.linspace(-3.0, 3.0, 1001, dtype=dtype)[:, None] * w.to(dtype)
        along = (layer(line) * w.to(dtype)).sum(-1)
        assert (along.diff() >= -8.0 * torch.finfo(dtype).eps).all()


def test_planar_with_w_zero_is_a_shift():
    u = normal(3, seed=1)
    layer = planar(u, torch.zeros(3, dtype=torch.float64), 0.7)
    x = normal(5, 3, seed=2).requires_grad_()
    y, ladj = layer.forward_and_ladj(x)
    close(y, x + u * math.tanh(0.7), 1e-12)
    close(ladj, torch.zeros(5, dtype=torch.float64), 0.0)
    check_round_trip(layer, x.detach(), None, 1e-12)
    for output in (y.sum() + ladj.sum(), *(tensor.sum() for tensor in layer.inverse_and_ladj(x))):
        wanted = [x, *layer.parameters()]
        for gradient in torch.autograd.grad(output, wanted, retain_graph=True, materialize_grads=True):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("context_dim", [0, 2])
def test_planar_starts_from_u_zero_and_w_random(context_dim):
    """The identity by u = 0; w = 0 would be one too, but there the constraint has no derivative."""
    context = torch.ones(context_dim) if context_dim else None
    u, w, _ = pf.transforms.Planar(3, context_dim=context_dim).conditioner(None, context).split([3, 3, 1])
    assert (u == 0.0).all()
    assert (w != 0.0).all()


@pytest.mark.parametrize("context_dim", [0, 2])
def test_planar_starts_with_planes_spread_over_a_standard_normal(context_dim):
    """Signed distances b / |w| from the origin are standard normal; fails once in 10^6 by chance (five errors)."""
    context = torch.ones(context_dim) if context_dim else None
    starts = [pf.transforms.Planar(3, context_dim=context_dim).conditioner(None, context) for _ in range(400)]
    _, w, b = torch.stack(starts).detach().split([3, 3, 1], dim=-1)
    distances = b.squeeze(-1) / w.norm(dim=-1)
    assert float(distances.mean().abs()) < 5.0 / math.sqrt(400)
    assert float((distances.square().mean() - 1.0).abs()) < 5.0 * math.sqrt(2.0 / 400)


@pytest.mark.parametrize("length", [1e-2, 1e-4, 1e-6, 1e-8])
def test_planar_with_tiny_w(length):
    """In float32 as in float64, to 1e-5: no cancellation where w is short and the constraint divides by its square."""
    u, w = torch.tensor([0.3, -0.2], dtype=torch.float64), length * torch.tensor([1.0, 2.0], dtype=torch.float64)
    x = torch.ones(1, 2, dtype=torch.float64)
    exact = planar(u, w, 0.7)(x)
    close(planar(u, w, 0.7, torch.float32)(x.float()).double(), exact, 1e-5)


@pytest.mark.parametrize("c", [1.0, 2.0])
def test_planar_gradients_near_the_edge(c):
    """Against differences, where the inverse is steep (slopes of about 1e-2)."""
    w = torch.tensor([1.5, -1.0], dtype=torch.float64)
    layer = planar(-c * w, w, 0.2)
    assert layer._parameters_at(None)[3] < 0.1
    check_gradients(layer, normal(4, 2, seed=1), None, fast=False)


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("target", [1e-3, 1e3])
def test_one_affine_coupling_scales_a_thousandfold(target, context_dim):
    """In float32, with gradients that have not died: the bound is smooth and wide. Round trip to 1e-4."""
    layer = pf.transforms.AffineCoupling(2, context_dim=context_dim, hidden=(8,))
    bound = layer.log_scale_bound
    raw = bound * math.atanh(math.log(target) / bound)
    with torch.no_grad():
        layer.conditioner.layers[-1].bias[0] = raw
    x = normal(20, 2, seed=1, dtype=torch.float32)
    context = normal(20, context_dim, seed=2, dtype=torch.float32) if context_dim else None
    y, ladj = layer.forward_and_ladj(x, context)
    close(ladj.detach(), torch.full((20,), math.log(target)), 1e-4)
    close((y[:, 1] / x[:, 1]).detach(), torch.full((20,), target), 1e-4)
    (gradient,) = torch.autograd.grad(ladj.mean(), layer.conditioner.layers[-1].bias)
    assert gradient[0] > 0.1
    with torch.no_grad():
        close(layer.inverse_and_ladj(y, context)[0], x, 1e-4)


@pytest.mark.parametrize("target", [1e-3, 1e3])
def test_one_affine_coupling_learns_a_thousandfold(target):
    """From the identity, by maximum likelihood in float32; to 5 %, where 4000 points know it to 1 %."""
    data = normal(4000, 1, seed=1, dtype=torch.float32) * target
    layer = pf.transforms.AffineCoupling(1)
    flow = pf.Flow(layer)
    optimizer = torch.optim.Rprop(layer.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (-flow.log_prob(data).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(layer.forward_and_ladj(torch.zeros(1))[1].exp()) == pytest.approx(target, rel=0.05)


@pytest.mark.parametrize("size", [1e6, 1e12, 1e30])
def test_far_points_do_not_overflow(size):
    """A random Real-NVP in float32 keeps any finite point finite, both ways, with a finite log-determinant."""
    flow = randomize(pf.realnvp(3, layers=4, hidden=(6,), activation="tanh"), sd=0.3)
    x = size * normal(50, 3, seed=1, dtype=torch.float32)
    for way in (flow.bijection.forward_and_ladj, flow.bijection.inverse_and_ladj):
        assert all(tensor.isfinite().all() for tensor in way(x))
