"""Targets with mirrored modes: densities and their images, signs that the data leave open, labels that can switch."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.zoo.case import Array, Case, Draws, Maker, number_text
from benchmarks.zoo.grids import Grid, Grid2
from benchmarks.zoo.shapes import Image, Mixture, Written, random_shape

LOG_TWO_PI = np.log(2.0 * np.pi)


def _signed_permutation(maker: Maker, dim: int) -> Array:
    signs = maker.rng.choice([-1.0, 1.0], dim)
    if maker.flag() or dim == 1:
        return np.diag(np.where(maker.rng.random(dim) < 0.5, -1.0, signs) if dim > 1 else [-1.0])
    return np.eye(dim)[maker.rng.permutation(dim)] * signs


def _rotation(maker: Maker, dim: int) -> Array:
    axes = maker.rotation(dim)
    turn = np.eye(dim)
    for first in range(0, 2 * maker.integer(1, max(1, dim // 2)), 2):
        angle = maker.uniform(0.2 * np.pi, 1.8 * np.pi)
        turn[first, first] = turn[first + 1, first + 1] = np.cos(angle)
        turn[first, first + 1], turn[first + 1, first] = -np.sin(angle), np.sin(angle)
    return np.asarray(axes @ turn @ axes.T)


def _blocks(maker: Maker, dim: int) -> Array:
    size = maker.integer(1, dim // 2)
    order = np.arange(dim)
    order[:size], order[dim - size :] = np.arange(dim - size, dim), np.arange(size)
    return np.eye(dim)[order]


def image(maker: Maker) -> Case:
    """A density and its image under an orthogonal map."""
    dim, scale = maker.size(1, 40, 300), maker.log_uniform(0.1, 10.0)
    kinds = {"negated": lambda maker, dim: -np.eye(dim), "signed permutation": _signed_permutation}
    kinds |= {"rotated": _rotation, "blocks exchanged": _blocks} if dim > 1 else {}
    how = maker.choice(list(kinds))
    matrix = kinds[how](maker, dim)
    direction = maker.rng.standard_normal(dim)
    moved = np.linalg.norm(direction - matrix @ direction)
    if moved < 1e-6:  # the map may leave most coordinates as they are
        matrix, how = -np.eye(dim), "negated"
        moved = np.linalg.norm(direction - matrix @ direction)
    distance = maker.log_uniform(4.0, 30.0)
    kind, shape = random_shape(maker, dim, distance * scale * direction / moved, scale)
    share = 0.5 if maker.flag() else maker.uniform(0.2, 0.8)
    mixture = Mixture(np.array([share, 1.0 - share]), [shape, Image(shape, matrix)])
    written = Written(maker, mixture, scale * (1.0 + distance))
    return Case(
        f"{kind} and its image, {how}, {number_text(distance)} sds apart, {share:.2f}, D = {dim}, {written.style}",
        written.model,
        written.draw,
        log_evidence=0.0,
        regions=written.regions(mixture),
    )


class _Products:
    """``y[i, j] ~ Normal(a[i] b, s)`` for standard normal a (n,) and b: the signs of both are open."""

    def __init__(self, maker: Maker, n: int, rows: int) -> None:
        self.n, self.rows, self.s = n, rows, float(maker.rounded(maker.log_uniform(0.1, 2.0)))
        b = maker.uniform(0.5, 2.0)
        noise = self.s * maker.rng.standard_normal((n, rows))
        self.y = maker.rounded(maker.rng.standard_normal((n, 1)) * b + noise)
        self.sums, self.squares = self.y.sum(1), float((self.y**2).sum())
        self.grid = Grid(self._log_joint, -8.0, 8.0)
        self.log_evidence = float(self.grid.log_masses[0])

    def _log_joint(self, b: Array) -> Array:
        gain = 1.0 + self.rows * b**2 / self.s**2
        explained = b**2 * (self.sums**2).sum() / (self.s**4 * gain)
        fit = -0.5 * self.n * np.log(gain) - 0.5 * (self.squares / self.s**2 - explained)
        constant = -0.5 * self.n * self.rows * (LOG_TWO_PI + 2.0 * np.log(self.s))
        return np.asarray(fit + constant - 0.5 * b**2 - 0.5 * LOG_TWO_PI)

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Return draws of b (count,) and of a (count, n)."""
        b = self.grid.draw(count, rng)
        precision = 1.0 + self.rows * b**2 / self.s**2
        mean = b * self.sums / self.s**2 / precision
        return b[:, 0], mean + rng.standard_normal((count, self.n)) / np.sqrt(precision)


