"""Whether chains that begin at places that others seem to lack come to the same distribution as these."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_flows import _mixing
from pyro_flows._seeding import derive
from pyro_flows.correction.sampler import SUBCHAINS, Sampler
from pyro_flows.model.log_density import LogDensity
from pyro_flows.verdict.chains import AGREEMENT

PLACES = 8  # each with a superchain
FORGOTTEN, COMPARED = 64, 64  # sweeps until the start is forgotten, and sweeps whose draws are compared


@torch.no_grad()
def joins(sampler: Sampler, places: Tensor) -> bool:
    r"""Whether chains from the best of some places (N, D) agree with those of a sampler, in the same space and kernel.

    A place that chains leave within a hundred sweeps exchanges draws with the rest as often as its mass asks for, since
    the kernel is reversible. So chains that are much longer, and have converged, have visited it if it has a mass.
    Where a posterior has thousands of modes, no share of a single one could tell that. R-hat compares superchains from
    the places with each other and with the earlier draws, by each coordinate and the log density.
    """
    density = sampler.latent.density
    best = places[density(places).topk(min(PLACES, len(places))).indices]
    z = best.repeat_interleave(SUBCHAINS, 0)
    x, k = sampler.latent.place(z)
    before = sampler.chains()
    superchain = torch.arange(len(best)).repeat_interleave(SUBCHAINS)
    state = {**before.state, "x": x, "k": k, "began": k, "superchain": superchain}
    numbers = {**before.numbers, "thin": 1}
    chains = replace(before, z=z[:, None][:, :0], stats={}, state=state, numbers=numbers)
    new = Sampler(sampler.latent, sampler.names, chains, kept=COMPARED, seed=derive(sampler.seed, "joining"))
    new.more(FORGOTTEN)
    groups = [_with_height(density, part.flatten(0, 1)) for part in new.more(COMPARED).split(SUBCHAINS)]
    old = _with_height(density, before.z.flatten(0, 1))
    generator = torch.Generator().manual_seed(derive(sampler.seed, "compared draws"))
    chosen = torch.randperm(len(old), generator=generator)[: len(groups[0])].to(old.device)
    return float(_mixing.r_hat(torch.stack([*groups, old[chosen]])).max()) <= AGREEMENT


def _with_height(density: LogDensity, z: Tensor) -> Tensor:
    return torch.cat([z, density(z)[:, None]], 1)
