"""Steps of microcanonical trajectories: from one point to the next, as one recorded graph where there is one.

A step is some sixty operations on few numbers beside the gradient. One by one, they took as long as the gradient did.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_flows.correction.latent import Latent, Points, only_finite
from pyro_flows.correction.metric import Metric
from pyro_flows.graphs import Runner, record


def turned(u: Tensor, slope: Tensor, step: float | Tensor) -> tuple[Tensor, Tensor]:
    """Turn directions u (C, D) for a time by the slope of log p (C, D); return them and the kinetic energy gained (C,).

    With delta = step |slope| / (D - 1) and the cosine c of u and the slope, all is written in exp(-delta), which does
    not overflow.
    """
    size = slope.square().sum(1, keepdim=True).sqrt()
    towards = slope / size.clamp_min(torch.finfo(slope.dtype).tiny)
    dim = u.shape[1]
    delta = step * size / (dim - 1)
    cosine = (towards * u).sum(1, keepdim=True)
    shrink = torch.exp(-delta)
    both = 0.5 * (1.0 + cosine + (1.0 - cosine) * shrink.square())  # exp(-delta) (cosh delta + cosine sinh delta)
    along = 0.5 * (1.0 - shrink.square()) + cosine * (0.5 * (1.0 + shrink.square()) - shrink)
    new = shrink * u + along * towards
    gained = (dim - 1) * (delta + both.clamp_min(torch.finfo(u.dtype).tiny).log())[:, 0]
    return new / new.square().sum(1, keepdim=True).sqrt(), gained


def leap(
    latent: Latent, points: Points, u: Tensor, metric: Metric, step: float, turn: float
) -> tuple[Points, Tensor, Tensor]:  # fmt: skip
    """Go one ``step`` along u, and turn u for the time ``turn``; return points, u and kinetic energy gained (C,)."""
    given = latent.joined(points.x, points.k)
    runner = _runner(latent, given, metric)
    if runner is not None:
        latent.density.clock.look()
        latent.density.spend(len(u))
        dials = torch.tensor([step, turn], dtype=u.dtype, device=u.device)
        try:
            u, gained, x, *seen = runner(given, u, *metric, dials)
            return Points(x, points.k, *seen), u, gained
        except torch.linalg.LinAlgError:
            latent.density.spend(-len(u))  # at some of these points: they are -inf, the others count
    new = latent.look(points.x + step * metric.out(u), points.k)
    return new, *turned(u, metric.back(new.slope), turn)


def _runner(latent: Latent, points: Tensor, metric: Metric) -> Runner | None:
    """Return the recorded step for such points and units; None if the density has no graph for these."""
    key = points.shape, points.dtype, points.device, metric.axes.shape
    if key not in latent.leaps:
        graph = latent.graph(points)
        made = None if graph is None else Runner(_recorded(graph, points, metric), alike=True)
        latent.leaps.put(key, made)
    return latent.leaps[key]


def _recorded(graph: Any, points: Tensor, metric: Metric) -> Any:
    dim = len(metric.scale)

    def step(
        points: Tensor, u: Tensor, scale: Tensor, axes: Tensor, roots: Tensor, dials: Tensor
    ) -> tuple[Tensor, ...]:  # fmt: skip
        units = Metric(scale, axes, roots)
        x, parts = points[:, :dim], points[:, dim:]
        x = (x + dials[0] * units.out(u)).double().to(x.dtype)  # what is evaluated is what is returned, if rounded
        seen = only_finite(*(part.to(x.dtype) for part in graph(torch.cat([x, parts], 1) if parts.shape[1] else x)))
        u, gained = turned(u, units.back(seen[3]), dials[1])
        return u, gained, x, *seen

    unit = points.new_full((len(points), dim), dim**-0.5)
    return record(step, points.clone(), unit, *(part.clone() for part in metric), unit.new_ones(2))
