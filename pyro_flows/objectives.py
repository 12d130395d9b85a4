"""Losses of flow VI as functions of (flow, density, number of draws)."""

from __future__ import annotations

import math
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flows import _checks
from pyro_flows.flows import Flow
from pyro_flows.log_density import LogDensity

WIDE_DF = 3.0
WIDE_SCALE = 3.0


class Estimate(NamedTuple):
    """A loss to call ``backward`` on, and what goes without a graph: the bound's terms, one for each draw or group of
    draws, whose mean over the finite ones estimates it, and the log importance weights (S,) of the draws.
    """

    loss: Tensor
    terms: Tensor
    log_weights: Tensor


def path(
    flow: Flow, density: LogDensity, draws: int, *, forward: float = 0.0, defensive: float = 0.0, beta: float = 1.0
) -> Estimate:
    r"""Negative ELBO with the path gradient ("sticking the landing"), or a blend of it with the forward divergence.

    .. math:: \nabla_\theta = -\sum_i c_i \big(\nabla_z \log \tilde p(z_i) - \nabla_z \log q_\theta(z_i)\big)^\top
              \partial_\theta z_\theta(\epsilon_i), \qquad
              c_i = \frac{1 - f}{S} \frac{q_0(\epsilon_i)}{m(\epsilon_i)} + f\, \tilde w_i (1 - \tilde w_i)

    With f = 0 this is the ELBO's gradient without its score term, which has mean zero but not variance zero. With f = 1
    it is the doubly reparametrised gradient of KL(p || q), :math:`\tilde w` the self-normalised importance weights:
    it pulls mass to where q has too little, which the ELBO hardly feels. Both are exactly zero for every draw at q = p.
    The score of q comes along with the forward pass. Draws where p or a gradient is not finite count as zero.
    The loss's *value* is meaningless: read ``terms``.

    Args:
        flow: q.
        density: the unnormalised log density of p.
        draws: S; the cost is as many gradients of the density.
        forward: f.
        defensive: share of draws that have one base coordinate, picked at random, from a distribution three times as
            wide (Student-t with 3 degrees of freedom); m is the mixture's density. Draws of q alone say nothing about
            a tail that q lacks. With 0, m is :math:`q_0`, the base.
        beta: below 1, the target is the tempered density :math:`\tilde p^\beta` (annealing, for several modes).

    References: Hesterberg 1995 (defensive mixtures); Rezende and Mohamed 2015 (annealing); Roeder, Wu and Duvenaud
    2017; Tucker et al. 2019 (DReG); Vaitl et al. 2022 and 2024.
    """
    x, log_thinning = _defensive(flow, draws, defensive) if defensive > 0.0 else (None, torch.zeros(draws))
    z, log_ratios, direction, good = _sampled(flow, density, draws, beta, at=x)
    log_thinning = log_thinning.to(log_ratios)
    log_weights = log_ratios + log_thinning
    coefficients = (1.0 - forward) / draws * log_thinning.exp()
    if forward > 0.0:
        weights = torch.softmax(torch.where(good, log_weights, -torch.inf), 0)
        coefficients = coefficients + forward * weights * (1.0 - weights)
    return Estimate(_surrogate(z, direction, good, coefficients), log_thinning.exp() * log_ratios, log_weights)


