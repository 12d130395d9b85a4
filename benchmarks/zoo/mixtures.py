"""Mixtures of normal distributions: as densities, and as models whose discrete latents are summed out."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.ops.indexing import Vindex

from benchmarks.zoo.case import Array, Case, Draws, Maker, number_text
from benchmarks.zoo.grids import Grid
from benchmarks.zoo.shapes import Gaussian, Mixture, Written, random_gaussian

WATCHED = 20  # elements of a plate whose modes are told apart


def random_weights(maker: Maker, components: int) -> Array:
    """Return weights, none below .4 of an equal share."""
    weights = maker.rng.dirichlet(np.full(components, 2.0))
    return maker.rounded(0.6 * weights + 0.4 / components)


def random_centres(maker: Maker, components: int, dim: int, scale: float) -> tuple[float, Array]:
    """Return the distance of neighbours, 2 to 30 times ``scale``, and centres (K, D); some pairs touch."""
    distance = maker.log_uniform(2.0, 30.0)
    if dim == 1:
        steps = distance * maker.rng.uniform(0.8, 1.3, components)
        centres = scale * (steps.cumsum() - steps.sum() * maker.uniform(0.2, 0.8))[:, None]
    else:
        directions = maker.rng.standard_normal((components, dim))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        centres = scale * distance / np.sqrt(2.0) * directions * maker.rng.uniform(0.8, 1.4, (components, 1))
        centres = centres + scale * maker.uniform(0.0, 5.0) * maker.rng.standard_normal(dim) / np.sqrt(dim)
    if components > 2 and maker.flag(0.3):
        towards = centres[0] - centres[1]
        centres[1] = centres[0] - 2.0 * scale * towards / np.linalg.norm(towards)
    return distance, centres


def density(maker: Maker) -> Case:
    """Two to eight normal distributions as a density."""
    dim, components, scale = maker.size(1, 20, 150), maker.integer(2, 8), maker.log_uniform(0.1, 10.0)
    distance, centres = random_centres(maker, components, dim, scale)
    condition = maker.log_uniform(1.0, 5.0)
    shapes = [random_gaussian(maker, dim, centre, scale * maker.log_uniform(0.6, 1.5), condition) for centre in centres]
    mixture = Mixture(random_weights(maker, components), shapes)
    written = Written(maker, mixture, scale * (1.0 + distance))
    return Case(
        f"{components} normals {number_text(distance)} sds apart, D = {dim}, {written.style}",
        written.model,
        written.draw,
        log_evidence=0.0,
        regions=written.regions(mixture),
    )


def with_prior(maker: Maker) -> Case:
    """A mixture as a factor, times a normal prior."""
    dim, components, scale = maker.size(1, 20, 100), maker.integer(2, 4), maker.log_uniform(0.1, 10.0)
    distance, centres = random_centres(maker, components, dim, scale)
    parts = [random_gaussian(maker, dim, centre, scale, maker.log_uniform(1.0, 5.0)) for centre in centres]
    weights = random_weights(maker, components)
    mixture = Mixture(weights, parts)
    spread = float(maker.rounded(scale * distance * maker.uniform(1.0, 3.0) * (1.0 if dim == 1 else dim**-0.5) + scale))
    products = [part.times(spread) for part in parts]
    logs = np.log(mixture.weights) + np.array([log_mass for _, log_mass in products])
    top = logs.max()
    exact = Mixture(np.exp(logs - top), [part for part, _ in products])
    sd, scalar = maker.tensor(spread), dim == 1 and maker.flag()

    def model() -> None:
        prior = dist.Normal(torch.zeros_like(sd), sd)
        x = pyro.sample("x", prior if scalar else prior.expand([dim]).to_event(1))
        pyro.factor("likelihood", mixture.log_prob(x[..., None] if scalar else x))

    def draw(count: int, rng: np.random.Generator) -> Draws:
        x = exact.draw(count, rng)
        return {"x": x[:, 0] if scalar else x}

    return Case(
        f"{components} normals {number_text(distance)} sds apart and a prior, D = {dim}",
        model,
        draw,
        log_evidence=float(np.log(np.exp(logs - top).sum()) + top),
        regions=lambda draws: exact.nearest(np.asarray(draws["x"]).reshape(-1, dim)),
    )


class _Elements:
    """n independent numbers, each with a mixture of K normals as its prior and one normal observation of its own."""

    def __init__(self, maker: Maker, n: int, components: int) -> None:
        self.scale = maker.log_uniform(0.1, 10.0)
        self.distance, centres = random_centres(maker, components, 1, self.scale)
        self.loc = maker.rounded(centres[:, 0])
        self.sds = maker.rounded(self.scale * maker.rng.uniform(0.6, 1.5, components))
        self.weights = random_weights(maker, components)
        self.weights = self.weights / self.weights.sum()
        self.noise = float(maker.rounded(self.scale * maker.log_uniform(0.3, 30.0)))
        which = maker.rng.choice(components, n, p=self.weights)
        x = self.loc[which] + self.sds[which] * maker.rng.standard_normal(n)
        self.y = maker.rounded(x + self.noise * maker.rng.standard_normal(n))
        total = self.sds**2 + self.noise**2
        away = self.y[:, None] - self.loc
        logs = np.log(self.weights) - 0.5 * away**2 / total - 0.5 * np.log(2.0 * np.pi * total)
        top = logs.max(1, keepdims=True)
        self.log_evidence = float((np.log(np.exp(logs - top).sum(1)) + top[:, 0]).sum())
        self.shares = np.exp(logs - top) / np.exp(logs - top).sum(1, keepdims=True)
        self.post_mean = self.loc + away * self.sds**2 / total
        self.post_sd = self.sds * self.noise / np.sqrt(total)
        self.n, self.components = n, components

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        """Return draws (count, n)."""
        which = (rng.random((count, self.n, 1)) > self.shares.cumsum(-1)).sum(-1).clip(0, self.components - 1)
        each = np.arange(self.n)
        sd = self.post_sd[which]
        return np.asarray(self.post_mean[each, which] + sd * rng.standard_normal((count, self.n)))

    def regions(self, x: Array) -> NDArray[np.bool_]:
        """Return whether each of the first elements of x (count, n) is nearest to each centre."""
        near = np.abs(x[:, :WATCHED, None] - self.loc).argmin(-1)
        return np.asarray((near[..., None] == np.arange(self.components)).reshape(len(x), -1))

    def text(self) -> str:
        """Return what it is, in words."""
        noise = number_text(self.noise / self.scale)
        return f"{self.components} normals {number_text(self.distance)} sds apart, noise {noise} sds"


def enumerated(maker: Maker) -> Case:
    """Numbers in a plate, each from a component of its own that is summed out."""
    n, components = maker.size(1, 12, 100), maker.integer(2, 5)
    found = _Elements(maker, n, components)
    loc, sds, weights = (maker.tensor(part) for part in (found.loc, found.sds, found.weights))
    noise = maker.tensor(found.noise)

    def model(y: torch.Tensor) -> None:
        with pyro.plate("element", len(y)):
            c = pyro.sample("c", dist.Categorical(weights), infer={"enumerate": "parallel"})
            x = pyro.sample("x", dist.Normal(Vindex(loc)[c], Vindex(sds)[c]))
            pyro.sample("y", dist.Normal(x, noise), obs=y)

    return Case(
        f"enumerated {found.text()}, n = {n}",
        model,
        lambda count, rng: {"x": found.draw(count, rng)},
        (maker.tensor(found.y),),
        log_evidence=found.log_evidence,
        regions=lambda draws: found.regions(draws["x"]),
    )


def mixture_prior(maker: Maker) -> Case:
    """A prior that is a mixture distribution."""
    n, components = maker.size(1, 12, 100), maker.integer(2, 4)
    found = _Elements(maker, n, components)
    loc, sds, weights = (maker.tensor(part) for part in (found.loc, found.sds, found.weights))
    noise, scalar = maker.tensor(found.noise), n == 1

    def model(y: torch.Tensor) -> None:
        prior = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, sds))
        if scalar:
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x, noise), obs=y[0])
            return
        with pyro.plate("element", n):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x, noise), obs=y)

    return Case(
        f"mixture prior of {found.text()}, n = {n}",
        model,
        lambda count, rng: {"x": found.draw(count, rng)[:, 0] if scalar else found.draw(count, rng)},
        (maker.tensor(found.y),),
        log_evidence=found.log_evidence,
        regions=lambda draws: found.regions(np.asarray(draws["x"]).reshape(-1, n)),
    )


def enumerated_vector(maker: Maker) -> Case:
    """One vector from a component that is summed out, observed with noise."""
    dim, components, scale = maker.size(1, 20, 150), maker.integer(2, 6), maker.log_uniform(0.1, 10.0)
    distance, centres = random_centres(maker, components, dim, scale)
    centres = maker.rounded(centres)
    sds = maker.rounded(scale * maker.rng.uniform(0.6, 1.5, (components, dim)))
    weights = random_weights(maker, components)
    weights = weights / weights.sum()
    noise = float(maker.rounded(scale * distance * maker.log_uniform(0.5, 3.0)))
    y = maker.rounded(centres[0] + noise * maker.rng.standard_normal(dim))
    total = sds**2 + noise**2
    logs = np.log(weights) - 0.5 * ((y - centres) ** 2 / total + np.log(2.0 * np.pi * total)).sum(-1)
    top = logs.max()
    parts = [
        Gaussian(centre + (y - centre) * sd**2 / (sd**2 + noise**2), sd * noise / np.sqrt(sd**2 + noise**2))
        for centre, sd in zip(centres, sds, strict=True)
    ]
    exact = Mixture(np.exp(logs - top), parts)
    loc_, sds_, weights_, noise_ = (maker.tensor(part) for part in (centres, sds, weights, noise))

    def model(y: torch.Tensor) -> None:
        c = pyro.sample("c", dist.Categorical(weights_), infer={"enumerate": "parallel"})
        x = pyro.sample("x", dist.Normal(Vindex(loc_)[c, :], Vindex(sds_)[c, :]).to_event(1))
        pyro.sample("y", dist.Normal(x, noise_).to_event(1), obs=y)

    return Case(
        f"enumerated vector of {components} normals {number_text(distance)} sds apart, D = {dim}",
        model,
        lambda count, rng: {"x": exact.draw(count, rng)},
        (maker.tensor(y),),
        log_evidence=float(np.log(np.exp(logs - top).sum()) + top),
        regions=lambda draws: exact.nearest(draws["x"]),
    )


def shifted_clusters(maker: Maker) -> Case:
    """An unknown shift of data whose clusters are summed out: the data may fit at several shifts."""
    rows, components = maker.integer(1, 30), maker.integer(2, 4)
    scale = maker.log_uniform(0.1, 10.0)
    distance, centres = random_centres(maker, components, 1, scale)
    loc = maker.rounded(centres[:, 0])
    weights = random_weights(maker, components)
    weights = weights / weights.sum()
    spread = float(maker.rounded(scale * distance * maker.uniform(1.0, 4.0)))
    sd = float(maker.rounded(scale))
    which = maker.rng.choice(components, rows, p=weights)
    y = maker.rounded(loc[which] + spread * maker.rng.standard_normal() + sd * maker.rng.standard_normal(rows))

    def log_joint(shift: Array) -> Array:
        away = (y[:, None, None, None] - loc[:, None, None] - shift) / sd
        each = np.log(weights)[:, None, None] - 0.5 * away**2 - np.log(sd) - 0.5 * np.log(2.0 * np.pi)
        top = each.max(1, keepdims=True)
        likelihood = (np.log(np.exp(each - top).sum(1)) + top[:, 0]).sum(0)
        prior = -0.5 * (shift / spread) ** 2 - np.log(spread) - 0.5 * np.log(2.0 * np.pi)
        return np.asarray(likelihood + prior)

    grid = Grid(log_joint, -9.0 * spread, 9.0 * spread)
    loc_, weights_, spread_, sd_ = (maker.tensor(part) for part in (loc, weights, spread, sd))

    def model(y: torch.Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(torch.zeros_like(spread_), spread_))
        with pyro.plate("row", len(y)):
            c = pyro.sample("c", dist.Categorical(weights_), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(shift + Vindex(loc_)[c], sd_), obs=y)

    return Case(
        f"shift of {components} clusters {number_text(distance)} sds apart, {rows} rows",
        model,
        lambda count, rng: {"shift": grid.draw(count, rng)[:, 0]},
        (maker.tensor(y),),
        log_evidence=float(grid.log_masses[0]),
    )


VARIANTS = (density, enumerated, with_prior, enumerated_vector, density, mixture_prior, shifted_clusters)
