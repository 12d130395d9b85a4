"""Posteriors of improper priors, in pairs: one that has an integral, and one that has none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from scipy.special import gammaln
from torch import Tensor

from benchmarks.zoo.case import Array, Case, Draws, Maker, number_text
from benchmarks.zoo.grids import Grid

DIGITS = (-20.0, 20.0)  # logarithms of x within which log gamma(x + 1) - log gamma(x) is exact to 1e-6
WIDEST = 60.0  # of the logarithm of a scale, where its density is looked for


def flat(name: str, support: Any = constraints.real, *event: int) -> Tensor:
    """Sample from an improper prior that is constant on a support."""
    return pyro.sample(name, dist.ImproperUniform(support, (), event))


def _counts(maker: Maker, groups: int, most: int, proper: bool) -> tuple[Array, Array]:
    """Return successes and trials of some groups; one of them has none, or nothing else, unless it is proper."""
    trials = maker.rng.integers(2, most + 1, groups)
    successes = maker.rng.integers(1, trials)
    if not proper:
        one = maker.integer(0, groups - 1)
        successes[one] = maker.choice([0, trials[one]])
    return successes.astype(float), trials.astype(float)


def shares(maker: Maker, proper: bool) -> Case:
    """Haldane's prior 1 / (p (1 - p)) of shares."""
    n = maker.integer(1, 6)
    k, trials = _counts(maker, n, 40, proper)

    def model(k: Tensor, trials: Tensor) -> None:
        with pyro.plate("group", n):
            p = flat("p", constraints.unit_interval)
            pyro.factor("prior", -p.log() - torch.log1p(-p))
            pyro.sample("k", dist.Binomial(trials, p), obs=k)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        return {"p": rng.beta(k, trials - k, (count, n))}

    return _case(f"{n} shares, Haldane's prior", model, draw, maker, proper, k, trials)


def log_odds(maker: Maker, proper: bool) -> Case:
    """Flat log odds, or log rates, of groups."""
    n, rates = maker.integer(1, 6), maker.flag()
    k, trials = _counts(maker, n, 40, proper)
    if rates and not proper:
        k = np.minimum(k, np.where(k == trials, 0.0, k))

    def model(k: Tensor, trials: Tensor) -> None:
        with pyro.plate("group", n):
            x = flat("x")
            pyro.sample("k", dist.Poisson(x.exp()) if rates else dist.Binomial(trials, logits=x), obs=k)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        one = rng.gamma(k, size=(count, n))
        return {"x": np.log(one) if rates else np.log(one) - np.log(rng.gamma(trials - k, size=(count, n)))}

    return _case(f"{n} flat log {'rates' if rates else 'odds'}", model, draw, maker, proper, k, trials)


def rate(maker: Maker, proper: bool) -> Case:
    """A rate with a prior of 1 / x, or x^-1/2, or more, of counts."""
    rows, power = maker.integer(1, 20), maker.choice([1.0, 1.0, 1.5])
    y = maker.rng.poisson(maker.log_uniform(0.3, 20.0), rows) * float(proper)
    if proper and y.sum() == 0.0:
        y[0] = 1.0

    def model(y: Tensor) -> None:
        x = flat("rate", constraints.positive)
        pyro.factor("prior", -power * x.log())
        with pyro.plate("row", rows):
            pyro.sample("y", dist.Poisson(x), obs=y)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        return {"rate": rng.gamma(y.sum() + 1.0 - power, 1.0 / rows, count)}

    return _case(f"rate, prior x^-{power}, of {rows} counts", model, draw, maker, proper, y)


