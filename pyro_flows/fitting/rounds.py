"""A trained or untrained flow with a new sample of it, weighed by importance sampling."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from pyro_flows.flows.flow import Flow
from pyro_flows.inference.record import Stage
from pyro_flows.inference.training.loop import Training
from pyro_flows.inference.training.trainer import Trainer
from pyro_flows.inference.verdict.deciding import (
    COMPARED_DRAWS,
    JUDGED_DRAWS,
    LOOKED_AT_DRAWS,
    nothing_to_gain,
    raw_weights,
    status_of,
    weights_correct,
)
from pyro_flows.inference.verdict.weighing import Weighing, weigh
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process import stages
from pyro_flows.support.thresholds import ESS_SHARE_EVEN, ESS_SHARE_GOOD, K_HAT_GOOD, VAR_LOG_P_RATIO_MOST


@dataclass(frozen=True)
class Round:
    """The flow after one round, what a fresh sample says of it, how the round ended, and its entry in the history."""

    flow: Flow
    weighing: Weighing
    training: Training
    stage: Stage

    @property
    def enough(self) -> bool:
        """Whether there is nothing left to mend: stricter than the verdict, since more can be tried."""
        return self.training.converged and nothing_to_gain(self.weighing)

    @property
    def corrected(self) -> bool:
        """Whether importance weights correct its draws."""
        return weights_correct(self.weighing.share, self.weighing.k_hat)

    @property
    def nearly_uniform(self) -> bool:
        """Whether the weights of its sample are nearly the same at all draws, so that no mass next to them is missed.

        MCMC walkers reach a region with too little density by way of regions where the density is somewhat too small.
        """
        weighing = self.weighing
        return weighing.share > ESS_SHARE_EVEN and weighing.k_hat < K_HAT_GOOD and not weighing.broken and self.weighed

    @property
    def weighed(self) -> bool:
        return len(self.weighing.log_weights) > 1

    @property
    def only_k_hat_fails(self) -> bool:
        """Whether only the tail of the weights is in doubt: k-hat is large, though nearly all weights are the same.

        More steps of training do not change a tail with next to no mass, and a mixture would have the same modes.
        """
        even = self.weighing.share > ESS_SHARE_GOOD
        return even and self.weighing.k_hat >= K_HAT_GOOD and self.weighed

    @property
    def rank(self) -> tuple[float, float]:
        """The larger the better: the verdict on its sample first, then the ELBO."""
        return float(("unreliable", "corrected", "ok").index(status_of(self.weighing))), self.weighing.elbo


@torch.no_grad()
def weighed(flow: Flow, density: LogDensity, draws: int) -> Weighing:
    with density.clock.watching():
        z, log_q = flow.draw(density.affordable(draws))
    return weigh(z, density(z), log_q, quantiles=True)


@torch.no_grad()
def weights_collapse(flow: Flow, density: LogDensity) -> bool:
    """Whether the weights of a few draws of a flow collapse: next to none of them has weight."""
    with density.clock.watching():
        z, log_q = flow.draw(COMPARED_DRAWS)
    return raw_weights(density(z) - log_q) is None


def assess(name: str, trainer: Trainer, training: Training) -> Round:
    """Weigh a fresh sample of the flow; a round that there is no time to weigh counts for nothing but its ELBO."""
    trained = {"step_size": trainer.learning_rate, "batch": trainer.batch}
    return _assessed(name, trainer.flow, trainer.density, training, trainer.evaluation, trained)


def untrained(name: str, flow: Flow, density: LogDensity, elbo: float, why: str, *, look: bool = True) -> Round:
    """Weigh a flow as it is; see :func:`assess`.

    Without ``look``, no sample is drawn: chains that began at the flow are judged, and not its own draws.
    """
    return _assessed(
        name, flow, density, Training([], elbo, look, False, why, 0, 0, early=look), "eager", {}, look=look
    )


@torch.no_grad()
def _assessed(
    name: str, flow: Flow, density: LogDensity, training: Training, evaluation: str, trained: dict[str, Any],
    *, look: bool = True,
) -> Round:  # fmt: skip
    weighing = unweighed(density.dim, training.elbo)
    if look:
        with density.clock.part(stages.WEIGHTS, noted=False):
            # fewer, if these have many coordinates
            weighing = weighed(flow, density, min(JUDGED_DRAWS, max(8000, 4_000_000 // density.dim)))
    stage = Stage(
        name,
        elbo=weighing.elbo,
        steps=len(training.losses),
        k_hat=weighing.k_hat,
        ess_ratio=weighing.share,
        gap=weighing.log_evidence - weighing.elbo if math.isfinite(weighing.elbo) else None,
        converged=training.converged,
        why=training.why,
        skipped=training.skipped,
        falls=training.falls,
        details={"flow": evaluation, "model": density.reason or "recorded"},
        **trained,
    )
    return Round(copy.deepcopy(flow), weighing, training, stage)


def unweighed(dim: int, elbo: float) -> Weighing:
    nothing = torch.full((dim,), torch.nan)
    return Weighing(torch.zeros(1), math.inf, 0.0, elbo, -math.inf, nothing, nothing, 0.0, math.inf, 0)


@torch.no_grad()
def volume_misfit(flow: Flow, density: LogDensity) -> list[str]:
    """Say so where the posterior's density is more uneven than a volume-preserving flow can be.

    Such a flow has the Var[log q] of its base, and the posterior's Var[log p] would have to be the same. If it is much
    larger, draws do not reach where most of the variance is.
    """
    if flow.recipe is None or flow.recipe.builder != "nice":
        return []
    with density.clock.watching():
        z, log_q = flow.draw(LOOKED_AT_DRAWS)
    log_p = density(z)
    weighing = weigh(z, log_p, log_q)
    weights = weighing.log_weights.exp().nan_to_num()
    log_p = torch.where(weights > 0, log_p.double(), 0.0)
    spread = (weights * (log_p - (weights * log_p).sum()).square()).sum()
    base = flow.base_distribution()
    ratio = float(spread / base.log_prob(base.sample((LOOKED_AT_DRAWS,))).var())
    if not ratio >= VAR_LOG_P_RATIO_MOST:
        return []
    times = f"Var[log p] is {ratio:.1f} times that of the base"
    return [f"{times}, so NICE, which preserves volume, cannot fit: use realnvp"]
