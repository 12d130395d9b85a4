"""Checks of the zoo's references against the models' own log densities, without a fit.

Three of them, each with an expectation that holds exactly if the draws are exact:

- Metropolis moves that leave the model's density invariant leave the distribution of exact draws as it is;
- Stein's identities: ``E[s] = 0`` and ``E[f(z) s(z)] = -E[f'(z)]`` for the score s, where its variance is finite;
- bridge sampling between exact draws and a density fitted to others gives the log evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.zoo.case import Array, Case, Draws
from pyro_flows import LogDensity

DOMINANT = 0.05  # share of a sum of squares that one draw may have, for the sum to have a standard error
LogProb = Callable[[Tensor], Tensor]


class Unchecked(Exception):
    """The draws lack a latent of the model, so that its density cannot be evaluated there."""


def density_of(case: Case) -> LogDensity:
    """Return the model's log density over unconstrained coordinates, in double precision."""
    return LogDensity(case.model, case.args, case.kwargs).in_double()


def unconstrained(density: LogDensity, case: Case, draws: Draws) -> Tensor:
    """Return exact draws in the model's unconstrained coordinates (n, D), in double precision.

    Raises:
        Unchecked: if the draws lack a latent of the model.
    """
    missing = [name for name in density.names if name not in draws]
    if missing:
        raise Unchecked(f"no exact draws of {', '.join(missing)}")
    values = {name: torch.as_tensor(draws[name], dtype=torch.float64) for name in density.names}
    return density.unconstrain(values)


