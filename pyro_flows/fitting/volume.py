"""Whether a flow that preserves volume can fit a posterior at all."""

from __future__ import annotations

import torch

from pyro_flows.flows.flow import Flow
from pyro_flows.model.log_density import LogDensity
from pyro_flows.verdict.thresholds import VAR_LOG_P_RATIO, VAR_LOG_P_RATIO_MOST
from pyro_flows.verdict.weighing import weigh

UNEVEN_DRAWS = 4000


@torch.no_grad()
def too_uneven(flow: Flow, density: LogDensity) -> tuple[list[str], list[str]]:
    """Say so where the posterior's density is more uneven than a volume-preserving flow can be.

    Such a flow hands on the base's Var[log q], which the posterior's Var[log p] has to equal. A little more is a
    warning, much more a failure: draws of such a flow do not come to where most of the variance is. Returns both kinds.
    """
    if flow.recipe is None or flow.recipe.builder != "nice":
        return [], []
    with density.clock.watching():
        z, log_q = flow.draw(UNEVEN_DRAWS)
    log_p = density(z)
    weighing = weigh(z, log_p, log_q)
    weights = weighing.log_weights.exp().nan_to_num()
    log_p = torch.where(weights > 0, log_p.double(), 0.0)
    spread = (weights * (log_p - (weights * log_p).sum()).square()).sum()
    base = flow.base_distribution()
    ratio = float(spread / base.log_prob(base.sample((UNEVEN_DRAWS,))).var())
    if not ratio > VAR_LOG_P_RATIO:
        return [], []
    said = [
        f"Var[log p] is {ratio:.1f} times that of the base, so NICE, which preserves volume, cannot fit: use realnvp"
    ]
    return (said, []) if ratio < VAR_LOG_P_RATIO_MOST else ([], said)
