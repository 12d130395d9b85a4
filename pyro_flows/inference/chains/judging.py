"""The verdict on refined draws, and the new posterior that holds them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.inference.chains.sampler import Sampler
from pyro_flows.inference.chains.search import MissedByChains, bridge, held_out, missed_by_chains
from pyro_flows.inference.chains.starts import affine_flow, flow_of
from pyro_flows.inference.chains.stopping import unresolved
from pyro_flows.inference.modes.propriety import improper_tails
from pyro_flows.inference.modes.under_covered import is_usable
from pyro_flows.inference.record import Record, Recorded, Stage
from pyro_flows.inference.scoring import LASTING
from pyro_flows.inference.verdict.chains import McmcDiagnostics, McmcDraws, as_numbers, objections
from pyro_flows.inference.verdict.deciding import CHECKED, ESTIMATED_DRAWS, UNSEARCHED
from pyro_flows.inference.verdict.methods import METHODS
from pyro_flows.inference.verdict.verdict import IMPROPER, Verdict
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process import stages
from pyro_flows.support.process.clock import Clock
from pyro_flows.support.thresholds import (
    ESS_OF_MCMC,
    MISSED_MASS_OF_TAILS,
    MISSED_MASS_SHARE,
    SHIFT_ERRORS,
    SHIFT_MOST,
)

STAGE = "refinement"
TRIED = "the chains have not converged: "
DISAGREE = "the chains and the weighted draws of the guide disagree"
REPLACED = " own draws were replaced, because "
LEAST_DRAWS = 8  # of each chain, for its figures


@dataclass
class Work:
    """What a refinement has come to so far: enough to be judged at any moment."""

    method: str
    why: str
    most: float = math.inf  # gradients
    searched: bool = False  # for modes that the guide misses, and none was found
    passed: bool = False  # the chains went through the search for what they miss already
    sampler: Sampler | None = None
    failures: list[str] = field(default_factory=list)
    gradients: int = 0


def concluded(posterior: Recorded, work: Work, seed: int, clock: Clock) -> Recorded:
    """Judge the chains, and return the posterior with what they came to."""
    chains, found = posterior.chains, None
    if work.sampler is not None:
        chains = work.sampler.chains()
        chains = replace(chains, numbers={**chains.numbers, "method": work.method})
        found = work.sampler.figures() if chains.z.shape[1] >= LEAST_DRAWS else None
    against = [*work.failures, *([] if found is None else objections(found))]
    against += [reason for reason in posterior.verdict.reasons if reason.startswith(LASTING)]
    if found is None and not against:
        against = [f"they have fewer than {LEAST_DRAWS} draws each"]
    if not against and found is not None and chains is not None:
        against = unresolved(chains.z, found, posterior.coordinates)
    missed, old = MissedByChains([]), posterior.verdict
    if not against and chains is not None:
        with clock.part(stages.MISSED_BY_CHAINS):
            missed = _checked(posterior, chains, seed, work)
        if not posterior._need_model().by_rows:  # there was a search now
            old = replace(old, notes=tuple(note for note in old.notes if not note.startswith(UNSEARCHED)))
    against += clock.reasons()
    verdict = _verdict(old, found, against, missed.failures, missed.notes, work.why)
    searched = [stage.as_dict() for stage in missed.stages]
    history = (*posterior.history, *searched, _stage(work, found, verdict).as_dict())
    if posterior._of_mcmc and verdict.status != "refined":  # the draws to use stay the other sampler's
        chains, verdict = posterior.chains, replace(verdict, chains=posterior.verdict.chains)
    evidence = posterior.log_evidence
    if chains is not None and verdict.status == "refined" and not verdict.supports_evidence:
        density = posterior._need_model()
        if not density.by_rows:  # a bridge takes thousands of passes over all rows
            evidence = evidence_of(flow_of(posterior), around(chains), chains, density)
    result = replace(posterior, verdict=verdict, chains=chains, history=history, _stored=None, log_evidence=evidence)
    if verdict.status == "refined" and chains is not None:  # one chain after the other
        log_p = chains.stats["lp"].flatten()
        return _using(result, chains.z.flatten(0, 1), log_p, log_p - chains.stats["log_weight"].flatten())
    if posterior.verdict.status == verdict.status:
        return result
    return _using(result, result.z, result.log_p, result.log_q)  # the guide's own: nothing better can be relied on


def _checked(posterior: Record, chains: McmcDraws, seed: int, work: Work) -> MissedByChains:
    """Return what speaks against chains that have converged, in words, and what was not looked at."""
    density, flow = posterior._need_model(), flow_of(posterior)
    lost, rounded = density.lost_digits(chains.z.flatten(0, 1))
    complaint = density.complaint(chains.z.flatten(0, 1)[:: max(1, chains.z[..., 0].numel() // CHECKED)])
    invalid = [] if complaint is None else [f"the model is invalid at some draws: {complaint}"]
    if density.by_rows:  # a search takes thousands of passes over all rows
        return MissedByChains([*invalid, *lost, *disagreements(posterior, chains)], rounded)
    invalid += [*lost, *improper_tails(density, lambda: chains.z.flatten(0, 1), seed=seed)]
    if work.passed:
        return MissedByChains([*invalid, *disagreements(posterior, chains)], rounded)
    own = flow is posterior.flow  # else an affine one, that chains moved in
    covered = _middle(posterior.log_p - posterior.log_q) if own else covered_by(flow, density)
    given = (flow.log_prob, covered, evidence_of(flow, around(chains), chains, density), posterior.history)
    sampler, space = work.sampler, None
    if sampler is not None and sampler.latent.walkable and is_usable(posterior.log_weights.double()):
        space = sampler.latent
    missed = missed_by_chains(density, chains, *given, seed=seed, searched=work.searched, sampler=sampler, space=space)
    failures = [*invalid, *missed.failures, *disagreements(posterior, chains)]
    return replace(missed, failures=failures, notes=[*missed.notes, *rounded])


def around(chains: McmcDraws) -> Flow:
    """Return the affine flow with the moments of the chains' draws, those left out that a search begins at."""
    draws = chains.z[~held_out(chains)].flatten(0, 1)
    return affine_flow(draws, torch.zeros_like(draws[:, 0]))


