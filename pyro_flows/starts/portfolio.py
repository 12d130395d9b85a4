"""Where a fit starts: a portfolio of affine maps, scored by their ELBO on common random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flows._seeding import seeded
from pyro_flows.model.batching import apart, where_possible
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.supports import bijection
from pyro_flows.starts.curvature import FULL_HESSIAN_UP_TO, inverse_roots, lower_triangular, scales
from pyro_flows.starts.pathfinder import pathfinder, pool

PRIOR_DRAWS = 200
SEARCHES = 8
TRIED_VALUES, FARTHER, PASSES = 40, 4.0, 3
SEARCHES_UNBATCHED = 3
PATHS_IF_LARGE = 4
LEGS = 2
SAME = 0.1  # nats
TRUSTED_K_HAT = 0.7  # beyond, moments of weighted draws hang on a few of them
MODES = 4
MODES_WITHIN = 20.0  # nats of Laplace evidence below the best
NEWTON_STEPS = 60
NEWTON_HALVINGS = 12
NEWTON_TOLERANCE = 1e-6
SCORE_DRAWS = 256
TRIM = 0.05


@dataclass(frozen=True)
class Start:
    """An affine map z = loc + scale eps: ``scale`` is (D,) or lower triangular (D, D); ``elbo`` in nats, robust.

    ``evidence`` is Laplace's estimate of the log mass around ``loc``, for starts at a mode with full curvature.
    """

    name: str
    loc: Tensor
    scale: Tensor
    elbo: float = -math.inf
    evidence: float | None = None

    @property
    def volume(self) -> float:
        """The log determinant of the map."""
        return float((self.scale if self.scale.dim() == 1 else self.scale.diagonal()).log().sum())

    def map(self, noise: Tensor) -> Tensor:
        """Return the images (S, D) of noise (S, D)."""
        return self.loc + (self.scale * noise if self.scale.dim() == 1 else noise @ self.scale.mT)


def portfolio(density: LogDensity, *, seed: int, extra: Sequence[Start] = (), df: float = 15.0) -> list[Start]:
    """Return all usable starts, the best ELBO first.

    Starts: standard (zero, one); the prior's median and scale; the modes found by Newton's method from prior draws,
    with the full and the diagonal Laplace curvature; the best Gaussian along Pathfinder's paths from the same draws,
    and the moments of draws of all paths; and those in ``extra``. A start by Pathfinder that is next to the same as
    another is left out. ELBOs use the same Student-t noise for all and leave out the lowest 5 % of the draws, where a
    wide start can fall arbitrarily low.

    Newton's method stays beside L-BFGS up to 200 dimensions: its modes are exact and come with the evidence by which
    missed modes are found. Above that it would be too dear, and the paths have to do.

    Raises:
        ValueError: if the log density is infinite or NaN at every starting point; the sites at fault are named.
    """
    zero = torch.zeros(density.dim, dtype=density.dtype, device=density.device)
    draws = prior_draws(density, PRIOR_DRAWS, seed=seed)
    middle, spread = draws.median(0).values, spread_of(draws)
    points = torch.stack([zero, middle, *draws[:SEARCHES]])
    finite = torch.isfinite(density(points).detach())
    if not bool(finite.any()):
        points = possible_points(density, draws)
        finite = torch.ones(len(points), dtype=torch.bool, device=points.device)
    if not len(points):
        raise ValueError(
            f"log density: not finite at any of {PRIOR_DRAWS} draws of the prior, nor where single values of them are "
            f"put together; at the prior median "
            f"{density.explain(middle)}. Check the data against the likelihood's support, and the priors."
        )
    starts = [*extra, standard(density), Start("prior", middle, spread)]
    points = points[finite] if density.batched else points[finite][:SEARCHES_UNBATCHED]
    with density.clock.part("the climbs to modes", share=0.5):
        starts += laplace(density, points)
    with density.clock.part("the paths to modes", share=0.7):
        for start in along_paths(density, points, seed=seed):
            if not any(_divergence(start, other) < SAME for other in starts):
                starts.append(start)
    with seeded(seed, density.device):
        base = dist.StudentT(df * torch.ones_like(zero), 0.0, 1.0).to_event(1)
        noise = base.sample((SCORE_DRAWS,))
    log_noise = base.log_prob(noise)
    scored: list[Start] = []
    with density.clock.part("the scores of starts"):
        scored += (_scored(density, start, noise, log_noise) for start in starts)
    scored += starts[len(scored) :]
    usable = [start for start in scored if math.isfinite(start.elbo)]
    # where the support cuts through every start, none has a finite ELBO: all are left to the race
    return sorted(usable or scored, key=lambda start: -start.elbo)


def standard(density: LogDensity) -> Start:
    """Return the start that needs no work: zero, with unit scales."""
    zero = torch.zeros(density.dim, dtype=density.dtype, device=density.device)
    return Start("standard", zero, torch.ones_like(zero))


def _scored(density: LogDensity, start: Start, noise: Tensor, log_noise: Tensor) -> Start:
    with torch.no_grad():
        terms = density(start.map(noise)) - log_noise + start.volume
        terms = torch.nan_to_num(terms, nan=-torch.inf).sort().values
    return replace(start, elbo=float(terms[int(TRIM * len(terms)) :].mean()))


@torch.no_grad()
def possible_points(density: LogDensity, draws: Tensor) -> Tensor:
    """Return points (N, D) where the density is finite: draws of the prior, or one put together from their coordinates.

    Supports that depend on latents may rule out nearly all draws: eight unknown bounds of uniform data have to hold at
    once. So from the draw at which the fewest terms are impossible, a coordinate at a time takes the value of
    another draw, or one from farther out, that leaves fewer of them. Empty if none is found.
    """
    finite = torch.isfinite(density(draws))
    if bool(finite.any()):
        return draws[finite][:SEARCHES]
    middle = draws.median(0).values
    values = torch.cat([draws[:TRIED_VALUES], middle + FARTHER * (draws[:TRIED_VALUES] - middle)])
    faults = _impossible_terms(density, draws)
    best, fewest = draws[int(faults.argmin())].clone(), int(faults.min())
    for _ in range(PASSES if density.batched else 1):
        before = fewest
        for coordinate in range(density.dim):
            tried = best.repeat(len(values), 1)
            tried[:, coordinate] = values[:, coordinate]
            faults = _impossible_terms(density, tried)
            if int(faults.min()) < fewest:
                # of the values that are possible, one that is far from the edge: the median of them
                as_good = tried[faults == faults.min()]
                chosen = as_good[:, coordinate].argsort()[len(as_good) // 2]
                best, fewest = as_good[chosen], int(faults.min())
        if fewest == 0 or fewest == before:
            break
    return best[None] if bool(torch.isfinite(density(best[None])).all()) else draws[:0]


def _impossible_terms(density: LogDensity, z: Tensor) -> Tensor:
    """Count the terms (S,) of the density that are not finite, the density itself among them."""
    terms = [density(z)[:, None], *density.log_likelihood(z).values(), *density.log_prior(z).values()]
    return torch.stack([(~torch.isfinite(term)).reshape(len(z), -1).sum(1) for term in terms]).sum(0)


def spread_of(draws: Tensor) -> Tensor:
    """Return the scaled median absolute deviations (D,) of draws (S, D): sds, if normal; 1 where there is no spread."""
    spread = 1.4826 * (draws - draws.median(0).values).abs().median(0).values
    return torch.where((spread > 0) & torch.isfinite(spread), spread, 1.0)


# the prior -----------------------------------------------------------------------------------------------------------


class _FromPrior(Messenger):
    """Draw latents from their priors, improper ones from a standard normal in unconstrained coordinates."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is not None or site_is_subsample(msg) or msg["infer"].get("enumerate") == "parallel":
            return
        fn = msg["fn"]
        try:
            msg["value"] = fn.sample()
        except NotImplementedError:
            transform = bijection(fn)
            shape = transform.inverse_shape(fn.shape())
            msg["value"] = transform(torch.randn(shape, dtype=self.like.dtype, device=self.like.device))

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.like = like


