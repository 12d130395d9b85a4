"""A value that a guide has drawn, with the guide's log density there, and what of its gradient counts."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions.distribution import Distribution
from torch import Tensor
from torch.distributions import register_kl


class Known(dist.Delta):
    """A point mass at a value, with the log density of the guide that drew it.

    Pyro's KL divergence of a ``Delta`` leaves the log density out, so that ``TraceMeanField_ELBO`` would be wrong
    without a word, by the log derivative of each map to constrained values. That of this class has it.
    """


class Drawn(Known):
    """The same, where the log density is that of the value itself, and none of an auxiliary site's."""


@register_kl(Known, Distribution)
def _kl(q: Known, p: Distribution) -> Tensor:
    """Estimate the divergence by the one value that was drawn."""
    found: Tensor = q.log_density - p.log_prob(q.v)
    return found


def finite_gradients(z: Tensor) -> Tensor:
    """Let draws (*batch, D) of a guide whose gradients are not finite have none: there, the model overflows."""
    if z.requires_grad:
        z.register_hook(lambda gradient: torch.where(gradient.isfinite().all(-1, keepdim=True), gradient, 0.0))
    return z
