"""Modes that a guide lacks: what no draw of it can show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_flows._seeding import derive, seeded
from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.symmetries import SignedPermutation, moves, signed_permutation
from pyro_flows.modes.tempering import log_mean, temper, wander
from pyro_flows.starts.curvature import lower_triangular
from pyro_flows.starts.gaussians import Gaussians
from pyro_flows.starts.pathfinder import Paths, pathfinder
from pyro_flows.starts.portfolio import SEARCHES_UNBATCHED
from pyro_flows.starts.prior import prior_draws
from pyro_flows.starts.start import Start
from pyro_flows.verdict.psis import psis
from pyro_flows.verdict.verdict import resample

SHARE = 0.02  # of the mass that the guide covers
RESOLUTION = 0.05  # of a coordinate
THINNER = 7.0  # nats by which the guide falls short at a mode that it lacks
INFLATED = (3.0, 10.0, 30.0)
SCREENED, SCREENED_AT = 1000, (1.5, 2.5, 4.0, 8.0)  # draws, and factors by which they are moved outwards
CLIMBERS = 6  # for each factor, and from the guide's own draws
PRIOR_CLIMBERS = 12
FULL_UNITS_UP_TO = 100  # dimensions
WEIGHED, WEIGHED_UNBATCHED = 400, 50  # draws from the normal at the end of a path
TRUSTED_K_HAT = 0.7
LOOKED_AT = 4  # places whose mass is measured by tempering, the best first
LINES = 400  # coordinates that are followed,
LINE_POINTS = 24  # by as many points a side,
NEAR, FAR = 2.0, 40.0  # standard deviations away
MOVES = 8
MOVED_DRAWS = 200
WANDERERS = 256
WANDERED = "wandered"
THIN = 3.0  # nats by which the guide falls short where wanderers count
EXACT = 1e-4  # of a log density: rounding of single precision
SEEDS = 2  # draws at which exact moves are looked for

Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Lack:
    """A place that the guide lacks, and a normal distribution there: where another run may start.

    ``move`` takes coordinates of the guide's draws there and leaves the density as it is, if there is such a move.
    """

    place: Tensor
    start: Start
    move: SignedPermutation | None = None


@dataclass(frozen=True)
class Search:
    """What a search for missed modes found, and what it could not look at."""

    lacks: tuple[Lack, ...] = ()
    sentence: str | None = None
    notes: tuple[str, ...] = field(default=())
    contained: bool = False  # draws that wander about under the density stay where the guide has its due

    @property
    def failures(self) -> list[str]:
        """The reason against the draws, if there is one."""
        return [] if self.sentence is None else [self.sentence]


def missed_modes(
    density: LogDensity, modes: Sequence[Start], z: Tensor, log_q: Tensor, score: Score, *, seed: int = 0
) -> Search:
    """Search for regions that hold a good part of the mass and that a guide lacks.

    At its own draws, log p - log q of a guide is about the log of the mass that it covers. A region is missed if it has
    a good part of that mass where the guide is much thinner than it ought to be. Four searches:

    1. Exact moves (``symmetries.py``) are applied to the draws. The mass of the region is
       :math:`E_q\\, p(T z) / q(z)`.
    2. Paths climb from draws moved outwards (from some, and from those of many where the density is farthest above what
       the guide says), from prior draws, from draws with a site's signs changed, and from the modes of the portfolio.
       Each carries a normal distribution (``starts/pathfinder.py``), whose weighted draws tell the mass. Where they
       are too few, tempering does, in comparison with the region that the guide covers, by the same method.
    3. All draws are moved along single coordinates to further maxima: see :func:`_across`.
    4. Draws wander about under the density itself: see :func:`_wandered`.

    Args:
        density: log p, unnormalised.
        modes: starts whose places are looked at too.
        z: draws (S, D) of the guide.
        log_q: their log densities (S,).
        score: the guide's log density.
        seed: of the search.
    """
    z = z.to(density.dtype)
    with torch.no_grad():
        weights = density(z) - log_q
    finite = torch.isfinite(weights)
    if not bool(finite.any()):
        return Search()
    guide = _Guide(density, score, float(weights[finite].median()))
    few = z[finite][:MOVED_DRAWS], log_q[finite][:MOVED_DRAWS]
    searches: list[Callable[[], list[Lack]]] = [lambda: _climbed(guide, modes, z[finite], seed=seed)]
    if density.batched:
        searches.insert(0, lambda: _mirrored(guide, *few))
        searches += [
            lambda: _across(guide, *few),
            lambda: _wandered(guide, z[finite], weights[finite], log_q[finite], seed=seed),
        ]
    found: list[Lack] = []
    for search in searches:
        found = found or [lack for lack in search() if _is_resolved(density, lack.place)]
    notes = () if density.batched else (
        f"the search for missed modes had only {SEARCHES_UNBATCHED} starting points: the model runs draw by draw",
    )  # fmt: skip
    if not found:
        return Search(notes=notes, contained=density.batched)
    names = sorted({_named(density, lack.place, few[0]) for lack in found})
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    what = "has too little mass" if found[0].start.name == WANDERED else "misses a mode"
    return Search(tuple(found), f"the guide {what} near {names[0]}{more}", notes)


@torch.no_grad()
def _is_resolved(density: LogDensity, place: Tensor) -> bool:
    """Whether numbers are fine enough at a place: its coordinates come back from the model's own values.

    Where a scale is below the rounding of what it scales, values are equal to their location, and the density of the
    model as it is written grows without bound.
    """
    latents = {name: value for name, value in density.constrain(place[None]).items() if name in density.names}
    back = density.unconstrain(latents)[0]
    return bool(((back - place).abs() <= RESOLUTION * (1.0 + place.abs())).all())


@dataclass(frozen=True)
class _Guide:
    """The guide's log density, and the log of the mass that it covers."""

    density: LogDensity
    score: Score
    covered: float

    @torch.no_grad()
    def lacking(self, z: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return p / (covered mass) / q (S,) at draws of q where the guide is much too thin, and 0 elsewhere."""
        ratios = (log_p - log_q).double() - self.covered
        return torch.where(self.is_thin(z, log_p) & torch.isfinite(ratios), ratios, -torch.inf).exp()

    @torch.no_grad()
    def is_thin(self, z: Tensor, log_p: Tensor, *, by: float = THINNER) -> Tensor:
        """Whether the guide has less than it ought to have, by some nats, at points (S, D) with these log densities."""
        usable = torch.isfinite(log_p) & torch.isfinite(z).all(1)
        thin = torch.zeros_like(usable)
        if bool(usable.any()):
            thin[usable] = (log_p[usable] - self.score(z[usable])).double() - self.covered > by
        return thin


@torch.no_grad()
def _mirrored(guide: _Guide, z: Tensor, log_q: Tensor) -> list[Lack]:
    """Apply exact moves to the draws; return the regions that hold a good part of the mass and no draws."""
    density = guide.density
    found = []
    candidates = dict.fromkeys(move for draw in z[:SEEDS] for move in moves(density, draw))
    for move in candidates:
        moved, inside = move.apply(density, z)
        # The move keeps the volume of the model's own values, so there q's image has the density that q has at z.
        image = log_q - density.log_jacobian(z) + density.log_jacobian(moved)
        log_p = torch.where(inside, density(moved), -torch.inf)
        lacks = _lack(moved, log_p, guide.lacking(moved, log_p, image), "mirrored")
        exact = bool(lacks) and bool((log_p - density(z)).abs().le(EXACT * (1.0 + log_p.abs())).all())
        found += [replace(lack, move=signed_permutation(z, moved)) if exact else lack for lack in lacks]
    return found


def _lack(moved: Tensor, log_p: Tensor, lacking: Tensor, name: str) -> list[Lack]:
    """Return the region of moved draws if it holds a good part of the mass; each draw counts as one at most."""
    if not float(lacking.clamp(max=1.0).mean()) > SHARE:
        return []
    within = lacking > 0.0
    return [Lack(moved[int(torch.where(within, log_p, -torch.inf).argmax())], _moments(moved[within], name))]


def _moments(draws: Tensor, name: str) -> Start:
    spread = draws.std(0) if len(draws) > 1 else torch.ones_like(draws[0])
    return Start(name, draws.mean(0), torch.where(spread > 0.0, spread, 1.0))


def _climbed(guide: _Guide, modes: Sequence[Start], z: Tensor, *, seed: int) -> list[Lack]:
    """Climb from many points; return the regions at the ends of the paths that the guide lacks."""
    density = guide.density
    own, far = z[: CLIMBERS if density.batched else 1], _dispersed(guide, modes, z, seed=seed)
    if not len(far):
        return []
    units = _units(z)
    points = torch.cat([own, far])
    paths = pathfinder(density, points, units.expand(len(points), *units.shape), seed=derive(seed, "modes"))
    found, doubtful = _weighed(guide, paths, len(own), seed=seed)
    if not found and density.batched:
        found = _tempered(guide, paths, len(own), doubtful, units, seed=seed)
    return [found[number] for number in _distinct([lack.place for lack in found], units)]


@dataclass(frozen=True)
class _Doubtful:
    """A path at whose end the guide may lack something, and whose normal is too poor to weigh it."""

    number: int
    elbo: float
    elsewhere: bool  # the guide is too thin at most draws of the normal, and not only at some of their tail
    start: Start


def _weighed(guide: _Guide, paths: Paths, own: int, *, seed: int) -> tuple[list[Lack], list[_Doubtful]]:
    """Weigh draws of the normals at the ends of paths, from number ``own`` on; return what the guide lacks, and doubts.

    A doubt is a normal too poor for its weights to tell a mass.
    """
    density, ends = guide.density, paths.ends
    with seeded(derive(seed, "weighing"), density.device), torch.no_grad():
        count = WEIGHED if density.batched else WEIGHED_UNBATCHED
        noise = torch.randn(count, density.dim, dtype=ends.dtype, device=ends.device)
        draws, log_q = paths.best.map(noise)
        log_p = density(draws.flatten(0, 1)).unflatten(0, draws.shape[:2])
    scales = paths.best.scale()
    scales = lower_triangular(scales) if scales.dim() == 3 else scales
    found, doubtful = [], []
    at_ends = guide.is_thin(ends, density(ends).detach())
    for number in range(own, len(ends)):
        lacking = guide.lacking(draws[number], log_p[number], log_q[number])
        thin = lacking > 0.0
        if not bool(thin.any()):
            continue
        log_weights, k_hat = psis(lacking.log())
        start = Start("mode", paths.best.loc[number], scales[number])
        if not k_hat < TRUSTED_K_HAT:
            elsewhere = bool(at_ends[number]) or float(thin.double().mean()) > 0.5
            doubtful.append(_Doubtful(number, float(paths.elbo[number]), elsewhere, start))
        elif float(lacking.mean()) > SHARE:
            place = ends[number] if bool(at_ends[number]) else draws[number][int(log_weights.argmax())]
            found.append(Lack(place, start))
    return found, doubtful


def _tempered(
    guide: _Guide, paths: Paths, own: int, doubtful: Sequence[_Doubtful], units: Tensor, *, seed: int
) -> list[Lack]:
    """Measure masses by tempering from the normals at the ends of a few paths, and just so that of the guide's region.

    Many paths end at one place, the guide's own one among them. So each place is measured once, and places where the
    guide is thin altogether come first.
    """
    density, ends = guide.density, paths.ends
    base = int(paths.elbo[:own].nan_to_num(nan=-torch.inf).argmax())
    reach = guide.covered + math.log(SHARE) - max(0.0, guide.covered - float(paths.elbo[base]))
    worth = [path for path in doubtful if path.elbo > reach - THINNER]
    worth.sort(key=lambda path: (not path.elsewhere, -path.elbo))
    worth = [worth[number] for number in _distinct([ends[path.number] for path in worth], units)][:LOOKED_AT]
    if not worth:
        return []
    chosen = [base, *(path.number for path in worth)]
    walk = temper(density, Gaussians(*(part[chosen] for part in paths.best)), seed=derive(seed, "tempering"))
    covered = min(float(log_mean(walk.log_weights[0])), guide.covered)
    found = []
    for path, reached, log_p, log_weights in zip(worth, *(part[1:] for part in walk), strict=True):
        log_weights = torch.where(guide.is_thin(reached, log_p), log_weights, -torch.inf)
        if float(log_mean(log_weights)) - covered > math.log(SHARE):
            thin_end = bool(guide.is_thin(ends[path.number][None], density(ends[path.number][None]).detach()))
            place = ends[path.number] if thin_end else reached[int(log_weights.argmax())]
            found.append(Lack(place, path.start))
    return found


def _dispersed(guide: _Guide, modes: Sequence[Start], z: Tensor, *, seed: int) -> Tensor:
    """Points to climb from: draws moved away from their centre, prior draws, known modes; of finite density."""
    density = guide.density
    centre = z.median(0).values
    parts = zip(INFLATED, z.split(CLIMBERS), strict=False)
    outwards = [centre + factor * (part - centre) for factor, part in parts]
    if density.batched:
        outwards += [_denser(guide, centre + factor * (z[:SCREENED] - centre)) for factor in SCREENED_AT]
    flipped = []
    for latent in density.structure.latents[:CLIMBERS]:
        changed = z[-1:].clone()
        changed[:, latent.offset : latent.offset + latent.size] *= -1.0
        flipped.append(changed)
    prior = prior_draws(density, PRIOR_CLIMBERS, seed=derive(seed, "modes from the prior"))
    points = torch.cat([*(mode.loc[None] for mode in modes), *outwards, *flipped, prior])
    with torch.no_grad():
        points = points[torch.isfinite(density(points))]
    return points if density.batched else points[:SEARCHES_UNBATCHED]


@torch.no_grad()
def _denser(guide: _Guide, points: Tensor) -> Tensor:
    """Return the few of many points (S, D) at which the density is farthest above what the guide says of it.

    From far away, paths end at the widest mode. A narrower one rules in a cone of directions about it, which is small
    in many dimensions, but shows in the ratio of the densities.
    """
    log_p = guide.density(points)
    usable = torch.isfinite(log_p)
    points, log_p = points[usable], log_p[usable]
    if not len(points):
        return points
    ratios = (log_p - guide.score(points)).double().nan_to_num(nan=-torch.inf)
    return points[ratios.topk(min(CLIMBERS, len(points))).indices]


def _units(z: Tensor) -> Tensor:
    """The draws' scale: the Cholesky factor of their covariance where there are draws enough for it, or their sds."""
    if z.shape[1] <= FULL_UNITS_UP_TO and len(z) > 4 * z.shape[1]:
        root, fault = torch.linalg.cholesky_ex(torch.cov(z.mT.double()).reshape(z.shape[1], z.shape[1]))
        if int(fault) == 0 and bool(torch.isfinite(root).all()):
            return root.to(z.dtype)
    spread = z.std(0)
    return torch.where((spread > 0.0) & torch.isfinite(spread), spread, 1.0)


def _distinct(places: Sequence[Tensor], units: Tensor) -> list[int]:
    """Return the numbers of places (D,) that do not lie within a standard deviation of an earlier one of them."""
    kept: list[int] = []
    for number, place in enumerate(places):
        away = [place - places[other] for other in kept]
        if units.dim() == 2:
            away = [torch.linalg.solve_triangular(units, x[:, None], upper=False)[:, 0] for x in away]
        else:
            away = [x / units for x in away]
        if all(float(x.norm()) > math.sqrt(len(place)) for x in away):
            kept.append(number)
    return kept


@torch.no_grad()
def _named(density: LogDensity, place: Tensor, z: Tensor) -> str:
    """Describe a place by up to three of its values that are farthest from the draws ``z``, in standard deviations."""
    drawn, here = density.constrain(z), density.constrain(place[None])
    entries = []
    for name in density.names:
        values, value = drawn[name].reshape(len(z), -1).double(), here[name].flatten().double()
        distance = (value - values.mean(0)).abs() / values.std(0).clamp_min(torch.finfo(torch.float64).tiny)
        for number, index in enumerate(itertools.product(*map(range, here[name].shape[1:]))):
            label = f"{name}[{','.join(map(str, index))}]" if index else name
            entries.append((float(distance[number]), label, float(value[number])))
    entries.sort(key=lambda entry: -entry[0])
    return ", ".join(f"{label} = {value:.3g}" for far, label, value in entries[:3] if far >= 0.5 * entries[0][0])


@torch.no_grad()
def _across(guide: _Guide, z: Tensor, log_q: Tensor) -> list[Lack]:
    r"""Return a place in each region that has much of the mass, but no draws until they are moved along a coordinate.

    Candidates for the move :math:`\delta` are further maxima of the density on the lines through the best draw. The
    mass of the region is :math:`E_q\, p(z + \delta) / q(z)`; here each draw counts as one at most. The number of modes
    does not matter: with two wells in each of many coordinates, one mode alone is next to nothing.
    """
    density = guide.density
    best = z[int(torch.nan_to_num(density(z), nan=-torch.inf).argmax())]
    found = []
    for move in _further_maxima(density, best, z.std(0)):
        moved = z + move
        log_p = density(moved)
        found += _lack(moved, log_p, guide.lacking(moved, log_p, log_q), "moved")
    return found


@torch.no_grad()
def _wandered(guide: _Guide, z: Tensor, weights: Tensor, log_q: Tensor, *, seed: int) -> list[Lack]:
    """Let weighted draws wander; return a place where the guide is too thin, if more of them come there than before.

    This finds what a guide lacks next to where it lies, such as the neck of a funnel. Weights know of places where the
    guide is thin as long as it has a draw there; only what exceeds that counts.
    """
    ratios = (weights - guide.covered).double()
    there = guide.is_thin(z, weights + log_q, by=THIN)
    known = float(torch.softmax(ratios, 0)[there].sum())
    chosen = resample(torch.log_softmax(ratios, 0), WANDERERS, seed=derive(seed, "wanderers"))
    ends, log_p = wander(guide.density, z[chosen], _units(z), seed=derive(seed, "wandering"))
    thin = guide.is_thin(ends, log_p, by=THIN)
    share = float(thin.double().mean())
    error = math.sqrt(max(share, 1.0 / WANDERERS) * (1.0 - share) / WANDERERS)
    if share - 2.0 * error <= known + SHARE:
        return []
    return [Lack(ends[thin][0], _moments(ends[thin], WANDERED))]


def _further_maxima(density: LogDensity, centre: Tensor, sd: Tensor) -> list[Tensor]:
    """Return moves from ``centre`` along single coordinates to maxima two to forty ``sd`` away, the highest first."""
    far = torch.logspace(0.0, math.log10(FAR), LINE_POINTS, dtype=centre.dtype, device=centre.device)
    offsets = torch.cat([-far.flip(0), far])
    lines = [axis * size for axis, size in zip(torch.eye(len(centre)).to(centre)[:LINES], sd[:LINES], strict=False)]
    if not lines:
        return []
    points = centre + offsets[:, None] * torch.stack(lines)[:, None]
    heights = density(points.flatten(0, 1)).nan_to_num(nan=-torch.inf).reshape(len(lines), -1)
    peaks = (heights[:, 1:-1] > heights[:, :-2]) & (heights[:, 1:-1] > heights[:, 2:])
    peaks &= offsets[1:-1].abs() >= NEAR
    moves = []
    for line, place in peaks.nonzero().tolist():
        between = torch.linspace(0.0, 1.0, LINE_POINTS).to(centre)
        near = offsets[place] + (offsets[place + 2] - offsets[place]) * between
        fine = density(centre + near[:, None] * lines[line]).nan_to_num(nan=-torch.inf)
        moves.append((float(fine.max()), near[int(fine.argmax())] * lines[line]))
    return [move for _, move in sorted(moves, key=lambda pair: -pair[0])[:MOVES]]
