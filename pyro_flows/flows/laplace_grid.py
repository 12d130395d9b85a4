"""A flow of slices: the marginal of one coordinate by a table, all others by a normal distribution for each value."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.parts import Base, knots
from pyro_flows.flows.recipe import build, of_mixtures
from pyro_flows.transforms import DiagonalAffine
from pyro_flows.transforms.sliced import Sliced

BINS, BOUND = 128, 12.0  # of the table's spline, in the base
FAR, FINE = 40.0, 20_001  # how far the base is tabulated, and by how many values


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
