"""The only door to ArviZ, opened lazily: importing ``pyro_flows`` does not import ArviZ."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def psis(log_weights: Tensor) -> tuple[Tensor, float]:
    """Pareto-smooth importance weights: return normalised log weights (S,) and the shape estimate k-hat.

    Draws with log weight -inf keep weight zero and count as draws. Reference: Vehtari et al. 2024.
    """
    from arviz_stats.base import array_stats

    given = log_weights.detach().double().cpu().numpy()
    floor = np.where(np.isfinite(given), given, -1e300)
    smoothed, k_hat = array_stats.psislw(-(floor - floor.max()))  # the array function takes minus the log weights
    result = torch.as_tensor(np.asarray(smoothed), device=log_weights.device)
    result = torch.where(torch.isfinite(log_weights), result, -torch.inf)
    return result - torch.logsumexp(result, 0), float(k_hat)
