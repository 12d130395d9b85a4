"""The second stage of a fit, one run: starting points, and the methods in the order of their table."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor

from pyro_flows.fitting.methods import AFTER, AS_READ, AT_MODES, AT_THE_BEST, answered
from pyro_flows.fitting.state import SHARE_OF_SECONDS, Run, tails
from pyro_flows.flows.recipe import begin_at
from pyro_flows.inference.modes.propriety import improper_tails
from pyro_flows.inference.record import Stage
from pyro_flows.inference.starts.charting import choose_charts
from pyro_flows.inference.starts.coordinates import choose_coordinates
from pyro_flows.inference.starts.gaussians import CLOSE, standard
from pyro_flows.inference.starts.portfolio import matched, portfolio
from pyro_flows.inference.starts.prior import PRIOR_DRAWS, possible_points, prior_draws, spread_of
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process import stages
from pyro_flows.support.process.seeding import seeded


def prepare(run: Run) -> None:
    """Choose coordinates of hierarchical sites, then charts for angles and heavy tails; each is kept once it is found.

    Methods that come before that may end the run. A model whose own parameters are trained stays as it is: its
    posterior moves.
    """
    state, clock, seed = run.state, run.plan.clock, run.seed
    if run.plan.train_model:
        return
    with clock.part(stages.PROPRIETY):
        state.improper = improper_tails(state.density, partial(first_draws, state.density, seed), seed=seed)
    if state.improper:
        return
    if state.density.structure.hierarchical:
        with clock.part(stages.PARAMETERIZING, share=SHARE_OF_SECONDS):
            if answered(run, AS_READ):
                return
            state.density, start, chosen = choose_coordinates(state.density, state.climbed, seed=seed)
            elbo = cast("float | None", chosen.pop("elbo"))
            state.history.append(Stage(stages.PARAMETERIZATION, elbo=elbo, details=chosen))
            state.starts += [] if start is None else [start]
    with clock.part(stages.TRANSFORMS, share=SHARE_OF_SECONDS):
        first = state.starts[0] if state.starts else None
        state.density, carried, charted = choose_charts(state.density, first, seed=seed)
        state.history += [Stage(stages.SITE_TRANSFORMS, details={"sites": charted})] if charted else []
        state.starts = [] if carried is None else [carried]


def first_draws(density: LogDensity, seed: int) -> Tensor:
    """Return draws of the prior, and points where the density is finite: improper priors are looked at from there."""
    draws = prior_draws(density, PRIOR_DRAWS, seed=seed)
    return torch.cat([draws, possible_points(density, draws)])


def begin_only(run: Run) -> None:
    """Put an untrained flow at the prior's middle and spread: the posterior has no finite integral."""
    draws = prior_draws(run.density, PRIOR_DRAWS, seed=run.seed)
    begin_at(run.flow(), draws.median(0).values, spread_of(draws))


def make_run(run: Run) -> None:
    """Find starting points, and try the methods from there until one suffices."""
    clock, density, extra = run.plan.clock, run.density, run.state.starts
    with seeded(run.seed, density.device):
        run.starts = [*extra, standard(density)]
        with clock.part(stages.STARTS, share=SHARE_OF_SECONDS):
            missed = run.missed_mode
            run.starts = portfolio(density, seed=run.seed, extra=extra) if missed is None else [missed]
        run.modes = [start for start in run.starts if start.evidence is not None]
        if answered(run, AT_MODES):
            return
        close = [start for start in run.starts if start.elbo >= run.starts[0].elbo - CLOSE]
        first = run.number % len(close)  # each run begins at another one of those that are close to the best
        run.starts = close[first:] + close[:first]
        if not run.plan.train_model:
            with clock.part(stages.MOMENTS, share=SHARE_OF_SECONDS):
                run.starts[0] = matched(density, run.starts[0], tails(density.dim), seed=run.seed)
        answered(run, AT_THE_BEST) or answered(run, AFTER)
