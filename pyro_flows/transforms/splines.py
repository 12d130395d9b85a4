"""Monotone rational quadratic splines (Durkan et al. 2019): pure functions of knots, and a map by fixed ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from pyro_flows.support import checks
from pyro_flows.transforms.base import Bijection

_UNIT = math.log(math.e - 1.0)  # softplus(_UNIT) = 1
SMALLEST = 1e-3  # the narrowest bin, as a share of the interval, and the least slope at a knot
MOST_BINS = 500


class _Bin(NamedTuple):
    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    slope_left: Tensor
    slope_right: Tensor


def count(bins: int) -> int:
    """Return how many numbers one spline of ``bins`` bins needs."""
    return 3 * bins - 1


def knots(raw: Tensor, bins: int, bound: float) -> Tensor:
    r"""Turn (..., 3 K - 1) unconstrained numbers into the K + 1 knots of a spline on :math:`[-B, B]^2`.

    They come as (..., 3, K + 1): places, values and slopes. Zeros give the identity. The slope is 1 at both ends, so
    the spline goes on as a line of slope 1 without a kink.
    """
    sizes, slopes = raw.split([2 * bins, bins - 1], dim=-1)
    shares = SMALLEST + (1.0 - SMALLEST * bins) * torch.softmax(sizes.unflatten(-1, (2, bins)), dim=-1)
    places = pad(2.0 * bound * shares.cumsum(-1) - bound, (1, 0), value=-bound)
    slopes = pad(SMALLEST + (1.0 - SMALLEST) * softplus(slopes + _UNIT), (1, 1), value=1.0)
    return torch.cat([places, slopes.unsqueeze(-2)], dim=-2)


def forward(x: Tensor, at: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    r"""Return ``y`` and :math:`\log dy/dx`, elementwise; outside of :math:`[-B, B]` the map is the identity.

    In the bin of width w and height h, with :math:`s = h / w`, slopes :math:`d_0, d_1` and
    :math:`\theta = (x - x_0) / w`:

    .. math:: y = y_0 + h \frac{s \theta^2 + d_0 \theta (1 - \theta)}{s + (d_0 + d_1 - 2 s)\,\theta (1 - \theta)}
    """
    inside, point = _inside(x, bound)
    bin_ = _find(point, at, 0)
    theta = (point - bin_.left) / bin_.width
    steep, denominator, log_slope = _slope(theta, bin_)
    y = bin_.bottom + bin_.height * theta * (steep * theta + bin_.slope_left * (1.0 - theta)) / denominator
    return torch.where(inside, y, x), torch.where(inside, log_slope, 0.0)


def inverse(y: Tensor, at: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    r"""Return ``x`` and :math:`\log dx/dy`, elementwise, by the root of a quadratic, without cancellation.

    With :math:`q = (y - y_0) / h`, :math:`\theta` solves :math:`a \theta^2 + b \theta = s q`. Its discriminant is a sum
    of terms that are not negative, :math:`(d_0 - (d_0 + d_1) q)^2 + 4 s^2 q (1 - q)`; of the two forms of the root, the
    one that adds is taken.
    """
    inside, point = _inside(y, bound)
    bin_ = _find(point, at, 1)
    steep, share = bin_.height / bin_.width, (point - bin_.bottom) / bin_.height
    total = bin_.slope_left + bin_.slope_right
    bend = share * (total - 2.0 * steep)
    b = bin_.slope_left - bend
    root = torch.sqrt((bin_.slope_left - total * share).square() + 4.0 * steep.square() * share * (1.0 - share))
    falling = b < 0.0  # then a > s
    a = torch.where(falling, steep - b, 1.0)
    theta = torch.where(falling, (root - b) / (2.0 * a), 2.0 * steep * share / torch.where(falling, 1.0, b + root))
    log_slope = _slope(theta, bin_)[2]
    return torch.where(inside, bin_.left + theta * bin_.width, y), torch.where(inside, -log_slope, 0.0)


def _inside(x: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return where x is inside, and x there, 0 elsewhere: no gradient comes from a bin that does not apply."""
    inside = x.abs() < bound
    return inside, torch.where(inside, x, 0.0)


def _find(point: Tensor, at: Tensor, axis: int) -> _Bin:
    """Pick each point's bin along an axis of the knots, 0 for their places and 1 for their values."""
    index = (point.unsqueeze(-1) >= at[..., axis, 1:-1]).sum(-1, keepdim=True)
    shape = (*index.shape[:-1], 3)
    pair = torch.cat([index, index + 1], dim=-1).unsqueeze(-2).expand(*shape, 2)
    ends = at.expand(*shape, -1).gather(-1, pair)
    (left, right), (bottom, top), (slope_left, slope_right) = (row.unbind(-1) for row in ends.unbind(-2))
    return _Bin(left, right - left, bottom, top - bottom, slope_left, slope_right)


