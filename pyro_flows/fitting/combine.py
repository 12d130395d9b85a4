"""The third stage of a fit: runs become one sampler, a flow or a mixture of flows, that lacks no mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from pyro_flows.fitting.agreement import balanced, compare, stage
from pyro_flows.fitting.missed_modes import Search, missed_modes
from pyro_flows.fitting.plan import Plan
from pyro_flows.fitting.prepare import Prepared
from pyro_flows.fitting.run import Run, make_run
from pyro_flows.fitting.volume import too_uneven
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.model.log_density import LogDensity
from pyro_flows.results.dims import coordinate_names
from pyro_flows.results.stage import Stage
from pyro_flows.starts.portfolio import Start
from pyro_flows.training.loop import BATCH

RUNS_ADDED = 3  # at most, one for each mode that is missed
MODE_DRAWS = 1000
ONE_THREAD_BELOW = 2**20  # numbers in one batch of likelihood terms

Sampler = Flow | FlowMixture  # has ``draw`` and ``log_prob``


@dataclass
class Combined:
    """The runs and what they come to together.

    Attributes:
        runs: all of them, those too that are under way.
        sampler: the flow of the best run, or a mixture of runs that disagree.
        history: an entry for each comparison.
        warnings: what speaks against the sampler.
        failures: what speaks against its weighted draws too.
        disagreements: of the runs, in words.
        search: for modes that the sampler lacks, None if there was no time for one.
        added: how many runs were added since a mode was missed.
    """

    runs: list[Run] = field(default_factory=lambda: [Run(0)])
    sampler: Sampler | None = None
    history: list[Stage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    search: Search | None = None
    added: int = 0

    @property
    def kept(self) -> list[Run]:
        """The runs that can be compared; if there are none, those that got anywhere."""
        weighed = [run for run in self.runs if run.best is not None and run.best.weighed]
        return weighed or [run for run in self.runs if run.best is not None] or self.runs

    @property
    def best(self) -> Run:
        """The run with the best verdict, then the best ELBO."""
        return max(self.kept, key=lambda run: run.rank)


def make_runs(plan: Plan, prepared: Prepared, found: Combined) -> None:
    """Train as many runs as were asked for; each but the first starts where those before it lack a mode, if they do."""
    clock = plan.clock
    with threads(prepared.density):
        for number in range(plan.runs):
            name = f"run {number + 1} of {plan.runs}"
            if number and clock.over:
                clock.skip(name)
                break
            if number:
                found.runs.append(Run(number))
            plan.bar.task = "fit" if plan.runs == 1 else f"fit, {name}"
            with clock.part(name, noted=False):
                lack = _first_lack(plan, prepared, found) if number and not plan.train_model else None
                make_run(plan, prepared.density, found.runs[-1], prepared.starts, lack, seed=plan.seed + number)
    plan.bar.task = "fit"


def combine(plan: Plan, prepared: Prepared, found: Combined) -> None:
    """Compare the runs, look for what their sampler lacks, and add runs there."""
    clock, density = plan.clock, prepared.density
    found.sampler = found.best.flow(plan, density)
    if not clock.over:
        with clock.part("a look at how uneven the density is"):
            found.warnings, found.failures = too_uneven(found.sampler, density)
    if len(found.kept) > 1:
        with clock.part("the comparison of runs"):
            _compare(plan, density, found)
    if plan.train_model:
        density.forget()
    with clock.part("the search for modes that the guide lacks"):
        found.search = _search(plan, density, found, found.sampler)
    if plan.escalate and not plan.train_model:
        _add_runs(plan, prepared, found)


def _add_runs(plan: Plan, prepared: Prepared, found: Combined) -> None:
    """Train further runs where the sampler lacks a mode, until it lacks none; it becomes the mixture of all."""
    clock, density = plan.clock, prepared.density
    for _ in range(RUNS_ADDED):
        if found.search is None or not found.search.lacks or clock.over:
            return
        number = len(found.runs)
        found.runs.append(Run(number))
        plan.bar.task = "fit, a run for a missed mode"
        with clock.part("a run for a missed mode"), threads(density):
            lack = found.search.lacks[0].start
            make_run(plan, density, found.runs[-1], prepared.starts, lack, seed=plan.seed + number)
        plan.bar.task = "fit"
        found.sampler = found.best.flow(plan, density)
        with clock.part("the comparison of runs"):
            _compare(plan, density, found)
        found.added += 1
        with clock.part("the search for modes that the guide lacks"):
            found.search = _search(plan, density, found, found.sampler)


def _search(plan: Plan, density: LogDensity, found: Combined, sampler: Sampler) -> Search:
    """Look for modes that a sampler lacks."""
    z, log_q = sampler.draw(MODE_DRAWS)
    modes = [mode for run in found.runs for mode in run.modes]
    return missed_modes(density, modes, z, log_q, sampler.log_prob, seed=plan.seed)


def _first_lack(plan: Plan, prepared: Prepared, found: Combined) -> Start | None:
    """Return a start where the runs so far lack a mode: the next run trains there."""
    outcomes = [run.best for run in found.runs[:-1] if run.best is not None and run.best.weighed]
    if not outcomes:
        return None
    sampler: Sampler = outcomes[0].flow
    if len(outcomes) > 1:
        names = coordinate_names(prepared.density.structure)
        sampler = FlowMixture.of([outcome.flow for outcome in outcomes], compare(outcomes, names).weights)
    lacks = _search(plan, prepared.density, found, sampler).lacks
    return lacks[0].start if lacks else None


def _compare(plan: Plan, density: LogDensity, found: Combined) -> None:
    """Compare runs; where they disagree, the sampler becomes their mixture."""
    runs: Sequence[Run] = found.kept
    agreement = compare([run.best for run in runs if run.best], coordinate_names(density.structure))
    found.history.append(stage(agreement, agreement.weights))
    if agreement.holds:
        return
    found.disagreements = list(agreement.disagreements)
    flows = [run.flow(plan, density) for run in runs]
    weights = balanced(flows, density, agreement.weights)
    found.history[-1] = stage(agreement, weights)
    found.sampler = FlowMixture.of(flows, weights)


@contextmanager
def threads(density: LogDensity) -> Iterator[None]:
    """One thread for small problems, where threads cost more than they save; the caller's number comes back after.

    The rule looks at sizes, not at clocks, so that one seed gives one answer.
    """
    rows = sum(value.numel() for value in density.structure.observed.values())
    before = torch.get_num_threads()
    if BATCH * max(rows, density.dim) < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
