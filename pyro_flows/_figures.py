"""One style for all figures: colors, quantiles that set ranges, and grids of plain axes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pyro_flows._display import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOW, BASE, INK, PAPER, LINE = "#1f5f8b", "#d98841", "#333333", "#dce8f0", "#999999"
SHOWN = (0.002, 0.998)  # quantiles between which marginals and clouds are shown


def panels(count: int, *, columns: int = 1, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``size`` inches and ``count`` axes in a grid; the places after the last one stay empty."""
    figure = new_figure(*size)
    grid: Any = figure.subplots(math.ceil(count / columns), columns, squeeze=False)
    for number, axes in enumerate(grid.flat):
        _plain(axes)
        axes.set_visible(number < count)
    return figure, list(grid.flat)[:count]


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=INK, labelsize=8, length=3, color=LINE)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
        axis.label.set_fontsize(9)
