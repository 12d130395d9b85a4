"""The verdict on Markov chains of another sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows import _arviz
from pyro_flows.verdict.chains import McmcDiagnostics
from pyro_flows.verdict.methods import MCMC
from pyro_flows.verdict.thresholds import DIVERGENT_SHARE_OF_MCMC, ESS_OF_MCMC, R_HAT_CONVERGED
from pyro_flows.verdict.verdict import Verdict

UNSEARCHED = "no search for missed modes was made"  # begins a note
OF_WEIGHTS = ("k_hat", "k_threshold", "ess_ratio", "mean_shift", "sd_shift")  # of which chains have none


def judge_mcmc(draws: Tensor, log_p: Tensor, names: Sequence[str], diverging: Tensor | None) -> Verdict:
    """Judge chains (C, N, D) with log densities (C, N) and, if known, which draws diverged (C, N)."""
    found = _arviz.chain_diagnostics(draws)
    r_hat = torch.nan_to_num(found["r_hat"].reshape(-1), nan=math.inf)
    ess = {name: torch.nan_to_num(found[f"ess_{name}"].reshape(-1)) for name in ("bulk", "tail")}
    worst, total = int(r_hat.argmax()), log_p.numel()
    diverged = 0 if diverging is None else int(diverging.sum())
    broken = int((~torch.isfinite(log_p)).sum())
    apart = "the chains do not agree" if len(draws) > 1 else "the chain does not agree with itself"
    reasons, notes = [], [UNSEARCHED]
    if not float(r_hat[worst]) < R_HAT_CONVERGED:
        reasons.append(f"R-hat {r_hat[worst]:.3f} of {names[worst]} is not below {R_HAT_CONVERGED}: {apart}")
    for kind, sizes in ess.items():
        if not float(sizes.min()) >= ESS_OF_MCMC:
            reasons.append(f"effective sample size ({kind}) {sizes.min():.0f} is below {ESS_OF_MCMC:.0f}")
    if diverged > DIVERGENT_SHARE_OF_MCMC * total:
        reasons.append(f"{diverged} of {total} transitions diverged, so a region of strong curvature is missed")
    elif diverged > 0:
        notes.append(f"{diverged} of {total} transitions diverged")
    if broken:
        reasons.append(f"{broken} draws have no finite log density")
    figures = McmcDiagnostics.of_mcmc(
        chains=len(draws),
        draws=draws.shape[1],
        r_hat=float(r_hat[worst]),
        ess_bulk=float(ess["bulk"].min()),
        ess_tail=float(ess["tail"].min()),
        where=names[int(torch.minimum(ess["bulk"], ess["tail"]).argmin())],
        divergences=math.nan if diverging is None else diverged / total,
    )
    notes += ["one chain: R-hat compares its halves, and no other chain could disagree"] if len(draws) == 1 else []
    notes += ["divergences are not known"] if diverging is None else []
    return Verdict(
        status="unreliable" if reasons else "ok",
        where="",
        reasons=tuple(reasons),
        notes=tuple(notes),
        chains=figures,
        guide_method=MCMC,
        **dict.fromkeys(OF_WEIGHTS, math.nan),
    )
