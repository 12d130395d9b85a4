"""What a fit and its verdict ask of the density of globals by draws of rows: errors, poor rows, second modes, draws."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from pyro_flows.guides.conditional import NEAR, Conditional
from pyro_flows.guides.integrated import DRAWS_MOST, Errors, Terms, WorstRow
from pyro_flows.guides.parts import ALL, Part, by_row
from pyro_flows.guides.row_density import RowDensity
from pyro_flows.guides.runs import at_values, of_prior
from pyro_flows.inference.verdict.psis import psis
from pyro_flows.model.bijections import bijection
from pyro_flows.model.bounds import log_times, on_bound
from pyro_flows.model.sites import by_event, messages
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

DRAWS_WIDE = 16  # of a row that is not normal, at least
ON_BOUNDS_FIRST, ON_BOUNDS = 8, 64  # draws of the globals at which rows beside a bound are looked for, and weighed
ON_BOUNDS_LEAST = 1e-6  # part of a row's weight, below which draws on a bound are none
LOOKED_AT, LOOKED_BY = 200, 32  # rows whose k-hat is estimated: those with the most uneven weights; draws of each
PICKED_FROM = 64  # draws of a row that is not normal, of which one is picked
TRIES = 4  # prior draws from which second modes are sought


class Marginal(RowDensity):
    """The log density of the globals by draws of each row, with its errors, and draws of rows."""

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

    def _pieces(self, z: Tensor, number: int) -> Iterator[tuple[int, Terms]]:
        """Yield what a part of the data says at points ``z`` (S, D), some at a time, and the place of the first."""
        for place, piece in zip(range(0, len(z), self.at_once), z.split(self.at_once), strict=True):
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
            for number, piece in enumerate(z.split(here.at_once if self.batched else 1)):
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
            for piece in z.split(self.at_once):
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
            times = by_row(self._spread(by_event(times, len(at.locals[name].batch))), site, plate, self._nest)
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
                    first = self.rows.conditional(points, of_prior, part.chosen)
                base = self.rows.mode(points, first)
                then = self.rows.conditional(points, at_values(base), part.chosen)
                steps = zip(then.by_number(then.base), now.by_number(now.base), then.numbers, now.numbers, strict=True)
                away = [
                    (((one - other) / torch.minimum(new.sd, own.sd)).abs(), own.curvature.abs())
                    for one, other, new, own in steps
                ]
                far = [(sds > ROW_MODES_APART) & (bend > 0.0) for sds, bend in away]  # without curvature it is masked
                lost = [~(length.abs() <= NEAR) for length in then.decrement]
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
            own = by_row(self._spread(value.double()), site, plate, self._nest)[0, 0]
            found[plate] = found.get(plate, torch.zeros(()).to(own)) + own
        return found
