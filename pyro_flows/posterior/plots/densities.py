"""Points of a fitted density, its training, its calibration and quantiles, and the spectrum of NICE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.posterior.plots import parts
from pyro_flows.posterior.plots.walks import scale_spectrum
from pyro_flows.support.arguments import numbers
from pyro_flows.support.figures import BASE, FILLED, FLOW, INK, LINE, WIDTH, limits, panels, steps, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 8  # of a table, at most: each has a histogram


@styled
def plot_points(points: Tensor, data: Tensor | None = None) -> Figure:
    """Draw points in the plane, beside data if they are given; of 1 or 3 to 8 columns, a histogram of each.

    Raises:
        ValueError: for points of more columns, or of others than the data.

    Shapes: ``(N, D)`` both. Cost: O(N D).

    >>> import torch
    >>> len(plot_points(torch.zeros(3, 2), torch.zeros(3, 2)).axes)
    2
    """
    clouds = [points] if data is None else [data, points]
    shapes = [tuple(cloud.shape) for cloud in clouds]
    if any(len(shape) != 2 or not 1 <= shape[1] <= COLUMNS or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"points: expected shape (N, D) with D up to {COLUMNS}, as the data's, got {shapes}.")
    if shapes[0][1] != 2:
        return _histograms(clouds[::-1])
    figure, grid = panels(len(clouds), columns=len(clouds), size=(WIDTH, WIDTH / 2.0))
    for axes, cloud, color, name in zip(grid, clouds[::-1], (FLOW, BASE), ("flow", "data"), strict=False):
        parts.cloud(axes, cloud, color)
        axes.set_title(name, loc="center")
    return figure


def _histograms(clouds: Sequence[Tensor]) -> Figure:
    columns = [[cloud[:, place].double().cpu().numpy() for cloud in clouds] for place in range(clouds[0].shape[1])]
    across = min(len(columns), 4)
    figure, grid = panels(len(columns), columns=across, size=(WIDTH, 2.4 * math.ceil(len(columns) / across)))
    for place, (axes, layers) in enumerate(zip(grid, columns, strict=True)):
        bins = parts.edges(*limits(layers), layers, 41)
        handles = [
            parts.histogram(axes, values, bins, filled=len(layers) == 1, number=number)
            for number, values in enumerate(layers)
        ]
        axes.set_title(f"column {place}", loc="center")
        axes.set_yticks([])
    if len(clouds) > 1:
        grid[0].legend(handles, ["flow", "data"])
    return figure


@styled
def plot_spectrum(flow: Flow) -> Figure:
    r"""Draw the spectrum of NICE's scaling layer, :math:`e^{s_d}` from noise to data, largest first.

    Few large values: the data lie near a manifold of few dimensions.

    Cost: O(D log D). Source: Dinh, Krueger and Bengio 2015 (arXiv 1410.8516), section 5.1.

    Raises:
        ValueError: for a flow without a scaling layer.

    >>> import pyro_flows as pf
    >>> plot_spectrum(pf.nice(3)).axes[0].get_ylabel() != ""
    True
    """
    values = scale_spectrum(flow).double().cpu().numpy()
    figure, (axes,) = panels(1, size=(WIDTH, 3.4))
    axes.plot(np.arange(1, len(values) + 1), values, color=FLOW, linewidth=1.5)
    axes.set_yscale("log")
    axes.set_xlabel("latent, most important first")
    axes.set_ylabel("scale of the latent in the data")
    return figure


@styled
def plot_losses(losses: Tensor, checks: Tensor) -> Figure:
    """Draw the mean log density of minibatches, and of held-out points by the averaged weights, in nats.

    Args:
        losses: ``(steps,)``, as :attr:`DensityFit.losses` has them.
        checks: ``(count, 2)``, as :attr:`DensityFit.checks` has them. Cost: O(steps).

    Raises:
        ValueError: for no losses.

    >>> import torch
    >>> len(plot_losses(torch.ones(20), torch.tensor([[10.0, -1.0], [20.0, -0.9]])).axes)
    1
    """
    figure, (axes,) = panels(1, size=(WIDTH, 3.4))
    values = -losses.double().cpu().numpy()
    if not len(values):
        raise ValueError("losses: expected those of a training, got none.")
    steps(axes, values, BASE, "minibatches")
    finite = values[np.isfinite(values)]
    low = np.quantile(finite, 0.25) if len(finite) else 0.0
    if len(checks):
        at, held_out = checks.double().cpu().numpy().T
        axes.plot(at, held_out, color=FLOW, linewidth=1.8, label="held out, averaged weights")
        low = min(low, np.quantile(held_out, 0.25))
        finite = np.concatenate([finite, held_out])
    high = finite.max(initial=low)
    axes.set_ylim(low - 0.5 * (high - low) - 1e-6, high + 0.1 * (high - low) + 1e-6)
    axes.set_xlabel("optimization step")
    axes.set_ylabel("mean log density (nats)")
    axes.legend(loc="lower right")
    return figure


@styled
def plot_pit(pit: object, names: Sequence[str] | None = None) -> Figure:
    r"""Draw the distribution function of probability integral transforms, less that of a uniform distribution.

    A calibrated density stays inside the band, :math:`\hat F(u) - u` of uniform numbers with probability .95 at each
    u (quantiles of a binomial distribution). A line that rises, then falls below 0: the density is too wide. One that
    falls first: it is too narrow.

    Args:
        pit: values between 0 and 1, (N,) or (N, D), as :meth:`DensityFit.pit` returns them.
        names: of the D coordinates.

    Raises:
        ValueError: for values outside of [0, 1].

    Cost: O(N log N). Reference: Gneiting, Balabdaoui and Raftery 2007, doi:10.1111/j.1467-9868.2007.00587.x.

    >>> import torch
    >>> plot_pit(torch.linspace(0.01, 0.99, 50)).axes[0].get_xlabel()
    'probability integral transform'
    """
    from scipy.stats import binom

    values = numbers("pit", pit).double().cpu().numpy()
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or not len(values) or not ((values >= 0.0) & (values <= 1.0)).all():
        raise ValueError("pit: expected numbers from 0 to 1 of shape (N,) or (N, D).")
    count, dim = values.shape
    columns = min(3, dim)
    figure, grid = panels(dim, columns=columns, size=(WIDTH, 2.3 * -(-dim // columns) + 0.4))
    u = np.linspace(0.0, 1.0, 201)
    low, high = (binom.ppf(0.5 + side * 0.475, count, u) / count - u for side in (-1.0, 1.0))
    for place, (axes, column) in enumerate(zip(grid, values.T, strict=False)):
        off = np.searchsorted(np.sort(column), u, side="right") / count - u
        axes.fill_between(u, low, high, color=FLOW, alpha=FILLED, lw=0)
        axes.axhline(0.0, color=LINE, lw=0.8)
        axes.plot(u, off, color=FLOW, lw=1.4)
        if dim > 1 or names is not None:
            axes.set_title(str(names[place]) if names is not None else f"coordinate {place}", fontsize=8, color=INK)
        axes.set_xlim(0.0, 1.0)
        axes.set_xlabel("probability integral transform")
    grid[0].set_ylabel("ECDF difference")
    return figure


@styled
def plot_quantiles(x: object, quantiles: object, levels: object, y: object = None, *, name: str = "x") -> Figure:
    """Draw quantiles of one output along x: bands between a level and its opposite one, a line for the median.

    Args:
        x: (N,), one column of the context, in any order.
        quantiles: (N, levels) or (N, levels, 1), as :meth:`DensityFit.quantiles` returns them.
        levels: their probabilities, in rising order.
        y: data (N,) to be drawn as points, if they are given.
        name: label of the axis.

    Raises:
        ValueError: for shapes that do not fit, or levels that do not rise.

    Cost: O(N log N).

    >>> import torch
    >>> band = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0]])
    >>> plot_quantiles(torch.arange(2.0), band, [0.1, 0.5, 0.9]).axes[0].get_xlabel()
    'x'
    """
    at, found, chosen = (
        numbers(what, of).double().cpu() for what, of in (("x", x), ("quantiles", quantiles), ("levels", levels))
    )
    found = found[..., 0] if found.dim() == 3 and found.shape[-1] == 1 else found
    at = at.reshape(-1)
    if found.shape != (len(at), len(chosen)) or bool((chosen.diff() <= 0).any()):
        raise ValueError(
            f"quantiles: expected shape ({len(at)}, {len(chosen)}) and rising levels, got {tuple(found.shape)}."
        )
    order = torch.argsort(at)
    place, lines = at[order].numpy(), found[order].numpy()
    figure, (axes,) = panels(1, size=(WIDTH, 3.6))
    if y is not None:
        points = numbers("y", y).double().cpu().reshape(-1)
        if points.shape != at.shape:
            raise ValueError(f"y: expected one output for each of {len(at)} points, got shape {tuple(points.shape)}.")
        axes.plot(at.numpy(), points.numpy(), ".", color=BASE, ms=2.5, alpha=0.5)
    count = len(chosen)
    for number in range(count // 2):
        axes.fill_between(place, lines[:, number], lines[:, count - 1 - number], color=FLOW, alpha=FILLED, lw=0)
    if count % 2:
        axes.plot(place, lines[:, count // 2], color=FLOW, lw=1.5)
    axes.set_xlabel(name)
    axes.set_ylabel(f"quantiles {chosen[0]:g} to {chosen[-1]:g}")
    return figure
