"""Modes that chains lack: the search that a guide's draws go through, made once more with those of the chains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_flows import _arviz
from pyro_flows._seeding import derive
from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.missed_modes import SHARE, WANDERED, Search, missed_modes
from pyro_flows.results.stage import Stage
from pyro_flows.starts.portfolio import Start
from pyro_flows.verdict.chains import Chains

SEARCHED = 1000  # draws of the chains
STAGE = "search for missed modes"
SETTLED = 1.05  # nested R-hat of whether a chain is in a region
INSIDE = 3.0  # standard deviations of a chi-square: draws of a normal distribution that lie farther out do not count


def noted(search: Search | None) -> list[Stage]:
    """Return what a fit\'s history keeps of a search, for a sampler to look at later: places and spreads as lists."""
    lacks = [] if search is None else [lack for lack in search.lacks if lack.start.name != WANDERED]
    if not lacks:
        return []
    spreads = [s if s.dim() == 1 else s.norm(dim=1) for s in (lack.start.scale for lack in lacks)]
    sentence = search.sentence if search is not None else ""
    places = {"places": [lack.start.loc.tolist() for lack in lacks], "spreads": [spread.tolist() for spread in spreads]}
    return [Stage(STAGE, details={"sentence": sentence, **places})]


def lacks_of_chains(
    density: LogDensity,
    chains: Chains,
    score: Callable[[Tensor], Tensor],
    covered: float,
    history: Sequence[Mapping[str, Any]],
    *,
    seed: int,
) -> tuple[list[str], list[str]]:
    """Return what chains lack, in words, and what was not looked at.

    The search of :func:`~pyro_flows.modes.missed_modes` is made with draws of the chains. They count as draws of the
    posterior, :math:`\\log q = \\log p - \\log Z`, but a place is thin where the flow is. What it finds, and what the
    search of the fit had found, is a failure unless the chains go in and out there: at least 2 % of their draws are
    inside, and superchains agree on how many.

    Args:
        density: log p, unnormalised.
        chains: that have converged, as far as their own figures tell.
        score: log density of the flow or mixture.
        covered: log of the mass that the flow covers.
        history: of the fit.
        seed: of the search.
    """
    z, log_p = chains.z.flatten(0, 1), chains.stats["lp"].flatten()
    generator = torch.Generator().manual_seed(derive(seed, "draws to search from"))
    chosen = torch.randperm(len(z), generator=generator)[:SEARCHED].to(z.device)
    seed = derive(seed, "modes that chains lack")
    search = missed_modes(density, [], z[chosen], log_p[chosen] - covered, score, seed=seed)
    before = [stage["details"] for stage in history if stage["stage"] == STAGE]
    found = []
    for stage in before[-1:]:  # of the last guide
        pairs = zip(stage["places"], stage["spreads"], strict=True)
        if not all(_visited(chains, z.new_tensor(place), z.new_tensor(spread)) for place, spread in pairs):
            found.append(str(stage["sentence"]))
    if search.lacks and not all(_covers(chains, lack.start) for lack in search.lacks):
        place = (search.sentence or "").partition(" near ")[2].removesuffix("; try runs=4")
        what = "have too little" if search.lacks[0].start.name == WANDERED else "lack a mode"
        found.append(f"the chains {what} near {place}")
    return found, list(search.notes)


def _covers(chains: Chains, start: Start) -> bool:
    """Whether chains go in and out of a place that a search found; what draws wandered to counts as it is."""
    return start.name != WANDERED and _visited(chains, start.loc, start.scale)


@torch.no_grad()
def _visited(chains: Chains, loc: Tensor, scale: Tensor) -> bool:
    """Whether chains go in and out of the region of a normal distribution, and agree on the share of it."""
    away = chains.z - loc
    flat = away.flatten(0, 1)
    units = flat / scale if scale.dim() == 1 else torch.linalg.solve_triangular(scale, flat.mT, upper=False).mT
    dim = chains.z.shape[-1]
    inside = (units.square().sum(1) < dim + INSIDE * math.sqrt(2.0 * dim)).reshape(away.shape[:2])
    share = float(inside.double().mean())
    if share < SHARE:
        return False
    if share == 1.0:
        return True
    found = _arviz.chain_diagnostics(inside.double()[..., None], chains.state["superchain"])
    return float(found["nested_r_hat"][0]) <= SETTLED
