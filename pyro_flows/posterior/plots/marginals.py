"""Marginals: of one posterior, of several over each other, and of the prior behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pyro_flows.inference.record import Record
from pyro_flows.posterior.export.arviz_groups import posterior_group as used
from pyro_flows.posterior.export.arviz_groups import prior_group
from pyro_flows.posterior.plots import parts
from pyro_flows.posterior.plots.parts import Names, Posteriors, common, named, scalars_of
from pyro_flows.support.figures import INK, SHOWN, WIDTH, color_of, grid_of, panels, styled

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 45
LETTERS = 11  # of a title, an inch
STEP = 0.06  # of a panel's height between the bars of two posteriors


@styled
def plot_posterior(
    posterior: Posteriors,
    var_names: Names = None,
    *,
    filter_vars: str | None = None,
    coords: Mapping[str, object] | None = None,
    max_panels: int = 24,
    width: float = WIDTH,
) -> Figure:
    """Draw the marginal histogram of each scalar, with its mean and central 89 % interval; one panel a scalar.

    Several posteriors of one model, such as those of a flow, of a Gaussian guide and of NUTS, are drawn over each
    other: the draws to use of each, in outlines.

    Args:
        posterior: what to draw; several by name, ``{"flow": posterior, "NUTS": chains}``.
        var_names: variables to show, as in ArviZ (``"~eta"``: all but that one); all by default.
        filter_vars: ``"like"`` or ``"regex"``: how names are matched, as in ArviZ.
        coords: labels to show, ``{"school": ["Choate"]}``, as in ArviZ.
        max_panels: how many scalars at most; the title says how many there are.
        width: inches; with 3.7 it is read on a phone.

    Cost: a second at most; the figure is drawn when it is shown or saved.

    Raises:
        ValueError: for a name or a label that is not there.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model():
    ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))
    >>> posterior = pf.diagnose(model, lambda: pyro.sample("x", dist.Normal(0.5, 0.7)), draws=500)
    >>> len(pf.plots.plot_posterior(posterior, "x").axes)
    1
    """
    posteriors = named(posterior)
    layers = {name: scalars_of(used(each), var_names, filter_vars, coords) for name, each in posteriors.items()}
    return _grid(posteriors, layers, "Posterior marginals", max_panels=max_panels, width=width)


@styled
def plot_prior_posterior(
    posterior: Record,
    var_names: Names = None,
    *,
    filter_vars: str | None = None,
    coords: Mapping[str, object] | None = None,
    max_panels: int = 24,
    width: float = WIDTH,
) -> Figure:
    """Draw each marginal of the posterior over that of the prior (dashed): what the data have taught.

    The horizontal axis is the posterior's, and as much of the prior's as leaves the posterior wide enough to see.

    Args:
        posterior: what to draw.
        var_names: as in :func:`plot_posterior`.
        filter_vars: likewise.
        coords: likewise.
        max_panels: likewise.
        width: inches.

    Raises:
        ValueError: for a name or a label that is not there, an improper prior, which has no draws, and a posterior that
            was loaded without a model and saved without prior draws.

    Cost: a second at most; the figure is drawn when it is shown or saved.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide = lambda y: pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
    >>> posterior = pf.diagnose(model, guide, torch.tensor(1.0), draws=400)
    >>> len(pf.plots.plot_prior_posterior(posterior, "mu").axes)
    1
    """
    posteriors = named(posterior)
    prior = scalars_of(prior_group(posterior), var_names, filter_vars, coords)
    layers = {name: scalars_of(used(each), var_names, filter_vars, coords) for name, each in posteriors.items()}
    return _grid(posteriors, layers, "Prior and posterior", max_panels=max_panels, width=width, prior=prior)


def _grid(
    posteriors: Mapping[str, Record],
    layers: Mapping[str, Mapping[str, np.ndarray]],
    text: str,
    *,
    max_panels: int,
    width: float,
    prior: Mapping[str, np.ndarray] | None = None,
) -> Figure:
    """Draw a panel for each scalar that all layers have."""
    labels = common(layers if prior is None else {**layers, "prior": prior})
    shown = labels[:max_panels]
    columns = grid_of(len(shown), width=width, narrowest=1.7, most=4)
    height = max(1.55, min(2.4, 0.45 * width / columns))  # inches of a panel
    foot = 0.5 if len(layers) == 1 and prior is None else 0.9
    figure, grid = panels(len(shown), columns=columns, size=(width, height * math.ceil(len(shown) / columns) + foot))
    letters = int(LETTERS * width / columns)
    handles: list[Artist] = []
    for axes, label in zip(grid, shown, strict=True):
        values = [layer[label] for layer in layers.values()]
        axes.set_title(parts.short(label, letters, whole=letters), loc="left", pad=3)
        handles = _marginal(axes, values, None if prior is None else prior[label]) or handles
    names = parts.with_status(posteriors) if prior is None else ["posterior", "prior"]
    parts.foot(figure, "bar: central 89 %; dot: mean", handles, names, columns=int(width / 1.8))
    parts.heading(figure, posteriors, text + parts.cut(shown, labels))
    return figure


def _marginal(axes: Axes, layers: list[np.ndarray], prior: np.ndarray | None) -> list[Artist]:
    """Draw one scalar of all layers; return what a legend needs."""
    layers = [values[np.isfinite(values)] for values in layers]
    parts.silence(axes)
    spread = [values for values in layers if len(values) and np.ptp(values) > 0]
    if not spread and parts.constant(axes, layers[0]):
        return []
    low, high = _range(spread, prior)
    bins = parts.edges(low, high, layers, BINS)
    low, high = bins[0], bins[-1]
    alone = len(layers) == 1
    handles = [parts.histogram(axes, values, bins, filled=alone, number=i) for i, values in enumerate(layers)]
    if prior is not None:
        handles.append(_outline(axes, prior, bins))
    top = axes.get_ylim()[1]
    for number, values in enumerate(layers):
        if len(values):
            parts.interval(axes, values, -STEP * number * top, color_of(number)[0])
    axes.set_xlim(low, high)
    axes.set_ylim(-STEP * (len(layers) - 1) * top, None)
    parts.ticks(axes, 4, integer=parts.whole(layers))
    return handles


def _range(layers: list[np.ndarray], prior: np.ndarray | None) -> tuple[float, float]:
    """Return where the layers lie, and the prior, up to a range of the layers on either side of them."""
    bounds = np.array([np.quantile(values, SHOWN) for values in layers])
    low, high = float(bounds[:, 0].min()), float(bounds[:, 1].max())
    finite = np.array([]) if prior is None else prior[np.isfinite(prior)]
    if len(finite):
        left, right = np.quantile(finite, SHOWN)
        wide = high - low
        low, high = max(min(low, left), low - wide), min(max(high, right), high + wide)
    return low, high


def _outline(axes: Axes, prior: np.ndarray, bins: np.ndarray) -> Artist:
    """Draw the prior, of which few draws may lie in the range, by wider bins."""
    wider = bins if parts.whole([prior]) else np.linspace(bins[0], bins[-1], BINS // 2)
    heights, _ = np.histogram(prior, bins=wider)
    return axes.stairs(heights / len(prior) / np.diff(wider), wider, color=INK, linestyle=(0, (2, 2)), linewidth=1.2)
