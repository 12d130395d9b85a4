"""Figures of flows and of data. Matplotlib is imported when the first one is drawn; pyplot is not used.

A notebook shows a figure that is the value of a cell; elsewhere, ``figure.savefig("file.png")`` writes it.
"""

# Over 300 lines: docstrings with examples; the code of one kind of figure stands in one place.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_flows import _checks
from pyro_flows._figures import BASE, FLOW, SHOWN, grid_of, limits, panels, steps, styled
from pyro_flows._seeding import seeded
from pyro_flows.flows.flow import Flow
from pyro_flows.interpolation import interpolate, nearest, scale_spectrum
from pyro_flows.transforms import Chain, DiagonalAffine, LowerTriangularAffine, SinhArcsinh

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 1.9  # inches
LIGHTEST = 0.85  # of the ramp of colors, so that it is seen on white


@styled
def plot_layers(
    flow: Flow,
    *,
    count: int = 3000,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    dims: tuple[int, int] = (0, 1),
    names: tuple[str, str] | None = None,
    width: float = 11.4,
) -> Figure:
    """Draw what each layer of a flow does to draws of the base, colored from left to right where they started.

    Of more than two dimensions, two are shown. A flow inside of a guide ends in layers that bend tails and are affine.

    Args:
        flow: a flow of vectors without context.
        count: number of draws.
        seed: of the draws.
        layers: after how many layers to draw (0: the base); by default after each, at most eleven of them.
        dims: which coordinates to show.
        names: of these, for the axes; without, both axes have the same scale.
        width: inches, of six panels beside each other or fewer.

    Raises:
        ValueError: for a flow of images, of one dimension or with a context, or a layer or coordinate that it does not
            have.

    Cost: one pass of the flow for ``count`` points, layer by layer.

    >>> import pyro_flows as pf
    >>> len(plot_layers(pf.planar(2, layers=3), count=50).axes)
    4
    """
    if len(flow.event_shape) != 1 or flow.dim < 2 or flow.context_dim:
        raise ValueError(f"flow: expected two dimensions or more and no context, got {tuple(flow.event_shape)}.")
    if not all(0 <= dim < flow.dim for dim in dims):
        raise ValueError(f"dims: expected two numbers from 0 to {flow.dim - 1}, got {dims}.")
    stack = _stack(flow.bijection)
    total = len(stack)
    shown = sorted({round(k * total / min(total, 11)) for k in range(min(total, 11) + 1)}) if layers is None else layers
    if not all(0 <= layer <= total for layer in shown):
        raise ValueError(f"layers: expected numbers from 0 to {total}, got {list(shown)}.")
    with torch.no_grad(), seeded(seed, flow._like.device):
        x = flow.base_distribution().sample((count,))
        clouds = [x]
        for layer in stack:
            clouds.append(layer.forward_and_ladj(clouds[-1])[0])
    columns = grid_of(len(shown), width=width, narrowest=1.6, most=6)
    figure, grid = _squares(len(shown), columns=columns, size=min(PANEL, width / columns))
    colors = _ramp(x[:, dims[0]])
    for axes, layer in zip(grid, shown, strict=True):
        _cloud(axes, clouds[layer][:, list(dims)], colors, equal=names is None)
        axes.set_title(_layer_name(stack, layer), loc="center")
    if names is not None:
        figure.supxlabel(names[0], fontsize=9)
        figure.supylabel(names[1], fontsize=9)
    return figure


def _stack(bijection: Any) -> list[Any]:
    """Return the layers of chains, and of chains in them, one by one."""
    return (
        [part for layer in bijection.layers for part in _stack(layer)] if isinstance(bijection, Chain) else [bijection]
    )


def _layer_name(stack: list[Any], layer: int) -> str:
    """Name the state after a layer; the map around a flow is named by what it does."""
    if layer == 0:
        return "base"
    last = stack[layer - 1]
    if isinstance(last, SinhArcsinh) and layer > 1:
        return f"layer {layer}: tails"
    affine = isinstance(last, (DiagonalAffine, LowerTriangularAffine)) and layer > 1
    return f"layer {layer}: affine" if affine else f"layer {layer}"


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
    figure, grid = _squares(len(clouds), columns=len(clouds), size=3.2)
    for axes, cloud, color, name in zip(grid, clouds[::-1], (FLOW, BASE), ("flow", "data"), strict=False):
        _cloud(axes, cloud, color)
        axes.set_title(name, loc="center")
    return figure


