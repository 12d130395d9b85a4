r"""The choice of coordinates: what the data say of each element of a hierarchical site, learned on the ELBO.

Non-centered sites can have coordinates that take out what the data say as well (``model/noncentered.py``): precisions
t and centers c, an element at a time. A normal distribution with a diagonal covariance is fitted to the posterior, and
t and c with it, since the ELBO is a function of all of them. They are then frozen. The normal is a start for a flow.

Reference: Gorinova, Moore and Hoffman 2020, "Automatic Reparameterisation of Probabilistic Programs" (arXiv
1906.03028), who learn a degree of centering in this way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_flows.inference.starts.curvature import AT_ONCE, FULL_HESSIAN_UP_TO, lower_triangular, scales
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.starts.pathfinder import Paths, pathfinder
from pyro_flows.inference.starts.prior import PRIOR_DRAWS, path_starts, possible_points, prior_draws, spread_of
from pyro_flows.inference.verdict.deciding import COMPARED_DRAWS, ESTIMATED_DRAWS, acceptable_gap, weights_correct
from pyro_flows.inference.verdict.weighing import weigh
from pyro_flows.model.batching import quiet, values_and_grads, where_possible
from pyro_flows.model.digits import COMPARED
from pyro_flows.model.graphs import Recorder
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.noncentered import Information
from pyro_flows.model.sites import Latent, Noncentered
from pyro_flows.support.process.ledger import booked
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import DENSITY_GAP_OF_LOST

STEPS = 400
LEARNING_RATE = 0.05
UNINFORMATIVE = 0.05  # precision of the data over that of the posterior; less counts as no information


@dataclass(frozen=True)
class Learned:
    """What the data say of the hierarchical sites, and the normal that was fitted with it."""

    information: dict[str, Information | None]
    start: Start


def choose_coordinates(
    density: LogDensity, wholly: Climbed | None = None, *, seed: int
) -> tuple[LogDensity, Start | None, dict[str, object]]:
    """Return the log density in the chosen coordinates, a start there, and what the history says of the choice.

    ``density`` is centered; ``wholly`` are paths in non-centered coordinates, if they were made before. Paths climb in
    both. The best normal on each side is where learning begins, unless it is far behind that of the other side; the
    better ELBO decides. Where a normal with a diagonal covariance has a still better one in coordinates that are all
    centered, or all non-centered, these are taken: without data, non-centered coordinates are exact, and learning stops
    short of them. Where the ELBO of such a normal is close to the log evidence, nothing is learned. A model that runs
    draw by draw is too slow to learn from: there the better path decides.
    """
    family = _Family(density)
    both = climbed(density, False, seed=seed), wholly or climbed(density, True, seed=seed)
    best = max(path.elbo for path in both)
    plain = [_plain(path) for path in both]
    highest = max((found for found in plain if found), key=lambda found: found.start.elbo, default=None)
    enough = highest is not None and highest.is_enough
    sides = [path for path in both if path.can_be_learned_from and path.elbo > best - DENSITY_GAP_OF_LOST]
    sides = [] if enough else sides
    learned = max((family.learn(path) for path in sides), key=lambda found: found.start.elbo, default=None)
    start = None if learned is None else learned.start
    kept: Noncentered = both[1].elbo >= both[0].elbo and both[1].elbo > -math.inf
    if learned is not None and math.isfinite(learned.start.elbo):
        kept = {name: None if said is None else said.options for name, said in learned.information.items()}
    if enough or (start is not None and math.isfinite(start.elbo)):
        for noncentered, found in enumerate(plain):
            if found is not None and (start is None or found.start.elbo > start.elbo):
                kept, start = bool(noncentered), found.start
    result = density.elsewhere(kept)
    result.evaluations += density.evaluations + both[1].density.evaluations + family.evaluations
    entry: dict[str, object] = {
        "stage": "coordinates",
        "noncentered": result.structure.noncentered,
        "elbo": None if start is None else start.elbo,
        "elbo_centered": both[0].elbo,
        "elbo_noncentered": both[1].elbo,
    }
    return result, start, entry


@dataclass(frozen=True)
class Climbed:
    """Paths in one sort of coordinates, the best of them and its ELBO."""

    density: LogDensity
    paths: Paths
    best: int
    elbo: float
    seed: int

    @property
    def can_be_learned_from(self) -> bool:
        """Whether a path has a finite ELBO, and the model does not run draw by draw."""
        return math.isfinite(self.elbo) and self.density.batched

    def drawn(self) -> Tensor:
        """Return draws (S, D) of the best normal."""
        like = self.paths.ends
        with seeded(self.seed, like.device):
            noise = torch.randn(2 * COMPARED_DRAWS, self.density.dim, dtype=like.dtype, device=like.device)
        return self.paths.best.map(noise)[0][self.best]

    @property
    def start(self) -> Start:
        """The normal along the best path, with all of its covariance: for few dimensions."""
        found = self.paths.best
        return Start("pathfinder", found.loc[self.best], lower_triangular(found.matrix()[self.best]), self.elbo)


def climbed(density: LogDensity, noncentered: bool, *, seed: int) -> Climbed:
    """Climb in coordinates that are all centered, as those of ``density`` are, or all non-centered.

    Where no normal along a path has a finite ELBO, paths begin once more where the density is finite: data may rule out
    nearly all draws of the prior, as where they are uniform up to unknown bounds.
    """
    seed = derive(seed, f"coordinates {int(noncentered)}")
    candidate = density.elsewhere(True) if noncentered else density
    draws = prior_draws(candidate, PRIOR_DRAWS, seed=seed)
    points, units = path_starts(draws), spread_of(draws)
    found = _climbed(candidate, points, units, seed)
    if candidate.batched and not math.isfinite(found.elbo):
        points = possible_points(candidate, draws)
        found = _climbed(candidate, points, units, seed) if len(points) else found
    with seeded(derive(seed, "digits"), density.device):
        noise = torch.randn(COMPARED, density.dim, dtype=density.dtype, device=density.device)
    if math.isfinite(found.elbo) and not density.clock.over:
        candidate.check_digits(found.start.map(noise))
    return found


def _climbed(density: LogDensity, points: Tensor, units: Tensor, seed: int) -> Climbed:
    paths = pathfinder(density, points, units.expand(len(points), -1), seed=seed)
    best = int(paths.elbo.nan_to_num(nan=-torch.inf).argmax())
    return Climbed(density, paths, best, float(paths.elbo[best]), seed)


@dataclass(frozen=True)
class _Plain:
    """A normal with a diagonal covariance, and whether no other one has a much higher ELBO: that is the evidence."""

    start: Start
    is_enough: bool


def _plain(side: Climbed) -> _Plain | None:
    """Return the better normal with a diagonal covariance where the best path leads; None where nothing is learned."""
    if not side.can_be_learned_from:
        return None
    candidate, paths, best, seed = side.density, side.paths, side.best, side.seed
    plain = [_diagonal(candidate, paths.best.loc[best], side.drawn().std(0), seed=seed)]
    if candidate.dim <= FULL_HESSIAN_UP_TO:
        end = paths.ends[best]
        plain.append(_diagonal(candidate, end, scales(candidate, end[None])[0], seed=seed))
    return max(plain, key=lambda found: found.start.elbo)


@torch.no_grad()
def _diagonal(density: LogDensity, loc: Tensor, scale: Tensor, *, seed: int) -> _Plain:
    """Return the normal with this location and these scales (D,), and its ELBO."""
    with seeded(derive(seed, "a diagonal normal"), density.device):
        noise = torch.randn(ESTIMATED_DRAWS, density.dim, dtype=density.dtype, device=density.device)
    z = loc + scale * noise
    log_p = density(z)
    weighing = weigh(z, log_p, -0.5 * noise.square().sum(1) - scale.log().sum() - 0.5 * math.log(math.tau) * len(scale))
    close = not weighing.broken and weighing.log_evidence - weighing.elbo < acceptable_gap(len(scale))
    enough = close and weights_correct(weighing.share, weighing.k_hat)
    return _Plain(Start("coordinates", loc, scale, _elbo(log_p, noise, scale)), enough)


def _elbo(log_p: Tensor, noise: Tensor, scale: Tensor) -> float:
    """Return the ELBO of a normal with these scales (D,) by log densities (S,) at its draws; -inf if one is not finite.

    Log p and log q are of the same draws, so that a normal that is exact has its ELBO without noise.
    """
    terms = log_p + 0.5 * noise.square().sum(1)
    elbo = float(terms.mean() + scale.log().sum()) + 0.5 * math.log(math.tau) * len(scale)
    return elbo if math.isfinite(elbo) else -math.inf


class _Family:
    """The log density as a function of a point, log precisions and centers together: (S, D + 2 K) -> (S,)."""

    def __init__(self, density: LogDensity) -> None:
        self.density = density
        self.sites = [latent for latent in density.structure.latents if latent.name in density.structure.hierarchical]
        self.size = sum(latent.size for latent in self.sites)
        self.evaluations = 0
        self._recorder = Recorder(self._gradients, density.numbers, changed=density.faults)

    def information(self, log_precision: Tensor, center: Tensor) -> dict[str, Information]:
        """Cut precisions and centers (K,) into sites."""
        sizes, found = [latent.size for latent in self.sites], {}
        for latent, *parts in zip(self.sites, log_precision.exp().split(sizes), center.split(sizes), strict=True):
            found[latent.name] = Information(*(part.reshape(latent.unconstrained_shape) for part in parts))
        return found

    def _single(self, point: Tensor) -> Tensor:
        z, log_precision, center = point.split([self.density.dim, self.size, self.size])
        found = self.information(log_precision, center)
        latents: list[Latent] = [
            replace(latent, noncentered=True, data=found[latent.name]) if latent.name in found else latent
            for latent in self.density.structure.latents
        ]
        return self.density.single(z, latents)

    def _gradients(self, points: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), quiet(), self.density.clock.watching():
            return values_and_grads(self._single, points)

    def evaluate(self, z: Tensor, said: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return values (S,), and gradients with respect to z (S, D) and to log precisions and centers (S, 2 K)."""
        self.density.clock.look()
        self.evaluations += len(z)
        booked(len(z))
        points = torch.cat([z, said.expand(len(z), -1)], 1)
        value, grad = where_possible(self._recorder, points, (), (points.shape[1],))
        return value, *grad.split([self.density.dim, 2 * self.size], 1)

    def learn(self, side: Climbed) -> Learned:
        """Fit normal, precisions and centers together, from draws where the best path leads."""
        density = self.density
        values = side.density.constrain(side.drawn())
        z = density.unconstrain(values)
        centered = torch.cat([z[:, latent.offset : latent.offset + latent.size] for latent in self.sites], 1)
        center, spread = _middle_and_spread(centered)
        # 1. The posterior's precision is that of the prior and that of the data together: begin with half of it.
        log_precision = -2.0 * spread.log() - math.log(2.0)
        began = self.information(log_precision, center)
        middle = density.elsewhere({name: found.options for name, found in began.items()})
        loc, unit = _middle_and_spread(middle.unconstrain(values))
        # 2. Everything is trained relative to where it began, in units of its spread.
        base, units = torch.cat([loc, log_precision, center]), torch.cat([unit, torch.ones_like(spread), spread])
        ascent = _Ascent(base, units, density.dim)
        with seeded(side.seed, density.device):
            for step in range(STEPS):
                # pairs of opposite noise, so many points together
                noise = torch.randn(AT_ONCE // 2, density.dim, dtype=density.dtype, device=density.device)
                ascent.step(self.evaluate, torch.cat([noise, -noise]), step)
            noise = torch.randn(ESTIMATED_DRAWS, density.dim, dtype=density.dtype, device=density.device)
        loc, scale, said = ascent.result()
        with torch.no_grad():
            terms = self.evaluate(loc + scale * noise, said)[0]
        precision, center = said[: self.size].exp(), said[self.size :]
        precision = torch.where(precision * spread.square() < UNINFORMATIVE, 0.0, precision)
        found = {
            name: information if bool(information.precision.any()) else None
            for name, information in self.information(precision.log(), center).items()
        }
        return Learned(found, Start("coordinates", loc, scale, _elbo(terms, noise, scale)))


class _Ascent:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) on shifts (D + 2 K,) and log scales (D,), relative to a start."""

    def __init__(self, base: Tensor, units: Tensor, dim: int) -> None:
        self.base, self.units, self.dim = base, units, dim
        self.weights = torch.zeros(len(base) + dim, dtype=base.dtype, device=base.device)
        self.first, self.second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return location and scale (D,) of the normal, and log precisions and centers (2 K,)."""
        shift, log_scale = self.weights.split([len(self.base), self.dim])
        moved = self.base + self.units * shift
        return moved[: self.dim], self.units[: self.dim] * log_scale.exp(), moved[self.dim :]

    def step(self, look: Callable[[Tensor, Tensor], Sequence[Tensor]], noise: Tensor, step: int) -> None:
        loc, scale, said = self.result()
        _, score, pull = look(loc + scale * noise, said)
        path = score + noise / scale
        usable = torch.isfinite(path).all(1, keepdim=True) & torch.isfinite(pull).all(1, keepdim=True)
        both = torch.where(usable, torch.cat([path, pull], 1) * self.units, 0.0)
        sizes = both.norm(dim=1, keepdim=True)
        # no draw contributes more than a hundred times as much as the median one
        both = both * (100.0 * sizes.median() / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)).clamp(max=1.0)
        stretch = both[:, : self.dim] * (scale / self.units[: self.dim]) * noise
        gradient = torch.cat([both.mean(0), stretch.mean(0)])
        self.first, self.second = self.first.lerp(gradient, 0.1), self.second.lerp(gradient.square(), 0.01)
        mean, square = self.first / (1.0 - 0.9 ** (step + 1)), self.second / (1.0 - 0.99 ** (step + 1))
        rate = LEARNING_RATE * 0.5 * (1.0 + math.cos(math.pi * step / STEPS))
        self.weights = self.weights + rate * mean / (square.sqrt() + 1e-8)


def _middle_and_spread(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return medians and scaled median absolute deviations of the columns of (S, D)."""
    draws = torch.nan_to_num(draws)
    return draws.median(0).values, spread_of(draws)
