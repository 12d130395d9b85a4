"""Two- and three-level normal models with unknown scales: given these, all else is normal; scales are on a grid."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.zoo.case import Array, Case, Draws, Maker, number_text
from benchmarks.zoo.grids import Grid, Grid2

LOG_TWO_PI = float(np.log(2.0 * np.pi))
WAYS = ("centred", "non-centred", "half of each")


class ScalePrior:
    """A prior of a scale, its log density over the logarithm of the scale, and where that may have mass."""

    def __init__(self, maker: Maker, size: float) -> None:
        self.kind: str = maker.choice(["half-normal", "half-Cauchy", "exponential", "log-normal", "gamma"])
        self.size = float(maker.rounded(size))
        self._tensor = maker.tensor(self.size)
        centre = float(np.log(self.size))
        above = 16.0 if self.kind == "half-Cauchy" else 9.0 if self.kind == "log-normal" else 4.5
        self.range = (centre - (9.0 if self.kind == "log-normal" else 18.0), centre + above)

    def heavy(self, name: str, effects: int) -> frozenset[str]:
        """Return the scale's name if its posterior, of so many effects less their means, lacks a fourth moment."""
        return frozenset([name] if self.kind == "half-Cauchy" and effects <= 4 else [])

    def distribution(self) -> dist.TorchDistribution:
        """Return it for Pyro."""
        size = self._tensor
        one = torch.ones_like(size)
        made: Callable[[], dist.TorchDistribution] = {
            "half-normal": lambda: dist.HalfNormal(size),
            "half-Cauchy": lambda: dist.HalfCauchy(size),
            "exponential": lambda: dist.Exponential(1.0 / size),
            "log-normal": lambda: dist.LogNormal(size.log(), one),
            "gamma": lambda: dist.Gamma(2.0 * one, 2.0 / size),
        }[self.kind]
        return made()

    def log_density(self, log_scale: Array) -> Array:
        """Return the log density of the logarithm of the scale."""
        u = log_scale - np.log(self.size)
        ratio = np.exp(u)
        if self.kind == "half-normal":
            return np.asarray(0.5 * np.log(2.0 / np.pi) - 0.5 * ratio**2 + u)
        if self.kind == "half-Cauchy":
            return np.asarray(np.log(2.0 / np.pi) - np.log1p(ratio**2) + u)
        if self.kind == "exponential":
            return np.asarray(u - ratio)
        if self.kind == "log-normal":
            return np.asarray(-0.5 * u**2 - 0.5 * LOG_TWO_PI)
        return np.asarray(2.0 * np.log(2.0) + 2.0 * u - 2.0 * ratio)


def effects(
    name: str, way: str, location: Tensor, scale: Tensor, shape: tuple[int, ...], plates: tuple[str, ...]
) -> Tensor:
    """Sample normal effects (shape) at the sites ``name``: centred, non-centred, or half of the last axis each."""
    if way == "half of each" and shape[-1] > 1:
        half = shape[-1] // 2
        sizes, ways = (half, shape[-1] - half), ("centred", "non-centred")
        parts = [
            effects(f"{name}{k}", ways[k], location, scale, (*shape[:-1], sizes[k]), tuple(f"{p}{k}" for p in plates))
            for k in range(2)
        ]
        return torch.cat(parts, -1)
    nested = [
        pyro.plate(plate, size, dim=-1 - k) for k, (plate, size) in enumerate(zip(plates, reversed(shape), strict=True))
    ]
    for plate in nested:
        plate.__enter__()
    try:
        if way == "centred":
            return pyro.sample(name, dist.Normal(location, scale))
        eta = pyro.sample(f"{name}_eta", dist.Normal(torch.zeros_like(scale), torch.ones_like(scale)))
        return pyro.deterministic(name, location + scale * eta)
    finally:
        for plate in reversed(nested):
            plate.__exit__(None, None, None)


