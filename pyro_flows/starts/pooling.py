"""The Gaussians of many paths as one proposal: the moments that its weighted draws tell."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows._seeding import derive, seeded
from pyro_flows.model.log_density import LogDensity
from pyro_flows.starts.gaussians import Gaussians
from pyro_flows.starts.pathfinder import cut_elbo
from pyro_flows.verdict.psis import psis

POOLED = 100
POOLED_WITHIN = 10.0  # nats


class Pool(NamedTuple):
    """A fresh look at K Gaussians: their ELBOs (K,), and mean (D,) and covariance (D, D) of weighted draws of all."""

    elbo: Tensor
    mean: Tensor
    covariance: Tensor
    k_hat: float
    ess: float


def pool(density: LogDensity, gaussians: Gaussians, *, seed: int) -> Pool:
    """Draw from all Gaussians, 100 each where that is affordable, and weight the draws by importance, with Pareto-smoothed weights.

    The proposal is the mixture of those within 10 nats of the best ELBO (all draws are scored under all of them), so
    that paths which found the same mode share it, and paths at different modes each get their due.
    """
    with seeded(derive(seed, "pool"), density.device):
        count = len(gaussians.loc)
        shape = (count, density.affordable(POOLED * count) // count, density.dim)
        noise = torch.randn(shape, dtype=density.dtype, device=density.device)
    z, log_q = gaussians.map(noise)
    with torch.no_grad():
        log_p = density(z.flatten(0, 1)).unflatten(0, shape[:2])
    elbo = cut_elbo(log_p - log_q)
    kept = elbo >= elbo.max() - POOLED_WITHIN
    z, log_p = z[kept].flatten(0, 1), log_p[kept].flatten()
    mixture = torch.logsumexp(Gaussians(*(part[kept] for part in gaussians)).log_prob(z), 0)
    log_weights, k_hat = psis(torch.nan_to_num(log_p - mixture, nan=-torch.inf, posinf=-torch.inf))
    weights = log_weights.exp().to(z.dtype)
    mean = weights @ z
    away = z - mean
    return Pool(elbo, mean, (weights[:, None] * away).mT @ away, k_hat, float(1.0 / weights.square().sum()))
