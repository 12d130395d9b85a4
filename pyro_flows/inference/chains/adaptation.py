r"""Adaptation of what all chains share: step size, trajectory length, and the units of moves.

The step size follows the mean acceptance by dual averaging. The trajectory length :math:`\tau` ascends the change of
the squared distance from the center that a trajectory brings about (ChEES),

.. math:: \tfrac14\, E\big[(\|x' - \bar x\|^2 - \|x - \bar x\|^2)^2\big],

which is small for trajectories that are too short, and for those that come back. Trajectories are 2 u times as long, u
a quasi-random number in (0, 1), so that no period is hit. Where the flow is the posterior, the target is close to
N(0, I), and a few leaps make a draw that knows little of the one before.

References: Hoffman, Radul and Sountsov 2021, "An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian
Monte Carlo" (ChEES); Hoffman and Gelman 2014 (dual averaging, arXiv 1111.4246).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.inference.modes.under_covered import Points

WANTED = 0.8  # mean acceptance: far points of a flow's latent space bear smaller steps than the most
# dimensions up to which directions are looked for, and chains are tried before a flow: an eigendecomposition takes D^3
MOST_DIM = 1500
APART_FROM_ONE = 1.2  # a direction is kept if draws and gradients together say a variance above it, or below 1 / 1.2
SCALES = 0.01, 100.0


class Metric(NamedTuple):
    r"""The units of moves: scales S (D,), directions (D, K), the columns of U, and their lengths R (K,).

    Points are :math:`x = S\,(I + U (R - 1) U^\top)\,y`, and U is orthonormal; in y the posterior is to be as wide in
    each direction. Both draws and gradients of the log density tell of it: for a normal distribution, the covariance of
    the gradients is the inverse of that of the draws. Long directions show in the draws, short ones in the gradients.
    In the space spanned by both, the covariance :math:`\Sigma` is the one with :math:`\Sigma\, G\, \Sigma = C`, where C
    and G are the covariances of draws and gradients there.

    Reference: nutpie's low-rank adaptation (Seyboldt et al. 2026, arXiv 2603.18845), which does so for a single chain.
    """

    scale: Tensor
    axes: Tensor
    roots: Tensor

    @classmethod
    def of(cls, scale: Tensor) -> Metric:
        """Return the metric with a scale for each coordinate and no directions."""
        return cls(scale, scale.new_zeros(len(scale), 0), scale.new_zeros(0))

    def out(self, y: Tensor) -> Tensor:
        """Return x of steps or points y (C, D)."""
        return self.scale * self._stretched(y, self.roots)

    def back(self, slope: Tensor) -> Tensor:
        """Return the gradient with respect to y of one with respect to x (C, D)."""
        return self._stretched(self.scale * slope, self.roots)

    def units(self, x: Tensor) -> Tensor:
        """Return y of points x (C, D)."""
        return self._stretched(x / self.scale, 1.0 / self.roots)

    def _stretched(self, y: Tensor, by: Tensor) -> Tensor:
        return y + ((y @ self.axes) * (by - 1.0)) @ self.axes.mT if len(by) else y


def scale_of(x: Tensor) -> Tensor:
    """Return a scale for each coordinate (D,) from points of all chains (N, D): robust, and within a factor of 100."""
    return _spread(x).nan_to_num(nan=1.0).clamp(*SCALES).to(x.dtype)


def _spread(x: Tensor) -> Tensor:
    low, high = (torch.quantile(x.double(), level, dim=0) for level in (0.159, 0.841))
    return 0.5 * (high - low)


def learned(x: Tensor, slope: Tensor) -> Metric:
    """Return the metric of points (N, D) of all chains and the gradients of the log density there (N, D)."""
    if not 1 < x.shape[1] <= MOST_DIM:
        return Metric.of(scale_of(x))
    scale = (_spread(x) / _spread(slope)).sqrt().nan_to_num(nan=1.0, posinf=SCALES[1])  # a long direction is in both
    scale = scale.clamp(*SCALES).to(x.dtype)
    units = scale.double()
    y, h = x.double() / units, slope.double() * units
    usable = torch.isfinite(y).all(1) & torch.isfinite(h).all(1)
    if int(usable.sum()) < 2:
        return Metric.of(scale)
    draws, slopes = (torch.cov(part[usable].mT, correction=0) for part in (y, h))
    # a long direction has twice the variance, and more than noise alone comes to: half of the draws are independent
    edge = max(2.0, (1.0 + math.sqrt(x.shape[1] / (0.5 * len(y)))) ** 2)
    both = torch.cat([_longest(draws, edge), _longest(slopes, edge)], 1)
    if not both.shape[1]:
        return Metric.of(scale)
    basis = torch.linalg.qr(both).Q
    inside = _between(basis.mT @ draws @ basis, basis.mT @ slopes @ basis)
    if not bool(torch.isfinite(inside).all()):
        return Metric.of(scale)
    values, turned = torch.linalg.eigh(inside)
    values = values.clamp(1e-6, 1e6)
    kept = values.log().abs() > math.log(APART_FROM_ONE)  # noise shows in draws or in gradients, not in both
    values, turned = values[kept], turned[:, kept]
    return Metric(scale, (basis @ turned).to(x), values.sqrt().to(x))


def _longest(covariance: Tensor, edge: float) -> Tensor:
    """Return the directions (D, K) of the largest variances, those above ``edge``, 50 at most."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors[:, (values > edge).nonzero()[:, 0][-50:]]


