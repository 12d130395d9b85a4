"""Normalised densities with independent draws: images of normal distributions under maps, and mixtures of such."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from torch import Tensor

from benchmarks.zoo.case import Array, Draws, Maker

LOG_TWO_PI = math.log(2.0 * math.pi)


class Shape(Protocol):
    """A normalised density over vectors."""

    dim: int

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density (...) at x (..., D)."""

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        """Return independent draws (count, D)."""


class Gaussian:
    """A normal distribution: mean (D,), sds (D,) along axes, the columns of a rotation (None: the coordinates)."""

    def __init__(self, mean: Array, sds: Array, axes: Array | None = None) -> None:
        self.mean, self.sds, self.axes = mean, sds, axes
        self.dim = len(mean)
        self._mean, self._sds = torch.as_tensor(mean), torch.as_tensor(sds)
        self._axes = None if axes is None else torch.as_tensor(np.ascontiguousarray(axes))

    def standardised(self, x: Tensor) -> Tensor:
        """Return x as multiples of the sds along the axes."""
        away = x - self._mean.to(x)
        return (away if self._axes is None else away @ self._axes.to(x)) / self._sds.to(x)

    def log_prob(self, x: Tensor) -> Tensor:
        constant = float(np.log(self.sds).sum()) + 0.5 * self.dim * LOG_TWO_PI
        return -0.5 * self.standardised(x).square().sum(-1) - constant

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        u = self.sds * rng.standard_normal((count, self.dim))
        return self.mean + (u if self.axes is None else u @ self.axes.T)

    def covariance(self) -> Array:
        """Return the covariance (D, D)."""
        axes = np.eye(self.dim) if self.axes is None else self.axes
        return np.asarray((axes * self.sds**2) @ axes.T)

    def times(self, spread: float) -> tuple[Gaussian, float]:
        """Return the product with a normal density of mean 0 and sd ``spread``, normalised, and its log normaliser."""
        mean = self.mean if self.axes is None else self.axes.T @ self.mean
        total = self.sds**2 + spread**2
        log_mass = float((-0.5 * mean**2 / total - 0.5 * np.log(2.0 * np.pi * total)).sum())
        mean, sds = mean * spread**2 / total, self.sds * spread / np.sqrt(total)
        return Gaussian(mean if self.axes is None else self.axes @ mean, sds, self.axes), log_mass


class SinhArcsinh:
    """``m + A (s * sinh((asinh(u) + e) / d))``, u standard normal: skewed by e (D,); tails heavier where d (D,) < 1."""

    def __init__(self, outer: Gaussian, skews: Array, tails: Array) -> None:
        self.outer, self.skews, self.tails, self.dim = outer, skews, tails, outer.dim

    def log_prob(self, x: Tensor) -> Tensor:
        y = self.outer.standardised(x)
        skews, tails = torch.as_tensor(self.skews).to(x), torch.as_tensor(self.tails).to(x)
        a = tails * torch.asinh(y) - skews
        each = -0.5 * a.sinh().square() + _log_cosh(a) - 0.5 * torch.log1p(y.square())
        constant = float(np.log(self.tails).sum() - np.log(self.outer.sds).sum()) - 0.5 * self.dim * LOG_TWO_PI
        return each.sum(-1) + constant

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        u = rng.standard_normal((count, self.dim))
        y = self.outer.sds * np.sinh((np.arcsinh(u) + self.skews) / self.tails)
        return self.outer.mean + (y if self.outer.axes is None else y @ self.outer.axes.T)


def _log_cosh(a: Tensor) -> Tensor:
    size = a.abs()
    return size + torch.log1p(torch.exp(-2.0 * size)) - math.log(2.0)


class Banana:
    """``m + A (s * y)``: in each of the first pairs, ``y2 = u2 + b (u1^2 - 1)``, with bends b (pairs,)."""

    def __init__(self, outer: Gaussian, bends: Array) -> None:
        self.outer, self.bends, self.dim = outer, bends, outer.dim

    def log_prob(self, x: Tensor) -> Tensor:
        y = self.outer.standardised(x)
        first, second, rest = self._split(y)
        u = torch.cat([first, second - torch.as_tensor(self.bends).to(x) * (first.square() - 1.0), rest], -1)
        return -0.5 * u.square().sum(-1) - float(np.log(self.outer.sds).sum()) - 0.5 * self.dim * LOG_TWO_PI

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        y = rng.standard_normal((count, self.dim))
        pairs = len(self.bends)
        y[:, pairs : 2 * pairs] += self.bends * (y[:, :pairs] ** 2 - 1.0)
        y = self.outer.sds * y
        return self.outer.mean + (y if self.outer.axes is None else y @ self.outer.axes.T)

    def _split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pairs = len(self.bends)
        return y[..., :pairs], y[..., pairs : 2 * pairs], y[..., 2 * pairs :]


class Image:
    """A density and an orthogonal map (D, D) of its draws."""

    def __init__(self, inner: Shape, matrix: Array) -> None:
        self.inner, self.matrix, self.dim = inner, matrix, inner.dim
        self._matrix = torch.as_tensor(np.ascontiguousarray(matrix))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.inner.log_prob(x @ self._matrix.to(x))

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        return np.asarray(self.inner.draw(count, rng) @ self.matrix.T)