@torch.no_grad()
def covered_by(flow: Flow | FlowMixture, density: LogDensity) -> float:
    """Return the log of the mass that a flow covers, estimated by its own draws."""
    z, log_q = flow.draw(ESTIMATED_DRAWS)
    return _middle(density(z) - log_q)


def _middle(ratios: Tensor) -> float:
    return float(ratios[torch.isfinite(ratios)].median())


@torch.no_grad()
def evidence_of(flow: Flow | FlowMixture, moments: Flow | FlowMixture, chains: McmcDraws, density: LogDensity) -> float:
    """Return the log evidence by a bridge from the chains to a half of flow and a half of their own ``moments``.

    The flow overlaps with chains that change modes, the moments with chains that went far out of the flow.
    """
    z, log_p = chains.z.flatten(0, 1), chains.stats["lp"].flatten()
    halves = flow, moments
    drawn = torch.cat([part.draw(ESTIMATED_DRAWS)[0] for part in halves])

    def log_half(points: Tensor) -> Tensor:
        parts = [part.log_prob(points).nan_to_num(nan=-math.inf) for part in halves]
        return torch.logaddexp(*parts) - math.log(2.0)

    return bridge(density(drawn) - log_half(drawn), log_p - log_half(z))


@torch.no_grad()
def disagreements(posterior: Record, chains: McmcDraws) -> list[str]:
    """Say so where chains differ from the guide's weighted draws, if these are good enough to tell.

    Chains whose steps are too long for a narrow part of the posterior stay out of it, all alike, so that no R-hat sees
    it. Draws of the guide may lie there. Wider chains are no fault, nor is the mean that their tail moves: a guide that
    lacks a tail can have good weights. So means are compared over the range of the guide's draws.
    """
    weights = posterior.log_weights.double().exp()
    effective = float(1.0 / weights.square().sum())
    if not posterior.k_hat < posterior.verdict.k_threshold or effective < ESS_OF_MCMC:
        return []
    draws, z = posterior.z.double(), chains.z.flatten(0, 1).double()
    mean = (weights[:, None] * draws).sum(0)
    away = (weights[:, None] * (draws - mean).square()).sum(0)
    fourth = (weights[:, None] * (draws - mean).pow(4)).sum(0) / away.square()
    error = ((fourth - 1.0).clamp_min(0.0) / (4.0 * effective)).sqrt()  # of the log of an sd
    within = (z >= draws.amin(0)) & (z <= draws.amax(0))
    middle = torch.where(within, z, 0.0).sum(0) / within.sum(0)
    shift, ratio = (middle - mean).abs() / away.sqrt(), (away.sqrt() / z.std(0)).log()
    chance = SHIFT_ERRORS / math.sqrt(effective)
    excess = torch.maximum(shift - chance, ratio - SHIFT_ERRORS * error) - SHIFT_MOST
    ordered, outside = z.sort(0).values, int(MISSED_MASS_OF_TAILS * len(z))
    edges = ordered[outside], ordered[-1 - outside]  # torch.quantile took 16 million numbers at most for long
    beyond = torch.stack(
        [(weights[:, None] * (draws < edges[0])).sum(0), (weights[:, None] * (draws > edges[1])).sum(0)]
    )
    noise = SHIFT_ERRORS * math.sqrt(MISSED_MASS_OF_TAILS / effective)
    excess = torch.maximum(excess, beyond.amax(0) - MISSED_MASS_OF_TAILS - MISSED_MASS_SHARE - noise)
    worst = int(excess.nan_to_num(nan=math.inf).argmax())
    if float(excess[worst]) <= 0.0:
        return []
    where = posterior.coordinates[worst]
    return [f"{DISAGREE} on {where}, so one of them misses a region"]


