"""Fits without training, for many data sets: a Student-t distribution at the posterior's moments, or a Laplace grid."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from pyro_flows._seeding import derive, seeded
from pyro_flows.fitting.flow_training import begin
from pyro_flows.fitting.laplace_grid import AT_ONCE as SLICED
from pyro_flows.fitting.laplace_grid import LIGHTER as LIGHTER_SLICES
from pyro_flows.fitting.methods import AT_ONCE, LIGHTER
from pyro_flows.fitting.plan import Plan
from pyro_flows.fitting.rounds import weighed
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.parts import affine_base_of
from pyro_flows.flows.recipe import set_df
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.stack import Stack
from pyro_flows.modes.laplace_grid_together import bent, grids_together
from pyro_flows.modes.tables import Table, flow_along
from pyro_flows.starts.matching import matched
from pyro_flows.starts.start import Start
from pyro_flows.training.loop import Training
from pyro_flows.verdict import thresholds
from pyro_flows.verdict.acceptance import shift_is_noise
from pyro_flows.verdict.deciding import LOOKED_AT_DRAWS
from pyro_flows.verdict.weighing import Weighing

HEAVIER = (8.0, 5.0)  # degrees of freedom of a Student-t distribution whose weights correct it
GLANCE = 1000  # draws that suffice where weights are nearly the same at all of them
CORRECTED = "no flow was trained: importance weights correct a Student-t distribution with the posterior's moments"
CORRECTED_SLICES = "no flow was trained: importance weights correct a conditional Laplace grid"

Fitted = tuple[Flow, Training]


def untrained(
    plans: Sequence[Plan], stack: Stack, flow: Flow, starts: Sequence[Start]
) -> list[Fitted | None]:  # fmt: skip
    """Return what is enough without training for each data set, None where nothing is.

    Both kinds are tried where need be: first the one that is likely to be enough. Either is enough if nobody would see
    what weights change, or if weights correct it. ``flow`` is what would be trained; one that was asked for always is.
    """
    if not plans[0].automatic:
        return [None] * len(plans)
    where = bent(stack, starts)
    tables = [None] * len(plans) if where is None else grids_together(stack, starts, where)
    parts = zip(plans, stack.densities, starts, tables, strict=True)
    return [_Trial(flow, *part).best() for part in parts]


@dataclass(frozen=True)
class _Trial:
    """One data set: its start and grid, if there are any, and the untrained flow of all data sets."""

    flow: Flow
    plan: Plan
    density: LogDensity
    start: Start
    table: Table | None

    def best(self) -> Fitted | None:
        """Return the first kind that is enough."""
        if self.table is None:
            return self._moved()
        if self.table.log_evidence - self.start.elbo > thresholds.EVIDENCE_GAP_VISIBLE:
            return self._on_grid(self.table) or self._moved()
        return self._moved() or self._on_grid(self.table)

    def _moved(self) -> Fitted | None:
        """Return the affine flow at the start, moved to weighted moments, if weights correct it."""
        flow = copy.deepcopy(affine_base_of(self.flow))
        start = matched(self.density, self.start, flow.df, seed=self.plan.seed, draws=LOOKED_AT_DRAWS)
        df = flow.df
        with seeded(derive(self.plan.seed, "a look at the start"), self.density.device):
            for own in (*(lighter * df for lighter in LIGHTER), *HEAVIER):
                begin(set_df(flow, own), start)
                weighing = weighed(flow, self.density, LOOKED_AT_DRAWS)
                share = thresholds.ESS_SHARE_PROMISING if own in HEAVIER else thresholds.ESS_SHARE_GOOD
                if not weighing.ess > share * len(weighing.log_weights):
                    return None
                if shift_is_noise(weighing):
                    return flow, Training([], weighing.elbo, True, False, AT_ONCE, 0, 0)
                if own in HEAVIER and weighing.k_hat < thresholds.K_HAT_GOOD:
                    return flow, Training([], weighing.elbo, False, False, CORRECTED, 0, 0)
        return None

    def _on_grid(self, table: Table) -> Fitted | None:
        """Return the flow of the grid, if weights correct it."""
        with seeded(derive(self.plan.seed, "a look at slices"), self.density.device):
            for df in LIGHTER_SLICES:
                try:
                    flow = flow_along(table, df=df).to(self.density.device, self.density.dtype)
                except ValueError:
                    return None
                weighing = _weighed(flow, self.density)
                if not weighing.ess > thresholds.ESS_SHARE_PROMISING * len(weighing.log_weights):
                    return None
                if shift_is_noise(weighing):
                    return flow, Training([], weighing.elbo, True, False, SLICED, 0, 0)
            if weighing.k_hat < thresholds.K_HAT_GOOD:
                return flow, Training([], weighing.elbo, False, False, CORRECTED_SLICES, 0, 0)
        return None


def _weighed(flow: Flow, density: LogDensity) -> Weighing:
    """Weigh a fresh sample of a flow: a small one, if weights of that are nearly the same."""
    glance = weighed(flow, density, GLANCE)
    if glance.ess > thresholds.ESS_SHARE_EVEN * GLANCE and shift_is_noise(glance):
        return glance
    return weighed(flow, density, LOOKED_AT_DRAWS)
