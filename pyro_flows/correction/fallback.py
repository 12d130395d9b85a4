"""MCMC as the fallback of a fit: after a round of training that is not accepted, and at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_flows import _checks, _stages
from pyro_flows._clock import Clock
from pyro_flows._ledger import accepted
from pyro_flows._progress import Bar
from pyro_flows._seeding import derive
from pyro_flows.correction.judging import Work, around, covered_by, evidence_of
from pyro_flows.correction.latent import Latent
from pyro_flows.correction.refine import MAX_STEPS, METHODS, refined
from pyro_flows.correction.sampler import CHAINS, SUBCHAINS, Sampler
from pyro_flows.correction.search import MISS, missed_by_chains
from pyro_flows.correction.starts import dispersed_points
from pyro_flows.flows.flow import Flow
from pyro_flows.model.log_density import LogDensity
from pyro_flows.results.record import Recorded
from pyro_flows.results.scoring import LASTING
from pyro_flows.starts.curvature import SMALL_UP_TO
from pyro_flows.verdict.chains import McmcDiagnostics, McmcDraws, objections
from pyro_flows.verdict.deciding import LOOKED_AT_DRAWS, raw_weights
from pyro_flows.verdict.thresholds import ESS_OF_MCMC, R_HAT_CONVERGED

ATTEMPT = 600_000  # gradients of chains, in the place of training or after it
CHEAPEST = 4.0  # times as many cheap gradients as costly ones, at most


def which(refine: object) -> str | None:
    """Return the method that ``fit(refine=...)`` asks for, None for none.

    Raises:
        ValueError: for another word.
    """
    if refine is False:
        return None
    return _checks.choice("refine", "auto" if refine is True else refine, METHODS)


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
        clock.deliver_signal(_stages.SAMPLER)
    if not asked or clock.interrupted is not None or left <= 0.0:
        return posterior
    bar.watch(_stages.SAMPLER)
    own = Clock(left, raises=clock.raises, watch=bar.watch)
    own.asked = clock.asked
    seed = int(posterior.settings["seed"])
    begun = posterior if chains is None else replace(posterior, chains=chains)
    most = 2.5 * ATTEMPT  # nothing comes after it
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
    trained = 2.0 * attempted  # training and the race before take as many as a sampler after it, if not small
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
