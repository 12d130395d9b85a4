"""Where chains begin: at draws of the guide and at regions that it may miss."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.inference.chains.latent import Latent
from pyro_flows.inference.chains.sampler import Sampler
from pyro_flows.inference.modes.under_covered import HIGH, level_of, walked
from pyro_flows.inference.record import Record
from pyro_flows.inference.starts.prior import SEARCHES
from pyro_flows.inference.verdict.chains import McmcDraws
from pyro_flows.inference.verdict.weighing import resample
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.numbers import mixing
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import DENSITY_GAP_OF_WALKERS, R_HAT_OF_SHORT_CHAINS
from pyro_flows.transforms.linear import LowerTriangularAffine

PERIODS = (16, 16), (32, 64)  # sweeps until the start is forgotten, and sweeps that are compared: once, and again


class NoStart(ValueError):
    """There is no point at which a chain could begin."""


def _usable(z: Tensor, log_weights: Tensor) -> Tensor:
    """Return which draws z (S, D) are finite and have a density."""
    usable = torch.isfinite(log_weights) & torch.isfinite(z).all(1)
    if not bool(usable.any()):
        raise NoStart("no draw of the guide has a finite density")
    return usable


def starting_points(z: Tensor, log_weights: Tensor, count: int, *, seed: int) -> Tensor:
    """Resample ``count`` points (K, D) from draws z (S, D) by their log weights.

    Weights that count for fewer than 2 K draws are flattened by a power until they do: chains are to begin apart.

    Raises:
        NoStart: if no draw has a finite density.
    """
    usable = _usable(z, log_weights)
    z, log_weights = z[usable], log_weights[usable].double()
    power = 1.0
    while power > 1e-3 and _effective(power * log_weights) < min(2.0 * count, 0.5 * len(z)):
        power *= 0.8
    flattened = torch.log_softmax(power * log_weights, 0)
    return z[resample(flattened, count, seed=seed)]


def dispersed_points(latent: Latent, z: Tensor, log_weights: Tensor, count: int, *, seed: int) -> Tensor:
    """Return ``count`` points (K, D) for chains to begin at: draws, and as many that were drawn out of where they lie.

    R-hat shows that a flow misses a region only if some chains begin there. See ``modes/under_covered.py``; the second
    walk, with a lower height, lets points go back from regions of little mass. Cost: 10,000 gradients.

    In a mixture of many parts, all are draws.

    Raises:
        NoStart: if no draw has a finite density.
    """
    if not latent.walkable:
        return starting_points(z, log_weights, count, seed=seed)
    inside = starting_points(z, log_weights, count - count // 2, seed=seed)
    begun = starting_points(z, log_weights, 64, seed=derive(seed, "walkers"))
    with seeded(derive(seed, "dispersed"), latent.density.device):
        points = latent.look(*latent.place(begun))
        points = walked(latent, points, 4, level=0.0)  # under the posterior at first
        level = level_of(points)
        for height in (HIGH, DENSITY_GAP_OF_WALKERS):
            points = walked(latent, points, 12, level=level, height=height)
        usable = torch.isfinite(points.log_pi).nonzero()[:, 0]
        chosen = usable[torch.randperm(len(usable), device=usable.device)[: count // 2]]
    return torch.cat([inside, points.z[chosen], begun[: count // 2 - len(chosen)]])


def can_be_resumed(chains: McmcDraws) -> bool:
    """Whether a sampler can go on with chains: not with those of another one."""
    return "kernel" in chains.numbers


def _effective(log_weights: Tensor) -> float:
    weights = torch.softmax(log_weights, 0)
    return float(1.0 / weights.square().sum())


def affine_flow(z: Tensor, log_weights: Tensor) -> Flow:
    """Return the affine flow with the mean and the covariance of weighted draws (S, D), to move in without a flow.

    Raises:
        NoStart: if no draw has a finite density.
    """
    points = z[_usable(z, log_weights)].double()
    spread = points.std(0).clamp_min(torch.finfo(points.dtype).tiny ** 0.5)
    covariance = torch.cov((points / spread).mT).reshape(len(spread), len(spread))
    ridge = 1e-8 * torch.eye(len(spread), dtype=points.dtype, device=points.device)  # of variances, which are 1 here
    root, fault = torch.linalg.cholesky_ex(covariance + ridge)
    root = torch.diag(torch.ones_like(spread)) if int(fault) else root
    affine = LowerTriangularAffine(len(spread), loc=points.mean(0), scale_tril=spread[:, None] * root)
    return Flow(affine.to(z), base="student_t", df=15.0)


def flow_of(posterior: Record) -> Flow | FlowMixture:
    """Return the guide's flow or mixture; an affine one with the moments of the draws, if the guide is none."""
    if posterior.flow is not None and getattr(posterior.flow, "base", "student_t") != "uniform":
        return posterior.flow
    return affine_flow(posterior.z, posterior.log_weights)


@torch.no_grad()
def mixes_with_others(sampler: Sampler, places: Tensor) -> bool:
    r"""Whether chains from the best eight places (N, D) agree with those of a sampler, in the same space and kernel.

    A place that chains leave within a hundred sweeps exchanges draws with the rest as often as its mass asks for, since
    the kernel is reversible. So chains that are much longer, and have converged, have visited it if it has a mass.
    If a posterior has thousands of modes, the share of a single one could not show that. R-hat compares chains from
    the places with each other and with the earlier draws, by each coordinate and the log density. Chains that are where
    the others are after few sweeps need no more of them.
    """
    density = sampler.latent.density
    best = places[density(places).topk(min(SEARCHES, len(places))).indices]
    many = len(sampler.points.x)  # chains as the sampler has, whose graphs are there already
    group = torch.arange(many) * len(best) // many
    z = best[group.to(best.device)]
    x, k = sampler.latent.place(z)
    before = sampler.chains()
    state = {**before.state, "x": x, "k": k, "began": k, "superchain": group}
    numbers = {**before.numbers, "thin": 1}
    chains = replace(before, z=z[:, None][:, :0], stats={}, state=state, numbers=numbers)
    new = Sampler(sampler.latent, sampler.names, chains, kept=1, seed=derive(sampler.seed, "joining"))
    old = _with_height(density, before.z.flatten(0, 1))
    generator = torch.Generator().manual_seed(derive(sampler.seed, "compared draws"))
    order = torch.randperm(len(old), generator=generator).to(old.device)
    for forgotten, compared in PERIODS:
        new.more(forgotten)
        drawn = new.more(compared)
        shortest = min(compared * int(torch.bincount(group).min()), len(old))
        groups = [drawn[(group == number).to(drawn.device)].flatten(0, 1)[:shortest] for number in range(len(best))]
        compared_with = [_with_height(density, part) for part in groups] + [old[order[:shortest]]]
        if float(mixing.r_hat(torch.stack(compared_with)).max()) <= R_HAT_OF_SHORT_CHAINS:
            return True
    return False


def _with_height(density: LogDensity, z: Tensor) -> Tensor:
    return torch.cat([z, density(z)[:, None]], 1)
