"""Independent runs of one fit: whether they agree, and their mixture if they do not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pyro_flows._mixing import r_hat
from pyro_flows.fitting.rounds import Round
from pyro_flows.flows.flow import Flow
from pyro_flows.model.batching import quiet
from pyro_flows.model.log_density import LogDensity
from pyro_flows.results.stage import Stage
from pyro_flows.verdict.deciding import ESTIMATED_DRAWS, LOOKED_AT_DRAWS
from pyro_flows.verdict.psis import psis
from pyro_flows.verdict.thresholds import EVIDENCE_GAP_OF_RUNS, R_HAT_CONVERGED

NAMED = 3  # coordinates; the verdict counts the others


@dataclass(frozen=True)
class Agreement:
    """Whether runs agree; if not, in which sites, and the weights by which to mix them."""

    disagreements: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def holds(self) -> bool:
        return not self.disagreements


@torch.no_grad()
def compare(outcomes: Sequence[Round], names: Sequence[str]) -> Agreement:
    """Compare runs by rank-normalized R-hat over their draws, coordinate by coordinate, and by their log evidence.

    Weights are proportional to the estimated evidence of each run that has one.
    """
    draws = torch.stack([outcome.flow().sample((LOOKED_AT_DRAWS,)) for outcome in outcomes])
    found = disagreements(dict(zip(names, r_hat(draws).tolist(), strict=True)))
    evidences = torch.tensor([outcome.weighing.log_evidence for outcome in outcomes], dtype=torch.float64)
    spread = float(evidences.max() - evidences.min())
    if not spread <= EVIDENCE_GAP_OF_RUNS:
        found.append(f"log evidences of the runs differ by {spread:.2f} nats")
    weights = torch.softmax(torch.nan_to_num(evidences, nan=-math.inf), 0)
    return Agreement(tuple(found), tuple(weights.tolist()))


def disagreements(r_hats: Mapping[str, float]) -> list[str]:
    """Name the worst coordinates that are above the threshold, and count the others."""
    above = {name: value for name, value in r_hats.items() if not value <= R_HAT_CONVERGED}
    worst = sorted(above, key=lambda name: -math.inf if math.isnan(above[name]) else -above[name])
    found = [f"runs disagree on {name} (R-hat {above[name]:.2f})" for name in worst[:NAMED]]
    others = len(worst) - len(found)
    if others:
        found[-1] += f" and on {others} more coordinate{'s' if others > 1 else ''}"
    return found


@torch.no_grad()
def balanced(flows: Sequence[Flow], density: LogDensity, weights: Sequence[float]) -> list[float]:
    r"""Return mixture weights that bring the mixture of ``flows`` as close to the posterior as they can.

    Evidences tell how much each run covers, but not that several runs cover the same. So the weights :math:`a_k`
    maximize :math:`E_p \log \sum_k a_k q_k`, over importance-weighted draws of all runs, by

    .. math:: a_k \leftarrow \sum_i w_i\, \frac{a_k q_k(z_i)}{\sum_l a_l q_l(z_i)}.

    Cost: 2000 draws of each run, scored by the model and by all runs.

    Reference: Cappé, Douc, Guillin, Marin and Robert 2008, "Adaptive importance sampling in general mixture classes"
    (arXiv 0710.4242).
    """
    z = torch.cat([flow().sample((ESTIMATED_DRAWS,)) for flow in flows])
    with quiet():  # draws that overflow have no density
        log_q = torch.stack([flow.log_prob(z) for flow in flows]).double().nan_to_num(nan=-torch.inf)
    ratios = density(z).double() - (torch.logsumexp(log_q, 0) - math.log(len(flows)))
    ratios = torch.where(torch.isfinite(ratios), ratios, -torch.inf)
    found = torch.tensor(weights, dtype=torch.float64, device=z.device)
    if not bool(torch.isfinite(ratios).any()):
        return found.tolist()
    draws = psis(ratios)[0].exp()
    for _ in range(200):
        shares = torch.softmax(found.log()[:, None] + log_q, 0).nan_to_num(nan=0.0)
        found = shares @ draws
        found = found / found.sum()
    return found.tolist()


def stage(agreement: Agreement, weights: Sequence[float]) -> Stage:
    """Return the history's entry on the comparison, with the weights of the runs in the mixture."""
    said = {"agree": agreement.holds, "disagreements": list(agreement.disagreements), "weights": list(weights)}
    return Stage("comparison of runs", details=said)
