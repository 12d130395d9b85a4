r"""Twins: tops of one height, of which one is the image of the other under exchanges and signs of coordinates.

Where f(P z) = f(z) for a signed permutation P, and b = P a, the density about b along one axis is that about a along
another, maybe the other way round: :math:`f(b + c\,e_i) = f(a + s\,c\,e_{\pi(i)})` for any c. So a few steps along each
axis, from both tops, tell P, whatever the dimension and however the model groups its values; whether it is exact, the
draws of a guide tell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.doubts import TOPS_APART, distinct
from pyro_flows.modes.lacks import Guide, Lack, lacks_of
from pyro_flows.modes.symmetries import SignedPermutation, are_the_same
from pyro_flows.starts.pathfinder import Paths

LEVEL = 1e-3  # nats between tops of one height, beside rounding
LOOKED_AT = 4  # tops of the guide's own height
STEPS, NEAR, FAR = 6, 0.3, 3.0  # of each sign along each axis, from a part of the least to some of the greatest sd
FAR_OFF = 20.0  # nats below a top, at which densities count as one


@torch.no_grad()
def twins_of(guide: Guide, paths: Paths, own: int, z: Tensor, log_q: Tensor, units: Tensor) -> list[Lack]:
    """Return the regions about twins of the guide's own top that hold a good part of the mass and no draws.

    The first ``own`` paths began at draws of the guide; ``z`` (S, D) are such, ``log_q`` (S,) their log densities. The
    mass of an image is that of :func:`~pyro_flows.modes.missed_modes.mirrored`. Cost: twelve densities for each
    coordinate of at most five tops.
    """
    density = guide.density
    heights = density(paths.ends)
    at_rest = (paths.settled & torch.isfinite(heights)).nonzero()[:, 0].tolist()
    mine = [number for number in at_rest if number < own]
    if not mine:
        return []
    home = max(mine, key=lambda number: float(heights[number]))
    level = LEVEL + 64.0 * torch.finfo(heights.dtype).eps * float(heights[home].abs())
    others = [number for number in at_rest if float((heights[number] - heights[home]).abs()) < level]
    places = [home, *(number for number in others if number != home)]
    found, spread = [], z.std(0)
    for place in distinct([paths.ends[number] for number in places], units, by=TOPS_APART)[1 : 1 + LOOKED_AT]:
        move = _between(density, paths.ends[home], paths.ends[places[place]], spread)
        if move is None:
            continue
        moved = z[:, list(move[0])] * z.new_tensor(move[1])
        log_p = density(moved)
        if bool(are_the_same(log_p, density(z)).all()):
            lacks = lacks_of(moved, log_p, guide.lacking(moved, log_p, log_q), "mirrored")
            found += [Lack(lack.place, lack.start, move=move) for lack in lacks]
    return found


def _between(density: LogDensity, top: Tensor, other: Tensor, spread: Tensor) -> SignedPermutation | None:
    """Return the order and signs that take ``top`` (D,) to ``other``; None if nothing of that kind does."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    steps = torch.logspace(0.0, 1.0, STEPS, base=float(FAR * spread.max() / (NEAR * spread.min()))).to(top)
    steps = NEAR * spread.min() * steps
    mine, theirs = _profiles(density, top, steps), _profiles(density, other, steps)
    away = torch.stack([(other[:, None] - sign * top).abs() / steps[0] for sign in (1.0, -1.0)])
    costs = away + torch.stack([torch.cdist(theirs, profile, p=1) for profile in (mine, mine.flip(1))])
    cost, which = costs.double().min(0)
    cost.diagonal().mul_(1.0 - 1e-6)  # of coordinates that cannot be told apart, none moves
    order = linear_sum_assignment(cost.cpu().numpy())[1].tolist()
    signs = [1.0 if int(which[row, column]) == 0 else -1.0 for row, column in enumerate(order)]
    identity = order == list(range(len(order))) and all(sign > 0.0 for sign in signs)
    return None if identity else (tuple(order), tuple(signs))


def _profiles(density: LogDensity, top: Tensor, steps: Tensor) -> Tensor:
    """Return how far the density falls from a top along each axis: (D, 2 K), from the farthest step down to that up."""
    offsets = torch.cat([-steps.flip(0), steps])
    points = top + offsets[:, None, None] * torch.eye(len(top), dtype=top.dtype, device=top.device)
    heights = density(points.flatten(0, 1)).reshape(len(offsets), -1).mT - density(top[None])
    return heights.nan_to_num(nan=-FAR_OFF).clamp(-FAR_OFF, FAR_OFF)
