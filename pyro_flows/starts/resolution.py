"""Places at which a log density is the model's, and not what rounding left of it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows._seeding import seeded
from pyro_flows.model.log_density import LogDensity

TRIES = 16
ULPS = 8.0  # units in the last place of a coordinate, by which it is moved at most
NOISE = 0.5  # nats


@torch.no_grad()
def without_noise(density: LogDensity, points: Tensor) -> Tensor:
    """Say at which points (K, D) moves in the last digits of the coordinates leave the log density as it is (K,).

    At large concentrations, a Beta density is a difference of numbers of which no digit is left: a climb ends at a peak
    of thousands of nats that is none. Next to a scale below the rounding of what it scales, density and digits are lost
    alike. At places of the posterior that matter, such moves change next to nothing.

    Cost: 17 densities for each point. Models that run draw by draw are too slow for that: all of their points count.
    """
    if not len(points) or not density.batched:
        return torch.ones(len(points), dtype=torch.bool, device=points.device)
    with seeded(0, points.device):
        moves = 2.0 * torch.rand(TRIES, *points.shape, dtype=points.dtype, device=points.device) - 1.0
    moved = points * (1.0 + ULPS * torch.finfo(points.dtype).eps * moves)
    values = density(torch.cat([points[None], moved]).flatten(0, 1)).view(1 + TRIES, -1).double()
    return (values - values[0]).abs().amax(0) <= NOISE  # no number is, where there is none
