"""MCMC instead of training: chains in the space of a normal distribution, or of its images under symmetries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.flows.parts import location_scale
from pyro_flows.flows.recipe import start_at
from pyro_flows.flows.stacked import Images
from pyro_flows.inference.chains.hmc import exchange_of
from pyro_flows.inference.chains.judging import around, covered_by, evidence_of
from pyro_flows.inference.chains.latent import Latent
from pyro_flows.inference.chains.refine import ATTEMPT, chains_from, gradient_budget
from pyro_flows.inference.chains.sampler import CHAINS
from pyro_flows.inference.chains.search import MissedByChains, missed_by_chains
from pyro_flows.inference.modes.missed_modes import mirrored
from pyro_flows.inference.modes.missed_regions import Guide, MissedRegion, are_separated
from pyro_flows.inference.modes.symmetric_modes import with_symmetric_modes
from pyro_flows.inference.modes.symmetries import SignedPermutation, group, identity, image_of, product
from pyro_flows.inference.starts.curvature import FULL_HESSIAN_UP_TO, SMALL_UP_TO
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.verdict.chains import McmcDraws
from pyro_flows.inference.verdict.deciding import COMPARED_DRAWS, LOOKED_AT_DRAWS
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process import stages
from pyro_flows.support.process.ledger import counted
from pyro_flows.support.process.progress import Bar

MOST_COPIES = 16  # of the normal distribution: each point is scored by all of them


class Untrained(NamedTuple):
    """The normal distribution, its copies if the posterior has exact symmetries, and chains that suffice."""

    flow: Flow
    copies: FlowMixture | None
    chains: McmcDraws


class _Begun(NamedTuple):
    """What chains begin at: a flow or copies of it, its images, draws, log weights, and what it covers."""

    flow: Flow
    sampler: Flow | FlowMixture
    images: list[SignedPermutation]
    exact: bool  # whether the posterior is the same at all images
    z: Tensor
    log_weights: Tensor
    guide: Guide


@torch.no_grad()
def chains_of_gaussian(
    start: Start, density: LogDensity, names: Sequence[str], draws: int, *, seed: int, bar: Bar
) -> Untrained | None:
    """Try a sampler in the space of a normal distribution, before a flow is trained; None if it does not do.

    Where the posterior has exact symmetries, the space is that of copies of the distribution at all images, and chains
    change between them freely. Chains that have converged go through the search for modes that they miss at once. Where
    it finds images of what they hold, there are copies at these too, and chains begin once more; for any other mode a
    flow has to be trained, unless chains that begin there come to the same distribution within a hundred sweeps.
    """
    fixed = start.scale.dim() == 1 or density.dim > FULL_HESSIAN_UP_TO  # nothing is trained: a matrix of no parameters
    flow = location_scale(density.dim, base="normal", diagonal=fixed).to(start.loc)
    start_at(flow, start.loc, start.scale)
    symmetries: list[SignedPermutation] = []
    for _ in range(3):  # each search may find further images
        begun = _begun(flow, density, symmetries)
        tried = None if begun is None else _chains(begun, density, names, draws, seed=seed, bar=bar)
        if begun is None or tried is None:
            return None
        chains, missed = tried
        if not (missed.failures or missed.notes):
            return Untrained(flow, begun.sampler if isinstance(begun.sampler, FlowMixture) else None, chains)
        more = _placed(begun, density, missed.symmetries)
        if not more:
            return None
        symmetries += more
    return None


def _placed(begun: _Begun, density: LogDensity, symmetries: Sequence[SignedPermutation]) -> list[SignedPermutation]:
    """Return the images of the distribution under symmetries of one of its copies, without those that are there."""
    known = begun.images or [identity(density.dim)]
    y = begun.flow.draw(50)[0]
    found: list[SignedPermutation] = []
    for symmetry in dict.fromkeys(symmetries):
        candidates = [product(image, symmetry) for image in known]
        heights = [density(image_of(y, candidate)).median() for candidate in candidates]
        best = candidates[int(torch.stack(heights).nan_to_num(nan=-torch.inf).argmax())]
        if best not in known and best not in found:
            found.append(best)
    return found


def _chains(
    begun: _Begun, density: LogDensity, names: Sequence[str], draws: int, *, seed: int, bar: Bar
) -> tuple[McmcDraws, MissedByChains] | None:
    """Run chains in the space of a normal distribution or its copies; return them, and what they miss.

    None if they have not converged.
    """
    most = gradient_budget(density, 0.5 * ATTEMPT if density.dim <= SMALL_UP_TO else ATTEMPT)  # training is short
    latent = Latent(begun.sampler, density)
    if begun.exact and exchange_of(latent, latent.look(*latent.place(begun.z[:CHAINS])), None) is None:
        return None
    found = chains_from(
        latent, names, begun.z, begun.log_weights, draws, seed=seed, bar=bar, most=most, independence=0, patient=False
    )
    if found is None:
        return None
    sampler, chains = found
    settled = _settled(begun, chains)  # the normal distribution may cover next to nothing
    guides = (begun.guide.covered, begun.sampler.log_prob), (covered_by(settled, density), settled.log_prob)
    covered, score = max(guides, key=itemgetter(0))
    given = (score, covered, evidence_of(begun.sampler, settled, chains, density), ())
    return chains, missed_by_chains(density, chains, *given, seed=seed, sampler=sampler)


@counted(stages.SYMMETRIC)
def _begun(flow: Flow, density: LogDensity, symmetries: Sequence[SignedPermutation]) -> _Begun | None:
    """Copy a flow to all images under exact symmetries, and to those under ``symmetries``.

    None if there are many, or if another move leads to a mode that is no image. A normal distribution is too thin at
    images under moves that are not exact, too, which are no modes as a rule.
    """
    moves: list[SignedPermutation] = []
    symmetries = list(symmetries)
    while True:
        generated = group(moves, MOST_COPIES) if moves else [identity(density.dim)]
        if generated is None:
            return None
        images = list(
            dict.fromkeys(product(symmetry, move) for symmetry in (generated[0], *symmetries) for move in generated)
        )
        if len(images) > MOST_COPIES:
            return None
        sampler: Flow | FlowMixture = FlowMixture.copied(flow, images) if len(images) > 1 else flow
        z, log_q = sampler.draw(LOOKED_AT_DRAWS)
        ratios = (density(z) - log_q).double()
        usable = torch.isfinite(ratios)
        if not bool(usable.any()):
            return None
        guide = Guide(density, sampler.log_prob, float(ratios[usable].median()))
        few = z[usable][:COMPARED_DRAWS], log_q[usable][:COMPARED_DRAWS]
        missed = mirrored(guide, *few)
        more = [region.move for region in missed if region.move is not None and region.move not in moves]
        if not more and len(images) == 1 and missed:
            found = _of_inexact_moves(guide, missed, *few)
            if found is None:
                return None
            symmetries += found
            if symmetries:
                continue
        if not more:
            return _Begun(flow, sampler, images, bool(moves) and not symmetries, z, ratios, guide)
        moves += list(dict.fromkeys(more))


def _of_inexact_moves(
    guide: Guide, missed: Sequence[MissedRegion], z: Tensor, log_q: Tensor
) -> list[SignedPermutation] | None:  # fmt: skip
    """Return inexact symmetries of the modes that moves led to; None if one led to a mode of another kind."""
    missed = with_symmetric_modes(guide, missed, z, log_q)
    symmetries = [symmetry for symmetry in dict.fromkeys(region.symmetry for region in missed) if symmetry is not None]
    apart = [] if symmetries else are_separated(guide.density, torch.stack([region.place for region in missed]), z)
    return None if any(apart) else symmetries


def _settled(begun: _Begun, chains: McmcDraws) -> Flow | FlowMixture:
    """Return the affine flow with the moments of chains; of chains in copies, copies of it by the shares of these."""
    if not isinstance(begun.sampler, FlowMixture):
        return around(chains)
    part = chains.stats["part"].long()
    images = Images.of(begun.sampler.orders, begun.sampler.signs)
    home = around(replace(chains, z=images.home(chains.z, part)))
    shares = torch.bincount(part.flatten(), minlength=len(begun.images)).double() + 1.0
    pairs = zip(begun.sampler.components, shares.log().tolist(), strict=True)
    return FlowMixture([home], [replace(copy, log_weight=share) for copy, share in pairs])
