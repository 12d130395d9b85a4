r"""Hyperparameters: coordinates given which all others have an exactly normal distribution.

In a latent Gaussian model the log density is quadratic in all coordinates but a few, :math:`\theta`: scales, and
slopes of what is latent itself. Then the Hessian over the others does not depend on them. So the others are moved at
random, and a coordinate whose row of the Hessian changes most is held, until nothing changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.model.log_density import LogDensity
from pyro_flows.starts.curvature import FULL_HESSIAN_UP_TO, second_derivatives

MOST_HELD = 6
MOST_NUMBERS = 3e7  # that are written for one Hessian
MOVES = 3  # at random, from each point
MOVED = 0.5  # spreads
SAME = {torch.float64: 1e-7, torch.float32: 3e-3}  # change of an entry of a Hessian of units, that is none


def can_have_conditionals(density: LogDensity) -> bool:
    """Whether a hundred Hessians can be had."""
    cheap = density.dim * density.written <= MOST_NUMBERS
    return density.batched and 2 < density.dim <= FULL_HESSIAN_UP_TO and density.dtype in SAME and cheap


@torch.no_grad()
def hyperparameters_of(density: LogDensity, points: Tensor) -> list[int]:
    """Return the coordinates to hold, rising; none if there are more than a few, or if all others are not normal.

    Args:
        density: of few enough numbers for Hessians, see :func:`can_have_conditionals`.
        points: (N, D), near which the others are moved; randomness is torch's global one.

    Cost: up to 14 times 4 N Hessians.
    """
    before = -second_derivatives(density, points, exact=True).double()
    if not bool(torch.isfinite(before).all()):
        return []
    units = before.diagonal(dim1=1, dim2=2).abs().sqrt()
    units = torch.maximum(units, 1e-6 * units.amax(1, keepdim=True))
    held = list[int]()
    while True:
        change = _change(density, points, before, units, held)
        if float(change.max()) <= SAME[density.dtype]:
            break
        held.append(int(change.square().sum(1).argmax()))
        if len(held) > MOST_HELD or len(held) > density.dim - 2:
            return []
    for one in held[:-1]:
        fewer = [number for number in held if number != one]
        if float(_change(density, points, before, units, fewer).max()) <= SAME[density.dtype]:
            held = fewer
    return sorted(held)


def _change(density: LogDensity, points: Tensor, before: Tensor, units: Tensor, held: list[int]) -> Tensor:
    """Return the largest change (D, D) of entries of Hessians in units, with others than those held moved at random.

    It is infinite where a Hessian is not finite.
    """
    noise = torch.randn(MOVES, *points.shape, dtype=torch.float64, device=points.device)
    noise[..., held] = 0.0
    moved = points + (MOVED * noise / units.clamp_min(1e-3)).to(points)
    after = -second_derivatives(density, moved.flatten(0, 1), exact=True).double().unflatten(0, moved.shape[:2])
    change = (after - before).abs() / (units[:, :, None] * units[:, None, :])
    change = change.nan_to_num(nan=torch.inf).amax((0, 1))
    change[held] = 0.0
    change[:, held] = 0.0
    return change
