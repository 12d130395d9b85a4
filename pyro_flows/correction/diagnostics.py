"""Diagnostics of chains: convergence, effective draws, energy, and whether chains from different modes agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_flows import _mixing
from pyro_flows.verdict.chains import McmcDiagnostics, worst_of

LOG_DENSITY = "the log density"
UNKNOWN = (  # of draws that are not finite
    *("r_hat", "nested_r_hat", "ess_bulk", "ess_tail", "energy_error", "acceptance", "independence", "agreement"),
)


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
    count: dict[str, Any] = {"chains": len(z), "draws": z.shape[1], "sweeps": sweeps}
    if not bool(torch.isfinite(values).all()):
        nothing: dict[str, Any] = dict.fromkeys(UNKNOWN, math.nan)
        return McmcDiagnostics(**count, where=LOG_DENSITY, divergences=1.0, changes=0.0, **nothing), list(looked_at)
    labels = [*(names[number] for number in looked_at), LOG_DENSITY]
    found = _mixing.chain_diagnostics(values, superchain)
    lowest = torch.minimum(found["ess_bulk"], found["ess_tail"])
    least, where = worst_of(lowest.tolist(), labels, largest=False)
    tried = stats["proposed"].double()
    worst = lowest[:-1].nan_to_num(nan=0.0).argsort().tolist()
    judged = McmcDiagnostics(
        **count,
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
    return _mixing.effective(z).nan_to_num(nan=0.0).argsort()[:count].tolist()


def agreement(z: Tensor, began: Tensor) -> float:
    """Return the largest R-hat between groups of chains by the part in which they began; NaN if that is one."""
    groups = [z[began == part].flatten(0, 1) for part in began.unique().tolist()]
    if len(groups) < 2:
        return math.nan
    shortest = min(len(group) for group in groups)
    spread = [group[torch.linspace(0, len(group) - 1, shortest).long()] for group in groups]
    return float(_mixing.r_hat(torch.stack(spread)).max())
