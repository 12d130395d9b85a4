r"""Exact moves: reflections and exchanges that leave the density as it is, and so map one mode of it onto another.

Where p(T z) is about p(z) for draws z of a guide, and q(T z) is far below q(z), that much mass is missing, exactly: no
approximation of a mode's mass is needed, and the dimension does not matter. The moves act on the model's own values:

- a whole site is reflected, or one index along an axis of it: at 0, or in the middle of two bounds;
- two indices along an axis change places;
- two sites of one shape and support change places.

A factor's sign changes along with that of its loadings, and two components of a mixture change places in their weights
and in all their parameters. So such units are put together: from each of them as a seed, others are added
for as long as the density at a draw rises, all at once that raise it.
What comes back to about the height where it began is a move.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pyro_flows.inference.verdict.deciding import ESTIMATED_DRAWS
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.thresholds import EVIDENCE_GAP_NEGLIGIBLE

ROUND_TRIP = 1e-3  # relative error of values that are mapped there and back
DIGITS = 32.0  # units of the last place of a log density, beyond what is negligible, within which two are the same

UNITS = 40  # of one kind at most, whole sites first; twice as many may be added to one

Values = Mapping[str, Tensor]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Unit:
    """One part of a move: a reflection of a site, or of one index along an axis of it; or an exchange.

    Two indices along an axis change places, or ``site`` and the site ``other``.
    """

    site: str
    axis: int | None = None  # counted from the last one, of the site's value
    indices: tuple[int, ...] = ()
    other: str | None = None

    @property
    def swaps(self) -> bool:
        """Whether two indices or two sites change places; values are reflected otherwise."""
        return len(self.indices) == 2 or self.other is not None

    @property
    def sites(self) -> set[str]:
        return {self.site} if self.other is None else {self.site, self.other}

    def apply(self, values: Values, middles: Values) -> dict[str, Tensor]:
        value = values[self.site]
        if self.other is not None:
            return {self.site: values[self.other], self.other: value}
        if not self.swaps:
            mirrored = 2.0 * middles[self.site].to(value) - value if self.site in middles else -value
            return {self.site: mirrored if self.axis is None else torch.where(self._chosen(value), mirrored, value)}
        assert self.axis is not None
        first, second = self.indices
        return {self.site: value.index_select(self.axis, _swapped(value.shape[self.axis], first, second, value.device))}

    def _chosen(self, value: Tensor) -> Tensor:
        assert self.axis is not None
        shape = [1] * value.dim()
        shape[self.axis] = value.shape[self.axis]
        index = torch.arange(value.shape[self.axis], device=value.device)
        return (index == self.indices[0]).reshape(shape)


@functools.lru_cache(maxsize=4096)
def _swapped(length: int, first: int, second: int, device: torch.device) -> Tensor:
    """Return the order of so many things of which two have changed places."""
    order = list(range(length))
    order[first], order[second] = second, first
    return torch.tensor(order, device=device)


Members = tuple[Unit, ...]


@dataclass(frozen=True)
class Move:
    """Several units at once: a map of the model's values onto themselves that keeps volumes.

    Values are reflected about ``middles``, each of its site's shape; about 0 where a site has none.
    """

    units: Members
    middles: Values = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, values: Values) -> dict[str, Tensor]:
        moved = dict(values)
        for unit in self.units:
            moved |= unit.apply(moved, self.middles)
        return moved


@torch.no_grad()
def middles_of(density: LogDensity, z: Tensor) -> dict[str, Tensor]:
    """Return the middle of each site between two bounds, at which its values are reflected; ``z`` is any draw (1, D).

    A share w of one of two components becomes 1 - w when the components change places. Entries without two bounds
    are reflected at 0. A value between two bounds no longer changes from coordinate 30 to 40.
    """
    ends = [torch.full_like(z, end) for end in (0.0, 30.0, 40.0, -30.0, -40.0)]
    found = {}
    for name, value in latents_of(density, torch.cat(ends)).items():
        middle, almost, upper, above, lower = value
        reach = (upper - middle).abs() + (lower - middle).abs()
        rest = 1e-9 * reach
        still = ((upper - almost).abs() <= rest) & ((lower - above).abs() <= rest) & (reach > 0.0)
        bounded = still & ((upper + lower - 2.0 * middle).abs() <= rest)
        if bool(bounded.any()):
            found[name] = torch.where(bounded, middle, 0.0)
    return found


class Kind(NamedTuple):
    """The units that moves grow from, and those that may be added to them, the former among them."""

    seeds: list[Unit]
    additions: list[Unit]


def kinds_of(density: LogDensity, latents: Values) -> list[Kind]:
    """Return the units that may be put together, of values (1, *shape).

    These are all reflections; exchanges of the same indices on axes of one length; and exchanges of sites of one shape
    and support. Reflections of single numbers go with both kinds of exchanges, and exchanges of indices with those of
    sites: components that change places do so in their shares too.
    """
    reflections: list[Unit] = []
    swaps: dict[tuple[int, int, int], list[Unit]] = {}
    for site, value in latents.items():
        shape = value.shape[1:]
        reflections.append(Unit(site))
        for axis in range(-len(shape), 0):
            length = shape[axis]
            if not 1 < length <= UNITS:  # a longer axis has more indices than are kept
                continue
            reflections += [Unit(site, axis, (index,)) for index in range(length)]
            for first, second in _pairs(range(length), up_to=6, apart=1):
                swaps.setdefault((length, first, second), []).append(Unit(site, axis, (first, second)))
    reflections.sort(key=lambda unit: unit.axis is not None)
    numbers = [unit for unit in reflections if unit.axis is None and latents[unit.site].numel() == 1]
    exchanges = [
        Unit(site, other=other) for sites in _alike(density) for site, other in _pairs(sites, up_to=8, apart=4)
    ]
    kinds: list[tuple[list[Unit], list[Unit]]] = [(reflections, [])]
    kinds += [(units, numbers) for units in list(swaps.values())[:UNITS]]
    kinds += [(exchanges, [*numbers, *itertools.chain(*swaps.values())])]
    return [Kind(seeds[:UNITS], [*seeds[:UNITS], *more][: 2 * UNITS]) for seeds, more in kinds if seeds]


def _pairs(things: Sequence[_T], *, up_to: int, apart: int) -> list[tuple[_T, _T]]:
    """Return all pairs of a few things, and those that stand near each other of many."""
    numbers = range(len(things))
    pairs = itertools.combinations(numbers, 2)
    return [(things[i], things[j]) for i, j in pairs if len(things) <= up_to or j - i <= apart]


@torch.no_grad()
def _alike(density: LogDensity) -> list[list[str]]:
    """Return sites by their shapes and supports: those of one support have the same values at the same coordinates."""
    z = torch.tensor([[-1.0], [2.0]], dtype=density.dtype, device=density.device).expand(2, density.dim)
    found: dict[tuple[object, ...], list[str]] = {}
    for name, value in latents_of(density, z).items():
        told = value.reshape(2, -1)[:, :1].double().flatten().tolist()
        found.setdefault((value.shape[1:], value.dtype, *(f"{number:.6g}" for number in told)), []).append(name)
    return list(found.values())


def latents_of(density: LogDensity, z: Tensor) -> dict[str, Tensor]:
    """Return the latent values of a model at draws (S, D)."""
    return {name: value for name, value in density.constrain(z).items() if name in density.names}


_Growth = Generator[list[Members], Tensor, list[Members]]


class Image(NamedTuple):
    """What a move makes of draws: points (S, D), whether they are inside of the support (S,), and densities there."""

    z: Tensor
    inside: Tensor
    log_p: Tensor  # -inf outside
    log_jacobian: Tensor


def are_the_same(log_p: Tensor, other: Tensor) -> Tensor:
    """Whether log densities (S,) are the same but for rounding, and but for a fiftieth of a mass; -inf never is."""
    return (log_p - other).abs() <= EVIDENCE_GAP_NEGLIGIBLE + DIGITS * torch.finfo(log_p.dtype).eps * log_p.abs()


@torch.no_grad()
def images(density: LogDensity, moves: Sequence[Move], z: Tensor) -> Iterator[Image]:
    """Yield the image of unconstrained draws (S, D) under each move; several moves share a run of the model."""
    latents = latents_of(density, z)
    at_once = max(1, ESTIMATED_DRAWS // len(z))
    for first in range(0, len(moves), at_once):
        group = moves[first : first + at_once]
        moved = [move(latents) for move in group]
        placed, inside = _placed(density, moved)
        log_p = torch.where(inside, density(placed), -torch.inf)
        parts = (part.split(len(z)) for part in (placed, inside, log_p, density.log_jacobian(placed)))
        yield from (Image(*image) for image in zip(*parts, strict=True))


@torch.no_grad()
def moves(density: LogDensity, z: Tensor) -> list[Move]:
    """Return the moves found at draws ``z`` (S, D) that lead back to about their heights; see the module.

    All kinds of units at all draws grow side by side, so that the model runs once for each addition. Cost: at most
    40 (80 + 1) densities for each kind, draw and addition, of which there are at most twelve; most models have a few
    units, and two additions.
    """
    middles, kinds = middles_of(density, z[:1]), kinds_of(density, latents_of(density, z[:1]))
    growing: list[tuple[Values, _Growth]] = []
    for draw in z:
        latents: Values = latents_of(density, draw[None])
        growing += [(latents, _grown(kind)) for kind in kinds]
    asked = [next(growth) for _, growth in growing]
    found: dict[frozenset[Unit], Move] = {}
    while growing:
        pairs = zip(growing, asked, strict=True)
        heights = _heights(
            density, [(latents, Move(members, middles)) for (latents, _), sets in pairs for members in sets]
        )
        parts = heights.split([len(sets) for sets in asked])
        still: list[tuple[Values, _Growth]] = []
        asked = []
        for (latents, growth), part in zip(growing, parts, strict=True):
            try:
                asked.append(growth.send(part))
                still.append((latents, growth))
            except StopIteration as end:
                for members in end.value:
                    found.setdefault(frozenset(members), Move(members, middles))
        growing = still
    return list(found.values())


SignedPermutation = tuple[tuple[int, ...], tuple[float, ...]]  # of coordinates: x becomes signs * x[order]


def signed_permutation(z: Tensor, moved: Tensor) -> SignedPermutation | None:
    """Return the order and signs that take draws ``z`` (S, D) to their images; None if nothing of that kind does."""
    few, images = z[:8], moved[:8]
    away = torch.stack([(images[:, :, None] - sign * few[:, None, :]).abs().amax(0) for sign in (1.0, -1.0)])
    nearest, places = away.amin(0).min(1)
    order = places.tolist()
    scale = few.abs().amax(0)[places].clamp_min(torch.finfo(z.dtype).tiny)
    if not bool((nearest <= ROUND_TRIP * scale).all()) or len({*order}) < len(order):
        return None
    signs = torch.where(away[0] <= away[1], 1.0, -1.0)[torch.arange(len(order)), places]
    return tuple(order), tuple(signs.tolist())


def group(generators: Iterable[SignedPermutation], limit: int) -> list[SignedPermutation] | None:
    """Return the group that signed permutations generate, the identity first; None if it has more than ``limit``.

    Without generators, it is empty.
    """
    steps = list(dict.fromkeys(generators))
    found = {identity(len(step[0])): None for step in steps[:1]}
    waiting = list(found)
    while waiting:
        order, signs = waiting.pop()
        for step in steps:
            both = product((order, signs), step)
            if both not in found:
                found[both] = None
                waiting.append(both)
        if len(found) > limit:
            return None
    return list(found)


def identity(dim: int) -> SignedPermutation:
    """Return the one that leaves all coordinates as they are."""
    return tuple(range(dim)), (1.0,) * dim


def image_of(z: Tensor, move: SignedPermutation) -> Tensor:
    order, signs = move
    return z[:, list(order)] * z.new_tensor(signs)


def product(first: SignedPermutation, then: SignedPermutation) -> SignedPermutation:
    """Return the composition of two signed permutations."""
    (order, signs), (places, flips) = first, then
    moved = tuple(flip * signs[place] for flip, place in zip(flips, places, strict=True))
    return tuple(order[place] for place in places), moved


def _grown(kind: Kind) -> _Growth:
    """Grow a set from each unit of a kind, all side by side; return those that come back to three nats below the start.

    Yields sets, and is sent their heights.
    """
    sets: list[Members] = [(unit,) for unit in kind.seeds]
    height, *rest = (yield [(), *sets]).split([1, len(sets)])
    heights = rest[0]
    sets = [members for members, at in zip(sets, heights.tolist(), strict=True) if at > -torch.inf]
    heights = heights[heights > -torch.inf]
    done: list[Members] = []
    while True:
        returned = (heights > height - 3.0).tolist()
        done += [members for members, back in zip(sets, returned, strict=True) if back]
        open_ = [number for number, back in enumerate(returned) if not back]
        tried = [[(*sets[number], unit) for unit in _joining(kind.additions, sets[number])] for number in open_]
        if not any(tried):
            break
        results = (yield list(itertools.chain(*tried))).split([len(group) for group in tried])
        grown = []
        for number, group, gains in zip(open_, tried, results, strict=True):
            rising = gains > heights[number]
            if bool(rising.any()):
                # all that rise, if they agree with each other; else the best alone
                together = _together(sets[number], [group[i][-1] for i in rising.nonzero().flatten().tolist()])
                grown += [together, group[int(gains.argmax())]]
        if not grown:
            break
        sets = list(dict.fromkeys(grown))
        heights = yield sets
    return done


def _joining(units: Sequence[Unit], members: Members) -> list[Unit]:
    """Return the units that go with a set: they are not in it, and neither does what is a part of the other."""
    own = set(members)
    taken = set[str]().union(*(unit.sites for unit in members))
    whole = set[str]().union(*(unit.sites for unit in members if unit.axis is None))
    return [unit for unit in units if unit not in own and not unit.sites & (taken if unit.axis is None else whole)]


def _together(members: Members, additions: list[Unit]) -> Members:
    for unit in additions:  # whole sites come first
        if _joining([unit], members):
            members = (*members, unit)
    return members


def _heights(density: LogDensity, asked: Sequence[tuple[Values, Move]]) -> Tensor:
    """Return the log density (N,) of a model's own values after each move; -inf outside of the support."""
    found = []
    for first in range(0, len(asked), ESTIMATED_DRAWS):
        z, inside = _placed(density, _moved(asked[first : first + ESTIMATED_DRAWS]))
        heights = density(z) - density.log_jacobian(z)
        found.append(torch.where(inside, heights.double(), -torch.inf).nan_to_num(nan=-torch.inf, posinf=-torch.inf))
    return torch.cat(found)


def _moved(asked: Sequence[tuple[Values, Move]]) -> list[Values]:
    """Return values after each move. Neighbors often differ in their last unit alone: the rest is shared."""
    found: list[Values] = []
    of, before, shared = None, None, dict[str, Tensor]()
    for latents, move in asked:
        if of is not latents or move.units[:-1] != before:
            of, before = latents, move.units[:-1]
            shared = Move(before, move.middles)(latents)
        found.append(shared | Move(move.units[-1:], move.middles)(shared))
    return found


def _placed(density: LogDensity, moved: Sequence[Values]) -> tuple[Tensor, Tensor]:
    """Return coordinates (S, D) of all values, 0 where they leave the support, and where they are inside of it (S,)."""
    values = {name: torch.cat([one[name] for one in moved]) for name in moved[0]}
    z = density.unconstrain(values)
    inside = torch.isfinite(z).all(1)
    z = torch.where(inside[:, None], z, 0.0)
    for name, back in latents_of(density, z).items():  # values that leave a support may have finite coordinates
        close = torch.isclose(back.to(values[name]), values[name], rtol=ROUND_TRIP, atol=ROUND_TRIP)
        inside = inside & close.reshape(len(z), -1).all(1)
    return torch.where(inside[:, None], z, 0.0), inside
