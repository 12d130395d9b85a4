r"""The marginal of the hyperparameters as a flow: adaptive importance sampling, then a fit to known densities.

Student-t distributions are drawn from in turn, and the next one has the moments of all draws so far, weighted by what
all were drawn from. A flow is then fitted to these weighted draws, and to draws of its own. The log density is known at
each of them without noise, up to the constant, so that the fit is a regression too:

.. math:: -\sum_i w_i \log q(\theta_i) + \tfrac12 \sum_i v_i\,\rho(\log p(\theta_i) - \log q(\theta_i) - \log Z),

with v about the roots of the weights w, and a share of it the same at all draws, so that far draws count: weights do
not show where a flow has too much mass, but its own draws do. :math:`\rho` is a square that goes on as a line.
L-BFGS takes a hundred steps where Adam takes thousands.

Reference: Cornuet, Marin, Mira and Robert 2012, "Adaptive multiple importance sampling" (arXiv 0907.1254).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_flows.flows.flow import Flow
from pyro_flows.inference.modes.survey import ROUNDS
from pyro_flows.inference.verdict.deciding import COMPARED_DRAWS, ESTIMATED_DRAWS
from pyro_flows.inference.verdict.psis import psis
from pyro_flows.support.thresholds import (
    DENSITY_GAP_OF_LOST,
    DENSITY_GAP_OF_NOTHING,
    ESS_OF_CHAINS,
    ESS_SHARE_GOOD,
    K_HAT_GOOD,
)

DF = 5.0  # of Student-t distributions that are drawn from in a few dimensions


class Sample(NamedTuple):
    """Draws (S, k), their log densities (S,), normalized weights (S,); and the mean and the root of the covariance."""

    theta: Tensor
    log_p: Tensor
    weights: Tensor
    loc: Tensor
    root: Tensor

    @property
    def effective(self) -> float:
        """The effective number of draws."""
        return float(1.0 / self.weights.square().sum())


@torch.no_grad()
def sampled(log_density: Callable[[Tensor], Tensor], loc: Tensor, root: Tensor) -> Sample | None:
    """Draw from a density of few coordinates, from a place (k,) and a scale (k, k) on; None if it is zero there.

    Cost: 400 densities a round, and 16 rounds at most. Randomness is torch's global one.
    """
    k = len(loc)
    theta, log_p, proposals = loc.new_zeros(0, k), loc.new_zeros(0), list[tuple[Tensor, Tensor]]()
    while True:
        proposals.append((loc, root))
        chi = torch.distributions.Chi2(loc.new_tensor(DF)).sample((2 * COMPARED_DRAWS, 1))
        fresh = loc + (torch.randn(2 * COMPARED_DRAWS, k).to(loc) * (DF / chi).sqrt()) @ root.mT
        theta, log_p = torch.cat([theta, fresh]), torch.cat([log_p, log_density(fresh)])
        if not bool(torch.isfinite(log_p).any()):
            return None
        log_q = torch.logsumexp(torch.stack([_student(theta, *each) for each in proposals]), 0)
        weights = _flattened(log_p - log_q, least=min(10.0 * k, 0.3 * len(theta)))
        loc = weights @ theta
        covariance = ((theta - loc).mT * weights) @ (theta - loc)
        ridge = 1e-10 * covariance.diagonal().clamp_min(1e-300).diag()
        root, fault = torch.linalg.cholesky_ex(covariance + ridge)
        found = Sample(theta, log_p, torch.softmax(log_p - log_q, 0), loc, root)
        if int(fault) or found.effective >= ESS_OF_CHAINS or len(proposals) == ROUNDS:
            return None if int(fault) else found


def _flattened(log_weights: Tensor, least: float) -> Tensor:
    """Return normalized weights, to the largest power with which so many draws are effective."""
    power = 1.0
    weights = torch.softmax(log_weights, 0)
    while float(1.0 / weights.square().sum()) < least and power > 1e-4:
        power *= 0.8
        weights = torch.softmax(power * log_weights, 0)
    return weights


def _student(theta: Tensor, loc: Tensor, root: Tensor) -> Tensor:
    """Return the log density of a Student-t distribution at points (S, k)."""
    k = len(loc)
    x = torch.linalg.solve_triangular(root, (theta - loc).mT, upper=False)
    size = root.diagonal().log().sum() + 0.5 * k * math.log(DF * math.pi)
    constant = math.lgamma(0.5 * (DF + k)) - math.lgamma(0.5 * DF)
    return constant - size - 0.5 * (DF + k) * torch.log1p(x.square().sum(0) / DF)


def fit_flow(
    flow: Flow, parameters: list[nn.Parameter], log_density: Callable[[Tensor], Tensor], sample: Sample
) -> tuple[float, float]:  # fmt: skip
    """Fit parameters of a flow to a density of few coordinates; return the effective share of its draws, and k-hat.

    Cost: 280 passes through the flow at thousands of points, and 4000 densities. Randomness is torch's global one.
    """
    near = sample.log_p > sample.log_p.max() - DENSITY_GAP_OF_LOST
    theta, log_p, weights = sample.theta[near], sample.log_p[near], sample.weights[near]
    weights = weights / weights.sum()
    with torch.no_grad():
        log_mass = float((weights * (log_p - flow.log_prob(theta))).sum())
    best = (-math.inf, 0.0, math.inf, copy.deepcopy(flow.state_dict()))
    for number in range(5):
        _fit(flow, parameters, (theta, log_p - log_mass, weights), steps=60 if number else 100)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
            break
        with torch.no_grad():
            own, log_q = flow.draw(ESTIMATED_DRAWS)
            values = log_density(own)
        ratios = values - log_q
        if not bool(torch.isfinite(ratios).any()):
            break
        smooth, k_hat = psis(ratios)
        share = float(1.0 / smooth.exp().square().sum()) / ESTIMATED_DRAWS
        worth = share - max(0.0, k_hat - K_HAT_GOOD)
        best = max(best, (worth, share, k_hat, copy.deepcopy(flow.state_dict())), key=itemgetter(0))
        if share >= ESS_SHARE_GOOD and k_hat < K_HAT_GOOD:
            break
        log_mass = float(torch.logsumexp(ratios, 0)) - math.log(ESTIMATED_DRAWS)
        usable = torch.isfinite(own).all(1)
        own, values = own[usable], values[usable].clamp_min(log_p.max() - DENSITY_GAP_OF_NOTHING)
        fresh = torch.softmax(ratios[usable], 0)
        effective = 1.0 / weights.square().sum(), 1.0 / fresh.square().sum()
        weights = torch.cat([effective[0] * weights, effective[1] * fresh]) / sum(effective)
        latest = slice(-3 * ESTIMATED_DRAWS, None)  # the draws of three fits
        theta, log_p = torch.cat([theta, own])[latest], torch.cat([log_p, values])[latest]
        weights = weights[latest] / weights[latest].sum()
    flow.load_state_dict(best[3])
    return best[1], best[2]


def _fit(flow: Flow, parameters: list[nn.Parameter], draws: tuple[Tensor, Tensor, Tensor], steps: int) -> None:
    """Take steps of L-BFGS from where the flow is, by draws, log densities and weights."""
    theta, log_p, weights = draws
    roots = weights.sqrt() / weights.sqrt().sum()
    best = torch.optim.LBFGS(parameters, max_iter=steps, history_size=30, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        best.zero_grad()
        log_q = flow.log_prob(theta)
        away = log_p - log_q
        # all draws count alike by 0.3, those that have next to no weight too
        found = -(weights * log_q).sum() + 0.5 * (roots * _bent(away)).sum() + 0.3 * _bent(away).mean()
        found.backward()
        return found

    with torch.enable_grad():
        best.step(loss)


def _bent(x: Tensor) -> Tensor:
    """Return squares, that go on as a line."""
    return torch.where(x.abs() < 1.0, x.square(), 2.0 * x.abs() - 1.0)