def prior_draws(density: LogDensity, draws: int, *, seed: int) -> Tensor:
    """Draw (draws, D) unconstrained coordinates from the prior; rows that are not finite are set to zero."""
    like = torch.zeros(1, dtype=density.dtype, device=density.device)

    def draw(_: Tensor) -> dict[str, Tensor]:
        with apart(), _FromPrior(like):
            trace = poutine.trace(density.model).get_trace(*density.args, **density.kwargs)
        sites: dict[str, Any] = trace.nodes
        return {name: sites[name]["value"] for name in density.names}

    def unconstrained(rows: Tensor) -> tuple[Tensor]:
        return (density.unconstrain(density.map(draw, rows, randomness="different")),)

    with torch.no_grad(), seeded(seed, density.device):
        (z,) = where_possible(unconstrained, like.expand(draws, 1), (density.dim,))
    return torch.where(torch.isfinite(z).all(-1, keepdim=True), z, 0.0)


# modes ---------------------------------------------------------------------------------------------------------------


def laplace(density: LogDensity, points: Tensor) -> list[Start]:
    """Climb from each point (K, D); return Laplace starts at the distinct modes, full and diagonal, the best first.

    Modes are ranked by their Laplace evidence; those far below the best, or within one sd of a better one, are left
    out.
    """
    if density.dim > FULL_HESSIAN_UP_TO:
        return []
    modes = _climb(density, points)
    roots, units = inverse_roots(density, modes)
    with torch.no_grad():
        evidence = density(modes) + torch.linalg.slogdet(roots).logabsdet
    evidence = torch.nan_to_num(evidence, nan=-torch.inf, posinf=-torch.inf)
    kept: list[int] = []
    for index in evidence.argsort(descending=True).tolist():
        if len(kept) == MODES or not float(evidence[index]) > float(evidence.max()) - MODES_WITHIN:
            break
        apart = [torch.linalg.solve(roots[other], modes[index] - modes[other]).norm() for other in kept]
        if all(float(distance) > 1.0 for distance in apart):
            kept.append(index)
    gauss = 0.5 * density.dim * math.log(2.0 * math.pi)
    starts = []
    for rank, index in enumerate(kept):
        suffix = f" {rank + 1}" if rank else ""
        starts += [
            Start(
                f"laplace{suffix}",
                modes[index],
                lower_triangular(roots[index]),
                evidence=float(evidence[index]) + gauss,
            ),
            Start(f"laplace diagonal{suffix}", modes[index], units[index]),
        ]
    return starts


