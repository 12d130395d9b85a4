"""What figures of posteriors share: titles, legends and small marks; scalars, chosen and named as in ArviZ."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_flows.inference.record import Record
from pyro_flows.inference.verdict.methods import GUIDE
from pyro_flows.posterior.export.arviz_groups import named_draws, posterior_group
from pyro_flows.support import arviz, checks
from pyro_flows.support.figures import BASE, FILLED, FLOW, INK, SHOWN, STATUS_COLORS, color_of, limits, opaque
from pyro_flows.support.numbers import arrays

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INTERVAL, INNER = (0.055, 0.945), (0.25, 0.75)  # quantiles: the central 89 % and 50 %
NARROW = 5.0  # inches; 3.7 fit a phone of 390 pixels
BINS = 60
LONG = 6  # characters of a label of a tick, from which on there is one less


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


def short(label: str, most: int = 20, *, whole: int = 10) -> str:
    """Return a label of up to ``whole`` letters as it is; else with the entry below the variable, ``most`` a line.

    Longer lines lose letters in their middle: entries often differ at the end.
    """
    name, bracket, entry = label.partition("[")
    lines = [name, bracket + entry] if bracket and len(label) > whole else [label]
    left, right = most // 2, (most - 1) // 2
    return plain("\n".join(line if len(line) <= most else f"{line[:left]}…{line[-right:]}" for line in lines))


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


def ticks(axes: Axes, most: int, *, integer: bool = False) -> str:
    """Let the horizontal axis have so many ticks, or one less if their labels are long; return what they leave out."""
    for count in (most, most - 1):
        axes.locator_params(axis="x", nbins=count, integer=integer)
        formatter, places = axes.xaxis.get_major_formatter(), list(map(float, axes.xaxis.get_majorticklocs()))
        if max(map(len, formatter.format_ticks(places)), default=0) < LONG:
            break
    return formatter.get_offset()


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


# scalars by label, of one posterior or several ------------------------------------------------------------------------

Posteriors = Record | Mapping[str, Record]
Names = str | Sequence[str] | None
Transform = Mapping[str, Callable[[Tensor], Tensor]]


def scalars_of(
    draws: xr.Dataset, var_names: Names, filter_vars: str | None, coords: arrays.Coords
) -> dict[str, np.ndarray]:
    """Return the draws (S,) of each scalar by its label, ``theta[Choate]``, of those that are chosen as in ArviZ."""
    found = arviz.select(draws, var_names, filter_vars, coords)
    return {label: column for values in found.data_vars.values() for label, column in _columns(values)}


def named(posteriors: Posteriors) -> dict[str, Record]:
    """Return posteriors by name; one that comes without is called by its method or guide. Refuse anything else."""
    found = posteriors if isinstance(posteriors, Mapping) else {"": posteriors}
    if not found or not all(isinstance(posterior, Record) for posterior in found.values()):
        kinds = ", ".join(sorted({type(posterior).__name__ for posterior in found.values()})) or "none"
        raise ValueError(f"posterior: expected a Posterior, or several by name, {{'flow': a, 'NUTS': b}}, got {kinds}.")
    if isinstance(posteriors, Record):
        return {_label(posteriors, posteriors.method): posteriors}
    return {str(name): posterior for name, posterior in found.items()}


def _label(posterior: Record, method: str) -> str:
    """Return what made draws: the method, or the class of a guide or sampler that is the caller's."""
    return posterior.guide_name if posterior._of_mcmc or method == GUIDE else method


def raw_label(posterior: Record) -> str:
    """Return what made the guide's own draws."""
    return _label(posterior, posterior.verdict.guide_method)


def raw(posterior: Record) -> xr.Dataset:
    """Return the guide's own draws, before any resampling or sampler; they may take the model."""
    if not posterior._replaced:
        return posterior_group(posterior)
    if posterior._stored is not None and "raw_posterior" in posterior._stored[0]:
        return posterior._stored[0]["raw_posterior"]
    if posterior.density is None:
        raise ValueError("posterior: its raw draws need its model; load(path, model, *args) with the fit's arguments.")
    return named_draws(posterior, posterior._need_density().constrain(posterior.z))


def common(layers: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Return the labels that all layers have, in the first one's order, or raise a ValueError if there are none."""
    first, *others = layers.values()
    found = [label for label in first if all(label in other for other in others)]
    if not found:
        raise ValueError(f"posterior: {', '.join(layers)} have no scalar in common; compare posteriors of one model.")
    return found


# scalars by label -----------------------------------------------------------------------------------------------------


def scalar(draws: xr.Dataset, label: object, transform: Transform | None = None) -> np.ndarray:
    """Return the draws (S,) of one scalar, such as ``mu``, ``theta[3]`` or ``theta[Choate]``, transformed."""
    if not isinstance(label, str):
        got = type(label).__name__
        raise TypeError(f"scalars: expected names such as 'theta[3]', got a {got}. Pass var_names=[...].")
    name = label if label in draws else variable(label)
    values = draws[checks.choice("var_names", name, map(str, draws.data_vars))]
    found = dict(_columns(values))
    key = re.sub(r",\s*", ", ", label)
    shape = tuple(size for dim, size in values.sizes.items() if dim not in arrays.SAMPLE_DIMS)
    if key not in found:  # by position, whatever the labels
        key = dict(zip(arrays.indexed(name, map(range, shape)), found, strict=True)).get(key, key)
    if key not in found:
        example = next(iter(found))
        raise ValueError(f"{label!r}: expected one scalar; site {name!r} has shape {shape}, so {example!r}, say.")
    return transformed(found[key], name, transform)


def transformed(values: np.ndarray, name: str, transform: Transform | None) -> np.ndarray:
    """Return draws (S,) of a variable after its function, if it has one."""
    function = (transform or {}).get(name)
    return values if function is None else function(torch.as_tensor(values)).double().cpu().numpy()


def variable(label: str) -> str:
    """Return the variable's name of a label, ``theta`` of ``theta[3]``."""
    return re.sub(r"\[[^\]]*\]$", "", label)


def axis_label(label: str, transform: Transform | None) -> str:
    """Return what an axis is called: the label, after the name of the function that was applied."""
    function = (transform or {}).get(variable(label))
    return label if function is None else f"{getattr(function, '__name__', 'transformed')} {label}"


def _columns(values: xr.DataArray) -> list[tuple[str, np.ndarray]]:
    array = values.to_numpy()
    flat = array.reshape(array.shape[0] * array.shape[1], -1).astype(float)
    return list(zip(arrays.entry_labels(values), flat.T, strict=True))
