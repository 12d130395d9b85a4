"""Adam with clipping, as a function from values to values, so that it can be part of a recorded step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
CLIP = 5.0
KEPT = 0.95  # of a running mean, at each step


class Moments(NamedTuple):
    """What an optimizer knows besides the weights (W,): running means of the gradient and its square (W,), and scalars.

    ``counted`` is how many gradients were finite, ``norm`` the running norm of them, ``ess`` the running share of a
    batch that is effective, ``skipped`` how many gradients were not finite. Of several flows, all have one axis more.
    """

    mean: Tensor
    square: Tensor
    counted: Tensor
    norm: Tensor
    ess: Tensor
    skipped: Tensor

    @classmethod
    def fresh(cls, weights: Tensor) -> Moments:
        """Return those before the first step."""
        zero = weights.new_zeros(weights.shape[:-1])
        skipped = torch.zeros_like(zero, dtype=torch.long)
        return cls(torch.zeros_like(weights), torch.zeros_like(weights), zero, zero.clone(), zero.clone(), skipped)

    def forget(self) -> Moments:
        """Return fresh moments of the gradient, the rest as it is."""
        return Moments.fresh(self.mean)._replace(ess=self.ess, skipped=self.skipped)


def update(weights: Tensor, moments: Moments, gradient: Tensor, rate: float | Tensor) -> tuple[Tensor, Moments]:
    """Return the weights and moments after one step of Adam.

    The gradient is clipped at five times its running norm; one that is not finite changes nothing and is counted.
    """
    norm = torch.linalg.vector_norm(gradient)
    good = torch.isfinite(norm)
    smooth = KEPT * moments.norm + (1.0 - KEPT) * torch.minimum(norm, CLIP * moments.norm)
    running = torch.where(good, torch.where(moments.norm == 0.0, norm, smooth), moments.norm)
    share = torch.where(norm > 0.0, torch.clamp(CLIP * running / norm, max=1.0), 1.0)
    gradient = torch.where(good, gradient * share, 0.0)
    moved = good.to(weights.dtype)
    mean = torch.lerp(moments.mean, gradient, (1.0 - BETAS[0]) * moved)
    square = torch.lerp(moments.square, gradient.square(), (1.0 - BETAS[1]) * moved)
    counted = moments.counted + moved
    mean_share, square_share = (1.0 - beta ** counted.clamp(min=1.0) for beta in BETAS)  # 0 if all so far were bad
    size = torch.where(good, rate / mean_share, 0.0)
    weights = torch.addcdiv(weights, mean * -size, (square / square_share).sqrt() + 1e-8)
    skipped = moments.skipped + torch.logical_not(good)
    return weights, Moments(mean, square, counted, running, moments.ess, skipped)


def watch(moments: Moments, terms: Tensor, log_weights: Tensor) -> tuple[Tensor, Moments]:
    """Return the loss, less the mean of the terms that are finite, and moments that have seen this batch's weights."""
    finite = torch.isfinite(terms)
    mean = torch.where(finite, terms, 0.0).sum() / finite.sum()
    loss = torch.where(finite.any(), -mean, torch.inf)
    weights = torch.softmax(torch.nan_to_num(log_weights, nan=-torch.inf, neginf=-torch.inf), 0)
    share = torch.nan_to_num(1.0 / (weights.square().sum() * len(terms)))
    return loss, moments._replace(ess=KEPT * moments.ess + (1.0 - KEPT) * share)


def advance(
    weights: Tensor, moments: Moments, gradient: Tensor, terms: Tensor, log_weights: Tensor, rate: float | Tensor
) -> tuple[Tensor, Tensor, Moments]:
    """Return the loss, and the weights and moments after a step: :func:`watch`, then :func:`update`."""
    loss, moments = watch(moments, terms, log_weights)
    return loss, *update(weights, moments, gradient, rate)
