"""The third stage of a fit: runs are combined into one sampler, and missed modes are searched for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_flows import _stages
from pyro_flows._ledger import accepted
from pyro_flows._seeding import derive, seeded
from pyro_flows.correction.fallback import chains_miss_mode
from pyro_flows.correction.judging import around, evidence_of
from pyro_flows.correction.search import visits_all
from pyro_flows.fitting.agreement import balanced, compare, stage
from pyro_flows.fitting.attempt import Attempt, Combined, Prepared, Run, Sampler
from pyro_flows.fitting.guide_space import latent_of
from pyro_flows.fitting.laplace_grid import with_tails_checked
from pyro_flows.fitting.multimodal import MultimodalCandidate, multimodal
from pyro_flows.fitting.plan import Plan
from pyro_flows.fitting.rounds import volume_misfit
from pyro_flows.fitting.run import begin_only, make_run
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.missed_modes import Search, missed_modes
from pyro_flows.modes.missed_regions import BY_WALKERS, TRUNCATED_TAIL
from pyro_flows.modes.propriety import improper_tails
from pyro_flows.modes.symmetries import SignedPermutation, group
from pyro_flows.results.dims import coordinate_names
from pyro_flows.starts.start import Start
from pyro_flows.verdict.deciding import SEARCHED_DRAWS

RUNS_ADDED, BESIDE = 7, 1  # at most, one for each mode that is missed; for mass next to what is covered
SURVEYS = 2  # at most, of all modes at once
MAX_COPIES = 128  # of each flow: draws are scored by all of them


def make_runs(plan: Plan, prepared: Prepared, found: Combined) -> None:
    """Make as many runs as were asked for; each but the first starts where those before it lack a mode, if they do.

    A method that sufficed as coordinates were chosen, which is tried for one run only, leaves nothing to do.
    """
    clock = plan.clock
    if prepared.improper:
        begin_only(plan, prepared.density, found.runs[0])
        return
    if found.runs[0].best is not None:
        return
    for number in range(plan.runs):
        name = f"run {number + 1} of {plan.runs}"
        if number and clock.over:
            clock.skip(name)
            break
        if number:
            found.runs.append(Run(number))
        plan.bar.task = "fit" if plan.runs == 1 else f"fit, {name}"
        with clock.part(name, noted=False):
            start = _start_at_missed_mode(plan, prepared, found) if number and not plan.train_model else None
            make_run(Attempt(plan, prepared, found.runs[-1], plan.seed + number, start))
    plan.bar.task = "fit"


def combine(plan: Plan, prepared: Prepared, found: Combined) -> None:
    """Compare the runs, look for what their sampler lacks, and add runs there."""
    clock, density = plan.clock, prepared.density
    found.plain = found.sampler = found.best.flow(plan, density)
    found.improper = prepared.improper or found.best.improper
    if not found.improper:
        with clock.part(_stages.PROPRIETY):
            found.improper = improper_tails(density, lambda: drawn(found), seed=plan.seed)
    if found.best.sampled:
        found.search = Search()
        if found.best.copies is not None:
            found.sampler, found.copies = found.best.copies, len(found.best.copies.components)
    elif not found.improper:
        _combine(plan, prepared, found)


def drawn(found: Combined) -> Tensor:
    """Return draws that tell where the posterior is: of chains that sufficed, of a mixture, or of the best flow."""
    multimodal, chains, sampler = found.runs[0].multimodal, found.best.chains, found.sampler
    assert sampler is not None
    if chains is not None:
        return chains.z.flatten(0, 1)
    return (multimodal.sampler if multimodal is not None and multimodal.enough else sampler).draw(SEARCHED_DRAWS)[0]


def _combine(plan: Plan, prepared: Prepared, found: Combined) -> None:
    clock, density = plan.clock, prepared.density
    tried = found.runs[0].multimodal
    if tried is not None:
        found.surveys = 1
        _take(found, tried)
    if not clock.over and isinstance(found.plain, Flow):
        with clock.part(_stages.VARIANCE):
            found.warnings, found.failures = volume_misfit(found.plain, density)
    if len(found.kept) > 1:
        with clock.part(_stages.COMPARING):
            _compare(plan, density, found)
    if plan.train_model:
        density.forget()
    _look(plan, density, found)
    if plan.escalate and not plan.train_model:
        _complete(plan, prepared, found)


def _take(found: Combined, tried: MultimodalCandidate) -> bool:
    """Make a mixture at all modes the sampler, if it is good enough; say whether it is."""
    if tried.enough:
        accepted(f"combined: {tried.stage.stage}")
        found.multimodal, found.plain, found.sampler, found.copies = tried, tried.sampler, tried.sampler, 1
        found.warnings, found.failures, found.disagreements = [], [], []  # which are about a flow
    return tried.enough


def _look(plan: Plan, density: LogDensity, found: Combined) -> None:
    assert found.sampler is not None
    with plan.clock.part(_stages.MISSED):
        found.search = None
        found.search = _search(plan, density, found, found.sampler)
    if found.search is not None:
        with plan.clock.part(_stages.TAILS):
            found.search = with_tails_checked(found.search, density, found.sampler, seed=plan.seed)


def _complete(plan: Plan, prepared: Prepared, found: Combined) -> None:
    """Go on until the sampler lacks no mode.

    Where a symmetry tells all, its flows are copied; elsewhere a mixture at all modes of a survey, or runs, are added.
    """
    if _chains_visit_all(plan, prepared.density, found):
        if not _chains_miss_another(plan, prepared.density, found):
            return
        found.best.chains = None
    missed = () if found.search is None else found.search.missed
    if all(region.start.name == BY_WALKERS for region in missed):
        return  # the flow is only too thin next to where it lies: a run of its own has nowhere else to begin
    moves: list[SignedPermutation] = []
    while found.search is not None and found.search.missed and not plan.clock.over:
        if any(region.start.name == TRUNCATED_TAIL for region in found.search.missed):
            return
        more = [region.move for region in found.search.missed if region.move is not None and region.move not in moves]
        if more and _copied(found, [*moves, *more]):
            accepted("symmetric copies")
            moves += more
        elif found.surveys < SURVEYS and _surveyed(plan, prepared.density, found):
            moves = []
        else:
            beside = (
                all(region.beside for region in found.search.missed) and plan.refine is not None
            )  # chains can go there
            most = 0 if found.multimodal is not None else BESIDE if beside else RUNS_ADDED
            if found.added >= most or _too_many([*moves, *more]):
                return
            accepted("run at a missed mode")
            _add_run(plan, prepared, found, found.search.missed[0].start)
            _copied(found, moves)
        _look(plan, prepared.density, found)


def _chains_visit_all(plan: Plan, density: LogDensity, found: Combined) -> bool:
    """Whether a sampler that sufficed has what the flow lacks: its chains are judged for themselves, later."""
    chains, flow = found.best.chains, found.plain
    if chains is None or found.search is None or not isinstance(flow, Flow):
        return False
    with seeded(derive(plan.seed, "places of chains"), density.device):
        evidence = evidence_of(flow, around(chains), chains, density)
    return visits_all(density, chains, found.search.missed, evidence, seed=plan.seed)


def _chains_miss_another(plan: Plan, density: LogDensity, found: Combined) -> bool:
    """Whether chains that go to all places that the flow lacks miss a mode elsewhere."""
    chains, flow, search = found.best.chains, found.plain, found.search
    if chains is None or search is None or not isinstance(flow, Flow) or all(region.beside for region in search.missed):
        return False
    with plan.clock.part(_stages.MISSED_BY_CHAINS):
        return chains_miss_mode(chains, flow, density, coordinate_names(density.structure), seed=plan.seed)
    return False


def _too_many(moves: Sequence[SignedPermutation]) -> bool:
    """Whether exact symmetries tell of more equal modes than copies, let alone runs, could ever have."""
    return bool(moves) and group(moves, MAX_COPIES) is None


def _surveyed(plan: Plan, density: LogDensity, found: Combined) -> bool:
    """Try a mixture at all modes of a survey; say whether it became the sampler."""
    assert found.sampler is not None
    assert found.search is not None
    found.surveys += 1
    places = torch.stack([region.place for region in found.search.missed])
    seed = derive(plan.seed, f"survey {found.surveys}")
    with plan.clock.part(_stages.SEVERAL):
        with seeded(seed, density.device):
            z = torch.cat([found.sampler.draw(SEARCHED_DRAWS)[0].to(places), places])
        tried = multimodal(density, z, places, seed=seed, bar=plan.bar)
        if tried is not None:
            found.history.append(tried.stage)
            return _take(found, tried)
    return False


def _copied(found: Combined, moves: Sequence[SignedPermutation]) -> bool:
    """Put a copy of each flow at each of its images under exact symmetries; say whether there are not too many.

    The density is the same at all images of a point. So all copies have the same mass, and none has to be trained.
    """
    copies = group(moves, MAX_COPIES) if moves else None
    if copies is None or found.plain is None:
        return False
    found.sampler, found.copies = FlowMixture.copied(found.plain, copies), len(copies)
    return True


def _add_run(plan: Plan, prepared: Prepared, found: Combined, start: Start) -> None:
    """Train a further run where the sampler lacks a mode; the sampler becomes the mixture of all runs."""
    clock, density = plan.clock, prepared.density
    number = len(found.runs)
    found.runs.append(Run(number))
    plan.bar.task = f"fit, {_stages.ADDED_RUN}"
    with clock.part(_stages.ADDED_RUN):
        once = replace(plan, escalate=False)  # a mixture may drop it, and chains can mend what is left
        make_run(Attempt(once, prepared, found.runs[-1], plan.seed + number, start))
    plan.bar.task = "fit"
    found.plain = found.sampler = found.best.flow(plan, density)
    found.multimodal = None
    with clock.part(_stages.COMPARING):
        _compare(plan, density, found)
    found.added += 1


def _search(plan: Plan, density: LogDensity, found: Combined, sampler: Sampler) -> Search:
    with density.clock.watching():
        z, log_q = sampler.draw(density.affordable(SEARCHED_DRAWS))
    modes = [mode for run in found.runs for mode in run.modes]
    wandering = not (
        sampler is found.best.flow(plan, density) and found.best.best is not None and found.best.best.nearly_uniform
    )
    space = latent_of(sampler, density) if wandering else None
    return missed_modes(density, modes, z, log_q, sampler.log_prob, seed=plan.seed, wandering=wandering, space=space)


def _start_at_missed_mode(plan: Plan, prepared: Prepared, found: Combined) -> Start | None:
    """Return a start where the runs so far lack a mode: the next run trains there."""
    outcomes = [run.best for run in found.runs[:-1] if run.best is not None and run.best.weighed]
    if not outcomes:
        return None
    sampler: Sampler = outcomes[0].flow
    if len(outcomes) > 1:
        names = coordinate_names(prepared.density.structure)
        sampler = FlowMixture.of([outcome.flow for outcome in outcomes], compare(outcomes, names).weights)
    missed = _search(plan, prepared.density, found, sampler).missed
    return missed[0].start if missed else None


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
    found.plain = found.sampler = FlowMixture.of(flows, weights)
