r"""Densities of independent coordinates: a product over coordinates, whose factors can be tabulated one by one.

With two wells in each of sixteen coordinates there are 65,536 modes, but sixteen tables describe them all. The gradient
shows whether a density is a product: :math:`\partial_i \log p` changes with coordinate i alone.
Then, for any point c,

.. math:: \log p(z) = \log p(c) + \sum_d \big(\log p(c_{-d}, z_d) - \log p(c)\big).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.inference.starts.curvature import FULL_HESSIAN_UP_TO
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import EVIDENCE_GAP_GOOD_A_DIM

PROBES = 3  # pairs of points between which each coordinate is exchanged
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # of the largest gradient
LINE = 160  # points on each side of a coordinate
VALUES = 12  # of a coordinate, at most, about which points are put
REFINED = 400  # points that each round of refinement adds


class Marginals(NamedTuple):
    """Tables of D coordinates: values (D, G), rising, the log densities there (D, G), and the log evidence of all."""

    values: Tensor
    log_density: Tensor
    log_evidence: float


@torch.no_grad()
def is_separable(density: LogDensity, points: Tensor, *, seed: int, modes: Tensor | None = None) -> bool:
    """Whether the coordinates are independent, by gradients between pairs of points (N, D).

    In each pair every coordinate is exchanged by itself, and half of them together: between two modes that are far
    apart, one coordinate does not tell. Pairs of ``modes`` (K, D) are looked at as well. A dependence that shows at no
    pair is missed; importance weights of whatever is built on this show it. Cost: 3 to 6 times D + 3 gradients.
    """
    dim = density.dim
    if not density.batched or dim > FULL_HESSIAN_UP_TO or len(points) < 2:
        return False
    if dim == 1:
        return True
    with seeded(derive(seed, "pairs of points"), density.device):
        order = torch.randint(len(points), (PROBES, 2), device=points.device)
        halves = torch.rand(2 * PROBES, dim, device=points.device) < 0.5
    pairs = [(points[first], points[second]) for first, second in order.tolist()]
    pairs += [] if modes is None else [(modes[0], mode) for mode in modes[1 : 1 + PROBES]]
    return all(_changes_alone(density, a, b, half) for (a, b), half in zip(pairs, halves, strict=False))


def _changes_alone(density: LogDensity, a: Tensor, b: Tensor, half: Tensor) -> bool:
    """Whether each partial derivative is what it was at the point (D,) that its own coordinate comes from."""
    dim = len(a)
    mixed = a.repeat(dim + 3, 1)
    mixed[:dim].diagonal().copy_(b)
    mixed[dim + 1], mixed[dim + 2] = b, torch.where(half, a, b)
    gradient = density.value_and_grad(mixed)[1].double()
    size = gradient.abs().amax()
    tolerance = TOLERANCE.get(density.dtype, 1e-8) * size
    one = (gradient[:dim] - gradient[dim]).abs() > tolerance
    many = (gradient[dim + 2] - torch.where(half, gradient[dim], gradient[dim + 1])).abs() > tolerance
    changed = bool((one & ~torch.eye(dim, device=a.device).bool()).any()) or bool(many.any())
    return bool(torch.isfinite(size)) and not changed


@torch.no_grad()
def marginals(density: LogDensity, center: Tensor, modes: Tensor, units: Tensor) -> Marginals | None:
    """Tabulate the coordinates of a separable density; None where no table settles.

    ``center`` (D,) is a point of high density. Values reach ten thousand ``units`` (D,) to either side of it, and eight
    to either side of those of modes (K, D).
    """
    height = density(center[None])[0]
    offsets = torch.logspace(-3.0, 4.0, LINE, dtype=torch.float64, device=center.device)
    line = torch.cat([-offsets.flip(0), offsets.new_zeros(1), offsets])
    values = center.double()[:, None] + units.double()[:, None] * line
    near = torch.linspace(-8.0, 8.0, 41, dtype=torch.float64, device=center.device)
    for mode in modes[:VALUES]:
        values = torch.cat([values, mode.double()[:, None] + units.double()[:, None] * near], 1)
    values, found = _tabulated(density, center, values.sort(1).values)
    last = torch.full_like(values[:, 0], torch.nan)
    for _ in range(3):  # rounds of refinement
        extra = _between(values, found)
        new, heights = _tabulated(density, center, extra)
        values, order = torch.cat([values, new], 1).sort(1)
        found = torch.cat([found, heights], 1).gather(1, order)
        top = found.amax(1)  # the integrals (D,) are of piecewise linear densities
        weight = (found - top[:, None]).exp()
        before = last
        last = top + (0.5 * values.diff(dim=1) * (weight[:, 1:] + weight[:, :-1])).sum(1).log()
    if not bool(((last - before).abs() < EVIDENCE_GAP_GOOD_A_DIM).all()):
        return None
    return Marginals(values, found - last[:, None], float(height.double() + (last - height.double()).sum()))


def _tabulated(density: LogDensity, center: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return values (D, G) in the precision of the density, and log densities there, one coordinate at a time."""
    dim, count = values.shape
    values = values.to(center.dtype)
    points = center.expand(dim, count, dim).clone()
    points.diagonal(dim1=0, dim2=2).copy_(values.mT)
    found = torch.cat([density(part.reshape(-1, dim)).reshape(len(part), count) for part in points.split(16)])
    return values.double(), found.double().nan_to_num(nan=-torch.inf, posinf=-torch.inf)


def _between(values: Tensor, found: Tensor) -> Tensor:
    """Return new values (D, 400) inside of the cells that hold the most, half by mass, half by length.

    Cells count where the density is less than 40 nats below the top.
    """
    top = found.amax(1, keepdim=True)
    weight = (found - top).exp()
    width = values.diff(dim=1)
    mass = 0.5 * width * (weight[:, 1:] + weight[:, :-1])
    counts = (torch.maximum(found[:, 1:], found[:, :-1]) > top - 40.0).double()
    mass = mass / mass.sum(1, keepdim=True).clamp_min(1e-300)
    length = width * counts
    length = length / length.sum(1, keepdim=True).clamp_min(1e-300)
    cells = (0.5 * mass + 0.5 * length).cumsum(1)
    places = (torch.arange(REFINED, dtype=torch.float64, device=values.device) + 0.5) / REFINED
    index = torch.searchsorted(cells, (places * cells[:, -1:]).contiguous()).clamp_max(width.shape[1] - 1)
    start = torch.where(index > 0, cells.gather(1, (index - 1).clamp_min(0)), 0.0)
    within = ((places * cells[:, -1:] - start) / (cells.gather(1, index) - start).clamp_min(1e-300)).clamp(0.0, 1.0)
    return (values.gather(1, index) + within * width.gather(1, index)).sort(1).values