class Mixture:
    """Shapes with weights (K,)."""

    def __init__(self, weights: Array, shapes: Sequence[Shape]) -> None:
        self.weights, self.shapes, self.dim = weights / weights.sum(), shapes, shapes[0].dim

    def joint(self, x: Tensor) -> Tensor:
        """Return log weight plus log density of each shape (..., K)."""
        weights = torch.as_tensor(np.log(self.weights)).to(x)
        return torch.stack([shape.log_prob(x) for shape in self.shapes], -1) + weights

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.logsumexp(self.joint(x), -1)

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        which = rng.choice(len(self.shapes), count, p=self.weights)
        found = np.empty((count, self.dim))
        for number, shape in enumerate(self.shapes):
            here = which == number
            found[here] = shape.draw(int(here.sum()), rng)
        return found

    def nearest(self, x: Array) -> NDArray[np.bool_]:
        """Return which shape each draw (n, D) most probably comes from, (n, K)."""
        most = self.joint(torch.as_tensor(x, dtype=torch.float64)).argmax(-1)
        return np.asarray(torch.nn.functional.one_hot(most, len(self.shapes)).numpy() > 0)


# ---- models of densities ---------------------------------------------------------------------------------------------


class Written:
    """A density over vectors as a Pyro model: its sites in one of several styles, and a factor.

    ``flat``: one vector with an improper prior; ``wide``: one vector with a wide normal prior, which the factor takes
    back; ``plate``: the same in a plate; ``split``: two vectors; ``scalar``: one number.
    """

    def __init__(self, maker: Maker, shape: Shape, spread: float) -> None:
        styles = ["flat", "wide", "plate", *(["split"] if shape.dim > 1 else ["scalar", "scalar"])]
        self.style: str = maker.choice(styles)
        self.shape, self.dim = shape, shape.dim
        self.cut = shape.dim // 2
        self.spread = maker.tensor(10.0 * spread)

    def model(self) -> None:
        """The Pyro model."""
        zero = torch.zeros_like(self.spread)
        prior = dist.Normal(zero, self.spread)
        if self.style == "flat":
            x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (self.dim,)))
            x, taken = x.to(self.spread.dtype), zero
        elif self.style == "wide":
            x = pyro.sample("x", prior.expand([self.dim]).to_event(1))
            taken = prior.log_prob(x).sum(-1)
        elif self.style == "plate":
            with pyro.plate("coordinate", self.dim):
                x = pyro.sample("x", prior)
            taken = prior.log_prob(x).sum(-1)
        elif self.style == "split":
            left = pyro.sample("left", prior.expand([self.cut]).to_event(1))
            right = pyro.sample("right", prior.expand([self.dim - self.cut]).to_event(1))
            x = torch.cat([left, right], -1)
            taken = prior.log_prob(x).sum(-1)
        else:
            x = pyro.sample("x", prior)
            taken, x = prior.log_prob(x), x[..., None]
        pyro.factor("density", self.shape.log_prob(x) - taken)

    def sites(self, x: Array) -> Draws:
        """Return draws of the vector (n, D) as draws of the sites."""
        if self.style == "split":
            return {"left": x[:, : self.cut], "right": x[:, self.cut :]}
        return {"x": x[:, 0] if self.style == "scalar" else x}

    def vector(self, draws: Mapping[str, Any]) -> Array:
        """Return draws of the sites as draws of the vector (n, D)."""
        if self.style == "split":
            return np.concatenate([draws["left"], draws["right"]], -1)
        return np.asarray(draws["x"]).reshape(len(draws["x"]), self.dim)

    def draw(self, count: int, rng: np.random.Generator) -> Draws:
        """Return exact draws of the sites."""
        return self.sites(self.shape.draw(count, rng))

    def regions(self, mixture: Mixture) -> Callable[[Draws], NDArray[np.bool_]]:
        """Return the function that assigns draws to the shapes of a mixture."""
        return lambda draws: mixture.nearest(self.vector(draws))


def random_gaussian(maker: Maker, dim: int, mean: Array, scale: float, condition: float) -> Gaussian:
    """Return a normal distribution with sds about ``scale``, of which the largest is ``condition`` times the least."""
    logs = np.linspace(-0.5, 0.5, dim) if dim > 1 else np.zeros(1)
    sds = scale * condition ** maker.rng.permutation(logs)
    return Gaussian(mean, sds, maker.rotation(dim) if dim > 1 and maker.flag(0.7) else None)


def random_shape(maker: Maker, dim: int, mean: Array, scale: float) -> tuple[str, Shape]:
    """Return the name of a kind of shape, and one of it."""
    outer = random_gaussian(maker, dim, mean, scale, maker.log_uniform(1.0, 10.0))
    kinds = ["normal", "skewed", *(["banana"] if dim > 1 else [])]
    kind = maker.choice(kinds)
    if kind == "skewed":
        skews, tails = maker.rng.uniform(-0.8, 0.8, dim), maker.rng.uniform(0.7, 1.4, dim)
        return kind, SinhArcsinh(outer, skews, tails)
    if kind == "banana":
        pairs = maker.integer(1, max(1, min(dim // 2, 10)))
        return kind, Banana(outer, maker.rng.uniform(-1.0, 1.0, pairs))
    return kind, outer
