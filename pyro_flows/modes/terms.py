r"""Sums of terms inside of a log density, as mixtures have them: each term is a density that can be climbed by itself.

Where a model computes :math:`\log \sum_k e^{a_k(z)}` (``torch.logsumexp`` and ``torch.logaddexp``; a
``MixtureSameFamily``; a discrete latent that is summed out), the modes of the whole are near those of the density with
one term in the place of the sum. In 100 dimensions the wide terms of a mixture rule nearly everywhere: no climb from
afar comes to a narrow one. A climb of its own term leads there from anywhere.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.model.batching import quiet, where_possible
from pyro_flows.model.faults import Undefined
from pyro_flows.model.gradients import hessians, values_and_grads
from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.sums import MOST_TERMS, Counting, Taking
from pyro_flows.modes.units import SAME, unit_of_modes, units_of
from pyro_flows.starts.climb import TICKS, climb
from pyro_flows.starts.curvature import differences, inverse_roots_of, lower_triangular

SUMS, FEW = 16, 2  # at most, and with several results: with more, a model sums over paths, as those of Markov chains do


class Terms:
    """A log density whose points (S, D + 1) say in their last number which branch they are in.

    Branches are rows (B, 1 + M): the number of a sum, and for each of its M results the term that is taken. There are
    none where the density has no sum of few terms, or is not batched.
    """

    def __init__(self, density: LogDensity, z: Tensor) -> None:
        self.density, self.dim = density, density.dim + 1
        self.numbers, self.written = density.numbers, density.written
        found = Counting()
        if density.batched:
            try:
                with quiet(), found:
                    density.single(z[0])
            except Undefined:  # no sum is known there
                found.sizes.clear()
        sums = [(number, size) for number, size in enumerate(found.sizes) if 1 < size[1] ** size[0] <= MOST_TERMS]
        sums = [(number, size) for number, size in sums if len(sums) <= SUMS and (size[0] == 1 or len(sums) <= FEW)]
        rows = [
            [number, *chosen] for number, (results, terms) in sums for chosen in product(range(terms), repeat=results)
        ]
        width = max((len(row) for row in rows), default=1)
        self._sums = frozenset(number for number, _ in sums)
        filled = [row + [0] * (width - len(row)) for row in rows[: 2 * MOST_TERMS]]  # densities in all
        self.branches = torch.tensor(filled, dtype=torch.long, device=z.device).reshape(-1, width)

    def value_and_grad(self, z: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return the log densities (S,) of the branches, and their gradients (S, D + 1)."""
        with quiet():
            found = where_possible(lambda part: values_and_grads(self._value, part), z, (), (self.dim,))
        return found[0], found[1]

    def hessians(self, points: Tensor) -> Tensor:
        """Return the second derivatives (S, D, D) by the model's own coordinates."""
        try:
            with quiet():
                return hessians(self._value, points)[:, :-1, :-1]
        except RuntimeError:
            own = torch.arange(self.dim - 1, device=points.device)
            return torch.stack([differences(self, point, own)[:, :-1] for point in points])

    def _value(self, point: Tensor) -> Tensor:
        number = point[-1:].detach().nan_to_num(nan=0.0).clamp(0, len(self.branches) - 1)  # a lost climb has none
        branch = self.branches.index_select(0, number.round().long())[0]
        with Taking(branch, self._sums):
            return self.density.single(point[:-1])


class TopsOfTerms(NamedTuple):
    """Points (N, D) where terms are highest, roots L (N, D, D) of their Laplace covariances, log masses (N,)."""

    places: Tensor
    roots: Tensor
    evidence: Tensor
    edges: Tensor  # (M, D): where terms without a top are highest, as the lesser of two, to climb the whole from


@torch.no_grad()
def tops_of_terms(density: LogDensity, z: Tensor, rows: int) -> TopsOfTerms:
    """Climb from draws z (S, D) the densities that have one term in the place of a sum; return normals where it ends.

    Cost: that of :func:`places_of_terms`, and a Hessian for each of the highest ends, at most so many ``rows`` of these
    in all.
    """
    terms, points, edges = _climbed(density, z)
    points = points[: max(1, rows // density.dim)]
    if not len(points):
        return TopsOfTerms(z[:0], z[:0, :, None].expand(-1, -1, density.dim), z[:0, 0], edges)
    roots = lower_triangular(inverse_roots_of(terms.hessians(points))[0])
    size = roots.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * density.dim * math.log(2.0 * math.pi)
    return _distinct(TopsOfTerms(points[:, :-1], roots, terms.value_and_grad(points)[0] + size, edges))


@torch.no_grad()
def places_of_terms(density: LogDensity, z: Tensor) -> Tensor:
    """Return where the paths of :func:`tops_of_terms` end (N, D), the highest first, one for each term.

    A term that is above the whole somewhere is none of a sum of densities, as where weights are normalized. Cost: one
    evaluation to find the sums; then up to 100 gradients, without a recorded graph, for each of three paths a term.
    """
    _, tops, edges = _climbed(density, z)
    return torch.cat([tops[:, :-1], edges])


def _climbed(density: LogDensity, z: Tensor) -> tuple[Terms, Tensor, Tensor]:
    """Return the terms, points (N, D + 1) at their tops, the highest first, and where those without one end (M, D)."""
    terms = Terms(density, z)
    count, starts = len(terms.branches), z[:3]
    which = torch.arange(count, device=z.device).repeat_interleave(len(starts)).to(z)
    points = torch.cat([starts.repeat(count, 1), which[:, None]], 1)
    if not count:
        return terms, points, z[:0]
    units = torch.cat([units_of(z, full=False), z.new_ones(1)]).expand(points.shape)
    ends = climb(terms, points, units, ticks=TICKS)
    heights = torch.where(ends.settled, ends.heights, -torch.inf).reshape(count, -1)
    best = heights.argmax(1) + len(starts) * torch.arange(count, device=z.device)
    points, heights = ends.points[best], heights.amax(1)
    topless = ~torch.isfinite(heights).repeat_interleave(len(starts)) & torch.isfinite(ends.heights)
    below = heights <= density(points[:, :-1]) + 1e-4 * (1.0 + heights.abs())  # but for rounding in single precision
    order = heights.argsort(descending=True)
    return terms, points[order[(below & torch.isfinite(heights))[order]]], ends.points[topless, :-1]


def _distinct(tops: TopsOfTerms) -> TopsOfTerms:
    """Return the normals that differ in place, or by 0.3 in the log of the width, from those with more mass."""
    kept: list[int] = []
    widths = tops.roots.diagonal(dim1=-2, dim2=-1).log().mean(-1)
    for number in tops.evidence.argsort(descending=True).tolist():
        away = tops.places[number] - tops.places[kept]
        x = torch.linalg.solve_triangular(tops.roots[kept], away[..., None], upper=False)[..., 0]
        near = x.norm(dim=-1) < SAME * unit_of_modes(x.shape[-1])
        if not bool((near & ((widths[kept] - widths[number]).abs() < 0.3)).any()):
            kept.append(number)
    return TopsOfTerms(tops.places[kept], tops.roots[kept], tops.evidence[kept], tops.edges)
