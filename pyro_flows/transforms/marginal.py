"""A fixed spline of each coordinate: the map from a base to marginal distributions that have been tabulated."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows import _checks
from pyro_flows.transforms import splines
from pyro_flows.transforms.base import Bijection


class MarginalSpline(Bijection):
    r"""Elementwise rational quadratic splines with fixed knots: :math:`y_d = g_d(x_d)`.

    Inside of :math:`[-B, B]` a spline with the knots ``at`` (D, 3, K + 1): places, values and slopes. Outside a line,
    which goes on with the slope of the last knot, so that the density does not jump.
    :math:`\log|J| = \sum_d \log g_d'(x_d)`. Nothing is trained. Both ways cost O(D K).

    Args:
        dim: number of coordinates D.
        bins: their number K.
        bound: the bound B.

    Reference: Durkan, Bekasov, Murray and Papamakarios 2019, "Neural spline flows".

    >>> import torch
    >>> from pyro_flows.transforms.marginal import MarginalSpline
    >>> MarginalSpline(2, bins=4, bound=3.0)(torch.tensor([-1.0, 5.0])).tolist()
    [-1.0, 5.0]
    """

    at: Tensor

    def __init__(self, dim: int, *, bins: int, bound: float) -> None:
        super().__init__()
        self.dim = _checks.integer("dim", dim, 1)
        self.bound = _checks.positive("bound", bound)
        places = torch.linspace(-bound, bound, _checks.integer("bins", bins, 1) + 1)
        self.register_buffer("at", torch.stack([places, places, torch.ones_like(places)]).repeat(dim, 1, 1))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _checks.event("MarginalSpline", x, self.dim)
        y, log_slope = splines.forward(x, self.at, self.bound)
        beyond, end, slope = self._beyond(x)
        y = torch.where(beyond, end + slope * (x - end), y)
        return y, torch.where(beyond, slope.log(), log_slope).sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _checks.event("MarginalSpline", y, self.dim)
        x, log_slope = splines.inverse(y, self.at, self.bound)
        beyond, end, slope = self._beyond(y)
        x = torch.where(beyond, end + (y - end) / slope, x)
        return x, torch.where(beyond, -slope.log(), log_slope).sum(-1)

    def _beyond(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which numbers are outside of the spline, the nearest end, and the slope there."""
        slope = torch.where(x < 0.0, self.at[:, 2, 0], self.at[:, 2, -1])
        return x.abs() > self.bound, self.bound * torch.sign(x), slope