def _verdict(
    old: Verdict, found: McmcDiagnostics | None, against: list[str], failures: list[str], notes: list[str], why: str
) -> Verdict:
    """Say ``refined`` if nothing is against it; else what was said before, and why the chains change nothing."""
    kept = [note for note in old.notes if not note.startswith(TRIED)]
    notes = [*kept, *(note for note in notes if note not in kept)]
    known = (reason.rpartition(REPLACED)[2] for reason in old.reasons)
    reasons = tuple(reason for reason in known if not reason.startswith(TRIED))
    if improper := tuple(failure for failure in failures if failure.startswith(IMPROPER)):
        return replace(old, status="unreliable", k_hat=math.nan, reasons=improper, notes=(), chains=found)
    if failures:
        others = [reason for reason in reasons if reason not in failures]
        return replace(old, status="unreliable", reasons=(*failures, *others), notes=tuple(notes), chains=found)
    if not against:
        first, *others = reasons or (why,)
        first = f"{METHODS[old.guide_method].owner}{REPLACED}{first}"
        return replace(old, status="refined", reasons=(first, *others), notes=tuple(notes), chains=found)
    said = TRIED + ", ".join(against)
    if old.status in ("ok", "corrected"):
        return replace(old, notes=(*notes, said), chains=found)
    return replace(old, status="unreliable", reasons=(*reasons, said), notes=tuple(notes), chains=found)


def _stage(work: Work, found: McmcDiagnostics | None, verdict: Verdict) -> Stage:
    entry: dict[str, object] = {"method": work.method, "status": verdict.status}
    entry |= {"gradients": work.gradients, "figures": as_numbers(found)}
    if work.sampler is not None:
        entry |= {"sweeps": work.sampler.numbers["sweeps"], "kernel": work.sampler.kernel.stored()}
    return Stage(STAGE, details=entry)


def _using(posterior: Recorded, used: Tensor, log_p: Tensor, log_q: Tensor) -> Recorded:
    """Put draws (S, D) in the place of the draws to use."""
    samples = posterior._need_model().constrain(used)
    return replace(posterior, samples=samples, _used=used, _used_log_p=log_p, _used_log_q=log_q)
