"""Flows without training: affine images of a Student-t, independent coordinates by tables, and grids of one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import Component, FlowMixture
from pyro_flows.flows.recipe import affine_of, build, of_mixtures
from pyro_flows.transforms import Bijection, DiagonalAffine, LowerTriangularAffine
from pyro_flows.transforms.sliced import Sliced
from pyro_flows.transforms.splines import MarginalSpline

CLOSE = 2e-5  # in the base: values of a table that are closer make no knot
DEEP = 16.0  # nats below the top, up to which knots follow the log density
BINS, BOUND = 128, 12.0  # of the spline of a grid's table, in the base
FAR, FINE = 40.0, 20_001  # how far the base of a grid is tabulated, and by how many values


@of_mixtures
def location_scale(dim: int, *, base: str = "student_t", df: float = 15.0, diagonal: bool = False) -> Flow:
    """Return an affine image of the base, :math:`z = m + L x`, at the identity; both ways cost O(D^2) a point.

    With ``diagonal``, L is a diagonal matrix, at O(D) a point.
    """
    map_ = DiagonalAffine(dim) if diagonal else LowerTriangularAffine(dim)
    return build([map_], base, df, builder="location_scale", dim=dim, diagonal=diagonal)


def affine_base_of(flow: Flow) -> Flow:
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
    flow = marginals(values.shape[0], bins=bins, bound=bound).double()
    (spline,) = (part for part in flow.modules() if isinstance(part, MarginalSpline))
    (affine,) = (part for part in flow.modules() if isinstance(part, DiagonalAffine))
    for number in range(len(values)):
        found = knots(values[number], log_density[number], LOGISTIC, bins=bins, bound=bound)
        spline.at[number], affine.loc[number], affine.scale[number] = found
    return flow


class Base(NamedTuple):
    """A base of one coordinate: its value with so much of the mass below and above, and its log density."""

    value: Callable[[Tensor, Tensor], Tensor]
    log_prob: Callable[[Tensor], Tensor]


LOGISTIC = Base(
    lambda below, above: below.log() - above.log(), lambda x: -x.abs() - 2.0 * torch.log1p((-x.abs()).exp())
)


def knots(values: Tensor, log_density: Tensor, base: Base, *, bins: int, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the knots (3, K + 1) of a spline from a base to a table of one coordinate, and its middle and scale.

    Raises:
        ValueError: for a table that is too coarse for so many bins.
    """
    latent = _latent(values, log_density, base)
    x, y, log_p = _knots((latent, values, log_density), base, bins, bound)
    middle, half = 0.5 * (y[0] + y[-1]), 0.5 * (y[-1] - y[0]) / bound
    slopes = (base.log_prob(x) - log_p).exp() / half
    return torch.stack([x, (y - middle) / half, slopes]), middle, half


def _latent(values: Tensor, log_density: Tensor, base: Base) -> Tensor:
    """Return the base's value (G,) with the same distribution function."""
    weight = (log_density - log_density.max()).exp()
    mass = 0.5 * values.diff() * (weight[1:] + weight[:-1])
    mass = mass / mass.sum()
    none = torch.zeros_like(mass[:1])
    return base.value(torch.cat([none, mass.cumsum(0)]), torch.cat([mass.flip(0).cumsum(0).flip(0), none]))


def _knots(table: tuple[Tensor, Tensor, Tensor], base: Base, bins: int, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the knots of one coordinate (K + 1,): places, values and log densities."""
    usable = torch.isfinite(table[0]) & torch.isfinite(table[2])
    table = table[0][usable], table[1][usable], table[2][usable]
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
        x[end], y[end], log_p[end] = _end(table, base, place, x[end], y[end], log_p[end])
    return x, y, log_p


def _end(
    table: tuple[Tensor, Tensor, Tensor], base: Base, place: float, x: Tensor, y: Tensor, log_p: Tensor
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
    slope = (base.log_prob(x) - log_p).exp()
    return place, y + (place - x) * slope, log_p


# the marginal of one coordinate by a table, all others by a normal distribution for each value of it ------------------


@of_mixtures
def sliced(
    dim: int, *, coordinate: int = 0, slices: int = 3, bins: int = BINS, bound: float = BOUND, layers: int = 1,
    base: str = "student_t", df: float = 30.0,
) -> Flow:  # fmt: skip
    """Return an affine map of each coordinate, then slices along one of them; at the identity.

    ``layers`` is there for what reads a recipe; there is one.
    """
    options = {"coordinate": coordinate, "slices": slices, "bins": bins, "bound": bound}
    stack = [DiagonalAffine(dim), Sliced(dim, coordinate=coordinate, slices=slices, bins=bins, bound=bound)]
    return build(stack, base, df, builder="sliced", dim=dim, layers=layers, **options)


@torch.no_grad()
def of_grid(
    coordinate: int, table: tuple[Tensor, Tensor], places: Tensor, tops: Tensor, roots: Tensor, *, df: float
) -> Flow:  # fmt: skip
    """Return the flow of slices.

    Args:
        coordinate: k, that the slices are along.
        table: values of coordinate k (G,), rising, and normalized log densities there (G,).
        places: of the slices along k (N,).
        tops: of the density over all other coordinates (N, D).
        roots: lower triangular roots (N, D, D) of their covariances there, a one at coordinate k.
        df: degrees of freedom of the base.

    Raises:
        ValueError: for a table that is too coarse.
    """
    flow = sliced(tops.shape[1], coordinate=coordinate, slices=len(places), df=df).to(places.device, torch.float64)
    (map_,) = (layer for layer in flow.modules() if isinstance(layer, Sliced))
    tops = tops.double().clone()
    tops[:, coordinate] = 0.0
    map_.set(places.double(), tops, roots.double(), knots(*table, _student(df), bins=BINS, bound=BOUND))
    return flow


def _student(df: float) -> Base:
    """Return the Student-t distribution as a base of tables, its lower half tabulated itself."""
    student = torch.distributions.StudentT(torch.tensor(df, dtype=torch.float64))
    x = torch.linspace(-FAR, 0.0, FINE, dtype=torch.float64)
    density = student.log_prob(x).exp()
    log_below = (0.5 * (density[1:] + density[:-1]) * x.diff()).cumsum(0).log()

    def quantile(below: Tensor) -> Tensor:
        log_p = below.cpu().log()
        number = torch.searchsorted(log_below, log_p).clamp(1, len(log_below) - 1)
        share = (log_p - log_below[number - 1]) / (log_below[number] - log_below[number - 1])
        found = x[number] + share * (x[number + 1] - x[number])
        return torch.where(log_p > log_below[0], found, -torch.inf).to(below)

    def value(below: Tensor, above: Tensor) -> Tensor:
        return torch.where(below < 0.5, quantile(below), -quantile(above))

    return Base(value, lambda x: student.log_prob(x.cpu().double()).to(x))
