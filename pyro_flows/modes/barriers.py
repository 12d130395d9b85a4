"""Density barriers between candidate modes and draws."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.units import LEVEL, units_of
from pyro_flows.starts.climb import TICKS, climb

CLIMBERS = 64  # draws that are compared with each place


@torch.no_grad()
def are_separated(density: LogDensity, places: Tensor, z: Tensor, near: Tensor | None = None) -> list[bool]:
    """Whether places (L, D) have tops of their own: a barrier lies between each and the tops to which draws climb.

    A ball about a poor normal distribution holds draws that never were near its mode: in 200 dimensions two modes 21
    standard deviations apart lie in the same one. Draws are climbed from, as the places of many dimensions lie far from
    their tops. Where a climb comes to no rest, there is no top, and no answer: False.
    Only draws (S, D) that are ``near`` (L, S) are compared with a place; all by default.

    Cost: a climb for each place, and 64 or a few more for draws; all of them side by side.
    """
    chosen = _some_of(torch.ones(len(places), len(z), dtype=torch.bool, device=z.device) if near is None else near)
    used = chosen.any(0)
    points = torch.cat([places, z[used]])
    ends = climb(density, points, units_of(z, full=False).expand_as(points), ticks=2 * TICKS)
    count = len(places)
    tops, settled, heights = ends.points[count:], ends.settled[count:], ends.heights[count:]
    share = torch.linspace(0.0, 1.0, 26, dtype=tops.dtype, device=tops.device)[1:-1, None, None]  # points of a line
    answers = []
    for number, compared in enumerate(chosen[:, used] & settled):
        if not bool(ends.settled[number]) or not bool(compared.any()):
            answers.append(False)
            continue
        lines = ends.points[number] + share * (tops[compared] - ends.points[number])
        lowest = density(lines.flatten(0, 1)).nan_to_num(nan=-torch.inf).reshape(len(share), -1).amin(0)
        least = torch.minimum(heights[compared], ends.heights[number])
        answers.append(bool((lowest < least - LEVEL).all()))
    return answers


def _some_of(near: Tensor) -> Tensor:
    """Keep up to 64 of the draws that are compared with each place (L, S), where it goes the same ones for all."""
    count = near.shape[1]
    stride = max(1, count // CLIMBERS)
    order = torch.cat([torch.arange(first, count, stride) for first in range(stride)]).to(near.device)
    found = torch.zeros_like(near)
    found[:, order] = near[:, order] & (near[:, order].cumsum(1) <= CLIMBERS)
    return found
