"""Flows that cost next to nothing: affine images of a Student-t, for mixtures of many, and independent coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import Component, FlowMixture
from pyro_flows.flows.recipe import affine_of, build, of_mixtures
from pyro_flows.transforms import Bijection, DiagonalAffine, LowerTriangularAffine
from pyro_flows.transforms.marginal import MarginalSpline

CLOSE = 2e-5  # in the base: values of a table that are closer make no knot
DEEP = 16.0  # nats below the top, up to which knots follow the log density


@of_mixtures
def location_scale(dim: int, *, base: str = "student_t", df: float = 15.0, diagonal: bool = False) -> Flow:
    """Return an affine image of the base, :math:`z = m + L x`, at the identity; both ways cost O(D^2) a point.

    With ``diagonal``, L is a diagonal matrix, at O(D) a point.
    """
    map_ = DiagonalAffine(dim) if diagonal else LowerTriangularAffine(dim)
    return build([map_], base, df, builder="location_scale", dim=dim, diagonal=diagonal)


def untrained_twin(flow: Flow) -> Flow:
    """Return the affine map that an untrained flow is: all of its other layers start at the identity, and take time."""
    affine = affine_of(flow)
    if affine is None:
        return flow
    diagonal = not isinstance(affine, LowerTriangularAffine)
    return location_scale(flow.dim, base=flow.base, df=flow.df, diagonal=diagonal).to(affine.loc)


@torch.no_grad()
def student_mixture(loc: Tensor, scale_tril: Tensor, log_weights: Sequence[float], *, df: float) -> FlowMixture:
    r"""Return the mixture of K products of Student-t distributions, each moved by :math:`m_k + L_k x`.

    Args:
        loc: m (K, D).
        scale_tril: L (K, D, D), lower triangular with positive diagonals.
        log_weights: K of them, up to a constant.
        df: degrees of freedom of all.

    >>> import torch
    >>> from pyro_flows.flows.parts import student_mixture
    >>> pair = student_mixture(torch.tensor([[-3.0], [3.0]]), torch.ones(2, 1, 1), [0.0, 0.0], df=15.0)
    >>> z, log_q = pair.draw(5)
    >>> bool(torch.allclose(pair.log_prob(z), log_q))
    True
    """
    flows = []
    for place, scale in zip(loc, scale_tril, strict=True):
        flow = location_scale(loc.shape[1], df=df).to(loc)
        (affine,) = (part for part in flow.modules() if isinstance(part, LowerTriangularAffine))
        affine.loc.copy_(place)
        affine.scale_tril.copy_(scale)
        flows.append(flow)
    return FlowMixture(flows, [Component(number, float(weight)) for number, weight in enumerate(log_weights)])


@of_mixtures
def marginals(
    dim: int, *, layers: int = 1, bins: int = 8, bound: float = 14.0, base: str = "logistic", df: float = 15.0
) -> Flow:
    """Return independent coordinates: a fixed spline of each, and a scale; at the identity.

    ``layers`` is there for what reads a recipe; there is one.
    """
    stack: list[Bijection] = [MarginalSpline(dim, bins=bins, bound=bound), DiagonalAffine(dim)]
    return build(stack, base, df, builder="marginals", dim=dim, layers=layers, bins=bins, bound=bound)


@torch.no_grad()
def tabulated(values: Tensor, log_density: Tensor, *, bins: int = 128, bound: float = 14.0) -> Flow:
    r"""Return the flow of independent coordinates whose densities are given by tables.

    Knots lie where the tabulated distribution function has quantiles of the base, evenly spread over probability, over
    values, and over rises and falls of the log density. Slopes there are :math:`q_0(x) / p(y)`, so that densities are
    exact. The base is logistic: beyond the last knots, at a probability of a millionth, tails are exponential.

    Args:
        values: (D, G), rising.
        log_density: normalized logs of the densities there (D, G).
        bins: of each spline.
        bound: of the base.

    Raises:
        ValueError: for a table that is too coarse for so many bins.
    """
    latent = _latent(values, log_density)
    flow = marginals(values.shape[0], bins=bins, bound=bound).double()
    (spline,) = (part for part in flow.modules() if isinstance(part, MarginalSpline))
    (affine,) = (part for part in flow.modules() if isinstance(part, DiagonalAffine))
    for number in range(len(values)):
        x, y, log_p = _knots(latent[number], values[number], log_density[number], bins, bound)
        middle, half = 0.5 * (y[0] + y[-1]), 0.5 * (y[-1] - y[0]) / bound
        log_base = -x.abs() - 2.0 * torch.log1p((-x.abs()).exp())
        slopes = (log_base - log_p).exp() / half
        spline.at[number] = torch.stack([x, (y - middle) / half, slopes])
        affine.loc[number], affine.scale[number] = middle, half
    return flow


def _latent(values: Tensor, log_density: Tensor) -> Tensor:
    """Return the base's value (D, G) with the same distribution function: the log odds of being below."""
    weight = (log_density - log_density.amax(1, keepdim=True)).exp()
    mass = 0.5 * values.diff(dim=1) * (weight[:, 1:] + weight[:, :-1])
    none = torch.zeros_like(mass[:, :1])
    below, above = torch.cat([none, mass.cumsum(1)], 1), torch.cat([mass.flip(1).cumsum(1).flip(1), none], 1)
    return below.log() - above.log()


