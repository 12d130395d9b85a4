"""What each layer of a flow does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.inference.record import Record
from pyro_flows.posterior.plots import parts
from pyro_flows.support import checks
from pyro_flows.support.figures import WIDTH, grid_of, panels, styled
from pyro_flows.support.process.seeding import seeded
from pyro_flows.transforms import Bijection, Compose, DiagonalAffine, LowerTriangularAffine, SinhArcsinh

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def plot_layers(
    flow: Flow | Record,
    x: str | int | None = None,
    y: str | int | None = None,
    *,
    layers: Sequence[int] | None = None,
    count: int = 2000,
    seed: int = 0,
    width: float = WIDTH,
) -> Figure:
    """Draw what each layer of a flow does to draws of the base, colored from left to right where they started.

    Each layer moves all coordinates, and two are seen. Those of a posterior are the unconstrained ones in which its
    flow works; the last layers of a guide bend the tails and are affine. Of a mixture, the part with the largest weight
    is drawn.

    Args:
        flow: a flow of vectors without context, or a posterior that has a flow.
        x: the coordinate across, its number, or one of ``posterior.coordinates``; by default the first one.
        y: the coordinate upwards; by default the second one.
        layers: after how many layers to draw (0: the base); by default after each, at most eleven of them.
        count: number of draws.
        seed: of the draws.
        width: inches.

    Raises:
        ValueError: for a flow of images, of one dimension or with a context, a posterior without a flow, or a layer or
            coordinate that is not there.

    Cost: one pass of the flow for ``count`` points, layer by layer.

    >>> import pyro_flows as pf
    >>> len(plot_layers(pf.planar(2, layers=3), count=50).axes)
    4
    """
    import matplotlib

    names = list(flow.coordinates) if isinstance(flow, Record) else None
    flow = _flow_of(flow) if isinstance(flow, Record) else flow
    if len(flow.event_shape) != 1 or flow.dim < 2 or flow.context_dim:
        raise ValueError(f"flow: expected two dimensions or more and no context, got {tuple(flow.event_shape)}.")
    dims = [number if given is None else _number(given, names, flow.dim) for number, given in enumerate((x, y))]
    stack = _stack(flow.bijection)
    total = len(stack)
    shown = sorted({round(k * total / min(total, 11)) for k in range(min(total, 11) + 1)}) if layers is None else layers
    if not all(0 <= number <= total for number in shown):
        raise ValueError(f"layers: expected numbers from 0 to {total}, got {list(shown)}.")
    with torch.no_grad(), seeded(seed, flow._like.device):
        clouds = [flow.base_distribution().sample((count,))]
        for layer in stack:
            clouds.append(layer.forward_and_ladj(clouds[-1])[0])
    columns = grid_of(len(shown), width=width, narrowest=1.6, most=6)
    height = (min(1.9, width / columns) + 0.2) * math.ceil(len(shown) / columns)
    figure, grid = panels(len(shown), columns=columns, size=(width, height))
    # A color for each draw by its rank, from dark to light, which color-blind readers can tell apart; the lightest
    # colors are left out, since they are not seen on white.
    ranks = clouds[0][:, dims[0]].argsort().argsort().double().cpu().numpy() / max(count - 1, 1)
    colors = np.asarray(matplotlib.colormaps["viridis"](0.85 * ranks))
    for axes, number in zip(grid, shown, strict=True):
        parts.cloud(axes, clouds[number][:, dims], colors, equal=names is None)
        axes.set_title(_layer_name(stack, number), loc="center")
    if names is not None:
        figure.supxlabel(f"{parts.plain(names[dims[0]])}, unconstrained", fontsize=9)
        figure.supylabel(f"{parts.plain(names[dims[1]])}, unconstrained", fontsize=9)
    return figure


def _flow_of(posterior: Record) -> Flow:
    """Return the flow of a posterior, or the part of its mixture with the largest weight."""
    flow = posterior.flow
    if flow is None:
        why = posterior.missing.get("flow", "it has no flow")
        raise ValueError(f"posterior: expected one with a flow, got none: {why}.")
    if isinstance(flow, FlowMixture):
        flow = flow.members[int(flow.which[int(flow.log_weights.argmax())])]
    assert isinstance(flow, Flow)
    return flow


def _number(given: str | int, names: list[str] | None, dim: int) -> int:
    """Return the number of a coordinate, given by it or by a posterior's name for it."""
    if names is not None and isinstance(given, str):
        return names.index(checks.choice("x and y", given, names))
    if not isinstance(given, int) or not 0 <= given < dim:
        raise ValueError(f"x and y: expected numbers from 0 to {dim - 1}, got {given!r}.")
    return given


def _stack(bijection: Bijection) -> list[Bijection]:
    """Return the layers of chains, and of chains in them, one by one."""
    if not isinstance(bijection, Compose):
        return [bijection]
    return [part for layer in bijection.layers if isinstance(layer, Bijection) for part in _stack(layer)]


def _layer_name(stack: list[Bijection], layer: int) -> str:
    """Name the state after a layer; the map around a flow is named by what it does."""
    if layer == 0:
        return "base"
    last = stack[layer - 1]
    affine = isinstance(last, (DiagonalAffine, LowerTriangularAffine))
    kind = ": tails" if isinstance(last, SinhArcsinh) else ": affine" if affine else ""
    return f"layer {layer}{kind if layer > 1 else ''}"
