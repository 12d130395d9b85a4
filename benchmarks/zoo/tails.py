"""Heavy and skewed tails, angles, bounds that depend on other latents, truncated and discontinuous likelihoods."""

from __future__ import annotations

from typing import cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import gammaln, ive, log_ndtr
from torch import Tensor

from benchmarks.zoo.case import Array, Draws, Maker, number_text
from benchmarks.zoo.grids import Grid
from benchmarks.zoo.pieces import Piece, of_pieces

LOG_TWO_PI = float(np.log(2.0 * np.pi))
HEAVY_DF = 4.5  # up to here the fourth moment does not exist, and a sample's sd says little


def _log_normal(x: Array, mean: Array | float, sd: Array | float) -> Array:
    return np.asarray(-0.5 * ((x - mean) / sd) ** 2 - np.log(sd) - 0.5 * LOG_TWO_PI)


def student_prior(maker: Maker) -> Piece:
    """Student-t latents, Cauchy among them, that no data touch."""
    n, df = maker.size(1, 30, 200), float(maker.rounded(maker.choice([1.0, 1.0, 2.0, 3.0, 5.0])))
    loc, scale = maker.rounded(maker.uniform(-5.0, 5.0)), maker.rounded(maker.log_uniform(0.01, 100.0))
    df_, loc_, scale_ = (maker.tensor(part) for part in (df, loc, scale))
    way = maker.choice(["plate", "event", "half"])

    def run(prefix: str, y: Tensor | None) -> None:
        if way == "half":
            with pyro.plate(f"{prefix}element", n):
                heavy = dist.HalfCauchy(scale_) if df == 1.0 else dist.Cauchy(loc_, scale_)
                pyro.sample(f"{prefix}x", heavy)
        elif way == "plate":
            with pyro.plate(f"{prefix}element", n):
                pyro.sample(f"{prefix}x", dist.StudentT(df_, loc_, scale_))
        else:
            pyro.sample(f"{prefix}x", dist.StudentT(df_, loc_, scale_).expand([n]).to_event(1))

    def draw(count: int, rng: np.random.Generator) -> Draws:
        if way == "half":
            x = scale * rng.standard_cauchy((count, n))
            return {"x": np.abs(x) if df == 1.0 else loc + x}
        return {"x": loc + scale * rng.standard_t(df, (count, n))}

    what = ("half-Cauchy" if df == 1.0 else "Cauchy") if way == "half" else f"Student-t of {df:.0f} df"
    return Piece(f"{n} {what}", run, draw, 0.0, heavy=("x",) if df <= HEAVY_DF or way == "half" else ())


def skewed_prior(maker: Maker) -> Piece:
    """Skewed latents that no data touch."""
    n, shape = maker.size(1, 30, 200), float(maker.rounded(maker.log_uniform(0.5, 5.0)))
    scale = float(maker.rounded(maker.log_uniform(0.01, 100.0)))
    kind = maker.choice(["log-normal", "Gumbel", "Weibull", "gamma", "inverse gamma", "exponential"])
    spread = float(maker.rounded(min(shape, 2.0)))
    shape_, scale_, spread_, zero = (maker.tensor(part) for part in (shape, scale, spread, 0.0))

    def run(prefix: str, y: Tensor | None) -> None:
        prior = {
            "log-normal": lambda: dist.LogNormal(scale_.log(), spread_),
            "Gumbel": lambda: dist.Gumbel(zero, scale_),
            "Weibull": lambda: dist.Weibull(scale_, shape_),
            "gamma": lambda: dist.Gamma(shape_, 1.0 / scale_),
            "inverse gamma": lambda: dist.InverseGamma(shape_, scale_),
            "exponential": lambda: dist.Exponential(1.0 / scale_),
        }[kind]()
        with pyro.plate(f"{prefix}element", n):
            pyro.sample(f"{prefix}x", prior)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        size = (count, n)
        x = {
            "log-normal": lambda: np.exp(spread * rng.standard_normal(size)),
            "Gumbel": lambda: rng.gumbel(size=size),
            "Weibull": lambda: rng.weibull(shape, size),
            "gamma": lambda: rng.gamma(shape, size=size),
            "inverse gamma": lambda: 1.0 / rng.gamma(shape, size=size),
            "exponential": lambda: rng.exponential(size=size),
        }[kind]()
        return {"x": scale * x}

    heavy = (kind == "inverse gamma" and shape <= HEAVY_DF) or (kind == "log-normal" and spread > 0.8)
    number = number_text(spread if kind == "log-normal" else shape)
    return Piece(f"{n} {kind} of shape {number}", run, draw, 0.0, heavy=("x",) if heavy else ())


