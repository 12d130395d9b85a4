"""Fits of one model to many data sets, side by side: one recorded graph, stacked flows, a verdict for each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from pyro_flows.fitting.fit import conclude
from pyro_flows.fitting.laplace_grid import AT_ONCE as GRID_AT_ONCE
from pyro_flows.fitting.methods import AT_ONCE
from pyro_flows.fitting.rounds import Round, unweighed, weighed
from pyro_flows.fitting.run import prepare
from pyro_flows.fitting.state import LIGHTER, FitState, Plan
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.parts import affine_base_of
from pyro_flows.flows.recipe import begin_at, set_df, start_at
from pyro_flows.inference.modes.laplace_grid import bent, grids_together
from pyro_flows.inference.modes.missed_modes import Search, missed_together
from pyro_flows.inference.modes.tops import Table, flow_along
from pyro_flows.inference.record import Stage
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.starts.portfolio import matched, starts_together
from pyro_flows.inference.training.lockstep import Lockstep, train_together
from pyro_flows.inference.training.loop import STEP_SIZE, Training
from pyro_flows.inference.verdict.deciding import LOOKED_AT_DRAWS, shift_is_noise
from pyro_flows.inference.verdict.weighing import Weighing
from pyro_flows.model.digits import COMPARED
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.stack import NotStackable, Stack
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.support import thresholds
from pyro_flows.support.process import stages
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.process.threads import few_threads

TOGETHER, NUMBERS = 128, 2**20  # data sets side by side at most, and numbers that a step of all handles
EACH = 32  # draws of each flow in a step
FEWEST = 4  # data sets that are worth a graph of their own
AT_ONCE_TRAINED = "converged: weighting changes no result"
LAYERS = 2  # of a flow that was given by name: those for which this is too little are fitted again by themselves

HEAVIER = (8.0, 5.0)  # degrees of freedom of a Student-t distribution whose weights correct it
QUICK_DRAWS = 1000  # draws that suffice where weights are nearly the same at all of them
CORRECTED = "no flow was trained: importance weights correct a Student-t distribution with the posterior's moments"
CORRECTED_GRID = "no flow was trained: importance weights correct a conditional Laplace grid"

Fitted = tuple[Flow, Training]
Report = Callable[[str], None]

OF_DATA = {  # charts that are those of one data set
    "turn_about": "angles are cut where each data set says",
    "wall_below": "coordinates end where each data set says",
}


def size_of_batch(density: LogDensity) -> int:
    """Return how many data sets go side by side: as many as fill a cache, 128 at most."""
    return max(FEWEST, min(TOGETHER, NUMBERS // (EACH * max(density.numbers, 1))))


def coordinates_for(plan: Plan, densities: Sequence[LogDensity]) -> list[LogDensity]:
    """Return the densities after the first one, all in the coordinates that the first chooses."""
    state = FitState(replace(plan, automatic=False), densities[0])
    prepare(state.runs[0])
    chosen = state.density.structure.noncentered
    for chart, reason in OF_DATA.items():
        if any(isinstance(options, dict) and chart in options for options in chosen.values()):
            raise NotStackable(reason)
    if not chosen:
        return list(densities[1:])
    first = densities[0].elsewhere(chosen)
    return [first.beside(density.args, density.kwargs) for density in densities[1:]]


def fit_stack(
    plans: Sequence[Plan], densities: Sequence[LogDensity], *, seed: int, report: Report
) -> list[Posterior | None]:
    """Fit K data sets side by side, and judge each by itself as ``fit`` judges its own.

    Nothing is trained where importance weights correct a Student-t distribution at the posterior's moments, or a
    Laplace grid along one coordinate. The others are trained in lockstep; None for them if these are too few for that.
    ``seed`` is that of starts and training; what is drawn to judge by has the plans' own seeds.
    """
    first = plans[0]
    with few_threads(densities[0].numbers, EACH), seeded(seed, densities[0].device):
        report(stages.READING)
        stack = Stack(densities)
        stack.clock = first.clock
        recipe = first.recipe
        if recipe.named and "layers" not in recipe.options:  # their number was left open
            recipe = replace(recipe, options={**recipe.options, "layers": LAYERS})
        report(stages.STARTS)
        fresh = partial(replace(first, recipe=recipe).fresh, densities[0])
        flow = fresh()
        starts = starts_together(stack, seed=seed, df=flow.df)
        with seeded(derive(seed, "digits"), stack.device):
            noise = torch.randn(COMPARED, stack.dim, dtype=stack.dtype, device=stack.device)
        for density, start in zip(densities, starts, strict=True):
            density.check_digits(start.map(noise))
        as_they_start = untrained(plans, stack, flow, starts)
        left = [number for number, one in enumerate(as_they_start) if one is None]
        trained = _train(stack, fresh, starts, left, report)
        done = {number: one or trained[number] for number, one in enumerate(as_they_start) if one or number in trained}
        report(stages.MISSED)
        searches = missed_together(stack.select(list(done)), [flow for flow, _ in done.values()], seed=seed)
    found: list[Posterior | None] = [None] * len(plans)
    with few_threads(densities[0].numbers, EACH):
        for (number, fitted), search in zip(done.items(), searches, strict=True):
            report(f"verdict {number + 1} of {len(plans)}")
            found[number] = _judged(plans[number], densities[number], *fitted, starts[number], search, len(plans))
    return found


def _judged(
    plan: Plan, density: LogDensity, flow: Flow, training: Training, start: Start, search: Search, count: int
) -> Posterior:
    """Judge one of ``count`` fits side by side by itself."""
    outcome = Round(flow, unweighed(density.dim, training.elbo), training, _stage(training, start, count))
    state = FitState(plan, density, plain=flow, sampler=flow, search=search)
    state.runs[0].best, state.runs[0].history = outcome, [outcome.stage]
    with seeded(derive(plan.seed, "digits"), density.device):
        density.check_digits(flow.draw(COMPARED)[0])
    with seeded(derive(plan.seed, "side by side"), density.device):
        posterior = conclude(state)
    seconds = float(posterior.settings["seconds"]) / count
    settings = {**posterior.settings, "side_by_side": count, "seconds": seconds}
    return replace(posterior, losses=torch.tensor(training.losses), settings=settings)


def _train(
    stack: Stack, fresh: Callable[[], Flow], starts: Sequence[Start], numbers: Sequence[int], report: Report
) -> dict[int, Fitted]:
    """Train flows for data sets with these numbers in lockstep; fewer than are worth it are left to fits one by one."""
    if len(numbers) < FEWEST:
        return {}
    chosen = [fresh() for _ in numbers]
    for flow, number in zip(chosen, numbers, strict=True):
        start_at(flow, starts[number].loc, starts[number].scale)
    part = stack.select(numbers)
    steps = Lockstep(part, chosen, learning_rate=STEP_SIZE, batch=EACH)
    said = f"{{}}, {{}} steps, {{}} of {len(chosen)} converged"
    trainings = train_together(steps, report=lambda done, still, state: report(said.format(state, done, still)))
    found = dict[int, Fitted]()
    for number, density, flow, training in zip(numbers, part.densities, chosen, trainings, strict=True):
        if not training.converged and shift_is_noise(weighed(flow, density, LOOKED_AT_DRAWS)):
            # nobody would see what its weights would change
            training = replace(training, converged=True, moving=False, why=AT_ONCE_TRAINED)
        found[number] = flow, training
    return found


def _stage(training: Training, start: Start, count: int) -> Stage:
    return Stage(
        "side by side",
        elbo=training.elbo,
        start=start.name,
        start_elbo=start.elbo,
        step_size=STEP_SIZE,
        batch=EACH,
        steps=len(training.losses),
        converged=training.converged,
        why=training.why,
        skipped=training.skipped,
        falls=training.falls,
        details={"data_sets": count},
    )


# without training: a Student-t distribution at the posterior's moments, or a Laplace grid -----------------------------


def untrained(plans: Sequence[Plan], stack: Stack, flow: Flow, starts: Sequence[Start]) -> list[Fitted | None]:
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
        if self.table.log_evidence - self.start.elbo > thresholds.EVIDENCE_GAP_GOOD:
            return self._on_grid(self.table) or self._moved()
        return self._moved() or self._on_grid(self.table)

    def _moved(self) -> Fitted | None:
        """Return the affine flow at the start, moved to weighted moments, if weights correct it."""
        flow = copy.deepcopy(affine_base_of(self.flow))
        start = matched(self.density, self.start, flow.df, seed=self.plan.seed, draws=LOOKED_AT_DRAWS)
        df = flow.df
        with seeded(derive(self.plan.seed, "a look at the start"), self.density.device):
            for own in (*(lighter * df for lighter in LIGHTER), *HEAVIER):
                begin_at(set_df(flow, own), start.loc, start.scale)
                weighing = weighed(flow, self.density, LOOKED_AT_DRAWS)
                share = thresholds.ESS_SHARE_PROMISING if own in HEAVIER else thresholds.ESS_SHARE_GOOD
                if not weighing.share > share:
                    return None
                if shift_is_noise(weighing):
                    return flow, Training([], weighing.elbo, True, False, AT_ONCE, 0, 0)
                if own in HEAVIER and weighing.k_hat < thresholds.K_HAT_GOOD:
                    return flow, Training([], weighing.elbo, False, False, CORRECTED, 0, 0)
        return None

    def _on_grid(self, table: Table) -> Fitted | None:
        """Return the flow of the grid, if weights correct it."""
        with seeded(derive(self.plan.seed, "a look at slices"), self.density.device):
            for lighter in LIGHTER:
                try:
                    flow = flow_along(table, lighter=lighter).to(self.density.device, self.density.dtype)
                except ValueError:
                    return None
                weighing = _weighed(flow, self.density)
                if not weighing.share > thresholds.ESS_SHARE_PROMISING:
                    return None
                if shift_is_noise(weighing):
                    return flow, Training([], weighing.elbo, True, False, GRID_AT_ONCE, 0, 0)
            if weighing.k_hat < thresholds.K_HAT_GOOD:
                return flow, Training([], weighing.elbo, False, False, CORRECTED_GRID, 0, 0)
        return None


def _weighed(flow: Flow, density: LogDensity) -> Weighing:
    """Weigh a fresh sample of a flow: a small one, if weights of that are nearly the same."""
    quick = weighed(flow, density, QUICK_DRAWS)
    if quick.share > thresholds.ESS_SHARE_EVEN and shift_is_noise(quick):
        return quick
    return weighed(flow, density, LOOKED_AT_DRAWS)
