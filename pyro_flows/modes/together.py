"""The search for missed modes of many data sets at once, with fewer paths and walkers for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows._seeding import derive
from pyro_flows.flows.flow import Flow
from pyro_flows.model.stack import Stack
from pyro_flows.modes.climbs import INFLATED, _weighed
from pyro_flows.modes.missed_modes import Search, mirrored, sentence_on
from pyro_flows.modes.missed_regions import Guide, MissedRegion, guide_at, is_resolved
from pyro_flows.modes.symmetries import MOVED_DRAWS
from pyro_flows.modes.tempering import Tempered, move_walkers_together, temper
from pyro_flows.modes.under_covered import MANY_WALKERS, regions_by_density
from pyro_flows.modes.units import units_of
from pyro_flows.modes.unverified_modes import UnverifiedMode, modes_with_mass, worth_measuring
from pyro_flows.starts.gaussians import Gaussians
from pyro_flows.starts.pathfinder import Paths, pathfinder
from pyro_flows.starts.prior import SEARCHES, prior_draws
from pyro_flows.verdict.weighing import resample

DRAWS = 600  # of each flow
OUTWARDS = INFLATED[:2]
OWN = EACH = 2  # paths from the guide's own draws; from draws that each factor moves away from their median
MEASURED = 2  # doubtful places of each data set, by tempering
SEARCHED_FOR_SYMMETRIES = 2  # data sets: exact symmetries belong to the model


def missed_together(stack: Stack, flows: Sequence[Flow], *, seed: int) -> list[Search]:
    """Search for what each flow lacks, as :func:`missed_modes` does for one; notes say what was searched less.

    Symmetries are tried on the first data sets only: where one of them shows a missed mode, all data sets count as
    lacking, so that each is fitted by itself.
    """
    drawn = [_draw(stack, number, flow) for number, flow in enumerate(flows)]
    usable = [one for one in drawn if one is not None]
    if not usable:
        return [Search() for _ in drawn]
    symmetric = any(mirrored(one.guide, *one.few) for one in usable[:SEARCHED_FOR_SYMMETRIES])
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
        return self.z[:MOVED_DRAWS], self.log_q[:MOVED_DRAWS]


def _draw(stack: Stack, number: int, flow: Flow) -> _FlowDraws | None:
    """Draw from a flow; None if no draw has a density."""
    usable = guide_at(stack.densities[number], flow.log_prob, *flow.draw(DRAWS))
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
        missed, doubtful = _weighed(one.guide, part, OWN, one.units, seed=derive(seed, f"weighed {one.number}"))
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
        numbers, worth = worth_measuring(one.guide, paths, OWN, doubtful, one.units)
        if worth:
            asked.append((place, worth[:MEASURED]))
            chosen.append(one.number)
            normals.append((numbers[: 1 + MEASURED] * (1 + MEASURED))[: 1 + MEASURED])  # as many for each
    found: list[list[MissedRegion]] = [[] for _ in drawn]
    if not asked:
        return found
    parts = [own[place].best.some(numbers) for (place, _), numbers in zip(asked, normals, strict=True)]
    best = Gaussians(*(torch.cat(part) for part in zip(*parts, strict=True)))
    walk = temper(stack.select(chosen), best, seed=derive(seed, "tempering"))
    for row, (place, worth) in enumerate(asked):
        rows = slice(row * (1 + MEASURED), row * (1 + MEASURED) + 1 + len(worth))
        mine = Tempered(*(part[rows] for part in walk))
        found[place] = modes_with_mass(drawn[place].guide, own[place].ends, worth, best.some(rows), mine)
    return found


def _full(units: Tensor) -> Tensor:
    return units if units.dim() == 2 else units.diag()


def _own_points(one: _FlowDraws) -> Tensor:
    """Draws of the guide, and draws moved outwards."""
    center = one.z.median(0).values
    rows = torch.arange(OWN + EACH * len(OUTWARDS), device=one.z.device) % len(one.z)
    own, *far = one.z[rows].split([OWN, *[EACH] * len(OUTWARDS)])
    return torch.cat([own, *(center + factor * (part - center) for factor, part in zip(OUTWARDS, far, strict=True))])


def _wandered(stack: Stack, drawn: Sequence[_FlowDraws], seed: int) -> list[list[MissedRegion]]:
    """Move walkers from weighted draws of all data sets; return places where guides are too thin."""
    begun = []
    for one in drawn:
        ratios = torch.log_softmax(one.weights.double(), 0)
        begun.append(one.z[resample(ratios, MANY_WALKERS // 2, seed=derive(seed, f"wanderers {one.number}"))])
    units, chosen = torch.stack([_full(one.units) for one in drawn]), stack.select([one.number for one in drawn])
    walked_to = move_walkers_together(chosen, torch.stack(begun), units, seed=derive(seed, "wandering"))
    found = []
    for one, ends, log_p in zip(drawn, *walked_to, strict=True):
        mass = torch.softmax((one.weights - one.guide.covered).double(), 0)
        draws = one.z, one.weights + one.log_q
        found.append(regions_by_density(one.guide, (ends, log_p), draws, mass))
    return found


def _search(one: _FlowDraws | None, missed: Sequence[MissedRegion], symmetric: bool) -> Search:
    """Return the result of the search, with the sentence on it."""
    paths = EACH * len(OUTWARDS) + SEARCHES
    notes = (f"many data sets were fitted side by side, and the search for missed modes had {paths} paths for each",)
    if one is None:
        return Search(notes=notes)
    if missed:
        return Search(tuple(missed), sentence_on(one.guide.density, missed, one.few[0]), notes)
    if symmetric:
        return Search((), "the model has a symmetry, and modes were missed at another data set", notes)
    return Search(notes=notes, passed=True)
