"""What every bijection promises, as functions that raise AssertionError: used by the tests, and tested themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

import pyro_flows as pf


def close(got: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Equal shape and dtype, and values to ``tolerance``, absolute and relative."""
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance, msg=lambda message: f"{what}: {message}" if what else message
    )


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor, event_dim: int) -> Tensor:
    """Return the Jacobian (*batch, n, n) of a map whose batch rows are independent, by n backward passes."""
    x = x.detach().requires_grad_()
    y = function(x).flatten(-event_dim)
    rows = [
        torch.autograd.grad(y[..., i].sum(), x, retain_graph=True, materialize_grads=True)[0].flatten(-event_dim)
        for i in range(y.shape[-1])
    ]
    return torch.stack(rows, dim=-2)


def check_round_trip(t: pf.transforms.Bijection, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """From both ends: the point comes back, and the two log-determinants cancel."""
    with torch.no_grad():
        for there, back in ((t.forward_and_ladj, t.inverse_and_ladj), (t.inverse_and_ladj, t.forward_and_ladj)):
            y, ladj = there(x, context)
            again, ladj_back = back(y, context)
            close(again, x, tolerance, f"{back.__name__} after {there.__name__}")
            close(ladj_back, -ladj, tolerance, f"ladj of {back.__name__}")


def check_ladj(t: pf.transforms.Bijection, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """In both directions, ladj is the log absolute determinant of the Jacobian that autograd finds."""
    for way in (t.forward_and_ladj, t.inverse_and_ladj):
        matrix = jacobian(lambda point, way=way: way(point, context)[0], x, t.event_dim)
        close(way(x, context)[1].detach(), torch.linalg.slogdet(matrix)[1], tolerance, way.__name__)


def check_gradients(t: pf.transforms.Bijection, x: Tensor, context: Tensor | None, *, fast: bool = True) -> None:
    """In both directions, gradients with respect to input, context and every parameter match differences."""
    parameters = tuple(t.parameters())  # gradcheck edits them in place, so the module sees the edits
    inputs = [x.clone().requires_grad_()] + ([] if context is None else [context.clone().requires_grad_()])
    for way in (t.forward_and_ladj, t.inverse_and_ladj):

        def run(*tensors: Tensor, way: Callable = way) -> tuple[Tensor, Tensor]:
            return way(tensors[0], tensors[1] if context is not None else None)

        try:
            gradcheck(run, (*inputs, *parameters), fast_mode=fast, atol=1e-6, rtol=1e-4)
        except GradcheckError as error:
            raise AssertionError(f"{way.__name__}: {error}") from error


def check_batching(t: pf.transforms.Bijection, x: Tensor, context: Tensor | None) -> None:
    """``torch.func.vmap`` over the rows gives what one call with the batch gives."""
    axes = (0, None if context is None else 0)
    for way in (t.forward_and_ladj, t.inverse_and_ladj):
        for got, expected in zip(torch.func.vmap(way, in_dims=axes)(x, context), way(x, context), strict=True):
            close(got, expected, 1e-12, way.__name__)


def check_identity(t: pf.transforms.Bijection, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """The map leaves every point where it is, with log-determinant 0."""
    for way in (t.forward_and_ladj, t.inverse_and_ladj):
        y, ladj = way(x, context)
        close(y, x, tolerance, way.__name__)
        close(ladj, x.new_zeros(x.shape[: -t.event_dim]), tolerance, f"ladj of {way.__name__}")


def check_score(t: pf.transforms.Bijection, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    r"""The score of y's density is :math:`J^{-\top}(g_x - \nabla\log|J|)`, by the Jacobian and by the inverse."""

    def log_base(point: Tensor) -> Tensor:
        return -3.0 * torch.log1p(0.2 * (point - 0.3).square()).flatten(-t.event_dim).sum(-1)

    def gradient(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
        leaf = point.detach().requires_grad_()
        value = function(leaf).sum()
        if not value.requires_grad:
            return torch.zeros_like(point)
        return torch.autograd.grad(value, leaf, materialize_grads=True)[0]

    def log_density(point: Tensor) -> Tensor:
        back, ladj = t.inverse_and_ladj(point, context)
        return log_base(back) + ladj

    score = gradient(log_base, x)
    y, ladj, carried = t.forward_and_score(x, score, context)
    plain, plain_ladj = t.forward_and_ladj(x, context)
    assert not carried.requires_grad, "the score came back with a graph"
    close(y.detach(), plain.detach(), 1e-12, "value")
    close(ladj.detach(), plain_ladj.detach(), 1e-12, "ladj")
    close(carried, gradient(log_density, y), tolerance, "score against the inverse")
    matrix = jacobian(lambda point: t.forward_and_ladj(point, context)[0], x, t.event_dim)
    pull = score - gradient(lambda point: t.forward_and_ladj(point, context)[1], x)
    expected = torch.linalg.solve(matrix.mT, pull.flatten(-t.event_dim)).reshape(y.shape)
    close(carried, expected, tolerance, "score against the Jacobian")


def check_path_gradient(flow: pf.Flow) -> None:
    """With the flow itself as the target, the path gradient vanishes to 1e-10 of its two halves."""
    y, log_q, score = flow.sample_with_score((64,))
    leaf = y.detach().requires_grad_()
    log_p = flow.log_prob(leaf)
    (target,) = torch.autograd.grad(log_p.sum(), leaf)
    close(log_q, log_p.detach(), 1e-9, "log q")
    parameters = list(flow.parameters())
    assert y.requires_grad, "the draws carry no graph"

    def size(weight: Tensor) -> Tensor:
        found = torch.autograd.grad((weight * y).sum(), parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found]).norm()

    whole = size(target)
    assert whole > 0.0
    assert size(score - target) <= 1e-10 * whole, "the path gradient does not vanish where q = p"


def check_mass(flow: pf.Flow, context: Tensor | None, tolerance: float, *, half_width: float, points: int) -> None:
    """The density of a flow in two dimensions integrates to 1, by the trapezoidal rule on a square.

    An axis is 2 sinh(t) of equal steps in t: they are small where the density is, and few go to the tails.
    """
    t = torch.linspace(-1.0, 1.0, points, dtype=torch.float64) * math.asinh(0.5 * half_width)
    axis, width = 2.0 * t.sinh(), 2.0 * t.cosh() * (t[1] - t[0])
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(axis, axis), context).exp()
    mass = density @ torch.outer(width, width).flatten()
    assert abs(mass - 1.0) <= tolerance, f"mass {float(mass):.8f}"


def check_every_coordinate_moves(t: pf.transforms.Bijection, dim: int) -> None:
    """No output equals its input, and each depends on something, with every input felt somewhere."""
    x = torch.linspace(-1.0, 1.5, 8 * dim, dtype=torch.float64).sin().reshape(8, dim)
    y, _ = t.forward_and_ladj(x)
    moved = (y - x).abs().amax(0) > 1e-6
    assert moved.all(), f"coordinates {(~moved).nonzero().flatten().tolist()} never move"
    matrix = jacobian(lambda point: t.forward_and_ladj(point)[0], x, 1).abs().amax(0)
    assert (matrix.amax(1) > 0.0).all(), "an output depends on nothing"
    assert (matrix.amax(0) > 0.0).all(), "an input is lost"
    if dim > 1:
        others = matrix - torch.diag_embed(matrix.diagonal())
        assert (others.amax(1) > 0.0).all(), "an output depends on no other coordinate"
