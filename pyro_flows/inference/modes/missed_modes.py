"""The search for missed modes: regions with posterior mass, but without draws of the guide."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.inference.modes.climbs import INFLATED, _weighed, climbed, surveyed
from pyro_flows.inference.modes.missed_regions import (
    Guide,
    MissedRegion,
    Score,
    guide_at,
    is_resolved,
    missed_regions_of,
    to_name,
)
from pyro_flows.inference.modes.symmetric_modes import with_symmetric_modes
from pyro_flows.inference.modes.symmetries import are_the_same, images, moves, signed_permutation
from pyro_flows.inference.modes.tempering import Tempered, move_walkers, temper
from pyro_flows.inference.modes.under_covered import Space, regions_by_density, under_covered_region
from pyro_flows.inference.modes.unverified_modes import UNWEIGHED, UnverifiedMode, modes_with_mass, worth_measuring
from pyro_flows.inference.starts.gaussians import Gaussians, Start
from pyro_flows.inference.starts.pathfinder import Paths, pathfinder
from pyro_flows.inference.starts.prior import PATHS, SEARCHES, prior_draws, units_of
from pyro_flows.inference.verdict.deciding import COMPARED_DRAWS, SEARCHED_DRAWS
from pyro_flows.inference.verdict.weighing import element, resample
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.stack import Stack
from pyro_flows.support.process import ledger
from pyro_flows.support.process.seeding import derive


@dataclass(frozen=True)
class Search:
    """What a search for missed modes found, and what it could not look at.

    ``draws`` are draws (S, D) of the guide that it began at, and their log weights (S,).
    """

    missed: tuple[MissedRegion, ...] = ()
    sentence: str | None = None
    notes: tuple[str, ...] = field(default=())
    passed: bool = False  # all of it was made, and nothing found
    draws: tuple[Tensor, Tensor] | None = field(default=None, compare=False)

    @property
    def failures(self) -> list[str]:
        """The reason against the draws, if there is one."""
        return [] if self.sentence is None else [self.sentence]


def missed_modes(
    density: LogDensity, modes: Sequence[Start], z: Tensor, log_q: Tensor, score: Score, *, seed: int = 0,
    wandering: bool = True, space: Space | None = None, sift: Callable[[list[MissedRegion]], list[MissedRegion]] = list,
) -> Search:  # fmt: skip
    """Search for regions that hold a good part of the mass and that a guide lacks.

    At its own draws, log p - log q of a guide is about the log of the mass that it covers. A region is missed if it has
    a good part of that mass where the guide is much thinner than it ought to be. Four searches:

    1. Exact moves (``symmetries.py``) are applied to the draws. The mass of the region is
       :math:`E_q\\, p(T z) / q(z)`.
    2. Hundreds of climbs from near and far tell the modes (``survey.py``), and draws of the normals there their masses.
    3. Paths climb from draws moved outwards (from some, and from those of many where the density is farthest above what
       the guide says), from prior draws, from draws with a site's signs changed, and from the modes of the portfolio.
       Each carries a normal distribution (``starts/pathfinder.py``), whose weighted draws tell the mass. Where they
       are too few, tempering does, in comparison with the region that the guide covers, by the same method. Where the
       normal is too poor even for that, Newton's steps and a Hessian give a better one (``unverified_modes.py``). Where
       Hessians cost too much and nothing else is found, a note says so, unless ``sift`` takes such places out, too.
    4. If ``wandering``, draws (in the latent ``space`` of the guide, if it has one) wander to where the guide is thin.

    Draws z (S, D) of the guide have log densities ``log_q`` (S,), and ``score`` tells them anywhere. Places of
    ``modes`` are looked at too. ``sift`` takes out of what a search found what is covered after all; where nothing is
    left, the next one is made.
    """
    usable = guide_at(density, score, z.to(density.dtype), log_q)
    if usable is None:
        return Search()
    guide, z, log_q, weights = usable
    few = z[:COMPARED_DRAWS], log_q[:COMPARED_DRAWS]
    doubts: list[Start] = []
    notes: list[str] = []
    unresolved: list[MissedRegion] = []
    searches: dict[str, Callable[[], list[MissedRegion]]] = {
        "mirrored": lambda: mirrored(guide, *few),
        "survey": lambda: surveyed(guide, z, doubts, seed=seed),
        "paths": lambda: climbed(guide, [*modes, *doubts], z, log_q, unresolved, seed=seed),
        "walks": lambda: under_covered_region(guide, space, z, weights, log_q, seed=seed),
    }
    if not density.batched:
        searches = {"paths": searches["paths"]}
    elif not wandering:
        del searches["walks"]
    found: list[MissedRegion] = []
    for name, search in searches.items():
        if not found:
            with ledger.counted(name):
                found = sift([region for region in search() if is_resolved(density, region.place)])
            ledger.found(name, len(found))
    if not found and unresolved and sift(unresolved):
        notes.append(UNWEIGHED)
    if not density.batched:
        few_starts = f"the search for missed modes had only {PATHS} starting points"
        notes.append(f"{few_starts}: the model runs draw by draw")
    if not found:
        return Search(notes=tuple(notes), passed=density.batched, draws=(z, weights))
    found = with_symmetric_modes(guide, found, *few) if density.batched else found
    return Search(tuple(found), sentence_on(density, found, few[0]), tuple(notes))


def sentence_on(density: LogDensity, found: Sequence[MissedRegion], z: Tensor) -> str:
    """Return the sentence on what a guide with draws ``z`` lacks: modes, or mass next to those that it covers."""
    first = {id(region.start): region for region in reversed(to_name(found))}  # a place of each region
    named = [*first.values()][::-1]
    names = sorted({_named(density, region.place, z) for region in named})
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    what = "has too little mass" if named[0].beside else "misses a mode"
    return f"the guide {what} near {names[0]}{more}"


@torch.no_grad()
def mirrored(guide: Guide, z: Tensor, log_q: Tensor, rough: LogDensity | None = None) -> list[MissedRegion]:
    """Apply exact moves, found at two draws, to all; return the regions with a good part of the mass and no draws.

    Moves are found by a ``rough`` density, such as that of some of the rows, if there is one.
    """
    density = guide.density
    found = []
    height, jacobian = density(z), density.log_jacobian(z)
    for moved, inside, log_p, log_jacobian in images(density, moves(rough or density, z[:2]), z):
        # The move keeps the volume of the model's own values, so there q's image has the density that q has at z.
        image = log_q - jacobian + log_jacobian
        missed = missed_regions_of(moved, log_p, guide.missing_mass(moved, log_p, image))
        exact = bool(missed) and bool((are_the_same(log_p, height) & inside).all())
        if exact:
            move = signed_permutation(z, moved)
            missed = [replace(region, move=move, symmetry=move) for region in missed]
        found += missed
    return found


@torch.no_grad()
def _named(density: LogDensity, place: Tensor, z: Tensor) -> str:
    """Describe a place by up to three of its values that are farthest from the draws ``z``, in standard deviations."""
    drawn, here = density.constrain(z), density.constrain(place[None])
    entries = []
    for name in density.names:
        values, value = drawn[name].reshape(len(z), -1).double(), here[name].flatten().double()
        distance = (value - values.mean(0)).abs() / values.std(0).clamp_min(torch.finfo(torch.float64).tiny)
        for number, index in enumerate(itertools.product(*map(range, here[name].shape[1:]))):
            entries.append((float(distance[number]), element(name, index), float(value[number])))
    entries.sort(key=lambda entry: -entry[0])
    return ", ".join(f"{label} = {value:.3g}" for far, label, value in entries[:3] if far >= 0.5 * entries[0][0])


# many data sets at once, with fewer paths and walkers for each --------------------------------------------------------

# paths from the guide's own draws, and from draws that a factor moves outwards; doubtful places that are measured; data
# sets that show exact symmetries of the model
EACH = 2


def missed_together(stack: Stack, flows: Sequence[Flow], *, seed: int) -> list[Search]:
    """Search for what each flow lacks, as :func:`missed_modes` does for one; notes say what was searched less.

    Symmetries are tried on the first data sets only: where one of them shows a missed mode, all data sets count as
    lacking, so that each is fitted by itself.
    """
    drawn = [_draw(stack, number, flow) for number, flow in enumerate(flows)]
    usable = [one for one in drawn if one is not None]
    if not usable:
        return [Search() for _ in drawn]
    symmetric = any(mirrored(one.guide, *one.few) for one in usable[:EACH])
    found: list[list[MissedRegion]] = [[] for _ in drawn]
    for search in (_climbed, _wandered):
        for one, missed in zip(usable, search(stack, usable, seed), strict=True):
            resolved = [region for region in missed if is_resolved(one.guide.density, region.place)]
            found[one.number] = found[one.number] or resolved
    return [_search(one, missed, symmetric) for one, missed in zip(drawn, found, strict=True)]


class _FlowDraws(NamedTuple):
    """A flow as a guide, draws of it (S, D), their log densities and log weights (S,), and their scale."""

    number: int
    guide: Guide
    z: Tensor
    log_q: Tensor
    weights: Tensor
    units: Tensor

    @property
    def few(self) -> tuple[Tensor, Tensor]:
        return self.z[:COMPARED_DRAWS], self.log_q[:COMPARED_DRAWS]


def _draw(stack: Stack, number: int, flow: Flow) -> _FlowDraws | None:
    """Draw from a flow; None if no draw has a density."""
    usable = guide_at(stack.densities[number], flow.log_prob, *flow.draw(SEARCHED_DRAWS))
    return None if usable is None else _FlowDraws(number, *usable, units_of(usable[1]))


def _climbed(stack: Stack, drawn: Sequence[_FlowDraws], seed: int) -> list[list[MissedRegion]]:
    """Climb from a few points for each data set; return what is missed at the ends."""
    prior = prior_draws(stack.densities[0], SEARCHES, seed=derive(seed, "modes from the prior"))
    points = torch.cat([torch.cat([_own_points(one), prior]) for one in drawn])
    count = len(points) // len(drawn)
    units = torch.stack([_full(one.units) for one in drawn]).repeat_interleave(count, 0)
    paths = pathfinder(stack.select([one.number for one in drawn]), points, units, seed=derive(seed, "modes"))
    own = [paths.some(slice(place * count, (place + 1) * count)) for place in range(len(drawn))]
    found, doubts = [], []
    for one, part in zip(drawn, own, strict=True):
        missed, doubtful = _weighed(one.guide, part, EACH, one.units, seed=derive(seed, f"weighed {one.number}"))
        found.append(missed)
        doubts.append([] if missed else doubtful)
    more = _tempered(stack, drawn, own, doubts, seed)
    return [missed or heavy for missed, heavy in zip(found, more, strict=True)]


def _tempered(
    stack: Stack,
    drawn: Sequence[_FlowDraws],
    own: Sequence[Paths],
    doubts: Sequence[Sequence[UnverifiedMode]],
    seed: int,
) -> list[list[MissedRegion]]:
    """Measure masses at the ends of doubtful paths, two of each data set at most, by tempering them all together."""
    asked, chosen, normals = [], [], []
    for place, (one, paths, doubtful) in enumerate(zip(drawn, own, doubts, strict=True)):
        numbers, worth = worth_measuring(one.guide, paths, EACH, doubtful, one.units)
        if worth:
            asked.append((place, worth[:EACH]))
            chosen.append(one.number)
            normals.append((numbers[: 1 + EACH] * (1 + EACH))[: 1 + EACH])  # as many for each
    found: list[list[MissedRegion]] = [[] for _ in drawn]
    if not asked:
        return found
    parts = [own[place].best.some(numbers) for (place, _), numbers in zip(asked, normals, strict=True)]
    best = Gaussians(*(torch.cat(part) for part in zip(*parts, strict=True)))
    walk = temper(stack.select(chosen), best, seed=derive(seed, "tempering"))
    for row, (place, worth) in enumerate(asked):
        rows = slice(row * (1 + EACH), row * (1 + EACH) + 1 + len(worth))
        mine = Tempered(*(part[rows] for part in walk))
        found[place] = modes_with_mass(drawn[place].guide, own[place].ends, worth, best.some(rows), mine)
    return found


def _full(units: Tensor) -> Tensor:
    return units if units.dim() == 2 else units.diag()


def _own_points(one: _FlowDraws) -> Tensor:
    """Draws of the guide, and draws moved outwards."""
    center = one.z.median(0).values
    rows = torch.arange(EACH * (1 + len(INFLATED)), device=one.z.device) % len(one.z)
    own, *far = one.z[rows].split([EACH] * (1 + len(INFLATED)))
    return torch.cat([own, *(center + factor * (part - center) for factor, part in zip(INFLATED, far, strict=True))])


def _wandered(stack: Stack, drawn: Sequence[_FlowDraws], seed: int) -> list[list[MissedRegion]]:
    """Move walkers from weighted draws of all data sets; return places where guides are too thin."""
    begun = []
    for one in drawn:
        ratios = torch.log_softmax(one.weights.double(), 0)
        begun.append(one.z[resample(ratios, COMPARED_DRAWS // 2, seed=derive(seed, f"wanderers {one.number}"))])
    units, chosen = torch.stack([_full(one.units) for one in drawn]), stack.select([one.number for one in drawn])
    walked_to = move_walkers(chosen, torch.stack(begun), units, seed=derive(seed, "wandering"))
    found = []
    for one, ends, log_p in zip(drawn, *walked_to, strict=True):
        mass = torch.softmax((one.weights - one.guide.covered).double(), 0)
        draws = one.z, one.weights + one.log_q
        found.append(regions_by_density(one.guide, (ends, log_p), draws, mass))
    return found


def _search(one: _FlowDraws | None, missed: Sequence[MissedRegion], symmetric: bool) -> Search:
    """Return the result of the search, with the sentence on it."""
    paths = EACH * len(INFLATED) + SEARCHES
    notes = (f"many data sets were fitted side by side, and the search for missed modes had {paths} paths for each",)
    if one is None:
        return Search(notes=notes)
    if missed:
        return Search(tuple(missed), sentence_on(one.guide.density, missed, one.few[0]), notes)
    if symmetric:
        return Search((), "the model has a symmetry, and modes were missed at another data set", notes)
    return Search(notes=notes, passed=True)
