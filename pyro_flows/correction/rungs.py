"""A sampler inside of a fit: in the place of further rounds of training, and at the end where nothing else sufficed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from pyro_flows import _checks
from pyro_flows._clock import Clock
from pyro_flows._progress import Bar
from pyro_flows._seeding import derive
from pyro_flows.correction.judging import Work
from pyro_flows.correction.latent import Latent
from pyro_flows.correction.refine import CHAINS, MAX_STEPS, METHODS, SELDOM, refined
from pyro_flows.correction.sampler import SUBCHAINS, Sampler
from pyro_flows.correction.starts import PLAIN, starting_points
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.model.log_density import LogDensity
from pyro_flows.results.record import Record, Recorded
from pyro_flows.verdict.chains import Chains, objections

BEGUN_FROM, WORTH = 4000, 0.02  # draws of a round, and the effective share of them from which a sampler is tried
ATTEMPT, LAST = 300_000, 1_500_000  # gradients at most: in the place of a round, and where nothing else is left
MOST_PLAIN, PLAIN_NUMBERS = 40_000_000, 5e11  # gradients in plain coordinates, and numbers that they write: 5 minutes
CHEAPER = "sampling cost less than another round of training"


def which(refine: Any) -> str | None:
    """Return the method that ``fit(refine=...)`` asks for, None for none.

    Raises:
        ValueError: for another word.
    """
    if refine is False:
        return None
    return _checks.choice("refine", "auto" if refine is True else refine, METHODS)


def last_rung(
    posterior: Recorded, method: str, clock: Clock, bar: Bar, chains: Chains | None = None, *, searched: bool = False
) -> Recorded:
    """Refine what a fit came to, if its verdict is unreliable and its clock leaves time for that.

    With ``chains`` that began at its draws and are enough, from :func:`attempt`, they are judged, whatever the verdict.
    ``searched`` says that a search for modes that the guide lacks has found none.
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
    work = Work(method, CHEAPER, most=LAST, searched=searched)
    found = refined(begun, work, CHAINS, MAX_STEPS if chains is None else 0, seed, own, bar)
    gradients = found.history[-1]["details"]["gradients"]
    if _flow_is_in_vain(found, posterior, method) and own.interrupted is None and not own.over:
        work = Work(PLAIN, CHEAPER, most=_plain_gradients(posterior))
        again = refined(posterior, work, CHAINS, MAX_STEPS, seed, own, bar)
        gradients += again.history[-1]["details"]["gradients"]
        again = replace(again, history=(*found.history, again.history[-1]))
        found = again if again.verdict.status == "refined" else replace(found, history=again.history)
    clock.interrupted = own.interrupted
    spent = {"seconds": clock.elapsed}
    if "gradient_evaluations" in posterior.settings:
        spent["gradient_evaluations"] = posterior.settings["gradient_evaluations"] + gradients
    return replace(found, settings={**found.settings, **spent})


def _flow_is_in_vain(found: Record, posterior: Record, method: str) -> bool:
    """Whether chains in the space of the flow did not do, and hardly any of its draws have weight: it may hinder them.

    A flow that was trained on one of very many modes bends the space between them.
    """
    hopeless = posterior.verdict.ess_ratio < SELDOM and posterior.flow is not None and posterior._need_density().batched
    return method == "auto" and found.verdict.status == "unreliable" and hopeless


def _plain_gradients(posterior: Record) -> float:
    """Return how many gradients chains without the help of a flow may take: the more, the cheaper they are."""
    return min(MOST_PLAIN, PLAIN_NUMBERS / posterior._need_density().written)


@torch.no_grad()
def attempt(flow: Flow, density: LogDensity, names: Sequence[str], draws: int, *, seed: int, bar: Bar) -> Chains | None:
    """Try a sampler where a round of training did not suffice, for less than another round; None if it does not either.

    Cost: 40,000 to 300,000 gradients. A round of training takes 256 for each of thousands of steps.
    """
    with density.clock.watching():
        z, log_q = flow.draw(BEGUN_FROM)
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
