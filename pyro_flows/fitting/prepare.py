"""The first stage of a fit: the model as a log density, in coordinates in which it is easy to fit."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyro_flows.fitting.plan import Plan
from pyro_flows.model.log_density import LogDensity
from pyro_flows.results.stage import Stage
from pyro_flows.starts.charting import choose_charts
from pyro_flows.starts.coordinates import choose_coordinates
from pyro_flows.starts.start import Start

COORDINATES_SHARE = 0.4  # of the seconds that are left, if there is a bound


@dataclass
class Prepared:
    """The log density in the chosen coordinates, starts that were found on the way, and what was chosen."""

    density: LogDensity
    starts: list[Start] = field(default_factory=list)
    history: list[Stage] = field(default_factory=list)


def prepare(plan: Plan, prepared: Prepared, seed: int) -> None:
    """Choose coordinates of hierarchical sites, then charts for angles and heavy tails; each is kept once it is found.

    A model whose own parameters are trained stays as it is: its posterior moves.
    """
    if plan.train_model:
        return
    if prepared.density.structure.hierarchical:
        with plan.clock.part("the choice of coordinates", share=COORDINATES_SHARE):
            prepared.density, start, chosen = choose_coordinates(prepared.density, seed=seed)
            prepared.history.append(Stage("coordinates", elbo=chosen.pop("elbo"), details=chosen))
            prepared.starts += [] if start is None else [start]
    with plan.clock.part("the search for angles and heavy tails", share=COORDINATES_SHARE):
        first = prepared.starts[0] if prepared.starts else None
        prepared.density, carried, charted = choose_charts(prepared.density, first, seed=seed)
        prepared.history += [Stage("charts", details={"sites": charted})] if charted else []
        prepared.starts = [] if carried is None else [carried]
