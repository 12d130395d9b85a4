"""The second stage of a fit, one run: starting points, and the methods in the order of their table."""

from __future__ import annotations

from collections.abc import Sequence

from pyro_flows import _stages
from pyro_flows._seeding import seeded
from pyro_flows.fitting.attempt import Attempt
from pyro_flows.fitting.methods import AFTER, AT_MODES, AT_THE_BEST, answered
from pyro_flows.fitting.plan import tails
from pyro_flows.fitting.selection import CLOSE
from pyro_flows.starts.matching import matched
from pyro_flows.starts.portfolio import portfolio
from pyro_flows.starts.start import Start, standard

STARTS_SHARE = 0.5  # of the seconds that are left, if there is a bound


def make_run(at: Attempt) -> None:
    """Find starting points, and try the methods from there until one suffices."""
    with seeded(at.seed, at.density.device):
        at.starts = _found(at)
        at.run.modes = [start for start in at.starts if start.evidence is not None]
        if answered(at, AT_MODES):
            return
        at.starts = _in_turn(at.starts, at.run.number)
        if not at.plan.train_model:
            at.starts = _matched(at)
        answered(at, AT_THE_BEST) or answered(at, AFTER)


def _found(at: Attempt) -> list[Start]:
    """Return starting points, the best first; the only one where the runs before lack a mode."""
    extra = at.prepared.starts
    starts = [*extra, standard(at.density)]
    with at.plan.clock.part(_stages.STARTS, share=STARTS_SHARE):
        starts = portfolio(at.density, seed=at.seed, extra=extra) if at.lack is None else [at.lack]
    return starts


def _in_turn(starts: Sequence[Start], number: int) -> list[Start]:
    """Return the starts with another one of those that are close to the best in front, by the number of the run."""
    close = [start for start in starts if start.elbo >= starts[0].elbo - CLOSE]
    return close[number % len(close) :] + close[: number % len(close)]


def _matched(at: Attempt) -> list[Start]:
    """Put the best start at the moments that its weights tell, if they can."""
    found = list(at.starts)
    with at.plan.clock.part(_stages.MOMENTS, share=STARTS_SHARE):
        found[0] = matched(at.density, found[0], tails(at.density.dim), seed=at.seed)
    return found
