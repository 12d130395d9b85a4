r"""Log marginal densities along directions, from the middle outward, as far as numbers are exact.

Along a direction u, with :math:`z = m + c\,u + B v` (B orthonormal and across u), the mass at c is that of Laplace's
method,

.. math:: \log f(c) = \max_v \log p(z) - \tfrac12 \log |B^\top H B| + \text{const},

H the Hessian of -log p. Widths of eigenvectors beyond which the density has fallen much faster than a normal one are
cut. Distances double, and each search for a top begins where those before lead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.inference.modes.tops import hessians
from pyro_flows.inference.starts.prior import LEVEL
from pyro_flows.model.graphs import Recorder
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process.fallbacks import strict

SURE = {torch.float64: 30.0, torch.float32: 12.0}  # nats below the top; farther down, rounding may look like a tail,
DEEP = 1000.0  # unless single precision has the same; below that, no place is evaluated
LENGTHS = (4.0, 1.0, 0.5, 0.1, 0.01)  # shares of a step of Newton's method that are tried
UNKNOWN_CURVATURE, NO_CURVATURE = 1e-10, 1e-14  # of the largest one, where the diagonal is 1: rounding; none at all
WIDE = 2.0  # sds at which falls are compared with that of a normal density


class Side(NamedTuple):
    """Distances (N,) from the middle, log masses there, their rounding, and across how many directions all is level.

    NaN stands for what is not known.
    """

    distances: Tensor
    masses: Tensor
    noise: Tensor
    level: Tensor


class Place(NamedTuple):
    """Tops (K, D) in units from the middle, log densities and masses (K,) there, and the rest of a :class:`Side`."""

    tops: Tensor
    heights: Tensor
    masses: Tensor
    noise: Tensor
    level: Tensor


class Outward:
    """The log density about a middle (D,), in units (D,), along some of its coordinates (K,), both ways.

    Rows are the coordinates, one way and then the other (2 K). ``single`` is the density in single precision, if known.
    """

    def __init__(
        self, density: LogDensity, single: LogDensity | None, middle: Tensor, units: Tensor, coordinates: Sequence[int]
    ) -> None:
        self.density, self.single, self.dtype = density, single, middle.dtype
        self.deep = SURE[middle.dtype] if single is None else DEEP
        self.middle, self.units = middle.double(), units.double()
        self._hessians = Recorder(lambda z: (hessians(density, z, exact=True),), density.numbers * density.dim)
        self.about(coordinates, [()] * len(coordinates))

    def about(self, coordinates: Sequence[int], held: Sequence[Sequence[int]]) -> Outward:
        """Look along these coordinates next, with as many others held in the middle for each of them."""
        unit = torch.eye(len(self.middle)).to(self.middle)
        kept = [[i for i in range(len(unit)) if i not in (u, *some)] for u, some in zip(coordinates, held, strict=True)]
        self.directions = torch.cat([unit[list(coordinates)], -unit[list(coordinates)]])
        self.across = unit[torch.tensor(kept, dtype=torch.long).view(len(kept), -1)].mT.repeat(2, 1, 1)
        return self

    def sides(self) -> list[Side]:
        """Return what is found along each row, up to places that are deep below the highest one of a direction."""
        count = len(self.directions)
        rows, zero = torch.arange(count, device=self.middle.device), self.middle.new_zeros(count)
        places = [self._at(rows, self.middle.expand(count, -1) * 0.0)]
        distances, far = [zero], [zero, zero]  # of the last two tops that are known
        tops = [places[0].tops] * 2
        unknown, open_ = zero.clone(), torch.ones_like(zero, dtype=torch.bool)
        best = places[0].masses.nan_to_num(nan=-torch.inf)
        for doubling in range(40):  # at most
            rows = open_.nonzero()[:, 0]
            if not len(rows):
                break
            distance, start = self._starts(rows, 2.0**doubling, tops, far)
            here = ~distance.isnan()
            found = Place(*(part.new_full((count, *part.shape[1:]), torch.nan) for part in places[0]))
            if bool(here.any()):
                for field, part in zip(found, self._at(rows[here], start[here]), strict=True):
                    field[rows[here]] = part
            at = zero + torch.nan
            at[rows] = distance
            known = ~found.masses.isnan()
            tops = [torch.where(known[:, None], new, old) for new, old in ((tops[1], tops[0]), (found.tops, tops[1]))]
            far = [torch.where(known, new, old) for new, old in ((far[1], far[0]), (at, far[1]))]
            best = torch.maximum(best, found.masses.nan_to_num(nan=-torch.inf))
            best = best.view(2, -1).amax(0).repeat(2)
            unknown = torch.where(known, 0.0, unknown + 1.0)
            ended = at != 2.0**doubling
            open_ = open_ & ~ended & (unknown < 4.0) & ~(found.masses < best - self.deep)
            distances.append(at)
            places.append(found)
        whole = Place(*(torch.stack(parts, 1) for parts in zip(*places, strict=True)))
        masses = self._without_ends(whole, best)
        return [Side(*row) for row in zip(torch.stack(distances, 1), masses, whole.noise, whole.level, strict=True)]

    def _without_ends(self, place: Place, best: Tensor) -> Tensor:
        """Return masses (K, N) of places along rows with such a top (K,), NaN where they hang on the precision.

        An edge, and a level that a density comes to far down, are where they are in single precision too, whose heights
        may be off by a hundredth. Numbers end sooner there, and probabilities are cut off higher up. Fewer than three
        places do not tell of a level.
        """
        masses, rows = place.masses.clone(), torch.arange(len(best), device=best.device)
        for own, levels in zip(masses, place.level, strict=True):  # a curvature too small for numbers
            known = own.isfinite().nonzero()[:, 0]
            same = levels[known] == levels[known[-1:]]
            few = known[len(known) - int(same.flip(0).cumprod(0).sum()) :]
            own[few] = torch.nan if len(few) < min(3, len(known)) else own[few]
        last = (masses.isfinite() * torch.arange(1, 1 + masses.shape[1]).to(masses)).argmax(1)
        level = masses[rows, last][:, None]
        first = (masses.isfinite() & (masses < level + LEVEL)).double().argmax(1)
        edge, come_to = (self._single(place.tops[rows, at]) for at in (last, first))
        masses = torch.where(masses.isneginf() & ~edge.isfinite()[:, None], torch.nan, masses)
        height = place.heights[rows, first]
        apart = (come_to - height).abs() > LEVEL + 0.01 * height.abs()
        low = level < best[:, None] - SURE[self.dtype]
        return torch.where(low & (apart[:, None] | (self.single is None)), torch.nan, masses)

    def _single(self, y: Tensor) -> Tensor:
        single = self.density if self.single is None else self.single
        return single.unrecorded(self._z(y).float())[0].double()

    def _starts(self, rows: Tensor, distance: float, tops: list[Tensor], far: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the largest share of a distance before the end of numbers (NaN: none), and where to begin there."""
        u = self.directions[rows]
        before, here, first, second = (part[rows] for part in (*tops, *far))
        gap = (second - first)[:, None]
        drift = torch.where(gap > 0.0, (here - before) / gap, 0.0)

        def at(size: Tensor, slope: Tensor) -> Tensor:
            y = here + slope * (size - second)[:, None]
            return y + (size - (y * u).sum(1))[:, None] * u

        distances = here.new_full((len(rows),), torch.nan)
        for share in (1.0, 0.9, 0.8, 0.7, 0.6):
            size = share * distance + 0.0 * second
            there = self._have_ended(at(size, 0.0 * drift), u)
            distances = torch.where(distances.isnan() & ~there, size, distances)
            if not bool(distances.isnan().any()):
                break
        size = distances.nan_to_num(nan=distance)
        choices = torch.stack([at(size, slope) for slope in (drift, 0.0 * drift)])
        heights = self._values(choices.flatten(0, 1)).view(2, -1).nan_to_num(nan=-torch.inf)
        return distances, choices[heights.argmax(0), torch.arange(len(rows))]

    def _at(self, rows: Tensor, y: Tensor) -> Place:
        """Return the tops across the directions, from points y (K, D) on, by Newton's method with |H|."""
        across, y = self.across[rows], y.clone()
        masses, heights_there, level = y.new_full((3, len(y)), torch.nan).unbind()
        open_ = torch.arange(len(y), device=y.device)
        for _ in range(16):  # steps, at most
            height, slope = self._values_and_slopes(y[open_])
            moves, sizes, flat, curved = self._moves(y[open_], across[open_])
            slope = (moves.mT @ slope[:, :, None].nan_to_num())[:, :, 0] * ~flat
            gain = 0.5 * slope.square().sum(1)
            top = gain < 1e-2  # nats
            some = (top & curved & height.isfinite()).nonzero()[:, 0]
            if len(some):
                masses[open_[some]] = (height + gain + sizes)[some] + self._cuts(
                    y[open_[some]], height[some], moves[some]
                )
            masses[open_[height.isneginf()]] = -torch.inf
            heights_there[open_], level[open_] = height, flat.sum(1).to(height)
            step = (moves @ slope[:, :, None])[:, :, 0]
            tried = torch.stack([y[open_] + share * step for share in LENGTHS])
            heights = self._values(tried.flatten(0, 1)).view(len(LENGTHS), -1).nan_to_num(nan=-torch.inf)
            highest, which = heights.max(0)
            going = ~top & (highest > height)
            y[open_[going]] = tried[which, torch.arange(len(open_))][going]
            open_ = open_[going]
            if not len(open_):
                break
        return Place(y, heights_there, masses, self._noise(y), level)

    def _moves(self, y: Tensor, across: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return moves (K, D, D - 1) of an sd along each eigenvector, their log volumes, and whether there is a top.

        Along some of them, which the third result tells, the density has no curvature: they are left out.
        """
        z = self._z(y)
        with strict(on=False):  # where second derivatives cannot be recorded, they are taken without a graph
            whole = hessians(self.density, z, exact=True) if self.density.long else self._hessians(z)[0]
        curvatures = whole * self.units * self.units[:, None]
        curvatures = across.mT @ (0.5 * (curvatures + curvatures.mT)).nan_to_num(0.0, 0.0, 0.0) @ across
        scale = curvatures.diagonal(dim1=1, dim2=2).abs()
        scale = torch.where(scale > 1e-300, scale, 1.0).rsqrt()
        values, vectors = torch.linalg.eigh(scale[:, :, None] * curvatures * scale[:, None])
        sizes = values.abs()
        largest = sizes.amax(1, keepdim=True).clamp_min(1e-300) if sizes.shape[1] else sizes
        level = sizes <= NO_CURVATURE * largest
        moves = across @ (scale[:, :, None] * vectors)
        sds = torch.where(level, 1.0 / moves.norm(dim=1), sizes.maximum(UNKNOWN_CURVATURE * largest).rsqrt())
        volumes = scale.log().sum(1) + torch.where(level, 0.0, sds.log()).sum(1)  # nothing is integrated where level
        curved = ((values > UNKNOWN_CURVATURE * largest) | level).all(1)
        return moves * sds[:, None], volumes, level, curved

    def _cuts(self, tops: Tensor, heights: Tensor, moves: Tensor) -> Tensor:
        """Return logs (K,) of the shares of widths at tops within which the density has not fallen much faster.

        Widths are cut where the density falls by more than eight nats within two sds: they are halved as often as need
        be, and then made longer again by smaller factors.
        """
        if not moves.shape[2]:
            return 0.0 * heights
        away = torch.cat([moves, -moves], 2).mT  # (K, 2 (D - 1), D)

        def falls(share: Tensor) -> Tensor:
            points = tops[:, None] + WIDE * share[:, :, None] * away
            fallen = heights[:, None] - self._values(points.flatten(0, 1)).view(share.shape)
            return fallen.nan_to_num(nan=torch.inf)

        share = torch.ones(away.shape[:2]).to(tops)
        cut = steep = falls(share) > 8.0
        for _ in range(40 if bool(cut.any()) else 0):
            share = torch.where(steep, 0.5 * share, share)
            steep = steep & (falls(share) > 0.5 * WIDE**2)
            if not bool(steep.any()):
                break
        for power in range(1, 6 if bool(cut.any()) else 1):
            longer = torch.where(cut, 2.0 ** (0.5**power) * share, share)
            share = torch.where(falls(longer) > 0.5 * WIDE**2, share, longer)
        return (0.5 * (share[:, : moves.shape[2]] + share[:, moves.shape[2] :])).log().sum(1)

    def _noise(self, y: Tensor) -> Tensor:
        """Return by how much log densities change where coordinates change by their last digits, alike or not."""
        z = self._z(y)
        odd = (1.0 - 2.0 * (torch.arange(z.shape[1]) % 2)).to(z).expand_as(z)
        ways = (torch.ones_like(z), -torch.ones_like(z), odd)
        moved = torch.stack([z, *(torch.nextafter(z, way * torch.inf) for way in ways)])
        heights = self.density.value_and_grad(moved.flatten(0, 1))[0].double().view(len(moved), -1)
        return (heights[1:] - heights[0]).abs().nan_to_num(nan=torch.inf).amax(0)

    def _have_ended(self, y: Tensor, u: Tensor) -> Tensor:
        """Whether values of the sites that move along u have no square, or do not change any more: at a clamp.

        A step of a thousandth outward has to change them by eight units in the last place.
        """
        z, direction = self._z(y), self.units * u
        size = (z.abs() * (u != 0.0)).amax(1) + 1.0
        step = 1e-3 * size / direction.abs().amax(1)
        values = self.density.constrain(torch.cat([z, z + step[:, None] * direction]))
        ended = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        for latent in self.density.structure.latents:
            moving = (u[:, latent.offset : latent.offset + latent.size] != 0.0).any(1)
            here, there = values[latent.name].reshape(2, len(z), -1)
            digits = torch.finfo(here.dtype)
            change = ((there - here) / here.abs().clamp_min(digits.tiny)).abs()
            still = ~(change.nan_to_num(nan=0.0).amax(1) > 8.0 * digits.eps)
            largest = here.abs().amax(1)
            no_square = ~here.isfinite().all(1) | (largest < digits.tiny**0.5) | (largest > digits.max**0.5)
            ended = ended | (moving & (still | no_square))
        return ended

    def _z(self, y: Tensor) -> Tensor:
        return (self.middle + self.units * y).to(self.dtype)

    def _values(self, y: Tensor) -> Tensor:
        return self._values_and_slopes(y)[0]

    def _values_and_slopes(self, y: Tensor) -> tuple[Tensor, Tensor]:
        values, slopes = self.density.value_and_grad(self._z(y))
        return values.double(), (self.units * slopes).double()
