r"""Which observations are left out by more draws, and which by moved ones.

Draws as they are serve all N observations at once, and need many where a weight is uneven. Moved draws are few, but
serve one observation. So those with the highest k-hats get moved draws, m of them, and the others new draws, as many as
bring the error of their sum down. The number m is the one of lowest cost: with S draws in hand, of error r(m) without
these m, and a goal g,

.. math:: 2 m F + c\, S\, r(m)^2 / g^2

evaluations of the model, c of them for a new draw, and F moved draws for an observation at first. More are moved until
their error is small enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_flows.posterior.comparison.draws import MOST_NUMBERS, Draws, can_draw, longer, more, most_draws, price
from pyro_flows.posterior.comparison.moving import Space
from pyro_flows.posterior.comparison.pointwise import (
    Estimates,
    Observations,
    Sites,
    Tally,
    errors_without,
    moved,
    observations,
    one,
    plain,
    thinned,
)
from pyro_flows.support.process.progress import unseen

if TYPE_CHECKING:
    from pyro_flows.inference.record import Record

# More draws are taken, or moved, until the Monte Carlo error is this share of the standard error over observations. It
# adds .02 % to that error, which has itself a relative error of 1 / sqrt(2 N): .7 % for N = 10 000 observations.
RELATIVE = 1.0 / 50.0
ERROR = 0.02  # nats: a Monte Carlo error that is small enough in any case, for it changes odds by one part in 50
MOST_DRAWS = 64_000  # new draws
MOVED_DRAWS, MOVED_NUMBERS = 2_000_000, 1_000_000_000  # moved draws for all observations, and log likelihoods at these
KNOWN = 0.25  # k-hat of weights with a fourth moment: the variance of their mean has an estimate with a variance
SHARE = 0.5  # of the squared error that observations with draws as they are may have, and those with moved ones
FEW = 1000  # draws that are moved for an observation in the first round
POWERS = (1.0, 2.0, 2.0, 2.0, 2.0, 2.0)  # of error / goal, by which the number of moved draws grows in each round
WORTH = 1.2  # factor from which on more draws are worth their cost

Part = tuple[list[int], Observations, Observations | None, Estimates]  # of which, from draws, or from some of them


@dataclass(frozen=True)
class Whole:
    """Estimates of all observations, and their Monte Carlo error.

    ``influence`` (S,) is that of the draws ``given`` on those observations whose estimates are from these as they are.
    """

    given: Observations
    elpd: Tensor
    k_hat: Tensor
    k_moved: Tensor
    influence: Tensor
    error: float

    def without(self, which: Sequence[int]) -> Whole:
        """Return these without the influence of draws on some observations."""
        left = self.influence.clone()
        for index in which:
            left -= one(self.given.values[:, index].double(), self.given.draws.ratio)[2]
        return replace(self, influence=left)

    def with_part(self, which: Sequence[int], part: Estimates, error: float) -> Whole:
        """Return these with other estimates of some observations."""
        index = torch.tensor(list(which), dtype=torch.long)
        elpd, k_hat, k_moved = self.elpd.clone(), self.k_hat.clone(), self.k_moved.clone()
        elpd[index], k_hat[index], k_moved[index] = part.elpd, part.k_hat, part.k_moved
        known = bool((k_moved < self.given.limit).all())
        return replace(self, elpd=elpd, k_hat=k_hat, k_moved=k_moved, error=error if known else math.inf)


class Work:
    """Estimates of one posterior, from one set of draws or another."""

    def __init__(self, posterior: Record, sites: Sites, seed: int, watch: Callable[[str], None] = unseen) -> None:
        self.posterior, self.sites, self.seed, self.watch = posterior, sites, seed, watch

    def given(self, draws: Draws) -> Observations:
        """Work out log likelihoods at draws."""
        self.watch(f"log likelihoods at {len(draws.z)} draws")
        return observations(self.posterior, draws, self.sites)

    def drawn(self, count: int, purpose: str = "leave-one-out") -> Observations:
        """Draw anew."""
        self.watch(f"{count} new draws")
        return self.given(more(self.posterior, count, seed=self.seed, purpose=purpose))

    def judged(self, given: Observations) -> Whole:
        """Judge the draws as they are."""
        found = plain(given)
        empty = torch.zeros_like(found.elpd)
        whole = Whole(given, empty, empty, empty, found.influence, math.inf)
        return whole.with_part(range(len(empty)), found, given.error(found.influence))

    def moved(self, given: Observations) -> Whole:
        """Move draws for observations whose k-hat is too high; for more, if the Monte Carlo error is still too large.

        Those with the highest k-hat come first, as far as the limits on the work go. No new draws are taken.
        """
        found = self.judged(given)
        goal = goal_of(found.elpd)
        high = _high(found)
        if not (high or found.error > goal) or not self._can_move(given):
            return found
        order = _order(found)
        counts = _counts(high, self._most(given))
        pairs = zip(counts, errors_without(given, order, counts), strict=True)
        which = order[: next((count for count, error in pairs if error <= goal * math.sqrt(SHARE)), counts[-1])]
        return self._with_parts(found.without(which), [(which, given, None, self._moved(given, which))])

    def precise(self, given: Observations, goal: float | None = None) -> Whole:
        """Bring the Monte Carlo error down to its goal by what costs the least, within the limits on the work."""
        found = self.judged(given)
        goal = goal_of(found.elpd) if goal is None else goal
        high = _high(found)
        if not (high or found.error > goal) or self._by_rows():
            return found
        if not self._can_move(given):
            return self._by_draws(found, goal, [])
        order = _order(found)
        count, error = self._cheapest(given, order, high, goal)
        of_rest = goal * (math.sqrt(SHARE) if count else 1.0)
        rest = self._by_draws(replace(found, error=error), of_rest, order[:count])
        failing = [index for index in order[count:] if not float(rest.k_moved[index]) < KNOWN]
        which = [*order[:count], *failing]
        if not which:
            return rest
        return self._enough_moved(rest.without(failing), given, which, goal)

    # ------------------------------------------------------------------------------------------------------------------

    def _cheapest(self, given: Observations, order: list[int], high: int, goal: float) -> tuple[int, float]:
        """Return for how many observations draws are moved, and the error of the others at the draws in hand."""
        size, counts = len(given.values), _counts(high, self._most(given))
        errors = errors_without(given, order, counts)
        best, least = counts[-1], math.inf
        for count, error in zip(counts, errors, strict=True):
            wanted = size * (error / (goal * (math.sqrt(SHARE) if count else 1.0))) ** 2
            cost = 2.0 * count * self._few(given) + (price(self.posterior) * wanted if wanted > size else 0.0)
            if cost < least:
                best, least = count, cost
        return best, errors[counts.index(best)]

    def _limit(self, given: Observations) -> float:
        """Return how many draws there can be."""
        return max(min(MOST_DRAWS, MOST_NUMBERS / len(given.labels), most_draws(self.posterior)), len(given.values))

    def _by_draws(self, found: Whole, goal: float, without: list[int]) -> Whole:
        """Take so many draws that the error of the observations not in ``without`` comes to its goal."""
        given = found.given
        wanted = int(min(len(given.values) * (found.error / goal) ** 2, self._limit(given)))
        left = [index for index in range(len(given.labels)) if index not in set(without)]
        given = (self._larger(given, wanted) if left else None) or given
        part = plain(given, left)
        found = replace(found, given=given, influence=part.influence)
        return found.with_part(left, part, given.error(part.influence))

    def _larger(self, given: Observations, wanted: int, purpose: str = "leave-one-out") -> Observations | None:
        """Return so many draws, new ones or longer chains; None if they are not worth it, or cannot be had."""
        if wanted <= WORTH * len(given.values):
            return None
        if can_draw(self.posterior):
            return self.drawn(wanted, purpose)
        self.watch("longer chains")
        chains = longer(self.posterior, wanted, seed=self.seed)
        return None if chains is None else self.given(chains)

    def _enough_moved(self, rest: Whole, given: Observations, which: list[int], goal: float) -> Whole:
        """Move as many draws as bring the error to its goal: few at first, whose error says how many it takes.

        Maps and control variates get better with more draws too. So the error is taken to fall as one over their number
        at first, and as its root only later. Observations whose k-hat is too high with few draws get more of them.
        """
        of_moved = goal * math.sqrt(SHARE) if len(which) < len(given.labels) else goal
        left, wanted, parts = which, float(self._few(given)), list[Part]()
        for power in POWERS:
            most = min(self._limit(given), MOVED_DRAWS / max(len(left), 1))
            source, some = self._as_many(given, int(min(wanted, most)))
            used = some or source
            size, found = len(used.values), self._moved(used, left)
            fine = [place for place, k_hat in enumerate(found.k_moved.tolist()) if k_hat < used.limit]
            more = (used.error(found.influence[fine].sum(0)) / of_moved) ** power
            if more <= WORTH:
                parts.append(([left[place] for place in fine], source, some, found.only(fine)))
                hard = sorted(set(range(len(left))).difference(fine))
                left, found = [left[place] for place in hard], found.only(hard)
                more = max(2.0, len(given.values) / size)
            wanted = size * more
            if not left or min(wanted, most) <= WORTH * size:
                break
        parts.append((left, source, some, found))
        return self._with_parts(rest, parts)

    def _as_many(self, given: Observations, wanted: int) -> tuple[Observations, Observations | None]:
        """Return draws, more than in hand if more are wanted, and some of them if fewer are."""
        step = len(given.values) // max(wanted, 1)
        if step > 1:
            return given, thinned(self.posterior, given, step)
        return self._larger(given, wanted, "leave-one-out by moved draws") or given, None

    def _with_parts(self, rest: Whole, parts: Sequence[Part]) -> Whole:
        """Add estimates from moved draws to those of the other observations."""
        tally = Tally(independent=can_draw(self.posterior))
        tally.add(rest.given, rest.influence)
        for which, given, some, part in parts:
            tally.add(given, part.influence.sum(0), some)
            rest = rest.with_part(which, part, 0.0)
        known = bool((rest.k_moved < rest.given.limit).all())
        return replace(rest, error=tally.error() if known else math.inf)

    def _moved(self, given: Observations, which: list[int]) -> Estimates:
        self.watch(f"{len(given.values)} draws moved for {len(which)} of {len(given.labels)} observations")
        return moved(self.posterior, given, which)

    def _few(self, given: Observations) -> int:
        """Return how many draws are moved at first."""
        return min(max(FEW, Space.fewest(given.draws.z.shape[1])), len(given.values))

    def _can_move(self, given: Observations) -> bool:
        enough = len(given.draws.z) >= Space.fewest(given.draws.z.shape[1])
        return enough and self.posterior.density is not None and not self._by_rows()

    def _by_rows(self) -> bool:
        """Whether each further draw takes a pass over all rows."""
        return self.posterior.density is not None and self.posterior.density.by_rows

    def _most(self, given: Observations) -> int:
        """Return for how many observations draws can be moved."""
        count = len(given.labels)
        return max(min(int(min(MOVED_DRAWS, MOVED_NUMBERS / count) / len(given.values)), count), 0)


def over_observations(terms: Tensor) -> float:
    """Return the standard error of a sum over observations (N,), NaN for a single one."""
    return math.sqrt(len(terms) * float(terms.var())) if len(terms) > 1 else math.nan


def goal_of(terms: Tensor) -> float:
    """Return what the Monte Carlo error of a sum over observations (N,) is to come to."""
    return max(ERROR, RELATIVE * over_observations(terms)) if len(terms) > 1 else ERROR


def _order(found: Whole) -> list[int]:
    """Return the observations, those with the highest k-hats first."""
    return found.k_hat.nan_to_num(nan=math.inf).argsort(descending=True, stable=True).tolist()


def _high(found: Whole) -> int:
    """Return for how many observations a Monte Carlo error by draws as they are would not be honest."""
    return int((~(found.k_moved < KNOWN)).sum())


def _counts(high: int, most: int) -> list[int]:
    """Return for how many observations draws may be moved: those of high k-hat, and more by factors of two."""
    found, step = [min(high, most)], 2
    while found[-1] < most:
        found.append(min(high + step, most))
        step *= 2
    return found