def along_paths(density: LogDensity, points: Tensor, *, seed: int) -> list[Start]:
    """Starts by Pathfinder from points (K, D): the best Gaussian of all paths, and the moments of draws from all.

    Paths are measured by the full and by the diagonal curvature where they begin, in turn: the one makes them fast
    where coordinates depend on each other, the other finds more where a mode is far from the mass. Above 200 dimensions
    curvature and scales are diagonal; there paths go two legs, and the highest end gives a Laplace start.
    """
    if density.dim > FULL_HESSIAN_UP_TO:
        return _along_diagonal_paths(density, points[:PATHS_IF_LARGE], seed=seed)
    roots, units = inverse_roots(density, points)
    frames = lower_triangular(roots)
    frames[1::2] = torch.diag_embed(units[1::2])
    found = pathfinder(density, points, frames, seed=seed)
    pooled = pool(density, found.best, seed=seed)
    best = int(pooled.elbo.argmax())
    if not math.isfinite(float(pooled.elbo[best])):
        return []
    single = Start("pathfinder", found.best.loc[best], lower_triangular(found.best.scale()[best]))
    if not pooled.k_hat < TRUSTED_K_HAT:
        return [single]
    # as if D more draws had the covariance of the best path
    share = pooled.ess / (pooled.ess + density.dim)
    covariance = share * pooled.covariance + (1.0 - share) * single.scale @ single.scale.mT
    root, fault = torch.linalg.cholesky_ex(covariance)
    return [single] if int(fault) else [single, Start("multi-path pathfinder", pooled.mean, root)]


def _along_diagonal_paths(density: LogDensity, points: Tensor, *, seed: int) -> list[Start]:
    legs = []
    for _ in range(LEGS):
        legs.append(pathfinder(density, points, scales(density, points), seed=seed))
        points = legs[-1].ends
    found = max(legs, key=lambda leg: float(leg.elbo.max()))
    best = int(found.elbo.argmax())
    with torch.no_grad():
        end = points[density(points).argmax()]
    return [
        Start("pathfinder", found.best.loc[best], found.best.scale()[best]),
        Start("laplace diagonal", end, scales(density, end[None])[0]),
    ]


def _divergence(one: Start, other: Start) -> float:
    """KL(one || other) of the two Gaussians."""
    away = one.loc - other.loc
    if one.scale.dim() == other.scale.dim() == 1:
        ratio, away = one.scale / other.scale, away / other.scale
        log_ratio = ratio.log().sum()
    else:
        mine, theirs = (start.scale if start.scale.dim() == 2 else start.scale.diag() for start in (one, other))
        ratio, away = (torch.linalg.solve_triangular(theirs, x, upper=False) for x in (mine, away[:, None]))
        log_ratio = ratio.diagonal().log().sum()
    return float(0.5 * (ratio.square().sum() + away.square().sum() - len(one.loc)) - log_ratio)


def _climb(density: LogDensity, points: Tensor) -> Tensor:
    """Newton's method with the absolute eigenvalues of the Hessian, halved until the density rises, from each point.

    Affine-invariant near a mode, so that scales of 1e-6 and 1e6 side by side do no harm (L-BFGS does not converge there
    in raw coordinates); an ascent direction everywhere.
    """
    halvings = 0.5 ** torch.arange(NEWTON_HALVINGS, dtype=density.dtype, device=density.device)
    heights, gradients = density.value_and_grad(points)
    for _ in range(NEWTON_STEPS):
        roots, _ = inverse_roots(density, points)
        steps = (roots @ (roots.mT @ gradients[..., None])).squeeze(-1)
        tries = points[:, None] + halvings[:, None] * steps[:, None]
        with torch.no_grad():
            found = density(tries.flatten(0, 1)).unflatten(0, tries.shape[:2])
        best, index = torch.nan_to_num(found, nan=-torch.inf, posinf=-torch.inf).max(1)
        rises = best > heights
        promise = (steps * gradients).sum(-1)
        if not bool((rises & (promise > NEWTON_TOLERANCE)).any()):
            break
        chosen = tries[torch.arange(len(tries)), index]
        points = torch.where(rises[:, None], chosen, points)
        heights, gradients = density.value_and_grad(points)
    return points
