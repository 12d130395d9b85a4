r"""Pathfinder: many L-BFGS paths at once up a log density, and the best Gaussian met along each of them.

A path comes by the bulk of the mass before it ends at a mode, or runs off to where the density grows without bound.
Each of its points z carries a Gaussian, from the inverse Hessian that L-BFGS has built up by then,

.. math:: N\big(z + \Sigma \nabla \log p(z),\ \Sigma\big), \qquad
          \Sigma = \operatorname{diag}(\alpha) + B\, \Gamma B^\top,

with B of as many columns as there are vectors in the history. The one with the best ELBO is kept.

Reference: Zhang, Carpenter, Gelman and Vehtari 2022, "Pathfinder: Parallel quasi-Newton variational inference".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows._seeding import derive, seeded
from pyro_flows.graphs.batches import rows_for
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.stack import Stack
from pyro_flows.starts.curvature import Differentiable
from pyro_flows.starts.gaussians import Gaussians, choose, compact, diagonal_update, identity_like, stretch

HISTORY, LARGE, LARGE_HISTORY = 12, 200, 6  # steps that L-BFGS knows of, up to so many dimensions, and beyond
TICKS, MORE_TICKS = 100, 300  # of all paths; further ones, of those that are still low
SCORED_TOGETHER = 10
DRAWS = 10
RISE = 1e-4  # of what the slope promises
SHRINK = (0.1, 0.5)
GROW = 2.0  # where the density does not curve down
SMALLEST_STEP = 1e-10
SETTLED = 1e-8  # nats still to gain
STALLED_TICKS, STALLED = 25, 1e-3  # a path that rose by fewer nats in so many ticks is over, though it has not settled
CLOSED = 0.2  # of what a path lacks, that it has to gain in as many ticks, once it has had a hundred
CURVED = 1e-10
WRITTEN, LEAST_TOGETHER = 2**22, 16  # numbers that are written for paths that are looked at together; paths, at least


@dataclass(frozen=True)
class Paths:
    """What K paths found: the best Gaussian on each, its ELBO (K,), where they ended (K, D), and whether at rest."""

    best: Gaussians
    elbo: Tensor
    ends: Tensor
    settled: Tensor


def pathfinder(density: LogDensity | Stack, points: Tensor, units: Tensor, *, seed: int, own: int = 0) -> Paths:
    r"""Climb from each point (K, D) by L-BFGS, all paths side by side; return the best Gaussian along each.

    Coordinates are measured in ``units``, for each path a lower triangular matrix (K, D, D) or a diagonal (K, D), so
    that scales of 1e-6 and 1e6 are on a par. The diagonal :math:`\alpha` follows the curvature from there. A tick of
    the loop takes one gradient for each path: a step that rises as its slope promises is taken, any other is shortened
    and tried again. No path goes where the density or its gradient is not finite; one has settled where it sees less
    than 1e-8 nats to be gained. Where the first ``own`` points are draws of a guide, paths that are still below the
    highest of these, or below the highest top that paths from there came to, go on for up to three hundred ticks: one
    that is under way tells nothing.

    ELBOs come from ten draws, with the same noise at each point; where the density vanishes for some of them, it is
    that of the Gaussian cut to the rest, and where it vanishes for all of them, -inf. Paths of many data sets climb
    together on a :class:`Stack`, as many for each, one data set after the other. Cost: at most 101 K gradients, 300
    more for each path that is still under way, and ten densities for each step.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> density = pf.LogDensity(lambda: pyro.sample("x", dist.Normal(torch.tensor(3.0), 2.0)))
    >>> found = pathfinder(density, torch.zeros(1, 1), torch.ones(1, 1), seed=0)
    >>> print(f"{found.best.loc.item():.2f} {found.best.scale().item():.2f}")
    3.00 2.00
    """
    with seeded(derive(seed, "pathfinder"), density.device):
        noise = torch.randn(DRAWS, density.dim, dtype=density.dtype, device=density.device)
    climb = _Climb(density, points, units)
    drawn = climb.height[:own]
    found = [climb.gaussians(torch.ones_like(climb.over))]
    best, elbo = found[0].gaussians, torch.full_like(climb.height, -torch.inf)
    for tick in range(1, TICKS + MORE_TICKS + 1):
        found.append(climb.gaussians(climb.tick()))
        if tick % STALLED_TICKS == 0:
            climb.end_stalled(climb.known(drawn) if tick >= TICKS else None)
        done = tick == TICKS + MORE_TICKS or bool(climb.over.all())
        if done or len(found) == SCORED_TOGETHER:
            best, elbo = _best(density, noise, found, best, elbo)
            found = []
        if done:
            break
    return Paths(best, elbo, climb.points, climb.settled)


class Ends(NamedTuple):
    """Where K paths ended (K, D), the density (K,) and roughly the scales there (K, D), and whether at rest (K,)."""

    points: Tensor
    heights: Tensor
    scales: Tensor
    settled: Tensor


def climb(density: Differentiable, points: Tensor, units: Tensor, *, ticks: int = TICKS) -> Ends:
    """Climb as :func:`pathfinder` does, for the ends only: nothing is drawn on the way.

    ``units`` (K, D) are diagonal. Cost: a gradient of each path that is under way, for each of at most ``ticks``.
    """
    state = _Climb(density, points, units)
    for _ in range(ticks):
        if bool(state.over.all()):
            break
        state.tick()
    return Ends(state.points, state.height, units * state.alpha.sqrt(), state.settled)


class _Met(NamedTuple):
    """The Gaussians at the present points of some paths, their numbers, and which of them have moved."""

    gaussians: Gaussians
    paths: Tensor
    moved: Tensor


def _best(
    density: LogDensity | Stack, noise: Tensor, found: Sequence[_Met], best: Gaussians, elbo: Tensor
) -> tuple[Gaussians, Tensor]:
    """Score a few ticks at once, and keep the best of them and of what there was, for each path."""
    found = [met for met in found if bool(met.moved.any())]
    if not found:
        return best, elbo
    z, log_q = zip(*(met.gaussians.map(noise) for met in found), strict=True)
    for met, log_p, log_g in zip(found, _heights(density, z), log_q, strict=True):
        score = torch.where(met.moved, cut_elbo(log_p - log_g), -torch.inf)
        better = score > elbo[met.paths]
        chosen = met.paths[better]
        elbo = elbo.index_copy(0, chosen, score[better])
        best = best.with_rows(chosen, Gaussians(*(part[better] for part in met.gaussians)))
    return best, elbo


@torch.no_grad()
def _heights(density: LogDensity | Stack, z: Sequence[Tensor]) -> list[Tensor]:
    """Return the log density (K, S) at the draws (K, S, D) of each tick."""
    if isinstance(density, Stack):  # whose points stand in groups, one for each data set
        all_ = torch.stack(list(z))
        found = density(all_.transpose(0, 1).flatten(0, 2)).reshape(all_.shape[1], len(z), -1)
        return list(found.unbind(1))
    sizes = [len(part) for part in z]
    return list(density(torch.cat(list(z)).flatten(0, 1)).unflatten(0, (-1, z[0].shape[1])).split(sizes))


def cut_elbo(terms: Tensor) -> Tensor:
    """ELBO (K,) of Gaussians cut to where the density is positive, from log p - log q (K, S)."""
    finite = torch.isfinite(terms)
    count = finite.sum(-1)
    mean = torch.where(finite, terms, 0.0).sum(-1) / count
    return torch.where(count > 0, mean + (count / terms.shape[-1]).log(), -torch.inf)


def _together(density: Differentiable) -> int:
    """Return how many paths are looked at together: fewer where each costs much, so that none is that is over."""
    rows = WRITTEN // max(density.written, 1)
    return min(rows_for(density.numbers), max(1 << (max(rows, 1).bit_length() - 1), LEAST_TOGETHER))


class _Climb:
    """The state of K paths; gradient, direction and history are measured in ``units``."""

    def __init__(self, density: Differentiable, points: Tensor, units: Tensor) -> None:
        self.density, self.points, self.units = density, points, units
        self.piece = len(points) if isinstance(density, Stack) else _together(density)
        self.height, gradient = self._look(points)
        finite = torch.isfinite(self.height) & torch.isfinite(gradient).all(-1)
        self.gradient = choose(finite, gradient, 0.0)
        self.alpha = torch.ones_like(points)
        history = HISTORY if density.dim <= LARGE else LARGE_HISTORY
        self.steps = points.new_zeros(len(points), history, density.dim)
        self.changes = torch.zeros_like(self.steps)
        self.basis, self.factor = compact(self.alpha, self.steps, self.changes)
        self.direction = self._newton()
        self.length = torch.ones_like(self.height)
        self.settled = finite & self._at_rest()
        self.over = self.settled | ~finite
        self.before = torch.full_like(self.height, -torch.inf)

    def gaussians(self, moved: Tensor) -> _Met:
        """Return the Gaussians at the present points of paths that have just moved (K,); of many data sets, of all."""
        everywhere = isinstance(self.density, Stack) or bool(moved.all())
        paths = (torch.ones_like(moved) if everywhere else moved).nonzero()[:, 0]
        state = (self.points, self.direction, self.units, self.alpha, self.basis, self.factor)
        points, direction, units, alpha, basis, factor = state if everywhere else (part[paths] for part in state)
        loc = points + stretch(units, direction[:, None])[:, 0]
        return _Met(Gaussians(loc, units, alpha.sqrt(), basis, factor), paths, moved[paths])

    def tick(self) -> Tensor:
        """Try one step on each path that is not over; return which were taken (K,)."""
        step = choose(~self.over, self.length[:, None] * self.direction, 0.0)
        points = self.points + self._stretch(step)
        height, gradient = self._look_at_open(points)
        promised, gain = (self.gradient * step).sum(-1), height - self.height
        finite = torch.isfinite(height) & torch.isfinite(gradient).all(-1)
        moved = finite & (gain >= RISE * promised - self._rounding()) & ~self.over
        curved = self._remember(step, self.gradient - gradient, moved)
        self.points = choose(moved, points, self.points)
        self.height = choose(moved, height, self.height)
        self.gradient = choose(moved, gradient, self.gradient)
        shrink = torch.where(finite, (0.5 * promised / (promised - gain)).clamp(*SHRINK), SHRINK[0])
        self.length = self.length * torch.where(moved, GROW, shrink)
        self._turn(moved, curved)
        return moved

    def known(self, drawn: Tensor) -> float:
        """Return the highest density known from draws, where the first paths began: at one of them, or at a top."""
        tops = self.height[: len(drawn)][self.settled[: len(drawn)]]
        heights = torch.cat([drawn, tops])
        return float(heights[torch.isfinite(heights)].amax()) if bool(torch.isfinite(heights).any()) else -math.inf

    def end_stalled(self, known: float | None = None) -> None:
        """End paths that have hardly risen since the last call, by what they still lack of a ``known`` density, if any.

        Those that are not below it end too.
        """
        rose = self.height - self.before
        least = STALLED if known is None else (CLOSED * (known - self.before)).clamp_min(STALLED)
        self.over = self.over | ~(rose > least)
        if known is not None:
            self.over = self.over | (self.height >= known)
        self.before = self.height

    def _look(self, points: Tensor, units: Tensor | None = None) -> tuple[Tensor, Tensor]:
        units = self.units if units is None else units
        looks = [self.density.value_and_grad(part) for part in points.split(max(self.piece, 1))]
        height, gradient = looks[0] if len(looks) == 1 else (torch.cat(parts) for parts in zip(*looks, strict=True))
        return height, stretch(units.mT if units.dim() == 3 else units, gradient[:, None])[:, 0]

    def _look_at_open(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Look at paths that are not over, where leaving out the others saves whole pieces of a batch."""
        open_ = (~self.over).nonzero()[:, 0]
        count = -(-len(open_) // self.piece) * self.piece  # pieces are filled up, and a new batch size is recorded
        if not 0 < count < len(points):
            return self._look(points)
        height, gradient = self.height.clone(), self.gradient.clone()
        rows = torch.cat([open_, open_[-1:].expand(count - len(open_))])
        found = self._look(points[rows], self.units[rows])
        height[open_], gradient[open_] = (part[: len(open_)] for part in found)
        return height, gradient

    def _stretch(self, x: Tensor) -> Tensor:
        return stretch(self.units, x[:, None])[:, 0]

    def _rounding(self) -> Tensor:
        return 8.0 * torch.finfo(self.height.dtype).eps * self.height.abs()

    def _at_rest(self) -> Tensor:
        """Whether the present direction promises next to nothing."""
        slope = (self.gradient * self.direction).sum(-1)
        return slope <= self._rounding().clamp_min(SETTLED)

    def _newton(self) -> Tensor:
        """Inverse Hessian times gradient (K, D)."""
        x = self.alpha.sqrt() * self.gradient
        inner = (x[:, None] @ self.basis) @ (self.factor @ self.factor.mT - identity_like(self.factor))
        return self.alpha.sqrt() * (x + (inner @ self.basis.mT)[:, 0])

    def _remember(self, step: Tensor, change: Tensor, moved: Tensor) -> Tensor:
        """Add steps that were taken to the history, where the density curves down along them; return where (K,)."""
        curvature = (step * change).sum(-1)
        curved = moved & (curvature > CURVED * step.norm(dim=-1) * change.norm(dim=-1))
        root = torch.where(curved, curvature, 1.0).sqrt()[:, None]
        step, change = step / root, change / root
        self.alpha = choose(curved, diagonal_update(self.alpha, step, change), self.alpha)
        self.steps = choose(curved, torch.cat([self.steps[:, 1:], step[:, None]], 1), self.steps)
        self.changes = choose(curved, torch.cat([self.changes[:, 1:], change[:, None]], 1), self.changes)
        return curved

    def _turn(self, moved: Tensor, curved: Tensor) -> None:
        """Choose new directions where a step was taken; forget the history where none could be."""
        lost = ~moved & ~self.over & (self.length < SMALLEST_STEP)
        self.over = self.over | (lost & (self.steps == 0.0).all(-1).all(-1))
        self.alpha = choose(~lost, self.alpha, 1.0)
        self.steps, self.changes = choose(~lost, self.steps, 0.0), choose(~lost, self.changes, 0.0)
        new = (curved | lost).nonzero()[:, 0]
        basis, factor = compact(self.alpha[new], self.steps[new], self.changes[new])
        self.basis, self.factor = self.basis.index_copy(0, new, basis), self.factor.index_copy(0, new, factor)
        self.direction = choose(moved | lost, self._newton(), self.direction)
        self.length = torch.where(curved | lost, 1.0, self.length)
        self.settled = self.settled | (moved & self._at_rest())
        self.over = self.over | self.settled
