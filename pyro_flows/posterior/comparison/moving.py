r"""Draws of a posterior, moved to what it would be without one observation.

Importance weights :math:`1 / p(y_i \mid z)` have no variance where an observation has a leverage of a half or more, and
few effective draws long before. So the draws are moved by an affine map first, in the latent space of the flow if there
is one. The map is the one that is right if the log likelihood of the observation is quadratic there: along all
coordinates in its gradient, along two directions in its curvature, which are fitted to the draws by least squares.

In plain coordinates, or those of a poor flow, a part of the posterior can be narrow, such as the neck of a funnel. A
map then carries draws out of it and none into it. So moved draws are weighted there as a part of a mixture with those
that stay where they are, unless this makes the weights less even. A few draws tell whether there is such a part.

References: Paananen et al. 2021, "Implicitly adaptive importance sampling" (arXiv 1906.08850), who match weighted
moments of the draws, and weight by such a mixture; Meng and Wong 1996 (ratios of normalizing constants).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.inference.verdict.psis import psis
from pyro_flows.model.log_density import LogDensity
from pyro_flows.posterior.comparison.bridge import Latent
from pyro_flows.support.numbers.tensors import least_squares

DIRECTIONS = 2  # of curvature
ROUNDS = 3  # of moves, where those before leave k-hat too high,
UNEVEN = 0.2  # or weights of such a relative variance
NARROWEST, WIDEST = 0.05, 20.0  # precision along a direction, in units of the posterior's
WITHIN = 10.0  # nats about the median: weights farther off are left out of the second fit
STAY = 0.5  # share of the mixture that is not moved
LOOKED_AT, THIN, UNCOVERED = 250, 3.0, 0.01  # draws of each half; nats by which moved ones are too rare; share of mass

Likelihood = Callable[[Tensor], Tensor]  # z (S, D) -> log likelihood of one observation (S,)


class Moved(NamedTuple):
    """An estimate of elpd, k-hat and relative variance of its weights, and what each draw adds to its error (S,)."""

    elpd: float
    k_hat: float
    influence: Tensor
    spread: float = math.inf


class Frame(NamedTuple):
    """Standardized points (S, D), and by what: x = loc + root e."""

    loc: Tensor
    root: Tensor
    points: Tensor


class Space:
    """Draws z (S, D) of a posterior where they are moved: base points of the flow, standardized; or plain coordinates.

    ``log_weights`` (S,) are log p - log q up to a constant, None for draws of the posterior. ``half`` (S,) says which
    draws make the first half: maps are fitted to one half, and move the other.
    """

    def __init__(self, density: LogDensity, flow: object, z: Tensor, log_weights: Tensor | None, half: Tensor) -> None:
        self.latent, self.half = Latent(density, flow, z), half
        self.whole = self.latent.bijection is None  # whether points are standardized by the whole covariance
        self.covers = self.whole or log_weights is None  # a flow whose own draws do has no narrow part
        with torch.no_grad():
            x, log_jacobian = self.latent.back(z)
            self.height = (density(z) + log_jacobian).double().cpu()
        equal = torch.full_like(self.height, -math.log(len(z)))
        self.log_weights = equal if log_weights is None else torch.log_softmax(log_weights, 0)
        self.weights = self.log_weights.exp()
        x = x.double().cpu()
        self.frames = {side: self._frame(x, rows) for side, rows in self._sides()}
        self.fits = {side: Fit(self.frames[side].points[rows], self.weights[rows]) for side, rows in self._sides()}

    @staticmethod
    def fewest(dim: int) -> int:
        """How many draws it takes at least: ten for each coordinate of each half, to which a map is fitted."""
        return 20 * (dim + 1)

    def _frame(self, x: Tensor, rows: Tensor) -> Frame:
        """Standardize all points (S, D) by the moments of one half: by those of all, a map would know what it moves."""
        loc, root = _moments(x[rows], self.weights[rows] / self.weights[rows].sum(), whole=self.whole)
        return Frame(loc, root, torch.linalg.solve_triangular(root, (x - loc).mT, upper=False).mT)

    def _sides(self) -> list[tuple[bool, Tensor]]:
        return [(True, self.half), (False, ~self.half)]

    def leave_out(self, likelihood: Likelihood, values: Tensor, limit: float) -> Moved:
        """Estimate the elpd of one observation, whose log likelihood at the draws is ``values`` (S,).

        Further rounds of moves are made while the weights are uneven, or k-hat is not below ``limit``.
        """
        found = {side: self.fits[side](-values[rows]) for side, rows in self._sides()}
        result, kept = self._judged(self._moved(likelihood, found)), found
        for _ in range(ROUNDS - 1):
            if result.k_hat < limit and result.spread < UNEVEN:
                break
            found = self._again(likelihood, found)
            again = self._judged(self._moved(likelihood, found))
            best = min(result, again, key=lambda one: (max(one.k_hat, limit), one.spread))
            if best is result and result.k_hat < limit:
                break
            result, kept = best, found if best is again else kept
        if not self.covers or self._are_covered(values, kept, result.elpd):
            return result
        covering = self._judged(self._covering(likelihood, values, kept))
        return min(result, covering, key=lambda one: one.spread)  # not by k-hat, which knows nothing of the neck

    @torch.no_grad()
    def _are_covered(self, values: Tensor, found: dict[bool, Affine], elpd: float) -> bool:
        """Whether moved draws come to nearly all of the posterior without an observation, by a few draws of it."""
        excess, weights = [], []
        for side, rows in self._sides():
            own, affine, frame = rows.nonzero()[:, 0], found[not side], self.frames[not side]
            few = own[:: max(1, len(own) // LOOKED_AT)]  # of all chains
            origin = self._at(frame, affine.back(frame.points[few]))[1]
            excess.append(self.height[few] - values[few] + elpd - origin + affine.log_volume)
            weights.append(self.log_weights[few] - values[few])
        share = torch.softmax(torch.cat(weights), 0)[~(torch.cat(excess) < THIN)].sum()
        return float(share) < UNCOVERED

    def _again(self, likelihood: Likelihood, found: dict[bool, Affine]) -> dict[bool, Affine]:
        """Fit maps before the maps that there are, to the weights that these leave."""
        more = {}
        for side, rows in self._sides():
            ratio = self._ratio(likelihood, found[side], self.frames[side], rows)
            middle = ratio[torch.isfinite(ratio)].median() if bool(torch.isfinite(ratio).any()) else ratio.new_zeros(())
            usual = ratio.nan_to_num(nan=-torch.inf).clamp(middle - WITHIN, middle + WITHIN)
            more[side] = found[side].after(self.fits[side](usual))
        return more

    def _moved(self, likelihood: Likelihood, found: dict[bool, Affine]) -> Tensor:
        """Return the log weights (S,) of draws, each moved by the map of the other half."""
        log_ratio = torch.empty_like(self.height)
        for side, rows in self._sides():
            log_ratio[rows] = self._ratio(likelihood, found[not side], self.frames[not side], rows)
        return log_ratio

    @torch.no_grad()
    def _covering(self, likelihood: Likelihood, values: Tensor, found: dict[bool, Affine]) -> Tensor:
        r"""Return the log of what each draw z adds, where it is and moved to T(z), both weighted by their mixture.

        The mixture has density :math:`m = a p + (1 - a) p_T`, where :math:`p_T` is that of moved draws. A draw adds
        :math:`a\, p_{-i}(z) / m(z) + (1 - a)\, p_{-i}(T(z)) / m(T(z))`, whose mean is the ratio of the evidences.
        """
        stay, move = math.log(STAY), math.log1p(-STAY)
        total = torch.empty_like(self.height)
        for side, rows in self._sides():
            affine, frame, height = found[not side], self.frames[not side], self.height[rows]
            z, there = self._at(frame, affine(frame.points[rows]))
            left, origin = there - likelihood(z), self._at(frame, affine.back(frame.points[rows]))[1]
            at_moved = left - torch.logaddexp(stay + there, move + height - affine.log_volume)
            at_draw = height - values[rows] - torch.logaddexp(stay + height, move + origin - affine.log_volume)
            total[rows] = torch.logaddexp(stay + at_draw, move + at_moved.nan_to_num(nan=-torch.inf))
        return torch.where(torch.isfinite(total), total, -torch.inf)

    def _at(self, frame: Frame, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return z at standardized points (S, D), and log p there with the flow's Jacobian, -inf where not finite."""
        return self.latent.at(frame.loc + points @ frame.root.mT)

    @torch.no_grad()
    def _ratio(self, likelihood: Likelihood, affine: Affine, frame: Frame, rows: Tensor) -> Tensor:
        """Return log p without the observation at moved draws, less log p at the draws, with the map's Jacobian."""
        z, there = self._at(frame, affine(frame.points[rows]))
        ratio = there - likelihood(z) + affine.log_volume - self.height[rows]
        return torch.where(torch.isfinite(ratio), ratio, -torch.inf)

    def _judged(self, log_ratio: Tensor) -> Moved:
        r"""Return :math:`\log Z - \log Z_{-i}`: with draws s of weights v, minus the log of the mean ratio."""
        log_weights = self.log_weights + log_ratio
        if not bool(torch.isfinite(log_weights).any()):
            return Moved(math.nan, math.inf, torch.full_like(log_weights, torch.nan))
        total = torch.logsumexp(log_weights, 0)
        weights = (log_weights - total).exp()
        spread = float((weights.square() / self.weights.clamp_min(torch.finfo(weights.dtype).tiny)).sum()) - 1.0
        return Moved(-float(total), psis(log_weights)[1], self.weights - weights, spread)