def _slope(theta: Tensor, bin_: _Bin) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean slope s, the denominator and the log of the slope at theta."""
    steep, rest = bin_.height / bin_.width, 1.0 - theta
    middle = (theta * rest).clamp_min(0.0)  # where rounding puts theta outside of its bin
    denominator = steep * (1.0 - 2.0 * middle) + (bin_.slope_left + bin_.slope_right) * middle
    numerator = bin_.slope_right * theta.square() + 2.0 * steep * middle + bin_.slope_left * rest.square()
    return steep, denominator, 2.0 * torch.log(steep / denominator) + torch.log(numerator)


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
    >>> from pyro_flows.transforms.splines import MarginalSpline
    >>> MarginalSpline(2, bins=4, bound=3.0)(torch.tensor([-1.0, 5.0])).tolist()
    [-1.0, 5.0]
    """

    at: Tensor

    def __init__(self, dim: int, *, bins: int, bound: float) -> None:
        super().__init__()
        self.dim = checks.integer("dim", dim, 1)
        self.bound = checks.positive("bound", bound)
        places = torch.linspace(-bound, bound, checks.integer("bins", bins, 1) + 1)
        self.register_buffer("at", torch.stack([places, places, torch.ones_like(places)]).repeat(dim, 1, 1))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        checks.event("MarginalSpline", x, self.dim)
        y, log_slope = forward(x, self.at, self.bound)
        beyond, end, slope = self._beyond(x)
        y = torch.where(beyond, end + slope * (x - end), y)
        return y, torch.where(beyond, slope.log(), log_slope).sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        checks.event("MarginalSpline", y, self.dim)
        x, log_slope = inverse(y, self.at, self.bound)
        beyond, end, slope = self._beyond(y)
        x = torch.where(beyond, end + (y - end) / slope, x)
        return x, torch.where(beyond, -slope.log(), log_slope).sum(-1)

    def _beyond(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which numbers are outside of the spline, the nearest end, and the slope there."""
        slope = torch.where(x < 0.0, self.at[:, 2, 0], self.at[:, 2, -1])
        return x.abs() > self.bound, self.bound * torch.sign(x), slope


# cubic Hermite splines, with the slopes that make second derivatives continuous ---------------------------------------

LIMIT = 3.0  # Fritsch and Carlson 1980 (doi:10.1137/0717021): up to there, a spline rises and falls with its values


def smooth_slopes(places: Tensor, values: Tensor, *, limited: bool = False) -> Tensor:
    r"""Return the slopes (N, ...) of the cubic spline through values (N, ...) at rising places (N,), N > 2.

    Inside, second derivatives are continuous; at the ends, slopes are those of the parabola through three points.
    With ``limited``, no slope is more than three times that of a line on either side of it: a spline through values
    that fall by thousands would swing as far where they are level.

    With :math:`h_i = x_{i+1} - x_i` and :math:`\delta_i = (y_{i+1} - y_i) / h_i`,

    .. math:: h_i s_{i-1} + 2 (h_{i-1} + h_i) s_i + h_{i-1} s_{i+1} = 3 (h_i \delta_{i-1} + h_{i-1} \delta_i).

    >>> import torch
    >>> x = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)
    >>> smooth_slopes(x, x.square()).round(decimals=6).tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    h, flat = places.diff(), values.flatten(1) if values.dim() > 1 else values[:, None]
    rise = flat.diff(dim=0) / h[:, None]
    count = len(places)
    left = torch.zeros(count, count, dtype=places.dtype, device=places.device)
    right = torch.zeros_like(flat)
    inner = torch.arange(1, count - 1, device=places.device)
    left[inner, inner - 1], left[inner, inner], left[inner, inner + 1] = h[1:], 2.0 * (h[:-1] + h[1:]), h[:-1]
    right[1:-1] = 3.0 * (h[1:, None] * rise[:-1] + h[:-1, None] * rise[1:])
    left[0, 0] = left[-1, -1] = 1.0
    right[0] = rise[0] - h[0] * (rise[1] - rise[0]) / (h[0] + h[1])
    right[-1] = rise[-1] + h[-1] * (rise[-1] - rise[-2]) / (h[-1] + h[-2])
    slopes = torch.linalg.solve(left, right)
    if limited:
        most = LIMIT * torch.cat([rise[:1], torch.minimum(rise[:-1].abs(), rise[1:].abs()), rise[-1:]]).abs()
        slopes = slopes.clamp(-most, most)
    return slopes.reshape(values.shape)


def between(at: Tensor, places: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """Return the spline (..., P) at numbers (...), from values and slopes (N, P) at places; the ends' values outside.

    >>> import torch
    >>> places, values = torch.tensor([0.0, 1.0]), torch.tensor([[0.0], [1.0]])
    >>> between(torch.tensor([-1.0, 0.5]), places, values, torch.zeros(2, 1))[:, 0].tolist()
    [0.0, 0.5]
    """
    at = torch.minimum(torch.maximum(at, places[0]), places[-1])
    number = torch.searchsorted(places.contiguous(), at.detach().contiguous(), right=True).clamp(1, len(places) - 1)
    width = (places[number] - places[number - 1])[..., None]
    t = (at - places[number - 1])[..., None] / width
    start, end = values[number - 1], values[number]
    rise, fall = width * slopes[number - 1], width * slopes[number]
    change = start - end
    return start + t * (rise + t * (-3.0 * change - 2.0 * rise - fall + t * (2.0 * change + rise + fall)))