def location_and_scale(maker: Maker, proper: bool) -> Case:
    """A flat mean, and a scale that is flat or has 1 / x, or whose logarithm is flat, of normal data."""
    power, way = maker.choice([0.0, 1.0]), maker.choice(["scale", "log scale"])
    rows = maker.integer(int(4 - power), 30) if proper else int(2 - power)
    level, width = maker.uniform(-100.0, 100.0), maker.log_uniform(0.01, 100.0)
    y = maker.rounded(level + width * maker.rng.standard_normal(rows))

    def model(y: Tensor) -> None:
        mean = flat("mean")
        if way == "scale":
            scale = flat("scale", constraints.positive)
            pyro.factor("prior", -power * scale.log())
        else:
            log_scale = flat("log_scale")
            scale = log_scale.exp()
            pyro.factor("prior", (1.0 - power) * log_scale)
        with pyro.plate("row", rows):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        squares = ((y - y.mean()) ** 2).sum()
        scale = np.sqrt(0.5 * squares / rng.gamma(0.5 * (rows - 2.0 + power), size=count))
        mean = y.mean() + scale / np.sqrt(rows) * rng.standard_normal(count)
        return {"mean": mean, **({"scale": scale} if way == "scale" else {"log_scale": np.log(scale)})}

    heavy = ("mean", "scale") if rows < 8 else ()
    return _case(f"mean and {way}, prior x^-{power}, of {rows}", model, draw, maker, proper, y, heavy=heavy)


def hierarchy(maker: Maker, proper: bool, way: str) -> Case:
    """Effects of groups: the logarithm of their scale is flat, or the scale with two groups."""
    few = way == "two groups"
    groups = maker.integer(5, 12) if proper or not few else 2
    centered = few or way == "centered"
    s = maker.rounded(maker.log_uniform(0.3, 10.0) * maker.rng.uniform(0.5, 2.0, groups))
    y = maker.rounded(maker.log_uniform(0.2, 2.0) * s.mean() * maker.rng.standard_normal(groups) + s)
    power = 0.0 if proper or few else 1.0

    def model(y: Tensor, s: Tensor) -> None:
        mean, log_scale = flat("mean"), None
        if maker_log:
            log_scale = flat("log_scale")
            scale = log_scale.exp()
            pyro.factor("prior", (1.0 - power) * log_scale)
        else:
            scale = flat("scale", constraints.positive)
            pyro.factor("prior", -power * scale.log())
        with pyro.plate("group", groups):
            if centered:
                effect = pyro.sample("effect", dist.Normal(mean, scale))
            else:
                effect = mean + scale * pyro.sample("z", dist.Normal(0.0 * y, 1.0))
            pyro.sample("y", dist.Normal(effect, s), obs=y)

    maker_log = maker.flag()

    def draw(count: int, rng: np.random.Generator) -> Draws:
        mean, log_scale, effect = _of_groups(y, s, power, count, rng)
        scale = np.exp(log_scale)
        of_groups = {"effect": effect} if centered else {"z": (effect - mean[:, None]) / scale[:, None]}
        return {"mean": mean, "log_scale" if maker_log else "scale": log_scale if maker_log else scale, **of_groups}

    heavy = ("mean", "scale", "effect")
    return _case(f"hierarchy of {groups}, {way}", model, draw, maker, proper, y, s, heavy=heavy)


