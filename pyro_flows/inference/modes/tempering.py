r"""Hamiltonian moves: the mass of a region by tempering from a normal distribution, and walks from a guide's draws.

Points are drawn from the normal g and carried through the densities :math:`g^{1-\beta} p^{\beta}`, :math:`\beta` from 0
to 1, by short Hamiltonian moves in the normal's own coordinates. The product of the ratios along the way has the
region's mass as its mean. Points stay in a region that steep walls or wide valleys surround, so that only its mass is
counted.

Reference: Neal 2001, "Annealed importance sampling" (arXiv physics/9803008).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.inference.starts.gaussians import Gaussians
from pyro_flows.inference.starts.prior import in_units
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.stack import Stack
from pyro_flows.support.process.seeding import seeded

POINTS = 48  # for each normal
TEMPERATURES = 40
LEAPS = 5
WALKER_MOVES = 24


class Tempered(NamedTuple):
    """Where the points of K normals came to, (K, S, D), with log p there and their log weights (K, S)."""

    ends: Tensor
    log_p: Tensor
    log_weights: Tensor


@torch.no_grad()
def temper(
    density: LogDensity | Stack, gaussians: Gaussians, *, seed: int, temperatures: int = TEMPERATURES
) -> Tempered:  # fmt: skip
    """Carry points from each of K normals to the density. Cost: 48 x 5 gradients for each and each temperature."""
    count, dim = gaussians.loc.shape
    with seeded(seed, density.device):
        noise = torch.randn(count, POINTS, dim, dtype=density.dtype, device=density.device)
        walk = _Walk(density, gaussians, noise)
        for number in range(temperatures):
            walk.heat((number + 1) / temperatures)
    return Tempered(gaussians.map(walk.x)[0], walk.log_p, walk.log_weights)


@torch.no_grad()
def move_walkers(density: LogDensity | Stack, z: Tensor, units: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Move points (K, S, D) of K data sets under the density itself; return where they come to and log p there (K, S).

    Draws of the density stay draws of it. Draws of a guide that lacks a region next to where it lies go on into it: the
    neck of a funnel, a tail. Leaps are from a hundredth of ``units`` (sds (K, D), or lower triangular matrices) to all
    of them, since necks are narrow. Cost: 120 S gradients for each data set.
    """
    frame = Gaussians.of(z.new_zeros(len(z), z.shape[2]), units)
    with seeded(seed, density.device):
        walk = _Walk(density, frame, in_units(z, units))
        walk.beta = 1.0
        for _ in range(WALKER_MOVES):
            walk.step = 10.0 ** (-2.0 * torch.rand_like(walk.log_p))[..., None]
            walk.move()
    return frame.map(walk.x)[0], walk.log_p


class _Walk:
    """Points x (K, S, D) in the coordinates of their normals, with the gradients of log p and log g there."""

    def __init__(self, density: LogDensity | Stack, gaussians: Gaussians, x: Tensor) -> None:
        self.density, self.gaussians, self.x = density, gaussians, x
        self.log_weights = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device)
        self.beta = 0.0
        self.step = x.new_full((len(x), 1, 1), 0.3)  # in sds of the normals
        self.log_p, self.log_g, self.slope = self._evaluate(x)

    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p and log g of the images (K, S), and the gradient of log p with respect to x."""
        z, log_g = self.gaussians.map(x)
        value, grad = self.density.value_and_grad(z.flatten(0, 1))
        value, grad = value.unflatten(0, x.shape[:2]), grad.unflatten(0, x.shape[:2])
        value = torch.where(torch.isfinite(value) & torch.isfinite(grad).all(-1), value, -torch.inf)
        return value, log_g, self.gaussians.pull(torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0))

    def heat(self, beta: float) -> None:
        """Weight the points for a higher beta, and move them once there, so that three moves of four are accepted."""
        self.log_weights += (beta - self.beta) * (self.log_p - self.log_g).double()
        self.beta = beta
        accepted = self.move()
        self.step = self.step * torch.where(accepted.mean(1)[:, None, None] > 0.75, 1.15, 0.8)

    def move(self) -> Tensor:
        """Move all points once by Hamiltonian dynamics; return which moves were accepted (K, S)."""
        momentum = torch.randn_like(self.x)
        start = self._energy(self.log_p, self.log_g, momentum)
        x, state = self.x, (self.log_p, self.log_g, self.slope)
        for _ in range(LEAPS):
            momentum = momentum + 0.5 * self.step * self._force(x, state[2])
            x = x + self.step * momentum
            state = self._evaluate(x)
            momentum = momentum + 0.5 * self.step * self._force(x, state[2])
        chance = (start - self._energy(state[0], state[1], momentum)).nan_to_num(nan=-torch.inf).exp()
        taken = torch.rand_like(chance) < chance
        self.x = torch.where(taken[..., None], x, self.x)
        self.log_p, self.log_g = (
            torch.where(taken, new, old) for new, old in zip(state, (self.log_p, self.log_g), strict=False)
        )
        self.slope = torch.where(taken[..., None], state[2], self.slope)
        return taken.to(self.x.dtype)

    def _force(self, x: Tensor, slope: Tensor) -> Tensor:
        return self.beta * slope - (1.0 - self.beta) * x

    def _energy(self, log_p: Tensor, log_g: Tensor, momentum: Tensor) -> Tensor:
        return -(self.beta * log_p + (1.0 - self.beta) * log_g) + 0.5 * momentum.square().sum(-1)
