"""Valleys between the top of a place and those of draws."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.units import units_of
from pyro_flows.starts.climb import climb

CLIMBERS, TICKS = 64, 200
BETWEEN = 24  # points of a line
DEEP = 2.0  # nats below the lower of two tops


@torch.no_grad()
def lies_apart(density: LogDensity, place: Tensor, z: Tensor) -> bool:
    """Whether a place (D,) has a top of its own: a valley lies between it and the tops to which draws (S, D) climb.

    A ball about a poor normal distribution holds draws that never were near its mode: in 200 dimensions two modes 21
    standard deviations apart lie in the same one. Draws are climbed from, as the places of many dimensions lie far from
    their tops. Where a climb comes to no rest, there is no top, and no answer: False. Cost: 65 climbs.
    """
    points = torch.cat([place[None], z[:: max(1, len(z) // CLIMBERS)][:CLIMBERS]])
    ends = climb(density, points, units_of(z, full=False).expand_as(points), ticks=TICKS)
    if not bool(ends.settled[0]) or not bool(ends.settled[1:].any()):
        return False
    others, heights = ends.points[1:][ends.settled[1:]], ends.heights[1:][ends.settled[1:]]
    share = torch.linspace(0.0, 1.0, BETWEEN + 2, dtype=z.dtype, device=z.device)[1:-1, None, None]
    lines = ends.points[0] + share * (others - ends.points[0])
    lowest = density(lines.flatten(0, 1)).nan_to_num(nan=-torch.inf).reshape(BETWEEN, -1).amin(0)
    return bool((lowest < torch.minimum(heights, ends.heights[0]) - DEEP).all())
