"""Where a fit starts: a portfolio of affine maps, scored by their ELBO on common random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flows.inference.starts.climb import NEWTON, TICKS, laplace
from pyro_flows.inference.starts.curvature import (
    FULL_HESSIAN_UP_TO,
    SMALL_UP_TO,
    inverse_roots,
    lower_triangular,
    scales,
)
from pyro_flows.inference.starts.gaussians import Start, divergence, standard
from pyro_flows.inference.starts.pathfinder import pathfinder, pool
from pyro_flows.inference.starts.prior import (
    PATHS,
    PRIOR_DRAWS,
    SEARCHES,
    path_starts,
    possible_points,
    prior_draws,
    spread_of,
    without_noise,
)
from pyro_flows.inference.verdict.deciding import COMPARED_DRAWS, JUDGED_DRAWS, LOOKED_AT_DRAWS
from pyro_flows.inference.verdict.weighing import Weighing, weigh
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.stack import NotStackable, Stack
from pyro_flows.support.process import stages
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.thresholds import (
    ESS_SHARE_EVEN,
    ESS_SHARE_LEAST,
    EVIDENCE_GAP_NEGLIGIBLE,
    K_HAT_MOST,
    TAIL_SHARE,
)

SAME_END = 0.1  # sds between ends of paths that are one place
CHEAP_HESSIAN_WRITES = 1e6  # numbers for each point, at most


def portfolio(density: LogDensity, *, seed: int, extra: Sequence[Start] = (), df: float = 15.0) -> list[Start]:
    """Return all usable starts, the best ELBO first.

    Starts: standard (zero, one); the prior's median and scale; the modes found by Newton's method from prior draws,
    with the full and the diagonal Laplace curvature; the best Gaussian along Pathfinder's paths from the same draws,
    and the moments of draws of all paths; and those in ``extra``. A start by Pathfinder that is next to the same as
    another is left out. ELBOs use the same Student-t noise of variance 1 for all and leave out the lowest 5 % of the
    draws, where a wide start can fall arbitrarily low.

    Newton's method stays beside L-BFGS up to 200 dimensions: its modes are exact and come with the evidence by which
    missed modes are found. Above 50, for long models, and where a gradient handles many numbers, it begins where the
    paths ended, since a Hessian is costly there, and goes on for ten steps at most. Above 200 it begins at the
    highest end only, and above 1000 the paths have to do.

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
        density.check_digits(draws)
        raise ValueError(
            f"log density: not finite at any of {PRIOR_DRAWS} draws of the prior, nor where single values of them are "
            f"put together; at the prior median "
            f"{density.explain(middle)}. Check the data against the likelihood's support, and the priors."
        )
    starts = [*extra, standard(density), Start("prior", middle, spread)]
    most = density.affordable(TICKS * len(points)) // TICKS
    points = points[finite][: most if density.batched else PATHS]
    starts = _climbed(density, starts, points, seed)
    with seeded(seed, density.device):
        unit = math.sqrt((df - 2.0) / df)
        base = dist.StudentT(df * torch.ones_like(zero), 0.0, unit).to_event(1)
        noise = base.sample((density.affordable(COMPARED_DRAWS * len(starts)) // len(starts),))
    log_noise = base.log_prob(noise)
    scored: list[Start] = []
    with density.clock.part(stages.ELBOS):
        scored += (_scored(density, start, noise, log_noise) for start in starts)
    scored += starts[len(scored) :]
    with density.clock.part(stages.ELBOS, noted=False):
        resolved = without_noise(density, torch.stack([start.loc for start in scored])).tolist()
        scored = [start for start, there in zip(scored, resolved, strict=True) if there] or scored
    usable = [start for start in scored if math.isfinite(start.elbo)]
    if usable and not density.clock.over:
        density.check_digits(max(usable, key=lambda start: start.elbo).map(noise))
    # where the support cuts through every start, none has a finite ELBO
    return sorted(usable or scored, key=lambda start: -start.elbo)


def _climbed(density: LogDensity, starts: list[Start], points: Tensor, seed: int) -> list[Start]:
    """Return starts with those at modes, by Newton's method from points (K, D) or where paths from there ended."""
    dim = density.dim
    costly = dim > SMALL_UP_TO or density.long or dim * density.written > CHEAP_HESSIAN_WRITES
    if not costly:
        with density.clock.part(stages.MODES, share=0.5):
            starts = starts + laplace(density, points)
    paths, ends = list[Start](), points
    with density.clock.part(stages.PATHS, share=0.7):
        paths, ends = along_paths(density, points, seed=seed)
    if costly:
        with density.clock.part(stages.MODES):
            starts = starts + laplace(density, ends, most=NEWTON)
    for start in paths:
        if not any(divergence(start, other) < 0.1 for other in starts):  # nats
            starts = [*starts, start]
    return starts


def _scored(density: LogDensity, start: Start, noise: Tensor, log_noise: Tensor) -> Start:
    with torch.no_grad():
        terms = density(start.map(noise)) - log_noise + start.volume
        terms = torch.nan_to_num(terms, nan=-torch.inf).sort().values
    return replace(start, elbo=float(terms[int(TAIL_SHARE * len(terms)) :].mean()))


# paths ----------------------------------------------------------------------------------------------------------------


def along_paths(density: LogDensity, points: Tensor, *, seed: int) -> tuple[list[Start], Tensor]:
    """Starts by Pathfinder from points (K, D): the best Gaussian of all paths, and the moments of draws from all.

    The places (N, D) where paths ended come with them, each once, the highest first.

    Paths are measured by the full and by the diagonal curvature where they begin, in turn: the one makes them fast
    where coordinates depend on each other, the other finds more where a mode is far from the mass. Above 200 dimensions
    curvature and scales are diagonal; there paths go two legs, and only the highest end is returned, with its Laplace
    start.
    """
    if density.dim > FULL_HESSIAN_UP_TO:
        return _along_diagonal_paths(density, points[:PATHS], seed=seed)
    roots, units = inverse_roots(density, points)
    frames = lower_triangular(roots)
    frames[1::2] = torch.diag_embed(units[1::2])
    found = pathfinder(density, points, frames, seed=seed)
    pooled = pool(density, found.best, seed=seed)
    best = int(pooled.elbo.argmax())
    if not math.isfinite(float(pooled.elbo[best])):
        return [], found.ends
    single = Start("pathfinder", found.best.loc[best], lower_triangular(found.best.scale()[best]))
    ends = _apart(density, found.ends, single.scale.norm(dim=1))
    if not pooled.k_hat < K_HAT_MOST:
        return [single], ends
    # as if D more draws had the covariance of the best path
    share = pooled.ess / (pooled.ess + density.dim)
    covariance = share * pooled.covariance + (1.0 - share) * single.scale @ single.scale.mT
    root, fault = torch.linalg.cholesky_ex(covariance)
    return [single] if int(fault) else [single, Start("multi-path pathfinder", pooled.mean, root)], ends


@torch.no_grad()
def _apart(density: LogDensity, ends: Tensor, sds: Tensor) -> Tensor:
    """Return places (N, D), the highest first, without those within a tenth of ``sds`` (D,) of a higher one."""
    ends = ends[density(ends).argsort(descending=True)]
    same = ((ends[:, None] - ends) / sds).abs().amax(-1) < SAME_END
    return ends[~same.tril(-1).any(1)]


def _along_diagonal_paths(density: LogDensity, points: Tensor, *, seed: int) -> tuple[list[Start], Tensor]:
    legs = []
    for _ in range(2):  # legs
        legs.append(pathfinder(density, points, scales(density, points), seed=seed))
        points = legs[-1].ends
    found = max(legs, key=lambda leg: float(leg.elbo.max()))
    best = int(found.elbo.argmax())
    with torch.no_grad():
        end = points[density(points).argmax()]
    starts = [
        Start("pathfinder", found.best.loc[best], found.best.scale()[best]),
        Start("laplace diagonal", end, scales(density, end[None])[0]),
    ]
    return starts, end[None]


# many data sets at once -----------------------------------------------------------------------------------------------


def starts_together(stack: Stack, *, seed: int, df: float) -> list[Start]:
    """Return the best start of each data set, by the ELBO on common Student-t noise.

    Paths begin at the prior's median and at draws of the prior, in units of the curvature there. Candidates are the
    best Gaussian along each path and the Laplace approximation at its end.

    Raises:
        NotStackable: above 200 dimensions, where Hessians cost too much.
    """
    if stack.dim > FULL_HESSIAN_UP_TO:
        raise NotStackable(f"more than {FULL_HESSIAN_UP_TO} dimensions")
    draws = prior_draws(stack.densities[0], PRIOR_DRAWS, seed=derive(seed, "starts"))
    points = path_starts(draws).repeat(len(stack), 1)
    paths = pathfinder(stack, points, lower_triangular(inverse_roots(stack, points)[0]), seed=seed)
    roots = lower_triangular(inverse_roots(stack, paths.ends)[0])
    normals = (paths.best.loc, paths.ends), (lower_triangular(paths.best.scale()), roots)
    # candidates of each data set: places (K, C, D), and lower triangular scales (K, C, D, D)
    loc, scale = (torch.cat([part.unflatten(0, (len(stack), -1)) for part in parts], 1) for parts in normals)
    with seeded(derive(seed, "scores of starts"), stack.device):
        one = torch.ones(stack.dim, dtype=stack.dtype, device=stack.device)
        base = dist.StudentT(df * one, 0.0, 1.0).to_event(1)
        noise = base.sample((COMPARED_DRAWS // 2,))
    elbos = _scores(stack, loc, scale, noise, base.log_prob(noise))
    best = elbos.nan_to_num(nan=-torch.inf).argmax(1).tolist()
    names = ("pathfinder",) * PATHS + ("laplace",) * PATHS
    return [Start(names[c], loc[k, c], scale[k, c], float(elbos[k, c])) for k, c in enumerate(best)]


def _scores(stack: Stack, loc: Tensor, scale: Tensor, noise: Tensor, log_noise: Tensor) -> Tensor:
    """Return the ELBOs (K, C), without the lowest 5 % of the draws; -inf where a map is not finite."""
    volume = scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    z = loc[:, :, None] + noise @ scale.mT
    usable = torch.isfinite(z).all(-1).all(-1)
    z = torch.where(usable[..., None, None], z, 0.0)
    log_p = stack(z.flatten(0, 2)).reshape(z.shape[:3])
    terms = (log_p - log_noise + volume[..., None]).nan_to_num(nan=-torch.inf).sort(-1).values
    elbos = terms[..., int(TAIL_SHARE * len(noise)) :].mean(-1)
    return torch.where(usable & torch.isfinite(elbos), elbos, -torch.inf)


# a start moved to the weighted moments of its own draws, without gradients --------------------------------------------

NAME = "matched moments"


@torch.no_grad()
def matched(density: LogDensity, start: Start, df: float, *, seed: int, draws: int = JUDGED_DRAWS) -> Start:
    r"""Return the start with the weighted mean and covariance of its own draws; the same start if weights are too poor.

    Draws z_i come from a Student-t distribution with the start's location and covariance. With normalized weights
    :math:`w_i \propto p(z_i) / q(z_i)`,

    .. math:: m = \sum_i w_i z_i, \qquad C = \sum_i w_i (z_i - m)(z_i - m)^\top,

    each with the same sum of even weights as a control variate, since its expectation is known. Its coefficient is the
    effective share of the draws: nearly 1 where weights are nearly even, so that the draws' own noise is gone.

    The noise of C costs about :math:`D (D + 3) / (4\, \mathrm{ESS})` nats. Where that is too much, only its diagonal
    is matched, and the correlations of the start stay. Then changes of means and sds are shrunk by what is likely to be
    noise in them, and a start whose weights are even stays as it is.

    Cost: 4000 draws of the density, no gradients. Only if their weights are good, and the new start has the better
    ELBO, does a second round of ``draws`` follow.

    Reference: Cappé, Douc, Guillin, Marin and Robert 2008, "Adaptive importance sampling in general mixture classes"
    (arXiv 0710.4242), with one component.
    """
    for number in range(2):
        count = density.affordable(draws if number else LOOKED_AT_DRAWS)
        with density.clock.watching():
            noise, log_noise = _noise(density, df, count, seed=derive(seed, f"matching {number}"))
            z = start.map(noise)
        weighing = weigh(z, density(z), log_noise - start.volume)
        if not tells_moments(weighing):
            return start
        start = replace(moved(start, z, weighing), elbo=max(start.elbo, weighing.elbo))
    return start


def tells_moments(weighing: Weighing) -> bool:
    """Whether weights are good enough to tell moments, and uneven enough to tell others than those of the draws."""
    return weighing.k_hat < K_HAT_MOST and ESS_SHARE_LEAST < weighing.share <= ESS_SHARE_EVEN


def _noise(density: LogDensity, df: float, draws: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Draw Student-t noise (S, D) of variance 1, and its log densities (S,)."""
    unit = torch.full((density.dim,), math.sqrt((df - 2.0) / df), dtype=density.dtype, device=density.device)
    base = dist.StudentT(df, torch.zeros_like(unit), unit).to_event(1)
    with seeded(seed, density.device):
        noise = base.sample((draws,))
    return noise, base.log_prob(noise)


def moved(start: Start, z: Tensor, weighing: Weighing) -> Start:
    """Return the start at the weighted moments of draws z (S, D)."""
    share, weights = weighing.share, weighing.log_weights.exp()
    more = (weights - share / len(z)).to(z)
    mean = start.loc + more @ (z - start.loc)
    away, moved, root = z - mean, start.loc - mean, start.scale
    known = (root @ root.mT if root.dim() == 2 else root.square().diag()) + torch.outer(moved, moved)
    covariance = share * known + (more[:, None] * away).mT @ away
    dim = z.shape[1]
    if dim * (dim + 3.0) / 4.0 < EVIDENCE_GAP_NEGLIGIBLE * weighing.ess:
        root, fault = torch.linalg.cholesky_ex(covariance)
        if not int(fault):
            return replace(start, name=NAME, loc=mean, scale=root, evidence=None)
    spread = start.sds
    variances = covariance.diagonal().clamp_min(0.0)
    mean = start.loc + spread * _shrunk((mean - start.loc) / spread, 1.0 / weighing.ess)
    ratio = _shrunk((variances.sqrt() / spread).log(), 0.5 / weighing.ess).exp()
    scale = ratio[:, None] * start.scale if start.scale.dim() == 2 else ratio * start.scale
    return replace(start, name=NAME, loc=mean, scale=scale, evidence=None)


def _shrunk(change: Tensor, variance: float) -> Tensor:
    """Shrink estimated changes (D,) of a given variance towards 0, those most that are within their standard error."""
    return change * (1.0 - variance / change.square()).clamp_min(0.0)
