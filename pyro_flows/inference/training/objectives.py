"""Losses of flow VI as functions of (flow, density, number of draws)."""

from __future__ import annotations

import math
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flows.flows import bases
from pyro_flows.flows.flow import Flow
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support import checks

WIDE_DF = 3.0
WIDE_SCALE = 3.0
STEEP = 1e3  # times the median length of a direction: no draw pulls harder


class Loss(NamedTuple):
    """A loss to call ``backward`` on, and without a graph the terms of a bound and the draws' log weights.

    The mean of the terms (nats), one for each draw or group of draws, estimates the bound; those that are not finite
    are left out. The log importance weights have the shape (S,).

    >>> import torch
    >>> found = Loss(torch.tensor(2.0), torch.tensor([-1.0, -3.0]), torch.zeros(2))
    >>> found.terms.mean() == -found.loss
    tensor(True)
    """

    loss: Tensor
    terms: Tensor
    log_weights: Tensor


def path(
    flow: Flow, density: LogDensity, draws: int, *, forward: float = 0.0, defensive: float = 0.0, beta: float = 1.0
) -> Loss:
    r"""Negative ELBO with the path gradient ("sticking the landing"), or a blend of it with the forward divergence.

    .. math:: \nabla_\theta = -\sum_i c_i \big(\nabla_z \log \tilde p(z_i) - \nabla_z \log q_\theta(z_i)\big)^\top
              \partial_\theta z_\theta(\epsilon_i), \qquad
              c_i = \frac{1 - f}{S} \frac{q_0(\epsilon_i)}{m(\epsilon_i)} + f\, \tilde w_i (1 - \tilde w_i)

    With f = 0 this is the ELBO's gradient without its score term, which has mean zero but not variance zero. With f = 1
    it is the doubly reparametrized gradient of KL(p || q), :math:`\tilde w` the self-normalized importance weights:
    it pulls mass to where q has too little, which the ELBO hardly feels. Both are exactly zero for every draw at q = p.
    The score of q comes along with the forward pass. Draws where p, q or a gradient is not finite count as zero, and a
    difference of gradients a thousand times as long as the median one is shortened to that.
    The loss's *value* is meaningless: read ``terms``, in nats.

    Args:
        flow: the flow q.
        density: the unnormalized log density of p.
        draws: S; the cost is as many gradients of the density.
        forward: the share f of the forward divergence.
        defensive: share of draws that have one base coordinate, picked at random, from a distribution three times as
            wide (Student-t with 3 degrees of freedom); m is the mixture's density. Draws of q alone say nothing about
            a tail that q lacks. With 0, m is :math:`q_0`, the base.
        beta: below 1, the target is the tempered density :math:`\tilde p^\beta` (annealing, for several modes).

    References: Hesterberg 1995 (defensive mixtures, doi:10.1080/00401706.1995.10484303); Rezende and Mohamed 2015
    (annealing, arXiv 1505.05770); Roeder, Wu and Duvenaud 2017 (arXiv 1703.09194); Tucker et al. 2019 (DReG, arXiv
    1810.04152); Vaitl et al. 2022 (arXiv 2207.08219) and 2024 (arXiv 2403.15881).

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> density = pf.LogDensity(lambda: pyro.sample("x", dist.Normal(torch.tensor(1.0), 2.0)))
    >>> path(pf.planar(1, layers=2), density, 64).terms.shape
    torch.Size([64])
    """
    x, log_importance_ratio = BasePoints(flow)(draws, defensive)
    z, log_q, score_q = flow.sample_with_score(at=x)
    log_p, score_p = density.value_and_grad(z)
    pull, terms, log_weights = pulled(log_p, score_p, log_q, score_q, log_importance_ratio, forward=forward, beta=beta)
    return Loss((pull * z).sum(), terms, log_weights)


