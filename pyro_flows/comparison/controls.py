"""Control variates of a flow's draws: functions of its base whose expectations are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_flows import _arviz
from pyro_flows.flows.flow import Flow
from pyro_flows.model.log_density import LogDensity

JUMP = 4.0  # standard errors
SMALLEST = 1e-3  # of one less a leverage
DRAWS_EACH = 20  # for each control, so that the regression on them costs less than it saves


@torch.no_grad()
def controls(flow: Any, z: Tensor) -> Tensor | None:
    r"""Return functions (S, K) of draws z (S, D) of a flow with expectation zero; None for what is no single flow.

    They are :math:`s_i`, :math:`s_i^2 - \text{E} s^2` and :math:`s_i s_j` of a bounded, odd function s of each base
    coordinate; the products only as far as there are draws for them. With them, the error of a mean loses the part that
    a quadratic function of the base explains.

    Reference: Owen 2013, *Monte Carlo theory, methods and examples*, section 8.9.

    >>> import torch, pyro_flows as pf
    >>> flow = pf.realnvp(2, layers=2)
    >>> controls(flow, flow().sample((1000,))).shape
    torch.Size([1000, 5])
    """
    if not isinstance(flow, Flow):
        return None
    scores, square = _scores(flow, flow.bijection.inverse_and_ladj(z)[0].double())
    count, dim = scores.shape
    most = count // DRAWS_EACH
    if most < dim or not bool(torch.isfinite(scores).all()):
        return None
    columns = [scores]
    if most >= 2 * dim:
        columns.append(scores.square() - square)
    if most >= dim * (dim + 3) // 2:
        first, second = torch.triu_indices(dim, dim, 1, device=scores.device)
        columns.append(scores[:, first] * scores[:, second])
    return torch.cat(columns, 1).cpu()


def _scores(flow: Flow, x: Tensor) -> tuple[Tensor, float]:
    """Return an odd function of base points (S, D), bounded for tails heavier than normal, and its mean square."""
    if flow.base == "student_t":
        return x * (flow.df + x.square()).rsqrt(), 1.0 / (1.0 + flow.df)
    if flow.base == "logistic":
        return torch.tanh(0.5 * x), 1.0 / 3.0
    return x, 1.0 if flow.base == "normal" else 1.0 / 3.0


def of_gradients(density: LogDensity, z: Tensor, chains: int, log_weights: Tensor | None = None) -> Tensor | None:
    r"""Return functions (S, K) of draws z (S, D) of a posterior with expectation zero; None if they may have another.

    They are :math:`\partial_i \log p` and :math:`1 + z_i\, \partial_i \log p`, in standardized coordinates, multiplied
    by the weights of weighted draws. Their expectations are zero where the density is smooth. Where it jumps, they are
    not, so all are refused if the mean of one is more than four of its standard errors from zero.

    Reference: Mira, Solgi and Imparato 2013, "Zero variance Markov chain Monte Carlo" (arXiv 1012.2983).

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> density = pf.LogDensity(lambda: pyro.sample("x", dist.Normal(0.0, 2.0)))
    >>> of_gradients(density, 2.0 * torch.randn(1000, 1), 1).shape
    torch.Size([1000, 2])
    """
    count, dim = z.shape
    if count < 2 * DRAWS_EACH * dim or not density.batched:
        return None
    slopes = density.value_and_grad(z)[1].double().cpu()
    points = z.double().cpu()
    scale = points.std(0)
    slopes = slopes * scale
    columns = torch.cat([slopes, 1.0 + (points - points.mean(0)) / scale * slopes], 1)
    if log_weights is not None:
        columns = columns * (count * torch.softmax(log_weights, 0))[:, None]
    if not bool(torch.isfinite(columns).all()):
        return None
    columns = columns if count >= 4 * DRAWS_EACH * dim else columns[:, :dim]
    each = columns.reshape(chains, -1, columns.shape[1]) if chains > 1 else columns[:, None]
    sizes = [_arviz.effective_draws(each[..., k]) if chains > 1 else count for k in range(columns.shape[1])]
    errors = columns.std(0) / torch.tensor(sizes, dtype=columns.dtype).sqrt()
    return columns if bool((columns.mean(0).abs() <= JUMP * errors).all()) else None


def explained(influence: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Regress what each draw adds to estimates (S, N) on controls (S, K).

    Returns the parts of the estimates' errors (N,) that the controls' own means explain, to be taken off, and the
    residuals (S, N), each as if its draw had been left out of the regression: others would be too small.
    """
    centered = given - given.mean(0)
    orthogonal = torch.linalg.qr(centered)[0]
    leverage = orthogonal.square().sum(1, keepdim=True)
    slopes = torch.linalg.lstsq(centered, influence - influence.mean(0)).solution
    return given.sum(0) @ slopes, (influence - centered @ slopes) / (1.0 - leverage).clamp_min(SMALLEST)
