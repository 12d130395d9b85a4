"""Losses of flow VI as functions of (flow, density, number of draws)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.flows import Flow
from pyro_flows.log_density import LogDensity


class Estimate(NamedTuple):
    """A loss to call ``backward`` on, and the log weights log p - log q (S,) of its draws, without a graph."""

    loss: Tensor
    log_weights: Tensor


def path(flow: Flow, density: LogDensity, draws: int) -> Estimate:
    r"""Negative ELBO with the path gradient ("sticking the landing").

    .. math:: \nabla_\theta = -\mathbb E_\epsilon\big[(\nabla_z \log \tilde p(z) - \nabla_z \log q_\theta(z))^\top
              \partial_\theta z_\theta(\epsilon)\big]

    leaves out the score term of the total gradient, which has mean zero but not variance zero: at q = p this gradient
    is exactly zero for every draw. The score of q comes along with the forward pass (Vaitl et al. 2024). Draws where
    p or a gradient is not finite count as zero gradient. The loss's *value* is meaningless: read ``log_weights``.

    References: Roeder, Wu and Duvenaud 2017; Vaitl, Nicoli, Nakajima and Kessel 2022 and 2024.
    """
    z, log_q, score_q = flow.sample_with_score((draws,))
    log_p, score_p = density.value_and_grad(z)
    direction = score_p - score_q
    good = torch.isfinite(log_p) & torch.isfinite(direction).all(-1)
    direction = torch.where(good[:, None], direction, 0.0)
    return Estimate(-(direction * z).sum() / draws, log_p - log_q)
