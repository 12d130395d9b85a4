r"""A start moved to the weighted moments of its own draws, without gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flows._seeding import derive, seeded
from pyro_flows.model.log_density import LogDensity
from pyro_flows.starts.start import Start
from pyro_flows.verdict.deciding import JUDGED_DRAWS, LOOKED_AT_DRAWS
from pyro_flows.verdict.thresholds import ESS_SHARE_EVEN, ESS_SHARE_LEAST, EVIDENCE_GAP_NEGLIGIBLE, K_HAT_MOST
from pyro_flows.verdict.weighing import Weighing, weigh

NAME = "matched moments"


@torch.no_grad()
def matched(density: LogDensity, start: Start, df: float, *, seed: int, draws: int = JUDGED_DRAWS) -> Start:
    r"""Return the start with the weighted mean and covariance of its own draws; the same start if weights are too poor.

    Draws z_i come from a Student-t distribution with the start's location and covariance. With normalized weights
    :math:`w_i \propto p(z_i) / q(z_i)`,

    .. math:: m = \sum_i w_i z_i, \qquad C = \sum_i w_i (z_i - m)(z_i - m)^\top,

    each with the same sum of even weights as a control variate, since its expectation is known. Its coefficient is the
    effective share of the draws: nearly 1 where weights are nearly even, so that the draws' own noise is gone.

    The noise of C costs about :math:`D (D + 3) / (4\, \mathrm{ESS})` nats. Where that is too much, only its diagonal
    is matched, and the correlations of the start stay. Then changes of means and sds are shrunk by what is likely to be
    noise in them, and a start whose weights are even stays as it is.

    Cost: 4000 draws of the density, no gradients. Only if their weights are good, and the new start has the better
    ELBO, does a second round of ``draws`` follow.

    Reference: Cappé, Douc, Guillin, Marin and Robert 2008, "Adaptive importance sampling in general mixture classes"
    (arXiv 0710.4242), with one component.
    """
    for number in range(2):
        count = density.affordable(draws if number else LOOKED_AT_DRAWS)
        with density.clock.watching():
            noise, log_noise = _noise(density, df, count, seed=derive(seed, f"matching {number}"))
            z = start.map(noise)
        weighing = weigh(z, density(z), log_noise - start.volume)
        if not tells_moments(weighing):
            return start
        start = replace(moved(start, z, weighing), elbo=max(start.elbo, weighing.elbo))
    return start


def tells_moments(weighing: Weighing) -> bool:
    """Whether weights are good enough to tell moments, and uneven enough to tell others than those of the draws."""
    share = weighing.ess / len(weighing.log_weights)
    return weighing.k_hat < K_HAT_MOST and ESS_SHARE_LEAST < share <= ESS_SHARE_EVEN


def _noise(density: LogDensity, df: float, draws: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Draw Student-t noise (S, D) of variance 1, and its log densities (S,)."""
    unit = torch.full((density.dim,), math.sqrt((df - 2.0) / df), dtype=density.dtype, device=density.device)
    base = dist.StudentT(df, torch.zeros_like(unit), unit).to_event(1)
    with seeded(seed, density.device):
        noise = base.sample((draws,))
    return noise, base.log_prob(noise)


def moved(start: Start, z: Tensor, weighing: Weighing) -> Start:
    """Return the start at the weighted moments of draws z (S, D)."""
    share, weights = weighing.ess / len(z), weighing.log_weights.exp()
    more = (weights - share / len(z)).to(z)
    mean = start.loc + more @ (z - start.loc)
    away, moved, root = z - mean, start.loc - mean, start.scale
    known = (root @ root.mT if root.dim() == 2 else root.square().diag()) + torch.outer(moved, moved)
    covariance = share * known + (more[:, None] * away).mT @ away
    dim = z.shape[1]
    if dim * (dim + 3.0) / 4.0 < EVIDENCE_GAP_NEGLIGIBLE * weighing.ess:
        root, fault = torch.linalg.cholesky_ex(covariance)
        if not int(fault):
            return replace(start, name=NAME, loc=mean, scale=root, evidence=None)
    spread = start.sds
    variances = covariance.diagonal().clamp_min(0.0)
    mean = start.loc + spread * _shrunk((mean - start.loc) / spread, 1.0 / weighing.ess)
    ratio = _shrunk((variances.sqrt() / spread).log(), 0.5 / weighing.ess).exp()
    scale = ratio[:, None] * start.scale if start.scale.dim() == 2 else ratio * start.scale
    return replace(start, name=NAME, loc=mean, scale=scale, evidence=None)


def _shrunk(change: Tensor, variance: float) -> Tensor:
    """Shrink estimated changes (D,) of a given variance towards 0, those most that are within their standard error."""
    return change * (1.0 - variance / change.square()).clamp_min(0.0)