def log_probs(case: Case, density: LogDensity, z: Tensor) -> Tensor:
    """Return the log density (n,) in double precision; -inf where it is NaN, and for angles beyond one turn."""
    with torch.no_grad():
        found = torch.nan_to_num(density(z).double(), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    for latent in density.structure.latents:
        if latent.name in case.periods:
            angles = z[:, latent.offset : latent.offset + latent.size]
            beyond = angles.abs() > 0.5 * case.periods[latent.name]
            found = torch.where(beyond.any(1), -math.inf, found)
    return found


def _largest(differences: Array) -> float:
    """Return the largest absolute t statistic of the columns of (n, C) whose variance a sample can tell."""
    size = np.abs(differences)
    total = (differences**2).sum(0)
    known = (total > 0.0) & np.isfinite(total) & ((size**2).max(0) <= DOMINANT * total)
    if not known.any():
        return 0.0
    kept = differences[:, known]
    return float(np.abs(kept.mean(0) / (kept.std(0) / math.sqrt(len(kept)) + 1e-300)).max())


def moved(case: Case, density: LogDensity, draws: int = 1500, steps: int = 30, draw_from: Case | None = None) -> float:
    """Return the largest change of bounded functions of exact draws by Metropolis moves, in standard errors.

    Each move adds a multiple of the difference of two other exact draws, in all coordinates or in some.
    """
    source = draw_from or case
    rng = np.random.default_rng(0)
    start = unconstrained(density, case, source.draws(draws, 1))
    others = unconstrained(density, case, source.draws(draws, 2))
    z, log_p = start.clone(), log_probs(case, density, start)
    dim = z.shape[1]
    for step in range(steps):
        a, b = (torch.as_tensor(rng.integers(0, draws, draws)) for _ in range(2))
        size = dim if step % 3 == 0 else min(dim, int(rng.integers(1, 4)))
        block = torch.zeros(draws, dim, dtype=z.dtype)
        chosen = np.argsort(rng.random((draws, dim)), 1)[:, :size]
        block.scatter_(1, torch.as_tensor(chosen), 1.0)
        length = 1.0 if step % 6 == 1 else 2.38 / math.sqrt(2.0 * size) * math.exp(rng.uniform(-1.5, 0.2))
        proposal = z + length * block * (others[a] - others[b])
        new = log_probs(case, density, proposal)
        accept = torch.as_tensor(np.log(rng.random(draws))) < new - log_p
        z, log_p = torch.where(accept[:, None], proposal, z), torch.where(accept, new, log_p)
    before, after = (part.double().numpy() for part in (start, z))
    centre = np.median(before, 0)
    low, high = np.quantile(before, (0.16, 0.84), axis=0)
    scale = np.maximum(0.5 * (high - low), 1e-300)
    change = []
    for shrink in (1.0, 3.0):
        u, v = (np.tanh((part - centre) / (shrink * scale)) for part in (before, after))
        change += [v - u, v**2 - u**2]
    if case.regions is not None:
        with torch.no_grad():
            found = [density.constrain(part) for part in (start, z)]
        first, second = (case.regions({k: v.double().numpy() for k, v in part.items()}) for part in found)
        change.append(second.astype(float) - first.astype(float))
    return _largest(np.concatenate(change, 1))


def stein(case: Case, density: LogDensity, draws: int = 3000, draw_from: Case | None = None) -> float:
    """Return the largest violation of Stein's identities by exact draws, in standard errors; 0 for jumps."""
    if not case.smooth:
        return 0.0
    z = unconstrained(density, case, (draw_from or case).draws(draws, 1))
    _, score = density.value_and_grad(z)
    z_, s = z.double().numpy(), score.double().numpy()
    if case.periods:
        return _largest(s)  # the density has a period, so other functions are not those of an angle
    scale = np.maximum(z_.std(0), 1e-300)
    u = np.tanh((z_ - np.median(z_, 0)) / scale)
    slope = (1.0 - u**2) / scale
    return _largest(np.concatenate([s, u * s + slope, u**2 * s + 2.0 * u * slope], 1))


class _Normal:
    """A normal density fitted to draws."""

    def __init__(self, z: Tensor) -> None:
        self._mean = z.mean(0)
        covariance = torch.atleast_2d(torch.cov(z.T)) + 1e-12 * torch.diag(z.var(0))
        self._law = torch.distributions.MultivariateNormal(self._mean, covariance)

    def draw(self, count: int) -> Tensor:
        return self._law.sample((count,))

    def log_prob(self, z: Tensor) -> Tensor:
        return self._law.log_prob(z)


class _Kernels:
    """A mixture of normal kernels on a few hundred draws, for two dimensions at most."""

    def __init__(self, z: Tensor) -> None:
        self._centres = z[:400]
        near = torch.cdist(z[:400] / z.std(0), z[:400] / z.std(0)).kthvalue(25, dim=1).values.median()
        self._widths = torch.minimum(torch.clamp(near * z.std(0), min=1e-300), z.std(0))

    def draw(self, count: int) -> Tensor:
        which = torch.randint(len(self._centres), (count,))
        return self._centres[which] + self._widths * torch.randn(count, self._centres.shape[1], dtype=torch.float64)

    def log_prob(self, z: Tensor) -> Tensor:
        parts = []
        for piece in z.split(2000):
            away = (piece[:, None] - self._centres) / self._widths
            parts.append(torch.logsumexp(-0.5 * away.square().sum(-1), 1))
        constant = self._widths.log().sum() + 0.5 * z.shape[1] * math.log(2.0 * math.pi) + math.log(len(self._centres))
        return torch.cat(parts) - constant


def bridge(case: Case, density: LogDensity, draws: int = 4000) -> tuple[float, float]:
    """Return an estimate of the log evidence from exact draws, and its standard error, by bridge sampling."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = unconstrained(density, case, case.draws(2 * draws, 3)).double()
        fitted = (_Kernels if z.shape[1] <= 2 else _Normal)(z[draws:])
        ours, theirs = z[:draws], fitted.draw(draws)
        dtype = density.dtype
        with np.errstate(all="ignore"):
            a = (log_probs(case, density, ours.to(dtype)) - fitted.log_prob(ours)).numpy()
            b = (log_probs(case, density, theirs.to(dtype)) - fitted.log_prob(theirs)).numpy()
    log_z = float(np.median(a))
    for _ in range(200):
        over = 1.0 / (1.0 + np.exp(np.clip(log_z - b, -700, 700)))  # l / (l + r)
        under = 1.0 / (1.0 + np.exp(np.clip(a - log_z, -700, 700)))
        new = log_z + math.log(max(over.mean(), 1e-300)) - math.log(max(under.mean(), 1e-300))
        if abs(new - log_z) < 1e-9:
            break
        log_z = new
    parts = [part.std() / max(part.mean(), 1e-300) / math.sqrt(draws) for part in (over, under)]
    return log_z, math.hypot(*parts)
