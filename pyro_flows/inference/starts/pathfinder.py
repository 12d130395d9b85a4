r"""Pathfinder: many L-BFGS paths at once up a log density, and the best Gaussian met along each of them.

A path comes by the bulk of the mass before it ends at a mode, or runs off to where the density grows without bound.
Each of its points z carries a Gaussian, from the inverse Hessian that L-BFGS has built up by then,

.. math:: N\big(z + \Sigma \nabla \log p(z),\ \Sigma\big), \qquad
          \Sigma = \operatorname{diag}(\alpha) + B\, \Gamma B^\top,

with B of as many columns as there are vectors in the history. The one with the best ELBO is kept.

Reference: Zhang, Carpenter, Gelman and Vehtari 2022, "Pathfinder: Parallel quasi-Newton variational inference".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.inference.starts.climb import TICKS, Climb, Met
from pyro_flows.inference.starts.gaussians import CLOSE, Gaussians
from pyro_flows.inference.verdict.psis import psis
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.stack import Stack
from pyro_flows.support.process.seeding import derive, seeded

DRAWS = 10  # of a Gaussian on the way; ten times as many of the best one of each path


@dataclass(frozen=True)
class Paths:
    """What K paths found: the best Gaussian on each, its ELBO (K,), where they ended (K, D), and whether at rest."""

    best: Gaussians
    elbo: Tensor
    ends: Tensor
    settled: Tensor

    @classmethod
    def at(cls, modes: Tensor, roots: Tensor, evidence: Tensor) -> Paths:
        """Return normals about modes (K, D), by lower triangular roots of covariances, as if paths had ended there."""
        settled = torch.ones(len(modes), dtype=torch.bool, device=modes.device)
        return cls(Gaussians.of(modes, roots), evidence, modes, settled)

    def some(self, rows: slice) -> Paths:
        return Paths(self.best.some(rows), self.elbo[rows], self.ends[rows], self.settled[rows])


def pathfinder(density: LogDensity | Stack, points: Tensor, units: Tensor, *, seed: int, own: int = 0) -> Paths:
    r"""Climb from each point (K, D) by L-BFGS, all paths side by side; return the best Gaussian along each.

    Coordinates are measured in ``units``, for each path a lower triangular matrix (K, D, D) or a diagonal (K, D), so
    that scales of 1e-6 and 1e6 are on a par. The diagonal :math:`\alpha` follows the curvature from there. A tick of
    the loop takes one gradient for each path: a step that rises as its slope promises is taken, any other is shortened
    and tried again. No path goes where the density or its gradient is not finite; one has settled where it sees less
    than 1e-8 nats to be gained. Where the first ``own`` points are draws of a guide, paths that are still below the
    highest of these, or below the highest top that paths from there came to, go on for up to three hundred ticks: one
    that is under way tells nothing.

    ELBOs come from ten draws, or fewer where a density writes many numbers, with the same noise at each point; where
    the density vanishes for some of them, it is that of the Gaussian cut to the rest, and where it vanishes for all of
    them, -inf. Paths of many data sets climb together on a :class:`Stack`, as many for each, one data set after the
    other. Cost: at most 101 K gradients, 300 more for each path that is still under way, and ten densities for each
    step.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> density = pf.LogDensity(lambda: pyro.sample("x", dist.Normal(torch.tensor(3.0), 2.0)))
    >>> found = pathfinder(density, torch.zeros(1, 1), torch.ones(1, 1), seed=0)
    >>> print(f"{found.best.loc.item():.2f} {found.best.scale().item():.2f}")
    3.00 2.00
    """
    count = DRAWS
    if isinstance(density, LogDensity) and len(points):
        count = max(density.affordable(DRAWS * len(points)) // len(points), 1)
    with seeded(derive(seed, "pathfinder"), density.device):
        noise = torch.randn(count, density.dim, dtype=density.dtype, device=density.device)
    climb = Climb(density, points, units)
    drawn = climb.height[:own].clone()
    found = [climb.gaussians(torch.ones_like(climb.over))]
    best, elbo = found[0].gaussians, torch.full_like(climb.height, -torch.inf)
    for tick in range(1, 4 * TICKS + 1):  # after the first quarter, those that are still low
        found.append(climb.gaussians(climb.tick()))
        if tick % (TICKS // 4) == 0:
            climb.end_stalled(climb.known(drawn) if tick >= TICKS else None)
        done = tick == 4 * TICKS or bool(climb.over.all())
        if done or len(found) == 10:  # scored together
            best, elbo = _best(density, noise, found, best, elbo)
            found = []
        if done:
            break
    return Paths(best, elbo, climb.points, climb.settled)


def _best(
    density: LogDensity | Stack, noise: Tensor, found: Sequence[Met], best: Gaussians, elbo: Tensor
) -> tuple[Gaussians, Tensor]:
    """Score a few ticks at once, and keep the best of them and of what there was, for each path."""
    found = [met for met in found if bool(met.moved.any())]
    if not found:
        return best, elbo
    z, log_q = zip(*(met.gaussians.map(noise) for met in found), strict=True)
    for met, log_p, log_g in zip(found, _heights(density, z), log_q, strict=True):
        score = torch.where(met.moved, cut_elbo(log_p - log_g), -torch.inf)
        better = score > elbo[met.paths]
        chosen = met.paths[better]
        elbo = elbo.index_copy(0, chosen, score[better])
        new = met.gaussians.some(better)
        best = Gaussians(*(mine.index_copy(0, chosen, other) for mine, other in zip(best, new, strict=True)))
    return best, elbo


@torch.no_grad()
def _heights(density: LogDensity | Stack, z: Sequence[Tensor]) -> list[Tensor]:
    """Return the log density (K, S) at the draws (K, S, D) of each tick."""
    if isinstance(density, Stack):  # whose points stand in groups, one for each data set
        all_ = torch.stack(list(z))
        found = density(all_.transpose(0, 1).flatten(0, 2)).reshape(all_.shape[1], len(z), -1)
        return list(found.unbind(1))
    sizes = [len(part) for part in z]
    return list(density(torch.cat(list(z)).flatten(0, 1)).unflatten(0, (-1, z[0].shape[1])).split(sizes))


def cut_elbo(terms: Tensor) -> Tensor:
    """ELBO (K,) of Gaussians cut to where the density is positive, from log p - log q (K, S)."""
    finite = torch.isfinite(terms)
    count = finite.sum(-1)
    mean = torch.where(finite, terms, 0.0).sum(-1) / count
    return torch.where(count > 0, mean + (count / terms.shape[-1]).log(), -torch.inf)


class Pool(NamedTuple):
    """A fresh look at K Gaussians: their ELBOs (K,), and mean (D,) and covariance (D, D) of weighted draws of all."""

    elbo: Tensor
    mean: Tensor
    covariance: Tensor
    k_hat: float
    ess: float


def pool(density: LogDensity, gaussians: Gaussians, *, seed: int) -> Pool:
    """Draw from all Gaussians, 100 each where that is affordable; weight the draws, with Pareto-smoothed weights.

    The proposal is the mixture of those within 10 nats of the best ELBO (all draws are scored under all of them), so
    that paths which found the same mode share it, and paths at different modes each get their due.
    """
    with seeded(derive(seed, "pool"), density.device):
        count = len(gaussians.loc)
        shape = (count, density.affordable(10 * DRAWS * count) // count, density.dim)
        noise = torch.randn(shape, dtype=density.dtype, device=density.device)
    z, log_q = gaussians.map(noise)
    with torch.no_grad():
        log_p = density(z.flatten(0, 1)).unflatten(0, shape[:2])
    elbo = cut_elbo(log_p - log_q)
    kept = elbo >= elbo.max() - CLOSE
    z, log_p = z[kept].flatten(0, 1), log_p[kept].flatten()
    mixture = torch.logsumexp(gaussians.some(kept).log_prob(z), 0)
    log_weights, k_hat = psis(torch.nan_to_num(log_p - mixture, nan=-torch.inf, posinf=-torch.inf))
    weights = log_weights.exp().to(z.dtype)
    mean = weights @ z
    away = z - mean
    return Pool(elbo, mean, (weights[:, None] * away).mT @ away, k_hat, float(1.0 / weights.square().sum()))
