"""``posterior.refine()``: chains that begin at a flow's draws, judged, and put into a new posterior."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_flows import _checks
from pyro_flows.bar import Bar
from pyro_flows.batching import alone
from pyro_flows.chains import ChainFigures, Chains, as_numbers, objections
from pyro_flows.clock import Clock, unbounded
from pyro_flows.correction.diagnostics import figures
from pyro_flows.correction.latent import Latent
from pyro_flows.correction.nuts import nuts
from pyro_flows.correction.sampler import KEPT, SUBCHAINS, Sampler
from pyro_flows.correction.search import lacks_of_chains
from pyro_flows.correction.smc import Annealed, anneal
from pyro_flows.correction.starts import NoStart, affine_flow, starting_points
from pyro_flows.flows import Flow
from pyro_flows.log_density import LogDensity
from pyro_flows.mixture import FlowMixture
from pyro_flows.randomness import derive, seeded
from pyro_flows.verdict import CHECKED, Verdict

if TYPE_CHECKING:
    from pyro_flows.posterior import Posterior

METHODS = ("auto", "hmc", "imh", "nuts", "smc")
FEWEST, MOST_CHAINS = 16, 4096
CHAINS = 128
MAX_STEPS = 2000  # sweeps of each chain
PARTICLES = 1024
NUTS_CHAINS = 4
BEGUN_FROM, WORTH = 4000, 0.02  # draws of a round, and the effective share of them from which a sampler is tried
ATTEMPT = 300_000  # gradients
SELDOM = 1e-3  # effective share of the flow's draws, below which independent proposals are in vain
ONE_THREAD_BELOW = 2**20  # numbers in one batch of likelihood terms
STAGE = "refinement"
TRIED = "a sampler has not finished: "
ASKED, CHEAPER = "it was asked for", "it took less than another round of training"
LEAST_DRAWS = 8  # of each chain, for its figures


@dataclass
class _Work:
    """What a refinement has come to so far: enough to be judged at any moment."""

    method: str
    why: str
    sampler: Sampler | None = None
    chains: Chains | None = None
    annealed: Annealed | None = None
    failures: list[str] = field(default_factory=list)
    gradients: int = 0


def refine(
    posterior: Posterior,
    *,
    method: str,
    chains: int,
    max_steps: int,
    max_seconds: float,
    seed: int | None,
    progress: bool,
) -> Posterior:
    """Do what :meth:`~pyro_flows.posterior.Posterior.refine` says."""
    _checks.choice("method", method, METHODS)
    _checks.integer("chains", chains, FEWEST, MOST_CHAINS)
    if chains % SUBCHAINS:
        raise ValueError(f"chains: expected a multiple of {SUBCHAINS}, for superchains of as many, got {chains}.")
    _checks.integer("max_steps", max_steps, 1)
    seconds = _checks.seconds("max_seconds", max_seconds)
    seed = int(posterior.settings["seed"]) if seed is None else _checks.integer("seed", seed, 0)
    posterior._need_density()
    if method == "nuts" and isinstance(posterior.flow, FlowMixture):
        raise ValueError("method: NUTS walks in the latent space of one flow, and this is a mixture; take 'auto'.")
    bar = Bar("refine", progress)
    found = _refined(posterior, method, chains, max_steps, seed, Clock(seconds, watch=bar.watch), bar)
    bar.close(found.verdict.status)
    return found


def _refined(
    posterior: Posterior, method: str, chains: int, max_steps: int, seed: int, clock: Clock, bar: Bar, why: str = ASKED
) -> Posterior:
    """Run the sampler under a clock, and judge what it came to."""
    density = posterior._need_density()
    with alone(), seeded(seed, density.device), _threads(posterior, chains), torch.no_grad():
        work = _Work(method, why)
        before = density.evaluations
        density.under(clock)
        try:
            with clock.part("the sampler"):
                _run(posterior, work, chains, max_steps, seed, bar)
            work.gradients = density.evaluations - before
            return _concluded(posterior, work, seed, clock)
        finally:
            density.under(unbounded())


def which(refine: Any) -> str | None:
    """Return the method that ``fit(refine=...)`` asks for, None for none.

    Raises:
        ValueError: for another word.
    """
    if refine is False:
        return None
    return _checks.choice("refine", "auto" if refine is True else refine, METHODS)


def last_rung(posterior: Posterior, method: str, clock: Clock, bar: Bar, chains: Chains | None = None) -> Posterior:
    """Refine what a fit came to, if its verdict is unreliable and its clock leaves time for that.

    With ``chains`` that began at its draws and are enough, from :func:`attempt`, they are judged, whatever the verdict.
    """
    left = clock.end - time.monotonic()
    asked = chains is not None or posterior.verdict.status == "unreliable"
    if not asked or clock.interrupted is not None or left <= 0.0:
        return posterior
    if method == "nuts" and isinstance(posterior.flow, FlowMixture):
        method = "auto"
    bar.watch("a sampler")
    own = Clock(left, raises=clock.raises, watch=bar.watch)
    seed = int(posterior.settings["seed"])
    begun = posterior if chains is None else replace(posterior, chains=chains)
    found = _refined(begun, method, CHAINS, MAX_STEPS if chains is None else 0, seed, own, bar, CHEAPER)
    clock.interrupted = own.interrupted
    spent = {"seconds": clock.elapsed}
    if "gradient_evaluations" in posterior.settings:
        spent["gradient_evaluations"] = posterior.settings["gradient_evaluations"] + found.history[-1]["gradients"]
    return replace(found, settings={**found.settings, **spent})


@torch.no_grad()
def attempt(flow: Flow, density: LogDensity, names: Sequence[str], draws: int, *, seed: int, bar: Bar) -> Chains | None:
    """Try a sampler where a round of training did not suffice, for less than another round; None if it does not either.

    Cost: 40,000 to 300,000 gradients. A round of training takes 256 for each of thousands of steps.
    """
    z, log_q = flow.rsample_and_log_prob((BEGUN_FROM,))
    ratios = (density(z) - log_q).double()
    weights = torch.softmax(torch.where(torch.isfinite(ratios), ratios, -torch.inf), 0).nan_to_num(nan=0.0)
    if not float(weights.square().sum()) * len(z) * WORTH < 1.0 or not bool(weights.sum() > 0.0):
        return None
    starts = starting_points(z, weights.log(), CHAINS // SUBCHAINS, seed=derive(seed, "starts of chains"))
    kept = math.ceil(draws / CHAINS)
    given: dict[str, Any] = {"chains": CHAINS, "kept": kept, "seed": seed, "independence": 1}
    sampler = Sampler.begin(Latent(flow, density), names, starts, **given)
    found = sampler.run(MAX_STEPS, bar.show, gradients=ATTEMPT)
    if found is None or objections(found):
        return None
    chains = sampler.chains()
    return replace(chains, numbers={**chains.numbers, "method": "auto"})


@contextmanager
def _threads(posterior: Posterior, chains: int) -> Iterator[None]:
    """One thread for small problems, where threads cost more than they save, as in :func:`~pyro_flows.fit`."""
    before = torch.get_num_threads()
    density = posterior._need_density()
    if chains * density.numbers < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def flow_of(posterior: Posterior) -> Flow | FlowMixture:
    """Return the guide's flow or mixture; an affine one with the moments of the draws, if the guide is none."""
    if posterior.flow is not None and getattr(posterior.flow, "base", "student_t") != "uniform":
        return posterior.flow
    return affine_flow(posterior.z, posterior.log_weights)


