"""Several independent runs of one fit: do they agree, and what to make of them if they do not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_flows._arviz import r_hat
from pyro_flows.escalation import Round
from pyro_flows.flows import Flow

COMPARED_DRAWS = 4000
R_HAT = 1.02
NAMED = 3  # coordinates; the verdict counts the others
EVIDENCE = 0.3  # nats between the largest and the smallest estimate
LEAST_WEIGHT = 1e-3


@dataclass(frozen=True)
class Agreement:
    """Whether runs agree; if not, in which sites, and the weights by which to stack them."""

    disagreements: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def holds(self) -> bool:
        """Whether the runs found the same posterior."""
        return not self.disagreements


@torch.no_grad()
def compare(outcomes: Sequence[Round], names: Sequence[str]) -> Agreement:
    """Compare runs by rank-normalised R-hat over their draws, coordinate by coordinate, and by their log evidence.

    Weights are proportional to the estimated evidence of each run that has one.
    """
    draws = torch.stack([outcome.flow().sample((COMPARED_DRAWS,)) for outcome in outcomes])
    found = disagreements(dict(zip(names, r_hat(draws).tolist(), strict=True)))
    evidences = torch.tensor([outcome.weighing.log_evidence for outcome in outcomes], dtype=torch.float64)
    spread = float(evidences.max() - evidences.min())
    if not spread <= EVIDENCE:
        found.append(f"their log evidences differ by {spread:.2f} nats")
    weights = torch.softmax(torch.nan_to_num(evidences, nan=-math.inf), 0)
    return Agreement(tuple(found), tuple(weights.tolist()))


def disagreements(r_hats: Mapping[str, float]) -> list[str]:
    """Name the worst coordinates that are above the limit, and count the others."""
    above = {name: value for name, value in r_hats.items() if not value <= R_HAT}
    worst = sorted(above, key=lambda name: -math.inf if math.isnan(above[name]) else -above[name])
    found = [f"runs disagree on {name} (R-hat {above[name]:.2f})" for name in worst[:NAMED]]
    others = len(worst) - len(found)
    if others:
        found[-1] += f" and on {others} more coordinate{'s' if others > 1 else ''}"
    return found


@dataclass(frozen=True)
class Stack:
    """A mixture of flows: draws from all of them, scored by the mixture."""

    flows: tuple[Flow, ...]
    weights: tuple[float, ...]

    @classmethod
    def make(cls, flows: Sequence[Flow], weights: Sequence[float]) -> Stack:
        """Leave out runs of negligible weight."""
        kept = [(flow, weight) for flow, weight in zip(flows, weights, strict=True) if weight >= LEAST_WEIGHT]
        total = sum(weight for _, weight in kept)
        return cls(tuple(flow for flow, _ in kept), tuple(weight / total for _, weight in kept))

    @torch.no_grad()
    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Return n draws (n, D) in random order and their log density (n,) under the mixture."""
        like = next(self.flows[0].parameters())
        weights = torch.tensor(self.weights, dtype=torch.float64)
        counts = torch.bincount(torch.multinomial(weights, n, replacement=True), minlength=len(self.flows)).tolist()
        z = torch.cat([flow().sample((count,)) for flow, count in zip(self.flows, counts, strict=True)])
        z = z[torch.randperm(n).to(like.device)]
        return z, self.log_prob(z)

    @torch.no_grad()
    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log density (n,) of the mixture at ``z`` (n, D)."""
        terms = [flow.log_prob(z) + math.log(weight) for flow, weight in zip(self.flows, self.weights, strict=True)]
        return torch.logsumexp(torch.stack(terms), 0)


def entry(agreement: Agreement) -> dict[str, Any]:
    """What the history says of the comparison."""
    return {
        "stage": "comparison of runs",
        "agree": agreement.holds,
        "disagreements": list(agreement.disagreements),
        "weights": list(agreement.weights),
    }
