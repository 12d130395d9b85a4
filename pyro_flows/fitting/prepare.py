"""The first stage of a fit: the model as a log density, in coordinates in which it is easy to fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pyro_flows import _stages
from pyro_flows._ledger import accepted
from pyro_flows.fitting.nesting import nested_at_once
from pyro_flows.fitting.plan import Plan
from pyro_flows.fitting.rounds import Round
from pyro_flows.fitting.run import Run
from pyro_flows.fitting.selection import begin
from pyro_flows.fitting.slicing import come_first, slices_at_once
from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.propriety import improper_tails
from pyro_flows.results.stage import Stage
from pyro_flows.starts.charting import choose_charts
from pyro_flows.starts.coordinates import Climbed, choose_coordinates, climbed
from pyro_flows.starts.portfolio import PRIOR_DRAWS
from pyro_flows.starts.prior import possible_points, prior_draws, spread_of
from pyro_flows.starts.start import Start
from pyro_flows.training.trainer import Trainer

AT_FIRST = 80  # dimensions up to which a few coordinates are held before any others are chosen; above, chains cost less
COORDINATES_SHARE = 0.4  # of the seconds that are left, if there is a bound


@dataclass
class Prepared:
    """The log density in the chosen coordinates, starts that were found on the way, and what was chosen.

    ``sliced`` is a flow of slices along a coordinate, or one of normal distributions given a few coordinates, where
    this is enough, so that nothing is left to train. ``improper`` tells that the posterior has no finite integral, so
    that nothing is tried. ``as_read`` is the log density before any choice.
    """

    density: LogDensity
    starts: list[Start] = field(default_factory=list)
    history: list[Stage] = field(default_factory=list)
    sliced: tuple[Round, Trainer] | None = None
    improper: list[str] = field(default_factory=list)
    as_read: LogDensity = field(init=False)

    def __post_init__(self) -> None:
        self.as_read = self.density

    def go_back(self) -> None:
        """Return to the coordinates that the model was read in; what was found in others is dropped."""
        if self.as_read is not self.density:
            self.as_read.evaluations += self.density.evaluations
        self.density, self.starts, self.history = self.as_read, [], []


def prepare(plan: Plan, prepared: Prepared, seed: int) -> None:
    """Choose coordinates of hierarchical sites, then charts for angles and heavy tails; each is kept once it is found.

    A model whose own parameters are trained stays as it is: its posterior moves.
    """
    if plan.train_model:
        return
    with plan.clock.part(_stages.PROPRIETY):
        prepared.improper = improper_tails(prepared.density, partial(first_draws, prepared.density, seed), seed=seed)
    if prepared.improper:
        return
    if prepared.density.structure.hierarchical:
        with plan.clock.part(_stages.PARAMETERIZING, share=COORDINATES_SHARE):
            wholly = _sliced(plan, prepared, seed)
            if prepared.sliced is None and prepared.density.dim <= AT_FIRST:
                prepared.sliced = nested_at_once(plan, prepared.density, seed=seed)
            if prepared.sliced is not None:
                return
            prepared.density, start, chosen = choose_coordinates(prepared.density, wholly, seed=seed)
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


def nested_instead(plan: Plan, prepared: Prepared, run: Run, *, first: bool) -> bool:
    """Hold a few coordinates, where slices do not do; say whether that is enough.

    In few dimensions this comes ``first``, before chains, in more after these. Hierarchical models of few dimensions
    have been looked at already, as they were read.
    """
    density = prepared.as_read
    few = density.dim <= AT_FIRST
    if first != few or (few and density.structure.hierarchical):
        return False
    found = nested_at_once(plan, density, seed=plan.seed)
    if found is None:
        return False
    accepted(found[0].stage.stage)
    prepared.go_back()
    run.modes, run.history = [], []
    run.take(*found)
    return True


def _sliced(plan: Plan, prepared: Prepared, seed: int) -> Climbed | None:
    """Try slices in non-centered coordinates: as a rule, those of centered ones are the same, whose neck has no top.

    Paths that were made for this are returned.
    """
    if not come_first(plan, prepared.density):
        return None
    wholly = climbed(prepared.density, True, seed=seed)
    if math.isfinite(wholly.elbo):
        prepared.sliced = slices_at_once(plan, wholly.density, wholly.start, seed=seed)
    if prepared.sliced is not None:
        wholly.density.evaluations += prepared.density.evaluations
        prepared.density = wholly.density
        chosen = wholly.density.structure.noncentered
        details = {"noncentered": chosen, "elbo_centered": None, "elbo_noncentered": wholly.elbo}
        prepared.history.append(Stage(_stages.PARAMETERIZATION, elbo=wholly.elbo, details=details))
    return wholly
