"""The figures that a verdict rests on, each with its limit and what it means."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyro_flows.results.record import Record
from pyro_flows.verdict import thresholds as limits
from pyro_flows.verdict.chains import McmcDiagnostics
from pyro_flows.verdict.verdict import SHOWN

TAIL = "Tail of the importance weights: the higher, the rarer and larger the weights that matter."
LEFT = "Share of the method's own draws that is left after weighting; 1 if they are the posterior's."
OF_MEANS = "Largest difference that weighting makes to a mean, in posterior standard deviations."
OF_SDS = "Largest absolute log ratio that weighting makes to a standard deviation."
CLOSE = "Close to the ELBO for a good approximation."


@dataclass(frozen=True)
class Figure:
    """A number with its name, its limit in words, and what it means."""

    name: str
    value: str
    limit: str
    meaning: str


def figures(posterior: Record) -> list[Figure]:
    """Return the figures of a verdict, of a guide's draws or of chains."""
    verdict = posterior.verdict
    if posterior._of_mcmc and verdict.chains is not None:
        return _of_mcmc(verdict.chains)
    found = _of_guide(posterior) if not math.isnan(verdict.k_hat) else []
    return [*(_of_chains(verdict.chains) if verdict.chains is not None else []), *found]


def _of_guide(posterior: Record) -> list[Figure]:
    verdict = posterior.verdict
    at = f" at {verdict.where}" if verdict.mean_shift >= SHOWN else ""
    found = [
        ("k-hat", f"{verdict.k_hat:.2f}", f"below {verdict.k_threshold:.2f}", TAIL),
        ("ESS/S", f"{verdict.ess_ratio:.2f}", f"{limits.ESS_SHARE_LEAST} or more", LEFT),
        ("Change of a mean", f"{verdict.mean_shift:.2f} sd{at}", f"{limits.SHIFT_MOST} or less for ok", OF_MEANS),
        ("Change of an sd", f"{verdict.sd_shift:.2f}", f"{limits.SHIFT_MOST} or less for ok", OF_SDS),
    ]
    if verdict.supports_evidence and not posterior._by_chains:
        found.append(("ELBO", f"{posterior.elbo:.3f} nats", "", "Lower bound of the log evidence."))
    if verdict.supports_evidence:
        found.append(("Log evidence", f"{posterior.log_evidence:.3f} nats", "", CLOSE))
    return [Figure(*parts) for parts in found]


def _worth(chains: McmcDiagnostics, least: float) -> Figure:
    worth = f"{chains.ess_bulk:.0f} bulk, {chains.ess_tail:.0f} tail"
    meaning = f"Independent draws that the chains are worth, lowest at {chains.where}."
    return Figure("Effective draws", worth, f"{least:.0f} or more", meaning)


def _of_chains(chains: McmcDiagnostics) -> list[Figure]:
    nested, single = f"{limits.R_HAT_CONVERGED} or less", f"{limits.R_HAT_OF_SHORT_CHAINS} or less"
    return [
        Figure("Nested R-hat", f"{chains.nested_r_hat:.3f}", nested, "1 if chains from all starts agree."),
        Figure("R-hat", f"{chains.r_hat:.3f}", single, "1 if single chains agree."),
        _worth(chains, limits.ESS_OF_CHAINS),
        Figure("Divergences", f"{chains.divergences:.2%}", "hardly any", "Trajectories that went astray."),
        Figure("Acceptance", f"{chains.acceptance:.2f}", "", "Share of trajectories that were accepted."),
    ]


def _of_mcmc(chains: McmcDiagnostics) -> list[Figure]:
    diverged = "not known" if math.isnan(chains.divergences) else f"{chains.divergences:.2%}"
    most = f"at most {limits.DIVERGENT_SHARE_OF_MCMC:.1%}"
    return [
        Figure("R-hat", f"{chains.r_hat:.3f}", f"below {limits.R_HAT_CONVERGED}", "1 if the chains agree."),
        _worth(chains, limits.ESS_OF_MCMC),
        Figure("Divergences", diverged, most, "Transitions that went astray."),
    ]
