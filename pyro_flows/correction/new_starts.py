"""Whether chains from new starts mix with the others: starts at places that these seem to miss."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_flows import _mixing
from pyro_flows._seeding import derive
from pyro_flows.correction.sampler import Sampler
from pyro_flows.model.log_density import LogDensity
from pyro_flows.verdict.thresholds import R_HAT_OF_SHORT_CHAINS

PLACES = 8  # each with as many chains
PERIODS = (16, 16), (32, 64)  # sweeps until the start is forgotten, and sweeps that are compared: once, and again


@torch.no_grad()
def mixes_with_others(sampler: Sampler, places: Tensor) -> bool:
    r"""Whether chains from the best of some places (N, D) agree with those of a sampler, in the same space and kernel.

    A place that chains leave within a hundred sweeps exchanges draws with the rest as often as its mass asks for, since
    the kernel is reversible. So chains that are much longer, and have converged, have visited it if it has a mass.
    Where a posterior has thousands of modes, no share of a single one could tell that. R-hat compares chains from
    the places with each other and with the earlier draws, by each coordinate and the log density. Chains that are where
    the others are after few sweeps need no more of them.
    """
    density = sampler.latent.density
    best = places[density(places).topk(min(PLACES, len(places))).indices]
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
        if float(_mixing.r_hat(torch.stack(compared_with)).max()) <= R_HAT_OF_SHORT_CHAINS:
            return True
    return False


def _with_height(density: LogDensity, z: Tensor) -> Tensor:
    return torch.cat([z, density(z)[:, None]], 1)
