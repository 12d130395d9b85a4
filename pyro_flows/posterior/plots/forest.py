"""A forest of intervals: raw, corrected and refined draws of one posterior, or several posteriors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pyro_flows.inference.record import Record
from pyro_flows.inference.verdict.weighing import resample
from pyro_flows.posterior.export.arviz_groups import named_draws
from pyro_flows.posterior.export.arviz_groups import posterior_group as used
from pyro_flows.posterior.plots import parts
from pyro_flows.posterior.plots.parts import Names, Posteriors, common, named, raw, raw_label, scalars_of
from pyro_flows.support import checks
from pyro_flows.support.figures import INK, LINE, WIDTH, color_of, panels, styled

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CORRECTED, REFINED = "corrected: importance-resampled", "refined: Markov chains"


@styled
def plot_forest(
    posterior: Posteriors,
    var_names: Names = None,
    *,
    filter_vars: str | None = None,
    coords: Mapping[str, object] | None = None,
    draws: str = "used",
    max_rows: int = 40,
    width: float = WIDTH,
) -> Figure:
    """Draw the mean (dot), central half (thick line) and central 89 % (thin line) of each scalar.

    These are the draws to use. With ``draws="all"``, a posterior's raw draws, those corrected by importance weights,
    and those refined by Markov chains, as far as there are any, stand below each other: what the correction changed.

    Args:
        posterior: what to draw; several by name, ``{"flow": posterior, "NUTS": chains}``.
        var_names: variables to show, as in ArviZ; all by default.
        filter_vars: ``"like"`` or ``"regex"``: how names are matched, as in ArviZ.
        coords: labels to show, as in ArviZ.
        draws: ``"used"``, or ``"all"`` for one posterior.
        max_rows: how many scalars at most; the title says how many there are.
        width: inches.

    Raises:
        ValueError: for a name or a label that is not there, for all draws of several posteriors, or if raw draws take a
            model that the posterior has not.

    Cost: a second at most; the figure is drawn when it is shown or saved.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide = lambda y: pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
    >>> posterior = pf.diagnose(model, guide, torch.tensor(1.0), draws=400)
    >>> len(pf.plots.plot_forest(posterior).axes)
    1
    """
    posteriors = named(posterior)
    everything = checks.choice("draws", draws, ("used", "all")) == "all"
    if everything and len(posteriors) > 1:
        raise ValueError(f"draws: expected 'used' for {len(posteriors)} posteriors; 'all' shows those of one.")
    first = next(iter(posteriors.values()))
    datasets = _stages(first) if everything else {name: used(each) for name, each in posteriors.items()}
    layers = {name: scalars_of(draws, var_names, filter_vars, coords) for name, draws in datasets.items()}
    labels = common(layers)
    shown = labels[:max_rows]
    lines = len(shown) * (len(layers) + 0.8)
    figure, (axes,) = panels(1, size=(width, 0.17 * lines + 1.0 + 0.2 * len(layers)))
    handles = _rows(axes, [[layer[label] for layer in layers.values()] for label in shown])
    axes.set_yticks(range(len(shown)), list(map(parts.plain, shown)))
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    names = list(layers) if everything else parts.with_status(posteriors)
    parts.foot(figure, "dot: mean; lines: central 50 % and 89 %", handles, names, columns=1)
    parts.heading(figure, posteriors, "Forest" + parts.cut(shown, labels))
    return figure


def _stages(posterior: Record) -> dict[str, xr.Dataset]:
    """Return the draws of one posterior before and after what corrected them."""
    status = posterior.verdict.status
    if posterior.density is None and posterior._replaced and "raw_posterior" not in (posterior._stored or ({},))[0]:
        return {status: used(posterior)}
    has_guide = posterior.guide_name and bool(posterior.log_q.isfinite().any())
    found = {f"raw: {raw_label(posterior)}": raw(posterior)} if has_guide else {}
    if status == "refined" and posterior.density is not None and bool(posterior.log_weights.isfinite().any()):
        index = resample(posterior.log_weights, len(posterior.z), seed=int(posterior.settings["seed"]))
        found[CORRECTED] = named_draws(posterior, posterior._need_density().constrain(posterior.z[index]))
    if posterior._replaced:
        found[CORRECTED if posterior.resampled else REFINED] = used(posterior)
    return found or {"draws": used(posterior)}


def _rows(axes: Axes, rows: list[list[np.ndarray]]) -> list[Artist]:
    """Draw the intervals of each scalar, one line a layer; return what a legend needs."""
    handles: dict[int, Artist] = {}
    for place, layers in enumerate(rows):
        for number, values in enumerate(layers):
            finite = values[np.isfinite(values)]
            if not len(finite):
                continue
            color, _ = color_of(number)
            height = place + (number - (len(layers) - 1) / 2) * 0.8 / max(len(layers), 1)
            draw = partial(axes.plot, color=color, linestyle="-", solid_capstyle="butt")
            draw(np.quantile(finite, parts.INTERVAL), [height] * 2, linewidth=1.0)
            (handles[number],) = draw(np.quantile(finite, parts.INNER), [height] * 2, linewidth=3.0)
            axes.plot([finite.mean()], [height], "o", color="white", markeredgecolor=color, markersize=4, zorder=3)
        if place:
            axes.axhline(place - 0.5, color=LINE, linewidth=0.3, zorder=0)
    low, high = axes.get_xlim()
    if low < 0 < high:
        axes.axvline(0.0, color=INK, linewidth=0.6, linestyle=(0, (1, 2)), zorder=0)
    return [handles[number] for number in sorted(handles)]
