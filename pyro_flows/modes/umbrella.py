r"""Walks in the latent space of a guide that are drawn to where the guide is too thin.

A region that holds a few percent of the mass, and where a flow has next to nothing, is entered seldom: in the flow's
latent space it is far away, and the way to it is narrow. Weights know nothing of it, and so do chains that begin at the
guide's draws. The excess :math:`\ell(x) = \log p(z) - \log q(z) - c` grows along the way. So points move under

.. math:: \pi_h(x) \propto \pi(x)\, \big(e^{-\ell(x)} + e^{-h}\big)^{-1},

which is the posterior :math:`\pi` times its excess over the guide, up to a factor :math:`e^h`. A region with a share m
of the mass gets up to :math:`e^h m` times as much as it had, so that what is negligible stays so. After that, points
move under :math:`\pi` itself. Where the region has no mass, they leave it; where it has, they tell how much.

Reference: Torrie and Valleau 1977, "Nonphysical sampling distributions in Monte Carlo free-energy estimation: umbrella
sampling" (doi 10.1016/0021-9991(77)90121-8), here with the log weight as the coordinate.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

LEAPS = 5
DECADES = 1.5  # by which leaps differ: the way in is narrow
HIGH = 5.0  # nats of excess, up to which points are drawn outwards


class Point(Protocol):
    """C points of a latent space, and what is known there."""

    @property
    def x(self) -> Tensor: ...
    @property
    def k(self) -> Tensor: ...
    @property
    def z(self) -> Tensor: ...
    @property
    def log_pi(self) -> Tensor: ...
    @property
    def slope(self) -> Tensor: ...
    @property
    def ref_slope(self) -> Tensor: ...
    @property
    def log_weight(self) -> Tensor: ...
    def where(self, taken: Tensor, other: Any) -> Any: ...


class Space(Protocol):
    """The latent space of a guide, with the posterior as its target; ``dear`` if a look at a point takes long."""

    @property
    def dear(self) -> bool: ...
    def place(self, z: Tensor) -> tuple[Tensor, Tensor]: ...
    def look(self, x: Tensor, k: Tensor) -> Any: ...


@torch.no_grad()
def walked(space: Space, points: Point, moves: int, *, level: float, height: float | None = None) -> Point:
    r"""Move points by Hamiltonian dynamics under :math:`\pi_h`, or under the posterior itself.

    Args:
        space: that they move in.
        points: C of them.
        moves: of each.
        level: the log weight c that the excess is counted from.
        height: h; None for the posterior.

    Cost: five gradients for each move of a point. Random numbers come from torch's global generator.
    """
    for _ in range(moves):
        points = _moved(space, points, level, height)
    return points


def excess(points: Point, level: float) -> Tensor:
    """Return log p - log q - c (C,), very low where that is not finite."""
    return (points.log_weight - level).nan_to_num(nan=-1e6, posinf=1e6, neginf=-1e6)


def _moved(space: Space, points: Point, level: float, height: float | None) -> Point:
    """Move all points once, each with a step size of its own."""
    velocity = torch.randn_like(points.x)
    value, slope = _target(points, level, height)
    start = 0.5 * velocity.square().sum(1) - value
    step = 10.0 ** (-DECADES * torch.rand_like(velocity[:, :1])) * points.x.shape[1] ** -0.25
    new = points
    for _ in range(LEAPS):
        velocity = velocity + 0.5 * step * slope
        new = space.look(new.x + step * velocity, points.k)
        value, slope = _target(new, level, height)
        velocity = velocity + 0.5 * step * slope
    chance = (start - 0.5 * velocity.square().sum(1) + value).nan_to_num(nan=-math.inf).exp()
    found: Point = new.where(torch.rand_like(chance) < chance, points)
    return found


def _target(points: Point, level: float, height: float | None) -> tuple[Tensor, Tensor]:
    """Return the log density (C,) that points move under, and its gradient (C, D)."""
    if height is None:
        return points.log_pi, points.slope
    over = excess(points, level)
    drawn = -torch.logaddexp(-over, torch.full_like(over, -height))
    share = torch.sigmoid(height - over)[:, None]  # of the pull outwards that is left
    value = torch.where(torch.isfinite(points.log_pi), points.log_pi + drawn, -math.inf)
    return value, points.slope + share * (points.slope - points.ref_slope)
