"""Points of a fitted density, its training, and the spectrum of NICE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pyro_flows._figures import BASE, FLOW, WIDTH, panels, steps, styled
from pyro_flows.flows.flow import Flow
from pyro_flows.plots import parts
from pyro_flows.plots.walks import scale_spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def plot_points(points: Tensor, data: Tensor | None = None) -> Figure:
    """Draw points in the plane, beside data if they are given.

    Raises:
        ValueError: for points that are not in the plane.

    Shapes: ``(N, 2)`` both. Cost: O(N).

    >>> import torch
    >>> len(plot_points(torch.zeros(3, 2), torch.zeros(3, 2)).axes)
    2
    """
    clouds = [points] if data is None else [data, points]
    if any(cloud.dim() != 2 or cloud.shape[1] != 2 for cloud in clouds):
        raise ValueError(f"points: expected shape (N, 2), got {[tuple(cloud.shape) for cloud in clouds]}.")
    figure, grid = panels(len(clouds), columns=len(clouds), size=(WIDTH, WIDTH / 2.0))
    for axes, cloud, color, name in zip(grid, clouds[::-1], (FLOW, BASE), ("flow", "data"), strict=False):
        parts.cloud(axes, cloud, color)
        axes.set_title(name, loc="center")
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
