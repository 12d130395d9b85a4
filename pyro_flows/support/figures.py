"""What all figures share: the one style, colors, ranges that far values do not rule, grids of axes; how notebooks show
figures and verdicts.
"""

from __future__ import annotations

import functools
import html
import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import numpy as np

from pyro_flows.support.checks import options

if TYPE_CHECKING:
    from matplotlib import RcParams
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

STATUS_COLORS = {"ok": "#2e7d4f", "corrected": "#b26a00", "refined": "#1f5f99", "unreliable": "#b3261e"}
STYLE = Path(__file__).parents[1] / "style.mplstyle"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # of the style file
LINES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 2, 1, 2)))
FLOW, BASE, INK, LINE = COLORS[0], COLORS[1], "#333333", "#8A8A8A"
WIDTH = 7.0  # inches of a figure: 672 pixels, which notebooks and pages show without shrinking them
SHOWN = (0.002, 0.998)  # quantiles between which marginals and clouds are shown
FILLED = 0.2  # opacity

P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Let a function draw in the package's style; what the caller has set for others is as before when it returns."""

    draw = options(draw)

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context(_style()):
            return draw(*args, **kwargs)

    return drawn


@functools.cache
def _style() -> RcParams:
    import matplotlib

    return matplotlib.rc_params_from_file(STYLE, use_default_template=False)


def panels(count: int, *, columns: int = 1, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``size`` inches and ``count`` axes in a grid; the places after the last one stay empty."""
    figure = new_figure(*size)
    grid = figure.subplots(math.ceil(count / columns), columns, squeeze=False)
    ticks = {"labelsize": _style()["xtick.labelsize"], "length": _style()["xtick.major.size"]}
    for number, axes in enumerate(grid.flat):
        axes.tick_params(color=LINE, labelcolor=INK, **ticks)  # else matplotlib takes the caller's style when it draws
        axes.set_visible(number < count)
    return figure, list(grid.flat)[:count]


def limits(layers: Iterable[np.ndarray]) -> tuple[float, float]:
    """Return the extreme quantiles of all layers, with a margin of 6 %."""
    bounds = [np.quantile(values[np.isfinite(values)], SHOWN) for values in layers if np.isfinite(values).any()]
    low, high = float(np.min(bounds, initial=np.inf)), float(np.max(bounds, initial=-np.inf))
    if not low < high:
        return (0.0, 1.0) if not bounds else (low - 1.0, high + 1.0)
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def steps(axes: Axes, values: np.ndarray, color: str, label: str) -> None:
    """Draw one pale value for each optimization step."""
    axes.plot(np.arange(1, len(values) + 1), values, color=color, linestyle="-", alpha=0.35, linewidth=0.6, label=label)
    axes.set_xlim(1, max(len(values), 2))


def opaque(legend: Legend) -> None:
    """Show what a legend is about at full strength."""
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)


def color_of(number: int) -> tuple[str, str | tuple[int, tuple[float, ...]]]:
    """Return color and dashes of the layer with this number."""
    return COLORS[number % len(COLORS)], LINES[number % len(LINES)]


def grid_of(count: int, *, width: float, narrowest: float, most: int) -> int:
    """Return how many columns of panels, none narrower than ``narrowest`` inches, fit into ``width`` inches."""
    return max(1, min(count, most, int(width / narrowest)))


# in a notebook --------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that a notebook shows when it is the value of a cell.

    It is not one of pyplot's: no backend is chosen, and nothing keeps it or shows it a second time. Jupyter asks
    ``_repr_png_`` where pyplot was not imported, and otherwise draws by a function that matplotlib registered.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")  # sharp on fine screens too
    vars(figure)["_repr_png_"] = functools.partial(png, figure)
    return figure


def png(figure: Figure) -> tuple[bytes, dict[str, int]]:
    """Return a figure as a PNG file, and the size in pixels in which a page shows it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    width, height = figure.get_size_inches()
    return buffer.getvalue(), {"width": round(96 * width), "height": round(96 * height)}  # pixels to an inch


def verdict_html(text: str) -> str:
    """Return a verdict's sentence as HTML, with its first word, the status, in bold and in color."""
    status, colon, rest = text.partition(":")
    color = STATUS_COLORS.get(status, "inherit")
    return f'<b style="color:{color}">{html.escape(status)}</b>{colon}{html.escape(rest)}'
