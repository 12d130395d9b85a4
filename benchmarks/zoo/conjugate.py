"""Conjugate models: counts from none to thousands, and posteriors with spikes at boundaries."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
from scipy.special import betaln, gammaln, multigammaln
from torch import Tensor

from benchmarks.zoo.case import Array, Draws, Maker, number_text
from benchmarks.zoo.pieces import Piece, of_pieces

LOG_TWO_PI = float(np.log(2.0 * np.pi))


def _shape(maker: Maker, n: int) -> Array:
    return maker.rounded(np.exp(maker.rng.uniform(np.log(0.4), np.log(8.0), n)))


def _rows(maker: Maker, most: int) -> int:
    return 0 if maker.flag(0.1) else round(maker.log_uniform(1, most))


def beta_binomial(maker: Maker) -> Piece:
    """Proportions of successes among none to thousands of trials, also none or all."""
    n, most = maker.size(1, 30, 250), maker.log_uniform(1.0, 5000.0)
    a, b = _shape(maker, n), _shape(maker, n)
    trials = np.floor(most * maker.rng.random(n) ** 2 + 0.5)
    p = maker.rng.choice([0.0, 1.0, 0.5, 0.1, 0.99, 0.001], n) if maker.flag() else maker.rng.beta(a, b)
    hits = maker.rng.binomial(trials.astype(int), p).astype(float)
    a_, b_, trials_ = (maker.tensor(part) for part in (a, b, trials))

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}group", n):
            rate = pyro.sample(f"{prefix}p", dist.Beta(a_, b_))
            pyro.sample(f"{prefix}y", dist.Binomial(trials_, rate), obs=y)

    choose = gammaln(trials + 1) - gammaln(hits + 1) - gammaln(trials - hits + 1)
    return Piece(
        f"{n} proportions of up to {most:.0f} trials",
        run,
        lambda count, rng: {"p": rng.beta(a + hits, b + trials - hits, (count, n))},
        float((choose + betaln(a + hits, b + trials - hits) - betaln(a, b)).sum()),
        maker.tensor(hits),
    )


def beta_geometric(maker: Maker) -> Piece:
    """Probabilities of stopping, from waiting times."""
    n, rows = maker.size(1, 20, 150), _rows(maker, 30)
    a, b = _shape(maker, n) + 0.5, _shape(maker, n) + 0.5
    a, b = maker.rounded(a), maker.rounded(b)
    p = np.maximum(maker.rng.beta(a, b), 0.002)
    waits = (maker.rng.geometric(p, (max(rows, 1), n)) - 1).astype(float)[:rows]
    a_, b_ = maker.tensor(a), maker.tensor(b)

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}group", n):
            rate = pyro.sample(f"{prefix}p", dist.Beta(a_, b_))
        for row in range(rows if rows <= 3 else 0):
            with pyro.plate(f"{prefix}group{row}", n):
                pyro.sample(f"{prefix}y{row}", dist.Geometric(rate), obs=None if y is None else y[row])
        if rows > 3:
            with pyro.plate(f"{prefix}row", rows, dim=-2), pyro.plate(f"{prefix}column", n, dim=-1):
                pyro.sample(f"{prefix}y", dist.Geometric(rate), obs=y)

    a1, b1 = a + rows, b + waits.sum(0)
    return Piece(
        f"{n} probabilities of stopping, {rows} waiting times each",
        run,
        lambda count, rng: {"p": rng.beta(a1, b1, (count, n))},
        float((betaln(a1, b1) - betaln(a, b)).sum()),
        maker.tensor(waits) if rows else None,
    )


def _gamma_piece(maker: Maker, kind: str) -> Piece:
    n, rows = maker.size(1, 30, 250), _rows(maker, 50)
    a, b = _shape(maker, n), maker.rounded(np.exp(maker.rng.uniform(-5.0, 3.0, n)))
    rate = maker.rng.gamma(a) / b
    size = (max(rows, 1), n)
    c = maker.rounded(maker.log_uniform(0.5, 5.0))
    with np.errstate(over="ignore"):
        if kind == "Poisson":
            y = maker.rng.poisson(np.minimum(rate, 1e5), size).astype(float)
        elif kind == "exponential":
            y = maker.rng.exponential(1.0 / np.maximum(rate, 1e-6), size)
        else:
            y = maker.rng.gamma(c, 1.0 / np.maximum(rate, 1e-6), size)
    y = np.maximum(maker.rounded(y[:rows]), 0.0 if kind == "Poisson" else maker.rounded(1e-12))
    a_, b_, c_ = (maker.tensor(part) for part in (a, b, c))

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}group", n, dim=-1):
            rate = pyro.sample(f"{prefix}rate", dist.Gamma(a_, b_))
            if not rows:
                return
            likelihood = {
                "Poisson": lambda: dist.Poisson(rate),
                "exponential": lambda: dist.Exponential(rate),
                "gamma": lambda: dist.Gamma(c_, rate),
            }[kind]()
            with pyro.plate(f"{prefix}row", rows, dim=-2):
                pyro.sample(f"{prefix}y", likelihood, obs=y)

    each = {"Poisson": 0.0, "exponential": 1.0, "gamma": float(c)}[kind]
    a1 = a + (y.sum(0) if kind == "Poisson" else rows * each)
    b1 = b + (rows if kind == "Poisson" else y.sum(0))
    own = -gammaln(y + 1.0) if kind == "Poisson" else 0.0 * y
    own = (c - 1.0) * np.log(y) - gammaln(c) if kind == "gamma" else own
    evidence = (a * np.log(b) - gammaln(a) + gammaln(a1) - a1 * np.log(b1)).sum() + own.sum()
    return Piece(
        f"{n} rates from {rows} {kind} data each",
        run,
        lambda count, rng: {"rate": rng.gamma(a1, 1.0 / b1, (count, n))},
        float(evidence),
        maker.tensor(y) if rows else None,
    )


def gamma_poisson(maker: Maker) -> Piece:
    """Rates of counts."""
    return _gamma_piece(maker, "Poisson")


def gamma_exponential(maker: Maker) -> Piece:
    """Rates of waiting times."""
    return _gamma_piece(maker, "exponential")


def gamma_gamma(maker: Maker) -> Piece:
    """Rates of gamma data of known shape."""
    return _gamma_piece(maker, "gamma")


def dirichlet_multinomial(maker: Maker) -> Piece:
    """Shares of categories, one vector or several in a plate."""
    groups, k = maker.integer(1, 4), maker.size(2, 12, 60)
    total = int(maker.choice([0, 1, 10, 100, 3000]))
    alpha = _shape(maker, k) if maker.flag() else np.full(k, float(maker.rounded(maker.choice([0.5, 1.0]))))
    y = maker.rng.multinomial(total, maker.rng.dirichlet(np.full(k, 0.7)), groups).astype(float)
    alpha_ = maker.tensor(alpha)

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}group", groups):
            p = pyro.sample(f"{prefix}p", dist.Dirichlet(alpha_))
            pyro.sample(f"{prefix}y", dist.Multinomial(total, p), obs=y)

    after = alpha + y

    def draw(count: int, rng: np.random.Generator) -> Draws:
        g = rng.gamma(after, size=(count, groups, k))
        return {"p": g / g.sum(-1, keepdims=True)}

    evidence = gammaln(total + 1) - gammaln(y + 1).sum(1) + gammaln(alpha.sum()) - gammaln(alpha.sum() + total)
    evidence = evidence + (gammaln(after) - gammaln(alpha)).sum(1)
    return Piece(f"{groups} vectors of {k} shares, {total} data", run, draw, float(evidence.sum()), maker.tensor(y))


def normal_inverse_gamma(maker: Maker, constant: bool = False) -> Piece:
    """Means and variances of normal data."""
    n, rows = maker.size(1, 15, 120), maker.integer(1, 60)
    a, b = maker.rounded(maker.log_uniform(2.5, 8.0)), maker.rounded(maker.log_uniform(0.1, 10.0))
    k, m = maker.rounded(maker.log_uniform(0.05, 2.0)), maker.rounded(maker.uniform(-3.0, 3.0))
    y = m + np.sqrt(b / a) * (3.0 * maker.rng.standard_normal(n) + maker.rng.standard_normal((rows, n)))
    y = maker.rounded(np.broadcast_to(y[:1], y.shape) if constant else y)
    a_, b_, k_, m_ = (maker.tensor(part) for part in (a, b, k, m))

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}group", n, dim=-1):
            variance = pyro.sample(f"{prefix}variance", dist.InverseGamma(a_, b_))
            mu = pyro.sample(f"{prefix}mu", dist.Normal(m_, (variance / k_).sqrt()))
            with pyro.plate(f"{prefix}row", rows, dim=-2):
                pyro.sample(f"{prefix}y", dist.Normal(mu, variance.sqrt()), obs=y)

    mean, k1, a1 = y.mean(0), k + rows, a + 0.5 * rows
    m1 = (k * m + rows * mean) / k1
    b1 = b + 0.5 * ((y - mean) ** 2).sum(0) + 0.5 * k * rows * (mean - m) ** 2 / k1
    evidence = gammaln(a1) - gammaln(a) + a * np.log(b) - a1 * np.log(b1) + 0.5 * np.log(k / k1)
    evidence = evidence - 0.5 * rows * LOG_TWO_PI

    def draw(count: int, rng: np.random.Generator) -> Draws:
        variance = b1 / rng.gamma(a1, size=(count, n))
        return {"variance": variance, "mu": m1 + np.sqrt(variance / k1) * rng.standard_normal((count, n))}

    name = f"{n} means and variances, {rows} {'equal ' * constant}rows"
    return Piece(name, run, draw, float(evidence.sum()), maker.tensor(y))


def normal_normal(maker: Maker) -> Piece:
    """Means of normal data of known noise, of very different units."""
    n, rows = maker.size(1, 40, 300), maker.integer(1, 20)
    units = maker.rounded(10.0 ** maker.rng.uniform(-3.0, 3.0, n))
    s = maker.rounded(units * np.exp(maker.rng.uniform(-2.0, 2.0, n)))
    mean = units * maker.rng.standard_normal(n)
    y = maker.rounded(mean + s * maker.rng.standard_normal((rows, n)))
    units_, s_, zero = maker.tensor(units), maker.tensor(s), maker.tensor(0.0)

    def run(prefix: str, y: Tensor | None) -> None:
        mu = pyro.sample(f"{prefix}mu", dist.Normal(zero, units_).to_event(1))
        with pyro.plate(f"{prefix}row", rows):
            pyro.sample(f"{prefix}y", dist.Normal(mu, s_).to_event(1), obs=y)

    precision = 1.0 / units**2 + rows / s**2
    m1 = (y.sum(0) / s**2) / precision
    fit = -0.5 * ((y**2).sum(0) / s**2 - m1**2 * precision) - np.log(units) - 0.5 * np.log(precision)
    return Piece(
        f"{n} means, {rows} rows",
        run,
        lambda count, rng: {"mu": m1 + rng.standard_normal((count, n)) / np.sqrt(precision)},
        float((fit - rows * np.log(s) - 0.5 * rows * LOG_TWO_PI).sum()),
        maker.tensor(y),
    )


def wishart(maker: Maker) -> Piece:
    """The precision matrix of normal data."""
    d, rows = maker.integer(2, 4 if not maker.large else 12), maker.integer(1, 100)
    df = float(maker.rounded(d + maker.uniform(1.0, 10.0)))
    scale = np.eye(d) * maker.rounded(1.0 / df)
    y = maker.rounded(maker.rng.standard_normal((rows, d)) @ maker.rng.standard_normal((d, d)))
    df_, scale_, zero = maker.tensor(df), maker.tensor(scale), maker.tensor(np.zeros(d))

    def run(prefix: str, y: Tensor | None) -> None:
        precision = pyro.sample(f"{prefix}precision", dist.Wishart(df_, covariance_matrix=scale_))
        with pyro.plate(f"{prefix}row", rows):
            pyro.sample(f"{prefix}y", dist.MultivariateNormal(zero, precision_matrix=precision), obs=y)

    inverse = np.linalg.inv(scale) + y.T @ y
    root = np.linalg.cholesky(np.linalg.inv(inverse))

    def draw(count: int, rng: np.random.Generator) -> Draws:
        a = np.tril(rng.standard_normal((count, d, d)), -1)
        a[:, np.arange(d), np.arange(d)] = np.sqrt(rng.chisquare(df + rows - np.arange(d), (count, d)))
        a = root @ a
        return {"precision": a @ a.transpose(0, 2, 1)}

    def log_constant(degrees: float, log_det_inverse: float) -> float:
        return float(0.5 * degrees * (d * np.log(2.0) - log_det_inverse) + multigammaln(0.5 * degrees, d))

    after, before = (np.linalg.slogdet(matrix)[1] for matrix in (inverse, np.linalg.inv(scale)))
    evidence = log_constant(df + rows, after) - log_constant(df, before) - 0.5 * rows * d * LOG_TWO_PI
    return Piece(f"{d} x {d} precision matrix, {rows} rows", run, draw, evidence, maker.tensor(y))


def lkj(maker: Maker) -> Piece:
    """A correlation matrix under its prior alone."""
    d, eta = maker.integer(2, 5 if not maker.large else 12), float(maker.rounded(maker.log_uniform(0.7, 5.0)))
    eta_ = maker.tensor(eta)

    def run(prefix: str, y: Tensor | None) -> None:
        pyro.sample(f"{prefix}root", dist.LKJCholesky(d, eta_))

    def draw(count: int, rng: np.random.Generator) -> Draws:
        root = np.zeros((count, d, d))
        root[:, 0, 0] = 1.0
        for row in range(1, d):
            share = rng.beta(0.5 * row, eta + 0.5 * (d - 1 - row), count)
            direction = rng.standard_normal((count, row))
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            root[:, row, :row] = np.sqrt(share)[:, None] * direction
            root[:, row, row] = np.sqrt(1.0 - share)
        return {"root": root}

    return Piece(f"{d} x {d} correlation matrix, eta {number_text(eta)}", run, draw, 0.0)


def pareto_uniform(maker: Maker) -> Piece:
    """Upper bounds of uniform data; where data lie above the prior's own bound, the density has a jump."""
    n, rows = maker.size(1, 10, 60), maker.integer(1, 30)
    alpha = maker.rounded(maker.log_uniform(0.5, 4.0))
    bound = maker.rounded(np.exp(maker.rng.uniform(-2.0, 2.0, n)))
    true = bound * maker.rng.uniform(1.2, 4.0, n)
    y = maker.rng.random((rows, n)) * true
    below = maker.flag()
    y = maker.rounded(np.minimum(y, 0.99 * bound) if below else y)
    alpha_, bound_, zero = maker.tensor(alpha), maker.tensor(bound), maker.tensor(0.0)

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}group", n, dim=-1):
            theta = pyro.sample(f"{prefix}theta", dist.Pareto(bound_, alpha_))
            with pyro.plate(f"{prefix}row", rows, dim=-2):
                pyro.sample(f"{prefix}y", dist.Uniform(zero, theta), obs=y)

    low, power = np.maximum(bound, y.max(0)), alpha + rows
    evidence = np.log(alpha) + alpha * np.log(bound) - np.log(power) - power * np.log(low)
    return Piece(
        f"{n} bounds of uniform data, {rows} rows, {'all below' if below else 'some above'} the prior's bound",
        run,
        lambda count, rng: {"theta": low * rng.random((count, n)) ** (-1.0 / power)},
        float(evidence.sum()),
        maker.tensor(y),
        heavy=("theta",) if power <= 4.0 else (),
        smooth=below,
    )


KINDS = (
    *(beta_binomial, gamma_poisson, dirichlet_multinomial, normal_inverse_gamma, wishart, gamma_exponential),
    *(normal_normal, lkj, pareto_uniform, beta_geometric, gamma_gamma),
)
VARIANTS = tuple(of_pieces(kind, KINDS) for kind in KINDS)
