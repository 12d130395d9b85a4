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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_flows.guides import conditional
from pyro_flows.guides.conditional import At, Conditional, Number, Rows, Start, at_values, axes_of, is_part
from pyro_flows.inference.verdict.psis import psis
from pyro_flows.model.batching import over_rows, quiet
from pyro_flows.model.bijections import bijection
from pyro_flows.model.bounds import log_times, on_bound
from pyro_flows.model.observations import left_alone, refuse_outside, support_moves
from pyro_flows.model.precision import doubled
from pyro_flows.model.reading import check_observed
from pyro_flows.model.sites import Site, by_event, is_data, messages, vectorized
from pyro_flows.model.supports import inside
from pyro_flows.support.process.clock import unbounded
from pyro_flows.support.process.fallbacks import Tried, fallback
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import (
    K_HAT_MOST,
    ROW_MODE_REACHED,
    ROW_MODE_SHARE,
    ROW_MODES_APART,
    ROW_WEIGHTS_EVEN,
    SHIFT_MOST,
    SHIFT_SEEN,
    TAIL_SHARE,
)

DRAWS_LEAST, DRAWS_MOST = 4, 256  # of a row, K
DRAWS_WIDE = 16  # of a row that is not normal, at least
AT_ONCE = 1_000_000  # numbers: draws of rows at once
SMALLEST = 1e-12  # distance of points from 0 and 1
ON_BOUNDS_FIRST, ON_BOUNDS = 8, 64  # draws of the globals at which rows beside a bound are looked for, and weighed
ON_BOUNDS_LEAST = 1e-6  # part of a row's weight, below which draws on a bound are none
LOOKED_AT, LOOKED_BY = 200, 32  # rows whose k-hat is estimated: those with the most uneven weights; draws of each
PICKED_FROM = 64  # draws of a row that is not normal, of which one is picked
NEGLIGIBLE = 60.0  # nats below the largest weight of a row
JITTER = 0.1  # of a point, to tell whether points can be batched
TRIES = 4  # prior draws from which second modes are sought
MOST_DIMENSIONS = 21201  # of torch's Sobol points
MOST_DRAWS = 1000  # of the globals that are judged, each of which takes a pass over all rows
ALL = ""  # in the place of a plate: all latents in plates are one row


class Part(NamedTuple):
    """The rows of one run of the model, by plate, and which of them are in no part before."""

    chosen: dict[str, Tensor]
    fresh: dict[str, Tensor]


class WorstRow(NamedTuple):
    """A row whose conditional distribution is poor: its plate, its index there, k-hat of its weights."""

    plate: str
    row: int
    k_hat: float


class Errors(NamedTuple):
    """Standard errors of the log density, nats: of its differences between points, and of its level."""

    differences: float
    level: float


def without_lost(log_weights: Tensor, dim: int) -> Tensor:
    """Let draws far out, where values over- or underflow, have the weight zero, unless all draws do."""
    lost = torch.isnan(log_weights) | torch.isposinf(log_weights)
    return torch.where(lost & ~lost.all(dim, keepdim=True), -torch.inf, log_weights)


@dataclass
class _Terms:
    """What a part of the data says at points: sums (S,), and densities of the draws of rows (K, S, rows), by plate."""

    total: Tensor
    log_p: dict[str, Tensor] = field(default_factory=dict)
    log_q: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)  # (rows,): rows that count
    dead: Mapping[str, Tensor] = field(default_factory=dict)  # draws whose weight is known to be negligible

    def weights(self, plate: str) -> Tensor:
        """Return the log weights of the draws; see :func:`without_lost`."""
        found = without_lost((self.log_p[plate] - self.log_q[plate]).double(), 0)
        return torch.where(self.dead[plate], -torch.inf, found) if plate in self.dead else found

    def likelihoods(self, plate: str) -> Tensor:
        """Return the log likelihoods of the rows (S, rows): of the mean of both nets, free of bias to second order.

        The log of a mean of two is too low by about a quarter of their relative variance.
        """
        one, other = self.by_net(plate)
        return torch.logaddexp(one, other) - math.log(2.0) + 0.5 * torch.tanh(0.5 * (one - other)).square()

    def by_net(self, plate: str) -> Tensor:
        """Return the log likelihoods of the rows by each net of points (2, S, rows)."""
        halves = self.weights(plate).unflatten(0, (2, -1))
        return torch.logsumexp(halves, 1) - math.log(halves.shape[1])

    def heights(self) -> Tensor:
        """Return the log joint density at each draw of rows (K, S)."""
        rows = [(part.double() * self.kept[plate]).sum(-1) for plate, part in self.log_p.items()]
        return sum(rows, self.total.unsqueeze(0))

    def summed(self) -> Tensor:
        """Return what the part adds to the log density (S,)."""
        rows = [(self.likelihoods(plate) * kept).sum(-1) for plate, kept in self.kept.items()]
        return sum(rows, self.total)


