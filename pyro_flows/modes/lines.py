"""What a guide lacks at further maxima on the lines through its best draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.lacks import Guide, Lack, lacks_of

LINES = 400  # coordinates that are followed,
LINE_POINTS = 24  # by as many points a side,
NEAR, FAR = 2.0, 40.0  # standard deviations away
MOVES = 8


@torch.no_grad()
def across(guide: Guide, z: Tensor, log_q: Tensor) -> list[Lack]:
    r"""Return a place in each region that has much of the mass, but no draws until they are moved along a coordinate.

    Candidates for the move :math:`\delta` are further maxima of the density on the lines through the best draw. The
    mass of the region is :math:`E_q\, p(z + \delta) / q(z)`; here each draw counts as one at most. The number of modes
    does not matter: with two wells in each of many coordinates, one mode alone is next to nothing.
    """
    density = guide.density
    best = z[int(torch.nan_to_num(density(z), nan=-torch.inf).argmax())]
    found = []
    for move in _further_maxima(density, best, z.std(0)):
        moved = z + move
        log_p = density(moved)
        found += lacks_of(moved, log_p, guide.lacking(moved, log_p, log_q), "moved")
    return found


def _further_maxima(density: LogDensity, center: Tensor, sd: Tensor) -> list[Tensor]:
    """Return moves from ``center`` along single coordinates to maxima two to forty ``sd`` away, the highest first."""
    far = torch.logspace(0.0, math.log10(FAR), LINE_POINTS, dtype=center.dtype, device=center.device)
    offsets = torch.cat([-far.flip(0), far])
    lines = [axis * size for axis, size in zip(torch.eye(len(center)).to(center)[:LINES], sd[:LINES], strict=False)]
    if not lines:
        return []
    points = center + offsets[:, None] * torch.stack(lines)[:, None]
    heights = density(points.flatten(0, 1)).nan_to_num(nan=-torch.inf).reshape(len(lines), -1)
    peaks = (heights[:, 1:-1] > heights[:, :-2]) & (heights[:, 1:-1] > heights[:, 2:])
    peaks &= offsets[1:-1].abs() >= NEAR
    moves = []
    for line, place in peaks.nonzero().tolist():
        between = torch.linspace(0.0, 1.0, LINE_POINTS).to(center)
        near = offsets[place] + (offsets[place + 2] - offsets[place]) * between
        fine = density(center + near[:, None] * lines[line]).nan_to_num(nan=-torch.inf)
        moves.append((float(fine.max()), near[int(fine.argmax())] * lines[line]))
    return [move for _, move in sorted(moves, key=lambda pair: -pair[0])[:MOVES]]
