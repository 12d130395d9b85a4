r"""The log density of a model's global latents, those in plates integrated out by importance sampling, row by row.

.. math:: \log \hat p(\theta, x) = \log p(\theta) + \sum_i \log \frac 1K \sum_{k=1}^K
          \frac{p(x_i, y_{ik} \mid \theta)}{q(y_{ik} \mid \theta, x_i)}, \qquad y_{ik} \sim q(\cdot \mid \theta, x_i)

Each factor estimates a row's likelihood; the bias of its logarithm is taken off to the second order. The random numbers
of a row are the same at all :math:`\theta`, so that differences have little noise; two independent halves of them tell
how much. The value itself, and so the evidence, has an error beside that. The gradient goes through the draws: it is
exact where q is.

Where rows are not normal, q is widened to each side of each number, by how far the log density has fallen two and four
standard deviations out.

Sources: Andrieu and Roberts 2009, doi:10.1214/07-AOS574 (the pseudo-marginal method); Tran, Scharth, Pitt and Kohn 2013
(arXiv 1309.3339), importance weights by an estimated likelihood; Geweke 1989, doi:10.2307/1913710 (both sides).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_flows._seeding import derive, seeded
from pyro_flows.guides.conditional import (
    NEAR,
    At,
    Conditional,
    Local,
    Number,
    Rows,
    Start,
    at_values,
    of_prior,
    vectorized,
)
from pyro_flows.model.observations import refuse_outside, support_moves
from pyro_flows.model.reading import check_observed
from pyro_flows.model.sites import is_data, messages
from pyro_flows.model.supports import inside
from pyro_flows.verdict.psis import psis
from pyro_flows.verdict.thresholds import K_HAT_MOST

DRAWS_LEAST, DRAWS_MOST = 4, 64  # of a row, K
NOISE = 0.1  # nats: error of differences of the log density, from which on K is doubled
AT_ONCE = 1_000_000  # numbers: draws of rows at once
LOOKED_AT = 200  # rows whose k-hat is estimated: those with the most uneven weights
UNEVEN = 0.01  # relative variance of an estimate of a row: below it, its k-hat does not matter
OUT, WIDEST = (2.0, 4.0), 3.0  # sds at which both sides are looked at; most that a side is widened or narrowed by
JITTER = 0.1  # of a point, to tell whether points can be batched
NORMAL = 1e-4  # mean relative variance of the weights of a row, below which rows are normal
TRIES, FAR, SECOND = 4, 3.0, 0.01  # prior draws from which second modes are sought; sds apart; least part of the mass
ALL = ""  # in the place of a plate: all latents in plates are one row

Shape = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # of a number's noise: the shaped noise, log derivative


class Part(NamedTuple):
    """The rows of one run of the model, by plate, and which of them are in no part before."""

    chosen: dict[str, Tensor]
    fresh: dict[str, Tensor]


class WorstRow(NamedTuple):
    """A row whose conditional distribution is poor: its plate, its index there, k-hat of its weights."""

    plate: str
    row: int
    k_hat: float


@dataclass
class _Terms:
    """What a part of the data says at points: sums (S,), and densities of the draws of rows (K, S, rows), by plate."""

    total: Tensor
    log_p: dict[str, Tensor] = field(default_factory=dict)
    log_q: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)  # (rows,): rows that count

    def weights(self, plate: str) -> Tensor:
        return (self.log_p[plate] - self.log_q[plate]).double()

    def summed(self, shares: int) -> Tensor:
        """Return what the part adds to the log density, by each share of the draws (shares, S)."""
        found = [self.total] * shares
        for plate, kept in self.kept.items():
            for share, own in enumerate(self.weights(plate).chunk(shares)):
                found[share] = found[share] + (_log_mean(own) * kept).sum(-1)
        return torch.stack(found)


class Marginal:
    """The log density of the globals, at points (S, D) in unconstrained coordinates; see the module.

    Args:
        rows: the model with its data.
        z: a point (D,).
        start: where rows start.
        seed: of the random numbers of rows.
        shape: what trained maps make of the noise of a number.
        remember: is told of each approximation of the rows.
        most: parts, of the rows that the model draws, which then stand for all rows; None for all rows.

    Attributes:
        count: K, draws of a row.
        sided: whether q is widened to each side.
        batched: whether the model takes many points, and many draws of rows, in axes left of its plates.
        first: the approximation at ``z``.
        parts: the rows of each run.

    Raises:
        ValueError: if rows are drawn and are not independent given the globals; without ``most``, if the model is
            given a part of them.
    """

    def __init__(
        self,
        rows: Rows,
        z: Tensor,
        start: Start,
        seed: int,
        *,
        shape: Shape = lambda index, noise: (noise, torch.zeros_like(noise)),
        remember: Callable[[Conditional], None] = lambda now: None,
        most: int | None = None,
    ) -> None:
        self.rows, self.start, self.seed, self.shape, self.remember = rows, start, seed, shape, remember
        self.first = rows.near_mode(z, start, {})
        again = rows.run(z, at_values(self.first.base), self.first.at.chosen).densities()
        if any(
            not torch.allclose(part, again[name], equal_nan=True) for name, part in self.first.at.densities().items()
        ):
            raise ValueError("model: expected one log density at one point, got two: it draws random numbers.")
        self._groups = _groups(self.first, whole=most is None)
        self._numbers = max((site.value.numel() for site in self.first.sites), default=1)
        sites = [site for site in messages(self.first.at.trace).values() if site["type"] == "sample"]
        frames = [frame for site in sites for frame in vectorized(site)]
        self._nest = max((-frame.dim for frame in frames), default=0)
        sizes = {frame.name: frame.full_size or frame.size for frame in frames} | {ALL: 1}
        self._sizes = {group: sizes[group] for group in set(self._groups.values())}  # rows of each plate
        self.parts = parts_of(self.first, seed, most)
        if most is None:
            check_data(rows, z, start, self.parts)
        self.count, self.sided = DRAWS_LEAST, False
        self.batched = True
        self.batched = self._can_be_batched(z)

    def __call__(self, z: Tensor, *, halves: bool = False) -> Tensor:
        """Return the log density (S,), in double precision; with ``halves``, by each half of the draws (2, S)."""
        with torch.no_grad():
            pieces = [self._summed(piece, halves=halves) for piece in z.split(self._rows_at_once)]
        found = torch.cat(pieces, 1)
        return found if halves else found[0]

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density (S,) and its gradient (S, D)."""
        values, gradients = [], []
        for piece in z.split(self._rows_at_once):
            leaf = piece.detach().clone().requires_grad_()
            with torch.enable_grad():
                value, gradient = torch.zeros(len(piece)).to(piece).double(), torch.zeros_like(piece).double()
                for number in range(len(self.parts)):  # one after the other, so that memory holds one part's graph
                    part = self._sum_of(leaf, number)[0]
                    value += part.detach()
                    gradient += torch.autograd.grad(part.sum(), leaf)[0]
            values.append(value)
            gradients.append(gradient)
        return torch.cat(values), torch.cat(gradients)

    def _summed(self, z: Tensor, *, halves: bool) -> Tensor:
        return torch.stack([self._sum_of(z, number, 2 if halves else 1) for number in range(len(self.parts))]).sum(0)

    def _sum_of(self, z: Tensor, number: int, shares: int = 1) -> Tensor:
        """Return what a part of the data adds to the log density, by each share of the draws (shares, S)."""
        if not self.batched and not self.first.sites:
            total = torch.func.vmap(lambda row: self._single(row, number).total[0])(z)
            return total.expand(shares, len(z))
        return self._terms(z, number).summed(shares)

    @torch.no_grad()
    def _can_be_batched(self, z: Tensor) -> bool:
        """Whether two points together, and one by one, come to the same."""
        points = torch.stack([z, z + JITTER])
        try:
            together = self._sum_of(points, 0)[0]
        except (RuntimeError, ValueError, IndexError):
            return False
        self.batched = False
        return torch.allclose(together, self._terms(points, 0).summed(1)[0], rtol=1e-4, atol=1e-2)

    def with_parts(self, most: int) -> Marginal:
        """Return the same log density by so many parts at most, which then stand for all rows."""
        other = copy.copy(self)
        other.parts = parts_of(self.first, self.seed, most)
        return other

    @property
    def _rows_at_once(self) -> int:
        return max(1, AT_ONCE // (self.count * self._numbers))

    def choose_count(self, z: Tensor) -> float:
        """Double the draws of a row until the error of differences at ``z`` (S, D) is small; return that error."""
        self.adapt(z)
        while True:
            first, second = self(z, halves=True)
            apart = (first - second)[torch.isfinite(first - second)]
            noise = float(0.5 * apart.std())
            if noise <= NOISE or self.count >= DRAWS_MOST:
                return noise
            self.count *= 2

    @torch.no_grad()
    def adapt(self, z: Tensor) -> bool:
        """Look to both sides of each number from now on, if weights of rows at ``z`` (S, D) are uneven."""
        if not self.sided and ALL not in self._groups.values():
            terms = self._terms(z, 0)
            relative = [torch.log_softmax(terms.weights(plate), 0) + math.log(self.count) for plate in terms.kept]
            self.sided = any(float(part.exp().var(0).mean()) > NORMAL for part in relative)
        return self.sided

    @property
    def row_count(self) -> int:
        """How many rows there are, in all plates whose latents are integrated out."""
        return sum(self._sizes.values())

    def worst_rows(self, z: Tensor) -> list[WorstRow]:
        """Return the rows whose weights have a k-hat of 0.7 or more, the worst first."""
        found: list[WorstRow] = []
        before, self.count = self.count, DRAWS_MOST // 2
        for number, part in enumerate(self.parts):
            with torch.no_grad():
                terms = self._terms(z, number)
            for plate, kept in terms.kept.items():
                weights = terms.weights(plate)
                index = part.chosen.get(plate, torch.arange(weights.shape[2]))
                relative = torch.log_softmax(weights, 0) + math.log(len(weights))
                uneven = relative.exp().var(0).mean(0) * kept
                order = uneven.argsort(descending=True)[: max(1, LOOKED_AT // len(self.parts))]
                for row in order[uneven[order] > UNEVEN * self.count].tolist():
                    _, k_hat = psis(relative[:, :, row].reshape(-1))
                    if not k_hat < K_HAT_MOST:
                        found.append(WorstRow(plate, int(index[row]), float(k_hat)))
        self.count = before
        return sorted(found, key=lambda row: -row.k_hat)

    @torch.no_grad()
    def second_modes(self, z: Tensor) -> list[tuple[str, int]]:
        """Return plate and index of the rows that have a second mode at a point ``z`` (D,), found from prior draws."""
        found: set[tuple[str, int]] = set()
        points = z.reshape(*[1] * (1 + self._nest if self.batched else 0), -1)
        for number, part in enumerate(self.parts):
            now = self.rows.near_mode(points, self.start, part.chosen)
            mass = self._masses(now, points, number)
            for attempt in range(TRIES):
                with seeded(derive(self.seed, f"modes of part {number}, {attempt}"), z.device):
                    first = self.rows.conditional(points, of_prior, part.chosen)
                base = self.rows.mode(points, first)
                then = self.rows.conditional(points, at_values(base), part.chosen)
                steps = zip(then.by_number(then.base), now.by_number(now.base), now.numbers, strict=True)
                far = [
                    (((one - other) / own.sd).abs() > FAR) & (own.curvature.abs() > 0.0)  # or it is masked
                    for one, other, own in steps
                ]
                near = [length.abs() <= NEAR for length in then.decrement]
                for plate, second in self._masses(then, points, number).items():
                    index = part.chosen.get(plate, torch.arange(len(second)))
                    apart = self._any(then, far, plate) & ~self._any(then, [~fine for fine in near], plate)
                    new = apart & (second - mass[plate] > math.log(SECOND))
                    found |= {(plate, int(index[row])) for row in new.nonzero().flatten().tolist()}
        return sorted(found)

    def _masses(self, now: Conditional, points: Tensor, number: int) -> dict[str, Tensor]:
        """Return the logarithms of the masses at modes of rows, up to a constant."""
        at = self.rows.run(points, at_values(now.base), now.at.chosen)
        found = {plate: part[0, 0] for plate, part in self._gathered(at, {}, number).log_p.items()}
        for one in now.numbers:
            plate = self._groups[one.site.name]
            if plate in found:
                site = messages(at.trace)[one.site.name]
                found[plate] = found[plate] + _by_row(self._spread(one.sd.log()), site, plate, self._nest)[0, 0]
        return found

    def _any(self, now: Conditional, marks: Sequence[Tensor], plate: str) -> Tensor:
        """Return the rows (rows,) of which any number is marked."""
        sites = messages(now.at.trace)
        own = [
            _by_row(self._spread(mark.double()), sites[number.site.name], plate, self._nest)[0, 0]
            for mark, number in zip(marks, now.numbers, strict=True)
            if self._groups[number.site.name] == plate
        ]
        return torch.stack(own).sum(0) > 0.0

    def _terms(self, z: Tensor, number: int) -> _Terms:
        """Return what a part of the data says at points ``z`` (S, D)."""
        if self.batched:
            points = z.reshape(len(z), *[1] * self._nest, z.shape[-1])
            now, steps, log_q = self._draws(points, number)
            at = self.rows.run(points.unsqueeze(0), at_values(now.moved(now.base, steps)), now.at.chosen, through=True)
            return self._gathered(at, log_q, number)
        singles = [self._single(row, number) for row in z]
        found = _Terms(torch.cat([single.total for single in singles]), kept=singles[0].kept)
        for plate in found.kept:
            found.log_p[plate] = torch.cat([single.log_p[plate] for single in singles], 1)
            found.log_q[plate] = torch.cat([single.log_q[plate] for single in singles], 1)
        return found

    def _single(self, row: Tensor, number: int) -> _Terms:
        """Return what a part of the data says at a point (D,), by one run for each draw of rows."""
        now, steps, log_q = self._draws(row, number)
        found: list[_Terms] = []
        for draw in range(self.count if now.sites else 1):
            values = now.moved(now.base, [step[draw] for step in steps])
            at = self.rows.run(row, at_values(values), now.at.chosen, through=True)
            found.append(self._gathered(at, {name: part[draw] for name, part in log_q.items()}, number))
        for plate in found[0].kept:
            found[0].log_p[plate] = torch.cat([one.log_p[plate] for one in found])
            found[0].log_q[plate] = torch.cat([one.log_q[plate] for one in found])
        return found[0]

    def _draws(self, points: Tensor, number: int) -> tuple[Conditional, list[Tensor], dict[str, Tensor]]:
        """Return the approximation of rows at points, steps of their draws, and the log densities of these."""
        now = self.rows.near_mode(points, self.start, self.parts[number].chosen, graph=torch.is_grad_enabled())
        self.remember(now)
        with torch.no_grad():
            sides = self._sides(now, points) if self.sided else None
        with seeded(derive(self.seed, f"rows of part {number}"), points.device):
            return now, *self._noisy(now, sides)

    def _gathered(self, at: At, log_q: Mapping[str, Tensor], number: int) -> _Terms:
        """Sort the log densities of a run by the rows, or the sum, that they belong to."""
        found = _Terms(at.z.new_zeros(self._spread(at.z[..., 0]).shape[1], dtype=torch.float64))
        for name, density in at.densities().items():
            self._add(found, self.parts[number], at, name, density, first=number == 0)
        for name, density in log_q.items():
            group, site = self._groups[name], messages(at.trace)[name]
            if group in found.log_p:
                own = _by_row(self._spread(scale_and_mask(density, 1.0, site["mask"])), site, group, self._nest)
                found.log_q[group] = found.log_q.get(group, torch.zeros(()).to(own)) + own
        return found

    def _add(self, found: _Terms, part: Part, at: At, name: str, density: Tensor, *, first: bool) -> None:
        """Add the log density of a site to the rows, or the sum, that it belongs to."""
        site, group = messages(at.trace)[name], self._groups.get(name)
        drawn = [frame for frame in vectorized(site) if frame.name in part.fresh]
        if not (first or drawn):
            return  # outside of the plates whose rows are drawn: it counts once
        own = self._spread(density) / math.prod(frame.full_size / frame.size for frame in drawn)
        if group is None:
            for frame in drawn:
                shape = [1] * own.dim()
                shape[frame.dim] = -1
                own = own * self._count_of(part.fresh[frame.name], frame.name).to(own).reshape(shape)
            found.total = found.total + _by_row(own.double(), site, ALL, self._nest)[0, :, 0]
            return
        own = _by_row(own, site, group, self._nest)
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

    def _noisy(
        self, now: Conditional, sides: Sequence[tuple[Tensor, Tensor]] | None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return steps of the numbers (K, S, *rows), and the log densities of the sites."""
        densities: list[Tensor] = []

        def noise(index: int, _: torch.Size) -> Tensor:
            number: Number = now.numbers[index]
            rows = (1, *number.own.shape[1:]) if self.batched else number.own.shape
            half = torch.randn(self.count // 2, *rows).to(number.own)
            eps = torch.stack([half, -half], 1).flatten(0, 1)  # pairs, so that each half of them has both signs
            shaped, ladj = self.shape(index, eps)
            density = torch.distributions.Normal(0.0, 1.0).log_prob(eps) - ladj - number.sd.log()
            if sides is not None:
                below, above = sides[index]
                factor = torch.where(shaped < 0.0, below, above)
                shaped, density = factor * shaped, density - factor.log()
            densities.append(density)
            return shaped

        return now.draw(noise), {name: torch.stack(parts).sum(0) for name, parts in now.by_site(densities).items()}

    def _sides(self, now: Conditional, points: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return by what each number's standard deviation is multiplied below and above its mean.

        A normal density falls by d^2 / 2 nats in d standard deviations.
        """

        def fallen(index: int, way: float) -> Tensor:
            steps = now.draw(lambda other, _: torch.full((), way if other == index else 0.0).to(points))
            at = self.rows.run(points, at_values(now.moved(now.base, steps)), now.at.chosen)
            site = now.numbers[index].site
            own = [part for name, part in at.densities().items() if _holds(messages(at.trace)[name], site)]
            total: Tensor = sum(
                (part.expand(_shape(part, site)).sum_to_size(site.batch) for part in own), torch.zeros(())
            )
            return total / torch.as_tensor(site.scale).to(total)

        found = []
        for index in range(len(now.numbers)):
            top, sides = fallen(index, 0.0), []
            for sign in (-1.0, 1.0):
                falls = [(top - fallen(index, sign * out)).clamp_min(1e-6) for out in OUT]
                factors = [(0.5 * out * out / fall).sqrt() for out, fall in zip(OUT, falls, strict=True)]
                widest = torch.stack(factors).max(0).values
                sides.append(torch.nan_to_num(widest, 1.0).clamp(1.0 / WIDEST, WIDEST))
            found.append((sides[0], sides[1]))
        return found


def _holds(site: Any, local: Local) -> bool:
    """Whether a site's plates hold all of a latent's."""
    return local.plates.items() <= {frame.name: frame.dim for frame in vectorized(site)}.items()


def _shape(part: Tensor, local: Local) -> torch.Size:
    return torch.broadcast_shapes(part.shape, local.batch)


def parts_of(first: Conditional, seed: int, most: int | None) -> list[Part]:
    """Return the rows of several runs of the model, none in two of them as long as there are others.

    Args:
        first: a run.
        seed: of the order of the rows.
        most: runs, at most; None for as many as have all rows.
    """
    drawn, device = first.at.drawn, first.total.device
    count = max((-(-size // rows) for size, rows in drawn.values()), default=1)
    count = count if most is None else min(count, most)
    parts = [Part({}, {}) for _ in range(count)]
    for name, (size, rows) in drawn.items():
        with seeded(derive(seed, f"rows of plate {name}"), device):
            order = torch.cat([torch.randperm(size, device=device) for _ in range(-(-count * rows // size))])
        fresh = torch.arange(len(order), device=device) < size
        for number, part in enumerate(parts):
            own = slice(number * rows, (number + 1) * rows)
            part.chosen[name], part.fresh[name] = order[own], fresh[own]
    for name, (_, rows) in first.at.given.items():
        for part in parts:
            part.fresh[name] = torch.ones(rows, dtype=torch.bool, device=device)
    return parts


def _log_mean(log_weights: Tensor) -> Tensor:
    """Return the log of the mean of weights (K, ...), pairs after each other, free of bias to the second order.

    The log of a mean of n is too low by about its relative variance over 2 n.
    """
    pairs = torch.logsumexp(log_weights.unflatten(0, (-1, 2)), 1) - math.log(2.0)
    mean = torch.logsumexp(pairs, 0) - math.log(len(pairs))
    if len(pairs) < 2:
        return mean
    return mean + (pairs - mean).exp().var(0) / (2.0 * len(pairs))


@torch.no_grad()
def check_data(rows: Rows, z: Tensor, start: Start, parts: Sequence[Part]) -> None:
    """Look at all observed values of some parts. A support that moves with the globals decides at each of their draws.

    Raises:
        ValueError: for a value that is NaN or outside of the support of its likelihood, with the site and the row.
    """
    for part in parts:
        at, other = (rows.run(point, start, part.chosen) for point in (z, z + JITTER))
        for name, site in messages(at.trace).items():
            if site["type"] != "sample" or not site["is_observed"] or not is_data(site):
                continue
            try:
                check_observed(site)
                if not support_moves(site, messages(other.trace)[name]):
                    refuse_outside(site)
            except ValueError as error:
                fine, axes = inside(site["fn"], site["value"])
                fine = fine & ~torch.isnan(site["value"])
                fine = fine.flatten(fine.dim() - axes).all(-1) if axes else fine
                row = (~fine).nonzero()[0].tolist()
                raise ValueError(f"{error} In all data, the first is at {_row_named(site, row, at.chosen)}.") from None


def _row_named(site: Any, index: list[int], chosen: Mapping[str, Tensor]) -> str:
    """Return the place of a row in the data, by its plates."""
    frames = {frame.dim: frame.name for frame in vectorized(site)}
    named = []
    for axis, place in zip(range(-len(index), 0), index, strict=True):
        plate = frames.get(axis)
        named.append(f"{plate}[{int(chosen[plate][place]) if plate in chosen else place}]" if plate else str(place))
    return ", ".join(named)


def _by_row(values: Tensor, site: Any, plate: str, nest: int) -> Tensor:
    """Add up what belongs to one row of a plate, or to all of it: (K, S, *plates) -> (K, S, rows)."""
    axis = next((frame.dim for frame in vectorized(site) if frame.name == plate), None)
    others = [dim for dim in range(-nest, 0) if dim != axis]
    found = values.sum(others, keepdim=True) if others else values
    return found.reshape(*found.shape[:2], -1)


def _groups(first: Conditional, *, whole: bool) -> dict[str, str]:
    """Return the plate whose rows are integrated out, for each site in plates and the data that depend on it.

    Raises:
        ValueError: if the model draws rows, and there is no such plate for a site.
    """
    parts, drawn = first.at.densities(), first.at.drawn
    nodes = {name: messages(first.at.trace)[name] for name in parts}
    for name, site in nodes.items():
        subsampled = [frame.name for frame in vectorized(site) if frame.full_size not in (None, frame.size)]
        if whole and (given := [plate for plate in subsampled if plate not in drawn]):
            raise ValueError(
                f"plate {given[0]!r}: the model is given a subsample, and all rows are needed. Pass all of them, for "
                "example subsample=torch.arange(size), or let the plate draw them (subsample_size=)."
            )
        if len(subsampled) > 1:
            raise ValueError(f"site {name!r}: expected at most one subsampled plate, got {subsampled}.")
    groups: dict[str, str] = {}
    for site in first.sites:
        plates = sorted(site.plates, key=lambda name: (name in drawn, site.batch[site.plates[name]]))
        outer = [groups[other.name] for other in first.sites if other.name in groups and site.inside(other)]
        groups[site.name] = outer[0] if outer else plates[-1]
    for name, part in parts.items():
        if name in groups or name in first.at.placed or not part.requires_grad:
            continue
        values = [site.value for site in first.sites]
        slopes = torch.autograd.grad(part.sum(), values, retain_graph=True, allow_unused=True)
        needed = {groups[site.name] for site, slope in zip(first.sites, slopes, strict=True) if slope is not None}
        plates = [frame.name for frame in vectorized(nodes[name])]
        if len(needed) > 1 or not needed <= set(plates):
            if drawn or first.at.given:
                raise ValueError(
                    f"site {name!r}: expected data in the plate of the latents that they depend on "
                    f"({', '.join(sorted(needed))}), got plates {plates}. Rows cannot be told apart."
                )
            names = [site.name for site in first.sites] + [name for name in parts if name not in first.at.placed]
            return dict.fromkeys(names, ALL)
        groups |= dict.fromkeys([name], *needed) if needed else {}
    return groups