def _of_groups(y: Array, s: Array, power: float, count: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Draw a flat mean, the log of a scale with prior x^-power, and effects (S, J), given y (J,) with errors s (J,)."""

    def moments(scale: Array) -> tuple[Array, Array, Array]:
        precision = 1.0 / (s**2 + scale[..., None] ** 2)
        total = precision.sum(-1)
        mean = (precision * y).sum(-1) / total
        fit = -0.5 * (precision * (y - mean[..., None]) ** 2).sum(-1) + 0.5 * np.log(precision).sum(-1)
        return mean, total**-0.5, fit - 0.5 * np.log(total)

    grid = Grid(lambda t: moments(np.exp(t))[2] + (1.0 - power) * t, -WIDEST, WIDEST)
    log_scale = grid.draw(count, rng)[:, 0]
    scale = np.exp(log_scale)
    middle, sd, _ = moments(scale)
    mean = middle + sd * rng.standard_normal(count)
    precision = s**-2 + scale[:, None] ** -2
    effect = (y * s**-2 + mean[:, None] * scale[:, None] ** -2) / precision
    return mean, log_scale, effect + rng.standard_normal((count, len(y))) / np.sqrt(precision)


def side_by_side(maker: Maker, proper: bool) -> Case:
    """Two or three hierarchies with flat means and scales: with two groups each, no tail has a top for the others."""
    parts = maker.integer(2, 3)
    s = [maker.rounded(maker.rng.uniform(0.5, 2.0, maker.integer(5, 8) if proper else 2)) for _ in range(parts)]
    y = [maker.rounded(maker.log_uniform(0.5, 3.0) * maker.rng.standard_normal(len(one)) + one) for one in s]

    def model(*given: Tensor) -> None:
        for number, (y, s) in enumerate(zip(given[:parts], given[parts:], strict=True)):
            mean, scale = flat(f"mean{number}"), flat(f"scale{number}", constraints.positive)
            with pyro.plate(f"group{number}", len(y)):
                effect = pyro.sample(f"effect{number}", dist.Normal(mean, scale))
                pyro.sample(f"y{number}", dist.Normal(effect, s), obs=y)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        found: Draws = {}
        for number in range(parts):
            mean, log_scale, effect = _of_groups(y[number], s[number], 0.0, count, rng)
            found |= {f"mean{number}": mean, f"scale{number}": np.exp(log_scale), f"effect{number}": effect}
        return found

    heavy = tuple(f"{name}{number}" for name in ("mean", "scale", "effect") for number in range(parts))
    return _case(f"{parts} hierarchies side by side", model, draw, maker, proper, *y, *s, heavy=heavy)


def one_number(
    maker: Maker, proper: bool, text: str, log_density: Callable[[Tensor], Tensor], support: Any, *,
    heavy: bool = False, ends: tuple[float, float] | None = None,
) -> Case:  # fmt: skip
    """A model of one number x, whose log density is written once: for Pyro, and for a grid of its coordinate.

    ``ends`` are those of the grid, where the log density has digits.
    """
    to = torch.distributions.biject_to(support)
    widest = {constraints.positive: (-WIDEST, WIDEST), constraints.real: (-1e3, 1e3)}.get(support, (-25.0, 25.0))
    first, last = widest if ends is None else ends

    def model() -> None:
        pyro.factor("density", log_density(flat("x", support)))

    def of_coordinate(t: Array) -> Array:
        z = torch.as_tensor(t)
        x = to(z)
        values = torch.func.vmap(log_density)(x.flatten()).view_as(x)
        return (values + to.log_abs_det_jacobian(z, x)).numpy()

    def draw(count: int, rng: np.random.Generator) -> Draws:
        grid = Grid(of_coordinate, first, last)
        return {"x": to(torch.as_tensor(grid.draw(count, rng)[:, 0])).numpy()}

    return _case(text, model, draw, maker, proper, heavy=("x",) if heavy else ())


def degrees_of_freedom(maker: Maker, proper: bool) -> Case:
    """Degrees of freedom of Student-t data: their likelihood does not fall as they grow."""
    rows, power = maker.integer(5, 60), maker.choice([2.0, 3.0] if proper else [0.0, 0.0, 0.5, 1.0])
    y = maker.tensor(maker.rng.standard_t(maker.choice([2.0, 5.0, 30.0]), rows))

    def log_density(x: Tensor) -> Tensor:
        return dist.StudentT(x, 0.0, 1.0).log_prob(y.to(x)).sum() - power * x.log()

    text = f"df, prior x^-{power}, of {rows}"
    return one_number(maker, proper, text, log_density, constraints.positive, heavy=True, ends=DIGITS)


def overdispersion(maker: Maker, proper: bool) -> Case:
    """The concentration of negative binomial counts: their likelihood goes to that of Poisson counts as it grows."""
    rows, power = maker.integer(5, 60), maker.choice([1.5, 2.0] if proper else [0.0, 0.5, 1.0])
    mean = maker.log_uniform(1.0, 20.0)
    y = maker.rng.poisson(maker.rng.gamma(2.0, mean / 2.0, rows)).astype(float)
    y[:4] = np.maximum(y[:4], 1.0)
    data = maker.tensor(y)

    def log_density(x: Tensor) -> Tensor:
        likelihood = dist.GammaPoisson(x, x / mean).log_prob(data.to(x))
        return likelihood.sum() - power * x.log()

    text = f"concentration, prior x^-{power}, of {rows}"
    return one_number(maker, proper, text, log_density, constraints.positive, heavy=True, ends=DIGITS)


def correlation(maker: Maker, proper: bool) -> Case:
    """A correlation: of pairs that are equal, its likelihood has no integral."""
    rows, power = maker.integer(2, 30), maker.choice([0.0, 1.0])
    one = maker.rng.standard_normal(rows)
    other = maker.uniform(-1.0, 1.0) * one + maker.log_uniform(0.1, 2.0) * maker.rng.standard_normal(rows)
    a, b = maker.tensor(one), maker.tensor(other if proper else maker.choice([1.0, -1.0]) * one)

    def log_density(x: Tensor) -> Tensor:
        rest = (1.0 - x) * (1.0 + x)
        squares = 0.25 * ((a + b).square() / (1.0 + x) + (a - b).square() / (1.0 - x)).sum()
        return -squares - (0.5 * rows + power) * rest.log()

    return one_number(maker, proper, f"correlation of {rows} pairs", log_density, constraints.interval(-1.0, 1.0))


def slope(maker: Maker, proper: bool) -> Case:
    """A flat slope of a logistic regression: separated data have no posterior."""
    rows = maker.integer(4, 60)
    x = maker.rng.standard_normal(rows) * maker.log_uniform(0.03, 30.0)
    y = (x > 0.0).astype(float)
    if proper:
        y[: 1 + rows // 5] = 1.0 - y[: 1 + rows // 5]
    signs = maker.tensor((2.0 * y - 1.0) * x)

    def log_density(x: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(signs.to(x) * x).sum()

    return one_number(maker, proper, f"logistic slope of {rows}", log_density, constraints.real)


def component(maker: Maker, proper: bool) -> Case:
    """The mean of a component of a mixture, which may be empty; or of both components."""
    rows, share, wide = maker.integer(5, 40), maker.uniform(0.2, 0.8), maker.log_uniform(3.0, 100.0)
    y = maker.tensor(maker.rng.standard_normal(rows) + 3.0 * (maker.rng.random(rows) < share))

    def log_density(x: Tensor) -> Tensor:
        other = x if proper else 0.0 * x
        terms = [
            np.log(weight) + dist.Normal(mean, scale).log_prob(y.to(x))
            for weight, mean, scale in ((share, x, 1.0), (1.0 - share, other, wide if proper else 1.0))
        ]
        return torch.logsumexp(torch.stack(terms), 0).sum()

    return one_number(maker, proper, f"mean of a component of {rows}", log_density, constraints.real)


def length_scale(maker: Maker, proper: bool) -> Case:
    """The length scale of a Gaussian process, with a likelihood that does not fall as it grows."""
    rows, power = maker.integer(4, 15), maker.choice([0.0, 0.5])
    far = maker.log_uniform(0.1, 10.0)
    x = torch.as_tensor(np.sort(maker.rng.uniform(0.0, 10.0, rows)))
    y = torch.as_tensor(np.sin(x.numpy()) + 0.3 * maker.rng.standard_normal(rows))
    squares = (x[:, None] - x).square()

    def log_density(length: Tensor) -> Tensor:
        covariance = (-0.5 * squares / length.square()).exp() + 0.09 * torch.eye(rows)
        prior = -power * length.log() - (length / far if proper else 0.0)
        return dist.MultivariateNormal(0.0 * y, covariance, validate_args=False).log_prob(y) + prior  # under vmap

    return one_number(maker, proper, f"length scale of {rows}", log_density, constraints.positive, heavy=True)


def power_law(maker: Maker, proper: bool) -> Case:
    """A power law, to the very edge."""
    excess = maker.log_uniform(0.1, 3.0) if proper else -maker.choice([0.0, 0.0, 0.3])
    unit = maker.log_uniform(0.001, 1000.0)

    def log_density(x: Tensor) -> Tensor:
        return -(1.0 + excess) * torch.log1p(x / unit)

    case = one_number(maker, proper, f"power law 1 + {number_text(excess)}", log_density, constraints.positive)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        return {"x": unit * np.expm1(rng.exponential(1.0 / excess, count))}

    return _case(case.name, case.model, draw, maker, proper, heavy=("x",))


def intercepts(maker: Maker, proper: bool) -> Case:
    """Two or three intercepts, of which data know the sum: one of them flat, or all."""
    terms, rows, s = maker.integer(2, 4), maker.integer(1, 20), maker.rounded(maker.log_uniform(0.1, 10.0))
    y = maker.rounded(maker.uniform(-10.0, 10.0) + s * maker.rng.standard_normal(rows))

    def model(y: Tensor) -> None:
        total = flat("a0")
        for number in range(1, terms):
            prior = dist.Normal(0.0 * y[0], 1.0 + 0.0 * y[0])
            total = total + (pyro.sample(f"a{number}", prior) if proper else flat(f"a{number}"))
        with pyro.plate("row", rows):
            pyro.sample("y", dist.Normal(total, float(s)), obs=y)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        others = rng.standard_normal((count, terms - 1))
        total = y.mean() + float(s) / np.sqrt(rows) * rng.standard_normal(count)
        return {"a0": total - others.sum(1), **{f"a{k + 1}": others[:, k] for k in range(terms - 1)}}

    return _case(f"{terms} intercepts", model, draw, maker, proper, y)


def simplex(maker: Maker, proper: bool) -> Case:
    """Haldane's prior of a simplex: a category without a count has no posterior."""
    n = maker.integer(2, 7)
    counts = maker.rng.integers(1, 30, n).astype(float)
    if not proper:
        counts[maker.integer(0, n - 1)] = 0.0

    def model(counts: Tensor) -> None:
        p = flat("p", constraints.simplex, n)
        pyro.factor("density", ((counts - 1.0) * p.log()).sum())

    def draw(count: int, rng: np.random.Generator) -> Draws:
        return {"p": rng.dirichlet(counts, count)}

    return _case(f"simplex of {n}", model, draw, maker, proper, counts)


def covariance(maker: Maker, proper: bool) -> Case:
    """Jeffreys' prior of a covariance matrix: fewer data than dimensions have no posterior."""
    dim = maker.integer(2, 3)
    rows = maker.integer(dim + 2, 30) if proper else dim - 1
    y = maker.rounded(maker.rng.standard_normal((rows, dim)) * maker.log_uniform(0.1, 10.0))

    def model(y: Tensor) -> None:
        matrix = flat("matrix", constraints.positive_definite, dim, dim)
        root = torch.linalg.cholesky(matrix)
        pyro.factor("prior", -(dim + 1.0) * root.diagonal(dim1=-2, dim2=-1).log().sum(-1))
        with pyro.plate("row", rows):
            pyro.sample("y", dist.MultivariateNormal(0.0 * y[0], scale_tril=root), obs=y)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        root = np.linalg.cholesky(np.linalg.inv(y.T @ y))
        normal = rng.standard_normal((count, rows, dim)) @ root.T
        return {"matrix": np.linalg.inv(np.swapaxes(normal, 1, 2) @ normal)}

    return _case(f"covariance matrix of {rows} in {dim}", model, draw, maker, proper, y, heavy=("matrix",))


def shape_and_rate(maker: Maker, proper: bool) -> Case:
    """Shape and rate of gamma data, both flat: one number has no posterior."""
    rows = maker.integer(5, 40) if proper else 1
    y = maker.rounded(maker.rng.gamma(maker.log_uniform(0.5, 10.0), maker.log_uniform(0.1, 10.0), rows))

    def model(y: Tensor) -> None:
        shape, rate = flat("shape", constraints.positive), flat("rate", constraints.positive)
        with pyro.plate("row", rows):
            pyro.sample("y", dist.Gamma(shape, rate), obs=y)

    def log_density(t: Array) -> Array:
        shape = np.exp(t)
        total = rows * shape + 1.0
        return gammaln(total) - total * np.log(y.sum()) - rows * gammaln(shape) + shape * np.log(y).sum() + t

    def draw(count: int, rng: np.random.Generator) -> Draws:
        shape = np.exp(Grid(log_density, -20.0, 20.0).draw(count, rng)[:, 0])
        return {"shape": shape, "rate": rng.gamma(rows * shape + 1.0) / y.sum()}

    return _case(f"shape and rate of {rows}", model, draw, maker, proper, y, heavy=("shape", "rate"))


def product(maker: Maker, proper: bool) -> Case:
    """Two factors of which data know the product: one of them flat, or both."""
    rows, s, spread = maker.integer(1, 20), maker.log_uniform(0.1, 3.0), maker.rounded(maker.uniform(0.2, 1.0))
    y = maker.rounded(maker.uniform(1.0, 10.0) + s * maker.rng.standard_normal(rows))

    def model(y: Tensor) -> None:
        one = flat("one")
        prior = dist.LogNormal(0.0 * y[0], float(spread))
        other = pyro.sample("other", prior) if proper else flat("other", constraints.positive)
        with pyro.plate("row", rows):
            pyro.sample("y", dist.Normal(one * other, s), obs=y)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        other = np.exp(-(float(spread) ** 2) + float(spread) * rng.standard_normal(count))
        total = y.mean() + s / np.sqrt(rows) * rng.standard_normal(count)
        return {"one": total / other, "other": other}

    return _case("a product", model, draw, maker, proper, y, heavy=("one", "other"))


def width(maker: Maker, proper: bool) -> Case:
    """The flat width of uniform data, whose density has an edge."""
    rows = maker.integer(3, 30) if proper else 1
    y = maker.rounded(maker.rng.random(rows) * maker.log_uniform(0.01, 100.0))

    def model(y: Tensor) -> None:
        width = flat("width", constraints.positive)
        with pyro.plate("row", rows):
            pyro.sample("y", dist.Uniform(0.0 * y, width), obs=y)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        return {"width": y.max() * np.exp(rng.exponential(1.0 / max(rows - 1.0, 1.0), count))}

    return _case(f"width of {rows}", model, draw, maker, proper, y, heavy=("width",), smooth=False)


def _case(
    text: str,
    model: Callable[..., Any],
    draw: Callable[[int, np.random.Generator], Draws],
    maker: Maker,
    proper: bool,
    *data: Array,
    heavy: tuple[str, ...] = (),
    smooth: bool = True,
) -> Case:
    """Return the case: what is improper has no draws."""
    args = tuple(maker.tensor(values) for values in data)
    name = f"{text}: {'proper' if proper else 'improper'}"
    kept = draw if proper else None
    return Case(name, model, kept, args, heavy=frozenset(heavy), smooth=smooth, improper=not proper)


KINDS: tuple[Callable[[Maker, bool], Case], ...] = (
    *(shares, log_odds, rate, location_and_scale),
    *(partial(hierarchy, way=way) for way in ("centered", "by hand", "two groups")),
    *(degrees_of_freedom, overdispersion, correlation, slope, component, length_scale, power_law),
    *(intercepts, simplex, covariance, shape_and_rate, product, width, side_by_side),
)


def _variant(kind: Callable[[Maker, bool], Case], proper: bool) -> Callable[[Maker], Case]:
    def variant(maker: Maker) -> Case:
        return kind(maker, proper)

    return variant


VARIANTS = tuple(_variant(kind, proper) for kind in KINDS for proper in (True, False))