def effect_draws(name: str, way: str, values: Array, location: Array, scale: Array) -> Draws:
    """Return draws of effects by the names that :func:`effects` gives them; all arguments broadcast."""
    if way == "half of each" and values.shape[-1] > 1:
        half = values.shape[-1] // 2
        upper = effect_draws(f"{name}0", "centred", values[..., :half], location, scale)
        return {**upper, **effect_draws(f"{name}1", "non-centred", values[..., half:], location, scale)}
    return {name: values} if way == "centred" else {name: values, f"{name}_eta": (values - location) / scale}


def _rows(maker: Maker, groups: int) -> Array:
    most = maker.integer(1, 50) if groups < 60 else maker.integer(1, 10)
    if maker.flag():
        return np.full(groups, float(most))
    return maker.rng.integers(1, most + 1, groups).astype(float)


class _TwoLevel:
    """``mu ~ Normal(m, w)``, ``theta[g] ~ Normal(mu, tau)``, ``y[g, j] ~ Normal(theta[g], sigma)``."""

    def __init__(self, maker: Maker, known: bool) -> None:
        self.groups = maker.size(2, 40, 250)
        self.sigma = float(maker.rounded(maker.log_uniform(0.1, 10.0)))
        self.ratio = maker.log_uniform(0.02, 20.0)  # tau over the standard error of a group
        self.rows = _rows(maker, self.groups)
        tau = self.ratio * self.sigma / np.sqrt(self.rows.mean())
        self.m, self.w = (float(maker.rounded(x)) for x in (0.0, (tau + self.sigma) * maker.log_uniform(0.5, 20.0)))
        mu = self.w * maker.rng.standard_normal()
        theta = mu + tau * maker.rng.standard_normal(self.groups)
        self.index = np.repeat(np.arange(self.groups), self.rows.astype(int))
        self.y = maker.rounded(theta[self.index] + self.sigma * maker.rng.standard_normal(len(self.index)))
        self.means = np.bincount(self.index, self.y) / self.rows
        self.within = float(((self.y - self.means[self.index]) ** 2).sum())
        scale = tau * maker.log_uniform(0.3, 3.0) if maker.flag(0.7) else self.sigma * maker.log_uniform(0.3, 10.0)
        self.tau_prior = ScalePrior(maker, scale)
        self.known = known
        if known:
            self.grid1 = Grid(lambda u: self.log_joint(u, np.log(self.sigma) + 0.0 * u), *self.tau_prior.range)
            self.log_evidence = float(self.grid1.log_masses[0])
        else:
            self.sigma_prior = ScalePrior(maker, self.sigma * maker.log_uniform(0.3, 3.0))
            ranges = (self.tau_prior.range, self.sigma_prior.range)
            self.grid2 = Grid2(
                lambda u, v: self.log_joint(u, v) + self.sigma_prior.log_density(v),
                (ranges[0][0], ranges[1][0]),
                (ranges[0][1], ranges[1][1]),
            )
            self.log_evidence = self.grid2.log_mass

    def log_joint(self, u: Array, v: Array) -> Array:
        """Return the log density of data and u = log tau, given v = log sigma; all else is integrated out."""
        tau2, sigma2 = np.exp(2.0 * u), np.exp(2.0 * v)
        precision, pull, total = 1.0 / self.w**2, self.m / self.w**2, self.m**2 / self.w**2 + 0.0 * u + 0.0 * v
        logs = 0.0
        for mean, rows in zip(self.means, self.rows, strict=True):
            variance = tau2 + sigma2 / rows
            precision = precision + 1.0 / variance
            pull = pull + mean / variance
            total = total + mean**2 / variance
            logs = logs + np.log(variance)
        free = len(self.y) - self.groups
        between = -0.5 * (total - pull**2 / precision) - 0.5 * logs - 0.5 * np.log(precision) - np.log(self.w)
        inside = -free * v - 0.5 * self.within / sigma2 - 0.5 * np.log(self.rows).sum()
        return np.asarray(between + inside - 0.5 * len(self.y) * LOG_TWO_PI + self.tau_prior.log_density(u))

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Array, Array, Array, Array]:
        """Return draws of tau, sigma, mu (count,) and theta (count, groups)."""
        if self.known:
            tau, sigma = np.exp(self.grid1.draw(count, rng)[:, 0]), np.full(count, self.sigma)
        else:
            tau, sigma = (np.exp(part) for part in self.grid2.draw(count, rng))
        variance = tau[:, None] ** 2 + sigma[:, None] ** 2 / self.rows
        precision = 1.0 / self.w**2 + (1.0 / variance).sum(1)
        mean = (self.m / self.w**2 + (self.means / variance).sum(1)) / precision
        mu = mean + rng.standard_normal(count) / np.sqrt(precision)
        share = tau[:, None] ** 2 / variance  # of the group's own mean
        centre = mu[:, None] + share * (self.means - mu[:, None])
        sd = np.sqrt(share / self.rows) * sigma[:, None]
        return tau, sigma, mu, centre + sd * rng.standard_normal((count, self.groups))