@styled
def plot_images(
    images: Tensor, image_shape: Sequence[int] | None = None, *, columns: int | None = None, levels: float = 1.0
) -> Figure:
    """Draw a grid of images with values from 0 to ``levels``; what is outside is shown as the nearest of them.

    Args:
        images: ``(N, H, W)``, ``(N, C, H, W)`` with one or three channels, or flat ``(N, D)``.
        image_shape: (H, W) or (C, H, W), of flat images; squares are guessed.
        columns: of the grid, by default as many as rows.
        levels: the value of white.

    Raises:
        ValueError: for flat images that are no squares and have no ``image_shape``, or another number of channels.

    Cost: O(pixels).

    >>> import torch
    >>> len(plot_images(torch.zeros(4, 8, 8)).axes)
    1
    """
    pictures = _pictures(images, image_shape)
    columns = math.ceil(math.sqrt(len(pictures))) if columns is None else _checks.integer("columns", columns, 1)
    rows = math.ceil(len(pictures) / columns)
    height, width = pictures.shape[1:3]
    sheet = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, pictures.shape[3]))
    for number, picture in enumerate(np.clip(pictures / levels, 0.0, 1.0)):
        top, left = (number // columns) * (height + 1), (number % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = picture
    scale = 0.5 + 0.01 * max(height, width)
    figure, (axes,) = panels(1, size=(columns * scale * width / height, rows * scale))
    axes.imshow(sheet.repeat(3, -1) if sheet.shape[-1] == 1 else sheet, interpolation="nearest")
    axes.set_axis_off()
    return figure


def plot_interpolation(
    flow: Flow, points: Tensor, *, steps: int = 8, image_shape: Sequence[int] | None = None, levels: float = 1.0
) -> Figure:
    """Draw :func:`~pyro_flows.interpolation.interpolate`: a walk between four images, which stand in the corners.

    Cost: that of the walk.

    Raises:
        ValueError: for points of another shape, or a base that is not normal or logistic.

    >>> import torch, pyro_flows as pf
    >>> len(plot_interpolation(pf.realnvp(16), torch.rand(4, 16), steps=3).axes)
    1
    """
    walk = interpolate(flow, points, steps=steps).flatten(0, 1)
    return plot_images(walk, image_shape, columns=steps, levels=levels)


def plot_nearest(
    samples: Tensor,
    training: Tensor,
    *,
    count: int = 4,
    image_shape: Sequence[int] | None = None,
    levels: float = 1.0,
) -> Figure:
    """Draw each sample (left) and the training images nearest to it: has the flow learned its data by heart?

    Cost: all distances between samples and training images.

    Raises:
        ValueError: for flat images that are no squares and have no ``image_shape``.

    >>> import torch
    >>> len(plot_nearest(torch.rand(2, 16), torch.rand(9, 16)).axes)
    1
    """
    found = training[nearest(samples, training, count=count).to(training.device)].to(samples)
    rows = torch.cat([samples.unsqueeze(1), found], 1)
    return plot_images(rows.flatten(0, 1), image_shape, columns=count + 1, levels=levels)


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
    figure, (axes,) = panels(1, size=(5.4, 3.2))
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
    figure, (axes,) = panels(1, size=(6.4, 3.4))
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


# parts ----------------------------------------------------------------------------------------------------------------


def _pictures(images: Tensor, image_shape: Sequence[int] | None) -> np.ndarray:
    """Return the images as (N, H, W, C)."""
    flat = images.shape[-1]
    side = math.isqrt(flat)
    if image_shape is None and images.dim() == 2 and side * side != flat:
        raise ValueError(f"image_shape: {flat} pixels are no square; pass (H, W) or (C, H, W).")
    guessed = (side, side) if images.dim() == 2 else images.shape[1:]
    shape = tuple(guessed if image_shape is None else image_shape)
    channels = shape[0] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or channels not in (1, 3) or math.prod(images.shape[1:]) != math.prod(shape):
        raise ValueError(
            f"images: expected (N, H, W), (N, 1 or 3, H, W) or flat ones of the image_shape, got {tuple(images.shape)}."
        )
    return images.detach().reshape(-1, channels, *shape[-2:]).movedim(1, -1).double().cpu().numpy()


def _squares(count: int, *, columns: int, size: float = PANEL) -> tuple[Figure, list[Axes]]:
    return panels(count, columns=columns, size=(size * columns, (size + 0.2) * math.ceil(count / columns)))


def _cloud(axes: Axes, points: Tensor, colors: Any, *, equal: bool = True) -> None:
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


def _ramp(values: Tensor) -> np.ndarray:
    """A color for each draw by its rank, from dark to light, which color-blind readers can tell apart."""
    import matplotlib

    ranks = values.argsort().argsort().double().cpu().numpy() / max(len(values) - 1, 1)
    return np.asarray(matplotlib.colormaps["viridis"](LIGHTEST * ranks))
