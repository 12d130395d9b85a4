"""Cubic Hermite splines, with the slopes that make second derivatives continuous."""

from __future__ import annotations

import torch
from torch import Tensor

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
