"""The figures that a verdict rests on, each with its limit and what it means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pyro_flows.results.record import Record
from pyro_flows.verdict.thresholds import (
    DIVERGENT_SHARE_OF_MCMC,
    ESS_OF_CHAINS,
    ESS_OF_MCMC,
    ESS_SHARE_LEAST,
    R_HAT_CONVERGED,
    R_HAT_OF_SHORT_CHAINS,
    SHIFT_MOST,
)
from pyro_flows.verdict.verdict import SHOWN


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
    if posterior._of_mcmc:
        return _of_mcmc(verdict.chains)
    found = _of_guide(posterior) if not math.isnan(verdict.k_hat) else []
    return [*(_of_chains(verdict.chains) if verdict.chains is not None else []), *found]


def _of_guide(posterior: Record) -> list[Figure]:
    verdict = posterior.verdict
    at = f" at {verdict.where}" if verdict.mean_shift >= SHOWN else ""
    return [
        Figure(
            "k-hat",
            f"{verdict.k_hat:.2f}",
            f"below {verdict.k_threshold:.2f}",
            "Tail of the importance weights: the higher, the rarer and larger the weights that matter.",
        ),
        Figure(
            "ESS/S",
            f"{verdict.ess_ratio:.2f}",
            f"{ESS_SHARE_LEAST} or more",
            "Share of the method's own draws that is left after weighting; 1 if they are the posterior's.",
        ),
        Figure(
            "Change of a mean",
            f"{verdict.mean_shift:.2f} sd{at}",
            f"{SHIFT_MOST} or less for ok",
            "Largest difference that weighting makes to a mean, in posterior standard deviations.",
        ),
        Figure(
            "Change of an sd",
            f"{verdict.sd_shift:.2f}",
            f"{SHIFT_MOST} or less for ok",
            "Largest absolute log ratio that weighting makes to a standard deviation.",
        ),
        *(_of_evidence(posterior) if verdict.supports_evidence else []),
    ]


def _of_evidence(posterior: Record) -> list[Figure]:
    evidence = Figure(
        "Log evidence", f"{posterior.log_evidence:.3f} nats", "", "Close to the ELBO for a good approximation."
    )
    elbo = Figure("ELBO", f"{posterior.elbo:.3f} nats", "", "Lower bound of the log evidence.")
    return [evidence] if posterior._by_chains else [elbo, evidence]


def _of_chains(chains: Any) -> list[Figure]:
    return [
        Figure(
            "Nested R-hat",
            f"{chains.nested_r_hat:.3f}",
            f"{R_HAT_CONVERGED} or less",
            "1 if chains from all starts agree.",
        ),
        Figure("R-hat", f"{chains.r_hat:.3f}", f"{R_HAT_OF_SHORT_CHAINS} or less", "1 if single chains agree."),
        Figure(
            "Effective draws",
            f"{chains.ess_bulk:.0f} bulk, {chains.ess_tail:.0f} tail",
            f"{ESS_OF_CHAINS:.0f} or more",
            f"Independent draws that the chains are worth, lowest at {chains.where}.",
        ),
        Figure("Divergences", f"{chains.divergences:.2%}", "hardly any", "Trajectories that went astray."),
        Figure("Acceptance", f"{chains.acceptance:.2f}", "", "Share of trajectories that were accepted."),
    ]


def _of_mcmc(chains: Any) -> list[Figure]:
    known = not math.isnan(chains.divergences)
    return [
        Figure("R-hat", f"{chains.r_hat:.3f}", f"below {R_HAT_CONVERGED}", "1 if the chains agree."),
        Figure(
            "Effective draws",
            f"{chains.ess_bulk:.0f} bulk, {chains.ess_tail:.0f} tail",
            f"{ESS_OF_MCMC:.0f} or more",
            f"Independent draws that the chains are worth, lowest at {chains.where}.",
        ),
        Figure(
            "Divergences",
            f"{chains.divergences:.2%}" if known else "not known",
            f"at most {DIVERGENT_SHARE_OF_MCMC:.1%}",
            "Transitions that went astray.",
        ),
    ]
