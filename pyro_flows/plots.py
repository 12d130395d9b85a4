"""Figures of a posterior. Matplotlib is imported when the first one is drawn; pyplot and its state are not used.

A notebook shows a figure that is the value of a cell; elsewhere, ``figure.savefig("file.png")`` writes it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pyro_flows import _checks
from pyro_flows._display import STATUS_COLORS
from pyro_flows._figures import BASE, FLOW, INK, PAPER, SHOWN, panels
from pyro_flows.flows.recipe_json import to_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_flows.results.record import Record

WINDOW_SHARE = 0.04
SCATTERED = 2000
INTERVAL = (0.055, 0.945)
COLUMNS = 4
BINS, SMOOTH = 60, 2

Transform = Mapping[str, Callable[[Tensor], Tensor]]


# ELBO -----------------------------------------------------------------------------------------------------------------


def plot_elbo(posterior: Record) -> Figure:
    """Draw the ELBO of each optimization step, with a running median.

    The vertical axis is chosen by the second half of the run, so that wild first steps do not flatten the rest.

    Args:
        posterior: of :func:`~pyro_flows.fit`.

    Raises:
        ValueError: if there are no steps to show, as after :func:`~pyro_flows.diagnose`.
    """
    elbo = -posterior.losses.detach().double().cpu().numpy()
    if not len(elbo):
        raise ValueError("posterior: expected one with optimization steps, got none (diagnose does not optimize).")
    figure, (axes,) = panels(1, size=(7.0, 3.6))
    steps = np.arange(1, len(elbo) + 1)
    axes.plot(steps, elbo, color=FLOW, alpha=0.3, linewidth=0.6, label="each step")
    axes.plot(steps, _running_median(elbo), color=FLOW, linewidth=1.8, label="running median")
    if math.isfinite(posterior.elbo):
        axes.axhline(posterior.elbo, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"final {posterior.elbo:.2f}",
            (1.0, posterior.elbo),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_ylim(*_elbo_limits(elbo, posterior.elbo))
    axes.set_xlim(1, max(len(elbo), 2))
    axes.set_xlabel("optimization step")
    axes.set_ylabel("ELBO (nats)")
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    _title(axes, posterior, "Evidence lower bound")
    return figure


def _running_median(values: np.ndarray) -> np.ndarray:
    """Median over a centered window of a twenty-fifth of the run, shorter at both ends."""
    half = max(1, round(WINDOW_SHARE * len(values) / 2))
    padded = np.pad(np.where(np.isfinite(values), values, np.nan), half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN slice", category=RuntimeWarning)
        return np.asarray(np.nanmedian(windows, axis=-1))


def _elbo_limits(elbo: np.ndarray, final: float) -> tuple[float, float]:
    late = elbo[len(elbo) // 2 :]
    late = late[np.isfinite(late)] if np.isfinite(late).any() else np.array([0.0])
    low, middle, high = np.quantile(late, [0.01, 0.5, 0.99])
    if math.isfinite(final):
        low, high = min(low, final), max(high, final)
    spread = max(high - low, 1e-3 * abs(middle), 1e-6)
    start = float(np.quantile(elbo[np.isfinite(elbo)], 0.05)) if np.isfinite(elbo).any() else low
    return max(min(start, low) - 0.3 * spread, low - 4.0 * spread), high + 0.5 * spread


# marginals ------------------------------------------------------------------------------------------------------------


def plot_posterior(posterior: Record, names: str | Sequence[str] | None = None, *, max_panels: int = 24) -> Figure:
    """Draw the marginal histogram of each scalar, with its mean and central 89 % interval; one panel a scalar.

    Args:
        posterior: what to draw.
        names: sites to show; all by default.
        max_panels: how many scalars at most; the title says how many there are.

    Raises:
        ValueError: for a name that is no site.
    """
    _checks.integer("max_panels", max_panels, 1)
    wanted = [names] if isinstance(names, str) else list(posterior.samples) if names is None else names
    scalars = [pair for name in wanted for pair in _scalars(posterior.samples, name)]
    shown = scalars[:max_panels]
    columns = min(COLUMNS, len(shown))
    size = max(2.1 * columns, 4.4), 1.55 * math.ceil(len(shown) / columns) + 0.5
    figure, grid = panels(len(shown), columns=columns, size=size)
    for axes, (label, values) in zip(grid, shown, strict=True):
        _marginal(axes, label, values.detach().double().cpu().numpy())
    figure.supxlabel("bar: central 89 %; dot: mean", fontsize=8, color=INK)
    note = f" · {len(shown)} of {len(scalars)} scalars" if len(shown) < len(scalars) else ""
    _heading(figure, posterior, f"Posterior marginals{note}")
    return figure


def _scalars(samples: Mapping[str, Tensor], name: str) -> list[tuple[str, Tensor]]:
    values = samples[_checks.choice("names", name, samples)]
    if values.dim() == 1:
        return [(name, values)]
    indices = np.ndindex(*values.shape[1:])
    return [(f"{name}[{', '.join(map(str, index))}]", values[(slice(None), *index)]) for index in indices]


def _marginal(axes: Axes, label: str, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    axes.set_title(label, fontsize=9, color=INK, loc="left", pad=3)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    if not len(values) or np.ptp(values) == 0:
        text = f"= {values[0]:.4g}" if len(values) else "no finite draws"
        axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=INK, fontsize=9)
        axes.set_xticks([])
        return
    low, high = np.quantile(values, SHOWN)
    bins = np.linspace(low, high, 45)
    heights, _, _ = axes.hist(values, bins=bins.tolist(), density=True, histtype="stepfilled", color=PAPER)
    axes.stairs(np.asarray(heights), bins, color=FLOW, linewidth=1.0)
    left, right = np.quantile(values, INTERVAL)
    axes.plot([left, right], [0, 0], color=FLOW, linewidth=3.5, solid_capstyle="butt", clip_on=False, zorder=3)
    axes.plot([values.mean()], [0], "o", color="white", markeredgecolor=FLOW, markersize=5, clip_on=False, zorder=4)
    axes.set_xlim(low, high)
    axes.set_ylim(0, None)
    axes.locator_params(axis="x", nbins=4)


# pairs ----------------------------------------------------------------------------------------------------------------


def plot_pairs(
    posterior: Record,
    x: str,
    y: str,
    *,
    compare: Record | None = None,
    transform: Transform | None = None,
    labels: tuple[str, str] | None = None,
) -> Figure:
    """Scatter two scalars against each other, over the raw draws of another guide if one is given.

    Args:
        posterior: what to draw.
        x: the scalar across, ``"mu"`` or ``"theta[3]"``.
        y: the scalar upwards.
        compare: another posterior of the same model, such as :func:`~pyro_flows.diagnose` of a Gaussian guide. What is
            drawn are its raw draws, before any resampling: what that guide would have given by itself.
        transform: functions to apply to sites first, ``{"tau": torch.log}``; axis labels name them.
        labels: names of the two posteriors in the legend; their guides' names by default.

    Raises:
        ValueError: for a name that is no scalar of the posterior, or of ``compare``.
    """
    figure, (axes,) = panels(1, size=(5.4, 5.0))
    names = labels or tuple(_guide_label(each) for each in (posterior, compare) if each is not None)
    clouds = [_points(posterior.samples, (x, y), transform)]
    if compare is not None:
        clouds.append(_points(_raw(compare), (x, y), transform))
    axes.set_xlim(*_limits([cloud[:, 0] for cloud in clouds]))
    axes.set_ylim(*_limits([cloud[:, 1] for cloud in clouds]))
    axes.set_xlabel(_axis_label(x, transform))
    axes.set_ylabel(_axis_label(y, transform))
    across, upwards = clouds[0][:SCATTERED].T
    axes.plot(across, upwards, ".", color=FLOW, alpha=0.5, markersize=3.5, markeredgewidth=0, label=names[0])
    if compare is not None:
        _regions(axes, clouds[1], f"{names[-1]}: 50 % and 90 % of its draws")
        legend = figure.legend(loc="outside lower center", fontsize=8, markerscale=3, frameon=False, ncols=2)
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)
    _title(axes, posterior, f"{_axis_label(x, transform)} and {_axis_label(y, transform)}")
    return figure


def _raw(posterior: Record) -> Mapping[str, Tensor]:
    """Constrained draws as the guide gave them."""
    if not posterior.replaced:
        return posterior.samples
    if posterior.density is None:
        raise ValueError(
            "compare: its raw draws need its model; load(path, model, *args) with the arguments of the fit."
        )
    return posterior.density.constrain(posterior.z)


def _points(samples: Mapping[str, Tensor], labels: Sequence[str], transform: Transform | None) -> np.ndarray:
    """Look up scalars such as ``mu`` and ``theta[3]``, transformed, as columns."""
    columns = []
    for label in labels:
        site = _site(label)
        found = dict(_scalars(samples, site))
        key = re.sub(r",\s*", ", ", label)
        if key not in found:
            shape, example = tuple(samples[site].shape[1:]), next(iter(found))
            raise ValueError(f"{label!r}: expected one scalar; site {site!r} has shape {shape}, so {example!r}, say.")
        function = (transform or {}).get(site)
        values = found[key] if function is None else function(found[key])
        columns.append(values.detach().double().cpu().numpy())
    return np.stack(columns, -1)


def _regions(axes: Axes, points: np.ndarray, label: str) -> None:
    """Draw where 50 % and 90 % of the points lie most densely, by a smoothed histogram over the axes' range."""
    finite = points[np.isfinite(points).all(-1)]
    frame = np.array([axes.get_xlim(), axes.get_ylim()])
    density, across, upwards = np.histogram2d(finite[:, 0], finite[:, 1], bins=BINS, range=frame)
    kernel = np.exp(-0.5 * (np.arange(-3 * SMOOTH, 3 * SMOOTH + 1) / SMOOTH) ** 2)
    for axis in (0, 1):
        density = np.apply_along_axis(np.convolve, axis, density, kernel / kernel.sum(), mode="same")
    inside = ((finite >= frame[:, 0]) & (finite < frame[:, 1])).all(-1)
    cells = (BINS * (finite[inside] - frame[:, 0]) / (frame[:, 1] - frame[:, 0])).astype(int).clip(0, BINS - 1)
    at_points = np.concatenate([density[cells[:, 0], cells[:, 1]], np.zeros(np.count_nonzero(~inside))])
    levels = sorted({float(level) for level in np.quantile(at_points, [0.1, 0.5])}) if len(finite) else []
    if len(levels) == 2 and levels[0] > 0:
        centers = [(edges[1:] + edges[:-1]) / 2 for edges in (across, upwards)]
        axes.contourf(*centers, density.T, levels=[*levels, np.inf], colors=[BASE, BASE], alpha=0.15, zorder=0)
        axes.contour(*centers, density.T, levels=levels, colors=[BASE], linewidths=1.2, zorder=3)
    axes.plot([], [], color=BASE, linewidth=1.2, label=label)


