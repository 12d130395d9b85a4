"""Mixtures of Gaussians by expectation maximization; the number of parts is chosen on points that were held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.flows.mixture_base import by_part
from pyro_flows.support.process.seeding import seeded

COUNTS = (1, 2, 3, 5, 8, 12, 20, 35, 60, 100, 160)
STRENGTHS = (1.0, 0.1, 4.0, 16.0)  # of the prior of covariances, in units of D + 2 observations
WEAK = (1e-5, 1e-3)  # strengths that leave narrow parts as narrow as their points
ROWS_A_PART = 10  # points for each part at least
STEPS, SHORT = 80, 25  # of expectation maximization at most, and while numbers are compared,
FEWEST = 8  # and at least, once the time for it is over
TOLERANCE = 1e-3  # nats a point and step, below which it has converged
LLOYD = 4  # steps of k-means before it
PATIENCE = 2  # numbers of parts without a gain, after which no larger one is tried
FOLDS, FOLDED_UP_TO = 5, 2000  # few points are held out in turns
APART = 0.1  # standard deviations, by which the halves of a part differ
NARROW_SEED = 0  # of mixtures with a weak prior
ERRORS = 2.0  # standard errors by which these have to gain
CHUNK = 2**22  # numbers of one piece of the work


class Parts(NamedTuple):
    """Log weights (K,), means (K, D) and lower triangular factors P (K, D, D) of precisions, P' P."""

    log_weights: Tensor
    loc: Tensor
    factor: Tensor

    def terms(self, x: Tensor) -> Tensor:
        """Return the log weight and density (N, K) of each part at points (N, D)."""
        z, dim = by_part(x, self.loc, self.factor), self.loc.shape[-1]
        log_volume = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.log_weights + log_volume - 0.5 * (z.square().sum(-1) + dim * math.log(2.0 * math.pi))

    def moved(self, loc: Tensor, scale: Tensor) -> Parts:
        """Return the mixture of the points m + A x, for m (D,) and A (D, D)."""
        back = torch.linalg.inv(self.factor.double())
        root = scale.double() @ back
        return Parts(self.log_weights, loc + self.loc @ scale.mT, _factor_of(root @ root.mT).to(loc))

    def split(self, least: int) -> Parts:
        """Return the same mixture, but for some hundredths, with each part split into as many as make ``least``."""
        times = -(-least // len(self.log_weights))
        if times < 2:
            return self
        log_weights, loc, factor = (part.repeat_interleave(times, 0) for part in self)
        away = torch.linalg.solve_triangular(factor, torch.randn_like(loc)[..., None], upper=False)[..., 0]
        return Parts(log_weights - math.log(times), loc + APART * away, factor)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log densities (N,) of points (N, D), in double precision."""
        return torch.cat([self.terms(part).logsumexp(-1).double() for part in pieces(x, self.loc.numel())])


def pieces(x: Tensor, width: int) -> Iterator[Tensor]:
    """Split points so that each makes ``width`` numbers at a time and all of them fit a cache's multiple."""
    yield from x.split(max(CHUNK // width, 1))


def maximize(
    x: Tensor, count: int, *, strength: float, steps: int, over: Callable[[], bool], start: Parts | None = None
) -> Parts:
    r"""Return the posterior mode of a mixture of ``count`` Gaussians of white points (N, D), from k-means or a start.

    Covariances have an inverse Wishart prior of ``strength`` (D + 2) observations of :math:`K^{-2/D} I`.

    References: Dempster, Laird and Rubin 1977, doi:10.1111/j.2517-6161.1977.tb01600.x; Fraley and Raftery 2007,
    doi:10.1007/s00357-007-0004-5 (the prior); Arthur and Vassilvitskii 2007, *k-means++*.
    """
    dim = x.shape[1]
    prior = strength * (dim + 2.0)
    spread = torch.eye(dim).to(x) * prior * count ** (-2.0 / dim)
    if start is None:
        share = torch.nn.functional.one_hot(_nearest(x, _centers(x, count)), count).to(x)
        parts = _maximized(_moments(zip(pieces(x, 1024), pieces(share, 1024), strict=True)), spread, prior)
    else:
        parts = start
    before = -math.inf
    for step in range(steps):
        heights: list[float] = []
        parts = _maximized(_moments(_shared(x, parts, heights)), spread, prior)
        now = sum(heights) / len(x)
        if now - before < TOLERANCE or (step >= FEWEST and over()):
            break
        before = now
    return parts


Moments = tuple[Tensor, Tensor, Tensor]


def _shared(x: Tensor, parts: Parts, heights: list[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield points with the shares (N, K) that parts have in them, and tell the sums of their log densities."""
    for piece in pieces(x, max(parts.loc.numel(), 1024)):
        terms = parts.terms(piece)
        whole = terms.logsumexp(-1, keepdim=True)
        heights.append(float(whole.sum()))
        yield piece, (terms - whole).exp()


def _moments(shared: Iterable[tuple[Tensor, Tensor]]) -> Moments:
    """Return the weights (K,), sums (K, D) and sums of squares (K, D, D) of points, shared among parts.

    In double precision: the variance of a part of equal values is a difference of squares, and must not be negative.
    """
    found = None
    for piece, share in ((points.double(), shares.double()) for points, shares in shared):
        squares = (share[:, :, None] * piece[:, None, :]).flatten(1).mT @ piece
        new = share.sum(0), share.mT @ piece, squares.unflatten(0, (share.shape[1], -1))
        found = new if found is None else (found[0] + new[0], found[1] + new[1], found[2] + new[2])
    assert found is not None
    return found


def _maximized(moments: Moments, spread: Tensor, prior: float) -> Parts:
    weight, total, squares = moments
    many = weight.clamp_min(1e-3)
    loc = total / many[:, None]
    scatter = squares - many[:, None, None] * loc[:, :, None] * loc[:, None, :]
    covariance = (scatter + spread.double()) / (many + prior)[:, None, None]
    log_weights = torch.log((weight + 1.0) / (weight + 1.0).sum())
    return Parts(*(part.to(spread) for part in (log_weights, loc, _factor_of(covariance))))


def _factor_of(covariance: Tensor) -> Tensor:
    """Return lower triangular factors P (K, D, D) of the precisions P' P of covariances."""
    tril = torch.linalg.cholesky(covariance)
    eye = torch.eye(tril.shape[-1], dtype=tril.dtype, device=tril.device).expand_as(tril)
    return torch.linalg.solve_triangular(tril, eye, upper=False)


def _centers(x: Tensor, count: int) -> Tensor:
    """Choose points far from each other at random (k-means++), and let them move to the middle of their points."""
    centers = x[torch.randint(len(x), (1,)).to(x.device)]
    distance = (x - centers).square().sum(-1)
    for _ in range(count - 1):
        place = torch.multinomial(distance.double().clamp_min(1e-12), 1) if len(x) < 2**24 else distance.argmax()[None]
        centers = torch.cat([centers, x[place]])
        distance = torch.minimum(distance, (x - centers[-1]).square().sum(-1))
    for _ in range(LLOYD if count > 1 else 0):
        nearest = _nearest(x, centers)
        total = torch.zeros_like(centers).index_add_(0, nearest, x)
        many = torch.bincount(nearest, minlength=count).to(x)[:, None]
        centers = torch.where(many > 0, total / many.clamp_min(1.0), centers)
    return centers


def _nearest(x: Tensor, centers: Tensor) -> Tensor:
    half = 0.5 * centers.square().sum(-1)
    return torch.cat([(half - piece @ centers.mT).argmin(-1) for piece in pieces(x, len(centers))])


def choose(
    x: Tensor, held_out: Tensor | None, *, narrow: bool = False, over: Callable[[], bool] = lambda: False
) -> list[Parts]:
    """Return the mixture of the number of parts, and of the strength of the prior, that held-out points like best.

    The points (N, D) are white. Up to 2000 are held out in five turns; of more, ``held_out`` is taken, or a tenth.

    ``narrow``: weak priors are tried too. They leave parts as narrow as their points: clusters of far smaller scales
    than the spread of all points, values that repeat, thin sheets. The best such mixture is a second one to return, if
    held-out points gain more than two standard errors.
    """
    search = _Search(x, _splits(x, held_out), over)
    best = search.best(STRENGTHS)
    found = [best.finished()]
    if narrow and not over():
        with seeded(NARROW_SEED, x.device):  # what comes after draws the same numbers with and without it
            weak = search.best(WEAK, least=best.count)  # often fewer parts are best with a weak prior
            found += [weak.finished(of_folds=True)] if weak.beats(best) else []
    return found


@dataclass(frozen=True)
class _Search:
    """Points, how they are held out, and when to stop."""

    x: Tensor
    splits: Sequence[tuple[Tensor, Tensor]]
    over: Callable[[], bool]

    def best(self, strengths: Sequence[float], *, least: int = 1) -> _Tried:
        """Compare numbers of parts with the first strength, ``least`` among them, then other strengths with the best.

        After two numbers in turn that are worse, no larger one is tried.
        """
        most = max(min(len(train) for train, _ in self.splits) // ROWS_A_PART, 1)
        tried: list[_Tried] = []
        for count in [count for count in COUNTS if count <= most] or [1]:
            tried.append(self._attempt(count, strengths[0]))
            last = list(pairwise(one.score for one in tried))[-PATIENCE:]
            worse = len(last) == PATIENCE and all(after < before for before, after in last)
            if self.over() or (worse and count >= least):
                break
        first = max(tried, key=lambda one: one.score)
        tried += [self._attempt(first.count, prior, first.whole) for prior in strengths[1:] if not self.over()]
        return max(tried, key=lambda one: one.score)

    def _attempt(self, count: int, prior: float, start: Parts | None = None) -> _Tried:
        made = [
            maximize(train, count, strength=prior, steps=SHORT, over=self.over, start=start) for train, _ in self.splits
        ]
        held_out = torch.cat([parts.log_prob(test) for parts, (_, test) in zip(made, self.splits, strict=True)])
        return _Tried(self, count, prior, held_out, made)


@dataclass(frozen=True)
class _Tried:
    search: _Search
    count: int
    prior: float
    held_out: Tensor  # log densities of held-out points
    made: Sequence[Parts]  # a mixture for each way to hold points out

    @property
    def score(self) -> float:
        return float(self.held_out.mean())

    @property
    def whole(self) -> Parts | None:
        """The mixture, if it is one of all points."""
        return self.made[0] if self.search.splits[0][0] is self.search.x else None

    def beats(self, other: _Tried) -> bool:
        """Whether held-out points clearly gain; one point does not tell."""
        gains = self.held_out - other.held_out
        return len(gains) > 1 and float(gains.mean()) > ERRORS * float(gains.std()) / math.sqrt(len(gains))

    def finished(self, *, of_folds: bool = False) -> Parts:
        """Return the mixture of all points, after as many steps as it takes.

        ``of_folds``: it begins at that mixture without some of the points which describes all of them best, since
        whether k-means finds narrow parts is a matter of luck.
        """
        of, start = self.search, self.whole
        if of_folds:
            start = max(self.made, key=lambda parts: float(parts.log_prob(of.x).mean()))
        return maximize(of.x, self.count, strength=self.prior, steps=STEPS, over=of.over, start=start)


def _splits(x: Tensor, held_out: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    if len(x) > FOLDED_UP_TO and held_out is not None:
        return [(x, held_out)]
    order = torch.randperm(len(x)).to(x.device)
    folds = FOLDS if 2 * FOLDS <= len(x) <= FOLDED_UP_TO else 1
    size = max(len(x) // (folds if folds > 1 else 10), 1)
    places = [order[number * size : (number + 1) * size] for number in range(folds)]
    rest = [torch.cat([order[: number * size], order[(number + 1) * size :]]) for number in range(folds)]
    return [(x[others] if len(others) else x, x[own]) for others, own in zip(rest, places, strict=True)]
