"""Replicates of the data against the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pyro_flows.inference.record import Record
from pyro_flows.posterior.export.arviz_groups import predictive_groups
from pyro_flows.posterior.plots import parts
from pyro_flows.posterior.plots.parts import Names
from pyro_flows.support import arviz
from pyro_flows.support.figures import FLOW, INK, SHOWN, WIDTH, grid_of, panels, styled

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID = 120  # values at which distribution functions are compared


@styled
def plot_predictive(
    posterior: Record,
    var_names: Names = None,
    *,
    filter_vars: str | None = None,
    coords: Mapping[str, object] | None = None,
    width: float = WIDTH,
) -> Figure:
    """Draw the distribution function of the data (line) over those of replicates drawn from the posterior (bands).

    The bands hold the middle 50 % and 89 % of the replicates' functions at each value, without smoothing. Functions of
    counts step at whole numbers. Data that the model could have made stay within the bands nearly everywhere.

    Args:
        posterior: what to draw.
        var_names: observed sites, as in ArviZ; all by default.
        filter_vars: ``"like"`` or ``"regex"``: how names are matched, as in ArviZ.
        coords: labels to show, as in ArviZ.
        width: inches.

    Raises:
        ValueError: for a name or label that is not there; if the model observes nothing or cannot draw its data; if a
            loaded posterior has neither a model nor replicates.

    Reference: Gabry et al. 2019, *Visualization in Bayesian workflow* (arXiv 1709.01449).

    Cost: a second at most; the figure is drawn when it is shown or saved.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide = lambda y: pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
    >>> posterior = pf.diagnose(model, guide, torch.tensor(1.0), draws=400)
    >>> len(pf.plots.plot_predictive(posterior).axes)
    1
    """
    data, replicates = predictive_data(posterior, var_names, filter_vars=filter_vars, coords=coords)
    count = len(data)
    columns = grid_of(count, width=width, narrowest=3.0, most=3)
    figure, grid = panels(count, columns=columns, size=(width, 2.7 * math.ceil(count / columns) + 0.6))
    for axes, name in zip(grid, data, strict=True):
        handles = _compare(axes, name, data[name], replicates[name])
    names = ["data", "replicates, middle 50 %", "and 89 %"]
    figure.legend(handles, names, loc="outside lower center", ncols=1 if width < parts.NARROW else 3)
    doubt = " · draws unreliable" if posterior.verdict.status == "unreliable" else ""
    figure.suptitle(f"Data and replicates{doubt}", color=INK, fontweight="bold")
    return figure


def predictive_data(
    posterior: Record,
    var_names: Names = None,
    *,
    filter_vars: str | None = None,
    coords: Mapping[str, object] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the data (N,) and replicates (R, N) of each observed site, the same entries of both."""
    observed, replicates = predictive_groups(posterior, 500)
    chosen = arviz.select(replicates, var_names, filter_vars, coords)
    names = [str(name) for name in chosen.data_vars if name in observed]
    wanted = {dim: chosen[dim] for dim in (coords or {}) if dim in observed.dims}
    observed = observed.sel(wanted)
    data = {name: observed[name].to_numpy().astype(float).ravel() for name in names}
    drawn = {name: chosen[name].to_numpy().astype(float).reshape(-1, len(data[name])) for name in names}
    return data, drawn


def _compare(axes: Axes, name: str, data: np.ndarray, replicates: np.ndarray) -> list[Artist]:
    low, high = _range(data, replicates)
    counts = parts.whole([data, replicates])
    values = np.linspace(low, high, GRID)
    if counts:  # distribution functions of counts step at whole numbers
        step = max(1, round((high - low) / (4 * GRID)))
        values = np.concatenate([[low], np.arange(math.ceil(low), high, step), [high]])
    own = np.searchsorted(np.sort(data), values, side="right") / len(data)
    ordered = np.sort(replicates, axis=1)
    others = np.stack([np.searchsorted(row, values, side="right") for row in ordered]) / len(data)
    bands = []
    for quantiles, alpha in ((parts.INTERVAL, 0.2), (parts.INNER, 0.45)):
        lower, upper = np.quantile(others, quantiles, axis=0)
        bands.append(axes.fill_between(values, lower, upper, step="post", color=FLOW, alpha=alpha, linewidth=0))
    (line,) = axes.step(values, own, where="post", color=INK, linestyle="-", linewidth=1.4)
    axes.set(xlim=(low, high), ylim=(0, 1.02), xlabel=parts.plain(name), ylabel="share at most this large")
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=5, integer=counts)
    return [line, bands[1], bands[0]]


def _range(data: np.ndarray, replicates: np.ndarray) -> tuple[float, float]:
    """Return where the data lie, and where most replicates do."""
    finite = replicates[np.isfinite(replicates)]
    bounds = np.quantile(finite, SHOWN) if len(finite) else [np.nan, np.nan]
    low, high = float(np.nanmin([data.min(), bounds[0]])), float(np.nanmax([data.max(), bounds[1]]))
    margin = 0.03 * (high - low) or 1.0
    return low - margin, high + margin
