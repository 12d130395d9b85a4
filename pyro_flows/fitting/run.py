"""The second stage of a fit, one run: starting points, and the methods in the order of their table."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor

from pyro_flows import _stages
from pyro_flows._seeding import seeded
from pyro_flows.fitting.attempt import Attempt, Run
from pyro_flows.fitting.flow_training import CLOSE, begin
from pyro_flows.fitting.methods import AFTER, AS_READ, AT_MODES, AT_THE_BEST, answered
from pyro_flows.fitting.plan import SHARE_OF_SECONDS, Plan, tails
from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.propriety import improper_tails
from pyro_flows.results.stage import Stage
from pyro_flows.starts.charting import choose_charts
from pyro_flows.starts.coordinates import choose_coordinates
from pyro_flows.starts.matching import matched
from pyro_flows.starts.portfolio import PRIOR_DRAWS, portfolio
from pyro_flows.starts.prior import possible_points, prior_draws, spread_of
from pyro_flows.starts.start import Start, standard

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
            prepared.history.append(
                Stage(_stages.PARAMETERIZATION, elbo=cast("float | None", chosen.pop("elbo")), details=chosen)
            )
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


def make_run(at: Attempt) -> None:
    """Find starting points, and try the methods from there until one suffices."""
    clock, extra = at.plan.clock, at.prepared.starts
    with seeded(at.seed, at.density.device):
        starts = [*extra, standard(at.density)]
        with clock.part(_stages.STARTS, share=SHARE_OF_SECONDS):
            starts = portfolio(at.density, seed=at.seed, extra=extra) if at.missed_mode is None else [at.missed_mode]
        at.starts = starts
        at.run.modes = [start for start in starts if start.evidence is not None]
        if answered(at, AT_MODES):
            return
        close = [start for start in starts if start.elbo >= starts[0].elbo - CLOSE]
        first = at.run.number % len(close)  # each run begins at another one of those that are close to the best
        at.starts = starts = close[first:] + close[:first]
        if not at.plan.train_model:
            with clock.part(_stages.MOMENTS, share=SHARE_OF_SECONDS):
                starts[0] = matched(at.density, starts[0], tails(at.density.dim), seed=at.seed)
        answered(at, AT_THE_BEST) or answered(at, AFTER)
