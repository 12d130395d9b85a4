"""Control variates of a flow's draws: functions of its base whose expectations are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow

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


def explained(influence: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Regress what each draw adds to estimates (S, N) on controls (S, K).

    Returns the parts of the estimates' errors (N,) that the controls' own means explain, to be taken off, and the
    residuals (S, N).
    """
    centered = given - given.mean(0)
    slopes = torch.linalg.lstsq(centered, influence - influence.mean(0)).solution
    return given.sum(0) @ slopes, influence - centered @ slopes