def _site(label: str) -> str:
    return re.sub(r"\[[\d, ]+\]$", "", label)


def _axis_label(label: str, transform: Transform | None) -> str:
    function = (transform or {}).get(_site(label))
    return label if function is None else f"{getattr(function, '__name__', 'transformed')} {label}"


def _limits(layers: Sequence[np.ndarray]) -> tuple[float, float]:
    """Extreme quantiles of all layers, with a margin."""
    bounds = [np.quantile(values[np.isfinite(values)], SHOWN) for values in layers if np.isfinite(values).any()]
    low, high = float(np.min(bounds, initial=np.inf)), float(np.max(bounds, initial=-np.inf))
    if not low < high:
        return (0.0, 1.0) if not bounds else (low - 1.0, high + 1.0)
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _guide_label(posterior: Record) -> str:
    if posterior.flow is not None:
        about = to_json(posterior.flow)
        return f"flow ({about['builder']})" if about else "flow"
    return posterior.guide_name


# shared ---------------------------------------------------------------------------------------------------------------


def _title(axes: Axes, posterior: Record, text: str) -> None:
    status = posterior.verdict.status
    axes.set_title(text, loc="left", fontsize=10, color=INK, fontweight="bold")
    axes.set_title(f"verdict: {status}", loc="right", fontsize=9, color=STATUS_COLORS[status])


def _heading(figure: Figure, posterior: Record, text: str) -> None:
    status = posterior.verdict.status
    figure.suptitle(f"{text} · verdict: {status}", fontsize=10, color=STATUS_COLORS[status], fontweight="bold")
