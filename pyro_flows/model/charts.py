r"""Charts: coordinates for values on a circle, and for values with heavy tails.

- ``Circle``: :math:`y = c + 2\pi\,(\text{sigmoid}(u) - \tfrac 12)`, brought to :math:`[-\pi, \pi)`. A density of period
  :math:`2\pi` has its mass once in every turn; this chart holds one turn, cut opposite to c.
- ``Heavy``: :math:`y = m + s\,\sinh(u)`. A tail that falls off like a power of y falls off exponentially in u, so that
  means and standard deviations exist there whatever the power.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
        """Return values and the log derivatives."""
        chosen = self.scale > 0.0
        inner = torch.where(chosen, u, 0.0)
        scale = torch.where(chosen, self.scale, 1.0)
        size = inner.abs()
        log_cosh = size + torch.log1p(torch.exp(-2.0 * size)) - math.log(2.0)
        return torch.where(chosen, self.loc + scale * torch.sinh(inner), u), torch.where(
            chosen, scale.log() + log_cosh, 0.0
        )

    def inverse(self, y: Tensor) -> Tensor:
        """Return the coordinates of values."""
        chosen = self.scale > 0.0
        scale = torch.where(chosen, self.scale, 1.0)
        return torch.where(chosen, torch.asinh((y - self.loc) / scale), y)


Chart = Circle | Heavy


def read_chart(given: Mapping[str, Any], shape: torch.Size, like: Tensor) -> Chart | None:
    """Make a chart from plain numbers, with a site's shape, and dtype and device of ``like``; None if there is none.

    Raises:
        KeyError, RuntimeError, TypeError: for numbers that are missing or do not fit.
    """

    def numbers(name: str) -> Tensor:
        return torch.as_tensor(given[name], dtype=like.dtype, device=like.device).expand(shape).clone()

    if "turn_about" in given:
        return Circle(numbers("turn_about"))
    return Heavy(numbers("heavy_about"), numbers("heavy_scale")) if "heavy_scale" in given else None


def write_chart(chart: Chart | None) -> dict[str, Any]:
    """Return a chart as plain numbers, as :func:`read_chart` takes them."""
    if isinstance(chart, Circle):
        return {"turn_about": chart.center.tolist()}
    return {} if chart is None else {"heavy_about": chart.loc.tolist(), "heavy_scale": chart.scale.tolist()}
