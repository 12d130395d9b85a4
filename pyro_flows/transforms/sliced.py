"""A triangular affine map that changes along one coordinate: slices through a density, each about a normal one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_flows.support import checks
from pyro_flows.transforms.base import Bijection
from pyro_flows.transforms.splines import MarginalSpline, between, smooth_slopes

ROWS = 512  # points that are worked on together, at least,
NUMBERS = 40_000  # and more if they have so few entries of m and L altogether that these stay in the processor's cache


class Sliced(Bijection):
    r"""Map one coordinate by a spline, and all others by an affine map that depends on what comes of it:
    :math:`y_k = a + b\, g(x_k)`, :math:`y_{-k} = m(y_k) + L(y_k)\, x_{-k}`.

    m and the lower triangular L are cubic splines between slices at some places, on the logs of L's diagonal; outside
    of these, they stay what they are at the ends. Nothing is trained. Both ways cost O(D^2) a point, and

    .. math:: \log|J| = \log b\, g'(x_k) + \sum_{d \neq k} \log L_{dd}(y_k).

    Args:
        dim: number of coordinates D.
        coordinate: k.
        slices: their number N.
        bins: of the spline g, see :class:`~pyro_flows.transforms.splines.MarginalSpline`.
        bound: of its base.

    Shapes: ``places`` (N,), ``values`` and ``slopes`` (N, D + D (D + 1) / 2): m, then the lower triangle of L.

    >>> import torch
    >>> from pyro_flows.transforms.sliced import Sliced
    >>> Sliced(3, coordinate=1, slices=3, bins=4, bound=10.0)(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [1.0, 2.0, 3.0]
    """

    places: Tensor
    values: Tensor
    slopes: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self, dim: int, *, coordinate: int, slices: int, bins: int, bound: float) -> None:
        super().__init__()
        self.dim = checks.integer("dim", dim, 1)
        self.coordinate = checks.integer("coordinate", coordinate, 0, dim - 1)
        self.spline = MarginalSpline(1, bins=bins, bound=bound)
        count = dim + dim * (dim + 1) // 2
        places = torch.arange(checks.integer("slices", slices, 3), dtype=torch.get_default_dtype())
        self.register_buffer("places", places)
        self.register_buffer("values", places.new_zeros(slices, count))
        self.register_buffer("slopes", places.new_zeros(slices, count))
        self.register_buffer("loc", places.new_zeros(1))
        self.register_buffer("scale", places.new_ones(1))
        self._rows, self._columns = torch.tril_indices(dim, dim).tolist()

    @torch.no_grad()
    def set(self, places: Tensor, tops: Tensor, roots: Tensor, knots: tuple[Tensor, Tensor, Tensor]) -> Sliced:
        """Take places (N,), m (N, D) and L (N, D, D) there, and knots of g (3, K + 1), a and b. Returns the map.

        m and L are to have a zero and a one at coordinate k.
        """
        logs = torch.diagonal_scatter(roots, roots.diagonal(dim1=1, dim2=2).log(), dim1=1, dim2=2)
        values = torch.cat([tops, logs[:, self._rows, self._columns]], 1)
        self.places.copy_(places)
        self.values.copy_(values)
        self.slopes.copy_(smooth_slopes(places, values))
        self.spline.at[0], self.loc[0], self.scale[0] = knots
        return self

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        checks.event("Sliced", x, self.dim)
        return in_pieces(self._out, x, self._together)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        checks.event("Sliced", y, self.dim)
        return in_pieces(self._back, y, self._together)

    @property
    def _together(self) -> int:
        """How many points are mapped at once, so that what is between stays in the cache."""
        return max(ROWS, NUMBERS // self.values.shape[1])

    def _out(self, x: Tensor) -> tuple[Tensor, Tensor]:
        at, log_slope = self.spline.forward_and_ladj(x[..., self.coordinate, None])
        at = self.loc + self.scale * at
        top, root, ladj = self._at(at[..., 0])
        return top + (root @ self._with(x, at)[..., None])[..., 0], ladj + log_slope + self.scale[0].log()

    def _back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        at = y[..., self.coordinate, None]
        top, root, ladj = self._at(at[..., 0])
        x = torch.linalg.solve_triangular(root, (y - top)[..., None], upper=False)[..., 0]
        at, log_slope = self.spline.inverse_and_ladj((at - self.loc) / self.scale)
        return self._with(x, at), log_slope - ladj - self.scale[0].log()

    def _with(self, x: Tensor, at: Tensor) -> Tensor:
        """Return x (..., D) with another value (..., 1) of coordinate k."""
        return torch.cat([x[..., : self.coordinate], at, x[..., self.coordinate + 1 :]], -1)

    def _at(self, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return m (..., D), L (..., D, D) and the log determinant (...) at places (...)."""
        found = between(place, self.places, self.values, self.slopes)
        top, entries = found[..., : self.dim], found[..., self.dim :]
        root = entries.new_zeros(*entries.shape[:-1], self.dim, self.dim)
        root[..., self._rows, self._columns] = entries
        logs = root.diagonal(dim1=-2, dim2=-1)
        return top, torch.diagonal_scatter(root, logs.exp(), dim1=-2, dim2=-1), logs.sum(-1)


def in_pieces(map_: Callable[[Tensor], tuple[Tensor, Tensor]], points: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Map points (..., D), so many rows at once."""
    if points.numel() <= rows * points.shape[-1]:
        return map_(points)
    out, ladj = zip(*(map_(part) for part in points.reshape(-1, points.shape[-1]).split(rows)), strict=True)
    return torch.cat(out).reshape(points.shape), torch.cat(ladj).reshape(points.shape[:-1])
