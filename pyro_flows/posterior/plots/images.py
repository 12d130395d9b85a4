"""Grids of images, of walks between images, and of samples beside their nearest training images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_flows.flows.flow import Flow
from pyro_flows.posterior.plots.walks import interpolate, nearest
from pyro_flows.support.figures import WIDTH, panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    columns = math.ceil(math.sqrt(len(pictures))) if columns is None else columns
    rows = math.ceil(len(pictures) / columns)
    height, width = pictures.shape[1:3]
    sheet = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, pictures.shape[3]))
    for number, picture in enumerate(np.clip(pictures / levels, 0.0, 1.0)):
        top, left = (number // columns) * (height + 1), (number % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = picture
    figure, (axes,) = panels(1, size=(WIDTH, WIDTH * min(1.0, sheet.shape[0] / sheet.shape[1])))
    axes.imshow(sheet.repeat(3, -1) if sheet.shape[-1] == 1 else sheet, interpolation="nearest")
    axes.set_axis_off()
    return figure


def plot_interpolation(
    flow: Flow, points: Tensor, *, steps: int = 8, image_shape: Sequence[int] | None = None, levels: float = 1.0
) -> Figure:
    """Draw :func:`~pyro_flows.posterior.plots.interpolate`: a walk between four images, which stand in the corners.

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
