"""``posterior.refine()``: Markov chains that begin at a flow's draws; and MCMC as the fallback of a fit."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.inference.chains.judging import Work, around, concluded, covered_by, evidence_of
from pyro_flows.inference.chains.latent import Latent
from pyro_flows.inference.chains.sampler import CHAINS, HAMILTONIAN, MICROCANONICAL, SUBCHAINS, Sampler
from pyro_flows.inference.chains.search import MISS, missed_by_chains
from pyro_flows.inference.chains.starts import NoStart, can_be_resumed, dispersed_points, flow_of
from pyro_flows.inference.record import Record, Recorded
from pyro_flows.inference.scoring import LASTING, score_pool
from pyro_flows.inference.starts.curvature import SMALL_UP_TO
from pyro_flows.inference.verdict.chains import McmcDiagnostics, McmcDraws, objections
from pyro_flows.inference.verdict.deciding import LOOKED_AT_DRAWS, POOL, raw_weights
from pyro_flows.inference.verdict.weighing import resample, weigh
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.unchanged import identity
from pyro_flows.support import checks
from pyro_flows.support.process import journal, stages
from pyro_flows.support.process.clock import Clock, unbounded
from pyro_flows.support.process.interrupts import STATE, interruptible
from pyro_flows.support.process.ledger import accepted
from pyro_flows.support.process.progress import Bar
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.process.threads import alone, few_threads
from pyro_flows.support.thresholds import ESS_OF_MCMC, ESS_SHARE_COLLAPSED, R_HAT_CONVERGED

METHODS = ("auto", "hmc")
MAX_STEPS = 2000  # sweeps of each chain


def refine(
    posterior: Recorded, *, method: str, chains: int, max_steps: int, max_seconds: float, seed: int | None,
    progress: bool,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Recorded:  # fmt: skip
    """Do what :meth:`~pyro_flows.posterior.posterior.Record.refine` says."""
    checks.choice("method", method, METHODS)
    checks.integer("chains", chains, 16, 4096)
    if chains % SUBCHAINS:
        raise ValueError(f"chains: expected a multiple of {SUBCHAINS}, for superchains of as many, got {chains}.")
    checks.integer("max_steps", max_steps, 1)
    seconds = checks.seconds("max_seconds", max_seconds)
    seed = int(posterior.settings["seed"]) if seed is None else checks.integer("seed", seed, 0)
    posterior._need_density()
    checkpoint = journal.check(checkpoint)
    asked = {"method": method, "chains": chains, "max_steps": max_steps, "max_seconds": max_seconds, "seed": seed}

    def about() -> dict[str, object]:
        before = [] if posterior.chains is None else [posterior.chains.z, *posterior.chains.state.values()]
        parts = [posterior.z, posterior.log_p, posterior.log_weights], before
        draws = [journal.checksum(part) for part in parts]
        return {"call": "refine", **asked, "draws": draws, **identity(posterior._need_model())}

    with interruptible(), Bar("refine", progress) as bar, journal.keeping(checkpoint, about):
        work = Work(method, "refine() was called", most=posterior._need_density().most_gradients)
        STATE.hold(True)
        found = refined(posterior, work, chains, max_steps, seed, Clock(seconds, watch=bar.watch), bar)
        bar.close(f"{found.method}, {found.verdict.status}")
    settings = {**found.settings, "refinements": [*found.settings.get("refinements", []), asked]}
    if "gradient_evaluations" in settings:
        settings["gradient_evaluations"] += work.gradients
    return replace(found, settings=settings)


def refined(
    posterior: Recorded, work: Work, chains: int, max_steps: int, seed: int, clock: Clock, bar: Bar
) -> Recorded:
    """Run the sampler under a clock, and judge what it came to."""
    density = posterior._need_model()
    with alone(), seeded(seed, density.device), few_threads(density.numbers, chains), torch.no_grad():
        before = density.evaluations
        density.under(clock)
        try:
            with clock.part(stages.SAMPLER):
                try:
                    _sample(posterior, work, chains, max_steps, seed, bar)
                except NoStart as error:  # which is what speaks against the draws
                    work.failures.append(str(error))
            work.gradients = density.evaluations - before
            return concluded(posterior, work, seed, clock)
        finally:
            density.under(unbounded())


def _sample(posterior: Recorded, work: Work, chains: int, max_steps: int, seed: int, bar: Bar) -> None:
    density, names, earlier = posterior._need_model(), posterior.coordinates, posterior.chains
    latent = Latent(flow_of(posterior), density)
    wanted = math.ceil(len(posterior.z) / chains)
    if earlier is not None and work.method in ("auto", earlier.numbers["method"]) and can_be_resumed(earlier):
        work.method = earlier.numbers["method"]
        kept, seed = math.ceil(len(posterior.z) / earlier.count), int(earlier.numbers["seed"])
        work.sampler = Sampler(latent, names, earlier, kept=kept, seed=seed)
        work.sampler.run(work.sampler.numbers["sweeps"] + max_steps, bar.show, gradients=work.most)
        return
    weights = posterior.log_weights
    if not bool(torch.isfinite(posterior.log_p).any()):
        raise NoStart("no draw of the guide has a finite density")
    z = posterior.z
    z = dispersed_points(latent, z, weights, chains // SUBCHAINS, seed=derive(seed, "starts of chains"))
    moves = HAMILTONIAN if work.method == "hmc" else MICROCANONICAL
    proposals = _proposals(posterior, work.method)
    work.sampler = Sampler.begin(
        latent, names, z, chains=chains, kept=wanted, seed=seed, independence=proposals, moves=moves
    )
    work.sampler.run(max_steps, bar.show, gradients=work.most)


def _proposals(posterior: Recorded, method: str) -> int:
    """How many independent proposals go with each move by the gradient."""
    mixed = isinstance(posterior.flow, FlowMixture)
    return int(mixed or (method == "auto" and posterior.verdict.ess_ratio >= ESS_SHARE_COLLAPSED))


def can_go_on(posterior: Record) -> bool:
    """Whether the draws to use are of chains that can be gone on with."""
    chains = posterior.chains
    known = chains is not None and can_be_resumed(chains)
    return known and posterior.verdict.status == "refined" and posterior.density is not None


def go_on(posterior: Record, chains: McmcDraws, each: int, *, seed: int) -> Tensor:
    """Return ``each`` further draws (C, n, D) of each chain, spaced as those that there are."""
    density = posterior._need_model()
    with alone(), seeded(seed, density.device), few_threads(density.numbers, chains.count), torch.no_grad():
        own = derive(seed, f"more draws {chains.numbers['seed']}")
        latent = Latent(flow_of(posterior), density)
        return Sampler(latent, posterior.coordinates, chains, kept=CHAINS, seed=own).more(each)


def more_draws(posterior: Record, count: int, *, seed: int) -> Tensor:
    """Return ``count`` further unconstrained draws (n, D) in the way of the verdict: see ``Posterior.sample``."""
    density = posterior._need_density()
    if posterior.verdict.status == "refined" and posterior.chains is not None:
        each = math.ceil(count / posterior.chains.count)
        return go_on(posterior, posterior.chains, each, seed=seed).transpose(0, 1).flatten(0, 1)[:count]
    flow = posterior.flow
    if flow is None:
        raise ValueError(f"sample: {posterior.missing.get('flow', 'there is no flow')}. Draw from the guide itself.")
    with alone(), seeded(derive(seed, "more draws"), density.device), torch.no_grad():
        if posterior.verdict.status != "corrected":
            drawn: Tensor = flow.draw(count)[0]
            return drawn
        pool = score_pool(density, flow.draw, POOL * max(count, 1000))
        weighing = weigh(pool.z, pool.log_p, pool.log_q)
        return pool.z[resample(weighing.log_weights, count, seed=seed)]


# the fallback of a fit: after a round of training that is not accepted, and at the end --------------------------------

ATTEMPT = 600_000  # gradients of chains, in the place of training or after it
CHEAPEST = 4.0  # times as many cheap gradients as costly ones, at most


def which(refine: object) -> str | None:
    """Return the method that ``fit(refine=...)`` asks for, None for none.

    Raises:
        ValueError: for another word.
    """
    if refine is False:
        return None
    return checks.choice("refine", "auto" if refine is True else refine, METHODS)


def fallback_sampler(
    posterior: Recorded, method: str, clock: Clock, bar: Bar, chains: McmcDraws | None = None, *,
    searched: bool = False, passed: bool = False,
) -> Recorded:  # fmt: skip
    """Refine what a fit came to, if its verdict is unreliable and its clock leaves time for that.

    With ``chains`` that began at its draws and are enough, from :func:`chains_of_flow`, they are judged, whatever the
    verdict. ``searched`` says that a search for modes that the guide misses has found none, ``passed`` that one for
    modes that these chains miss has been made.
    """
    left = clock.end - time.monotonic()
    asked = chains is not None or posterior.verdict.status == "unreliable"
    asked = asked and not any(reason.startswith(LASTING) for reason in posterior.verdict.reasons)
    if asked:
        clock.deliver_signal(stages.SAMPLER)
    if not asked or clock.interrupted is not None or left <= 0.0:
        return posterior
    bar.watch(stages.SAMPLER)
    own = Clock(left, raises=clock.raises, watch=bar.watch)
    own.asked = clock.asked
    seed = int(posterior.settings["seed"])
    begun = posterior if chains is None else replace(posterior, chains=chains)
    most = min(2.5 * ATTEMPT, posterior._need_model().most_gradients)  # nothing comes after it
    work = Work(method, "they were not good enough", most=most, searched=searched, passed=passed)
    found = refined(begun, work, CHAINS, MAX_STEPS if chains is None else 0, seed, own, bar)
    if chains is None and found.verdict.status == "refined":
        accepted("MCMC at the end")
    clock.interrupted = own.interrupted
    spent = {"seconds": clock.elapsed}
    if "gradient_evaluations" in posterior.settings:
        gradients = sum(stage["details"].get("gradients", 0) for stage in found.history[len(posterior.history) :])
        spent["gradient_evaluations"] = posterior.settings["gradient_evaluations"] + gradients
    return replace(found, settings={**found.settings, **spent})


@torch.no_grad()
def chains_of_flow(
    flow: Flow, density: LogDensity, names: Sequence[str], draws: int, *, seed: int, bar: Bar
) -> McmcDraws | None:
    """Try a sampler where a round of training did not suffice; None if it does not either.

    Cost: 40,000 to 600,000 gradients, 1,200,000 where sds are not resolved before (above 50 dimensions), and up to four
    times as many cheap ones.
    """
    with density.clock.watching():
        z, log_q = flow.draw(LOOKED_AT_DRAWS)
    weights = raw_weights(density(z) - log_q)
    if weights is None:
        return None
    latent, most = Latent(flow, density), gradient_budget(density, ATTEMPT)
    found = chains_from(latent, names, z, weights.log(), draws, seed=seed, bar=bar, most=most, independence=1)
    return None if found is None else found[1]


@torch.no_grad()
def chains_miss_mode(chains: McmcDraws, flow: Flow, density: LogDensity, names: Sequence[str], *, seed: int) -> bool:
    """Whether chains in the space of a flow miss a mode, though they have converged; a search begins at their draws."""
    sampler = Sampler(Latent(flow, density), names, chains, kept=chains.z.shape[1], seed=int(chains.numbers["seed"]))
    given = (flow.log_prob, covered_by(flow, density), evidence_of(flow, around(chains), chains, density), ())
    missed = missed_by_chains(density, chains, *given, seed=seed, sampler=sampler)
    return any(said.startswith(MISS) for said in missed.failures)


def gradient_budget(density: LogDensity, gradients: float) -> float:
    """Return how many gradients take as long as so many costly ones: training costs the same, whatever they cost.

    Costs are the numbers that gradients write, and not seconds, so that one seed gives one answer. A costly gradient
    and the step of its chains write 80,000 numbers together; the step alone writes 6000. 600,000 costly ones take 20
    seconds, a round of training 20 to 50.
    """
    return gradients * min(max(80_000 / (6000 + density.written), 1.0), CHEAPEST)


def _only_lacks_draws(found: McmcDiagnostics) -> bool:
    """Whether superchains agree, and draws will be enough: more of them may cost less than to train a flow."""
    nearly = min(found.ess_bulk, found.ess_tail) >= ESS_OF_MCMC
    return nearly and found.nested_r_hat <= R_HAT_CONVERGED


def _gone_on(sampler: Sampler, found: McmcDiagnostics, spent: float, bar: Bar, patient: bool) -> McmcDiagnostics:
    """Go on with chains that will have draws enough before a flow could be trained; return their figures.

    In all they take twice `ATTEMPT` gradients at most, more if these are cheap. Chains that have converged, but whose
    standard deviations have too large errors, go on to that (`ATTEMPT` up to 50 dimensions). ``patient`` chains go on
    for this alone.
    """
    attempted = gradient_budget(sampler.latent.density, ATTEMPT)
    trained = 2.0 * attempted  # training takes as many as a sampler after it, if not small
    most = trained if sampler.latent.dim > SMALL_UP_TO else attempted
    while not sampler.resolved:
        more = most - spent
        if objections(found):
            needed = sampler.gradients_needed(found)
            more = min(max(attempted - spent, 1.5 * needed), trained - spent)  # the pace may fall
            if patient or not _only_lacks_draws(found) or needed > more:
                break
        elif objections(sampler.figures()):  # found may be of some coordinates only
            break
        if more <= 0.0:
            break
        spent += more
        found = sampler.run(MAX_STEPS, bar.show, gradients=more, patient=patient) or found
    return found


def chains_from(
    latent: Latent, names: Sequence[str], z: Tensor, log_weights: Tensor, draws: int, *, seed: int, bar: Bar,
    most: float, independence: int, patient: bool = True,
) -> tuple[Sampler, McmcDraws] | None:  # fmt: skip
    """Return chains that begin at weighted draws and suffice, for less than training a flow takes."""
    starts = dispersed_points(latent, z, log_weights, CHAINS // SUBCHAINS, seed=derive(seed, "starts of chains"))
    kept = math.ceil(draws / CHAINS)
    sampler = Sampler.begin(latent, names, starts, independence=independence, chains=CHAINS, kept=kept, seed=seed)
    short_of = 4.0 if patient else math.inf  # chains that sufficed never needed half of the gradients left
    found = sampler.run(MAX_STEPS, bar.show, gradients=most, patient=patient, short_of=short_of)
    if found is not None:
        found = _gone_on(sampler, found, most, bar, patient)
    if found is None or objections(found) or objections(sampler.figures()):  # by some coordinates, and by all
        return None
    chains = sampler.chains()
    return sampler, replace(chains, numbers={**chains.numbers, "method": "auto"})