def latent_of(posterior: Posterior) -> Latent:
    """Return the latent space of a posterior's flow."""
    return Latent(flow_of(posterior), posterior._need_density())


def _run(posterior: Posterior, work: _Work, chains: int, max_steps: int, seed: int, bar: Bar) -> None:
    """Do the sampler's work; where no chain can begin, that is what speaks against the draws."""
    try:
        _sample(posterior, work, chains, max_steps, seed, bar)
    except NoStart as error:
        work.failures.append(str(error))


def _sample(posterior: Posterior, work: _Work, chains: int, max_steps: int, seed: int, bar: Bar) -> None:
    latent, names = latent_of(posterior), posterior.coordinates
    earlier = posterior.chains
    wanted = math.ceil(len(posterior.z) / chains)
    if earlier is not None and work.method in ("auto", earlier.numbers["method"]) and "kernel" in earlier.numbers:
        work.method = earlier.numbers["method"]
        kept, seed = math.ceil(len(posterior.z) / earlier.count), int(earlier.numbers["seed"])
        work.sampler = Sampler(latent, names, earlier, kept=kept, seed=seed)
        work.sampler.run(work.sampler.numbers["sweeps"] + max_steps, bar.show)
        return
    weights = posterior.log_weights
    if not bool(torch.isfinite(posterior.log_p).any()):
        raise NoStart("no draw of the guide has a finite density")
    if work.method == "nuts":
        _run_nuts(posterior, work, latent, min(max_steps, len(posterior.z) // NUTS_CHAINS), seed)
        return
    z = posterior.z
    if work.method == "smc":
        work.annealed = anneal(latent, max(PARTICLES, chains), seed=seed, report=bar.show)
        z, weights = work.annealed.points.z, torch.zeros_like(work.annealed.points.log_p)
    z = starting_points(z, weights, chains // SUBCHAINS, seed=derive(seed, "starts of chains"))
    work.sampler = Sampler.begin(
        latent, names, z, chains=chains, kept=wanted, seed=seed, independence=_proposals(posterior, work.method)
    )
    work.sampler.run(max_steps, bar.show)


def _proposals(posterior: Posterior, method: str) -> int:
    """How many independent proposals go with each Hamiltonian move."""
    mixed = isinstance(posterior.flow, FlowMixture)
    if method == "imh":
        return 4
    if method == "hmc":
        return int(mixed)
    return int(mixed or posterior.verdict.ess_ratio >= SELDOM)


def _run_nuts(posterior: Posterior, work: _Work, latent: Latent, draws: int, seed: int) -> None:
    starts = starting_points(posterior.z, posterior.log_weights, NUTS_CHAINS, seed=derive(seed, "starts of chains"))
    x, k = latent.place(starts)
    z, stats, _ = nuts(latent, x, draws=draws, warm_up=min(draws, 500))
    state = {"superchain": torch.arange(len(x)), "began": k}
    work.chains = Chains(z, stats, state, {"method": "nuts", "seed": seed, "sweeps": draws})


# the verdict --------------------------------------------------------------------------------------------------------


def _concluded(posterior: Posterior, work: _Work, seed: int, clock: Clock) -> Posterior:
    """Judge the chains, and return the posterior with what they came to."""
    chains, found = _come_to(posterior, work)
    against = [*work.failures, *([] if found is None else objections(found))]
    if found is None and not against:
        against = [f"chains have fewer than {LEAST_DRAWS} draws"]
    failures, notes = list[str](), list[str]()
    if not against and chains is not None:
        with clock.part("the search for modes that the chains lack"):
            failures, notes = _checked(posterior, chains, seed)
    against += clock.reasons()
    verdict = _verdict(posterior.verdict, found, against, failures, notes, work.why)
    history = (*posterior.history, _entry(work, found, verdict))
    evidence = posterior.log_evidence
    if work.annealed is not None and math.isfinite(work.annealed.log_evidence):
        evidence = work.annealed.log_evidence
    result = replace(posterior, verdict=verdict, chains=chains, history=history, stored=None, log_evidence=evidence)
    if verdict.status == "refined" and chains is not None:
        return _with_draws(result, chains)
    return _raw(result) if posterior.verdict.status != verdict.status else result


def _come_to(posterior: Posterior, work: _Work) -> tuple[Chains | None, ChainFigures | None]:
    """Return the chains and their figures, if they have draws enough for these."""
    if work.sampler is not None:
        under_way = work.sampler.chains()
        under_way = replace(under_way, numbers={**under_way.numbers, "method": work.method})
        return under_way, work.sampler.figures() if under_way.z.shape[1] >= LEAST_DRAWS else None
    chains = work.chains if work.chains is not None else posterior.chains
    if work.chains is None or chains is None:
        return chains, None
    state = chains.state
    return chains, figures(
        chains.z,
        chains.stats,
        posterior.coordinates,
        superchain=state["superchain"],
        began=state["began"],
        sweeps=int(chains.numbers["sweeps"]),
    )


def _checked(posterior: Posterior, chains: Chains, seed: int) -> tuple[list[str], list[str]]:
    """Return what speaks against chains that have converged, in words, and what was not looked at."""
    density, flow = posterior._need_density(), flow_of(posterior)
    complaint = density.complaint(chains.z.flatten(0, 1)[:: max(1, chains.z[..., 0].numel() // CHECKED)])
    invalid = [] if complaint is None else [f"the model is invalid at some draws: {complaint}"]
    ratios = posterior.log_p - posterior.log_q
    covered = float(ratios[torch.isfinite(ratios)].median())
    lacks, notes = lacks_of_chains(density, chains, flow.log_prob, covered, posterior.history, seed=seed)
    return [*invalid, *lacks], notes


def _verdict(
    old: Verdict, found: ChainFigures | None, against: list[str], failures: list[str], notes: list[str], why: str
) -> Verdict:
    """Say ``refined`` if nothing is against it; else what was said before, and why the chains change nothing."""
    notes = [*old.notes, *(note for note in notes if note not in old.notes)]
    reasons = tuple(reason for reason in old.reasons if not reason.startswith(TRIED))
    if failures:
        return replace(old, status="unreliable", reasons=(*failures, *reasons), notes=tuple(notes), chains=found)
    if not against:
        return replace(old, status="refined", reasons=reasons or (why,), notes=tuple(notes), chains=found)
    said = TRIED + "; ".join(against)
    if old.status in ("ok", "corrected"):
        return replace(old, notes=(*(note for note in notes if not note.startswith(TRIED)), said), chains=found)
    return replace(old, status="unreliable", reasons=(*reasons, said), notes=tuple(notes), chains=found)


def _entry(work: _Work, found: ChainFigures | None, verdict: Verdict) -> dict[str, Any]:
    entry: dict[str, Any] = {"stage": STAGE, "elbo": None, "method": work.method, "status": verdict.status}
    entry |= {"gradients": work.gradients, "figures": as_numbers(found)}
    if work.sampler is not None:
        entry |= {"sweeps": work.sampler.numbers["sweeps"], "kernel": work.sampler.kernel.stored()}
    if work.annealed is not None:
        entry["temperatures"] = list(work.annealed.temperatures)
        entry["log_evidence"] = work.annealed.log_evidence
        entry["standard_error"] = work.annealed.standard_error
    return entry


def _with_draws(posterior: Posterior, chains: Chains) -> Posterior:
    """Put the chains' draws in the place of the draws to use, one chain after the other."""
    used = chains.z.flatten(0, 1)
    log_p = chains.stats["lp"].flatten()
    return replace(
        posterior,
        samples=posterior._need_density().constrain(used),
        used=used,
        used_log_p=log_p,
        used_log_q=log_p - chains.stats["log_weight"].flatten(),
    )


def _raw(posterior: Posterior) -> Posterior:
    """Put the guide's draws in the place of the draws to use: nothing better can be relied on."""
    return replace(
        posterior,
        samples=posterior._need_density().constrain(posterior.z),
        used=posterior.z,
        used_log_p=posterior.log_p,
        used_log_q=posterior.log_q,
    )


def more_draws(posterior: Posterior, count: int, *, seed: int) -> Tensor:
    """Return ``count`` further unconstrained draws (n, D) in the way of the verdict: see ``Posterior.sample``."""
    from pyro_flows.scoring import score_pool
    from pyro_flows.verdict import POOL, resample, weigh

    density = posterior._need_density()
    if posterior.verdict.status == "refined" and posterior.chains is not None:
        chains = posterior.chains
        if "kernel" not in chains.numbers:
            raise ValueError("sample: chains of NUTS are not gone on with; refine(method='hmc') can be.")
        with alone(), seeded(seed, density.device), _threads(posterior, chains.count), torch.no_grad():
            own = derive(seed, f"more draws {chains.numbers['seed']}")
            sampler = Sampler(latent_of(posterior), posterior.coordinates, chains, kept=KEPT, seed=own)
            return sampler.more(math.ceil(count / chains.count)).transpose(0, 1).flatten(0, 1)[:count]
    flow = posterior.flow
    if flow is None:
        raise ValueError(f"sample: {posterior.missing.get('flow', 'there is no flow')}. Draw from the guide itself.")

    def draw(many: int) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = flow.rsample_and_log_prob((many,))
        return found

    with alone(), seeded(derive(seed, "more draws"), density.device), torch.no_grad():
        if posterior.verdict.status != "corrected":
            return draw(count)[0]
        pool = score_pool(density, draw, POOL * max(count, 1000))
        weighing = weigh(pool.z, pool.log_p, pool.log_q)
        return pool.z[resample(weighing.log_weights, count, seed=seed)]
