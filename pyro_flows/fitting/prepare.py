"""The first stage of a fit: the model as a log density, in coordinates in which it is easy to fit."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pyro_flows import _stages
from pyro_flows.fitting.attempt import Attempt, Run
from pyro_flows.fitting.methods import AS_READ, answered
from pyro_flows.fitting.plan import Plan
from pyro_flows.fitting.selection import begin
from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.propriety import improper_tails
from pyro_flows.results.stage import Stage
from pyro_flows.starts.charting import choose_charts
from pyro_flows.starts.coordinates import choose_coordinates
from pyro_flows.starts.portfolio import PRIOR_DRAWS
from pyro_flows.starts.prior import possible_points, prior_draws, spread_of
from pyro_flows.starts.start import Start

COORDINATES_SHARE = 0.4  # of the seconds that are left, if there is a bound


def prepare(at: Attempt) -> None:
    """Choose coordinates of hierarchical sites, then charts for angles and heavy tails; each is kept once it is found.

    Methods that come before that may end the run. A model whose own parameters are trained stays as it is: its
    posterior moves.
    """
    plan, prepared, seed = at.plan, at.prepared, at.seed
    if plan.train_model:
        return
    with plan.clock.part(_stages.PROPRIETY):
        prepared.improper = improper_tails(prepared.density, partial(first_draws, prepared.density, seed), seed=seed)
    if prepared.improper:
        return
    if prepared.density.structure.hierarchical:
        with plan.clock.part(_stages.PARAMETERIZING, share=COORDINATES_SHARE):
            if answered(at, AS_READ):
                return
            prepared.density, start, chosen = choose_coordinates(prepared.density, prepared.climbed, seed=seed)
            prepared.history.append(Stage(_stages.PARAMETERIZATION, elbo=chosen.pop("elbo"), details=chosen))
            prepared.starts += [] if start is None else [start]
    with plan.clock.part(_stages.TRANSFORMS, share=COORDINATES_SHARE):
        first = prepared.starts[0] if prepared.starts else None
        prepared.density, carried, charted = choose_charts(prepared.density, first, seed=seed)
        prepared.history += [Stage(_stages.SITE_TRANSFORMS, details={"sites": charted})] if charted else []
        prepared.starts = [] if carried is None else [carried]


def first_draws(density: LogDensity, seed: int) -> Tensor:
    """Return draws of the prior, and points where the density is finite: improper priors are looked at from there."""
    draws = prior_draws(density, PRIOR_DRAWS, seed=seed)
    return torch.cat([draws, possible_points(density, draws)])


def begin_only(plan: Plan, density: LogDensity, run: Run) -> None:
    """Put an untrained flow at the prior's middle and spread: the posterior has no finite integral."""
    draws = prior_draws(density, PRIOR_DRAWS, seed=plan.seed)
    begin(run.flow(plan, density), Start("prior", draws.median(0).values, spread_of(draws)))
