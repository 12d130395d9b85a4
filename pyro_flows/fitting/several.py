"""A sampler for a posterior of several modes: a mixture of Student-t distributions, begun at all modes of a survey."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyro_flows._progress import Bar
from pyro_flows._seeding import derive
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.parts import student_mixture
from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.population import Generation, Parts, begun, fitted
from pyro_flows.modes.survey import Survey, can_be_surveyed, climbed_from, has_new, survey
from pyro_flows.results.stage import Stage

ENOUGH_SHARE, ENOUGH_K = 0.3, 0.5  # of the mixture's draws: effective share, and k-hat
AGAIN = 3  # times that modes are looked for where weights are large
HEAVY, HEAVIEST = 10.0, 48  # times the mean weight, from which on a draw points to what is missing; draws
STAGE = "mixture at modes"


@dataclass(frozen=True)
class Several:
    """The mixture, how many modes it was begun at, what its draws are worth, and its entry in the history."""

    sampler: FlowMixture
    modes: int
    stage: Stage
    enough: bool


def several(
    density: LogDensity, z: Tensor, places: Tensor | None = None, *, seed: int, bar: Bar
) -> Several | None:
    """Survey the modes near and far of draws z (S, D), and fit a mixture to them; None for one mode, or many dimensions.

    ``places`` (N, D) are climbed from as well.

    Where a few draws of the mixture have large weights, climbs go on from these, and what they find joins in.
    """
    if not can_be_surveyed(density):
        return None
    seed = derive(seed, "several modes")
    found = survey(density, z, seed=seed)
    found = found if places is None else climbed_from(density, found, places)
    if len(found.weighty()) < 2:
        return None
    best = _fitted(density, begun(*_start(found)), seed, bar)
    for number in range(AGAIN):
        if best is None or best.k_hat < ENOUGH_K:
            break
        before, heavy = found, best.weights * len(best.weights) > HEAVY
        chosen = best.weights.masked_fill(~heavy, 0.0).topk(min(HEAVIEST, int(heavy.sum()))).indices
        found = climbed_from(density, found, best.z[chosen]) if len(chosen) else found
        if not has_new(found, before):
            break
        more = _fitted(density, begun(*_start(found)), derive(seed, f"again {number}"), bar)
        best = more if more is not None and more.worth > best.worth else best
    return None if best is None else _as_sampler(best, len(found.weighty()), found.over)


def _start(found: Survey) -> tuple[Tensor, Tensor, Tensor]:
    weighty = found.weighty()
    return weighty.modes, weighty.roots, weighty.evidence


def _fitted(density: LogDensity, parts: Parts, seed: int, bar: Bar) -> Generation | None:
    return fitted(density, parts, seed=seed, report=bar.show)


def _as_sampler(best: Generation, modes: int, over: bool) -> Several:
    parts = best.parts
    sampler = student_mixture(parts.loc, parts.roots, parts.log_weights.tolist(), df=parts.df)
    said = {"modes": modes, "parts": len(parts), "survey is over": over}
    stage = Stage(STAGE, k_hat=best.k_hat, ess_ratio=best.share, details=said)
    return Several(sampler, modes, stage, best.share >= ENOUGH_SHARE and best.k_hat < ENOUGH_K)
