"""The search for modes that chains miss: the same search as for a guide, repeated with draws of the chains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_flows.inference.chains.sampler import Sampler
from pyro_flows.inference.chains.starts import mixes_with_others
from pyro_flows.inference.modes.missed_modes import Search, missed_modes
from pyro_flows.inference.modes.missed_regions import (
    BY_WALKERS,
    TRUNCATED_TAIL,
    Guide,
    MissedRegion,
    are_separated,
    to_name,
)
from pyro_flows.inference.modes.symmetries import SignedPermutation
from pyro_flows.inference.modes.truncated_tails import with_truncated_tails
from pyro_flows.inference.modes.under_covered import Space
from pyro_flows.inference.record import Stage
from pyro_flows.inference.starts.curvature import SMALL_UP_TO
from pyro_flows.inference.starts.prior import in_units
from pyro_flows.inference.verdict.chains import McmcDraws
from pyro_flows.inference.verdict.deciding import LOOKED_AT_DRAWS, SEARCHED_DRAWS
from pyro_flows.inference.verdict.psis import psis
from pyro_flows.inference.verdict.weighing import bridge_value
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.numbers import mixing
from pyro_flows.support.process import stages
from pyro_flows.support.process.ledger import counted
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import (
    DENSITY_GAP_OF_WALKERS,
    K_HAT_MOST,
    MISSED_MASS_ERRORS,
    MISSED_MASS_SHARE,
    R_HAT_OF_SHORT_CHAINS,
    REGION_MASS_SHARE,
)

TOO_LITTLE, MISS = "the chains have too little mass", "the chains miss a mode"  # which longer chains may have
HELD_OUT = 4  # one superchain of so many
NO_PLACE = BY_WALKERS, TRUNCATED_TAIL  # starts that stand for more than the region of a normal distribution


@dataclass(frozen=True)
class MissedByChains:
    """What chains miss, in words, what was not checked, and the missed regions as entries of the history.

    ``symmetries`` take the mode that chains are in to some of these regions.
    """

    failures: list[str]
    notes: list[str] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    symmetries: list[SignedPermutation] = field(default_factory=list)


def noted(search: Search | None, stage: str = stages.SEARCH) -> list[Stage]:
    """Return what a fit's history keeps of a search, for a sampler to look at later: places and spreads as lists.

    Above 50 dimensions, it keeps the standard deviations of a place, and not its correlations.
    """
    missed = [] if search is None else [region for region in search.missed if region.start.name not in NO_PLACE]
    if search is None or not missed:
        return []
    scales = [region.start.scale for region in missed]
    spreads = [s.norm(dim=1) if s.dim() == 2 and len(s) > SMALL_UP_TO else s for s in scales]
    details = {
        "sentence": search.sentence,
        "places": [region.start.loc.tolist() for region in missed],
        "spreads": [spread.tolist() for spread in spreads],
        "drawn": [_with_mass(region).tolist() for region in missed],
    }
    return [Stage(stage, details=details)]


@counted(stages.MISSED_BY_CHAINS)
def missed_by_chains(
    density: LogDensity, chains: McmcDraws, score: Callable[[Tensor], Tensor], covered: float, evidence: float,
    history: Sequence[Mapping[str, Any]], *, seed: int, searched: bool = False,
    sampler: Sampler | None = None, space: Space | None = None,
) -> MissedByChains:  # fmt: skip
    """Return what chains miss, in words, and what was not checked.

    The search of :func:`~pyro_flows.inference.modes.missed_modes` begins at draws of the chains. They count as draws of
    the posterior, :math:`\\log q = \\log p - \\log Z`, but a region is searched where the flow has too little density.
    What this search finds, and what the search of the fit had found, is a failure unless the chains visit the region:
    superchains agree on the share of their draws inside, and it is as large as the mass of the region requires, or 2 %
    where that mass is not known. If a search from the flow's own draws has found nothing, and chains stay where the
    flow has enough density, another search would begin at the same points, and is not made. A region that chains
    visit does not end the search: its next part may find one that they miss.

    ``score`` is the log density of the flow, ``covered`` the log of the mass that it covers, ``evidence`` that of all.
    ``searched`` says that a search from the flow's draws has found nothing. If chains of the ``sampler`` that begin at
    some places mix with the others, these places are not missed. ``space`` is the latent space of the flow, if its own
    weights are good enough to estimate where it has too little density.
    """
    other = held_out(chains)
    z, log_p = chains.z[other].flatten(0, 1), chains.stats["lp"][other].flatten()
    generator = torch.Generator().manual_seed(derive(seed, "draws to search from"))
    chosen = torch.randperm(len(z), generator=generator)[:SEARCHED_DRAWS].to(z.device)
    seed = derive(seed, "modes that chains lack")
    search, regions = Search(), _Regions(density, chains, evidence, seed)

    def mixes(places: Tensor) -> bool:
        return sampler is not None and mixes_with_others(sampler, places)

    def left(missed: list[MissedRegion]) -> list[MissedRegion]:
        missed = [region for region, covered in zip(missed, regions.cover(missed), strict=True) if not covered]
        return [] if missed and mixes(torch.stack([_with_mass(region) for region in missed])) else missed

    thin = Guide(density, score, covered).is_under_covered(z[chosen], log_p[chosen], by=DENSITY_GAP_OF_WALKERS)
    if not searched or float(thin.double().mean()) > MISSED_MASS_SHARE:
        log_q = log_p[chosen] - covered
        search = missed_modes(density, [], z[chosen], log_q, score, seed=seed, space=space, sift=left)
    found = _not_visited(history, regions, mixes)
    worth = math.inf if chains.figures is None else chains.figures.ess_tail
    all_ = chains.z.flatten(0, 1)
    even = all_, torch.zeros_like(all_[:, 0])
    search = with_truncated_tails(search, density, lambda: even, worth=worth, seed=seed)
    if search.missed:
        place = (search.sentence or "").partition(" near ")[2]
        said = f"{TOO_LITTLE if to_name(search.missed)[0].beside else MISS} near {place}"
        found.append(said)
        search = replace(search, sentence=said)
    symmetries = [region.symmetry for region in search.missed if region.symmetry is not None]
    return MissedByChains(found, list(search.notes), noted(search, stages.SEARCH_BY_CHAINS), symmetries)


def _not_visited(history: Sequence[Mapping[str, Any]], regions: _Regions, mixes: Callable[[Tensor], bool]) -> list[str]:
    """Return what the search of the last guide found, and those of earlier chains, if these chains miss some of it.

    Chains visit a region, or chains that begin there mix with them. Another search may fail to find a region again.
    """
    guides, earlier = (
        [stage["details"] for stage in history if stage["stage"] == name]
        for name in (stages.SEARCH, stages.SEARCH_BY_CHAINS)
    )
    z, found = regions.chains.z, []
    for search in (*guides[-1:], *earlier):
        parts = search["places"], search["spreads"], search.get("drawn", search["places"])  # none in older files
        each = zip(*([z.new_tensor(value) for value in part] for part in parts), strict=True)
        drawn = [point for place, spread, point in each if not regions.visited(place, spread, point)]
        found += [search["sentence"]] if drawn and not mixes(torch.stack(drawn)) else []
    return found


def _with_mass(region: MissedRegion) -> Tensor:
    """Return a point (D,) with a good part of a region's mass."""
    return region.place if region.drawn is None else region.drawn