def importance_weighted(flow: Flow, density: LogDensity, draws: int, *, group: int, beta: float = 1.0) -> Estimate:
    r"""Negative importance-weighted bound on the log evidence, over groups of K = ``group`` draws.

    .. math:: \mathcal L_K = \mathbb E \log \frac 1K \sum_{i=1}^K w_i, \qquad
              w_i = \tilde p(z_i) / q_\theta(z_i), \qquad
              \nabla_\theta \mathcal L_K = \mathbb E \sum_{i=1}^K \tilde w_i^2
              \big(\nabla_z \log \tilde p(z_i) - \nabla_z \log q_\theta(z_i)\big)^\top
              \partial_\theta z_\theta(\epsilon_i)

    :math:`\tilde w` are the weights, normalised within their group. This is the doubly reparametrised gradient: it has
    no score term, its signal does not drown in noise as K grows, and it is exactly zero for every draw at q = p. K = 1
    gives the ELBO and the gradient of :func:`path`; the bound rises with K towards the log evidence. It asks for a q
    that is good once weighted, which may be wider than p, not for one that is good by itself. Draws where p or a
    gradient is not finite have weight zero. The loss's *value* is meaningless: read ``terms``, one for each group.
    Cost: that of :func:`path`, one pass and ``draws`` gradients of p.

    Args:
        flow: q, with a score (any base but the uniform one).
        density: the target.
        draws: how many in all, a multiple of ``group``.
        group: K, the draws under one logarithm.
        beta: power of the target, as in :func:`path`.

    Raises:
        ValueError: if ``draws`` is not a multiple of ``group``.

    References: Burda, Grosse and Salakhutdinov 2016; Tucker et al. 2019.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> from pyro_flows.objectives import importance_weighted
    >>> density = pf.LogDensity(lambda: pyro.sample("x", dist.Normal(torch.tensor(1.0), 2.0)))
    >>> loss, terms, log_weights = importance_weighted(pf.planar(1, layers=2), density, 64, group=8)
    >>> terms.shape, log_weights.shape
    (torch.Size([8]), torch.Size([64]))
    """
    _checks.integer("group", group, 1)
    if _checks.integer("draws", draws, 1) % group:
        raise ValueError(f"draws: expected a multiple of group={group}, got {draws}.")
    z, log_ratios, direction, good = _sampled(flow, density, draws, beta)
    grouped = torch.where(good, log_ratios, -torch.inf).reshape(-1, group)
    weights = torch.nan_to_num(torch.softmax(grouped, 1)).flatten()  # NaN: a group without a finite draw
    terms = torch.logsumexp(grouped, 1) - math.log(group)
    return Estimate(_surrogate(z, direction, good, group / draws * weights.square()), terms, log_ratios)


def _sampled(
    flow: Flow, density: LogDensity, draws: int, beta: float, at: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw; return z with its graph, log p - log q (S,), its gradient along z (S, D), and where all is finite (S,)."""
    z, log_q, score_q = flow.sample_with_score((draws,), at=at)
    log_p, score_p = density.value_and_grad(z)
    if beta != 1.0:
        log_p, score_p = beta * log_p, beta * score_p
    direction = score_p - score_q
    return z, log_p - log_q, direction, torch.isfinite(log_p) & torch.isfinite(direction).all(-1)


def _surrogate(z: Tensor, direction: Tensor, good: Tensor, coefficients: Tensor) -> Tensor:
    """A number whose gradient is that of the loss, through z alone."""
    return -(torch.where(good[:, None], direction * coefficients[:, None], 0.0) * z).sum()


def _defensive(flow: Flow, draws: int, share: float) -> tuple[Tensor, Tensor]:
    """Draw base points (S, D) of which a share has one wide coordinate; return them and log q_0 / m (S,)."""
    base = flow.base_distribution()
    x = base.sample((draws,))
    wide = dist.StudentT(WIDE_DF * torch.ones_like(x[0]), 0.0, WIDE_SCALE, validate_args=False)
    widened = torch.arange(flow.dim, device=x.device) == torch.randint(flow.dim, (draws, 1), device=x.device)
    widened = widened & (torch.rand(draws, 1, dtype=x.dtype, device=x.device) < share)
    x = torch.where(widened, wide.sample((draws,)), x)
    ratios = (wide.log_prob(x) - base.base_dist.log_prob(x)).exp()
    return x, -torch.log(1.0 - share + share * ratios.mean(-1))


def elbo(flow: Flow, density: LogDensity, draws: int) -> Estimate:
    r"""Negative ELBO :math:`-\frac 1S\sum_i \log \tilde p(z_i) - \log q(z_i)`, differentiable in all parameters.

    The total gradient, for models with trainable parameters of their own (``train_model=True``): those enter
    :math:`\log \tilde p` directly, which the path gradient does not see.
    """
    z, log_q = flow.rsample_and_log_prob((draws,))
    log_weights = density(z) - log_q
    return Estimate(-log_weights.mean(), log_weights.detach(), log_weights.detach())