def _log_student(x: Array, df: float) -> Array:
    constant = gammaln(0.5 * (df + 1.0)) - gammaln(0.5 * df) - 0.5 * np.log(df * np.pi)
    return np.asarray(constant - 0.5 * (df + 1.0) * np.log1p(x**2 / df))


def robust_location(maker: Maker) -> Piece:
    """Centres of few Student-t data, with outliers."""
    n, rows, df = maker.size(1, 15, 80), maker.integer(1, 6), float(maker.choice([1.0, 2.0, 3.0, 5.0]))
    width, s = maker.rounded(maker.log_uniform(1.0, 20.0)), maker.rounded(maker.log_uniform(0.1, 3.0))
    y = width * maker.rng.standard_normal(n) + s * maker.rng.standard_t(df, (rows, n))
    y = maker.rounded(y + width * (maker.rng.random((rows, n)) < 0.2) * maker.rng.standard_normal((rows, n)))

    def log_joint(x: Array) -> Array:
        total = _log_normal(x, 0.0, width)
        for row in y:
            total = total + _log_student((row - x) / s, df) - np.log(s)
        return total

    grid = Grid(log_joint, -9.0 * width, 9.0 * width, n)
    width_, s_, df_, zero = (maker.tensor(part) for part in (width, s, df, 0.0))

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}group", n, dim=-1):
            x = pyro.sample(f"{prefix}x", dist.Normal(zero, width_))
            with pyro.plate(f"{prefix}row", rows, dim=-2):
                pyro.sample(f"{prefix}y", dist.StudentT(df_, x, s_), obs=y)

    return Piece(
        f"{n} centres of {rows} Student-t data of {df:.0f} df",
        run,
        lambda count, rng: {"x": grid.draw(count, rng)},
        float(grid.log_masses.sum()),
        maker.tensor(y),
    )


def cauchy_location(maker: Maker) -> Piece:
    """Cauchy latents with a noisy measurement each."""
    n, s = maker.size(1, 30, 200), maker.rounded(maker.log_uniform(0.1, 10.0))
    y = maker.rounded(np.clip(maker.rng.standard_cauchy(n), -50.0, 50.0) + s * maker.rng.standard_normal(n))

    def log_joint(x: Array) -> Array:
        return np.asarray(_log_student(x, 1.0) + _log_normal(y, x, s))

    grid = Grid(log_joint, np.minimum(y, 0.0) - 10.0 * s - 10.0, np.maximum(y, 0.0) + 10.0 * s + 10.0, n)
    s_, zero = maker.tensor(s), maker.tensor(0.0)

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}element", n):
            x = pyro.sample(f"{prefix}x", dist.Cauchy(zero, zero + 1.0))
            pyro.sample(f"{prefix}y", dist.Normal(x, s_), obs=y)

    return Piece(
        f"{n} Cauchy latents, noise {number_text(float(s))}",
        run,
        lambda count, rng: {"x": grid.draw(count, rng)},
        float(grid.log_masses.sum()),
        maker.tensor(y),
    )


def angles(maker: Maker) -> Piece:
    """Directions with a von Mises prior and von Mises data."""
    n, rows = maker.size(1, 15, 80), maker.integer(0, 10)
    centre, k0 = maker.rounded(maker.uniform(-3.1, 3.1)), maker.rounded(maker.log_uniform(0.3, 50.0))
    k = maker.rounded(maker.log_uniform(0.3, 50.0))
    true = maker.rng.vonmises(float(centre), float(k0), n)
    y = maker.rounded(maker.rng.vonmises(true, float(k), (rows, n)))
    centre_, k0_, k_ = (maker.tensor(part) for part in (centre, k0, k))

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}element", n, dim=-1):
            x = pyro.sample(f"{prefix}x", dist.VonMises(centre_, k0_))
            if rows:
                with pyro.plate(f"{prefix}row", rows, dim=-2):
                    pyro.sample(f"{prefix}y", dist.VonMises(x, k_), obs=y)

    total = k0 * np.exp(1j * centre) + k * np.exp(1j * y).sum(0) + np.zeros(n)
    after = np.abs(total)

    def log_i0(x: Array) -> Array:
        return np.asarray(np.log(ive(0, x)) + x)

    evidence = log_i0(after) - log_i0(k0) - rows * (log_i0(k) + LOG_TWO_PI)
    return Piece(
        f"{n} angles of concentration {number_text(float(after.min()))} and more, {rows} data each",
        run,
        lambda count, rng: {"x": rng.vonmises(np.angle(total), after, (count, n))},
        float(evidence.sum()),
        maker.tensor(y) if rows else None,
        periods={"x": 2.0 * np.pi},
    )


