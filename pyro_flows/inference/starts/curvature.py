"""Second derivatives of a log density: Hessians, their inverse roots, and the scale of each coordinate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pyro_flows.model.batching import hessian_diagonals, hessians, quiet
from pyro_flows.model.graphs import refuse_recording
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.stack import Stack
from pyro_flows.support.process.journal import evaluated

FULL_HESSIAN_UP_TO = 200  # dimensions: as many as are asked for
ONE_HESSIAN_UP_TO = 1000  # dimensions: about the best mode alone, a matrix of 8 MB whose factor takes a second
SMALL_UP_TO = 50  # dimensions: Hessians cost next to nothing, and training is short
AT_ONCE = 64  # rows of a Hessian, or points


class Differentiable(Protocol):
    """What paths and differences need of a density: coordinates, numbers that it handles, and gradients.

    ``numbers`` are in the largest intermediate result at one point; ``written`` are in all results together.
    """

    dim: int
    numbers: int

    @property
    def written(self) -> int:
        """Numbers that the operations of one evaluation with its gradient write, altogether."""

    def value_and_grad(self, z: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return log densities (S,) and gradients (S, D) at points (S, D)."""


def inverse_roots(density: LogDensity | Stack, points: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return W (K, D, D) with :math:`W W^\top = |H|^{-1}`, H the Hessian, and :math:`|H_{ii}|^{-1/2}` (K, D).

    Where the Hessian is not finite, W is the identity.
    """
    return inverse_roots_of(second_derivatives(density, points))


def inverse_roots_of(hessians: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :func:`inverse_roots` does, for Hessians (K, D, D).

    They are scaled by the diagonal first: the eigenvalues of a matrix with entries of 1e-12 and 1e12 would be noise.
    """
    hessians = 0.5 * (hessians + hessians.mT)
    units = _units(hessians.diagonal(dim1=-2, dim2=-1))
    scaled = units[..., None] * hessians * units[..., None, :]
    usable = torch.isfinite(scaled).all(-1).all(-1)
    identity = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
    scaled = torch.where(usable[:, None, None], scaled, identity)
    units = torch.where(usable[:, None], units, 1.0)
    values, vectors = torch.linalg.eigh(scaled)
    floor = 1e-10 if scaled.dtype == torch.float64 else 1e-5
    values = torch.maximum(values.abs(), floor * values.abs().amax(-1, keepdim=True))
    return units[..., None] * vectors * values.rsqrt()[..., None, :], units


def lower_triangular(roots: Tensor) -> Tensor:
    r"""Return the lower triangular L (..., D, D), with a positive diagonal, that has :math:`L L^\top = W W^\top`."""
    upper = torch.linalg.qr(roots.mT).R
    return (upper * upper.diagonal(dim1=-2, dim2=-1).sign()[..., None]).mT.tril()


def scales(density: LogDensity, points: Tensor) -> Tensor:
    r"""Return :math:`|H_{ii}|^{-1/2}` (K, D), or 1 where that is not finite; cost: D Hessian rows a point."""
    if density.dim <= FULL_HESSIAN_UP_TO:
        return _units(second_derivatives(density, points).diagonal(dim1=-2, dim2=-1))
    return _units(_diagonals(density, points))


def _units(diagonal: Tensor) -> Tensor:
    sizes = diagonal.abs()
    return torch.where((sizes > torch.finfo(sizes.dtype).tiny ** 0.5) & torch.isfinite(sizes), sizes.rsqrt(), 1.0)


def second_derivatives(density: LogDensity | Stack, points: Tensor, *, exact: bool = False) -> Tensor:
    """Hessians (K, D, D): differences of recorded gradients in double precision, automatic differentiation otherwise.

    In units of scales, differences have errors of 1e-10 to 1e-7, and take a third to a ninth of the time; autograd is
    used at points with too narrow scales. ``exact`` ones are taken automatically, but those of long models: operations
    are not recorded for second derivatives, which would take 40 times as long.
    """
    if isinstance(density, Stack):
        return density.hessians(points)
    if (density.long and density.dtype == torch.float64) or (_has_digits(density) and not exact):
        coordinates = torch.arange(density.dim, device=points.device)
        found = torch.cat([_rows(density, part, coordinates) for part in points.split(AT_ONCE)])
        return _where_coarse(points, found.diagonal(dim1=-2, dim2=-1), found, partial(_by_autograd, density))
    return _by_autograd(density, points)


def _by_autograd(density: LogDensity, points: Tensor) -> Tensor:
    """Hessians (K, D, D) by automatic differentiation where the model allows, by differences otherwise."""
    found = _automatic(density, points, hessians)
    if found is not None:
        return found
    coordinates = torch.arange(density.dim, device=points.device)
    return torch.stack([differences(density, point, coordinates) for point in points])


def _has_digits(density: LogDensity) -> bool:
    """Whether differences of gradients have digits enough, and are cheap."""
    return density.dtype == torch.float64 and density.batched and density.reason is None


def _diagonals(density: LogDensity, points: Tensor) -> Tensor:
    """Diagonals (K, D) of the Hessians, a chunk of rows at a time: in the same way."""

    def automatic(some: Tensor) -> Tensor:
        found = _automatic(density, some, partial(hessian_diagonals, chunk=AT_ONCE))
        return _diagonals_by_differences(density, some) if found is None else found

    if not _has_digits(density):
        return automatic(points)
    found = _diagonals_by_differences(density, points)
    return _where_coarse(points, found, found, automatic)


def _diagonals_by_differences(density: LogDensity, points: Tensor) -> Tensor:
    parts = torch.arange(density.dim, device=points.device).split(AT_ONCE)
    rows = [[differences(density, point, part).gather(1, part[:, None])[:, 0] for part in parts] for point in points]
    return torch.stack([torch.cat(row) for row in rows])


def _where_coarse(points: Tensor, diagonals: Tensor, found: Tensor, otherwise: Callable[[Tensor], Tensor]) -> Tensor:
    """Replace what was found (K, ...) where steps of differences are not a tenth of the scales that they tell."""
    fine = (_steps(points) <= 0.1 * _units(diagonals)).all(-1) & torch.isfinite(found).flatten(1).all(-1)
    coarse = (~fine).nonzero()[:, 0]
    return found.index_copy(0, coarse, otherwise(points[coarse])) if len(coarse) else found


def _automatic(density: LogDensity, points: Tensor, second: Callable[..., Tensor]) -> Tensor | None:
    """Return second derivatives at points (K, D), None where the model does not let them be taken."""
    if not density.batched:
        return None
    try:
        with torch.no_grad(), quiet(), density.clock.watching():
            found = evaluated([points], lambda: second(density.single, points), density.faults)
    except RuntimeError:
        refuse_recording("second derivatives by differences")  # a run of the model for each coordinate and point
        return None
    density.spend(points.numel())
    return found


def differences(density: Differentiable, point: Tensor, coordinates: Tensor) -> Tensor:
    """Return rows (N, D) of the Hessian at one point, by central differences of 2 N gradients."""
    return _rows(density, point[None], coordinates)[0]


def _rows(density: Differentiable, points: Tensor, coordinates: Tensor) -> Tensor:
    """Return such rows (K, N, D) at points (K, D)."""
    steps = _steps(points)[:, coordinates]
    shifts = torch.zeros(*steps.shape, points.shape[1], dtype=points.dtype, device=points.device)
    shifts.scatter_(2, coordinates[None, :, None].expand(len(points), -1, 1), steps[..., None])
    moved = torch.stack([points[:, None] + shifts, points[:, None] - shifts])
    up, down = density.value_and_grad(moved.flatten(0, 2))[1].unflatten(0, moved.shape[:3])
    return (up - down) / (2.0 * steps[..., None])


def _steps(points: Tensor) -> Tensor:
    """Return the steps of central differences at points (K, D)."""
    return torch.finfo(points.dtype).eps ** (1 / 3) * (1.0 + points.abs())
