"""Missed modes of the globals, with latents in plates integrated out: the search, and a sampler that has them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_flows.fitting.combine import MAX_COPIES
from pyro_flows.fitting.multimodal import MultimodalCandidate, candidate_of
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.guides.collapsed import FEW_PARTS, FULL_UP_TO, climb, start_of_globals
from pyro_flows.guides.integrated import MOST_DRAWS
from pyro_flows.guides.marginal_density import MarginalDensity
from pyro_flows.inference.modes.missed_modes import mirrored
from pyro_flows.inference.modes.missed_regions import Guide, MissedRegion, Score, guide_at, is_resolved, moments
from pyro_flows.inference.modes.population_monte_carlo import MOST_PARTS, Parts, about, fitted
from pyro_flows.inference.modes.symmetries import group
from pyro_flows.inference.modes.unverified_modes import distinct
from pyro_flows.inference.record import Stage
from pyro_flows.inference.starts.prior import units_of
from pyro_flows.inference.verdict.deciding import CHECKED, ESTIMATED_DRAWS, UNSEARCHED, Draw
from pyro_flows.support.thresholds import ROW_MODE_SHARE

COPIES = "symmetric copies"


def missed(density: MarginalDensity, draw: Draw, score: Score, *, seed: int) -> list[MissedRegion]:
    """Return regions that a guide of the globals misses: images under exact moves, or ends of climbs from the prior.

    Cost: a pass over all rows for each of ten draws and each move; the rest by eight minibatches.
    """
    usable = guide_at(density, score, *draw(CHECKED))
    if usable is None:
        return []
    guide, z, log_q, _ = usable
    rough = MarginalDensity(density.marginal.with_parts(FEW_PARTS))
    found = mirrored(guide, z[:10], log_q[:10], rough)  # images that a guide lacks, it lacks at nearly all draws
    return [region for region in found or _climbed(guide, density, z, seed) if is_resolved(density, region.place)]


def with_modes(
    density: MarginalDensity, flow: Flow | FlowMixture, regions: list[MissedRegion], draws: int, *, seed: int
) -> MultimodalCandidate | None:
    """Return a sampler that has the missed regions too; None if there is none that weights correct.

    Images under exact moves have copies of the flow, whatever else is missed: places without a move are often beside
    such an image. If there is no exact move, or the copies are too many, a mixture begins at draws of the flow and at
    Laplace approximations of the new modes, and takes so many ``draws`` in each generation; none if there are no draws.
    """
    moves = [region.move for region in regions if region.move is not None]
    rows = [] if isinstance(flow, Flow) else zip(flow.orders.tolist(), flow.signs.tolist(), strict=True)
    known = [(tuple(order), tuple(signs)) for order, signs in rows]
    copies = group([*known, *moves], MAX_COPIES) if moves else None
    if copies:
        said = f"the posterior has symmetric modes: the flow has {len(copies)} copies"
        return MultimodalCandidate(FlowMixture.copied(flow, copies), said, Stage(COPIES), True)
    if not draws:
        return None
    with torch.no_grad():
        own = about(flow().sample((ESTIMATED_DRAWS,)), 1 if isinstance(flow, Flow) else MOST_PARTS // 2)
    few = density.marginal.with_parts(FEW_PARTS)
    modes = [mode for region in regions if (mode := start_of_globals(few, region.place)) is not None]
    if own is None or not modes:
        return None
    loc = torch.cat([own.loc, *(mode[None] for mode, _ in modes)])
    roots = torch.cat([own.roots, *((scale if scale.dim() == 2 else scale.diag())[None] for _, scale in modes)])
    weights = torch.cat([own.log_weights, own.log_weights.new_zeros(len(modes))])  # which the draws mend
    best = fitted(density, Parts(loc, roots, torch.log_softmax(weights, 0), own.df), seed=seed, draws=draws)
    tried = None if best is None else candidate_of(best, "", {"new modes": len(modes), "parts": len(best.parts)})
    return tried if tried is not None and tried.enough else None


def sought(density: MarginalDensity) -> str:
    """Return the note on what was searched."""
    draws, climbs = _searches(density)
    return f"{UNSEARCHED}, but for exact symmetries, and climbs from {climbs} of {draws} draws of the prior"


def _searches(density: MarginalDensity) -> tuple[int, int]:
    """Return how many draws of the prior there are, and from how many is climbed: fewer where each takes long."""
    share = density.marginal.most_draws / MOST_DRAWS
    return round(share * 256), max(1, round(share * 3))


def _climbed(guide: Guide, density: MarginalDensity, z: Tensor, seed: int) -> list[MissedRegion]:
    """Return the ends of climbs from draws of the prior that the guide lacks, and that are about as high as its own."""
    draws, climbs = _searches(density)
    values = density.prior(draws, seed=seed)
    if values is None or density.dim > FULL_UP_TO:
        return []
    few = density.marginal.with_parts(FEW_PARTS)
    own = climb(few, z.mean(0))
    starts = density.unconstrain(values).to(z)
    order = torch.nan_to_num(few(starts), nan=-torch.inf).argsort(descending=True)
    ends = [mode for start in starts[order[:climbs]] if (mode := climb(few, start)) is not None]
    if own is None or not ends:
        return []
    modes = torch.stack(ends)
    thin = guide.is_under_covered(modes, density(modes))
    high = few(modes) - few(own[None]) > math.log(ROW_MODE_SHARE)
    lacking = [*modes[thin & high]]
    lacking = [lacking[number] for number in distinct(lacking, units_of(z))]
    return [MissedRegion(mode, moments(mode[None], "prior")) for mode in lacking]
