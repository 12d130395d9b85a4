"""The search for missed modes of many data sets at once: fewer paths and wanderers for each, all side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_flows._seeding import derive
from pyro_flows.flows.flow import Flow
from pyro_flows.model.stack import Stack
from pyro_flows.modes.climbs import _weighed
from pyro_flows.modes.missed_modes import MOVED_DRAWS, Search, mirrored, sentence_on
from pyro_flows.modes.missed_regions import Guide, MissedRegion, is_resolved, regions_of_walkers
from pyro_flows.modes.tempering import Tempered, move_walkers_together, temper
from pyro_flows.modes.under_covered import BY_WALKERS
from pyro_flows.modes.units import units_of
from pyro_flows.modes.unverified_modes import UnverifiedMode, modes_with_mass, worth_measuring
from pyro_flows.starts.gaussians import Gaussians
from pyro_flows.starts.pathfinder import Paths, pathfinder
from pyro_flows.starts.prior import prior_draws
from pyro_flows.verdict.deciding import resample
from pyro_flows.verdict.thresholds import DENSITY_GAP_OF_WALKERS

DRAWS = 600
OWN, PRIOR = 2, 8  # paths from the guide's own draws, and from the prior's
OUTWARDS = (3.0, 10.0)  # factors by which draws are moved away from their median, two of them each
EACH = 2
MEASURED = 2  # doubtful places of each data set, by tempering
MANY_WALKERS = 128
MIRRORED = 2  # data sets on which exact symmetries are tried: they are a matter of the model


def missed_together(stack: Stack, flows: Sequence[Flow], *, seed: int) -> list[Search]:
    """Search for what each flow lacks, as :func:`missed_modes` does for one; notes say what was searched less.

    Symmetries are tried on the first data sets only: where one of them shows a missed mode, all data sets count as
    lacking, so that each is fitted by itself.
    """
    looks = [_Look(stack, number, flow) for number, flow in enumerate(flows)]
    found: list[list[MissedRegion]] = [[] for _ in looks]
    usable = [number for number, look in enumerate(looks) if look.guide is not None]
    if not usable:
        return [Search() for _ in looks]
    symmetric = any(mirrored(*looks[number].few) for number in usable[:MIRRORED])
    for search in (_climbed, _wandered):
        for number, lacks in zip(usable, search(stack, looks, usable, seed), strict=True):
            found[number] = found[number] or [lack for lack in lacks if is_resolved(looks[number].density, lack.place)]
    return [_search(look, lacks, symmetric) for look, lacks in zip(looks, found, strict=True)]


class _Look:
    """Draws of one flow, and the guide that it is."""

    def __init__(self, stack: Stack, number: int, flow: Flow) -> None:
        density = stack.densities[number]
        z, log_q = flow.draw(DRAWS)
        with torch.no_grad():
            weights = density(z) - log_q
        finite = torch.isfinite(weights)
        self.density = density
        self.guide = Guide(density, flow.log_prob, float(weights[finite].median())) if bool(finite.any()) else None
        self.z, self.log_q, self.weights = z[finite], log_q[finite], weights[finite]
        self.units = units_of(self.z) if self.guide is not None else torch.eye(stack.dim)

    @property
    def few(self) -> tuple[Guide, Tensor, Tensor]:
        return _guide(self), self.z[:MOVED_DRAWS], self.log_q[:MOVED_DRAWS]


Searcher = Callable[[Stack, Sequence[_Look], Sequence[int], int], list[list[MissedRegion]]]


def _climbed(stack: Stack, looks: Sequence[_Look], usable: Sequence[int], seed: int) -> list[list[MissedRegion]]:
    """Climb from a few points for each data set; return what is missed at the ends."""
    chosen = stack.select(usable)
    prior = prior_draws(stack.densities[0], PRIOR, seed=derive(seed, "modes from the prior"))
    points = torch.cat([torch.cat([_own_points(looks[number]), prior]) for number in usable])
    count = len(points) // len(usable)
    units = torch.stack([_full(looks[number].units) for number in usable]).repeat_interleave(count, 0)
    paths = pathfinder(chosen, points, units, seed=derive(seed, "modes"))
    own = [_part(paths, slice(place * count, (place + 1) * count)) for place in range(len(usable))]
    found, doubts = [], []
    for number, part in zip(usable, own, strict=True):
        look, own_seed = looks[number], derive(seed, f"weighed {number}")
        lacks, doubtful = _weighed(_guide(look), part, OWN, look.units, seed=own_seed)
        found.append(lacks)
        doubts.append([] if lacks else doubtful)
    more = _tempered(stack, looks, usable, own, doubts, seed)
    return [lacks or heavy for lacks, heavy in zip(found, more, strict=True)]


def _tempered(
    stack: Stack, looks: Sequence[_Look], usable: Sequence[int], own: Sequence[Paths],
    doubts: Sequence[Sequence[UnverifiedMode]], seed: int,
) -> list[list[MissedRegion]]:  # fmt: skip
    """Measure masses at the ends of doubtful paths, two of each data set at most, by tempering them all together."""
    asked, chosen, normals = [], [], []
    for place, (number, paths, doubtful) in enumerate(zip(usable, own, doubts, strict=True)):
        numbers, worth = worth_measuring(_guide(looks[number]), paths, OWN, doubtful, looks[number].units)
        if worth:
            asked.append((place, worth[:MEASURED]))
            chosen.append(number)
            normals.append((numbers[: 1 + MEASURED] * (1 + MEASURED))[: 1 + MEASURED])  # as many for each
    found: list[list[MissedRegion]] = [[] for _ in usable]
    if not asked:
        return found
    parts = [[part[numbers] for part in own[place].best] for (place, _), numbers in zip(asked, normals, strict=True)]
    best = Gaussians(*(torch.cat(part) for part in zip(*parts, strict=True)))
    walk = temper(stack.select(chosen), best, seed=derive(seed, "tempering"))
    for row, (place, worth) in enumerate(asked):
        rows = slice(row * (1 + MEASURED), row * (1 + MEASURED) + 1 + len(worth))
        guide, mine = _guide(looks[usable[place]]), Tempered(*(part[rows] for part in walk))
        found[place] = modes_with_mass(guide, own[place].ends, worth, mine)
    return found


def _part(paths: Paths, part: slice) -> Paths:
    best = Gaussians(*(x[part] for x in paths.best))
    return Paths(best, paths.elbo[part], paths.ends[part], paths.settled[part])


def _guide(look: _Look) -> Guide:
    assert look.guide is not None
    return look.guide


def _full(units: Tensor) -> Tensor:
    return units if units.dim() == 2 else units.diag()


def _own_points(look: _Look) -> Tensor:
    """Draws of the guide, and draws moved outwards."""
    center = look.z.median(0).values
    rows = torch.arange(OWN + EACH * len(OUTWARDS), device=look.z.device) % len(look.z)
    own, *far = look.z[rows].split([OWN, *[EACH] * len(OUTWARDS)])
    return torch.cat([own, *(center + factor * (part - center) for factor, part in zip(OUTWARDS, far, strict=True))])


def _wandered(stack: Stack, looks: Sequence[_Look], usable: Sequence[int], seed: int) -> list[list[MissedRegion]]:
    """Let weighted draws of all data sets wander; return places where guides are too thin."""
    chosen = stack.select(usable)
    begun = []
    for number in usable:
        ratios = torch.log_softmax(looks[number].weights.double(), 0)
        begun.append(looks[number].z[resample(ratios, MANY_WALKERS, seed=derive(seed, f"wanderers {number}"))])
    units = torch.stack([_full(looks[number].units) for number in usable])
    ends, log_p = move_walkers_together(chosen, torch.stack(begun), units, seed=derive(seed, "wandering"))
    return [_thin(looks[number], *parts) for number, *parts in zip(usable, ends, log_p, strict=True)]


def _thin(look: _Look, ends: Tensor, log_p: Tensor) -> list[MissedRegion]:
    """Return a place where the guide is too thin, if more draws came there than weights know of."""
    guide = _guide(look)
    ratios = (look.weights - guide.covered).double()
    there = guide.is_under_covered(look.z, look.weights + look.log_q, by=DENSITY_GAP_OF_WALKERS)
    thin = guide.is_under_covered(ends, log_p, by=DENSITY_GAP_OF_WALKERS)
    return regions_of_walkers(ends, thin, torch.softmax(ratios, 0), there, BY_WALKERS)


def _search(look: _Look, lacks: Sequence[MissedRegion], symmetric: bool) -> Search:
    """Put what was found into words."""
    paths = EACH * len(OUTWARDS) + PRIOR
    notes = (f"many data sets were fitted side by side, and the search for missed modes had {paths} paths for each",)
    if look.guide is None:
        return Search(notes=notes)
    if lacks:
        return Search(tuple(lacks), sentence_on(look.density, lacks, look.z[:MOVED_DRAWS]), notes)
    if symmetric:
        return Search((), "the model has a symmetry, and modes were missed at another data set", notes)
    return Search(notes=notes, passed=True)
