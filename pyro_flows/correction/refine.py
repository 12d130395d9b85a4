"""``posterior.refine()``: Markov chains that begin at a flow's draws."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import torch
from torch import Tensor

from pyro_flows import _checks, _journal, _stages
from pyro_flows._clock import Clock, unbounded
from pyro_flows._interrupts import STATE, interruptible
from pyro_flows._progress import Bar
from pyro_flows._seeding import derive, seeded
from pyro_flows._threads import few_threads
from pyro_flows._turns import alone
from pyro_flows.correction.hmc import anneal
from pyro_flows.correction.judging import Work, concluded
from pyro_flows.correction.latent import Latent
from pyro_flows.correction.sampler import CHAINS, HAMILTONIAN, MICROCANONICAL, SUBCHAINS, Sampler
from pyro_flows.correction.starts import NoStart, can_be_resumed, dispersed_points, flow_of
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.model.unchanged import identity
from pyro_flows.results.record import Record, Recorded
from pyro_flows.results.scoring import score_pool
from pyro_flows.verdict.chains import McmcDraws
from pyro_flows.verdict.deciding import POOL
from pyro_flows.verdict.thresholds import ESS_SHARE_COLLAPSED
from pyro_flows.verdict.weighing import resample, weigh

METHODS = ("auto", "hmc", "imh", "smc")
MAX_STEPS = 2000  # sweeps of each chain


def refine(
    posterior: Recorded, *, method: str, chains: int, max_steps: int, max_seconds: float, seed: int | None,
    progress: bool,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Recorded:  # fmt: skip
    """Do what :meth:`~pyro_flows.posterior.posterior.Record.refine` says."""
    _checks.choice("method", method, METHODS)
    _checks.integer("chains", chains, 16, 4096)
    if chains % SUBCHAINS:
        raise ValueError(f"chains: expected a multiple of {SUBCHAINS}, for superchains of as many, got {chains}.")
    _checks.integer("max_steps", max_steps, 1)
    seconds = _checks.seconds("max_seconds", max_seconds)
    seed = int(posterior.settings["seed"]) if seed is None else _checks.integer("seed", seed, 0)
    posterior._need_density()
    _journal.check(checkpoint)
    asked = {"method": method, "chains": chains, "max_steps": max_steps, "max_seconds": max_seconds, "seed": seed}

    def about() -> dict[str, object]:
        before = [] if posterior.chains is None else [posterior.chains.z, *posterior.chains.state.values()]
        parts = [posterior.z, posterior.log_p, posterior.log_weights], before
        draws = [_journal.checksum(part) for part in parts]
        return {"call": "refine", **asked, "draws": draws, **identity(posterior._need_model())}

    with interruptible(), Bar("refine", progress) as bar, _journal.keeping(checkpoint, about):
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
            with clock.part(_stages.SAMPLER):
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
    if work.method == "smc":
        work.annealed = anneal(latent, max(1024, chains), seed=seed, report=bar.show)
        z, weights = work.annealed.points.z, torch.zeros_like(work.annealed.points.log_p)
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
    if method == "imh":
        return 4
    if method == "hmc":
        return int(mixed)
    return int(mixed or posterior.verdict.ess_ratio >= ESS_SHARE_COLLAPSED)


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
        if not can_go_on(posterior):
            raise ValueError("sample: chains of an earlier version are not gone on with; refine(method='hmc') can be.")
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
