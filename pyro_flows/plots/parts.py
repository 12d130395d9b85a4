"""Titles, legends and small marks that figures of posteriors share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pyro_flows._figures import BASE, FILLED, FLOW, INK, SHOWN, STATUS_COLORS, color_of, limits, opaque
from pyro_flows.results.record import Record

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INTERVAL, INNER = (0.055, 0.945), (0.25, 0.75)  # quantiles: the central 89 % and 50 %
NARROW = 5.0  # inches; 3.7 fit a phone of 390 pixels
BINS = 60


def title(axes: Axes, posterior: Record, text: str) -> None:
    """Write what a figure of one panel shows, the method, and the status of its verdict."""
    status = posterior.verdict.status
    axes.set_title(plain(text), loc="left", fontsize=10, fontweight="bold")
    axes.set_title(f"{posterior.method}: {status}", loc="right", fontsize=9, color=STATUS_COLORS[status])


def heading(figure: Figure, posteriors: Mapping[str, Record], text: str) -> None:
    """Write what a figure of several panels shows, and of one posterior, its method and status."""
    if len(posteriors) == 1:
        (posterior,) = posteriors.values()
        apart, status = " · " if figure.get_figwidth() > NARROW else "\n", posterior.verdict.status
        said, color = f"{plain(text)}{apart}{posterior.method}: {status}", STATUS_COLORS[status]
    else:
        said, color = plain(text), INK
    figure.suptitle(said, color=color, fontweight="bold")


def cut(shown: Sequence[str], labels: Sequence[str]) -> str:
    """Say in a heading how many scalars are shown, if these are not all."""
    return f" · {len(shown)} of {len(labels)} scalars" if len(shown) < len(labels) else ""


def with_status(posteriors: Mapping[str, Record]) -> list[str]:
    """Return the names of posteriors, each with the status of its verdict."""
    return [plain(f"{name} ({posterior.verdict.status})") for name, posterior in posteriors.items()]


def foot(figure: Figure, note: str, handles: list[Artist], names: Sequence[str], columns: int = 2) -> None:
    """Write what marks mean below all panels, and name the layers if there are several."""
    if len(handles) < 2:
        figure.supxlabel(note, fontsize=8)
        return
    ncols = max(1, min(columns, len(names)))
    opaque(figure.legend(handles, names, title=note, title_fontsize=8, loc="outside lower center", ncols=ncols))


def plain(label: str) -> str:
    """Return a label as matplotlib writes it as it is: a dollar begins no formula."""
    return label.replace("$", r"\$")


def short(label: str) -> str:
    """Return a label on two lines, the entry below the variable, each of 20 characters at most."""
    name, bracket, entry = label.partition("[")
    lines = [name, bracket + entry] if bracket and len(label) > 10 else [label]
    return plain("\n".join(line if len(line) <= 20 else f"{line[:19]}…" for line in lines))


def silence(axes: Axes) -> None:
    """Take the vertical axis away, where heights mean nothing by themselves."""
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def constant(axes: Axes, values: np.ndarray) -> bool:
    """Write the value of a scalar that has only one, or that it has none; return whether that was so."""
    if len(values) and np.ptp(values) > 0:
        return False
    text = f"= {values[0]:.4g}" if len(values) else "no finite draws"
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set_xticks([])
    return True


def whole(layers: Sequence[np.ndarray]) -> bool:
    """Whether all finite values are whole numbers, as counts are."""
    return all(bool((values == np.round(values)).all()) for values in (each[np.isfinite(each)] for each in layers))


def edges(low: float, high: float, layers: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Return ``count`` edges of bins from ``low`` to ``high``; of whole numbers, each bin holds equally many."""
    if not whole(layers):
        return np.linspace(low, high, count)
    step = max(1, math.ceil((high - low + 1.0) / (count - 1)))
    return np.arange(math.ceil(low) - 0.5, math.floor(high) + 0.5 + step, step)


def histogram(axes: Axes, values: np.ndarray, bins: np.ndarray, *, filled: bool = True, number: int = 0) -> Artist:
    """Draw the outline of a histogram, in the color and dashes of its layer; return it."""
    color, dashes = color_of(number)
    heights, _ = np.histogram(values, bins=bins)
    density = heights / max(len(values), 1) / np.diff(bins)
    if filled:
        axes.stairs(density, bins, color=color, fill=True, alpha=FILLED, linewidth=0)
    return axes.stairs(density, bins, color=color, linewidth=1.0 if filled else 1.4, linestyle=dashes)


def interval(axes: Axes, values: np.ndarray, height: float = 0.0, color: str = FLOW) -> None:
    """Draw the central 89 % as a bar and the mean as a dot."""
    draw = partial(axes.plot, clip_on=False, zorder=3)
    draw(np.quantile(values, INTERVAL), [height, height], color=color, linewidth=3.5, solid_capstyle="butt")
    draw([values.mean()], [height], "o", color="white", markeredgecolor=color, markersize=5)


def regions(axes: Axes, points: np.ndarray, number: int = 1, color: str = BASE) -> Artist:
    """Draw where 50 % and 90 % of points (S, 2) lie most densely, by a smoothed histogram over the axes' range."""
    from scipy.ndimage import gaussian_filter

    finite = points[np.isfinite(points).all(-1)]
    frame = np.array([axes.get_xlim(), axes.get_ylim()])
    counts, across, upwards = np.histogram2d(finite[:, 0], finite[:, 1], bins=BINS, range=frame)
    density = gaussian_filter(counts, 2.0, mode="constant", truncate=3.0)  # of two bins
    inside = ((finite >= frame[:, 0]) & (finite < frame[:, 1])).all(-1)
    cells = (BINS * (finite[inside] - frame[:, 0]) / (frame[:, 1] - frame[:, 0])).astype(int).clip(0, BINS - 1)
    at_points = np.concatenate([density[cells[:, 0], cells[:, 1]], np.zeros(np.count_nonzero(~inside))])
    levels = sorted({float(level) for level in np.quantile(at_points, [0.1, 0.5])}) if len(finite) else []
    if len(levels) == 2 and levels[0] > 0:
        centers = [(edges[1:] + edges[:-1]) / 2 for edges in (across, upwards)]
        axes.contourf(*centers, density.T, levels=[*levels, np.inf], colors=[color, color], alpha=0.12, zorder=0)
        dashes = [color_of(number)[1]]
        axes.contour(*centers, density.T, levels=levels, colors=[color], linewidths=1.2, linestyles=dashes, zorder=3)
    return axes.plot([], [], color=color, linestyle=color_of(number)[1], linewidth=1.2)[0]


def cloud(axes: Axes, points: Tensor, colors: str | np.ndarray, *, equal: bool = True) -> None:
    """Scatter points (N, 2); with ``equal``, both axes have the same scale."""
    values = points.detach().double().cpu().numpy()
    finite = values[np.isfinite(values).all(-1)]
    kept = colors if isinstance(colors, str) else colors[np.isfinite(values).all(-1)]
    axes.scatter(finite[:, 0], finite[:, 1], s=2.0, c=kept, linewidths=0, alpha=0.7, rasterized=True)
    if not equal:
        axes.set(xlim=limits([finite[:, 0]]), ylim=limits([finite[:, 1]]))
        return
    if len(finite):
        low, high = np.quantile(finite, SHOWN, axis=0)
        middle, half = (low + high) / 2.0, 0.55 * float((high - low).max()) + 1e-6
        axes.set_xlim(middle[0] - half, middle[0] + half)
        axes.set_ylim(middle[1] - half, middle[1] + half)
    axes.set_aspect("equal")