def _knots(x: Tensor, y: Tensor, log_p: Tensor, bins: int, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the knots of one coordinate (K + 1,): places, values and log densities."""
    usable = torch.isfinite(x) & torch.isfinite(log_p)
    table = x[usable], y[usable], log_p[usable]
    x, y, log_p = (part[table[0].abs() < bound - CLOSE] for part in table)
    if len(x):
        apart = torch.ones(len(x), dtype=torch.bool, device=x.device)
        cells = ((x - x[0]) / CLOSE).floor()
        apart[1:] = cells[1:] > cells[:-1]
        x, y, log_p = x[apart], y[apart], log_p[apart]
    if len(x) < bins + 1:
        raise ValueError(f"values: expected at least {bins + 1} values apart from each other in a table, got {len(x)}.")
    turns = log_p.clamp_min(log_p.max() - DEEP).diff(prepend=log_p[:1]).abs().cumsum(0)
    ways = [(part - part[0]) / (part[-1] - part[0]).clamp_min(1e-300) for part in (x, y, turns)]
    along = torch.stack(ways).sum(0)
    wanted = torch.linspace(0.0, 3.0, bins + 1, dtype=x.dtype, device=x.device)
    places = torch.arange(bins + 1, device=x.device)
    index = torch.searchsorted(along, wanted).clamp_max(len(x) - 1)
    index = torch.cummax(index - places, 0).values + places
    index = torch.minimum(index, len(x) - 1 - bins + places)
    x, y, log_p = x[index], y[index], log_p[index]
    for end, place in ((0, -bound), (-1, bound)):
        x[end], y[end], log_p[end] = _end(table, place, x[end], y[end], log_p[end])
    return x, y, log_p


def _end(
    table: tuple[Tensor, Tensor, Tensor], place: float, x: Tensor, y: Tensor, log_p: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Return the knot at an end of the spline, between two of the table.

    Where the table ends before it, the distribution function goes on as it runs at the last knot.
    """
    at = int(torch.searchsorted(table[0].contiguous(), place))
    if 0 < at < len(table[0]):
        before, after = table[0][at - 1 : at + 1]
        share = (place - before) / (after - before).clamp_min(1e-300)
        value, height = (torch.lerp(part[at - 1], part[at], share) for part in table[1:])
        return place, value, height
    slope = (-x.abs() - 2.0 * torch.log1p((-x.abs()).exp()) - log_p).exp()
    return place, y + (place - x) * slope, log_p
