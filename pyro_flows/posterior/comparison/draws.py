"""Draws of a posterior in its verdict's own way: those in hand, or more of the same kind."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.inference.chains.refine import can_go_on, go_on
from pyro_flows.inference.verdict.deciding import POOL
from pyro_flows.inference.verdict.psis import psis
from pyro_flows.inference.verdict.weighing import resample
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support import arviz
from pyro_flows.support.process.seeding import derive, seeded

if TYPE_CHECKING:
    from pyro_flows.inference.record import Record
    from pyro_flows.inference.verdict.chains import McmcDraws

MOST_GRADIENTS = 2_000_000  # for going on with chains
GRADIENT = 3.0  # evaluations


class Draws(NamedTuple):
    """Draws z (S, D); log p / q where they are of q; control variates; numbers that copies of one draw share."""

    z: Tensor
    ratio: Tensor | None
    controls: Tensor | None = None
    copies: Tensor | None = None


def is_of_guide(posterior: Record) -> bool:
    """Whether the draws to use are the guide's own."""
    return posterior.verdict.status == "ok" and not posterior._by_chains


def in_hand(posterior: Record) -> Draws:
    """Return the draws to use."""
    if is_of_guide(posterior):
        ratio = posterior._used_log_p.double().cpu() - posterior._used_log_q.double().cpu()
        return _with_controls(posterior, Draws(posterior._used, ratio))
    copies = torch.unique(posterior._used.cpu(), dim=0, return_inverse=True)[1] if posterior.resampled else None
    return _with_controls(posterior, Draws(posterior._used, None, copies=copies))


def _with_controls(posterior: Record, draws: Draws) -> Draws:
    """Add functions of known expectation: those of the flow's base for its own draws, of gradients for others.

    Resampled draws have none: their errors are those of the weights too, which a regression on the draws does not see.
    """
    found = controls(posterior.flow, draws.z) if draws.ratio is not None else None
    if found is None and draws.copies is None and posterior.density is not None:
        found = of_gradients(posterior.density, draws.z, posterior.chain_count, draws.ratio)
    return draws._replace(controls=found)


def every(posterior: Record, draws: Draws, step: int) -> tuple[Draws, Tensor]:
    """Return one in ``step`` of these draws, of each chain, with controls of their own; and which these are (S,)."""
    each = len(draws.z) // posterior.chain_count
    chosen = torch.arange(len(draws.z)) % each % step == 0
    ratio, copies = (None if part is None else part[chosen] for part in (draws.ratio, draws.copies))
    z = draws.z[chosen.to(draws.z.device)]
    return _with_controls(posterior, Draws(z, ratio, copies=copies)), chosen


def can_draw(posterior: Record) -> bool:
    """Whether there can be more draws of the same kind: not of chains, and not without a guide and a model."""
    return posterior._raw_draws() is not None and not posterior._by_chains


def price(posterior: Record) -> float:
    """Return how many evaluations of the model a further draw costs, its log likelihoods and controls included."""
    if posterior.chains is not None and can_go_on(posterior):
        return 2.0 + GRADIENT * _leaps(posterior.chains)
    return 2.0 if is_of_guide(posterior) else 2.0 + POOL


def _leaps(chains: McmcDraws) -> float:
    """Return how many gradients a kept draw takes."""
    return float(chains.stats["n_steps"].mean()) * int(chains.numbers["thin"])


def most_draws(posterior: Record) -> float:
    """Return how many draws there can be, those in hand included."""
    if can_draw(posterior):
        return math.inf
    if posterior.chains is None or not can_go_on(posterior):
        return len(posterior._used)
    return len(posterior._used) + MOST_GRADIENTS / _leaps(posterior.chains)


def longer(posterior: Record, count: int, *, seed: int) -> Draws | None:
    """Go on with chains until they are ``count`` draws, within a bound on gradients; None if that cannot be done."""
    chains = posterior.chains
    if chains is None or not can_go_on(posterior):
        return None
    each = _leaps(chains) * chains.count
    wanted = int(min((count - len(posterior._used)) / chains.count, MOST_GRADIENTS / each))
    if wanted < 1:
        return None
    new = go_on(posterior, chains, wanted, seed=derive(seed, "leave-one-out"))
    z = torch.cat([posterior._used.unflatten(0, (chains.count, -1)), new], 1)
    return _with_controls(posterior, Draws(z.flatten(0, 1), None))


@torch.no_grad()
def more(posterior: Record, count: int, *, seed: int, purpose: str) -> Draws:
    """Draw anew from the guide; draws that the verdict corrects are resampled from a pool four times as large."""
    draw, density = posterior._raw_draws(), posterior._need_model()
    assert draw is not None  # see `can_draw`
    with seeded(derive(seed, purpose), posterior._used.device):
        z, log_q = draw(count if is_of_guide(posterior) else POOL * count)
        ratio = density(z).double() - log_q.double()
    if is_of_guide(posterior):
        return _with_controls(posterior, Draws(z, ratio.cpu()))
    index = resample(psis(ratio)[0], count, seed=seed)
    copies = torch.unique(index.cpu(), return_inverse=True)[1]  # numbers without gaps, half of which are even
    return _with_controls(posterior, Draws(z[index], None, copies=copies))


# control variates of a flow's draws: functions of its base whose expectations are known -------------------------------

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
    sizes = [arviz.effective_draws(each[..., k]) if chains > 1 else count for k in range(columns.shape[1])]
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
