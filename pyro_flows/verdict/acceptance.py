"""The acceptance test of a candidate: whether its draws are so good that no other method is tried.

There are two levels. A mixture, a table and Gaussian conditionals are accepted if weights correct their draws. A flow
that is or was trained, a Gaussian and a grid are accepted if their draws can be used as they are. This is stricter than
the verdict, since more can be tried. Markov chains have no weights: see :func:`pyro_flows.verdict.mcmc.judge_mcmc`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_flows.verdict.deciding import judge
from pyro_flows.verdict.thresholds import (
    ESS_SHARE_COLLAPSED,
    ESS_SHARE_EVEN,
    ESS_SHARE_GOOD,
    ESS_SHARE_PROMISING,
    EVIDENCE_GAP_GOOD,
    EVIDENCE_GAP_GOOD_A_DIM,
    EVIDENCE_GAP_SMALL_SHARE,
    K_HAT_GOOD,
    K_HAT_MOST,
    SHIFT_SEEN,
    SHIFT_SEEN_ERRORS,
)
from pyro_flows.verdict.weighing import Weighing


def weights_correct(ess_share: float, k_hat: float) -> bool:
    """Say whether importance weights correct draws, by their effective share and k-hat.

    Of nearly even weights, k-hat is that of rounding or of the cells of a table: the threshold of the verdict does.
    """
    limit = K_HAT_MOST if ess_share >= ESS_SHARE_EVEN else K_HAT_GOOD
    return ess_share >= ESS_SHARE_PROMISING and k_hat < limit


def raw_weights(log_ratios: Tensor) -> Tensor | None:
    """Return normalized weights of draws (S,) by log p - log q; None if they collapse, or if no draw has a density."""
    ratios = log_ratios.double()
    weights = torch.softmax(torch.where(torch.isfinite(ratios), ratios, -torch.inf), 0)
    collapse = not float(weights.square().sum()) * len(weights) * ESS_SHARE_COLLAPSED < 1.0  # NaN without a density
    return None if collapse else weights


def nothing_to_gain(weighing: Weighing) -> bool:
    """Say whether draws can be used as they are, and the ELBO is so close to the log evidence that no method gains."""
    gap, ratio = weighing.log_evidence - weighing.elbo, weighing.ess / len(weighing.log_weights)
    most = acceptable_gap(len(weighing.mean_shift))
    small = gap < EVIDENCE_GAP_SMALL_SHARE * most
    slight = ratio > ESS_SHARE_GOOD and small and weighing.k_hat < weighing.threshold
    fine = status_of(weighing) == "ok"
    return fine and (weighing.k_hat < K_HAT_GOOD or slight) and gap < most


def shift_is_noise(weighing: Weighing, *, seen: float = SHIFT_SEEN) -> bool:
    """Say whether there is nothing to gain, and weighting moves no mean, sd or quantile by what a reader would see."""
    shift = max(float(weighing.mean_shift.max()), float(weighing.sd_shift.max()), weighing.quantile_shift or 0.0)
    error = math.sqrt(max(1.0 / weighing.ess - 1.0 / len(weighing.log_weights), 0.0)) if weighing.ess else 0.0
    return nothing_to_gain(weighing) and shift < seen + SHIFT_SEEN_ERRORS * error


def acceptable_gap(dim: int) -> float:
    """Return the gap in nats that leaves nothing to see in means and sds: the same for each dimension."""
    return max(EVIDENCE_GAP_GOOD, EVIDENCE_GAP_GOOD_A_DIM * dim)


def status_of(weighing: Weighing) -> str:
    """Return the verdict on a sample, ``unreliable`` if it is too small."""
    return judge(weighing, [str(i) for i in range(len(weighing.mean_shift))]).status
