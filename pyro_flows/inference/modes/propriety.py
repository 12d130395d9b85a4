r"""Whether a posterior with improper priors has a finite integral, by the decay of its tails.

A finite integral asks for marginals that fall faster than 1/c with the distance c: by more than log 2 where it doubles.
The posterior of a regression with a flat prior and separated data does not, nor that of a scale with too few data. The
marginal of each such coordinate is followed outward in unconstrained coordinates and in double precision, to the last
place at which numbers are exact (:mod:`pyro_flows.inference.modes.outward`): its falls there decide.

Reference: Hobert and Casella 1996, "The effect of improper priors on Gibbs sampling in hierarchical linear mixed
models" (JASA 91, doi:10.1080/01621459.1996.10476714): chains of an improper posterior may look as if all was well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_flows.inference.modes.outward import Outward, Side
from pyro_flows.inference.modes.tops import MODE_REACHES
from pyro_flows.inference.starts.prior import MATRICES_UP_TO, spread_of
from pyro_flows.inference.verdict.verdict import IMPROPER
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process.fallbacks import Tried, passed_over
from pyro_flows.support.process.seeding import derive, seeded

Slow = tuple[bool | None, ...]  # one way and the other

# coordinates that are looked at: improper ones, those along which curvatures may change, and the worst of chains
COORDINATES_LOOKED_AT = 32
HIDDEN = 8  # coordinates that may hide each other
SLACK = 0.03  # of a fall of one over the distance, that counts as none more


@torch.no_grad()
def improper_tails(density: LogDensity, draw: Callable[[], Tensor], *, seed: int) -> list[str]:
    """Return a sentence on the first coordinate with an improper prior along which a tail has no finite integral.

    ``draw`` gives draws (S, D), for the place and the width of the posterior; it is called if a prior is improper. A
    density all of whose tails were found to fall fast is not examined again.

    Cost: for each such coordinate, up to 80 places of a few Hessians each; four or so where the density falls fast.
    """
    found = _coordinates(density)[:COORDINATES_LOOKED_AT]
    if not found or density.proper or not density.batched or density.dim > MATRICES_UP_TO:
        return []
    with seeded(derive(seed, "the tails of improper priors"), density.device):
        z = draw().to(density.device, density.dtype)
    coordinates, told = [coordinate for coordinate, *_ in found], set[int]()
    for other in _written(density):
        there = z if other is density else other.unconstrain(density.constrain(z))
        single = _in_single(other)
        other = other.in_double() if other.dtype == torch.float32 else other
        there = finer(other, there[torch.isfinite(there).all(1)])
        middle = _middle(other, there)
        if middle is None:
            continue
        units = spread_of(there)
        outward = Outward(other, single, middle, units, coordinates)
        slow = _too_slow(outward.sides())
        slow = _given_others(outward, coordinates, slow)
        for (coordinate, name, label), pair in zip(found, slow, strict=True):
            steps = [sign * units[coordinate] for sign, too_slow in zip((1.0, -1.0), pair, strict=True) if too_slow]
            if steps or _ends_numbers(other, coordinate, name, middle, units):
                ends = sorted({_end(other, coordinate, name, middle, step) for step in steps})
                where = f", towards {' and '.join(ends)} values" if ends else ""
                slowly = "whose prior is improper, its density decays no faster than 1/distance"
                return [f"{IMPROPER}{label}, {slowly}{where}"]
            told |= set() if None in pair else {coordinate}
    density.proper = told.issuperset(coordinates) and len(coordinates) == len(_coordinates(density))
    return []


def _written(density: LogDensity) -> Iterator[LogDensity]:
    """Yield the density, non-centered and centered: as a scale goes to zero, or far out, one of both has digits."""
    if density.structure.hierarchical and not density.parameters():
        yield density.elsewhere(True)
        yield density.elsewhere(())
    else:
        yield density


def _in_single(density: LogDensity) -> LogDensity | None:
    """Return the density with model and data in single precision; None where the model does not compute so."""

    def cast(leaf: object) -> object:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    if density.dtype == torch.float32:
        return density
    with Tried() as tried:
        found = density.as_written().beside(*(tree_map(cast, given) for given in (density.args, density.kwargs)))
    if tried.error is not None:
        passed_over("tails not compared in single precision", tried.error)
        return None
    return found if found.dtype == torch.float32 else None


def _middle(density: LogDensity, z: Tensor) -> Tensor | None:
    """Return the possible draw of z (S, D) that is next to the medians, which may lie off a ridge; None if none is."""
    if not len(z):
        return None
    away = ((z - z.median(0).values) / spread_of(z)).double().clamp(-MODE_REACHES, MODE_REACHES).square().sum(1)
    away = torch.where(torch.isfinite(density.unrecorded(z)[0]), away, torch.inf)
    return z[away.argmin()] if bool(away.isfinite().any()) else None


def _too_slow(sides: list[Side]) -> list[Slow]:
    """Whether marginals fall no faster than one over the distance, one way and the other; None where not known."""
    slow = [_is_slow(side) for side in sides]
    half = len(slow) // 2
    return list(zip(slow[:half], slow[half:], strict=True))


def _given_others(outward: Outward, coordinates: list[int], slow: list[Slow]) -> list[Slow]:
    """Follow undecided coordinates again, with all other undecided ones held, or all of these but one.

    Where two tails are level, Laplace's method gives the marginal of neither. A conditional density without a finite
    integral decides: then the whole has none (Tonelli). One that falls fast decides nothing.
    """
    open_ = [coordinate for coordinate, pair in zip(coordinates, slow, strict=True) if None in pair]
    found = dict(zip(coordinates, slow, strict=True))
    for left in (1, 2) if 1 < len(open_) <= HIDDEN else ():
        parts = [part for part in itertools.permutations(open_, left) if len(open_) > left]
        held = [[other for other in open_ if other not in part] for part in parts]
        if parts:
            again = _too_slow(outward.about([part[0] for part in parts], held).sides())
            for (coordinate, *_), pair in zip(parts, again, strict=True):
                told = zip(found[coordinate], pair, strict=True)
                found[coordinate] = tuple(new or old for old, new in told)
    return list(found.values())


def _end(density: LogDensity, coordinate: int, name: str, middle: Tensor, step: Tensor) -> str:
    """Say whether values of a site get low or high, as a coordinate goes a step from the middle."""
    points = middle.repeat(2, 1)
    points[1, coordinate] += step
    values = density.constrain(points)[name].double().reshape(2, -1)
    change = values[1] - values[0]
    return "low" if float(change[change.abs().argmax()]) < 0.0 else "high"


def _is_slow(side: Side) -> bool | None:
    """Whether all falls known at the far end are too slow; None if too few are known.

    They count up to a ninth of the distance of the last one. At least two have to be too slow.
    """
    distances, masses, noise, level = (part[~(side.distances.isnan() | side.masses.isnan())] for part in side)
    if not len(distances) or float(distances[-1]) < MODE_REACHES:
        return None
    allowed = (1.0 + SLACK) * (distances[1:] / distances[:-1]).log()
    falls, rounding = masses[:-1] - masses[1:], (noise[:-1] + noise[1:]).where(masses[1:].isfinite(), 0.0)
    alike = (distances[:-1] > 0.0) & (level[1:] == level[:-1])
    slow, fast = alike & (falls + rounding < allowed), falls - rounding > allowed
    told = (slow | fast).nonzero()[:, 0]
    if not len(told):
        return None
    last = distances[:-1] * 9.0 >= distances[1:][told[-1]]
    if bool((fast & last).any()):
        return None if bool((slow & last).any()) else False
    return True if int((slow & last).sum()) >= 2 else None


def finer(density: LogDensity, z: Tensor) -> Tensor:
    """Return draws in double precision where the model takes these: single precision loses all digits far out."""
    if z.dtype == torch.float64 or not len(z):
        return z
    try:
        finer, _ = density.unrecorded(z[:1].double())
    except (RuntimeError, TypeError, ValueError):  # products of a matrix of data, in single precision, with latents
        return z
    return z.double() if finer.dtype == torch.float64 else z


def _coordinates(density: LogDensity) -> list[tuple[int, str, str]]:
    """Return number, site and label of each coordinate without a proper prior."""
    return [
        (latent.offset + number, latent.name, latent.name if latent.size == 1 else f"a coordinate of {latent.name}")
        for latent in density.structure.latents
        for number in latent.improper
    ]


def _ends_numbers(density: LogDensity, coordinate: int, name: str, middle: Tensor, units: Tensor) -> bool:
    """Whether draws reach to where the numbers of the model end, beyond which no density can be computed.

    Values then differ by a factor of 1e15 within three units, and the density is not finite.
    """
    points = middle.repeat(3, 1)
    points[:, coordinate] += points.new_tensor([0.0, 3.0, -3.0]) * units[coordinate]
    values = density.constrain(points)[name].double().abs().reshape(len(points), -1).log()
    if not bool((values[0] < torch.inf).all()):
        return True
    change = (values[1:] - values[0]).abs()
    beyond = torch.isfinite(values[0]) & ~(change <= math.log(1e15))
    return bool((beyond.any(1) & ~torch.isfinite(density(points[1:]))).any())