def _two_level(maker: Maker, known: bool) -> Case:
    found, way = _TwoLevel(maker, known), maker.choice(WAYS)
    m, w, sigma0 = (maker.tensor(part) for part in (found.m, found.w, found.sigma))

    def model(index: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(m, w))
        tau = pyro.sample("tau", found.tau_prior.distribution())
        sigma = sigma0 if known else pyro.sample("sigma", found.sigma_prior.distribution())
        theta = effects("theta", way, mu, tau, (found.groups,), ("group",))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(theta[..., index], sigma), obs=y)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        tau, sigma, mu, theta = found.draw(count, rng)
        draws = {"mu": mu, "tau": tau, **effect_draws("theta", way, theta, mu[:, None], tau[:, None])}
        return draws if known else {**draws, "sigma": sigma}

    return Case(
        f"two levels, {way}, {found.groups} groups, {len(found.y)} rows, {found.tau_prior.kind} scale of "
        f"{number_text(found.ratio)} errors, noise {'known' if known else 'unknown'}",
        model,
        draw,
        (torch.as_tensor(found.index), maker.tensor(found.y)),
        log_evidence=found.log_evidence,
        heavy=found.tau_prior.heavy("tau", found.groups - 1)
        | (frozenset() if known else found.sigma_prior.heavy("sigma", len(found.y) - found.groups)),
    )


def known_noise(maker: Maker) -> Case:
    """Two levels; the scale of the groups is unknown."""
    return _two_level(maker, True)


def unknown_noise(maker: Maker) -> Case:
    """Two levels; both scales are unknown."""
    return _two_level(maker, False)