def _between(draws: Tensor, slopes: Tensor) -> Tensor:
    """Return the matrix M with M slopes M = draws: the geometric mean of ``draws`` and the inverse of ``slopes``."""
    root, inverse = _roots(slopes)
    return inverse @ _roots(root @ draws @ root)[0] @ inverse


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root and the inverse root of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(1e-12 * float(values.max().clamp_min(torch.finfo(values.dtype).tiny)))
    return vectors * values.sqrt() @ vectors.mT, vectors * values.rsqrt() @ vectors.mT


class Moved(NamedTuple):
    """What a Hamiltonian or microcanonical move of C chains did: the new points, and numbers of each chain."""

    points: Points
    end: Tensor  # of each trajectory (C, D), accepted or not
    velocity: Tensor  # there
    chance: Tensor  # of acceptance
    error: Tensor  # of the energy
    energy: Tensor  # at the point taken
    diverging: Tensor


@dataclass
class Kernel:
    """What the moves of all chains have in common, and what adaptation keeps of the moves before: latent units."""

    step: float = 0.5
    length: float = 1.5
    moves: int = 0
    log_length: float = math.log(1.5)
    second: float = 0.0  # moment of the ascent's gradients
    anchor: float = math.log(0.5)
    deficit: float = 0.0
    mean_log_step: float = 0.0
    most_leaps: int = 64  # of a trajectory

    @classmethod
    def start(cls, dim: int) -> Kernel:
        """Return the kernel that would be about right for N(0, I)."""
        step = dim**-0.25
        return cls(step=step, anchor=math.log(step))

    def leaps(self, number: int) -> int:
        return max(1, min(self.most_leaps, math.ceil(2.0 * halton(number) * self.length / self.step)))

    def adapt(self, before: Points, moved: Moved, metric: Metric, number: int) -> None:
        """Learn from one move: dual averaging with the constants of its authors, then the ascent."""
        self.moves += 1
        count, acceptance = float(self.moves), float(moved.chance.mean())
        self.deficit += (WANTED - acceptance - self.deficit) / (count + 10.0)
        log_step = self.anchor - math.sqrt(count) / 0.05 * self.deficit
        weight = count**-0.75
        self.mean_log_step += weight * (log_step - self.mean_log_step)
        self.step = math.exp(log_step)
        self._adapt_length(before, moved, metric, number)

    def _adapt_length(self, before: Points, moved: Moved, metric: Metric, number: int) -> None:
        start, end = metric.units(before.x), metric.units(moved.end)
        usable = torch.isfinite(end).all(1) & (moved.chance > 0.0)
        if not bool(usable.any()):
            return
        start, end, velocity, chance = start[usable], end[usable], moved.velocity[usable], moved.chance[usable]
        here, there = start - start.mean(0), end - (chance[:, None] * end).sum(0) / chance.sum()
        change = there.square().sum(1) - here.square().sum(1)
        slopes = halton(number) * change * (there * velocity).sum(1)
        slope = float((chance * slopes).sum() / chance.sum()) * self.length
        if not math.isfinite(slope):
            return
        self.second = 0.95 * self.second + 0.05 * slope * slope
        corrected = self.second / (1.0 - 0.95**self.moves)
        self.log_length += 0.05 * slope / (math.sqrt(corrected) + 1e-12) if corrected > 0.0 else 0.0  # one Adam step
        self.log_length = min(max(self.log_length, math.log(0.2)), math.log(8.0))  # in units of the scale
        weight = (self.moves + 1.0) ** -0.5  # so earlier lengths lose weight in their mean
        self.length = math.exp((1.0 - weight) * math.log(self.length) + weight * self.log_length)

    def again(self) -> None:
        """Let the step size be found anew from where it is, after the scale of the coordinates has changed."""
        self.anchor, self.deficit, self.moves = self.mean_log_step, 0.0, 0
        self.second = 0.0

    def halve(self) -> None:
        """Take half of the step size, and twice as many leaps, 256 at most, to keep the length of trajectories."""
        self.step *= 0.5
        self.most_leaps = max(self.most_leaps, min(2 * self.most_leaps, 256))

    def freeze(self) -> None:
        """Take the means of what adaptation tried: from now on, the kernel is one and the same."""
        if self.moves:
            self.step = math.exp(self.mean_log_step)

    def stored(self) -> dict[str, object]:
        return asdict(self)


def halton(number: int) -> float:
    """Return the number's place in the van der Corput sequence of base 2, in (0, 1).

    >>> [halton(number) for number in range(3)]
    [0.5, 0.25, 0.75]
    """
    number, place, size = number + 1, 0.0, 0.5
    while number:
        place, number, size = place + size * (number & 1), number >> 1, size / 2.0
    return place
