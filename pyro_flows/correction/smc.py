r"""Annealing from the flow to the posterior: weighted particles, adaptive temperatures, local moves, and the evidence.

Particles are drawn from the flow or mixture q and go through :math:`q^{1-\beta} p^{\beta}`. Each step takes
:math:`\beta` as far as weights keep a given share of the effective particles; then they are resampled, and moved until
they have forgotten where they came from. The product of the mean weights is an unbiased estimate of the evidence.
Several populations side by side give its standard error.

Reference: Del Moral, Doucet and Jasra 2006, "Sequential Monte Carlo samplers".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_flows._seeding import derive
from pyro_flows.correction.adaptation import Kernel, Metric, scale_of
from pyro_flows.correction.hmc import hamiltonian, independent, relabel
from pyro_flows.correction.latent import Latent
from pyro_flows.modes.under_covered import Points

POPULATIONS = 8
KEEP = 0.7  # of the effective particles, at each step


@dataclass
class Annealed:
    """Equally weighted particles (P,), their log evidence and its error in nats, and each beta, 1 the last."""

    points: Points
    log_evidence: float = math.nan
    standard_error: float = math.nan
    temperatures: list[float] = field(default_factory=list)


@torch.no_grad()
def anneal(latent: Latent, particles: int, *, seed: int, report: Callable[[str], None] = lambda text: None) -> Annealed:
    """Anneal ``particles`` in 8 populations, which share temperatures and the kernel.

    Cost: about ten gradients for each particle and temperature.
    """
    torch.manual_seed(derive(seed, "annealing"))
    found = Annealed(latent.look(*latent.draw(particles)))
    log_sums = torch.zeros(POPULATIONS, dtype=torch.float64, device=found.points.x.device)
    kernel, beta, number = Kernel.start(latent.dim), 0.0, 0
    metric = Metric.of(torch.ones_like(found.points.x[0]))
    while beta < 1.0 and len(found.temperatures) < 200:  # at most
        ahead = _next(found.points.log_weight.double(), beta)
        increments = ((ahead - beta) * found.points.log_weight.double()).nan_to_num(nan=-math.inf)
        parts = increments.reshape(POPULATIONS, -1)
        log_sums += torch.logsumexp(parts, 1) - math.log(parts.shape[1])
        beta = ahead
        found.temperatures.append(beta)
        report(f"temperature {beta:.3g}")
        found.points = _resampled(found.points, parts)
        for _ in range(12 if beta == 1.0 else 4):  # more moves at the last temperature
            found.points = _moved(latent, found.points, kernel, metric, beta, number)
            number += 1
        metric = Metric.of(scale_of(found.points.x))
    if beta == 1.0:
        found.log_evidence = float(torch.logsumexp(log_sums, 0)) - math.log(POPULATIONS)
        ratios = (log_sums - found.log_evidence).exp()
        found.standard_error = float(ratios.std() / math.sqrt(POPULATIONS))
    return found


def _next(log_weights: Tensor, beta: float) -> float:
    """Return the next temperature: the farthest at which weights keep their share of the effective particles."""

    def share(ahead: float) -> float:
        weights = torch.softmax(((ahead - beta) * log_weights).nan_to_num(nan=-math.inf), 0)
        return float(1.0 / (weights.square().sum() * len(weights)))

    if share(1.0) >= KEEP:
        return 1.0
    low, high = beta, 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) >= KEEP else (low, middle)
        if high - low < 0.1 * (low - beta):  # the last digits do not matter
            break
    return max(low, beta + 1e-6)


def _resampled(points: Points, increments: Tensor) -> Points:
    """Resample each population (rows of ``increments``) systematically by its weights."""
    size = increments.shape[1]
    chosen = []
    for number, row in enumerate(increments):
        cumulative = torch.softmax(row, 0).cumsum(0)
        offset = torch.rand((), dtype=row.dtype, device=row.device)
        places = (torch.arange(size, dtype=row.dtype, device=row.device) + offset) / size
        index = torch.searchsorted(cumulative, places * cumulative[-1]).clamp_max(size - 1)
        chosen.append(number * size + index)
    index = torch.cat(chosen)
    return Points(*(part[index] for part in points))


def _moved(latent: Latent, points: Points, kernel: Kernel, metric: Metric, beta: float, number: int) -> Points:
    """Move all particles once, by each kind of move; the step size follows."""
    points, _ = independent(latent, points, beta=beta)
    points = relabel(latent, points)
    moved = hamiltonian(latent, points, step=kernel.step, leaps=kernel.leaps(number), metric=metric, beta=beta)
    kernel.adapt(points, moved, metric, number)
    return moved.points
