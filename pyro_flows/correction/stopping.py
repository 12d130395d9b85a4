"""The stopping rule of chains: Monte Carlo errors of standard deviations, and when to look at them again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows import _mixing
from pyro_flows.verdict.chains import McmcDiagnostics
from pyro_flows.verdict.thresholds import (
    ESS_OF_CHAINS,
    ESS_OF_CHAINS_MOST,
    SD_ERROR_MOST,
    SD_ERROR_OF_CHAINS,
    SD_ERROR_OF_FEW_DRAWS,
)

CLEARLY = 0.7  # times the error of all draws, below which the second half stays alone
CHEAP = 100_000  # gradients, up to which the few draws of 256 sweeps understate the errors of heavy tails
LIGHT = 4.0  # kurtosis of draws, above which tails are heavy; a normal distribution has 3


def allowed(draws: Tensor, *, few: bool) -> Tensor:
    """Return the standard errors (D,) that sds of draws (C, N, D) may have, as a part of them.

    Draws that are cheap, and so ``few``, understate the errors of heavy tails.
    """
    heavy = _mixing.kurtoses(draws) > LIGHT
    return torch.where(heavy & few, SD_ERROR_OF_FEW_DRAWS, SD_ERROR_OF_CHAINS)


def shortfall(draws: Tensor, may_be: Tensor) -> float:
    """Return the worst ratio of the standard errors of the sds of draws (C, N, D) to those that may be (D,)."""
    return float((_mixing.sd_errors(draws).nan_to_num(nan=0.0) / may_be).max())


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
    errors = _mixing.sd_errors(z).nan_to_num(nan=0.0)
    worst = int(errors.argmax())
    if float(errors[worst]) <= SD_ERROR_MOST or _least(found) >= ESS_OF_CHAINS_MOST:
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
