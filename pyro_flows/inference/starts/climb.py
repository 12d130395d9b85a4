"""L-BFGS paths up a log density, all of them side by side; Newton's method."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.inference.starts.curvature import (
    FULL_HESSIAN_UP_TO,
    ONE_HESSIAN_UP_TO,
    Differentiable,
    inverse_roots,
    lower_triangular,
)
from pyro_flows.inference.starts.gaussians import (
    Gaussians,
    Start,
    choose,
    compact,
    diagonal_update,
    identity_like,
    newton_step,
    stretch,
)
from pyro_flows.inference.starts.prior import PATHS
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.stack import Stack
from pyro_flows.support.numbers.tensors import ROWS_AT_LEAST, rows_for
from pyro_flows.support.thresholds import DENSITY_GAP_OF_LOST

TICKS, FEW_TICKS = 100, 60  # of a path, and of one of many; steps of Newton's method
NEWTON = 10  # steps of Newton's method after a path, at most
SETTLED = 1e-8  # nats still to gain
STALLED = 1e-3  # nats that a path has to rise by between two looks at whether it does
WRITTEN = 2**22  # numbers that are written for paths that are looked at together


class Met(NamedTuple):
    """The Gaussians at the present points of some paths, their numbers, and which of them have moved."""

    gaussians: Gaussians
    paths: Tensor
    moved: Tensor


class Ends(NamedTuple):
    """Where K paths ended (K, D), the density (K,) and roughly the scales there (K, D), and whether at rest (K,)."""

    points: Tensor
    heights: Tensor
    scales: Tensor
    settled: Tensor


def climb(density: Differentiable, points: Tensor, units: Tensor, *, ticks: int = TICKS) -> Ends:
    """Climb as :func:`~pyro_flows.inference.starts.pathfinder.pathfinder` does, for the ends only, without draws.

    ``units`` (K, D) are diagonal. Cost: a gradient of each path that is under way, for each of at most ``ticks``.
    """
    state = Climb(density, points, units, drawn=False)
    for _ in range(ticks):
        if bool(state.over.all()):
            break
        state.tick()
    return Ends(state.points, state.height, units * state.alpha.sqrt(), state.settled)


def _together(density: Differentiable) -> int:
    """Return how many paths are looked at together: fewer where each costs much, so that none is that is over."""
    rows = WRITTEN // max(density.written, 1)
    return min(rows_for(density.numbers), max(1 << (max(rows, 1).bit_length() - 1), ROWS_AT_LEAST))


class Climb:
    """The state of K paths; gradient, direction and history are measured in ``units``.

    Where half of the paths are over, only the others are kept under way (N <= K): ``points``, ``height``, ``alpha``,
    ``settled`` and ``over`` are of all K, what else a path needs to go on of those ``under_way``. Paths of many data
    sets stay together. Unless Gaussians are ``drawn`` from, no factors of the inverse Hessians are kept.
    """

    def __init__(self, density: Differentiable, points: Tensor, units: Tensor, *, drawn: bool = True) -> None:
        self.density, self.points, self.units, self.drawn = density, points.clone(), units, drawn
        self.piece = len(points) if isinstance(density, Stack) else _together(density)
        self.under_way = torch.arange(len(points), device=points.device)
        self.height, gradient = self._evaluate(points, units)
        finite = torch.isfinite(self.height) & torch.isfinite(gradient).all(-1)
        self.gradient = choose(finite, gradient, 0.0)
        self.alpha = torch.ones_like(points)
        history = 12 if density.dim <= FULL_HESSIAN_UP_TO else 6  # steps of L-BFGS that are kept
        self.steps = points.new_zeros(len(points), history, density.dim)
        self.changes = torch.zeros_like(self.steps)
        if drawn:
            self.basis, self.factor = compact(self.alpha, self.steps, self.changes)
        self.direction = self.gradient.clone()
        self.length = torch.ones_like(self.height)
        self.settled = finite & self._at_rest()
        self.over = self.settled | ~finite
        self.before = torch.full_like(self.height, -torch.inf)

    def gaussians(self, moved: Tensor) -> Met:
        """Return the Gaussians at the present points of paths that have just moved (K,); of many data sets, of all."""
        here = moved[self.under_way]
        rows = slice(None) if isinstance(self.density, Stack) or bool(here.all()) else here.nonzero()[:, 0]
        paths = self.under_way[rows]
        direction, units, basis, factor = (part[rows] for part in (self.direction, self.units, self.basis, self.factor))
        loc = self.points[paths] + stretch(units, direction[:, None])[:, 0]
        return Met(Gaussians(loc, units, self.alpha[paths].sqrt(), basis, factor), paths, moved[paths])

    def tick(self) -> Tensor:
        """Try one step on each path that is not over; return which were taken (K,).

        A step is taken that rises by 1e-4 of what its slope promises. Where the density does not curve down along it,
        the next one is twice as long.
        """
        self._leave_out()
        rows = self.under_way
        over, before = self.over[rows], self.height[rows]
        step = choose(~over, self.length[:, None] * self.direction, 0.0)
        points = self.points[rows] + stretch(self.units, step[:, None])[:, 0]
        height, gradient = self._evaluate_open(points, over)
        promised, gain = (self.gradient * step).sum(-1), height - before
        finite = torch.isfinite(height) & torch.isfinite(gradient).all(-1)
        moved = finite & (gain >= 1e-4 * promised - self._rounding()) & ~over
        curved = self._remember(step, self.gradient - gradient, moved)
        self.points[rows] = choose(moved, points, self.points[rows])
        self.height[rows] = choose(moved, height, before)
        self.gradient = choose(moved, gradient, self.gradient)
        shrink = torch.where(finite, (0.5 * promised / (promised - gain)).clamp(0.1, 0.5), 0.1)
        self.length = self.length * torch.where(moved, 2.0, shrink)
        self._turn(moved, curved, over)
        taken = torch.zeros_like(self.over)
        taken[rows] = moved
        return taken

    def _leave_out(self) -> None:
        """Keep only those under way that are not over, where these are half of them at most."""
        open_ = (~self.over[self.under_way]).nonzero()[:, 0]
        if isinstance(self.density, Stack) or 2 * len(open_) > len(self.under_way):
            return
        self.under_way = self.under_way[open_]
        for name in ("units", "gradient", "steps", "changes", "direction", "length"):
            setattr(self, name, getattr(self, name)[open_])
        if self.drawn:
            self.basis, self.factor = self.basis[open_], self.factor[open_]

    def known(self, drawn: Tensor) -> float:
        """Return the highest density known from draws, where the first paths began: at one of them, or at a top."""
        tops = self.height[: len(drawn)][self.settled[: len(drawn)]]
        heights = torch.cat([drawn, tops])
        return float(heights[torch.isfinite(heights)].amax()) if bool(torch.isfinite(heights).any()) else -math.inf

    def end_stalled(self, known: float | None) -> None:
        """End paths that have hardly risen since the last call.

        Where a density is ``known``, they have to rise by a fifth of what they lack of it; those that reach it end too.
        """
        rose = self.height - self.before
        least = STALLED if known is None else (0.2 * (known - self.before)).clamp_min(STALLED)
        self.over = self.over | ~(rose > least)
        if known is not None:
            self.over = self.over | (self.height >= known)
        self.before = self.height.clone()

    def _evaluate(self, points: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        looks = [self.density.value_and_grad(part) for part in points.split(max(self.piece, 1))]
        height, gradient = looks[0] if len(looks) == 1 else (torch.cat(parts) for parts in zip(*looks, strict=True))
        return height, stretch(units.mT if units.dim() == 3 else units, gradient[:, None])[:, 0]

    def _evaluate_open(self, points: Tensor, over: Tensor) -> tuple[Tensor, Tensor]:
        """Look at paths that are not over, where leaving out the others saves whole pieces of a batch."""
        open_ = (~over).nonzero()[:, 0]
        count = -(-len(open_) // self.piece) * self.piece  # pieces are filled up, and a new batch size is recorded
        count = min(count, len(self.over)) if len(open_) else len(points)
        if count == len(points):
            return self._evaluate(points, self.units)
        height, gradient = self.height[self.under_way], self.gradient.clone()
        rows = torch.cat([open_, open_[-1:].expand(count - len(open_))])
        found = self._evaluate(points[rows], self.units[rows])
        height[open_], gradient[open_] = (part[: len(open_)] for part in found)
        return height, gradient

    def _rounding(self) -> Tensor:
        return 8.0 * torch.finfo(self.height.dtype).eps * self.height[self.under_way].abs()

    def _at_rest(self) -> Tensor:
        """Whether the present direction promises next to nothing."""
        slope = (self.gradient * self.direction).sum(-1)
        return slope <= self._rounding().clamp_min(SETTLED)

    def _newton(self, rows: Tensor) -> Tensor:
        """Inverse Hessian times gradient (N, D), of some paths."""
        alpha, gradient = self.alpha[self.under_way[rows]], self.gradient[rows]
        if not self.drawn:
            return newton_step(alpha, self.steps[rows], self.changes[rows], gradient)
        x, basis, factor = alpha.sqrt() * gradient, self.basis[rows], self.factor[rows]
        inner = (x[:, None] @ basis) @ (factor @ factor.mT - identity_like(factor))
        return alpha.sqrt() * (x + (inner @ basis.mT)[:, 0])

    def _remember(self, step: Tensor, change: Tensor, moved: Tensor) -> Tensor:
        """Add steps that were taken to the history, where the density curves down along them; return where (N,)."""
        curvature = (step * change).sum(-1)
        curved = moved & (curvature > 1e-10 * step.norm(dim=-1) * change.norm(dim=-1))
        root = torch.where(curved, curvature, 1.0).sqrt()[:, None]
        step, change = step / root, change / root
        alpha = self.alpha[self.under_way]
        self.alpha[self.under_way] = choose(curved, diagonal_update(alpha, step, change), alpha)
        self.steps = choose(curved, torch.cat([self.steps[:, 1:], step[:, None]], 1), self.steps)
        self.changes = choose(curved, torch.cat([self.changes[:, 1:], change[:, None]], 1), self.changes)
        return curved

    def _turn(self, moved: Tensor, curved: Tensor, over: Tensor) -> None:
        """Choose new directions where a step was taken; forget the history where none could be."""
        lost = ~moved & ~over & (self.length < 1e-10)
        if bool(lost.any()):
            over = over | (lost & (self.steps == 0.0).all(-1).all(-1))
            self.alpha[self.under_way[lost]] = 1.0
            self.steps, self.changes = choose(~lost, self.steps, 0.0), choose(~lost, self.changes, 0.0)
        if self.drawn:
            new = (curved | lost).nonzero()[:, 0]
            basis, factor = compact(self.alpha[self.under_way[new]], self.steps[new], self.changes[new])
            self.basis, self.factor = self.basis.index_copy(0, new, basis), self.factor.index_copy(0, new, factor)
        turned = (moved | lost).nonzero()[:, 0]
        self.direction = self.direction.index_copy(0, turned, self._newton(turned))
        self.length = torch.where(curved | lost, 1.0, self.length)
        settled = self.settled[self.under_way] | (moved & self._at_rest())
        self.settled[self.under_way] = settled
        self.over[self.under_way] = over | settled


# modes by Newton's method, and the normal distributions around them ---------------------------------------------------


def laplace(density: LogDensity, points: Tensor, *, most: int = FEW_TICKS) -> list[Start]:
    """Climb from each point (K, D) by Newton's method, for at most so many steps.

    Return Laplace starts at the distinct modes, full and diagonal, the best first.

    Modes are ranked by their Laplace evidence; those far below the best, or within one sd of a better one, are left
    out.
    """
    if density.dim > (ONE_HESSIAN_UP_TO if density.batched and density.reason is None else FULL_HESSIAN_UP_TO):
        return []
    modes = newton(density, points, most)
    roots, units = inverse_roots(density, modes)
    with torch.no_grad():
        evidence = density(modes) + torch.linalg.slogdet(roots).logabsdet
    evidence = torch.nan_to_num(evidence, nan=-torch.inf, posinf=-torch.inf)
    kept: list[int] = []
    for index in evidence.argsort(descending=True).tolist():
        if len(kept) == PATHS or not float(evidence[index]) > float(evidence.max()) - DENSITY_GAP_OF_LOST:
            break
        apart = [torch.linalg.solve(roots[other], modes[index] - modes[other]).norm() for other in kept]
        if all(float(distance) > 1.0 for distance in apart):
            kept.append(index)
    gauss = 0.5 * density.dim * math.log(2.0 * math.pi)
    starts = []
    for rank, index in enumerate(kept):
        suffix = f" {rank + 1}" if rank else ""
        mode, root = modes[index], lower_triangular(roots[index])
        starts.append(Start(f"laplace{suffix}", mode, root, evidence=float(evidence[index]) + gauss))
        starts.append(Start(f"laplace diagonal{suffix}", mode, units[index]))
    return starts


def newton(density: LogDensity, points: Tensor, most: int = FEW_TICKS) -> Tensor:
    """Newton's method with the absolute eigenvalues of the Hessian, halved until the density rises, from each point.

    Affine-invariant near a mode, so that scales of 1e-6 and 1e6 side by side do no harm (L-BFGS does not converge there
    in raw coordinates); an ascent direction everywhere. Cost: for at most so many steps, a Hessian at each point.
    """
    halvings = 0.5 ** torch.arange(12, dtype=density.dtype, device=density.device)
    points = points.clone()
    heights, gradients = density.value_and_grad(points)
    open_ = torch.arange(len(points), device=points.device)
    for _ in range(most):
        roots, _ = inverse_roots(density, points[open_])
        steps = (roots @ (roots.mT @ gradients[open_, :, None])).squeeze(-1)
        tries = points[open_, None] + halvings[:, None] * steps[:, None]
        with torch.no_grad():
            found = density(tries.flatten(0, 1)).unflatten(0, tries.shape[:2])
        best, index = torch.nan_to_num(found, nan=-torch.inf, posinf=-torch.inf).max(1)
        rises = best > heights[open_]
        points[open_[rises]] = tries[rises, index[rises]]
        open_ = open_[rises & ((steps * gradients[open_]).sum(-1) > 1e-6)]  # nats that are left to gain
        if not len(open_):
            break
        heights[open_], gradients[open_] = density.value_and_grad(points[open_])
    return points
