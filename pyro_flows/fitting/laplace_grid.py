"""The method of the conditional Laplace grid: given one latent, all others are approximately normal.

Examples are the scale of a few groups and the noise of a regression. The flow of the grid needs no training. The grid
is tried before coordinates of hierarchical sites are chosen, since it hardly depends on them, and at the best start,
before any training. See ``inference/modes/laplace_grid.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from pyro_flows.fitting.rounds import Round, untrained, weighed
from pyro_flows.fitting.state import LIGHTER, SHARE_OF_SECONDS, Plan, Run, Sampler, tails
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.parts import location_scale
from pyro_flows.flows.recipe import begin_at
from pyro_flows.inference.chains.latent import WRITTEN_DEAR
from pyro_flows.inference.modes.laplace_grid import Marginal, can_have_grid, closer, grids_about
from pyro_flows.inference.modes.missed_modes import Search
from pyro_flows.inference.modes.tops import flow_along
from pyro_flows.inference.modes.truncated_tails import with_truncated_tails
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.verdict.deciding import JUDGED_DRAWS, LOOKED_AT_DRAWS, weights_correct
from pyro_flows.inference.verdict.methods import GRID
from pyro_flows.inference.verdict.weighing import Weighing
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import ESS_SHARE_PROMISING

AT_ONCE = "converged: draws from the conditional Laplace grid pass the checks"


def grid_at_start(run: Run, density: LogDensity, start: Start) -> Round | None:
    """Return a grid about a start that is accepted, before any training; None if there is none."""
    plan = run.plan
    with plan.clock.part(GRID, share=SHARE_OF_SECONDS), torch.no_grad():
        if not grid_comes_first(plan, density):
            return None
        normal = location_scale(density.dim, df=tails(density.dim)).to(start.loc)
        begin_at(normal, start.loc, start.scale)
        z = normal.draw(LOOKED_AT_DRAWS)[0]
        flow = along(density, grids_about(density, start.loc, z, seed=run.seed), seed=run.seed)
        if flow is None:
            return None
        outcome = untrained(GRID, flow, density, start.elbo, AT_ONCE)
        return outcome if outcome.enough else None
    return None


def grid_comes_first(plan: Plan, density: LogDensity) -> bool:
    """Whether grids are tried before any training: they are cheap, and the caller has named no flow."""
    if not (plan.open and can_have_grid(density)):
        return False
    return density.written <= WRITTEN_DEAR and density.work.operations <= 500  # of an evaluation


def with_tails_checked(search: Search, density: LogDensity, sampler: Sampler, *, seed: int) -> Search:
    """Complete a search that has found no mode: look for a marginal tail that draws of a sampler truncate.

    The draws of the search serve again where no more can be afforded.
    """
    count = density.affordable(JUDGED_DRAWS)

    def weighted() -> tuple[Tensor, Tensor]:
        if search.draws is not None and len(search.draws[0]) >= count:
            return search.draws
        z, log_q = sampler.draw(count)
        return z, density(z) - log_q

    return with_truncated_tails(search, density, weighted, seed=seed)


@torch.no_grad()
def along(density: LogDensity, grids: Sequence[Marginal], *, seed: int) -> Flow | None:
    """Return the flow of the best grid, made finer; None if no grid is promising, or if weights do not correct it."""
    with seeded(derive(seed, "slices along a coordinate"), density.device):
        tried = [(found[0].share, one) for one in grids if (found := _of_grid(density, one)) is not None]
        share, best = max(tried, key=itemgetter(0), default=(0.0, None))
        close = closer(density, best, seed=seed) if best is not None and share >= ESS_SHARE_PROMISING else None
        found = None if close is None else _of_grid(density, close)
    return found[1] if found is not None and weights_correct(found[0].share, found[0].k_hat) else None


def _of_grid(density: LogDensity, grid: Marginal) -> tuple[Weighing, Flow] | None:
    """Return draws of the flow of a grid, weighed, and the flow; None if there is no table.

    The base has the lightest tails that are accepted.
    """
    found: tuple[Weighing, Flow] | None = None
    for lighter in LIGHTER:
        try:
            sampler = flow_along(grid, lighter=lighter).to(density.device, density.dtype)
        except ValueError:
            return None
        found = weighed(sampler, density, LOOKED_AT_DRAWS), sampler
        if weights_correct(found[0].share, found[0].k_hat):
            break
    return found
