"""Regions where q underestimates the posterior mass, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.inference.modes.symmetries import SignedPermutation
from pyro_flows.inference.starts.climb import TICKS, climb
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.starts.prior import LEVEL, SEARCHES, units_of, without_noise
from pyro_flows.inference.verdict.deciding import CHECKED
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.thresholds import DENSITY_GAP_OF_MODES, MISSED_MASS_ERRORS, MISSED_MASS_SHARE

TRUNCATED_TAIL = "short tail"  # name of a start where a marginal goes on beyond the draws
BY_WALKERS = "wandered"

Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MissedRegion:
    """A place that the guide lacks, and a normal distribution there: where another run may start.

    ``move`` takes coordinates of the guide's draws there and leaves the density as it is, if there is such a move;
    ``symmetry`` takes the guide's own mode there, as far as a change of its mass. ``beside`` says that the guide covers
    the mode, and has too little mass next to it, such as in a tail. ``drawn`` is a point with a good part of the
    missing mass, if the place is a mode, which may lie far from all of it.
    """

    place: Tensor
    start: Start
    move: SignedPermutation | None = None
    beside: bool = False
    drawn: Tensor | None = None
    symmetry: SignedPermutation | None = None


@dataclass(frozen=True)
class Guide:
    """The guide's log density, and the log of the mass that it covers."""

    density: LogDensity
    score: Score
    covered: float

    @torch.no_grad()
    def missing_mass(self, z: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return p / (covered mass) / q (S,) at draws of q where the guide is much too thin, and 0 elsewhere."""
        ratios = (log_p - log_q).double() - self.covered
        return torch.where(self.is_under_covered(z, log_p) & torch.isfinite(ratios), ratios, -torch.inf).exp()

    @torch.no_grad()
    def is_under_covered(self, z: Tensor, log_p: Tensor, *, by: float = DENSITY_GAP_OF_MODES) -> Tensor:
        """Whether the guide has less than it ought to have, by some nats, at points (S, D) with these log densities."""
        usable = torch.isfinite(log_p) & torch.isfinite(z).all(1)
        thin = torch.zeros_like(usable)
        if bool(usable.any()):
            thin[usable] = (log_p[usable] - self.score(z[usable])).double() - self.covered > by
        return thin


def guide_at(
    density: LogDensity, score: Score, z: Tensor, log_q: Tensor
) -> tuple[Guide, Tensor, Tensor, Tensor] | None:  # fmt: skip
    """Return a guide by draws z (S, D) of it, and those of finite weight: draws, log densities ``log_q``, log weights.

    None if no draw has a weight.
    """
    with torch.no_grad():
        weights = density(z) - log_q
    finite = torch.isfinite(weights)
    if not bool(finite.any()):
        return None
    return Guide(density, score, float(weights[finite].median())), z[finite], log_q[finite], weights[finite]


def missed_regions_of(moved: Tensor, log_p: Tensor, missing_mass: Tensor) -> list[MissedRegion]:
    """Return the region of moved draws if it holds a good part of the mass; each draw counts as one at most."""
    if not float(missing_mass.clamp(max=1.0).mean()) > MISSED_MASS_SHARE:
        return []
    within = missing_mass > 0.0
    place = moved[int(torch.where(within, log_p, -torch.inf).argmax())]
    return [MissedRegion(place, moments(moved[within], "mirrored"))]


def to_name(missed: Sequence[MissedRegion]) -> list[MissedRegion]:
    """Return the modes that are missed, which a sentence names first; the other places if there are none."""
    return [region for region in missed if not region.beside] or list(missed)


def moments(draws: Tensor, name: str) -> Start:
    spread = draws.std(0) if len(draws) > 1 else torch.ones_like(draws[0])
    return Start(name, draws.mean(0), torch.where(spread > 0.0, spread, 1.0))


@torch.no_grad()
def is_resolved(density: LogDensity, place: Tensor) -> bool:
    """Whether numbers are fine enough at a place: its coordinates come back from the model's own values.

    Where a scale is below the rounding of what it scales, values are equal to their location, and the density of the
    model as it is written grows without bound. Nor may the log density hang on last digits.
    """
    latents = {name: value for name, value in density.constrain(place[None]).items() if name in density.names}
    back = density.unconstrain(latents)[0]
    same = ((back - place).abs() <= 0.05 * (1.0 + place.abs())).all()
    return bool(same) and bool(without_noise(density, place[None]))


def regions_of_walkers(ends: Tensor, thin: Tensor, mass: Tensor, there: Tensor) -> list[MissedRegion]:
    """Return places to which walkers came and where the guide is too thin, if weighted draws have less mass there.

    Walkers ended at ``ends`` (N, D), some of them where the guide is ``thin`` (N,). Draws (S,) have normalized weights
    ``mass``, and some of them are ``there``, where it is thin too. The difference of both shares has to exceed its
    standard errors.
    """
    count, share, known = len(thin), float(thin.double().mean()), float(mass[there].sum())
    effective = float(1.0 / mass.square().sum())
    variance = max(share, 1.0 / count) * (1.0 - share) / count + known * (1.0 - known) / effective
    if share - MISSED_MASS_ERRORS * math.sqrt(max(variance, 0.0)) <= known + MISSED_MASS_SHARE:
        return []
    about = moments(ends[thin], BY_WALKERS)
    return [MissedRegion(end, about, beside=True) for end in ends[thin][:SEARCHES]]


# whether places have tops of their own --------------------------------------------------------------------------------


@torch.no_grad()
def are_separated(density: LogDensity, places: Tensor, z: Tensor, near: Tensor | None = None) -> list[bool]:
    """Whether places (L, D) have tops of their own: a barrier lies between each and the tops to which draws climb.

    A ball about a poor normal distribution holds draws that never were near its mode: in 200 dimensions two modes 21
    standard deviations apart lie in the same one. Draws are climbed from, as the places of many dimensions lie far from
    their tops. Where a climb comes to no rest, there is no top, and no answer: False.
    Only draws (S, D) that are ``near`` (L, S) are compared with a place; all by default.

    Cost: a climb for each place, and 50 or a few more for draws; all of them side by side.
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
    """Keep up to 50 of the draws that are compared with each place (L, S), where it goes the same ones for all."""
    count = near.shape[1]
    stride = max(1, count // CHECKED)
    order = torch.cat([torch.arange(first, count, stride) for first in range(stride)]).to(near.device)
    found = torch.zeros_like(near)
    found[:, order] = near[:, order] & (near[:, order].cumsum(1) <= CHECKED)
    return found
