"""Control variates of a flow's draws: functions of its base whose expectations are known."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows import _arviz
from pyro_flows.flows.flow import Flow
from pyro_flows.model.log_density import LogDensity

JUMP = 4.0  # standard errors
SMALLEST = 1e-3  # of one less a leverage
DRAWS_EACH = 20  # for each control, so that the regression on them costs less than it saves
MOST_NUMBERS = 20_000_000  # in one array of products of coordinates, log likelihoods or draws: 160 MB
DEPENDENT = 1e-10  # eigenvalue of the controls' correlations, below which one of them tells what the others do


@torch.no_grad()
def controls(flow: object, z: Tensor) -> Tensor | None:
    r"""Return functions (S, K) of draws z (S, D) of a flow with expectation zero; None for what is no single flow.

    They are :math:`s_i`, :math:`s_i^2 - \text{E} s^2` and :math:`s_i s_j` of a bounded, odd function s of each base
    coordinate; the products only as far as there are draws for them, and within a bound on memory. With them, the error
    of a mean loses the part that a quadratic function of the base explains.

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
    if min(most, MOST_NUMBERS // count) >= dim * (dim + 3) // 2:
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


class Regression:
    """What controls (S, K) explain of what draws add to estimates, each half of the draws (S,) by itself."""

    def __init__(self, columns: Tensor | None, half: Tensor) -> None:
        self.shifts: Tensor | None = None
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, an orthogonal basis, one less leverages
        if columns is None:
            return
        self.shifts = columns.new_zeros(len(columns))
        for rows in (half, ~half):
            basis, means = _basis(columns[rows])
            self.shifts[rows] = basis @ means
            self.parts.append((rows, basis, (1.0 - basis.square().sum(1)).clamp_min(SMALLEST)))

    def shift(self, influence: Tensor) -> Tensor:
        """Return the part of the errors of estimates (N,), of influence (S, N), that the controls' means explain."""
        return influence.new_zeros(influence.shape[1:]) if self.shifts is None else self.shifts @ influence

    def rest(self, influence: Tensor) -> Tensor:
        """Return what controls leave of the influence of draws (S,) on an estimate.

        Residuals are as if each draw had been left out of the regression: others would be too small.
        """
        left = influence.clone()
        for rows, basis, free in self.parts:
            part = influence[rows]
            left[rows] = (part - basis @ (basis.mT @ (part - part.mean(0)))) / free
        return left


def _basis(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthogonal basis (S, R) of centered columns (S, K), which are overwritten, and S means in it (R,)."""
    means = columns.mean(0)
    columns -= means
    scale = columns.norm(dim=0).clamp_min(torch.finfo(columns.dtype).tiny)
    columns /= scale
    values, vectors = torch.linalg.eigh(columns.mT @ columns)
    kept = values > DEPENDENT * values[-1]
    root = vectors[:, kept] / values[kept].sqrt()
    return columns @ root, root.mT @ (len(columns) * means / scale)
