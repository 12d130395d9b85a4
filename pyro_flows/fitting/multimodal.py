"""The methods for several modes: a mixture of Student-t distributions, and tables of independent coordinates.

Independent coordinates are tabulated one by one, whatever the number of modes. For other posteriors, a mixture of
Student-t distributions begins at all modes of a survey. If it is not accepted, in few dimensions, another one is
tempered from the prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.fitting.rounds import weighed
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.parts import student_mixture, tabulated
from pyro_flows.inference.modes.population_monte_carlo import (
    Generation,
    Parts,
    begun,
    can_be_tempered,
    fitted,
    tempered_mixture,
)
from pyro_flows.inference.modes.separable import PROBES, is_separable, marginals
from pyro_flows.inference.modes.survey import IN_VAIN, ROUNDS, Survey, can_be_surveyed, climbed_from, has_new, survey
from pyro_flows.inference.record import Stage
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.starts.prior import units_of
from pyro_flows.inference.verdict.deciding import LOOKED_AT_DRAWS, weights_correct
from pyro_flows.inference.verdict.methods import INDEPENDENT, MIXTURE, TABULATED
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process.progress import Bar
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import ESS_SHARE_COLLAPSED, ESS_SHARE_PROMISING


@dataclass(frozen=True)
class MultimodalCandidate:
    """The sampler, what it is in words, its entry in the history, and whether its draws are good enough."""

    sampler: Flow | FlowMixture
    said: str
    stage: Stage
    enough: bool


def multimodal(
    density: LogDensity, z: Tensor, near: Tensor | None = None,
    *, seed: int, bar: Bar, barrier: float = 0.0, ridges: bool = False,
) -> MultimodalCandidate | None:  # fmt: skip
    """Survey the modes near and far of draws z (S, D), and fit a sampler to them; None if there is none.

    With ``ridges``, points of ridges and edges count as modes. ``near`` (N, D) are climbed from as well. Once there
    is a mixture, the survey goes on from its draws with large weights, and from where it is thin. With a ``barrier``,
    modes count as several only if the density falls by so many nats on the straight line between the best one and
    another. Without one, independent coordinates are tabulated even if no mode was found: tops may be sharp edges,
    where no climb comes to rest. They are not independent if they depend on each other at one of ``near``.
    """
    if not can_be_surveyed(density):
        return None
    seed = derive(seed, "several modes")
    found = survey(density, z, seed=seed, rounds=IN_VAIN, climbs=96, ridges=ridges)  # until there is a second mode
    found = found if near is None else climbed_from(density, found, near)
    likely = found.likely()
    apart = len(likely) > 1 and (_has_barrier(density, likely.modes, barrier) or _are_apart(likely, seed))
    if not apart and barrier:
        return None
    places = likely.modes if near is None else torch.cat([z[:1], near, likely.modes])
    separable = is_separable(density, z, seed=seed, modes=places)
    product = None
    if separable:
        places, units = likely.modes, likely.roots[:1].norm(dim=2).flatten()
        if not len(likely):
            places, units = z[density(z).nan_to_num(nan=-torch.inf).argmax()][None], units_of(z, full=False)
        product = _tabulated(density, places, units, len(likely), seed)
    if product is not None:
        return product
    if not apart:
        return _by_tempering(density, None, seed, bar)
    found = found if separable else survey(density, z, seed=seed, rounds=ROUNDS, before=found)
    tried = _begun_at(density, found, seed, bar)
    return tried if tried is not None and (tried.enough or barrier) else _by_tempering(density, tried, seed, bar)


def _begun_at(density: LogDensity, found: Survey, seed: int, bar: Bar) -> MultimodalCandidate | None:
    """Return a mixture that begins at all modes of a survey, and at those of up to three more from its draws."""
    best = fitted(density, _begun(found), seed=seed, report=bar.show)
    for number in range(3):  # further surveys
        if best is None:
            break
        before, again = found, derive(seed, f"again {number}")
        found = _survey_again(density, found, best, again)
        if not has_new(found, before):
            break
        more = fitted(density, _begun(found), seed=again, report=bar.show)
        in_vain = more is None or more.worth < best.worth + ESS_SHARE_COLLAPSED
        best = more if more is not None and more.worth > min(best.worth, ESS_SHARE_PROMISING) else best
        if in_vain and best.worth < ESS_SHARE_PROMISING:
            break
    if best is None:
        return None
    count, modes = len(best.parts), len(found.likely())
    said = f"the posterior has several modes: a mixture of {count} Student-t distributions was begun at {modes}"
    return candidate_of(best, f"{said} of them", {"modes": modes, "parts": count, "survey is over": found.over})


def _by_tempering(
    density: LogDensity, other: MultimodalCandidate | None, seed: int, bar: Bar
) -> MultimodalCandidate | None:
    """Return a mixture that comes from the prior, in few dimensions, if it is better than another one."""
    parts = tempered_mixture(density, seed=seed) if can_be_tempered(density) else None
    best = None if parts is None else fitted(density, parts, seed=seed, report=bar.show)
    if best is None or (other is not None and best.share <= (other.stage.ess_ratio or 0.0)):
        return other
    said = f"a mixture of {len(best.parts)} Student-t distributions was fitted, by tempering from the prior"
    return candidate_of(best, said, {"parts": len(best.parts)})


@torch.no_grad()
def _has_barrier(density: LogDensity, modes: Tensor, barrier: float) -> bool:
    """Whether the density falls by ``barrier`` nats below both ends on a line from the first mode to another."""
    share = torch.linspace(0.0, 1.0, 17, dtype=modes.dtype, device=modes.device)[:, None, None]
    lines = modes[0] + share * (modes[1:] - modes[0])
    heights = density(lines.flatten(0, 1)).unflatten(0, lines.shape[:2]).nan_to_num(nan=-torch.inf)
    depths = torch.minimum(heights[0], heights[-1]) - heights.amin(0)
    return bool((depths >= barrier).any())


@torch.no_grad()
def _are_apart(found: Survey, seed: int) -> bool:
    """Whether two terms of the density hold draws of their own: a wide one may have no maximum beside a narrow one.

    A term holds draws if its mean share of the density at them is above .9.
    """
    own = found.of_terms.nonzero()[:, 0]
    if len(own) < 2:
        return False
    parts = begun(found.modes[own], found.roots[own], found.evidence[own])
    with seeded(seed, own.device):
        z = [parts[own[:0].new_tensor([number])].draw(100) for number in range(len(own))]
    shares = torch.stack([torch.softmax(parts.log_prob(part), 0)[number].mean() for number, part in enumerate(z)])
    return int((shares > 0.9).sum()) > 1


def _survey_again(density: LogDensity, found: Survey, best: Generation, seed: int) -> Survey:
    """Search for modes that a mixture misses: from draws with ten times the mean weight, and from low density."""
    heavy = best.weights * len(best.weights) > 10.0
    chosen = best.weights.masked_fill(~heavy, 0.0).topk(min(48, int(heavy.sum()))).indices
    found = climbed_from(density, found, best.z[chosen]) if len(chosen) else found

    def known(points: Tensor) -> Tensor:
        return torch.cat([torch.logsumexp(best.parts.log_prob(part), 0) for part in points.split(4096)])

    return survey(density, best.z, seed=seed, rounds=IN_VAIN, known=known, before=found)


@torch.no_grad()
def independent(density: LogDensity, starts: Sequence[Start], *, seed: int) -> MultimodalCandidate | None:
    """Tabulate the coordinates around the first of some starts, and around modes; None if they are not independent."""
    if not can_be_surveyed(density):
        return None
    seed = derive(seed, "independent coordinates")
    modes = [start.loc for start in starts if start.evidence is not None]
    places = torch.stack([starts[0].loc, *modes])
    with seeded(seed, density.device):
        z = starts[0].map(torch.randn(2 * PROBES, density.dim, dtype=density.dtype, device=density.device))
    found = is_separable(density, z, seed=seed, modes=places)
    return _tabulated(density, places, starts[0].sds, len(modes), seed) if found else None


@torch.no_grad()
def _tabulated(density: LogDensity, places: Tensor, units: Tensor, modes: int, seed: int) -> MultimodalCandidate | None:
    """Tabulate independent coordinates; None where a table is too coarse, or weights say that they are not."""
    table = marginals(density, places[0], places, units)
    if table is None:
        return None
    try:
        sampler = tabulated(table.values, table.log_density).to(density.dtype)
    except ValueError:
        return None
    with seeded(seed, density.device):
        found = weighed(sampler, density, LOOKED_AT_DRAWS)
    name = TABULATED if density.dim == 1 else INDEPENDENT
    stage = Stage(name, k_hat=found.k_hat, ess_ratio=found.share, details={"modes": modes})
    alone = "the density was tabulated on a grid"
    said = alone if density.dim == 1 else "the coordinates are independent, so the density of each was tabulated"
    said = f"the posterior has several modes: {said}" if modes > 1 else said
    return MultimodalCandidate(sampler, said, stage, True) if weights_correct(found.share, found.k_hat) else None


def _begun(found: Survey) -> Parts:
    likely = found.likely()
    return begun(likely.modes, likely.roots, likely.evidence)


def candidate_of(best: Generation, said: str, details: dict[str, object]) -> MultimodalCandidate:
    """Return a mixture that was fitted, as a sampler, and whether weights correct its draws."""
    parts = best.parts
    sampler = student_mixture(parts.loc, parts.roots, parts.log_weights.tolist(), df=parts.df)
    stage = Stage(MIXTURE, k_hat=best.k_hat, ess_ratio=best.share, details=details)
    return MultimodalCandidate(sampler, said, stage, weights_correct(best.share, best.k_hat))
