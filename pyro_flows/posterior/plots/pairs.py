"""Pairs of scalars against each other."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_flows.inference.record import Record
from pyro_flows.posterior.export.arviz_groups import posterior_group as used
from pyro_flows.posterior.plots import parts
from pyro_flows.posterior.plots.parts import (
    Names,
    Posteriors,
    Transform,
    axis_label,
    common,
    named,
    raw,
    raw_label,
    scalar,
    scalars_of,
    transformed,
    variable,
)
from pyro_flows.support.figures import FLOW, WIDTH, color_of, limits, opaque, panels, styled

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCATTERED = 2000  # points at most
BINS = 40
Layer = dict[str, np.ndarray]


@styled
def plot_pairs(
    posterior: Posteriors,
    *scalars: str,
    var_names: Names = None,
    filter_vars: str | None = None,
    coords: Mapping[str, object] | None = None,
    compare: Record | None = None,
    transform: Transform | None = None,
    labels: Sequence[str] | None = None,
    max_scalars: int = 6,
    width: float = WIDTH,
) -> Figure:
    """Scatter scalars against each other: two in one panel, more in a triangle of panels with their marginals.

    Of several posteriors, the first one is scattered, and lines enclose the regions in which 50 % and 90 % of the draws
    of each lie most densely.

    Args:
        posterior: what to draw; several by name, ``{"flow": posterior, "NUTS": chains}``.
        scalars: ``"mu"``, ``"theta[Choate]"``, ``"theta[3]"``; by default all that the next three choose.
        var_names: variables, as in ArviZ.
        filter_vars: ``"like"`` or ``"regex"``: how names are matched, as in ArviZ.
        coords: labels to show, as in ArviZ.
        compare: another posterior of the same model, such as :func:`~pyro_flows.diagnose` of a Gaussian guide. What is
            drawn are its raw draws, before any resampling: what that guide would have given by itself.
        transform: functions to apply to variables first, ``{"tau": torch.log}``; axis labels name them.
        labels: names of ``posterior`` and ``compare`` in the legend; by default their methods, or the guides' names.
        max_scalars: how many at most; the title says how many there are.
        width: inches.

    Raises:
        ValueError: for a name that is no scalar of the posterior, or of another one, and for fewer than two scalars.

    Cost: a second at most; the figure is drawn when it is shown or saved.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    ...     pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)
    >>> guide = lambda y: pyro.sample("mu", dist.Normal(y / 1.01, 1.01**-0.5).to_event(1))
    >>> posterior = pf.diagnose(model, guide, torch.tensor([0.4, 1.3]), draws=400)
    >>> len(pf.plots.plot_pairs(posterior, "mu[0]", "mu[1]").axes)
    1
    """
    posteriors = named(posterior)
    datasets = {name: used(each) for name, each in posteriors.items()}
    if compare is not None:
        names = list(labels or (next(iter(posteriors)), raw_label(compare)))
        names = names if names[0] != names[-1] else [names[0], f"{names[-1]}, raw"]
        datasets = {names[0]: next(iter(datasets.values())), names[1]: raw(compare)}
        posteriors = {names[0]: next(iter(posteriors.values())), names[1]: compare}
    if scalars:
        layers = {name: {each: scalar(draws, each, transform) for each in scalars} for name, draws in datasets.items()}
    else:
        chosen = {name: scalars_of(draws, var_names, filter_vars, coords) for name, draws in datasets.items()}
        layers = {
            name: {label: transformed(values, variable(label), transform) for label, values in layer.items()}
            for name, layer in chosen.items()
        }
    every = common(layers)
    if len(every) < 2:
        raise ValueError(f"posterior: expected two scalars or more, got {every[0]!r}. Name others.")
    shown = every[:max_scalars]
    titles = {label: axis_label(label, transform) for label in shown}
    if len(shown) == 2:
        return _single(posteriors, layers, titles, width)
    return _triangle(posteriors, layers, titles, width, "Pairs" + parts.cut(shown, every))


def _single(
    posteriors: Mapping[str, Record], layers: Mapping[str, Layer], titles: dict[str, str], width: float
) -> Figure:
    figure, (axes,) = panels(1, size=(width, min(0.93 * width, 4.8)))
    handles = _panel(axes, list(layers.values()), *titles, size=3.5)
    for label, name in zip(titles.values(), ("x", "y"), strict=True):
        axes.set(**{f"{name}label": parts.plain(label)})
    if len(layers) > 1:
        first, *others = parts.with_status(posteriors)
        names = [f"{first}: all draws, 50 % and 90 %", *(f"{name}: 50 % and 90 % of its draws" for name in others)]
        most = int(11 * width)  # letters of a line
        narrow = width < parts.NARROW or len(names) > 2 or sum(map(len, names)) > most
        names = [textwrap.fill(name.replace(" %", "\xa0%"), most).replace("\xa0", " ") for name in names]
        opaque(figure.legend(handles, names, loc="outside lower center", markerscale=3, ncols=1 if narrow else 2))
    text = " and ".join(titles.values())
    if len(posteriors) > 1 or width < parts.NARROW:
        parts.heading(figure, posteriors, text)
    else:
        parts.title(axes, next(iter(posteriors.values())), text)
    return figure


def _triangle(
    posteriors: Mapping[str, Record], layers: Mapping[str, Layer], titles: dict[str, str], width: float, text: str
) -> Figure:
    """Draw marginals along the diagonal, and pairs below it."""
    count, names = len(titles), list(titles)
    figure, grid = panels(count**2, columns=count, size=(width, width * 0.95 + 0.4 * (len(layers) > 1)))
    handles: list[Artist] = []
    for number, axes in enumerate(grid):
        row, column = divmod(number, count)
        axes.set_visible(row >= column)
        if row == column:
            _diagonal(axes, [layer[names[row]] for layer in layers.values()])
        elif row > column:
            handles = _panel(axes, list(layers.values()), names[column], names[row], size=2.5)
        axes.locator_params(nbins=3)
        axes.tick_params(labelbottom=row == count - 1, labelleft=column == 0 < row, labelsize=7)
        if row == count - 1:
            lines = [parts.short(titles[names[column]]), parts.ticks(axes, 3)]
            axes.set_xlabel("\n".join(filter(None, lines)), fontsize=7)
            axes.xaxis.offsetText.set_visible(False)  # it would lie over the name
        if column == 0 < row:
            axes.set_ylabel(parts.short(titles[names[row]]), fontsize=7)
    if len(layers) > 1:
        names = list(map(parts.plain, layers))
        opaque(figure.legend(handles, names, loc="outside lower center", ncols=len(layers), markerscale=3))
    figure.align_ylabels([axes for axes in grid if axes.get_ylabel()])
    parts.heading(figure, dict([next(iter(posteriors.items()))]) if len(layers) == 1 else posteriors, text)
    return figure


def _panel(axes: Axes, layers: list[Layer], x: str, y: str, *, size: float) -> list[Artist]:
    """Scatter the first layer, and enclose all if there are several; return what a legend needs."""
    clouds = [np.stack([layer[x], layer[y]], -1) for layer in layers]
    axes.set_xlim(*limits([cloud[:, 0] for cloud in clouds]))
    axes.set_ylim(*limits([cloud[:, 1] for cloud in clouds]))
    step = max(1, math.ceil(len(clouds[0]) / SCATTERED))  # of draws of all chains, which stand one after the other
    across, upwards = clouds[0][::step].T
    handles: list[Artist] = [
        *axes.plot(across, upwards, ".", color=FLOW, alpha=0.5, markersize=size, markeredgewidth=0, rasterized=True)
    ]
    if len(clouds) > 1:
        handles += [parts.regions(axes, cloud, number, color_of(number)[0]) for number, cloud in enumerate(clouds)][1:]
    return handles


def _diagonal(axes: Axes, layers: list[np.ndarray]) -> None:
    parts.silence(axes)
    layers = [values[np.isfinite(values)] for values in layers]
    spread = [values for values in layers if len(values) and np.ptp(values) > 0]
    if not spread and parts.constant(axes, layers[0]):
        return
    low, high = limits(spread)
    bins = parts.edges(low, high, spread, BINS)
    for number, values in enumerate(layers):
        parts.histogram(axes, values, bins, filled=len(layers) == 1, number=number)
    axes.set_xlim(bins[0], bins[-1])
    axes.set_ylim(0, None)