def _moments(x: Tensor, weights: Tensor, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and a root (D, D) of the covariance of weighted points (S, D), or of its diagonal."""
    loc = weights @ x
    away = weights.sqrt()[:, None] * (x - loc)
    scale = away.norm(dim=0)
    if whole:
        root, fault = torch.linalg.cholesky_ex(away.mT @ away)
        if not int(fault):
            return loc, root
    return loc, torch.diag(scale)


class Affine(NamedTuple):
    """A map e -> matrix e + shift of points (S, D)."""

    matrix: Tensor
    shift: Tensor
    log_volume: float

    def __call__(self, points: Tensor) -> Tensor:
        return points @ self.matrix.mT + self.shift

    def back(self, points: Tensor) -> Tensor:
        """Return the points (S, D) that the map carries to these."""
        return torch.linalg.solve(self.matrix, (points - self.shift).mT).mT

    def after(self, first: Affine) -> Affine:
        """Return this map after another one."""
        return Affine(self.matrix @ first.matrix, self(first.shift), self.log_volume + first.log_volume)


class Fit:
    """From log ratios at standardized points (S, D) with weights (S,) to the map of points that they ask for."""

    def __init__(self, points: Tensor, weights: Tensor) -> None:
        self.points = points
        self.root = (weights / weights.sum()).sqrt()
        self.linear = self.root[:, None] * torch.cat([torch.ones_like(points[:, :1]), points], 1)
        self.orthogonal, self.triangle = torch.linalg.qr(self.linear)

    def __call__(self, ratio: Tensor) -> Affine:
        r"""Return the affine map to the normal distribution of log density :math:`-e^2 / 2` + ratio (S,).

        With a ratio of :math:`b^T e + e^T H e / 2`, its precision is I - H and its mean :math:`(I - H)^{-1} b`.
        """
        given = self.root * ratio
        rest = given - self.orthogonal @ (self.orthogonal.mT @ given)
        slope = self._slope(given - rest)
        directions = slope[:, None] / slope.norm().clamp_min(torch.finfo(slope.dtype).tiny)
        for _ in range(min(DIRECTIONS, len(slope)) - 1):
            left, _, products = self._products(rest, directions)
            directions = torch.cat([directions, self._most_curved(rest - left @ products, directions)], 1)
        left, columns, products = self._products(rest, directions)
        return _to_normal(self._slope(given - rest + (left - columns) @ products), directions, products)

    def _slope(self, linear: Tensor) -> Tensor:
        part = (self.orthogonal.mT @ linear)[:, None]
        return torch.linalg.solve_triangular(self.triangle, part, upper=True)[1:, 0]

    def _products(self, rest: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Regress on products of coordinates along some directions; return them less what is linear, them, slopes."""
        along = self.points @ directions
        first, second = torch.triu_indices(along.shape[1], along.shape[1])
        columns = self.root[:, None] * along[:, first] * along[:, second]
        left = columns - self.orthogonal @ (self.orthogonal.mT @ columns)
        return left, columns, least_squares(left, rest[:, None])[:, 0]

    def _most_curved(self, rest: Tensor, directions: Tensor) -> Tensor:
        """Return the direction (D, 1), at right angles to the others, in which the rest is most curved."""
        curvature = (self.points * (self.root * rest)[:, None]).mT @ self.points
        free = torch.eye(len(curvature), dtype=curvature.dtype) - directions @ directions.mT
        values, vectors = torch.linalg.eigh(free @ (curvature + curvature.mT) @ free)
        return vectors[:, int(values.abs().argmax())][:, None]


def _to_normal(slope: Tensor, directions: Tensor, products: Tensor) -> Affine:
    """Return the map to the normal distribution with this slope and these coefficients of products of coordinates."""
    count = directions.shape[1]
    first, second = torch.triu_indices(count, count)
    half = torch.zeros(count, count, dtype=slope.dtype)
    half[first, second] = products
    values, turn = torch.linalg.eigh(half + half.mT)
    precision = (1.0 - values).clamp(NARROWEST, WIDEST)
    axes = directions @ turn
    shift = slope + axes @ ((1.0 / precision - 1.0) * (axes.mT @ slope))
    matrix = torch.eye(len(slope), dtype=slope.dtype) + axes @ ((precision.rsqrt() - 1.0)[:, None] * axes.mT)
    return Affine(matrix, shift, -0.5 * float(precision.log().sum()))
