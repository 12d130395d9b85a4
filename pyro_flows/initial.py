"""Where a fit starts: a portfolio of affine maps, scored by their ELBO on common random numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_flows.log_density import LogDensity, quiet, seeded

FULL_HESSIAN_UP_TO = 200
PRIOR_DRAWS = 200
SEARCHES = 8
SEARCHES_UNBATCHED = 3
NEWTON_STEPS = 60
NEWTON_HALVINGS = 12
NEWTON_TOLERANCE = 1e-6
SCORE_DRAWS = 256
TRIM = 0.05


@dataclass(frozen=True)
class Start:
    """An affine map z = loc + scale eps: ``scale`` is (D,) or lower triangular (D, D); ``elbo`` in nats, robust."""

    name: str
    loc: Tensor
    scale: Tensor
    elbo: float = -math.inf

    def map(self, noise: Tensor) -> tuple[Tensor, float]:
        """Return the images (S, D) of noise (S, D) and the log determinant."""
        if self.scale.dim() == 1:
            return self.loc + self.scale * noise, float(self.scale.log().sum())
        return self.loc + noise @ self.scale.mT, float(self.scale.diagonal().log().sum())


def portfolio(density: LogDensity, *, seed: int, df: float = 15.0) -> list[Start]:
    """Return all usable starts, the best ELBO first.

    Starts: standard (zero, one), the prior's median and scale, and the modes found by Newton's method from prior draws,
    with the full and the diagonal Laplace curvature. ELBOs use the same Student-t noise for all and leave out the
    lowest 5 % of the draws, where a wide start can fall arbitrarily low.

    Raises:
        ValueError: if the log density is infinite or NaN at every starting point; the sites at fault are named.
    """
    zero = torch.zeros(density.dim, dtype=density.dtype, device=density.device)
    draws = prior_draws(density, PRIOR_DRAWS, seed=seed)
    middle = draws.median(0).values
    spread = 1.4826 * (draws - middle).abs().median(0).values
    spread = torch.where((spread > 0) & torch.isfinite(spread), spread, 1.0)
    points = torch.stack([zero, middle, *draws[:SEARCHES]])
    finite = torch.isfinite(density(points).detach())
    if not bool(finite.any()):
        raise ValueError(
            f"log density: not finite at any of {len(points)} starting points; at the prior median "
            f"{density.explain(middle)}. Check the data against the likelihood's support, and the priors."
        )
    starts = [Start("standard", zero, torch.ones_like(zero)), Start("prior", middle, spread)]
    starts += laplace(density, points[finite])
    with seeded(seed, density.device):
        base = dist.StudentT(df * torch.ones_like(zero), 0.0, 1.0).to_event(1)
        noise = base.sample((SCORE_DRAWS,))
    log_noise = base.log_prob(noise)
    scored = [_scored(density, start, noise, log_noise) for start in starts]
    return sorted((start for start in scored if math.isfinite(start.elbo)), key=lambda start: -start.elbo)


def _scored(density: LogDensity, start: Start, noise: Tensor, log_noise: Tensor) -> Start:
    z, log_determinant = start.map(noise)
    with torch.no_grad():
        terms = torch.nan_to_num(density(z) - log_noise + log_determinant, nan=-torch.inf).sort().values
    return Start(start.name, start.loc, start.scale, float(terms[int(TRIM * len(terms)) :].mean()))


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
            transform = biject_to(fn.support)
            shape = transform.inverse_shape(fn.shape())
            msg["value"] = transform(torch.randn(shape, dtype=self.like.dtype, device=self.like.device))

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.like = like


def prior_draws(density: LogDensity, draws: int, *, seed: int) -> Tensor:
    """Draw (draws, D) unconstrained coordinates from the prior; rows that are not finite are set to zero."""
    like = torch.zeros(1, dtype=density.dtype, device=density.device)

    def draw(_: Tensor) -> dict[str, Tensor]:
        with poutine.block(), _FromPrior(like):
            trace = poutine.trace(density.model).get_trace(*density.args, **density.kwargs)
        return {name: trace.nodes[name]["value"] for name in density.names}

    with torch.no_grad(), seeded(seed, density.device):
        z = density.unconstrain(density.map(draw, like.expand(draws, 1), randomness="different"))
    return torch.where(torch.isfinite(z).all(-1, keepdim=True), z, 0.0)


# modes ---------------------------------------------------------------------------------------------------------------


def laplace(density: LogDensity, points: Tensor) -> list[Start]:
    """Climb from each point (K, D); return Laplace starts at the best mode by Laplace evidence, full and diagonal."""
    if density.dim > FULL_HESSIAN_UP_TO:
        return []
    modes = _climb(density, points if density.batched else points[:SEARCHES_UNBATCHED])
    roots, units = _inverse_curvature(density, modes)
    with torch.no_grad():
        evidence = density(modes) + torch.linalg.slogdet(roots).logabsdet
    evidence = torch.nan_to_num(evidence, nan=-torch.inf, posinf=-torch.inf)
    best = int(evidence.argmax())
    if not math.isfinite(float(evidence[best])):
        return []
    upper = torch.linalg.qr(roots[best].mT).R
    factor = (upper * upper.diagonal().sign()[:, None]).mT.tril()
    return [Start("laplace", modes[best], factor), Start("laplace diagonal", modes[best], units[best])]


def _climb(density: LogDensity, points: Tensor) -> Tensor:
    """Newton's method with the absolute eigenvalues of the Hessian, halved until the density rises, from each point.

    Affine-invariant near a mode, so that scales of 1e-6 and 1e6 side by side do no harm; an ascent direction everywhere.
    """
    halvings = 0.5 ** torch.arange(NEWTON_HALVINGS, dtype=density.dtype, device=density.device)
    heights, gradients = density.value_and_grad(points)
    for _ in range(NEWTON_STEPS):
        roots, _ = _inverse_curvature(density, points)
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


def _inverse_curvature(density: LogDensity, points: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return W (K, D, D) with :math:`W W^\top = |H|^{-1}`, H the Hessian, and :math:`|H_{ii}|^{-1/2}` (K, D).

    Scaled by the diagonal first: the eigenvalues of a matrix with entries of 1e-12 and 1e12 would be noise.
    Where the Hessian is not finite, W is the identity.
    """
    hessians = _hessians(density, points)
    hessians = 0.5 * (hessians + hessians.mT)
    sizes = hessians.diagonal(dim1=-2, dim2=-1).abs()
    units = torch.where(sizes > torch.finfo(sizes.dtype).tiny ** 0.5, sizes.rsqrt(), 1.0)
    scaled = units[..., None] * hessians * units[..., None, :]
    usable = torch.isfinite(scaled).all(-1).all(-1)
    identity = torch.eye(density.dim, dtype=density.dtype, device=density.device)
    scaled = torch.where(usable[:, None, None], scaled, identity)
    units = torch.where(usable[:, None], units, 1.0)
    values, vectors = torch.linalg.eigh(scaled)
    floor = 1e-10 if density.dtype == torch.float64 else 1e-5
    values = torch.maximum(values.abs(), floor * values.abs().amax(-1, keepdim=True))
    return units[..., None] * vectors * values.rsqrt()[..., None, :], units


def _hessians(density: LogDensity, points: Tensor) -> Tensor:
    """Hessians (K, D, D): automatic differentiation where the model allows, differences of gradients otherwise."""
    if density.batched:
        try:
            with torch.no_grad(), quiet():
                return torch.func.vmap(torch.func.jacrev(torch.func.grad(density.single)))(points)
        except RuntimeError:
            pass
    step = torch.finfo(points.dtype).eps ** (1 / 3) * (1.0 + points.abs())
    shifts = torch.diag_embed(step)
    ends = torch.cat([points[:, None] + shifts, points[:, None] - shifts]).flatten(0, 1)
    up, down = density.value_and_grad(ends)[1].unflatten(0, (2 * len(points), density.dim)).chunk(2)
    return (up - down) / (2.0 * step[..., None])