def held_out(chains: McmcDraws) -> Tensor:
    """Return which chains (C,) a search begins at: those of every fourth superchain; every fourth of a few.

    A normal distribution with the moments of draws is denser at these draws than at others: in 70 dimensions by two
    nats, so that it would seem to have too little density at others.
    """
    superchain = chains.state["superchain"]
    number = superchain if len(superchain.unique()) >= HELD_OUT else torch.arange(len(superchain))
    return (number % HELD_OUT == HELD_OUT - 1).to(chains.z.device)


def visits_all(
    density: LogDensity, chains: McmcDraws, missed: Sequence[MissedRegion], evidence: float, *, seed: int
) -> bool:
    """Whether chains visit all regions that a guide misses; those that only walkers have found do not count."""
    regions = _Regions(density, chains, evidence, seed)
    return all(regions.cover([region for region in missed if region.start.name != BY_WALKERS]))


def bridge(from_q: Tensor, from_p: Tensor) -> float:
    """Return the log evidence by bridge sampling, from log weights log p - log q at draws of q and at draws of p."""
    from_q, from_p = from_q.double(), from_p.double()
    from_q, from_p = from_q[torch.isfinite(from_q)], from_p[torch.isfinite(from_p)]
    middle = float(from_q.median())  # where the iteration begins
    return bridge_value(from_p - middle, from_q - middle, len(from_p) / (len(from_p) + len(from_q)))[0] + middle