def factors(maker: Maker) -> Case:
    """One to three factors, each with data of its own: each sign is free."""
    many = maker.integer(1, 3)
    n, rows = max(1, maker.size(1, 40, 250) // many), maker.integer(1, 20)
    found = [_Products(maker, n, rows) for _ in range(many)]
    s = maker.tensor([part.s for part in found])
    plated = maker.flag()
    one = torch.ones((), dtype=maker.dtype)

    def model(y: Tensor) -> None:
        if plated:
            with pyro.plate("factor", many):
                b = pyro.sample("b", dist.Normal(0.0 * one, one))
            with pyro.plate("row_factor", many, dim=-1), pyro.plate("item", n, dim=-2):
                a = pyro.sample("a", dist.Normal(0.0 * one, one))
        else:
            b = pyro.sample("b", dist.Normal(0.0 * one, one).expand([many]).to_event(1))
            a = pyro.sample("a", dist.Normal(0.0 * one, one).expand([n, many]).to_event(2))
        pyro.sample("y", dist.Normal((a * b)[..., None], s[:, None]).to_event(3), obs=y)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        pairs = [part.draw(count, rng) for part in found]
        return {"b": np.stack([b for b, _ in pairs], -1), "a": np.stack([a for _, a in pairs], -1)}

    return Case(
        f"products of {many} factors and {n} loadings, {rows} rows",
        model,
        draw,
        (maker.tensor(np.stack([part.y for part in found], 1)),),
        log_evidence=sum(part.log_evidence for part in found),
        regions=lambda draws: np.concatenate([draws["b"] < 0.0, draws["b"] >= 0.0], -1),
    )


def squares(maker: Maker) -> Case:
    """Numbers of which only the square, or the size, is measured; the prior may favour one sign."""
    n = maker.size(1, 20, 100)
    width, absolute = float(maker.rounded(maker.log_uniform(0.3, 5.0))), maker.flag()
    centre = 0.0 if maker.flag() else float(maker.rounded(width * maker.uniform(0.0, 0.3)))
    s = float(maker.rounded((width if absolute else width**2) * maker.log_uniform(0.05, 0.5)))
    true = centre + width * maker.rng.standard_normal(n)
    y = maker.rounded((np.abs(true) if absolute else true**2) + s * maker.rng.standard_normal(n))

    def log_joint(x: Array) -> Array:
        away = (y - (np.abs(x) if absolute else x**2)) / s
        return np.asarray(-0.5 * away**2 - 0.5 * ((x - centre) / width) ** 2 - np.log(s * width) - LOG_TWO_PI)

    grid = Grid(log_joint, centre - 9.0 * width, centre + 9.0 * width, n)
    centre_, width_, s_ = (maker.tensor(part) for part in (centre, width, s))

    def model(y: Tensor) -> None:
        with pyro.plate("element", n):
            x = pyro.sample("x", dist.Normal(centre_, width_))
            pyro.sample("y", dist.Normal(x.abs() if absolute else x.square(), s_), obs=y)

    def regions(draws: Draws) -> np.ndarray:
        return np.concatenate([draws["x"][:, :20] < 0.0, draws["x"][:, :20] >= 0.0], -1)

    return Case(
        f"{n} numbers known by their {'size' if absolute else 'square'}",
        model,
        lambda count, rng: {"x": grid.draw(count, rng)},
        (maker.tensor(y),),
        log_evidence=float(grid.log_masses.sum()),
        regions=regions,
    )


def labels(maker: Maker) -> Case:
    """Two means of a mixture of data, whose labels can switch unless the shares differ."""
    rows, width = maker.integer(4, 60), float(maker.rounded(maker.log_uniform(1.0, 10.0)))
    share = 0.5 if maker.flag() else float(maker.rounded(maker.uniform(0.3, 0.7)))
    true = maker.uniform(1.0, 6.0) * np.array([-0.5, 0.5])
    which = (maker.rng.random(rows) > share).astype(int)
    y = maker.rounded(true[which] + maker.rng.standard_normal(rows))

    def log_joint(a: Array, b: Array) -> Array:
        total = -0.5 * (a**2 + b**2) / width**2 - 2.0 * np.log(width) - LOG_TWO_PI
        for value in y:
            first, second = (np.log(p) - 0.5 * (value - m) ** 2 for p, m in ((share, a), (1.0 - share, b)))
            total = total + np.logaddexp(first, second) - 0.5 * LOG_TWO_PI
        return np.asarray(total)

    ends = max(6.0 * width, float(np.abs(y).max()) + 6.0)
    grid = Grid2(log_joint, (-ends, -ends), (ends, ends))
    width_, shares = maker.tensor(width), maker.tensor([share, 1.0 - share])

    def model(y: Tensor) -> None:
        means = pyro.sample("means", dist.Normal(torch.zeros_like(width_), width_).expand([2]).to_event(1))
        with pyro.plate("row", len(y)):
            each = dist.Normal(means[..., None, :], torch.ones_like(width_))
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(shares), each), obs=y)

    return Case(
        f"labels of two means, shares {share:.2f}, {rows} rows",
        model,
        lambda count, rng: {"means": np.stack(grid.draw(count, rng), -1)},
        (maker.tensor(y),),
        log_evidence=grid.log_mass,
        regions=lambda draws: np.stack([d := draws["means"][:, 0] < draws["means"][:, 1], ~d], -1),
    )


VARIANTS = (image, factors, image, squares, image, labels)
