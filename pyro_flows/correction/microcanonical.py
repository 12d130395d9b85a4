r"""Metropolis-adjusted microcanonical moves of many chains, where there is more than one coordinate.

A velocity has length one and turns with the gradient of L = -log p,

.. math:: \dot x = u, \qquad \dot u = -(I - u u^T)\, \nabla L(x) / (D - 1).

Leapfrog steps conserve L plus a kinetic energy up to an error by which the end is accepted or not. Trajectories begin
with new directions. Here x moves by :math:`\epsilon \sqrt D u`, so that steps and lengths have the units of
Hamiltonian ones, whose velocities have length :math:`\sqrt D`, and the same adaptation finds both.

Reference: Robnik, Cohn-Gordon and Seljak 2025, "Metropolis adjusted microcanonical Hamiltonian Monte Carlo"
(arXiv 2503.01707).
"""

from __future__ import annotations

import math

import torch

from pyro_flows.correction.adaptation import Moved
from pyro_flows.correction.hmc import DIVERGED
from pyro_flows.correction.latent import Latent, Points
from pyro_flows.correction.leaps import leap, turned
from pyro_flows.correction.metric import Metric


@torch.no_grad()
def microcanonical(latent: Latent, points: Points, *, step: float, leaps: int, metric: Metric) -> Moved:
    """Move all chains once, by ``leaps`` steps of ``step`` in units of ``metric``; cost: a gradient a leap.

    At least two coordinates are needed. Half turns at the same point are made as one.
    """
    root = math.sqrt(points.x.shape[1])
    u = torch.randn_like(points.x)
    u = u / u.norm(dim=1, keepdim=True)
    new = points
    u, error = turned(u, metric.back(new.slope), 0.5 * step * root)
    for number in range(leaps):
        part = 0.5 if number == leaps - 1 else 1.0
        new, u, gained = leap(latent, new, u, metric, step * root, part * step * root)
        error = error + gained
    error = error + points.log_pi - new.log_pi
    error = torch.where(torch.isfinite(error), error, torch.inf)
    chance = torch.exp(-error).clamp(max=1.0).nan_to_num(nan=0.0)
    accepted = torch.rand_like(chance) < chance
    taken = new.where(accepted, points)
    return Moved(
        points=taken,
        end=new.x,
        velocity=root * u,
        chance=chance,
        accepted=accepted,
        error=error,
        energy=-taken.log_pi,
        diverging=~(error < DIVERGED),
    )
