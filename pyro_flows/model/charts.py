r"""Charts: coordinates for values on a circle, for values with heavy tails, and for values that data bound.

- ``Circle``: :math:`y = c + 2\pi\,(\text{sigmoid}(u) - \tfrac 12)`, brought to :math:`[-\pi, \pi)`. A density of period
  :math:`2\pi` has its mass once in every turn; this chart holds one turn, cut opposite to c.
- ``Heavy``: :math:`y = m + s\,\sinh(u)`. A tail that falls off like a power of y falls off exponentially in u, so that
  means and standard deviations exist there whatever the power.
- ``Walls``: :math:`y = a + e^u` above a wall a, :math:`y = b - e^{-u}` below a wall b, and
  :math:`y = a + (b - a)\,\text{sigmoid}(u)` between two. The likelihood of uniform data is zero for an upper bound
  below the largest of them, which the prior's support does not tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Circle:
    """One turn about ``center``, of the site's shape."""

    center: Tensor

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return angles in [-pi, pi) and the log derivatives."""
        angle = self.center + 2.0 * math.pi * (torch.sigmoid(u) - 0.5)
        ladj = math.log(2.0 * math.pi) + logsigmoid(u) + logsigmoid(-u)
        return torch.remainder(angle + math.pi, 2.0 * math.pi) - math.pi, ladj

    def inverse(self, y: Tensor) -> Tensor:
        """Return the coordinates of angles, whatever turn they are in."""
        away = torch.remainder(y - self.center + math.pi, 2.0 * math.pi) - math.pi
        return torch.logit(away / (2.0 * math.pi) + 0.5)


@dataclass(frozen=True)
class Heavy:
    """A hyperbolic sine for the entries where ``scale`` is positive; the others stay as they are."""

    loc: Tensor
    scale: Tensor

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        chosen = self.scale > 0.0
        inner = torch.where(chosen, u, 0.0)
        scale = torch.where(chosen, self.scale, 1.0)
        size = inner.abs()
        log_cosh = size + torch.log1p(torch.exp(-2.0 * size)) - math.log(2.0)
        y = torch.where(chosen, self.loc + scale * torch.sinh(inner), u)
        return y, torch.where(chosen, scale.log() + log_cosh, 0.0)

    def inverse(self, y: Tensor) -> Tensor:
        chosen = self.scale > 0.0
        scale = torch.where(chosen, self.scale, 1.0)
        return torch.where(chosen, torch.asinh((y - self.loc) / scale), y)


@dataclass(frozen=True)
class Walls:
    """What lies above ``low`` and below ``high``, of the site's shape; infinite ones are none."""

    low: Tensor
    high: Tensor

    def _sides(self, like: Tensor) -> tuple[Tensor, ...]:
        """Return which entries have both walls, and which one; the wall of one, its sign, the lower one, the width."""
        below, above = torch.isfinite(self.low), torch.isfinite(self.high)
        low, high, both = torch.where(below, self.low, 0.0), torch.where(above, self.high, 1.0), below & above
        sign = torch.where(above, -1.0, 1.0).to(like)
        return both, below ^ above, torch.where(above, high, low), sign, low, torch.where(both, high - low, 1.0)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        both, one, wall, sign, low, width = self._sides(u)
        inner = torch.where(one, sign * u, 0.0)
        beside = wall + sign * inner.exp()
        between = low + width * torch.sigmoid(u)
        ladj = torch.where(both, width.log() + logsigmoid(u) + logsigmoid(-u), torch.where(one, inner, 0.0))
        return torch.where(both, between, torch.where(one, beside, u)), ladj

    def inverse(self, y: Tensor) -> Tensor:
        """Return the coordinates of values; of those beyond a wall, the coordinates of their images inside."""
        both, one, wall, sign, low, width = self._sides(y)
        away = torch.where(one, (y - wall).abs(), 1.0)
        share = torch.where(both, (y - low) / width, 0.5)
        inside = torch.where((share > 0.0) & (share < 1.0), share, 0.5)
        return torch.where(both, torch.logit(inside), torch.where(one, sign * away.log(), y))


Chart = Circle | Heavy | Walls


def _replaced(values: object, by: Callable[[float | None], float | None]) -> object:
    """Return nested lists with each number replaced."""
    if isinstance(values, list):
        return [_replaced(part, by) for part in values]
    return by(cast("float | None", values))


def read_chart(given: Mapping[str, object], shape: torch.Size, like: Tensor) -> Chart | None:
    """Make a chart from plain numbers, with a site's shape, and dtype and device of ``like``; None if there is none."""

    def numbers(name: str, missing: float = math.nan) -> Tensor:
        values = _replaced(given[name], lambda value: missing if value is None else value)
        return torch.as_tensor(values, dtype=like.dtype, device=like.device).expand(shape).clone()

    if "turn_about" in given:
        return Circle(numbers("turn_about"))
    if "wall_below" in given:
        return Walls(numbers("wall_below", -math.inf), numbers("wall_above", math.inf))
    return Heavy(numbers("heavy_about"), numbers("heavy_scale")) if "heavy_scale" in given else None


def write_chart(chart: Chart | None) -> dict[str, object]:
    """Return a chart as plain numbers, as :func:`read_chart` takes them."""
    if isinstance(chart, Circle):
        return {"turn_about": chart.center.tolist()}
    if isinstance(chart, Walls):
        sides = {"wall_below": chart.low.tolist(), "wall_above": chart.high.tolist()}
        return {
            name: _replaced(side, lambda value: value if value is not None and math.isfinite(value) else None)
            for name, side in sides.items()
        }
    return {} if chart is None else {"heavy_about": chart.loc.tolist(), "heavy_scale": chart.scale.tolist()}
