r"""The log density of a model's global latents, those in plates integrated out by importance sampling, row by row.

.. math:: \log \hat p(\theta, x) = \log p(\theta) + \sum_i \log \frac 1K \sum_{k=1}^K
          \frac{p(x_i, y_{ik} \mid \theta)}{q(y_{ik} \mid \theta, x_i)}, \qquad y_{ik} \sim q(\cdot \mid \theta, x_i)

Each factor estimates a row's likelihood; the bias of its logarithm is taken off to the second order. Where rows are
normal, q is their exact conditional distribution. Elsewhere q has heavy tails around the mode of a row: each number is

.. math:: y = m + s\, x\, e^{h x^2 / 2}, \qquad x = \Phi^{-1}(u), \qquad h = 1 / d

(Tukey's h distribution), with m and s the mean and the standard deviation of Laplace's approximation given the numbers
before it, and d the numbers of a row. The u are two nets of evenly spread points (Sobol), each with a random shift of
its own in each row. With one number in a row, this is the trapezoidal rule for a smooth function that vanishes with all
derivatives at both ends, so its error falls exponentially with K: with K = 32, it is .0001 in most rows.

The shifts of a row are the same at all :math:`\theta`, so that differences have little noise. Each net estimates the
likelihood alone; by how much they differ in each row tells the errors of differences, and of the value, and so of the
evidence. The gradient goes through the draws.

Sources: Andrieu and Roberts 2009, doi:10.1214/07-AOS574 (the pseudo-marginal method); Tran, Scharth, Pitt and Kohn 2013
(arXiv 1309.3339), importance weights by an estimated likelihood; Trefethen and Weideman 2014, doi:10.1137/130932132
(the trapezoidal rule); Cranley and Patterson 1976, doi:10.1137/0713071 (random shifts).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Self

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_flows.guides.conditional import Conditional, Number, Rows
from pyro_flows.guides.integrated import Integrated, Terms
from pyro_flows.guides.parts import ALL, JITTER, Part, by_row, check_data, check_masks, groups_of, parts_of
from pyro_flows.guides.runs import At, Axes, Start, all_frames, at_values
from pyro_flows.model.batching import over_rows, quiet
from pyro_flows.model.sites import messages, vectorized
from pyro_flows.support.process.fallbacks import Tried, fallback
from pyro_flows.support.process.seeding import derive, seeded

AT_ONCE = 1_000_000  # numbers: draws of rows at once
SMALLEST = 1e-12  # distance of points from 0 and 1
NEGLIGIBLE = 60.0  # nats below the largest weight of a row
MOST_DIMENSIONS = 21201  # of torch's Sobol points


class RowDensity(Integrated):
    """The log density of the globals by draws of each row; see the module.

    Args:
        rows: the model with its data.
        z: a point (D,).
        start: where rows start.
        seed: of the random numbers of rows.
        remember: is told of each approximation of the rows.
        most: parts, of the rows that the model draws, which then stand for all rows; None for all rows.

    Rows that are drawn have to be independent given the globals, and without ``most``, all rows have to be given.
    """

    mapped = True  # whether draws of rows are mapped, where the model is not ``batched``

    def __init__(
        self,
        rows: Rows,
        z: Tensor,
        start: Start,
        seed: int,
        *,
        remember: Callable[[Conditional], None] = lambda now: None,
        most: int | None = None,
    ) -> None:
        # Where all rows count, the model runs in double: beside a scale near zero, a row's distance from its mean has
        # no digit in single. Compiled code of a model may take no double.
        precise = replace(rows, doubled=z.dtype != torch.float64 and most is None)
        with Tried(lambda error: isinstance(error, RuntimeError) and precise.doubled) as tried:
            first, rows = precise.near_mode(z.double() if precise.doubled else z, start, {}), precise
        if tried.error is not None:
            fallback("rows are computed in single precision", tried.error)
            first = rows.near_mode(z, start, {})
        super().__init__(rows, first, seed, z.dtype)
        self.start, self.remember = start, remember
        z = self._precise(z)
        _check_repeats(rows, z, first)
        self.plates = groups_of(first, whole=most is None)  # ``ALL``: one row of all
        self.parts = parts_of(first, seed, most)
        if most is None:
            check_data(rows, z, start, self.parts)
            check_masks(rows, z, self.parts[0].chosen)
        self._measure()
        self._choose_axes(z)

    def _measure(self) -> None:
        """Count axes of plates, rows, and the numbers of a row."""
        frames = all_frames(self.first.at.trace)
        self._nest = max(part.dim() for part in self.first.at.densities().values())  # some may be in no plate
        sizes = {frame.name: frame.full_size or frame.size for frame in frames} | {ALL: 1}
        self.sizes = {plate: sizes[plate] for plate in set(self.plates.values())}
        self.row_count = sum(self.sizes.values())
        self._numbers = max((site.value.numel() for site in self.first.sites), default=1)
        self._dimensions = dict.fromkeys(self.plates.values(), 0)  # numbers of a row
        for number in self.first.numbers:
            self._dimensions[self.plates[number.site.name]] += self._inner(number, number.own.shape).numel()

    def _choose_axes(self, z: Tensor) -> None:
        """Let the model have many points at once, by ``vmap`` if need be, or one."""
        self.batched = self._can_be_batched(z)
        if not self.batched:
            axes = {site.name: (len(site.batch), site.event_dim) for site in self.first.sites}
            alone, self.rows = self.rows, replace(self.rows, axes=Axes(self._nest, axes))
            self.batched = self._can_be_batched(z)
            self.rows = self.rows if self.batched else alone

    def values(self, z: Tensor, number: int) -> tuple[Tensor, Tensor]:
        self.clock.look()
        value = self._terms(z, number).summed()
        return value, value

    @torch.no_grad()
    def _can_be_batched(self, z: Tensor) -> bool:
        """Whether two points together, and one by one, have the same log densities, with rows where they are drawn.

        Those of each entry of a site are compared: in a sum, small differences of a prior would be lost among rows.
        """
        points = torch.stack([z, z + JITTER])
        lead = points.reshape(2, *[1] * self._nest, -1)
        try:
            now, steps, _ = self._draws(lead, 0, {})
            values = now.moved(now.base, steps)
            together = self.rows.run(lead.unsqueeze(0), at_values(values), now.at.chosen, through=True).densities()
            found = {name: self._spread(part)[0] for name, part in together.items()}
            shapes = {name: value.shape for name, value in self.first.base.items()}
            each = [
                {name: own[0, at].reshape(shapes[name]) for name, own in values.items()} for at in range(len(points))
            ]
        except (RuntimeError, ValueError, IndexError):
            return False
        for place, (point, own) in enumerate(zip(points, each, strict=True)):
            for name, part in self.rows.run(point, at_values(own), now.at.chosen).densities().items():
                one, near = found[name][min(place, len(found[name]) - 1)], torch.finfo(part.dtype).eps ** 0.5
                alone = self._spread(part)[0, 0]
                least = near * (1.0 + float(torch.nan_to_num(alone, posinf=0.0, neginf=0.0).abs().max()))
                try:
                    if not torch.allclose(one, alone, rtol=near, atol=least, equal_nan=True):
                        return False
                except RuntimeError:  # other shapes
                    return False
        return True

    def with_parts(self, most: int) -> Self:
        other = copy.copy(self)
        other.parts = parts_of(self.first, self.seed, most)
        return other

    @property
    def at_once(self) -> int:
        return max(1, AT_ONCE // (self.count * self._numbers))

    def _terms(self, z: Tensor, number: int) -> Terms:
        """Return what a part of the data says at points ``z`` (S, D).

        Far out, densities may overflow, and their gradients are no numbers. So draws without weight are found first,
        and moved to the mode, where gradients are taken.
        """
        if not (self.wide and torch.is_grad_enabled()):
            return self._evaluated(z, number, {})
        with torch.no_grad():
            found = self._evaluated(z, number, {})
            weights = {plate: found.weights(plate) for plate in found.kept}
            dead = {plate: ~(own > own.amax(0) - NEGLIGIBLE) for plate, own in weights.items()}
        return self._evaluated(z, number, dead)

    def _precise(self, z: Tensor) -> Tensor:
        """Return points in the precision of the runs."""
        return z.to(self.first.at.z.dtype)

    def _evaluated(self, z: Tensor, number: int, dead: Mapping[str, Tensor]) -> Terms:
        z = self._precise(z)
        if not self.first.sites:
            return Terms(self._without_rows(z, number))
        if self.batched:
            points = z.reshape(len(z), *[1] * self._nest, z.shape[-1])
            now, steps, log_q = self._draws(points, number, dead)
            at = self.rows.run(points.unsqueeze(0), at_values(now.moved(now.base, steps)), now.at.chosen, through=True)
            found = self._gathered(at, log_q, number)
            found.total = torch.where(_without_digits(now, z), -torch.inf, found.total)
        else:
            each = [{plate: own[:, [place]] for plate, own in dead.items()} for place in range(len(z))]
            singles = [self._single(row, number, own) for row, own in zip(z, each, strict=True)]
            found = Terms(torch.cat([single.total for single in singles]), kept=singles[0].kept)
            for plate in found.kept:
                found.log_p[plate] = torch.cat([single.log_p[plate] for single in singles], 1)
                found.log_q[plate] = torch.cat([single.log_q[plate] for single in singles], 1)
        found.dead = dead
        return found

    def _without_rows(self, z: Tensor, number: int) -> Tensor:
        """Return what a part of the data says (S,) at points ``z`` (S, D), where no latent is in a plate."""

        def total(points: Tensor) -> Tensor:
            at = self.rows.run(points, at_values({}), self.parts[number].chosen, through=True)
            return self._gathered(at, {}, number).total

        if len(z) == 1:
            return total(z[0])
        if self.batched:
            return total(z.reshape(1, len(z), *[1] * self._nest, z.shape[-1]))
        return over_rows(lambda point: total(point)[0], z, batched=self.mapped, otherwise=self._not_mapped)

    def _single(self, row: Tensor, number: int, dead: Mapping[str, Tensor]) -> Terms:
        """Return what a part of the data says at a point (D,): draws of rows are mapped, or run one by one."""
        now, steps, log_q = self._draws(row, number, dead)
        kept: dict[str, Tensor] = {}

        def one(drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
            values = {site.name: drawn[f"y {site.name}"] for site in now.sites}
            at = self.rows.run(row, at_values(values), now.at.chosen, through=True)
            found = self._gathered(at, {name: drawn[f"q {name}"] for name in log_q}, number)
            kept.update(found.kept)
            parts = {f"p {plate}": own[0] for plate, own in found.log_p.items()}
            return {"total": found.total, **parts, **{f"q {plate}": own[0] for plate, own in found.log_q.items()}}

        drawn = {f"y {name}": own for name, own in now.moved(now.base, steps).items()}
        drawn |= {f"q {name}": own for name, own in log_q.items()}
        with quiet():
            found = over_rows(one, drawn, batched=self.mapped, otherwise=self._not_mapped)
        log_p, of_q = ({plate: found[f"{kind} {plate}"] for plate in kept} for kind in "pq")
        return Terms(torch.where(_without_digits(now, row), -torch.inf, found["total"][0]), log_p, of_q, kept)

    def _not_mapped(self, error: Exception) -> None:
        self.mapped = False
        fallback("rows are drawn one by one", error)

    def _draws(
        self, points: Tensor, number: int, dead: Mapping[str, Tensor]
    ) -> tuple[Conditional, list[Tensor], dict[str, Tensor]]:
        """Return the approximation of rows at points, steps of their draws, and the log densities of these."""
        now = self.rows.near_mode(points, self.start, self.parts[number].chosen, graph=torch.is_grad_enabled())
        self.remember(now)
        with seeded(derive(self.seed, f"rows of part {number}"), points.device):
            steps, log_q = self._spread_out(now)
        if dead:
            moved = [self._of_number(number, dead[self.plates[number.site.name]]) for number in now.numbers]
            steps = [torch.where(away, 0.0, step) for away, step in zip(moved, steps, strict=True)]
        return now, steps, log_q

    def _of_number(self, number: Number, values: Tensor) -> Tensor:
        """Return what the rows of a plate have (..., S, rows), in the axes of a number of these rows."""
        lead = values.shape[:-1] if self.batched else values.shape[:-2]
        shape = [1] * (number.own.dim() - int(self.batched))
        if (plate := self.plates[number.site.name]) != ALL:
            shape[number.site.plates[plate]] = values.shape[-1]
        return values.reshape(*lead, *shape)

    def _gathered(self, at: At, log_q: Mapping[str, Tensor], number: int) -> Terms:
        """Sort the log densities of a run by the rows, or the sum, that they belong to."""
        found = Terms(at.z.new_zeros(self._spread(at.z[..., 0]).shape[1], dtype=torch.float64))
        for name, density in at.densities(exact=True).items():
            self._add(found, self.parts[number], at, name, density, first=number == 0)
        for name, density in log_q.items():
            group, site = self.plates[name], messages(at.trace)[name]
            if group in found.log_p:
                own = by_row(self._spread(scale_and_mask(density, 1.0, site["mask"])), site, group, self._nest)
                found.log_q[group] = found.log_q.get(group, torch.zeros(()).to(own)) + own
        return found

    def _add(self, found: Terms, part: Part, at: At, name: str, density: Tensor, *, first: bool) -> None:
        """Add the log density of a site to the rows, or the sum, that it belongs to."""
        site, group = messages(at.trace)[name], self.plates.get(name)
        drawn = [frame for frame in vectorized(site) if frame.name in part.fresh]
        if not (first or drawn):
            return  # outside of the plates whose rows are drawn: it counts once
        own = self._spread(density) / math.prod(frame.full_size / frame.size for frame in drawn)
        if group is None:
            for frame in drawn:
                shape = [1] * own.dim()
                shape[frame.dim] = -1
                own = own * self._count_of(part.fresh[frame.name], frame.name).to(own).reshape(shape)
            found.total = found.total + by_row(own.double(), site, ALL, self._nest)[0, :, 0]
            return
        own = by_row(own, site, group, self._nest)
        found.log_p[group] = found.log_p.get(group, torch.zeros(()).to(own)) + own
        fresh = part.fresh.get(group, torch.ones(own.shape[2], dtype=torch.bool)).to(own.device)
        found.kept[group] = self._count_of(fresh, group)

    def _count_of(self, fresh: Tensor, plate: str) -> Tensor:
        """Return how often each row counts: for all rows, where the parts do not have them all."""
        parts = {**self.first.at.drawn, **self.first.at.given}
        if plate not in parts:
            return fresh.double()
        size, _ = parts[plate]
        return fresh.double() * size / sum(int(part.fresh[plate].sum()) for part in self.parts)

    def _spread(self, values: Tensor) -> Tensor:
        """Return values with an axis for draws of rows, one for points, and all axes of plates."""
        return values.reshape(*[1] * (2 + self._nest - values.dim()), *values.shape)

    def _spread_out(self, now: Conditional) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return steps of the numbers (K, S, *rows), and the log densities of the sites."""
        most = min(max(self._dimensions.values(), default=1), MOST_DIMENSIONS)
        net = torch.quasirandom.SobolEngine(most).draw(self.count // 2, dtype=torch.float64)
        used = dict.fromkeys(self._dimensions, 0)
        densities: list[Tensor] = []

        def noise(index: int, _: torch.Size) -> Tensor:
            number, group = now.numbers[index], self.plates[now.numbers[index].site.name]
            rows = number.own.shape[1:] if self.batched else number.own.shape
            lead = [number.own.shape[0] if self.apart else 1] if self.batched else []
            inner = self._inner(number, rows)
            columns = torch.arange(used[group], used[group] + inner.numel()) % most
            used[group] += inner.numel()
            shifts = torch.rand(2, 1, *lead, *rows, dtype=torch.float64, device=number.own.device)
            points = net[:, columns].reshape(-1, *[1] * len(lead), *inner).to(shifts)
            shifted = (points + shifts).remainder(1.0).flatten(0, 1)
            x = torch.special.ndtri(shifted.clamp(SMALLEST, 1.0 - SMALLEST)).to(number.own)
            bend = 0.5 * x.square() / self._dimensions[group] if self.wide else torch.zeros_like(x)
            density = -0.5 * x.square() - 0.5 * math.log(2.0 * math.pi) - bend - (2.0 * bend).log1p()
            densities.append(density - number.sd.log())
            return x * bend.exp()

        return now.draw(noise), {name: torch.stack(parts).sum(0) for name, parts in now.by_site(densities).items()}

    def _inner(self, number: Number, rows: torch.Size) -> torch.Size:
        """Return how many of a number are in one row, by axis, for the axes that it has."""
        axis = number.site.plates.get(self.plates[number.site.name])
        return torch.Size([1 if axis == place - len(rows) else size for place, size in enumerate(rows)])


def _check_repeats(rows: Rows, z: Tensor, first: Conditional) -> None:
    """Refuse a model that draws random numbers."""
    again = rows.run(z, at_values(first.base), first.at.chosen).densities()
    if not all(torch.allclose(part, again[name], equal_nan=True) for name, part in first.at.densities().items()):
        raise ValueError("model: expected one log density at one point, got two: it draws random numbers.")


def _without_digits(now: Conditional, z: Tensor) -> Tensor:
    """Return at which points z (S, D) or (D,) rows have values with fewer than two digits for their sds.

    A scale of rows is next to 0 there, and likelihoods are too high: the values are equal to their mean, but for
    rounding.
    """
    lost = z.new_zeros(z.shape[:-1], dtype=torch.bool)
    for own, value in zip(now.numbers, now.by_number(now.base), strict=True):
        away = own.sd.detach() < 100.0 * torch.finfo(value.dtype).eps * value.abs()
        lost = lost | (away.flatten(1).any(1) if z.dim() > 1 else away.any())
    return lost
