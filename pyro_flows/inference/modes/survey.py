r"""A survey of modes: hundreds of climbs from near and far, in rounds, until a round finds no mode that is new.

Paths that only climb cost about twenty gradients each, which is little where the density is cheap. They begin at draws
of the prior, at draws moved outwards by factors over two orders of magnitude, about the modes found so far, and, of
many points, at those where the density is farthest above what is known. From a far point, a path leads to a wide mode.
Only paths from a cone of directions lead to a narrow one, so that it takes many points to find it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_flows.inference.modes.terms import tops_of_terms
from pyro_flows.inference.starts.climb import FEW_TICKS, climb
from pyro_flows.inference.starts.curvature import FULL_HESSIAN_UP_TO, inverse_roots, lower_triangular
from pyro_flows.inference.starts.gaussians import CLOSE
from pyro_flows.inference.starts.prior import PRIOR_DRAWS, SAME, factors, prior_draws, unit_of_modes, units_of
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process.seeding import derive, seeded

CLIMBS = 256  # of a round
# that a step of the climbs of a round, or a Hessian, handles at most; a look at where to begin, 12 times that
NUMBERS = 500_000
SCREENED = 400  # points for each climb, of which the best one climbs
SCREENED_WRITTEN = 300_000_000  # numbers that operations on all of these points write: a fraction of a second
LAYERS = 16  # of points, by their distance from the modes so far
ROUNDS, IN_VAIN = 12, 3  # at most; in a row without a new mode, after which a survey is over, and of a first look
MOST_MODES = 200
CURVED = 4000  # rows of the Hessians of a round
PARTS = ("modes", "roots", "evidence", "met", "of_terms")


@dataclass(frozen=True)
class Survey:
    """Modes (K, D), roots L (K, D, D) of their Laplace covariances, log masses (K,), how often each was met (K,).

    Those of terms (``terms.py``) are no maxima of the whole where a narrower mode is above them. ``over`` says that the
    last round found nothing new, so that there may be no more.
    """

    modes: Tensor
    roots: Tensor
    evidence: Tensor
    met: Tensor
    of_terms: Tensor
    over: bool = False
    ridges: bool = False

    def __len__(self) -> int:
        return len(self.modes)

    def likely(self) -> Survey:
        """Return the modes that hold a part of the mass that may matter, the best first."""
        order = self.evidence.argsort(descending=True)
        order = order[self.evidence[order] > self.evidence.max() - CLOSE] if len(order) else order
        return replace(self, **{name: getattr(self, name)[order] for name in PARTS})


def can_be_surveyed(density: LogDensity) -> bool:
    """Whether a survey is cheap: the density is batched and has few terms, and curvatures are small matrices."""
    return density.batched and density.dim <= FULL_HESSIAN_UP_TO and density.dim * density.numbers <= 50_000


@torch.no_grad()
def survey(
    density: LogDensity, z: Tensor, *, seed: int, rounds: int = ROUNDS, climbs: int = CLIMBS,
    known: Callable[[Tensor], Tensor] | None = None, before: Survey | None = None, ridges: bool = False,
) -> Survey:  # fmt: skip
    """Climb from near and far of draws z (S, D) of a guide or start; return the modes that were met.

    ``known`` is the log density of what stands for the modes so far, of normals there by default. ``before`` is a
    survey that this one goes on from. With ``ridges``, points count from which there is still more to gain, along a
    ridge or to an edge: where a density has no smooth top, normals about such points may cover it.

    Where the density has a sum of terms in it, the first survey begins with the terms.

    Cost: a round is 256 paths (``climbs``) of about 20 gradients, fewer where a density has many terms, and a Hessian
    for each mode.
    """
    found, in_vain = before, 0
    if found is None:
        tops = tops_of_terms(density, z, CURVED)
        met = torch.ones(len(tops.places), dtype=torch.long, device=z.device)
        found = Survey(tops.places, tops.roots, tops.evidence, met, met > 0, ridges=ridges)
        found = climbed_from(density, found, tops.edges) if len(tops.edges) else found
    with seeded(derive(seed, "a survey of modes"), density.device):
        for number in range(rounds):
            last, own = found, derive(seed, f"survey {number}")
            found = _merged(density, found, _ends(density, found, z, own, climbs, known, rounds))
            in_vain = 0 if has_new(found, last) else in_vain + 1
            if in_vain == IN_VAIN:
                return replace(found, over=True)
            if len(found) >= MOST_MODES:
                break
    return found


def has_new(found: Survey, before: Survey) -> bool:
    """Whether there is a mode that was not there before, with a part of the mass that may matter."""
    fresh = found.evidence[len(before) :]
    return len(fresh) > 0 and bool((fresh > found.evidence.max() - CLOSE).any())


@torch.no_grad()
def climbed_from(density: LogDensity, found: Survey, points: Tensor) -> Survey:
    """Add the modes to which climbs from points (N, D) lead."""
    return _merged(density, found, _climbed(density, found, points, points))


def _ends(
    density: LogDensity, found: Survey, z: Tensor, seed: int, climbs: int,
    known: Callable[[Tensor], Tensor] | None, rounds: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the ends (N, D) of the climbs of one round, the highest first, and the scales there (N, D)."""
    count = int(max(32, min(climbs, NUMBERS / max(1, density.numbers))))
    cost = max(density.dim * max(1, len(found)), density.numbers) * (1 if known is None else 4)  # a guide costs more
    affordable = min(12 * NUMBERS / cost, SCREENED_WRITTEN / max(1, density.written)) / count
    many = int(max(1, min(SCREENED, affordable))) if len(found) else 1
    prior = prior_draws(density, PRIOR_DRAWS // 2, seed=seed)
    points = torch.cat([z[:8], _broad(density, found, prior, z, count * (1 + many) // 2)])
    points, heights = _finite(density, points)
    plain, screened, promise = points[: count // 2], points[count // 2 :], heights[count // 2 :]
    if len(found) and len(screened):
        # of all rounds together as many points as two rounds screen, or fewer where an evaluation writes many numbers
        in_all = min(2 * SCREENED * CLIMBS, SCREENED_WRITTEN / max(1, density.written))
        pieces = in_all / rounds / len(screened)
        more = [_far(density, found, prior, z, len(screened), round(pieces)) for _ in range(round(pieces) - 1)]
        screened, promise = (torch.cat(parts) for parts in zip((screened, promise), *more, strict=True))
        promise = promise - (_known(found, screened) if known is None else known(screened).to(screened))
        screened = _promising(found, screened, promise.nan_to_num(nan=-torch.inf), count - len(plain))
    return _climbed(density, found, torch.cat([plain, screened[: count - len(plain)]]), z)


def _far(
    density: LogDensity, found: Survey, prior: Tensor, z: Tensor, count: int, pieces: int
) -> tuple[Tensor, Tensor]:
    """Return the most promising of many points, by normals at the modes so far, one of so many, and their heights.

    The density of a narrow mode is above that of a wider one only in a ball, whose share of the space is tiny. Only a
    large number of points finds it.
    """
    points, heights = _finite(density, torch.cat([_about(draws, count // 2, (0.3, 10.0)) for draws in (prior, z)]))
    kept = max(LAYERS, count // pieces)
    return _finite(density, _promising(found, points, heights - _known(found, points), kept))


def _finite(density: LogDensity, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the points (N, D) whose density is finite, and its logs."""
    heights = density(points)
    usable = torch.isfinite(heights)
    return points[usable], heights[usable]


def _promising(found: Survey, points: Tensor, promise: Tensor, count: int) -> Tensor:
    """Return points at which the density is farthest above that of the modes so far, as many from each distance.

    Far away, the ratio of two tails is larger than the ratio near any mode.
    """
    layers = distances(found, points).amin(0).argsort().tensor_split(min(LAYERS, len(points)))
    best = [layer[promise[layer].topk(min(len(layer), -(-count // len(layers)))).indices] for layer in layers]
    return points[torch.cat(best)]


def _climbed(density: LogDensity, found: Survey, points: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Climb from points (N, D); return the ends, the highest first, and the scales there."""
    if not len(points):
        return points, points
    local = units_of(z, full=False) if not len(found) else found.roots.norm(dim=2).median(0).values
    steps = z.new_tensor([1.0, 0.1, 0.01]).repeat(len(points))[: len(points), None]  # long ones leap over modes
    ends = climb(density, points, steps * local, ticks=FEW_TICKS)
    usable = torch.isfinite(ends.heights) & (ends.settled | found.ridges)
    order = usable.nonzero()[:, 0][ends.heights[usable].argsort(descending=True)]
    return ends.points[order], ends.scales[order]


def _broad(density: LogDensity, found: Survey, prior: Tensor, z: Tensor, count: int) -> Tensor:
    """Points (N, D) far and near: a quarter each from the prior and from the draws, a half about the modes so far."""
    parts = [_about(draws, count // 4, (0.01, 100.0)) for draws in (prior, z)]
    own = min(len(prior), len(parts[0]) // 2)
    parts[0][:own] = prior[:own]
    modes = found.modes if len(found) > 1 else z
    noise = torch.randn(count - 2 * (count // 4), density.dim, dtype=z.dtype, device=z.device)
    chosen = modes[torch.randint(len(modes), (len(noise),), device=z.device)]
    parts.append(chosen + factors((0.1, 2.0), noise) * _spread(found, modes) * noise)
    mixed = torch.cat(parts)
    return mixed[torch.randperm(len(mixed)).to(mixed.device)]


def _about(draws: Tensor, count: int, ends: tuple[float, float]) -> Tensor:
    """Points (N, D) from a normal about draws (S, D), whose width differs by factors of theirs."""
    noise = torch.randn(count, draws.shape[1], dtype=draws.dtype, device=draws.device)
    return draws.median(0).values + factors(ends, noise) * units_of(draws, full=False) * noise


def _spread(found: Survey, modes: Tensor) -> Tensor:
    """Return how far apart modes are (D,): in all coordinates alike, measured by the widths of the modes themselves.

    Three modes span a plane; a fourth one lies out of it.
    """
    apart = units_of(modes, full=False)
    if len(found) < 2:
        return apart
    local = found.roots.norm(dim=2).median(0).values
    return local * (apart / local).square().mean().sqrt()


def _known(found: Survey, points: Tensor) -> Tensor:
    """Return the log density (N,) that the normals at the modes so far have, up to a constant."""
    x = _in_sds(found, points)
    size = found.roots.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.logsumexp(-0.5 * x.square().sum(1) + (found.evidence - size)[:, None], 0)


def _in_sds(found: Survey, points: Tensor) -> Tensor:
    """Return points (K, D, N) as the normals at the modes see them, in standard deviations from each."""
    return torch.linalg.solve_triangular(found.roots, (points - found.modes[:, None]).mT, upper=False)


def _merged(density: LogDensity, found: Survey, ends: tuple[Tensor, Tensor]) -> Survey:
    """Add the ends that are new modes, and count those that are not."""
    places, scales = ends
    met = found.met.clone()
    if len(found) and len(places):
        near, which = distances(found, places).min(0)
        met += torch.bincount(which[near < SAME], minlength=len(met)).to(met)
        places, scales = places[near >= SAME], scales[near >= SAME]
    most = min(MOST_MODES - len(found), max(8, CURVED // density.dim))
    heads, counts = _heads(places, scales * unit_of_modes(density.dim, ridges=found.ridges), most)
    if not len(heads):
        return replace(found, met=met)
    roots = lower_triangular(inverse_roots(density, heads)[0])
    size = roots.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * density.dim * math.log(2.0 * math.pi)
    heights, slopes = density.value_and_grad(heads)
    # on a ridge, a step of Newton's method promises more: twice the nats
    still = ((slopes[:, None] @ roots).square().sum((1, 2)) < 0.1) | found.ridges
    evidence = torch.where(still & torch.isfinite(heights + size), heights + size, -torch.inf)
    found = replace(found, met=met)
    for number in evidence.argsort(descending=True).tolist():
        if not math.isfinite(float(evidence[number])):
            continue
        if len(found) and bool((distances(found, heads[number : number + 1]) < SAME).any()):
            continue
        fresh = zip(PARTS, (heads, roots, evidence, counts, counts < 0), strict=True)
        parts: dict[str, Any] = {name: torch.cat([getattr(found, name), x[number : number + 1]]) for name, x in fresh}
        found = replace(replace(found, over=False), **parts)
    return found


def distances(found: Survey, places: Tensor) -> Tensor:
    """Return the distances (K, N) of places from the modes, in units of :func:`unit_of_modes`."""
    return _in_sds(found, places).norm(dim=1) / unit_of_modes(places.shape[1], ridges=found.ridges)


def _heads(places: Tensor, scales: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return distinct ends (K, D), the highest of those within some units (N, D), and how many these are (K,)."""
    open_ = torch.ones(len(places), dtype=torch.bool, device=places.device)
    heads: list[int] = []
    counts: list[int] = []
    while bool(open_.any()) and len(heads) < most:
        first = int(open_.to(torch.uint8).argmax())
        same = open_ & (((places - places[first]) / scales[first]).norm(dim=1) < SAME)
        same[first] = True
        heads.append(first)
        counts.append(int(same.sum()))
        open_ &= ~same
    return places[heads], torch.tensor(counts, dtype=torch.long, device=places.device)
