"""Calibration of a fitted density, and its quantiles along one column of the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyro_flows._arguments import numbers
from pyro_flows._figures import BASE, FILLED, FLOW, INK, LINE, WIDTH, panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS, HEIGHT = 3, 2.3  # inches
INSIDE = 0.95  # probability of each pointwise band


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
    columns = min(COLUMNS, dim)
    figure, grid = panels(dim, columns=columns, size=(WIDTH, HEIGHT * -(-dim // columns) + 0.4))
    u = np.linspace(0.0, 1.0, 201)
    low, high = (binom.ppf(0.5 + side * 0.5 * INSIDE, count, u) / count - u for side in (-1.0, 1.0))
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