def chain_of_bounds(maker: Maker) -> Piece:
    """Numbers each of which bounds the next from above, or from below."""
    n, top, down = maker.integer(2, 8), maker.rounded(maker.log_uniform(0.1, 100.0)), maker.flag()
    top_, zero = maker.tensor(top), maker.tensor(0.0)

    def run(prefix: str, y: Tensor | None) -> None:
        x = top_
        for number in range(n):
            bounds = (zero, x) if down else (x, x + top_)
            x = pyro.sample(f"{prefix}x{number}", dist.Uniform(*bounds))

    def draw(count: int, rng: np.random.Generator) -> Draws:
        found, x = {}, np.full(count, float(top))
        for number in range(n):
            u = rng.random(count)
            x = found[f"x{number}"] = x * u if down else x + top * u
        return found

    return Piece(f"{n} numbers, each the {'upper' if down else 'lower'} bound of the next", run, draw, 0.0)


def bound_and_inside(maker: Maker) -> Piece:
    """A bound that no data touch, and a number below it that is measured."""
    top, share = maker.rounded(maker.log_uniform(0.1, 100.0)), maker.uniform(0.05, 0.9)
    s = maker.rounded(top * maker.log_uniform(0.02, 0.5))
    y = maker.rounded(top * share + s * maker.rng.standard_normal())

    def log_joint(b: Array) -> Array:
        return np.asarray(np.log(np.log(top / b) / top) + _log_normal(y, b, s))

    grid = Grid(log_joint, 1e-9 * top, (1.0 - 1e-9) * top)
    top_, s_, zero = maker.tensor(top), maker.tensor(s), maker.tensor(0.0)

    def run(prefix: str, y: Tensor | None) -> None:
        bound = pyro.sample(f"{prefix}bound", dist.Uniform(zero, top_))
        x = pyro.sample(f"{prefix}x", dist.Uniform(zero, bound))
        pyro.sample(f"{prefix}y", dist.Normal(x, s_), obs=y)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        x = grid.draw(count, rng)[:, 0]
        return {"x": x, "bound": x * (top / x) ** rng.random(count)}

    return Piece("a number and its bound", run, draw, float(grid.log_masses[0]), maker.tensor(y))


def in_an_interval(maker: Maker) -> Piece:
    """Numbers between known bounds, measured with noise: many lie at a bound."""
    n, low = maker.size(1, 30, 200), maker.rounded(maker.uniform(-5.0, 5.0))
    high = maker.rounded(low + maker.log_uniform(0.1, 10.0))
    width = high - low
    s = maker.rounded(width * maker.log_uniform(0.03, 3.0))
    y = maker.rounded(low + width * maker.rng.random(n) + s * maker.rng.standard_normal(n))

    def log_joint(x: Array) -> Array:
        return np.asarray(_log_normal(y, x, s) - np.log(width))

    grid = Grid(log_joint, low, high, n)
    low_, high_, s_ = (maker.tensor(part) for part in (low, high, s))

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}element", n):
            x = pyro.sample(f"{prefix}x", dist.Uniform(low_, high_))
            pyro.sample(f"{prefix}y", dist.Normal(x, s_), obs=y)

    return Piece(
        f"{n} numbers in an interval, noise {number_text(float(s / width))} of it",
        run,
        lambda count, rng: {"x": grid.draw(count, rng)},
        float(grid.log_masses.sum()),
        maker.tensor(y),
    )


