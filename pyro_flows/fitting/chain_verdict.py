"""The verdict on Markov chains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows import _arviz
from pyro_flows.verdict.next_step import next_step_of_mcmc
from pyro_flows.verdict.verdict import Verdict

R_HAT = 1.01
ESS = 400.0  # bulk and tail, of all chains: fewer draws do not tell R-hat or a quantile
DIVERGING = 0.001  # of the draws
NOT_KNOWN = -1


@dataclass(frozen=True, repr=False)
class ChainVerdict(Verdict):
    """A judgement of Markov chains: ``"ok"`` or ``"unreliable"``.

    Attributes:
        count: how many chains.
        r_hat: largest rank-normalised split R-hat over unconstrained coordinates; below 1.01 for ``ok``.
        r_hat_where: the coordinate that has it.
        ess_bulk, ess_tail: smallest effective sample sizes; 400 at least for ``ok``.
        divergences: how many transitions diverged; -1 where that is not known.
    """

    count: int = 1
    r_hat: float = math.nan
    r_hat_where: str = ""
    ess_bulk: float = math.nan
    ess_tail: float = math.nan
    divergences: int = NOT_KNOWN

    @property
    def next_step(self) -> str:
        """What helps against the reasons, if the verdict is unreliable; empty otherwise."""
        return next_step_of_mcmc(self.reasons) if self.status == "unreliable" else ""

    def _sentence(self) -> str:
        diverged = "divergences not known" if self.divergences == NOT_KNOWN else f"{self.divergences} divergences"
        figures = (
            f"largest R-hat {self.r_hat:.3f} at {self.r_hat_where}, smallest ESS {self.ess_bulk:.0f} bulk and "
            f"{self.ess_tail:.0f} tail, {diverged}, {self.count} chain{'s' if self.count > 1 else ''}"
        )
        if self.status == "ok":
            return f"ok: the chains agree and can be used. Figures: {figures}."
        why = "; ".join(self.reasons)
        return f"unreliable: do not use these chains. Why: {why}. Next step: {self.next_step}. Figures: {figures}."


def judge_chains(draws: Tensor, log_p: Tensor, names: Sequence[str], diverging: Tensor | None) -> ChainVerdict:
    """Judge chains (chains, draws, D) with log densities (S,) and, if known, which draws diverged (S,)."""
    figures = _arviz.chain_figures(draws)
    r_hat = torch.nan_to_num(figures["r_hat"].reshape(-1), nan=math.inf)
    worst, where = (float(found) for found in r_hat.max(0))
    bulk, tail = (float(torch.nan_to_num(figures[name].reshape(-1)).min()) for name in ("ess_bulk", "ess_tail"))
    diverged = NOT_KNOWN if diverging is None else int(diverging.sum())
    broken = int((~torch.isfinite(log_p)).sum())
    reasons, notes = [], ["no search for missed modes was made"]
    if not worst < R_HAT:
        reasons.append(f"R-hat {worst:.3f} of {names[int(where)]} is not below {R_HAT}: the chains do not agree")
    for kind, size in (("bulk", bulk), ("tail", tail)):
        if not size >= ESS:
            reasons.append(f"effective sample size ({kind}) {size:.0f} is below {ESS:.0f}")
    if diverged > DIVERGING * len(log_p):
        reasons.append(f"{diverged} of {len(log_p)} transitions diverged, so a region of strong curvature is missed")
    elif diverged > 0:
        notes.append(f"{diverged} of {len(log_p)} transitions diverged")
    if broken:
        reasons.append(f"{broken} draws have no finite log density")
    if len(draws) == 1:
        notes.append("one chain: R-hat compares its halves, and no other chain could disagree")
    if diverging is None:
        notes.append("divergences are not known")
    return ChainVerdict(
        status="unreliable" if reasons else "ok",
        k_hat=math.nan,
        k_threshold=math.nan,
        ess_ratio=math.nan,
        mean_shift=math.nan,
        sd_shift=math.nan,
        where="",
        reasons=tuple(reasons),
        notes=tuple(notes),
        count=len(draws),
        r_hat=worst,
        r_hat_where=names[int(where)],
        ess_bulk=bulk,
        ess_tail=tail,
        divergences=diverged,
    )
