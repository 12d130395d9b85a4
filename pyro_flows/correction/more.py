"""More draws in the way of the verdict: of the flow, resampled, or of chains that go on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_flows._seeding import derive, seeded
from pyro_flows._threads import few_threads
from pyro_flows._turns import alone
from pyro_flows.correction.latent import Latent
from pyro_flows.correction.sampler import KEPT, Sampler
from pyro_flows.correction.starts import can_be_resumed, flow_of
from pyro_flows.results.record import Record
from pyro_flows.results.scoring import score_pool
from pyro_flows.verdict.chains import McmcDraws
from pyro_flows.verdict.deciding import POOL, resample
from pyro_flows.verdict.weighing import weigh

LEAST = 1000  # draws that a pool is weighed for


def can_go_on(posterior: Record) -> bool:
    """Whether the draws to use are of chains that can be gone on with."""
    chains = posterior.chains
    known = chains is not None and can_be_resumed(chains)
    return known and posterior.verdict.status == "refined" and posterior.density is not None


def go_on(posterior: Record, chains: McmcDraws, each: int, *, seed: int) -> Tensor:
    """Return ``each`` further draws (C, n, D) of each chain, spaced as those that there are."""
    density = posterior._need_model()
    with alone(), seeded(seed, density.device), few_threads(density.numbers, chains.count), torch.no_grad():
        own = derive(seed, f"more draws {chains.numbers['seed']}")
        latent = Latent(flow_of(posterior), density)
        return Sampler(latent, posterior.coordinates, chains, kept=KEPT, seed=own).more(each)


def more_draws(posterior: Record, count: int, *, seed: int) -> Tensor:
    """Return ``count`` further unconstrained draws (n, D) in the way of the verdict: see ``Posterior.sample``."""
    density = posterior._need_density()
    if posterior.verdict.status == "refined" and posterior.chains is not None:
        if not can_go_on(posterior):
            of = "NUTS" if posterior.chains.numbers["method"] == "nuts" else "an earlier version"
            raise ValueError(f"sample: chains of {of} are not gone on with; refine(method='hmc') can be.")
        each = math.ceil(count / posterior.chains.count)
        return go_on(posterior, posterior.chains, each, seed=seed).transpose(0, 1).flatten(0, 1)[:count]
    flow = posterior.flow
    if flow is None:
        raise ValueError(f"sample: {posterior.missing.get('flow', 'there is no flow')}. Draw from the guide itself.")
    with alone(), seeded(derive(seed, "more draws"), density.device), torch.no_grad():
        if posterior.verdict.status != "corrected":
            drawn: Tensor = flow.draw(count)[0]
            return drawn
        pool = score_pool(density, flow.draw, POOL * max(count, LEAST))
        weighing = weigh(pool.z, pool.log_p, pool.log_q)
        return pool.z[resample(weighing.log_weights, count, seed=seed)]