def truncated(maker: Maker) -> Piece:
    """Means of normal data: only those above a threshold were kept, or some are only known to be above it."""
    n, rows, censored = maker.size(1, 15, 80), maker.integer(1, 20), maker.flag()
    width, s = maker.rounded(maker.log_uniform(0.5, 5.0)), maker.rounded(maker.log_uniform(0.2, 2.0))
    limit = maker.rounded(maker.uniform(-1.0, 1.0))
    true = width * maker.rng.standard_normal(n)
    y = true + s * maker.rng.standard_normal((rows, n))
    seen = y < limit if censored else np.ones((rows, n), dtype=bool)
    if not censored:
        above = -np.log(maker.rng.random((rows, n)))  # what is far above the threshold by the tail's exponential shape
        y = np.where(y > limit, y, limit + s * above / (1.0 + np.maximum((limit - true) / s, 0.0)))
    y = maker.rounded(np.where(seen, y, limit))

    def log_joint(x: Array) -> Array:
        total = _log_normal(x, 0.0, width)
        for row, kept in zip(y, seen, strict=True):
            total = total + kept * _log_normal(row, x, s)
        beyond = log_ndtr((x - limit) / s)
        return np.asarray(total + ((~seen).sum(0) if censored else -rows) * beyond)

    far = 9.0 * width + 30.0 * s
    grid = Grid(log_joint, -far, far, n)
    width_, s_, limit_, zero = (maker.tensor(part) for part in (width, s, limit, 0.0))
    mask, unseen = cast(torch.BoolTensor, torch.as_tensor(seen)), maker.tensor((~seen).sum(0))

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}group", n, dim=-1):
            x = pyro.sample(f"{prefix}x", dist.Normal(zero, width_))
            beyond = torch.special.log_ndtr((x - limit_) / s_)
            pyro.factor(f"{prefix}beyond", unseen * beyond if censored else -rows * beyond)
            with pyro.plate(f"{prefix}row", rows, dim=-2), pyro.poutine.mask(mask=mask):
                pyro.sample(f"{prefix}y", dist.Normal(x, s_), obs=y)

    return Piece(
        f"{n} means of {rows} {'censored' if censored else 'truncated'} data",
        run,
        lambda count, rng: {"x": grid.draw(count, rng)},
        float(grid.log_masses.sum()),
        maker.tensor(y),
    )


def unknown_bound(maker: Maker) -> Piece:
    """The upper bounds of uniform data: the density jumps at the largest."""
    n, rows, spread = maker.size(1, 10, 60), maker.integer(1, 20), maker.rounded(maker.log_uniform(0.3, 1.5))
    theta = np.exp(spread * maker.rng.standard_normal(n))
    y = maker.rounded(theta * maker.rng.random((rows, n)))
    least = np.log(y.max(0))

    def log_joint(u: Array) -> Array:
        return np.asarray(_log_normal(u, 0.0, spread) - rows * u)

    grid = Grid(log_joint, least, least + 8.0 * spread + np.maximum(-least, 0.0), n)
    spread_, zero = maker.tensor(spread), maker.tensor(0.0)

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}group", n, dim=-1):
            theta = pyro.sample(f"{prefix}theta", dist.LogNormal(zero, spread_))
            with pyro.plate(f"{prefix}row", rows, dim=-2):
                pyro.sample(f"{prefix}y", dist.Uniform(zero, theta), obs=y)

    return Piece(
        f"{n} unknown bounds of {rows} uniform data",
        run,
        lambda count, rng: {"theta": np.exp(grid.draw(count, rng))},
        float(grid.log_masses.sum()),
        maker.tensor(y),
        smooth=False,
    )


def change_point(maker: Maker) -> Piece:
    """When a series jumps: the density is constant between the times of the data."""
    rows, jump = maker.integer(3, 60), maker.rounded(maker.uniform(0.5, 4.0))
    times = np.unique(maker.rounded(maker.rng.random(rows)))
    rows, true = len(times), maker.rng.random()
    y = maker.rounded(jump * (times > true) + maker.rng.standard_normal(rows))
    edges = np.concatenate([[0.0], times, [1.0]])
    logs = np.array([_log_normal(y, jump * (np.arange(rows) >= k), 1.0).sum() for k in range(rows + 1)])
    logs = logs + np.log(np.maximum(np.diff(edges), 1e-300))
    top = logs.max()
    shares = np.exp(logs - top) / np.exp(logs - top).sum()
    times_, jump_, zero = maker.tensor(times), maker.tensor(jump), maker.tensor(0.0)

    def run(prefix: str, y: Tensor | None) -> None:
        when = pyro.sample(f"{prefix}when", dist.Uniform(zero, zero + 1.0))
        with pyro.plate(f"{prefix}row", rows):
            mean = torch.where(times_ > when, jump_, zero)
            pyro.sample(f"{prefix}y", dist.Normal(mean, zero + 1.0), obs=y)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        which = rng.choice(rows + 1, count, p=shares)
        return {"when": edges[which] + np.diff(edges)[which] * rng.random(count)}

    evidence = float(np.log(np.exp(logs - top).sum()) + top)
    return Piece(
        f"jump of {number_text(float(jump))} in {rows} data", run, draw, evidence, maker.tensor(y), smooth=False
    )


KINDS = (
    *(student_prior, angles, truncated, unknown_bound, bound_and_inside, skewed_prior, robust_location),
    *(in_an_interval, chain_of_bounds, cauchy_location, change_point),
)
VARIANTS = tuple(of_pieces(kind, KINDS) for kind in KINDS)
