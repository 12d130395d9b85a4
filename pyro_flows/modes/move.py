"""One exact move of a model's values, and the units that it is made of; ``symmetries.py`` finds moves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pyro_flows.model.log_density import LogDensity

UNITS = 40  # of one kind at most, whole sites first; twice as many may be added to one
AXIS = 32  # longest axis whose indices are moved one at a time

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
            if not 1 < length <= AXIS:
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
