"""The third stage of a fit: runs are combined into one sampler, and missed modes are searched for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_flows.fitting.laplace_grid import with_tails_checked
from pyro_flows.fitting.multimodal import MultimodalCandidate, multimodal
from pyro_flows.fitting.programs import latent_of
from pyro_flows.fitting.rounds import Round, volume_misfit
from pyro_flows.fitting.run import begin_only, make_run
from pyro_flows.fitting.state import FitState, Run, Sampler
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.inference.chains.judging import around, evidence_of
from pyro_flows.inference.chains.refine import chains_miss_mode
from pyro_flows.inference.chains.search import visits_all
from pyro_flows.inference.modes.missed_modes import Search, missed_modes
from pyro_flows.inference.modes.missed_regions import BY_WALKERS, TRUNCATED_TAIL
from pyro_flows.inference.modes.propriety import improper_tails
from pyro_flows.inference.modes.symmetries import SignedPermutation, group
from pyro_flows.inference.modes.unverified_modes import MEASURED_PLACES
from pyro_flows.inference.record import Stage
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.verdict.deciding import ESTIMATED_DRAWS, LOOKED_AT_DRAWS, SEARCHED_DRAWS
from pyro_flows.inference.verdict.psis import psis
from pyro_flows.inference.verdict.verdict import NAMED
from pyro_flows.model.batching import quiet
from pyro_flows.model.dims import coordinate_names
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.numbers.mixing import r_hat
from pyro_flows.support.process import stages
from pyro_flows.support.process.ledger import accepted
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import EVIDENCE_GAP_OF_RUNS, R_HAT_CONVERGED

MAX_COPIES = 128  # of each flow: draws are scored by all of them


def make_runs(state: FitState) -> None:
    """Make as many runs as were asked for; each but the first starts where those before it miss a mode, if they do.

    A method that sufficed as coordinates were chosen, which is tried for one run only, leaves nothing to do.
    """
    plan = state.plan
    if state.improper:
        begin_only(state.runs[0])
        return
    if state.runs[0].best is not None:
        return
    for number in range(plan.runs):
        name = f"run {number + 1} of {plan.runs}"
        if number and plan.clock.over:
            plan.clock.skip(name)
            break
        if number:
            state.runs.append(Run(state, plan, number))
        plan.bar.task = "fit" if plan.runs == 1 else f"fit, {name}"
        with plan.clock.part(name, noted=False):
            if number and not plan.train_model:
                state.runs[-1].missed_mode = _missed_mode(state)
            make_run(state.runs[-1])
    plan.bar.task = "fit"


def combine(state: FitState) -> None:
    """Compare the runs, search for regions that their sampler misses, and add runs there."""
    clock, density = state.plan.clock, state.density
    state.plain = state.sampler = state.best.flow()
    state.improper = state.improper or state.best.improper
    if not state.improper:
        with clock.part(stages.PROPRIETY):
            state.improper = improper_tails(density, lambda: drawn(state), seed=state.plan.seed)
    if state.best.sampled:
        state.search = Search()
        if state.best.copies is not None:
            state.sampler, state.copies = state.best.copies, len(state.best.copies.components)
    elif not state.improper:
        _combine(state)


def drawn(state: FitState) -> Tensor:
    """Return draws near the posterior: of chains that sufficed, of a mixture, or of the best flow."""
    multimodal, chains, sampler = state.runs[0].multimodal, state.best.chains, state.sampler
    assert sampler is not None
    if chains is not None:
        return chains.z.flatten(0, 1)
    return (multimodal.sampler if multimodal is not None and multimodal.enough else sampler).draw(SEARCHED_DRAWS)[0]


def _combine(state: FitState) -> None:
    plan, clock, tried = state.plan, state.plan.clock, state.runs[0].multimodal
    if tried is not None:
        state.surveys = 1
        _take(state, tried)
    if not clock.over and isinstance(state.plain, Flow):
        with clock.part(stages.VARIANCE):
            state.failures = volume_misfit(state.plain, state.density)
    if len(state.kept) > 1:
        with clock.part(stages.COMPARING):
            _compare(state)
    if plan.train_model:
        state.density.forget()
    _look(state)
    if plan.escalate and not plan.train_model:
        _complete(state)


def _take(state: FitState, tried: MultimodalCandidate) -> bool:
    """Make a mixture at all modes the sampler, if it is good enough; say whether it is."""
    if tried.enough:
        accepted(f"combined: {tried.stage.stage}")
        state.multimodal, state.plain, state.sampler, state.copies = tried, tried.sampler, tried.sampler, 1
        state.failures, state.disagreements = [], []  # which are about a flow
    return tried.enough


def _look(state: FitState) -> None:
    clock, sampler = state.plan.clock, state.sampler
    assert sampler is not None
    known = [] if state.search is None else [region.start for region in state.search.missed]
    with clock.part(stages.MISSED):
        state.search = None
        state.search = _search(state, sampler, known)
    if state.search is not None:
        with clock.part(stages.TAILS):
            state.search = with_tails_checked(state.search, state.density, sampler, seed=state.plan.seed)


def _complete(state: FitState) -> None:
    """Go on until the sampler misses no mode.

    If missed modes are images under exact symmetries, flows are copied, unless images are too many. Otherwise a mixture
    at all modes of a survey is tried, and then runs are added.
    """
    plan = state.plan
    if _chains_suffice(state):
        return
    missed = () if state.search is None else state.search.missed
    if all(region.start.name == BY_WALKERS for region in missed):
        return  # the flow has too little density next to where it lies: another run would begin at the same place
    moves: list[SignedPermutation] = []
    while state.search is not None and state.search.missed and not plan.clock.over:
        missed = state.search.missed
        if any(region.start.name == TRUNCATED_TAIL for region in missed):
            return
        more = [region.move for region in missed if region.move is not None and region.move not in moves]
        if more and _copied(state, [*moves, *more]):
            accepted("symmetric copies")
            moves += more
        elif state.surveys < 2 and _surveyed(state):
            moves = []
        else:
            chains_can = all(region.beside for region in missed) and plan.refine is not None  # so one run is enough
            most = 0 if state.multimodal is not None else 1 if chains_can else MEASURED_PLACES
            if group([*moves, *more], MAX_COPIES) is None:  # with some of the images, it would miss modes all the same
                state.sampler, state.copies = state.plain, 1
                return
            if state.added >= most:
                return
            accepted("run at a missed mode")
            _add_run(state, missed[0].start)
            _copied(state, moves)
        _look(state)


def _chains_suffice(state: FitState) -> bool:
    """Whether chains of the flow visit all regions that it misses; chains that miss a mode elsewhere are dropped.

    The chains are judged for themselves later.
    """
    chains, flow, density, search = state.best.chains, state.plain, state.density, state.search
    if chains is None or search is None or not isinstance(flow, Flow):
        return False
    seed = state.plan.seed
    with seeded(derive(seed, "places of chains"), density.device):
        evidence = evidence_of(flow, around(chains), chains, density)
    if not visits_all(density, chains, search.missed, evidence, seed=seed):
        return False
    if not all(region.beside for region in search.missed):
        with state.plan.clock.part(stages.MISSED_BY_CHAINS):
            if chains_miss_mode(chains, flow, density, coordinate_names(density.structure), seed=seed):
                state.best.chains = None
                return False
    return True


def _surveyed(state: FitState) -> bool:
    """Try a mixture at all modes of a survey; say whether it became the sampler."""
    plan, density, sampler, search = state.plan, state.density, state.sampler, state.search
    assert sampler is not None
    assert search is not None
    state.surveys += 1
    places = torch.stack([region.place for region in search.missed])
    seed = derive(plan.seed, f"survey {state.surveys}")
    with plan.clock.part(stages.SEVERAL):
        with seeded(seed, density.device):
            z = torch.cat([sampler.draw(SEARCHED_DRAWS)[0].to(places), places])
        tried = multimodal(density, z, places, seed=seed, bar=plan.bar)
        if tried is not None:
            state.history.append(tried.stage)
            return _take(state, tried)
    return False


def _copied(state: FitState, moves: Sequence[SignedPermutation]) -> bool:
    """Put a copy of each flow at each of its images under exact symmetries; say whether there are not too many.

    The density is the same at all images of a point. So all copies have the same mass, and none has to be trained.
    """
    copies = group(moves, MAX_COPIES)
    if not copies or state.plain is None:
        return False
    state.sampler, state.copies = FlowMixture.copied(state.plain, copies), len(copies)
    return True


def _add_run(state: FitState, start: Start) -> None:
    """Train a further run where the sampler misses a mode; the sampler becomes the mixture of all runs."""
    plan, clock = state.plan, state.plan.clock
    once = replace(plan, escalate=False)  # a mixture may drop it, and chains can mend what is left
    state.runs.append(Run(state, once, len(state.runs), start))
    plan.bar.task = f"fit, {stages.ADDED_RUN}"
    with clock.part(stages.ADDED_RUN):
        make_run(state.runs[-1])
    plan.bar.task = "fit"
    state.plain = state.sampler = state.best.flow()
    state.multimodal = None
    with clock.part(stages.COMPARING):
        _compare(state)
    state.added += 1


def _search(state: FitState, sampler: Sampler, known: Sequence[Start] = ()) -> Search:
    """Search for what a sampler misses; paths climb from ``known`` places too, which an earlier sampler missed."""
    density, best = state.density, state.best
    with density.clock.watching():
        z, log_q = sampler.draw(density.affordable(SEARCHED_DRAWS))
    modes = [*known, *(mode for run in state.runs for mode in run.modes)]
    wandering = not (sampler is best.flow() and best.best is not None and best.best.nearly_uniform)
    space = latent_of(sampler, density) if wandering else None
    seed = state.plan.seed
    return missed_modes(density, modes, z, log_q, sampler.log_prob, seed=seed, wandering=wandering, space=space)


def _missed_mode(state: FitState) -> Start | None:
    """Return a start where the runs so far miss a mode: the next run trains there."""
    outcomes = [run.best for run in state.runs[:-1] if run.best is not None and run.best.weighed]
    if not outcomes:
        return None
    sampler: Sampler = outcomes[0].flow
    if len(outcomes) > 1:
        names = coordinate_names(state.density.structure)
        sampler = FlowMixture.of([outcome.flow for outcome in outcomes], compare(outcomes, names)[1])
    missed = _search(state, sampler).missed
    return missed[0].start if missed else None


def _compare(state: FitState) -> None:
    """Compare runs; where they disagree, the sampler becomes their mixture."""
    runs = state.kept
    found, weights = compare([run.best for run in runs if run.best], coordinate_names(state.density.structure))
    said = {"agree": not found, "disagreements": found, "weights": weights}
    state.history.append(Stage("comparison of runs", details=said))
    if not found:
        return
    state.disagreements = list(found)
    flows = [run.flow() for run in runs]
    weights = balanced(flows, state.density, weights)
    state.history[-1] = Stage("comparison of runs", details={**said, "weights": weights})
    state.plain = state.sampler = FlowMixture.of(flows, weights)


# whether runs agree, and their mixture if they do not -----------------------------------------------------------------


@torch.no_grad()
def compare(outcomes: Sequence[Round], names: Sequence[str]) -> tuple[list[str], list[float]]:
    """Compare runs by rank-normalized R-hat over their draws, coordinate by coordinate, and by their log evidence.

    Return what they disagree on, and weights by which to mix them: proportional to the estimated evidence of each run
    that has one.
    """
    draws = torch.stack([outcome.flow().sample((LOOKED_AT_DRAWS,)) for outcome in outcomes])
    found = disagreements(dict(zip(names, r_hat(draws).tolist(), strict=True)))
    evidences = torch.tensor([outcome.weighing.log_evidence for outcome in outcomes], dtype=torch.float64)
    spread = float(evidences.max() - evidences.min())
    if not spread <= EVIDENCE_GAP_OF_RUNS:
        found.append(f"log evidences of the runs differ by {spread:.2f} nats")
    weights = torch.softmax(torch.nan_to_num(evidences, nan=-math.inf), 0)
    return found, weights.tolist()


def disagreements(r_hats: Mapping[str, float]) -> list[str]:
    """Name the worst coordinates that are above the threshold, and count the others."""
    above = {name: value for name, value in r_hats.items() if not value <= R_HAT_CONVERGED}
    worst = sorted(above, key=lambda name: -math.inf if math.isnan(above[name]) else -above[name])
    found = [f"runs disagree on {name} (R-hat {above[name]:.2f})" for name in worst[:NAMED]]
    others = len(worst) - len(found)
    if others:
        found[-1] += f" and on {others} more coordinate{'s' if others > 1 else ''}"
    return found


@torch.no_grad()
def balanced(flows: Sequence[Flow], density: LogDensity, weights: Sequence[float]) -> list[float]:
    r"""Return mixture weights that bring the mixture of ``flows`` as close to the posterior as they can.

    Evidences tell how much each run covers, but not that several runs cover the same. So the weights :math:`a_k`
    maximize :math:`E_p \log \sum_k a_k q_k`, over importance-weighted draws of all runs, by

    .. math:: a_k \leftarrow \sum_i w_i\, \frac{a_k q_k(z_i)}{\sum_l a_l q_l(z_i)}.

    Cost: 2000 draws of each run, scored by the model and by all runs.

    Reference: Cappé, Douc, Guillin, Marin and Robert 2008, "Adaptive importance sampling in general mixture classes"
    (arXiv 0710.4242).
    """
    z = torch.cat([flow().sample((ESTIMATED_DRAWS,)) for flow in flows])
    with quiet():  # draws that overflow have no density
        log_q = torch.stack([flow.log_prob(z) for flow in flows]).double().nan_to_num(nan=-torch.inf)
    ratios = density(z).double() - (torch.logsumexp(log_q, 0) - math.log(len(flows)))
    ratios = torch.where(torch.isfinite(ratios), ratios, -torch.inf)
    found = torch.tensor(weights, dtype=torch.float64, device=z.device)
    if not bool(torch.isfinite(ratios).any()):
        return found.tolist()
    draws = psis(ratios)[0].exp()
    for _ in range(200):
        shares = torch.softmax(found.log()[:, None] + log_q, 0).nan_to_num(nan=0.0)
        found = shares @ draws
        found = found / found.sum()
    return found.tolist()