class _ThreeLevel:
    """``a[s] ~ Normal(mu, tau_a)``, ``b[c, s] ~ Normal(a[s], tau_b)``, means of y about b with known errors."""

    def __init__(self, maker: Maker) -> None:
        total = maker.size(6, 40, 200)
        self.schools = maker.integer(2, max(2, total // 3))
        self.classes = max(2, total // self.schools - 1)
        self.shape = (self.classes, self.schools)
        sizes = maker.log_uniform(0.05, 5.0), maker.log_uniform(0.05, 5.0)
        self.errors = maker.rounded(maker.log_uniform(0.1, 3.0) / np.sqrt(maker.rng.integers(1, 50, self.shape)))
        self.w = float(maker.rounded(maker.log_uniform(0.5, 10.0)))
        a = self.w * maker.rng.standard_normal() + sizes[0] * maker.rng.standard_normal(self.schools)
        b = a + sizes[1] * maker.rng.standard_normal(self.shape)
        self.y = maker.rounded(b + self.errors * maker.rng.standard_normal(self.shape))
        self.priors = [ScalePrior(maker, size * maker.log_uniform(0.3, 3.0)) for size in sizes]
        low, high = zip(*(prior.range for prior in self.priors), strict=True)
        self.grid = Grid2(self.log_joint, low, high)

    def log_joint(self, u: Array, v: Array) -> Array:
        """Return the log density of data, u = log tau_a and v = log tau_b."""
        tau_a2, tau_b2 = np.exp(2.0 * u), np.exp(2.0 * v)
        zero = 0.0 * (u + v)
        precision, pull, total, logs = 1.0 / self.w**2 + zero, zero, zero, 2.0 * np.log(self.w) + zero
        for s in range(self.schools):
            inner, inner_pull = zero, zero
            for y, error in zip(self.y[:, s], self.errors[:, s], strict=True):
                variance = tau_b2 + error**2
                inner, inner_pull = inner + 1.0 / variance, inner_pull + y / variance
                total, logs = total + y**2 / variance, logs + np.log(variance)
            mean, variance = inner_pull / inner, tau_a2 + 1.0 / inner
            total = total - inner_pull**2 / inner + mean**2 / variance
            logs = logs + np.log(inner) + np.log(variance)
            precision, pull = precision + 1.0 / variance, pull + mean / variance
        fit = -0.5 * (total - pull**2 / precision) - 0.5 * (logs + np.log(precision)) - 0.5 * self.y.size * LOG_TWO_PI
        return np.asarray(fit + self.priors[0].log_density(u) + self.priors[1].log_density(v))

    def draw(self, count: int, rng: np.random.Generator) -> Draws:
        """Return draws of all latents."""
        tau_a, tau_b = (np.exp(part) for part in self.grid.draw(count, rng))
        variance = tau_b[:, None, None] ** 2 + self.errors**2
        inner = (1.0 / variance).sum(1)
        mean = (self.y / variance).sum(1) / inner
        outer = tau_a[:, None] ** 2 + 1.0 / inner
        precision = 1.0 / self.w**2 + (1.0 / outer).sum(1)
        mu = (mean / outer).sum(1) / precision + rng.standard_normal(count) / np.sqrt(precision)
        share = tau_a[:, None] ** 2 / outer
        a = mu[:, None] + share * (mean - mu[:, None]) + np.sqrt(share / inner) * rng.standard_normal(mean.shape)
        share = tau_b[:, None, None] ** 2 / variance
        b = a[:, None] + share * (self.y - a[:, None])
        b = b + np.sqrt(share) * self.errors * rng.standard_normal(b.shape)
        return {"mu": mu, "tau_a": tau_a, "tau_b": tau_b, "a": a, "b": b}


def three_levels(maker: Maker) -> Case:
    """Three levels; the scales of the upper two are unknown."""

    found = _ThreeLevel(maker)
    ways = maker.choice(WAYS), maker.choice(WAYS)
    w, errors = maker.tensor(found.w), maker.tensor(found.errors)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros_like(w), w))
        tau_a = pyro.sample("tau_a", found.priors[0].distribution())
        tau_b = pyro.sample("tau_b", found.priors[1].distribution())
        a = effects("a", ways[0], mu, tau_a, (found.schools,), ("school",))
        if ways[1] == "half of each":  # its halves are of the first axis here: classes, not schools
            half = found.classes // 2
            upper = effects("b0", "centred", a, tau_b, (half, found.schools), ("pupil_school0", "class0"))
            shape = (found.classes - half, found.schools)
            lower = effects("b1", "non-centred", a, tau_b, shape, ("pupil_school1", "class1"))
            b = torch.cat([upper, lower], -2)
        else:
            b = effects("b", ways[1], a, tau_b, found.shape, ("pupil_school", "class"))
        pyro.sample("y", dist.Normal(b, errors).to_event(2), obs=y)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        draws = found.draw(count, rng)
        a, b = draws.pop("a"), draws.pop("b")
        draws |= effect_draws("a", ways[0], a, draws["mu"][:, None], draws["tau_a"][:, None])
        about = a[:, None], draws["tau_b"][:, None, None]
        if ways[1] != "half of each":
            return {**draws, **effect_draws("b", ways[1], b, *about)}
        half = found.classes // 2
        upper = effect_draws("b0", "centred", b[:, :half], *about)
        return {**draws, **upper, **effect_draws("b1", "non-centred", b[:, half:], *about)}

    kinds = " and ".join(prior.kind for prior in found.priors)
    return Case(
        f"three levels, {ways[0]} and {ways[1]}, {found.schools} schools of {found.classes} classes, {kinds} scales",
        model,
        draw,
        (maker.tensor(found.y),),
        log_evidence=found.grid.log_mass,
        heavy=found.priors[0].heavy("tau_a", found.schools - 1)
        | found.priors[1].heavy("tau_b", (found.classes - 1) * found.schools),
    )


VARIANTS = (known_noise, unknown_noise, three_levels)
