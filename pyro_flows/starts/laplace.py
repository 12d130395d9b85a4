"""Modes by Newton's method, and the normal distributions around them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_flows.model.log_density import LogDensity
from pyro_flows.starts.climb import FEW_TICKS
from pyro_flows.starts.curvature import FULL_HESSIAN_UP_TO, inverse_roots, lower_triangular
from pyro_flows.starts.start import Start
from pyro_flows.verdict.thresholds import DENSITY_GAP_OF_LOST

MODES = 4  # at most


def laplace(density: LogDensity, points: Tensor, *, most: int = FEW_TICKS) -> list[Start]:
    """Climb from each point (K, D) by Newton's method, for at most so many steps.

    Return Laplace starts at the distinct modes, full and diagonal, the best first.

    Modes are ranked by their Laplace evidence; those far below the best, or within one sd of a better one, are left
    out.
    """
    if density.dim > FULL_HESSIAN_UP_TO:
        return []
    modes = newton(density, points, most)
    roots, units = inverse_roots(density, modes)
    with torch.no_grad():
        evidence = density(modes) + torch.linalg.slogdet(roots).logabsdet
    evidence = torch.nan_to_num(evidence, nan=-torch.inf, posinf=-torch.inf)
    kept: list[int] = []
    for index in evidence.argsort(descending=True).tolist():
        if len(kept) == MODES or not float(evidence[index]) > float(evidence.max()) - DENSITY_GAP_OF_LOST:
            break
        apart = [torch.linalg.solve(roots[other], modes[index] - modes[other]).norm() for other in kept]
        if all(float(distance) > 1.0 for distance in apart):
            kept.append(index)
    gauss = 0.5 * density.dim * math.log(2.0 * math.pi)
    starts = []
    for rank, index in enumerate(kept):
        suffix = f" {rank + 1}" if rank else ""
        mode, root = modes[index], lower_triangular(roots[index])
        starts.append(Start(f"laplace{suffix}", mode, root, evidence=float(evidence[index]) + gauss))
        starts.append(Start(f"laplace diagonal{suffix}", mode, units[index]))
    return starts


def newton(density: LogDensity, points: Tensor, most: int = FEW_TICKS) -> Tensor:
    """Newton's method with the absolute eigenvalues of the Hessian, halved until the density rises, from each point.

    Affine-invariant near a mode, so that scales of 1e-6 and 1e6 side by side do no harm (L-BFGS does not converge there
    in raw coordinates); an ascent direction everywhere. Cost: for at most so many steps, a Hessian at each point.
    """
    halvings = 0.5 ** torch.arange(12, dtype=density.dtype, device=density.device)
    points = points.clone()
    heights, gradients = density.value_and_grad(points)
    open_ = torch.arange(len(points), device=points.device)
    for _ in range(most):
        roots, _ = inverse_roots(density, points[open_])
        steps = (roots @ (roots.mT @ gradients[open_, :, None])).squeeze(-1)
        tries = points[open_, None] + halvings[:, None] * steps[:, None]
        with torch.no_grad():
            found = density(tries.flatten(0, 1)).unflatten(0, tries.shape[:2])
        best, index = torch.nan_to_num(found, nan=-torch.inf, posinf=-torch.inf).max(1)
        rises = best > heights[open_]
        points[open_[rises]] = tries[rises, index[rises]]
        open_ = open_[rises & ((steps * gradients[open_]).sum(-1) > 1e-6)]  # nats that are left to gain
        if not len(open_):
            break
        heights[open_], gradients[open_] = density.value_and_grad(points[open_])
    return points
