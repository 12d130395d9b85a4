r"""Moves of many chains at once that leave the posterior as it is: Hamiltonian, independent, and changes of part.

All act on :class:`~pyro_flows.correction.latent.Points` and are tempered by :math:`\beta`: their target is
:math:`\pi_\beta \propto q_0^{1 - \beta}\, \pi^\beta` in latent space, the posterior at :math:`\beta = 1`.

References: Neal 2011, "MCMC using Hamiltonian dynamics" (arXiv 1206.1901); Hoffman et al. 2019, "NeuTra-lizing bad
geometry" (arXiv 1903.03704); Tierney 1994 (independence chains).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.correction.adaptation import Moved
from pyro_flows.correction.latent import Latent, Points
from pyro_flows.correction.metric import Metric

DIVERGED = 1000.0  # nats of energy error


def tempered(points: Points, beta: float) -> tuple[Tensor, Tensor]:
    """Return the log density (C,) of the tempered target and its gradient (C, D)."""
    if beta == 1.0:
        return points.log_pi, points.slope
    value = beta * points.log_pi + (1.0 - beta) * points.log_ref
    return value, beta * points.slope + (1.0 - beta) * points.ref_slope


@torch.no_grad()
def hamiltonian(latent: Latent, points: Points, *, step: float, leaps: int, metric: Metric, beta: float = 1.0) -> Moved:
    """Move all chains once, by ``leaps`` leapfrog steps of ``step`` in units of ``metric``; cost: a gradient a leap."""
    velocity = torch.randn_like(points.x)
    value, slope = tempered(points, beta)
    start = 0.5 * velocity.square().sum(1) - value
    new = points
    velocity = velocity + 0.5 * step * metric.back(slope)
    for leap in range(leaps):
        new = latent.look(new.x + step * metric.out(velocity), points.k)
        value, slope = tempered(new, beta)
        velocity = velocity + (0.5 if leap == leaps - 1 else 1.0) * step * metric.back(slope)
    end = 0.5 * velocity.square().sum(1) - value
    error = torch.where(torch.isfinite(end), end - start, torch.inf)
    chance = torch.exp(-error).clamp(max=1.0).nan_to_num(nan=0.0)
    accepted = torch.rand_like(chance) < chance
    return Moved(
        points=new.where(accepted, points),
        end=new.x,
        velocity=velocity,
        chance=chance,
        accepted=accepted,
        error=error,
        energy=torch.where(accepted, end, start),
        diverging=~(error < DIVERGED),
    )


@torch.no_grad()
def independent(latent: Latent, points: Points, *, beta: float = 1.0) -> tuple[Points, Tensor]:
    """Propose a draw of the flow or mixture to each chain; return the points and which were taken. Cost: a gradient."""
    new = latent.look(*latent.draw(len(points.x)))
    gain = beta * (new.log_weight - points.log_weight)
    taken = torch.rand_like(gain).log() < gain.nan_to_num(nan=-torch.inf)
    return new.where(taken, points), taken


@torch.no_grad()
def relabel(latent: Latent, points: Points) -> Points:
    """Draw the part of each chain anew, given z: a Gibbs step. Cost: an inverse pass, a gradient if any part changes.

    All points are looked at then: a graph is recorded for each number of points.
    """
    if latent.mixture is None:
        return points
    x, k = latent.place(points.z)
    changed = k != points.k
    if not bool(changed.any()):
        return points
    new = latent.look(torch.where(changed[:, None], x, points.x), k)
    return new.where(changed & torch.isfinite(new.log_pi), points)  # an inverse may overflow