class _Regions:
    """Whether chains have the mass of regions about a place."""

    def __init__(self, density: LogDensity, chains: McmcDraws, evidence: float, seed: int) -> None:
        self.density, self.chains, self.evidence = density, chains, evidence
        self.seed = derive(seed, "regions")

    def cover(self, missed: Sequence[MissedRegion]) -> list[bool]:
        """Whether chains visit regions that a search found; what is no single region counts as missed.

        A region may be so wide that draws of another mode are inside: some of these have to climb to the region's mode.
        """
        near = [self.inside(region.start.loc, region.start.scale) for region in missed]
        went = [
            region.start.name not in NO_PLACE
            and self.visited(region.start.loc, region.start.scale, _with_mass(region), inside)
            for region, inside in zip(missed, near, strict=True)
        ]
        asked = [number for number, region in enumerate(missed) if went[number] and not region.beside]
        if asked:
            places = torch.stack([missed[number].place for number in asked])
            compared = torch.stack([near[number].flatten() for number in asked])
            apart = are_separated(self.density, places, self.chains.z.flatten(0, 1), compared)
            for number, lies_apart in zip(asked, apart, strict=True):
                went[number] = not lies_apart
        return went

    @torch.no_grad()
    def visited(self, loc: Tensor, scale: Tensor, drawn: Tensor, inside: Tensor | None = None) -> bool:
        """Whether chains visit the region of a normal distribution: superchains agree on its share, which is enough.

        A region need not be visited if importance weights show that it has next to no mass. They tell nothing of a
        region whose mass lies outside of the normal, as ``drawn`` from it shows. If half of the draws are inside, no
        weights are needed. Where a guide covers little of the posterior, such as a normal distribution in a funnel,
        maxima of the density look like missed modes.
        """
        inside = self.inside(loc, scale) if inside is None else inside
        share = float(inside.double().mean())
        if share < REGION_MASS_SHARE:  # more is never needed
            needed, most = self._needed(loc, scale)
            if most < MISSED_MASS_SHARE and bool(_inside((drawn - loc)[None], scale)):
                return True
            if share < needed:
                return False
        if share == 1.0:
            return True
        nested = mixing.nested_r_hat(inside.double()[..., None], self.chains.state["superchain"])
        return float(nested[0]) <= R_HAT_OF_SHORT_CHAINS

    def inside(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Return which of the chains' draws (C, N) are among those that a normal distribution would draw."""
        z = self.chains.z
        return _inside(z.flatten(0, 1) - loc, scale).reshape(z.shape[:2])

    def _needed(self, loc: Tensor, scale: Tensor) -> tuple[float, float]:
        """Return the share that chains have to have, and the most that a region may hold, infinite if it is not known.

        Both are found by importance sampling from the normal, where that can be done.
        """
        with seeded(self.seed, self.density.device):
            noise = torch.randn(LOOKED_AT_DRAWS, len(loc), dtype=loc.dtype, device=loc.device)
        away = noise * scale if scale.dim() == 1 else noise @ scale.mT
        size = (scale if scale.dim() == 1 else scale.diagonal()).abs().log().sum()
        log_g = -0.5 * noise.square().sum(1) - size - 0.5 * len(loc) * math.log(2.0 * math.pi)
        ratios = (self.density(loc + away) - log_g).double()
        ratios = torch.where(torch.isfinite(ratios) & _inside(away, scale), ratios, -torch.inf)
        if not bool(torch.isfinite(ratios).any()):
            return MISSED_MASS_SHARE, math.inf
        k_hat = psis(ratios)[1]
        weights = (ratios - self.evidence).exp()
        mean, error = float(weights.mean()), MISSED_MASS_ERRORS * float(weights.std()) / math.sqrt(LOOKED_AT_DRAWS)
        needed = REGION_MASS_SHARE * min(mean - error, 1.0)
        return (needed, mean + error) if k_hat < K_HAT_MOST else (max(MISSED_MASS_SHARE, needed), math.inf)


def _inside(away: Tensor, scale: Tensor) -> Tensor:
    """Whether points (S, D), relative to the center of a normal distribution, are among those that it would draw.

    Squared distances are up to three standard deviations above their mean, those of a chi-square.
    """
    dim = away.shape[1]
    return in_units(away, scale).square().sum(1) < dim + 3.0 * math.sqrt(2.0 * dim)
