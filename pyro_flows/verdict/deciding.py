"""From draws to a verdict on them, and to the draws to use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_flows._seeding import derive
from pyro_flows.verdict.judging import judge
from pyro_flows.verdict.verdict import Verdict
from pyro_flows.verdict.weighing import Weighing, weigh

POOL = 4
CHECKED = 50  # draws run with Pyro's argument checks on
Draw = Callable[[int], tuple[Tensor, Tensor]]  # n -> z (n, D), log q (n,)


@dataclass(frozen=True)
class Decision:
    """Raw draws ``z`` with their densities, the verdict on them, and the draws to use."""

    z: Tensor
    log_p: Tensor
    log_q: Tensor
    log_weights: Tensor
    weighing: Weighing
    verdict: Verdict
    used: Tensor
    used_log_p: Tensor
    used_log_q: Tensor
    index: Tensor  # of the draws to use, in the pool


def decide(
    draw: Draw,
    score: Callable[[Tensor], Tensor],
    names: Sequence[str],
    *,
    draws: int,
    seed: int,
    warnings: Sequence[str] = (),
    failures: Sequence[str] = (),
    notes: Sequence[str] = (),
    doubts: Sequence[str] = (),
    again: Callable[[], Weighing] | None = None,
    complaint: Callable[[Tensor], str | None] = lambda z: None,
    changed: Callable[[Tensor, Tensor], list[str]] = lambda z, log_weights: [],
) -> Decision:
    """Draw a pool of four times as many draws as asked for, weigh and judge it, and choose the draws to use.

    The pool steadies k-hat, whose standard error is about (1 + k) / sqrt(3 sqrt(S)). The first ``draws`` of it are the
    raw draws; where weighting mends them, the draws to use are resampled from the whole pool, and a second pool has to
    come to the same verdict.

    Args:
        draw: n -> draws z (n, D) and their log density (n,) under the guide.
        score: z -> log density (n,) under the model.
        names: labels of the coordinates.
        draws: how many.
        seed: of the resampling.
        warnings: see :func:`judge`.
        failures: see :func:`judge`.
        notes: see :func:`judge`.
        doubts: see :func:`judge`.
        again: weighs a second pool, if draws are to be corrected.
        changed: draws and their log weights -> what weighting changes in the model's own values, in words.
        complaint: z -> what is invalid about the model at some of the first draws, though its density is finite there.
    """
    pool, pool_q = draw(POOL * draws)
    pool_p = score(pool)
    weighing = weigh(pool, pool_p, pool_q)
    if (objection := complaint(pool[:CHECKED])) is not None:
        failures = (*failures, f"the model is invalid at some draws: {objection}")
    said: dict[str, Any] = {"warnings": warnings, "notes": notes, "doubts": doubts}
    said["changed"] = changed(pool, weighing.log_weights) if weighing.broken < len(pool) else []
    verdict = judge(weighing, names, failures=failures, **said)
    if verdict.status == "corrected" and again is not None:  # one lucky pool does not correct a guide
        worse = _worse(judge(again(), names))
        verdict = judge(weighing, names, failures=(*failures, *worse), **said) if worse else verdict
    index = _to_use(weighing, verdict, draws, seed=seed)
    return Decision(
        z=pool[:draws],
        log_p=pool_p[:draws],
        log_q=pool_q[:draws],
        log_weights=torch.log_softmax(weighing.log_weights[:draws], 0),
        weighing=weighing,
        verdict=verdict,
        used=pool[index],
        used_log_p=pool_p[index],
        used_log_q=pool_q[index],
        index=index,
    )


def _to_use(weighing: Weighing, verdict: Verdict, draws: int, *, seed: int) -> Tensor:
    """Return the numbers of the draws to use: by their weights, where these correct them, else the first ones."""
    if verdict.status == "corrected":
        return resample(weighing.log_weights, draws, seed=seed)
    return torch.arange(draws, device=weighing.log_weights.device)


def _worse(second: Verdict) -> tuple[str, ...]:
    """Return what the verdict on a second pool says against the draws."""
    return (
        (f"a second sample from the guide fails the check ({second.reasons[0]})",)
        if second.status == "unreliable"
        else ()
    )


def resample(log_weights: Tensor, draws: int, *, seed: int) -> Tensor:
    """Return ``draws`` indices drawn by systematic resampling of normalized log weights (S,), in random order."""
    generator = torch.Generator().manual_seed(derive(seed, "resampling"))
    cumulative = log_weights.double().cpu().exp().cumsum(0)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    points = (torch.arange(draws, dtype=torch.float64) + offset) / draws
    index = torch.searchsorted(cumulative, points * cumulative[-1]).clamp_max(len(cumulative) - 1)
    return index[torch.randperm(draws, generator=generator)].to(log_weights.device)
