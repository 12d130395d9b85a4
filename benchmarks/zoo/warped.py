"""Warped normal distributions: bananas, funnels, skewed ones, narrow ridges."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.zoo.case import Array, Case, Draws, Maker, number_text
from benchmarks.zoo.shapes import Banana, Gaussian, SinhArcsinh, Written, random_gaussian

STEEP = 1.2  # sd of a log scale from which the leaves of a funnel are judged by quantiles


def banana(maker: Maker) -> Case:
    """Pairs on parabolas, rotated, as a density."""
    dim, scale = maker.size(2, 30, 150), maker.log_uniform(0.1, 10.0)
    outer = random_gaussian(maker, dim, scale * maker.rng.standard_normal(dim), scale, maker.log_uniform(1.0, 30.0))
    pairs, bend = maker.integer(1, max(1, min(dim // 2, 10))), maker.log_uniform(0.3, 3.0)
    written = Written(maker, Banana(outer, bend * maker.rng.uniform(0.5, 1.5, pairs)), 3.0 * scale * (1.0 + bend))
    name = f"{pairs} bananas of bend {number_text(bend)}, D = {dim}, {written.style}"
    return Case(name, written.model, written.draw, log_evidence=0.0)


def banana_model(maker: Maker) -> Case:
    """Parabolas as a hierarchy: the mean of a site is the square of another."""
    n, spread = maker.size(1, 20, 100), float(maker.rounded(maker.log_uniform(0.3, 3.0)))
    bend, s = (float(maker.rounded(maker.log_uniform(0.3, 2.0))) for _ in range(2))
    spread_, bend_, s_ = (maker.tensor(part) for part in (spread, bend, s))

    def model() -> None:
        with pyro.plate("pair", n):
            x = pyro.sample("x", dist.Normal(torch.zeros_like(s_), spread_))
            pyro.sample("y", dist.Normal(bend_ * x.square(), s_))

    def draw(count: int, rng: np.random.Generator) -> Draws:
        x = spread * rng.standard_normal((count, n))
        return {"x": x, "y": bend * x**2 + s * rng.standard_normal((count, n))}

    name = f"{n} parabolas of sd {number_text(spread)}, bend {number_text(bend)}, noise {number_text(s)}"
    return Case(name, model, draw, log_evidence=0.0)


def funnel(maker: Maker) -> Case:
    """One or two log scales and their leaves: centred, non-centred, or one of each in one model."""
    scales, n = maker.integer(1, 2), maker.size(1, 30, 200)
    spread, centre = float(maker.rounded(maker.uniform(0.5, 3.0))), float(maker.rounded(maker.uniform(-2.0, 2.0)))
    ways = [maker.choice(["centred", "non-centred"]) for _ in range(scales)]
    shared = scales == 2 and maker.flag(0.3)  # one scale sets both groups of leaves
    spread_, centre_, zero = maker.tensor(spread), maker.tensor(centre), maker.tensor(0.0)

    def model() -> None:
        v = zero
        for number, way in enumerate(ways):
            if number == 0 or not shared:
                v = pyro.sample(f"v{number}", dist.Normal(centre_, spread_))
            sd = (0.5 * v).exp()
            with pyro.plate(f"leaf{number}", n):
                if way == "centred":
                    pyro.sample(f"x{number}", dist.Normal(zero, sd))
                else:
                    eta = pyro.sample(f"eta{number}", dist.Normal(zero, zero + 1.0))
                    pyro.deterministic(f"x{number}", eta * sd)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        found: Draws = {}
        v = np.zeros(count)
        for number, way in enumerate(ways):
            if number == 0 or not shared:
                v = found[f"v{number}"] = centre + spread * rng.standard_normal(count)
            eta = rng.standard_normal((count, n))
            found[f"x{number}"] = eta * np.exp(0.5 * v)[:, None]
            if way != "centred":
                found[f"eta{number}"] = eta
        return found

    return Case(
        f"funnel of sd {number_text(spread)}, {' and '.join(ways)}{', one scale' * shared}, {n} leaves each",
        model,
        draw,
        log_evidence=0.0,
        heavy=frozenset(f"x{number}" for number in range(scales) if spread > STEEP),
    )


class _Funnel:
    """``x0 ~ Normal(m, s)``, the others ``Normal(0, exp(x0 / 2))``, as a density that shows no structure."""

    def __init__(self, dim: int, centre: float, spread: float) -> None:
        self.dim, self.centre, self.spread = dim, centre, spread

    def log_prob(self, x: Tensor) -> Tensor:
        v, leaves = x[..., 0], x[..., 1:]
        inner = -0.5 * (leaves * torch.exp(-0.5 * v)[..., None]).square().sum(-1) - 0.5 * (self.dim - 1) * v
        constant = 0.5 * self.dim * np.log(2.0 * np.pi) + np.log(self.spread)
        return -0.5 * ((v - self.centre) / self.spread).square() + inner - constant

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        v = self.centre + self.spread * rng.standard_normal((count, 1))
        return np.concatenate([v, np.exp(0.5 * v) * rng.standard_normal((count, self.dim - 1))], -1)


def funnel_density(maker: Maker) -> Case:
    """A funnel as a mere density."""
    dim, spread, centre = maker.size(2, 20, 100), maker.uniform(0.5, 2.5), maker.uniform(-1.0, 1.0)
    written = Written(maker, _Funnel(dim, centre, spread), 3.0 * np.exp(0.5 * centre + spread))
    heavy = frozenset() if spread <= STEEP else frozenset(("x",) if written.style != "split" else ("left", "right"))
    name = f"funnel of sd {number_text(spread)} as a density, D = {dim}, {written.style}"
    return Case(name, written.model, written.draw, log_evidence=0.0, heavy=heavy)


def skewed(maker: Maker) -> Case:
    """Skewed marginals with light or heavy tails, rotated."""
    dim, scale = maker.size(1, 40, 200), maker.log_uniform(0.01, 100.0)
    outer = random_gaussian(maker, dim, scale * maker.rng.standard_normal(dim), scale, maker.log_uniform(1.0, 100.0))
    skews, tails = maker.rng.uniform(-1.0, 1.0, dim), maker.rng.uniform(0.6, 1.5, dim)
    written = Written(maker, SinhArcsinh(outer, skews, tails), 10.0 * scale)
    return Case(f"sinh-arcsinh, D = {dim}, {written.style}", written.model, written.draw, log_evidence=0.0)


def _condition(maker: Maker) -> float:
    return maker.log_uniform(10.0, 1e8 if maker.dtype == torch.float64 else 1e4)


def ridge(maker: Maker) -> Case:
    """A normal distribution whose largest sd is up to 1e8 times the least (1e4 in single precision)."""
    dim, condition = maker.size(2, 40, 200), _condition(maker)
    logs = np.concatenate([[-0.5, 0.5], maker.rng.uniform(-0.5, 0.5, dim - 2)])
    axes = maker.rotation(dim) if maker.flag(0.7) else None
    shape = Gaussian(maker.rng.standard_normal(dim), condition**logs, axes)
    written = Written(maker, shape, 3.0 * condition**0.5)
    name = f"ridge of condition {number_text(condition)}, D = {dim}, {written.style}"
    return Case(name, written.model, written.draw, log_evidence=0.0)


def regression(maker: Maker) -> Case:
    """Linear regression on predictors that nearly depend on each other, of very different units."""
    dim = maker.size(2, 30, 150)
    rows, likeness = dim + maker.integer(1, 60), maker.log_uniform(1e-3 if maker.dtype == torch.float64 else 0.03, 1.0)
    units = 10.0 ** maker.rng.uniform(-1.5, 1.5, dim)
    x = maker.rng.standard_normal((rows, 1)) + likeness * maker.rng.standard_normal((rows, dim))
    x, width = maker.rounded(x * units), maker.rounded(5.0 / units)
    s = float(maker.rounded(maker.log_uniform(0.1, 3.0)))
    y = maker.rounded(x @ (width / 5.0 * maker.rng.standard_normal(dim)) + s * maker.rng.standard_normal(rows))
    scaled = x * width
    left, singular, axes = np.linalg.svd(scaled, full_matrices=False)
    precision = 1.0 + singular**2 / s**2
    mean = axes.T @ (singular * (left.T @ y) / s**2 / precision)
    explained = ((singular * (left.T @ y) / s**2) ** 2 / precision).sum()
    fit = -0.5 * ((y**2).sum() / s**2 - explained) - 0.5 * np.log(precision).sum()
    width_, s_, zero = maker.tensor(width), maker.tensor(s), maker.tensor(0.0)

    def model(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(zero, width_).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, s_), obs=y)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        u = rng.standard_normal((count, dim)) / np.sqrt(precision)
        return {"beta": width * (mean + u @ axes)}

    return Case(
        f"regression on {dim} predictors alike to {number_text(likeness)}, {rows} rows",
        model,
        draw,
        (maker.tensor(x), maker.tensor(y)),
        log_evidence=float(fit - rows * np.log(s) - 0.5 * rows * np.log(2.0 * np.pi)),
    )


VARIANTS = (funnel, banana, ridge, funnel, skewed, regression, banana_model, funnel_density)
