"""Normal distributions in compact form: against torch's, and against the recursion that the form stands for."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_flows.inference.starts.gaussians import Gaussians, compact, diagonal_update, newton_step
from tests.invariants import close
from tests.registry import normal

HISTORY = 8


def random_gaussians(paths, dim, rank, *, diagonal, seed=0):
    basis = torch.linalg.qr(normal(paths, dim, rank, seed=seed)).Q
    below = 0.3 * normal(paths, rank, rank, seed=seed + 1).tril(-1)
    factor = below + (0.5 + normal(paths, rank, seed=seed + 2).abs()).diag_embed()
    units = 0.5 + normal(paths, dim, seed=seed + 3).abs()
    if not diagonal:
        units = units.diag_embed() + 0.5 * normal(paths, dim, dim, seed=seed + 4).tril(-1)
    root = 0.5 + normal(paths, dim, seed=seed + 5).abs()
    return Gaussians(normal(paths, dim, seed=seed + 6), units, root, basis, factor)


def dense(gaussians):
    """Covariances, from the images of the unit vectors."""
    identity = torch.eye(gaussians.loc.shape[1], dtype=torch.float64)
    columns = gaussians.map(identity)[0] - gaussians.loc[:, None]
    return columns.mT @ columns


@pytest.mark.parametrize("diagonal", [True, False])
def test_densities_of_draws_and_of_points(diagonal):
    """Against torch's multivariate normal, for draws of one path under all paths."""
    found = random_gaussians(3, 6, 4, diagonal=diagonal)
    z, log_q = found.map(normal(5, 6, seed=9))
    exact = MultivariateNormal(found.loc, covariance_matrix=dense(found))
    close(log_q, exact.log_prob(z.transpose(0, 1)).mT, 1e-10)
    close(found.log_prob(z[1]), exact.log_prob(z[1][:, None]).mT, 1e-10)
    other, own = found.map(normal(3, 5, 6, seed=9))
    close(own, exact.log_prob(other.transpose(0, 1)).mT, 1e-10)


def test_scale_is_a_root_of_the_covariance_or_the_best_diagonal():
    full = random_gaussians(2, 5, 3, diagonal=False)
    close(full.scale() @ full.scale().mT, dense(full), 1e-10)
    flat = random_gaussians(2, 5, 3, diagonal=True)
    close(flat.scale(), dense(flat).inverse().diagonal(dim1=-2, dim2=-1).rsqrt(), 1e-10)


@pytest.mark.parametrize(("dim", "filled"), [(1, 1), (3, 2), (3, 8), (20, 0), (20, 5), (20, 8)])
def test_the_compact_form_is_the_recursion(dim, filled):
    r""":math:`H \leftarrow (I - s y^\top) H (I - y s^\top) + s s^\top` from the diagonal, with :math:`s^\top y = 1`."""
    paths = 2
    mix = normal(dim, dim, seed=1)
    hessian = mix @ mix.mT / dim + torch.eye(dim, dtype=torch.float64)
    steps = normal(paths, HISTORY, dim, seed=2)
    steps = steps / (steps @ hessian * steps).sum(-1, keepdim=True).sqrt()
    steps[:, : HISTORY - filled] = 0.0
    changes = steps @ hessian
    alpha = 0.5 + normal(paths, dim, seed=3).abs()
    basis, factor = compact(alpha, steps, changes)
    turn = basis @ (factor @ factor.mT - torch.eye(factor.shape[-1], dtype=torch.float64)) @ basis.mT
    root = alpha.sqrt()
    found = root[:, :, None] * (torch.eye(dim, dtype=torch.float64) + turn) * root[:, None]
    for path in range(paths):
        inverse = alpha[path].diag()
        for s, y in zip(steps[path, HISTORY - filled :], changes[path, HISTORY - filled :], strict=True):
            away = torch.eye(dim, dtype=torch.float64) - torch.outer(s, y)
            inverse = away @ inverse @ away.mT + torch.outer(s, s)
        close(found[path], inverse, 1e-8)
    if filled:
        close((found @ changes[:, -1, :, None])[..., 0], steps[:, -1], 1e-8)


def test_the_diagonal_update():
    """In one dimension it is the secant; with the exact change along every axis the curvature is what it stays at."""
    step, change = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)
    for alpha in (0.01, 1.0, 100.0):
        close(diagonal_update(torch.full_like(step, alpha), step, change), step / change, 1e-12)
    variance = torch.tensor([[0.1, 1.0, 10.0]], dtype=torch.float64)
    step = variance.sqrt() / 3.0**0.5
    close(diagonal_update(variance, step, step / variance), variance, 1e-12)
    assert (diagonal_update(variance, normal(1, 3, seed=1), normal(1, 3, seed=2)) > 0.0).all()


def test_a_newton_step_needs_no_factor():
    """It is the product with the matrix that the factor stands for, with places of the history left empty or not."""
    steps = normal(6, 5, 9, seed=41)
    changes = 2.0 * steps + 0.3 * normal(6, 5, 9, seed=42)
    length = (steps * changes).sum(-1, keepdim=True).sqrt()
    steps, changes = steps / length, changes / length
    steps[:3, :2], changes[:3, :2] = 0.0, 0.0
    alpha, gradient = 0.5 + normal(6, 9, seed=43).abs(), normal(6, 9, seed=44)
    basis, factor = compact(alpha, steps, changes)
    x = alpha.sqrt() * gradient
    turned = x + (((x[:, None] @ basis) @ (factor @ factor.mT - torch.eye(9).double())) @ basis.mT)[:, 0]
    close(newton_step(alpha, steps, changes, gradient), alpha.sqrt() * turned, 1e-12)
    wrong = newton_step(alpha, steps, 1e9 * changes, gradient)
    assert bool(((wrong * gradient).sum(1) > 0.0).all()), "a step rises, whatever the history"
