"""The draws that a fit is judged by: whether memory holds them, and their scores for as long as there is time."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_flows.inference.verdict.deciding import CHECKED, POOL, Draw
from pyro_flows.inference.verdict.weighing import weigh
from pyro_flows.model.faults import Undefined
from pyro_flows.model.log_density import ON_BOUNDS, LogDensity
from pyro_flows.model.sites import messages
from pyro_flows.model.supports import family
from pyro_flows.support.process.seeding import seeded
from pyro_flows.support.thresholds import ESS_SHARE_EVEN, K_HAT_GOOD

JUDGING = "computing importance weights"
INFINITE, BEYOND = "the log density is +inf at", "the posterior lies far in the tail of"  # each begins a reason
LASTING = (INFINITE, BEYOND, ON_BOUNDS)  # that no sampler takes away
LEAST = 8  # draws, whatever the clock says
ROWS = 1024


@runtime_checkable
class Bounded(Protocol):
    """A distribution that is known up to some distance from its mean, as a fitted prior."""

    def sds_away(self, value: Tensor, weights: Tensor) -> tuple[float, float]:
        """Return how far the mean of weighted values lies from its own, and how far it may, in its sds."""
        ...


class Pool(NamedTuple):
    """Draws (n, D) and their log densities (n,) under the guide and the model.

    ``checked`` of them are to be run with checks. They are all that there are of ``wanted`` ones.
    """

    z: Tensor
    log_q: Tensor
    log_p: Tensor
    checked: int
    wanted: int


def check_memory(density: LogDensity, draws: int) -> None:
    """Refuse more draws than the memory of this machine holds."""
    memory = 2.0**36
    with suppress(AttributeError, OSError, ValueError):  # not on every system
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    # three copies of the pool exist at once, and as many numbers beside it for each draw
    size = torch.finfo(density.dtype).bits // 8 * POOL * 3 * (density.dim + 1)
    if draws * size > memory:
        raise ValueError(
            f"draws: expected at most {int(memory / size)} of {density.dim} coordinates, for the "
            f"{memory / 2**30:.0f} GiB of memory here, got {draws}. Take fewer; guide.sample_posterior() makes more."
        )


def seconds_to_judge(density: LogDensity, draws: int) -> float:
    """Time a few evaluations, and return about how many seconds judging that many draws takes at most."""
    rows = 64 if density.batched else 1
    began = time.monotonic()
    with torch.no_grad(), suppress(Undefined):  # which takes no less time
        density.map(density.single, density.structure.points(0.0)[:1].expand(rows, -1))
    return (time.monotonic() - began) / rows * (POOL * draws + draws) + 0.1


def pool_of(density: LogDensity, draw: Draw, draws: int, times: int = POOL) -> Pool:
    """Score four times as many draws as asked for, or ``times``; as many only if weights are even and more cost much.

    More draws make k-hat more exact, and are there to be resampled from. Even weights leave nothing of either to do.
    """
    if times == 1 or density.affordable(times * draws) == times * draws or density.clock.finite:
        return score_pool(density, draw, times * draws)
    first = score_pool(density, draw, draws)
    weighing = weigh(first.z, first.log_p, first.log_q)
    if weighing.share > ESS_SHARE_EVEN and weighing.k_hat < K_HAT_GOOD and not weighing.broken:
        return first
    rest = score_pool(density, draw, (times - 1) * draws)
    z, log_q, log_p = (torch.cat([getattr(part, name) for part in (first, rest)]) for name in ("z", "log_q", "log_p"))
    return Pool(z, log_q, log_p, first.checked, times * draws)


def score_pool(density: LogDensity, draw: Draw, count: int) -> Pool:
    """Draw ``count`` times, and score the draws until the clock of ``density`` ends that or Ctrl-C comes; 8 at least.

    Where there may be too little time, draws are made as they are scored. Ctrl-C that comes after another one, or where
    it is to be raised, is raised.
    """
    clock = density.clock
    hurried = clock.hurried or _is_slow(density, draw, count)
    began = time.monotonic()
    until = began + 0.7 * clock.left  # the rest is for checks and for the constrained values
    rows = LEAST if hurried or not density.batched else ROWS
    drawn = [] if hurried else [draw(count)]
    scored: list[Tensor] = []
    done = 0
    while done < count and (done < LEAST or time.monotonic() < until):
        many = count - done if count - done < 2 * rows else rows  # no new size of a piece at the end
        before = time.monotonic()
        try:
            if hurried:
                drawn = [*drawn[: len(scored)], draw(many)]
            z = drawn[-1][0] if hurried else drawn[0][0][done : done + many]
            scored.append(density(z))
        except KeyboardInterrupt:
            if not clock.interrupt(JUDGING):
                raise
            until, rows = time.monotonic(), LEAST
            continue
        done += many
        if hurried and density.batched and time.monotonic() - before < 0.05 * (until - before):
            rows = min(2 * rows, ROWS)  # a piece twice as large takes a tenth of the time left at most
    each = (time.monotonic() - began) / max(done, 1)
    affordable = (clock.left - each * done / POOL) / max(4.0 * each, 1e-9)
    checked = CHECKED if not hurried else int(min(max(affordable, 1.0), CHECKED))
    done -= done % POOL if done < count else 0
    z, log_q = (torch.cat(list(parts))[:done] for parts in zip(*drawn, strict=True))
    return Pool(z, log_q, torch.cat(scored)[:done], checked, count)


def infinite_places(density: LogDensity, z: Tensor, log_p: Tensor) -> list[str]:
    """Say that draws ``z`` (S, D) lie where the model's density is infinite; nothing if none does.

    Values that rounding has put onto the edge of their support, where a density may be infinite, do not count.
    """
    rows = z[torch.isposinf(log_p)]
    if not len(rows):
        return []
    some = rows[:CHECKED]
    with torch.no_grad():
        back = density.unconstrain(density.constrain(some))
    inside = some[torch.isclose(back.to(some), some, rtol=1e-3, atol=1e-3).all(1)]
    if not len(inside):
        return []
    count = f"{len(rows):,} of {len(z):,} draws"
    return [f"{INFINITE} {count} ({density.explain(inside[0])}), so the posterior cannot be normalized"]


def beyond_priors(density: LogDensity, z: Tensor, log_weights: Tensor) -> list[str]:
    """Say where the mean of weighted draws ``z`` (S, D) lies in the tail of a fitted prior, which no draw told of."""
    found = []
    for name in density.names:
        prior = family(messages(density.structure.trace)[name]["fn"])
        if not isinstance(prior, Bounded):
            continue
        kept = torch.isfinite(log_weights[:ROWS]).nonzero()[:, 0]  # enough for a mean; each may be a run of the model
        value, weights = density.constrain(z[kept])[name], torch.softmax(log_weights[kept], 0)
        away, most = prior.sds_away(value, weights)
        if away > most:
            found.append(
                f"{BEYOND} the fitted prior {name!r}: {away:.1f} of its sds from its mean, where its draws tell of "
                f"{most:.1f}; fit all data at once (prior.refresh)"
            )
    return found


def _is_slow(density: LogDensity, draw: Draw, count: int) -> bool:
    """Whether drawing alone may take a third of the time that is left, by 64 draws, which leave no trace."""
    if not density.clock.finite:
        return False
    began = time.monotonic()
    with seeded(0, density.device):
        draw(64)
    return (time.monotonic() - began) / 64 * count > 0.3 * density.clock.left