class Marginal:
    """The log density of the globals, at points (S, D) in unconstrained coordinates; see the module.

    Args:
        rows: the model with its data.
        z: a point (D,).
        start: where rows start.
        seed: of the random numbers of rows.
        remember: is told of each approximation of the rows.
        most: parts, of the rows that the model draws, which then stand for all rows; None for all rows.

    Rows that are drawn have to be independent given the globals, and without ``most``, all rows have to be given.
    """

    most_draws = MOST_DRAWS  # of the globals, that are judged
    trainable = True  # whether a better guide of the globals can make the weights good
    wide = False  # whether q has heavy tails
    apart = False  # whether rows have other random numbers at each point
    batched = True  # whether many points, and many draws of rows, have axes left of plates: of the model, or by vmap
    mapped = True  # whether draws of rows are mapped, where it does not
    count = DRAWS_LEAST  # K, draws of a row

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
        self.rows, self.start, self.seed, self.remember = rows, start, seed, remember
        self.clock = unbounded()  # is looked at before each part of the data
        self.dtype = z.dtype  # of the model. Where all rows count, it runs in double: beside a scale near zero, a row's
        # distance from its mean has no digit in single. Compiled code of a model may take no double.
        precise = replace(rows, doubled=z.dtype != torch.float64 and most is None)
        with Tried(lambda error: isinstance(error, RuntimeError) and precise.doubled) as tried:
            self.first, self.rows = precise.near_mode(z.double() if precise.doubled else z, start, {}), precise
        if tried.error is not None:
            fallback("rows are computed in single precision", tried.error)
            self.first = rows.near_mode(z, start, {})
        rows, z = self.rows, self._precise(z)
        again = rows.run(z, at_values(self.first.base), self.first.at.chosen).densities()
        densities = self.first.at.densities().items()
        if not all(torch.allclose(part, again[name], equal_nan=True) for name, part in densities):
            raise ValueError("model: expected one log density at one point, got two: it draws random numbers.")
        self.plates = _groups(self.first, whole=most is None)  # whose rows hold a site; ``ALL``: one row of all
        self._numbers = max((site.value.numel() for site in self.first.sites), default=1)
        frames = conditional.all_frames(self.first.at.trace)
        self._nest = max(part.dim() for _, part in densities)  # axes of batches, some of which may be in no plate
        sizes = {frame.name: frame.full_size or frame.size for frame in frames} | {ALL: 1}
        self.sizes = {plate: sizes[plate] for plate in set(self.plates.values())}  # rows of each plate
        self.row_count = sum(self.sizes.values())
        self.parts = parts_of(self.first, seed, most)  # the rows of each run
        if most is None:
            check_data(rows, z, start, self.parts)
            check_masks(rows, z, self.parts[0].chosen)
        self._dimensions = dict.fromkeys(self.plates.values(), 0)  # numbers of a row
        for number in self.first.numbers:
            self._dimensions[self.plates[number.site.name]] += self._inner(number, number.own.shape).numel()
        self.batched = self._can_be_batched(z)
        if not self.batched:
            axes = {site.name: (len(site.batch), site.event_dim) for site in self.first.sites}
            self.rows = replace(rows, axes=conditional.Axes(self._nest, axes))
            self.batched = self._can_be_batched(z)
            self.rows = self.rows if self.batched else rows

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """Return the log density (S,), in double precision."""
        numbers = range(len(self.parts))
        pieces = ([self._sum_of(piece, number) for number in numbers] for piece in z.split(self._rows_at_once))
        return torch.cat([torch.stack(parts).sum(0) for parts in pieces])

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density (S,) and its gradient (S, D)."""
        values, gradients = [], []
        for piece in z.split(self._rows_at_once):
            leaf = piece.detach().clone().requires_grad_()
            with torch.enable_grad():
                value, gradient = torch.zeros(len(piece)).to(piece).double(), torch.zeros_like(piece).double()
                for number in range(len(self.parts)):  # one after the other, so that memory holds one part's graph
                    part = self._sum_of(leaf, number)
                    value += part.detach()
                    gradient += torch.autograd.grad(part.sum(), leaf)[0]
            values.append(value)
            gradients.append(gradient)
        return torch.cat(values), torch.cat(gradients)

    def _sum_of(self, z: Tensor, number: int) -> Tensor:
        """Return what a part of the data adds to the log density (S,)."""
        self.clock.look()
        return self._terms(z, number).summed()

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

    def with_parts(self, most: int) -> Marginal:
        """Return the same log density by so many parts at most, which then stand for all rows."""
        other = copy.copy(self)
        other.parts = parts_of(self.first, self.seed, most)
        return other

    @property
    def _rows_at_once(self) -> int:
        return max(1, AT_ONCE // (self.count * self._numbers))

    def choose_count(self, z: Tensor) -> Errors:
        """Double the draws of a row until the error of differences at ``z`` (S, D) is small; return the errors."""
        self.adapt(z)
        while True:
            found = self.errors(z)
            if found.differences <= SHIFT_SEEN or self.count >= DRAWS_MOST:
                return found
            self.count *= 2

    @torch.no_grad()
    def errors(self, z: Tensor) -> Errors:
        """Return the errors of the log density at ``z`` (S, D): rows have independent random numbers, so they add up.

        Two nets whose log likelihoods of a row differ by d have a mean with the standard error d / 2. The errors are
        infinite if a row has none at more than a few points.
        """
        differences = level = 0.0
        for number in range(len(self.parts)):
            found = [terms for _, terms in self._pieces(z, number)]
            for plate, kept in found[0].kept.items():
                halves = torch.cat([terms.by_net(plate) for terms in found], 1)
                own = torch.where(halves[0] == halves[1], 0.0, 0.5 * (halves[0] - halves[1])) * kept
                known = torch.isfinite(own)
                if bool((known.double().mean(0) < 1.0 - TAIL_SHARE).any()):
                    return Errors(math.inf, math.inf)
                own = torch.where(known, own, 0.0)
                differences += float(own.var(0).sum())
                level += float(own.square().mean(0).sum())
        return Errors(math.sqrt(differences), math.sqrt(level))

    def _pieces(self, z: Tensor, number: int) -> Iterator[tuple[int, _Terms]]:
        """Yield what a part of the data says at points ``z`` (S, D), some at a time, and the place of the first."""
        for place, piece in zip(range(0, len(z), self._rows_at_once), z.split(self._rows_at_once), strict=True):
            self.clock.look()
            yield place, self._terms(piece, number)

    @torch.no_grad()
    def adapt(self, z: Tensor) -> bool:
        """Give q heavy tails from now on, if weights of rows at ``z`` (S, D) are uneven."""
        if not self.wide:
            terms = self._terms(z, 0)
            relative = [torch.log_softmax(terms.weights(plate), 0) + math.log(self.count) for plate in terms.kept]
            self.wide = any(not float(part.exp().var(0).mean()) <= ROW_WEIGHTS_EVEN for part in relative)
            self.count = max(self.count, DRAWS_WIDE) if self.wide else self.count
        return self.wide

    @torch.no_grad()
    def row_likelihoods(self, z: Tensor) -> dict[str, Tensor]:
        """Return the log likelihoods of the rows of each plate at points ``z`` (S, D): ``{plate: (S, rows)}``."""
        found: dict[str, Tensor] = {}
        for number, part in enumerate(self.parts):
            for place, terms in self._pieces(z, number):
                for plate in terms.kept:
                    own = terms.likelihoods(plate)
                    whole = found.setdefault(plate, own.new_zeros(len(z), self.sizes[plate]))
                    index = part.chosen.get(plate, torch.arange(own.shape[1], device=own.device))
                    whole[place : place + len(own), index] = own
        return found

    @torch.no_grad()
    def local_draws(self, z: Tensor, names: Sequence[str], rows: Tensor, seed: int) -> dict[str, Tensor]:
        """Draw latents of rows of one plate given points: ``{name: (S, *shape)}``, constrained.

        A row's draw is resampled from K draws of q by their weights; each row has its own at each point (S, D).
        ``rows`` are indices in the plate of all these sites, all of them where all latents in plates are one row.
        """
        plate, sites = self.plates[names[0]], {site.name: site for site in self.first.sites if site.name in names}
        drawn = self.first.at.drawn.get(plate)
        size = len(rows) if drawn is None else drawn[1]
        axes = {name: 0 if plate == ALL else len(own.batch) + own.plates[plate] for name, own in sites.items()}
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        here = copy.copy(self)
        here.count, here.apart = max(self.count, PICKED_FROM) if self.wide else self.count, True
        for first, wanted in zip(range(0, len(rows), size), rows.split(size), strict=True):
            chosen = dict(self.parts[0].chosen)
            if drawn is not None:
                chosen[plate] = torch.cat([wanted, wanted.new_zeros(size - len(wanted))])
            fresh = {name: torch.ones(len(index), dtype=torch.bool) for name, index in chosen.items()}
            here.parts, pieces = [Part(chosen, fresh)], []
            for number, piece in enumerate(z.split(here._rows_at_once if self.batched else 1)):
                self.clock.look()
                here.seed = derive(seed, f"locals from {first}, {number}")
                pieces.append(here._resampled(piece, names))
            index = (torch.arange(len(wanted)) if drawn is not None else wanted).to(z.device)
            for name in names:
                whole = torch.cat([part[name] for part in pieces])
                found[name].append(whole if plate == ALL else whole.index_select(1 + axes[name], index))
        return {name: torch.cat(own, 1 + axes[name]) for name, own in found.items()}

    def _resampled(self, z: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return values of sites (S, *shape) at points, each row resampled from its draws by their weights."""
        dtype, z = z.dtype, self._precise(z)
        points = z.reshape(len(z), *[1] * self._nest, z.shape[-1]) if self.batched else z[0]
        terms = self._terms(z, 0)
        now, steps, _ = self._draws(points, 0, {})
        picked: dict[str, Tensor] = {}
        with seeded(derive(self.seed, "resampling"), z.device):
            for plate in terms.kept:
                shares = torch.softmax(terms.weights(plate), 0).cumsum(0)
                picked[plate] = (shares < torch.rand_like(shares[:1])).sum(0).clamp_max(len(shares) - 1)  # (S, rows)
        chosen = []
        for step, number in zip(steps, now.numbers, strict=True):
            index = self._of_number(number, picked[self.plates[number.site.name]])
            chosen.append(step.gather(0, index.expand(step.shape[1:]).unsqueeze(0))[0])
        at = self.rows.run(points, at_values(now.moved(now.base, chosen)), self.parts[0].chosen, through=True)
        found = {}
        for name in names:
            site = messages(at.trace)[name]
            value = site["value"]
            shape = value.shape[value.dim() - len(self.first.at.locals[name].batch) - site["fn"].event_dim :]
            found[name] = value.reshape(-1 if self.batched else 1, *shape).to(dtype)
        return found

    def worst_rows(self, z: Tensor) -> list[WorstRow]:
        """Return the rows whose weights have a k-hat of 0.7 or more, the worst first."""
        found: list[WorstRow] = []
        here = copy.copy(self)
        here.count, here.apart = max(self.count, LOOKED_BY), True  # else there are K different weights only
        for number, part in enumerate(self.parts):
            self.clock.look()
            with torch.no_grad():
                terms = here._terms(z, number)
            for plate, kept in terms.kept.items():
                weights = terms.weights(plate)
                index = part.chosen.get(plate, torch.arange(weights.shape[2]))
                relative = torch.log_softmax(weights, 0) + math.log(len(weights))
                uneven = relative.exp().var(0).mean(0) * kept
                order = uneven.argsort(descending=True)[: max(1, LOOKED_AT // len(self.parts))]
                for row in order[uneven[order] > SHIFT_MOST**2 * here.count].tolist():
                    _, k_hat = psis(relative[:, :, row].reshape(-1))
                    if not k_hat < K_HAT_MOST:
                        found.append(WorstRow(plate, int(index[row]), float(k_hat)))
        return sorted(found, key=lambda row: -row.k_hat)

    def on_bounds(self, z: Tensor) -> str | None:
        """Name a site of rows that rounding puts onto a bound, if the mass that is lost there changes a mean or an sd.

        Draws of rows get the weights of :mod:`pyro_flows.model.bounds`, and draws ``z`` (S, D) of the globals what
        these do to the likelihoods of rows.
        """
        z, numbers = z[:ON_BOUNDS], range(len(self.parts) if self.batched and self.first.sites else 0)
        log_weights, largest, worst = z.new_zeros(len(z), dtype=torch.float64), 0.0, None
        for number in [at for at in numbers if self._gains(z[:ON_BOUNDS_FIRST], at)]:
            place = 0
            for piece in z.split(self._rows_at_once):
                for name, gain in self._gains(piece, number).items():
                    log_weights[place : place + len(piece)] += gain.sum(1)
                    if float(gain.mean(0).abs().max()) > largest:
                        largest, worst = float(gain.mean(0).abs().max()), name
                place += len(piece)
        weights, points = torch.softmax(log_weights, 0)[:, None], z.double()
        mean = (weights * points).sum(0)
        sd = (weights * (points - mean).square()).sum(0).sqrt()
        shifts = torch.stack([(points.mean(0) - mean).abs() / sd, (points.std(0) / sd).log().abs()])
        return worst if max(largest, float(shifts.nan_to_num(0.0).max())) > SHIFT_MOST else None

    def _gains(self, z: Tensor, number: int) -> dict[str, Tensor]:
        """Return by how many nats likelihoods of rows (S, rows) grow by the mass that is lost next to bounds, by site.

        Sites without a draw there are left out.
        """
        self.clock.look()
        points = self._precise(z).reshape(len(z), *[1] * self._nest, z.shape[-1])
        with torch.no_grad():
            now, steps, log_q = self._draws(points, number, {})
            values = now.moved(now.base, steps)
            at = self.rows.run(points.unsqueeze(0), at_values(values), now.at.chosen, through=True)
            terms = self._gathered(at, log_q, number)
        found = {}
        of = messages(at.trace if self.rows.axes is None else self.first.at.trace)  # what is mapped is gone by now
        for name, y in values.items():
            site, plate = messages(at.trace)[name], self.plates[name]
            lost = on_bound(y, bijection(of[name]["fn"]).inv(site["value"]))
            if not bool(lost.any()):
                continue
            times = log_times(y, lost, partial(self._slopes, points, values, name, now))
            times = _by_row(self._spread(by_event(times, len(at.locals[name].batch))), site, plate, self._nest)
            weights = torch.log_softmax(terms.weights(plate), 0)
            share = torch.where(times == 0.0, -torch.inf, weights).logsumexp(0)
            gain = torch.where(share > math.log(ON_BOUNDS_LEAST), (weights + times).logsumexp(0), 0.0)
            if bool((gain != 0.0).any()):
                found[name] = gain * terms.kept[plate]
        return found

    @torch.enable_grad()
    def _slopes(self, points: Tensor, values: Mapping[str, Tensor], name: str, now: Conditional, y: Tensor) -> Tensor:
        """Return the derivatives of the log joint density by values ``y`` of a site; others have ``values``."""
        leaf = y.detach().requires_grad_()
        moved = at_values({**values, name: leaf})
        at = self.rows.run(points.unsqueeze(0), moved, now.at.chosen, through=True)
        total = sum((part.sum() for part in at.densities(exact=True).values()), points.new_zeros(()))
        return torch.autograd.grad(total, leaf)[0]

    @torch.no_grad()
    def second_modes(self, z: Tensor) -> list[tuple[str, int]]:
        """Return plate and index of the rows with a second mode at a point ``z`` (D,), which their draws hardly reach.

        Modes are sought from draws of the prior.
        """
        found: set[tuple[str, int]] = set()
        points = self._precise(z).reshape(*[1] * (1 + self._nest if self.batched else 0), -1)
        for number, part in enumerate(self.parts):
            self.clock.look()
            now = self.rows.near_mode(points, self.start, part.chosen)
            mass = self._masses(now, points, number)
            for attempt in range(TRIES):
                with seeded(derive(self.seed, f"modes of part {number}, {attempt}"), z.device):
                    first = self.rows.conditional(points, conditional.of_prior, part.chosen)
                base = self.rows.mode(points, first)
                then = self.rows.conditional(points, at_values(base), part.chosen)
                steps = zip(then.by_number(then.base), now.by_number(now.base), then.numbers, now.numbers, strict=True)
                away = [
                    (((one - other) / torch.minimum(new.sd, own.sd)).abs(), own.curvature.abs())
                    for one, other, new, own in steps
                ]
                far = [(sds > ROW_MODES_APART) & (bend > 0.0) for sds, bend in away]  # without curvature it is masked
                lost = [~(length.abs() <= conditional.NEAR) for length in then.decrement]
                apart, none, reached = self._by_rows(then, far), self._by_rows(then, lost), self._reached(now, then)
                for plate, second in self._masses(then, points, number).items():
                    index = part.chosen.get(plate, torch.arange(len(second)))
                    new = (apart[plate] > 0.0) & (none[plate] == 0.0) & ~(reached[plate] > math.log(ROW_MODE_REACHED))
                    new &= second - mass[plate] > math.log(ROW_MODE_SHARE)
                    found |= {(plate, int(index[row])) for row in new.nonzero().flatten().tolist()}
        return sorted(found)

    def _masses(self, now: Conditional, points: Tensor, number: int) -> dict[str, Tensor]:
        """Return the logarithms of the masses at modes of rows, up to a constant."""
        at = self.rows.run(points, at_values(now.base), now.at.chosen)
        own = self._by_rows(now, [one.sd.log() for one in now.numbers])
        return {plate: part[0, 0] + own[plate] for plate, part in self._gathered(at, {}, number).log_p.items()}

    def _reached(self, now: Conditional, then: Conditional) -> dict[str, Tensor]:
        """Return the logarithms of how many draws of rows fall within a standard deviation of other modes."""
        away: list[Tensor] = []
        densities = []
        places = then.by_number(then.base), now.by_number(now.base)
        for one, other, own, new in zip(*places, now.numbers, then.numbers, strict=True):
            distance = (one - other - now.step(own, away)) / own.sd
            away.append(one - other)
            tails = float(self._dimensions[self.plates[own.site.name]])  # as heavy as those of a Student t
            densities.append(torch.distributions.StudentT(tails).log_prob(distance) + (new.sd / own.sd).log())
        return {plate: math.log(self.count) + part for plate, part in self._by_rows(then, densities).items()}

    def _by_rows(self, now: Conditional, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Add up what the numbers have by rows (rows,) of each plate."""
        found: dict[str, Tensor] = {}
        for number, value in zip(now.numbers, values, strict=True):
            plate, site = self.plates[number.site.name], messages(now.at.trace)[number.site.name]
            own = _by_row(self._spread(value.double()), site, plate, self._nest)[0, 0]
            found[plate] = found.get(plate, torch.zeros(()).to(own)) + own
        return found

    def _terms(self, z: Tensor, number: int) -> _Terms:
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

    def _evaluated(self, z: Tensor, number: int, dead: Mapping[str, Tensor]) -> _Terms:
        z = self._precise(z)
        if not self.first.sites:
            return _Terms(self._without_rows(z, number))
        if self.batched:
            points = z.reshape(len(z), *[1] * self._nest, z.shape[-1])
            now, steps, log_q = self._draws(points, number, dead)
            at = self.rows.run(points.unsqueeze(0), at_values(now.moved(now.base, steps)), now.at.chosen, through=True)
            found = self._gathered(at, log_q, number)
            found.total = torch.where(_without_digits(now, z), -torch.inf, found.total)
        else:
            each = [{plate: own[:, [place]] for plate, own in dead.items()} for place in range(len(z))]
            singles = [self._single(row, number, own) for row, own in zip(z, each, strict=True)]
            found = _Terms(torch.cat([single.total for single in singles]), kept=singles[0].kept)
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

    def _single(self, row: Tensor, number: int, dead: Mapping[str, Tensor]) -> _Terms:
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
        return _Terms(torch.where(_without_digits(now, row), -torch.inf, found["total"][0]), log_p, of_q, kept)

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

    def _gathered(self, at: At, log_q: Mapping[str, Tensor], number: int) -> _Terms:
        """Sort the log densities of a run by the rows, or the sum, that they belong to."""
        found = _Terms(at.z.new_zeros(self._spread(at.z[..., 0]).shape[1], dtype=torch.float64))
        for name, density in at.densities(exact=True).items():
            self._add(found, self.parts[number], at, name, density, first=number == 0)
        for name, density in log_q.items():
            group, site = self.plates[name], messages(at.trace)[name]
            if group in found.log_p:
                own = _by_row(self._spread(scale_and_mask(density, 1.0, site["mask"])), site, group, self._nest)
                found.log_q[group] = found.log_q.get(group, torch.zeros(()).to(own)) + own
        return found

    def _add(self, found: _Terms, part: Part, at: At, name: str, density: Tensor, *, first: bool) -> None:
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


def parts_of(first: Conditional, seed: int, most: int | None) -> list[Part]:
    """Return the rows of ``most`` runs of the model, or of as many as have all rows, in an order by the seed.

    None is in two of them as long as there are others.
    """
    drawn, device = first.at.drawn, first.at.z.device
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


@torch.no_grad()
def check_data(rows: Rows, z: Tensor, start: Start, parts: Sequence[Part]) -> None:
    """Refuse data that are NaN or outside of their support, and log densities that are NaN wherever the globals are.

    The error names the site and the row. A support that moves with the globals decides at each of their draws, and a
    distribution made with ``validate_args=False`` is left alone.
    """
    model = doubled(rows.model) if rows.doubled else rows.model
    for part in parts:
        at, other = (rows.run(point, start, part.chosen) for point in (z, z + JITTER))
        if part is parts[0]:
            with pyro.validation_enabled(False):  # as the run was, so that the model is run once more with checks
                alone = left_alone(messages(at.trace), partial(model, *rows.args, **rows.kwargs))
        lost, also = (run.densities() for run in (at, other))
        for name, site in messages(at.trace).items():
            if site["type"] != "sample" or not site["is_observed"] or not is_data(site):
                continue
            try:
                check_observed(site)
                if name not in alone and not support_moves(site, messages(other.trace)[name]):
                    refuse_outside(site)
            except ValueError as error:
                fine, axes = inside(site["fn"], site["value"])
                nan, depth = torch.isnan(site["value"]), site["fn"].event_dim
                fine = fine.flatten(fine.dim() - axes).all(-1) if axes else fine
                fine = fine & ~(nan.flatten(nan.dim() - depth).any(-1) if depth else nan)
                row = _row_named(site, (~fine).nonzero()[0].tolist(), at.chosen)
                raise ValueError(f"{error} In all data, the first is at {row}.") from None
            undefined = torch.isnan(lost[name]) & torch.isnan(also[name])
            if bool(undefined.any()):
                row = _row_named(site, undefined.nonzero()[0].tolist(), at.chosen) or "all rows"
                raise ValueError(
                    f"site {name!r}: its log density is NaN in {int(undefined.sum())} of {undefined.numel()} rows, the "
                    f"first at {row}, and its values are not. Look for NaN among the model's other arguments there."
                )


@torch.enable_grad()
def check_masks(rows: Rows, z: Tensor, chosen: Mapping[str, Tensor]) -> None:
    """Refuse latents whose priors are masked in rows that something reads: q is masked there too, and would be lost."""
    at = rows.run(z, conditional.off_center, chosen)
    for name, part in at.densities().items():
        for site in at.locals.values():
            mask = messages(at.trace)[site.name]["mask"]
            if name == site.name or mask is None or not part.requires_grad:
                continue
            read = (conditional.slope(part.sum(), site) != 0.0).any(-1)
            if bool((read & ~torch.as_tensor(mask)).any()):
                raise ValueError(
                    f"site {site.name!r}: expected a prior in each row that is read, got a mask on it where site "
                    f"{name!r} reads it. Give these rows a wide prior, or mask {name!r} there, too."
                )


def _row_named(site: Site, index: list[int], chosen: Mapping[str, Tensor]) -> str:
    """Return the place of a row in the data, by its plates."""
    frames = {frame.dim: frame.name for frame in vectorized(site)}
    named = []
    for axis, place in zip(range(-len(index), 0), index, strict=True):
        plate = frames.get(axis)
        named.append(f"{plate}[{int(chosen[plate][place]) if plate in chosen else place}]" if plate else str(place))
    return ", ".join(named)


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


def _by_row(values: Tensor, site: Site, plate: str, nest: int) -> Tensor:
    """Add up what belongs to one row of a plate, or to all of it: (K, S, *plates) -> (K, S, rows)."""
    axis = axes_of(site).get(plate)
    others = [dim for dim in range(-nest, 0) if dim != axis]
    found = values.sum(others, keepdim=True) if others else values
    return found.reshape(*found.shape[:2], -1)


def _groups(first: Conditional, *, whole: bool) -> dict[str, str]:
    """Return the plate whose rows are integrated out, for each site in plates and the data that depend on it.

    It is an error if the model draws rows, and there is no such plate for a site.
    """
    parts, drawn = first.at.densities(), first.at.drawn
    nodes = {name: messages(first.at.trace)[name] for name in parts}
    for name, site in nodes.items():
        subsampled = [frame.name for frame in vectorized(site) if is_part(frame)]
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
        groups[site.name] = outer[0] if outer and plates[-1] not in drawn else plates[-1]
    for name, part in parts.items():
        if name in first.at.without_local_parents or not part.requires_grad:
            continue
        values = [site.value for site in first.sites]
        slopes = torch.autograd.grad(part.sum(), values, retain_graph=True, allow_unused=True) if values else ()
        needed = {groups[site.name] for site, slope in zip(first.sites, slopes, strict=True) if slope is not None}
        needed |= {groups[name]} if name in groups else set()
        plates = list(axes_of(nodes[name]))
        split = {frame.name for frame in vectorized(nodes[name]) if is_part(frame)} - needed
        if len(needed) > 1 or not needed <= set(plates) or (needed and split):
            if drawn or first.at.given:
                raise ValueError(
                    f"site {name!r}: expected data in the plate of the latents that they depend on "
                    f"({', '.join(sorted(needed))}), got plates {plates}. Rows cannot be told apart."
                )
            names = [site.name for site in first.sites] + [
                name for name in parts if name not in first.at.without_local_parents
            ]
            return dict.fromkeys(names, ALL)
        groups |= dict.fromkeys([name], *needed) if needed else {}
    return groups