def pulled(
    log_p: Tensor, score_p: Tensor, log_q: Tensor, score_q: Tensor, log_importance_ratio: Tensor,
    *, forward: float | Tensor = 0.0, beta: float = 1.0, steep: float = STEEP,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what :func:`path`'s loss pulls each draw with, its derivative along z (S, D); the terms and log weights.

    Args:
        log_p: of the draws (S,).
        score_p: its gradient along z (S, D).
        log_q: the flow's log density (S,).
        score_q: its gradient along z (S, D).
        log_importance_ratio: log of the base's density over that of the mixture which the draws are from (S,); draws
            where it is -inf are left out.
        forward: as in :func:`path`; a tensor in recorded code.
        beta: as in :func:`path`.
        steep: times the median length of a direction: longer ones are shortened to that.

    Cost: O(S D).

    >>> import torch
    >>> zero = torch.zeros(4)
    >>> pull, terms, weights = pulled(zero, torch.ones(4, 2), zero, torch.ones(4, 2), zero)
    >>> pull.abs().max().item(), terms.shape
    (0.0, torch.Size([4]))
    """
    log_ratios, direction, good = _compared(log_p, score_p, log_q, score_q, beta)
    thinning = log_importance_ratio.exp()
    coefficients = (1.0 - forward) / len(log_p) * thinning
    log_weights = log_ratios + log_importance_ratio
    if isinstance(forward, Tensor) or forward > 0.0:
        weights = torch.softmax(torch.where(good, log_weights, -torch.inf), 0)
        coefficients = coefficients + forward * weights * (1.0 - weights)
    terms = torch.where(log_importance_ratio > -torch.inf, _shares(thinning, log_ratios) * log_ratios, torch.nan)
    return _pull(_tamed(direction, good, steep), good, coefficients), terms, log_weights


def _shares(thinning: Tensor, log_ratios: Tensor) -> Tensor:
    """Return the thinning (S,) divided by its mean over the terms that count.

    As it is, it would multiply the level of the ELBO by the mean's noise: a mean of 0.97 makes -970 of -1000 nats.
    """
    counts = torch.isfinite(log_ratios) & (thinning > 0.0)
    return thinning * counts.sum() / torch.where(counts, thinning, 0.0).sum()


def _tamed(direction: Tensor, good: Tensor, steep: float) -> Tensor:
    """Shorten what is far longer than most directions (S, D): one draw in a steep place would drown all others.

    Lengths are those of the largest component, which cannot overflow where the direction does not.
    """
    length = direction.abs().amax(-1)
    limit = steep * torch.where(good, length, torch.nan).nanmedian()
    share = torch.where((length > limit) & (limit > 0.0), limit / length, 1.0)  # where most are zero, none is long
    return direction * share[:, None]


def _compared(
    log_p: Tensor, score_p: Tensor, log_q: Tensor, score_q: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tempered log p less log q (S,), its gradient along z (S, D), and where both are finite (S,)."""
    if beta != 1.0:
        log_p, score_p = beta * log_p, beta * score_p
    log_ratios, direction = log_p - log_q, score_p - score_q
    return log_ratios, direction, torch.isfinite(log_ratios) & torch.isfinite(direction).all(-1)


def _pull(direction: Tensor, good: Tensor, coefficients: Tensor) -> Tensor:
    """Return what a loss pulls each draw with, if ``direction`` weighs as much as ``coefficients`` (S,) say."""
    return torch.where(good[:, None], -direction * coefficients[:, None], 0.0)


class BasePoints:
    r"""Draws of a flow's base, a share of them with one wide coordinate, and their :math:`\log q_0 / m`.

    Making the two distributions costs more than drawing from them, so a loop keeps this.

    Source: Hesterberg 1995 (doi:10.1080/00401706.1995.10484303).

    >>> import torch, pyro_flows as pf
    >>> x, log_importance_ratio = BasePoints(pf.realnvp(2))(8, 0.0)
    >>> x.shape, log_importance_ratio.abs().max().item()
    (torch.Size([8, 2]), 0.0)
    """

    def __init__(self, flow: Flow) -> None:
        self.flow, self.base = flow, flow.base_distribution()
        like = torch.ones_like(self.base.base_dist.mean[0])
        self.wide = dist.StudentT(WIDE_DF * like, 0.0, WIDE_SCALE, validate_args=False)

    @torch.no_grad()
    def __call__(self, draws: int, defensive: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
        """Return points (S, D), and (S,); ``defensive`` is one share for all, or one for each point (S,)."""
        x = self.base.sample(torch.Size((draws,)))
        if not isinstance(defensive, Tensor) and defensive == 0.0:
            return x, x.new_zeros(draws)
        share = defensive[:, None] if isinstance(defensive, Tensor) else defensive
        dim = x.shape[-1]
        widened = torch.arange(dim, device=x.device) == torch.randint(dim, (draws, 1), device=x.device)
        widened = widened & (torch.rand(draws, 1, dtype=x.dtype, device=x.device) < share)
        x = torch.where(widened, self.wide.sample(torch.Size((draws, 1))), x)
        wide = bases.log_density("student_t", x / WIDE_SCALE, WIDE_DF) - math.log(WIDE_SCALE)
        ratios = (wide - bases.log_density(self.flow.base, x, self.flow.df)).exp()
        return x, -torch.log(1.0 - defensive + defensive * ratios.mean(-1))


def importance_weighted(flow: Flow, density: LogDensity, draws: int, *, group: int, beta: float = 1.0) -> Loss:
    r"""Negative importance-weighted bound on the log evidence, over groups of K = ``group`` draws.

    .. math:: \mathcal L_K = \mathbb E \log \frac 1K \sum_{i=1}^K w_i, \qquad
              w_i = \tilde p(z_i) / q_\theta(z_i),

    .. math:: \nabla_\theta \mathcal L_K = \mathbb E \sum_{i=1}^K \tilde w_i^2
              \big(\nabla_z \log \tilde p(z_i) - \nabla_z \log q_\theta(z_i)\big)^\top
              \partial_\theta z_\theta(\epsilon_i).

    :math:`\tilde w` are the weights, normalized within their group. This is the doubly reparametrized gradient: it has
    no score term, its signal does not drown in noise as K grows, and it is exactly zero for every draw at q = p. K = 1
    gives the ELBO and the gradient of :func:`path` but for what that shortens; the bound rises with K towards the log
    evidence. It asks for a q that is good once weighted, which may be wider than p, not for one that is good by
    itself. Draws where p or a gradient is not finite have weight zero. The loss's *value* is meaningless: read
    ``terms``, one for each group, in nats.
    Cost: that of :func:`path`, one pass and ``draws`` gradients of p.

    Args:
        flow: q, with a score (any base but the uniform one).
        density: the target.
        draws: how many in all, a multiple of ``group``.
        group: K, the draws under one logarithm.
        beta: power of the target, as in :func:`path`.

    Raises:
        ValueError: if ``draws`` is not a multiple of ``group``.

    References: Burda, Grosse and Salakhutdinov 2016 (arXiv 1509.00519); Tucker et al. 2019 (arXiv 1810.04152).

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> from pyro_flows.inference.training.objectives import importance_weighted
    >>> density = pf.LogDensity(lambda: pyro.sample("x", dist.Normal(torch.tensor(1.0), 2.0)))
    >>> loss, terms, log_weights = importance_weighted(pf.planar(1, layers=2), density, 64, group=8)
    >>> terms.shape, log_weights.shape
    (torch.Size([8]), torch.Size([64]))
    """
    checks.integer("group", group, 1)
    if checks.integer("draws", draws, 1) % group:
        raise ValueError(f"draws: expected a multiple of group={group}, got {draws}.")
    z, log_q, score_q = flow.sample_with_score((draws,))
    log_p, score_p = density.value_and_grad(z)
    log_ratios, direction, good = _compared(log_p, score_p, log_q, score_q, beta)
    grouped = torch.where(good, log_ratios, -torch.inf).reshape(-1, group)
    weights = torch.nan_to_num(torch.softmax(grouped, 1)).flatten()  # NaN: a group without a finite draw
    terms = torch.logsumexp(grouped, 1) - math.log(group)
    pull = _pull(direction, good, group / draws * weights.square())
    return Loss((pull * z).sum(), terms, log_ratios)


def elbo(flow: Flow, density: LogDensity, draws: int) -> Loss:
    r"""Negative ELBO in nats, :math:`-\frac 1S\sum_i \big(\log \tilde p(z_i) - \log q(z_i)\big)`.

    It has the total gradient, for models with trainable parameters of their own (``train_model=True``): those enter
    :math:`\log \tilde p` directly, which the path gradient does not see.

    Args:
        flow: the flow q.
        density: the unnormalized log density of p.
        draws: their number S. Cost: as many gradients of the density, and one pass of the flow.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> density = pf.LogDensity(lambda: pyro.sample("x", dist.Normal(torch.tensor(1.0), 2.0)))
    >>> elbo(pf.planar(1, layers=2), density, 64).terms.shape
    torch.Size([64])
    """
    z, log_q = flow.rsample_and_log_prob((draws,))
    log_weights = density(z) - log_q
    return Loss(-log_weights.mean(), log_weights.detach(), log_weights.detach())
