"""When chains are enough: convergence, effective draws, Monte Carlo errors of sds, and when to look at them again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.inference.verdict.chains import McmcDiagnostics, worst_of
from pyro_flows.support.numbers import mixing
from pyro_flows.support.thresholds import (
    ESS_OF_CHAINS,
    ESS_OF_CHAINS_MOST,
    SD_ERROR_OF_CHAINS,
    SD_ERROR_OF_FEW_DRAWS,
    SHIFT_MOST,
)

LOG_DENSITY = "the log density"
CLEARLY = 0.7  # times the error of all draws, below which the second half stays alone
CHEAP = 100_000  # gradients, up to which the few draws of 256 sweeps understate the errors of heavy tails
LIGHT = 4.0  # kurtosis of draws, above which tails are heavy; a normal distribution has 3


def examined(
    z: Tensor, stats: Mapping[str, Tensor], names: Sequence[str], *, superchain: Tensor, began: Tensor, sweeps: int,
    watched: Sequence[int] | None = None,
) -> tuple[McmcDiagnostics, list[int]]:  # fmt: skip
    """Judge draws z (C, N, D) by the ``watched`` coordinates, all by default, and the log density.

    Return the coordinates too, the worst ones first. ``superchain`` (C,) numbers the starting points that chains share,
    ``began`` (C,) the parts of a mixture in which they began.
    """
    looked_at = range(z.shape[2]) if watched is None else watched
    values = torch.cat([z[..., list(looked_at)].double(), stats["lp"].double()[..., None]], -1)
    counts = len(z), z.shape[1], sweeps
    if not bool(torch.isfinite(values).all()):
        return McmcDiagnostics(*counts, where=LOG_DENSITY, divergences=1.0, changes=0.0), list(looked_at)
    labels = [*(names[number] for number in looked_at), LOG_DENSITY]
    found = mixing.chain_diagnostics(values, superchain)
    lowest = torch.minimum(found["ess_bulk"], found["ess_tail"])
    least, where = worst_of(lowest.tolist(), labels, largest=False)
    tried = stats["proposed"].double()
    worst = lowest[:-1].nan_to_num(nan=0.0).argsort().tolist()
    judged = McmcDiagnostics(
        *counts,
        r_hat=worst_of(found["r_hat"].tolist(), labels, largest=True)[0],
        nested_r_hat=worst_of(found["nested_r_hat"].tolist(), labels, largest=True)[0],
        ess_bulk=worst_of(found["ess_bulk"].tolist(), labels, largest=False)[0],
        ess_tail=worst_of(found["ess_tail"].tolist(), labels, largest=False)[0],
        where=where if not math.isnan(least) else labels[0],
        divergences=float(stats["diverging"].double().mean()),
        energy_error=float(stats["energy_error"].abs().median()),
        acceptance=float(stats["acceptance_rate"].double().mean()),
        independence=float(stats["independent"].double().sum() / tried.sum()) if bool(tried.sum() > 0) else math.nan,
        agreement=agreement(values[..., :-1], began),
        changes=float(stats["changes"].double().sum(1).mean()),
    )
    return judged, [looked_at[place] for place in worst]


def slowest(z: Tensor, count: int) -> list[int]:
    """Return the coordinates of draws (C, N, D) with the fewest effective ones for their means: cheaper than ranks."""
    return mixing.effective(z).nan_to_num(nan=0.0).argsort()[:count].tolist()


def agreement(z: Tensor, began: Tensor) -> float:
    """Return the largest R-hat between groups of chains by the part in which they began; NaN if that is one."""
    groups = [z[began == part].flatten(0, 1) for part in began.unique().tolist()]
    if len(groups) < 2:
        return math.nan
    shortest = min(len(group) for group in groups)
    spread = [group[torch.linspace(0, len(group) - 1, shortest).long()] for group in groups]
    return float(mixing.r_hat(torch.stack(spread)).max())


def allowed(draws: Tensor, *, few: bool) -> Tensor:
    """Return the standard errors (D,) that sds of draws (C, N, D) may have, as a part of them.

    Draws that are cheap, and so ``few``, understate the errors of heavy tails.
    """
    heavy = mixing.kurtoses(draws) > LIGHT
    return torch.where(heavy & few, SD_ERROR_OF_FEW_DRAWS, SD_ERROR_OF_CHAINS)


def shortfall(draws: Tensor, may_be: Tensor) -> float:
    """Return the worst ratio of the standard errors of the sds of draws (C, N, D) to those that may be (D,)."""
    return float((mixing.sd_errors(draws).nan_to_num(nan=0.0) / may_be).max())


class Sds(NamedTuple):
    """Whether all sds have reached their Monte Carlo error, and whether to discard the first half as warm-up."""

    resolved: bool
    warm_up: bool
    error_ratio: float


def resolved_sds(found: McmcDiagnostics, draws: Tensor, gradients: float) -> Sds:
    """Return whether draws (C, N, D) are enough for all standard deviations.

    The first half is warm-up if the errors of sds are clearly smaller without it. Of heavy tails, one half has smaller
    errors by chance: that with fewer draws far out, whose sds are too small.
    """
    few = gradients < CHEAP and found.sweeps < 256
    may_be = allowed(draws, few=few)
    error_ratio = shortfall(draws, may_be)
    if error_ratio <= 1.0:
        return Sds(True, False, error_ratio)
    warm_up = shortfall(draws[:, draws.shape[1] // 2 :], may_be) < CLEARLY * error_ratio
    waited_for = few or _least(found) < ESS_OF_CHAINS_MOST
    return Sds(not (waited_for or warm_up), warm_up, error_ratio)


def unresolved(z: Tensor, found: McmcDiagnostics, names: Sequence[str]) -> list[str]:
    """Say so where an sd of draws z (C, N, D) has a large error: a chain is on its way back from far out.

    R-hat and effective draws use ranks, so they do not depend on how far away a few draws are. With very many effective
    draws, nothing is said, since the sd may not exist.
    """
    errors = mixing.sd_errors(z).nan_to_num(nan=0.0)
    worst = int(errors.argmax())
    if float(errors[worst]) <= SHIFT_MOST or _least(found) >= ESS_OF_CHAINS_MOST:
        return []
    return [f"the sd of the chains at {names[worst]} has a Monte Carlo error of {100 * float(errors[worst]):.0f}%"]


def sweeps_needed(found: McmcDiagnostics) -> float:
    """Return how many sweeps make draws enough, at the pace of these figures."""
    return found.sweeps * ESS_OF_CHAINS / max(_least(found), 1.0)


def next_look(found: McmcDiagnostics, *, thin: int, kept: int, error_ratio: float = 0.0) -> int:
    """Return after how many more draws to look again, one of ``thin`` sweeps, where ``kept`` are the fewest of all.

    ``error_ratio`` says by what factor the errors of sds are too large: their squares fall as one over the sweeps.
    """
    whole = max(sweeps_needed(found), error_ratio**2 * found.sweeps)
    needed = math.ceil((whole - found.sweeps) / thin)
    return kept // 2 if needed <= 0 else min(max(needed, kept // 8, 1), kept // 2)


def _least(found: McmcDiagnostics) -> float:
    return min(found.ess_bulk, found.ess_tail)
