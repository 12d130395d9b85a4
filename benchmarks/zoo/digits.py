"""Models in single precision whose log density has more digits: large counts, tiny scales, constants, many rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import betaln, gammaln
from torch import Tensor

from benchmarks.zoo.case import Array, Case, Draws, Maker, number_text
from benchmarks.zoo.pieces import Piece, assemble

LOG_TWO_PI = float(np.log(2.0 * np.pi))


def in_single(kind: Callable[[Maker], Piece]) -> Callable[[Maker], Case]:
    """Return the variant of one piece whose numbers are in single precision."""

    def variant(maker: Maker) -> Case:
        maker.dtype = torch.float32
        return assemble([kind(maker)])

    variant.__module__, variant.__name__, variant.__doc__ = kind.__module__, kind.__name__, kind.__doc__
    return variant


def counts(maker: Maker) -> Piece:
    """Rates of counts of up to a thousand millions."""
    n, rows, size = maker.size(1, 10, 60), maker.integer(1, 12), maker.log_uniform(1e5, 1e9)
    a = maker.rounded(np.exp(maker.rng.uniform(-0.5, 2.0, n)))
    b = maker.rounded(a / size)
    y = maker.rounded(maker.rng.poisson(size * np.exp(maker.rng.normal(0.0, 0.3, n)), (rows, n)).astype(float))
    a_, b_ = maker.tensor(a), maker.tensor(b)

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}group", n, dim=-1):
            rate = pyro.sample(f"{prefix}rate", dist.Gamma(a_, b_))
            with pyro.plate(f"{prefix}row", rows, dim=-2):
                pyro.sample(f"{prefix}y", dist.Poisson(rate), obs=y)

    a1, b1 = a + y.sum(0), b + rows
    each = a * np.log(b) - gammaln(a) + gammaln(a1) - a1 * np.log(b1) - gammaln(y + 1.0).sum(0)
    return Piece(
        f"{n} rates from {rows} counts of about {number_text(size)} each",
        run,
        lambda count, rng: {"rate": rng.gamma(a1, 1.0 / b1, (count, n))},
        float(each.sum()),
        maker.tensor(y),
    )


def trials(maker: Maker) -> Piece:
    """Proportions of up to a thousand million trials."""
    n, most = maker.size(1, 10, 60), maker.log_uniform(1e5, 1e9)
    a, b = (maker.rounded(np.exp(maker.rng.uniform(-0.5, 2.0, n))) for _ in range(2))
    total = maker.rounded(np.floor(most * maker.rng.uniform(0.1, 1.0, n)))
    hits = np.minimum(maker.rounded(maker.rng.binomial(total.astype(int), maker.rng.uniform(0.02, 0.98, n))), total)
    a_, b_, total_ = (maker.tensor(part) for part in (a, b, total))

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}group", n):
            p = pyro.sample(f"{prefix}p", dist.Beta(a_, b_))
            pyro.sample(f"{prefix}y", dist.Binomial(total_, p), obs=y)

    a1, b1 = a + hits, b + total - hits
    choose = -np.log(total + 1.0) - betaln(hits + 1.0, total - hits + 1.0)
    return Piece(
        f"{n} proportions of up to {number_text(most)} trials",
        run,
        lambda count, rng: {"p": rng.beta(a1, b1, (count, n))},
        float((choose + betaln(a1, b1) - betaln(a, b)).sum()),
        maker.tensor(hits),
    )


def lines(maker: Maker) -> Piece:
    """A regression with a residual scale that is thousands of times too small."""
    d, rows = maker.size(1, 6, 30), maker.integer(30, 200)
    scale, scatter = maker.rounded(maker.log_uniform(1e-5, 1e-1)), maker.log_uniform(0.3, 10.0)
    x = maker.rounded(maker.rng.standard_normal((rows, d)))
    y = maker.rounded(x @ maker.rng.normal(0.0, 2.0, d) + scatter * maker.rng.standard_normal(rows))
    x_, scale_ = maker.tensor(x), float(scale)

    def run(prefix: str, y: Tensor | None) -> None:
        b = pyro.sample(f"{prefix}b", dist.Normal(torch.zeros(d), 10.0).to_event(1))
        with pyro.plate(f"{prefix}row", rows):
            pyro.sample(f"{prefix}y", dist.Normal(x_ @ b, scale_), obs=y)

    # y = X b + e: the posterior's precision, its mean, and the residuals of this
    weighted = x / scale_
    precision = weighted.T @ weighted + np.eye(d) / 100.0
    root = np.linalg.cholesky(precision)
    mean = np.linalg.solve(precision, weighted.T @ (y / scale_))
    square = np.square((y - x @ mean) / scale_).sum() + np.square(mean / 10.0).sum()
    log_scales = rows * np.log(scale_) + d * np.log(10.0) + np.log(np.diag(root)).sum()

    def draw(count: int, rng: np.random.Generator) -> Draws:
        return {"b": mean + np.linalg.solve(root.T, rng.standard_normal((d, count))).T}

    text = f"{d} slopes, {rows} rows that scatter by {number_text(scatter)} and are said to by {number_text(scale_)}"
    return Piece(text, run, draw, float(-0.5 * square - log_scales - 0.5 * rows * LOG_TWO_PI), maker.tensor(y))


def _means(
    maker: Maker, text: str, rows: int, *, loc: float = 0.0, prior: float = 1.0, scale: float = 1.0,
    likelihood: Callable[[str, Tensor], Tensor] = lambda prefix, m: m, offset: float | Array = 0.0,
    factor: Callable[[str, Tensor], object] = lambda prefix, m: None, constant: float = 0.0, n: int | None = None,
) -> Piece:  # fmt: skip
    """Normal means of groups. ``likelihood`` gives the location of a row, ``m + offset``; ``factor`` adds the constant.

    Both may be written so that single precision loses their digits.
    """
    n = maker.size(1, 6, 40) if n is None else n
    loc, prior, scale = (float(maker.rounded(part)) for part in (loc, prior, scale))
    truth = loc + prior * maker.rng.standard_normal(n)
    y = maker.rounded(truth + offset + scale * maker.rng.standard_normal((rows, n)))

    def run(prefix: str, y: Tensor | None) -> None:
        with pyro.plate(f"{prefix}group", n, dim=-1):
            m = pyro.sample(f"{prefix}m", dist.Normal(loc, prior))
            with pyro.plate(f"{prefix}row", rows, dim=-2):
                pyro.sample(f"{prefix}y", dist.Normal(likelihood(prefix, m), scale), obs=y)
        factor(prefix, m)

    away = y - offset - loc  # from the prior's mean
    precision = rows / scale**2 + 1.0 / prior**2
    center = away.sum(0) / scale**2 / precision
    square = (np.square((away - center) / scale)).sum() + np.square(center / prior).sum()
    logs = rows * n * (np.log(scale) + 0.5 * LOG_TWO_PI) + n * (np.log(prior) + 0.5 * np.log(precision))
    return Piece(
        f"{n} means of {rows} rows, {text}",
        run,
        lambda count, rng: {"m": loc + center + precision**-0.5 * rng.standard_normal((count, n))},
        float(constant - 0.5 * square - logs),
        maker.tensor(y),
    )


def constants(maker: Maker) -> Piece:
    """A constant of a hundred thousand to ten thousand million nats beside a normal model."""
    size = float(maker.rounded(maker.choice([-1.0, 1.0]) * maker.log_uniform(1e5, 1e10)))
    value = maker.tensor(size)

    def factor(prefix: str, m: Tensor) -> None:
        pyro.factor(f"{prefix}constant", value)

    text = f"and {number_text(size)} nats"
    return _means(maker, text, maker.integer(1, 20), scale=maker.log_uniform(0.3, 3.0), factor=factor, constant=size)


def cancelling(maker: Maker) -> Piece:
    """Two factors of the latents, large and next to equal."""
    far = float(maker.rounded(maker.log_uniform(1e3, 1e6)))

    def factor(prefix: str, m: Tensor) -> None:
        pyro.factor(f"{prefix}one", ((m + far) ** 2).sum())
        pyro.factor(f"{prefix}other", -(m**2 + 2.0 * far * m + far**2).sum())

    return _means(maker, f"and squares of {number_text(far)} that cancel", maker.integer(1, 20), factor=factor)


def many_rows(maker: Maker) -> Piece:
    """Ten thousands of rows."""
    rows = round(maker.log_uniform(2e4, 1e5))
    return _means(maker, "many", rows, scale=maker.log_uniform(0.01, 30.0), n=1)


def far_off(maker: Maker) -> Piece:
    """Means far from zero in units of their sds."""
    loc = maker.log_uniform(1e2, 1e6)
    scale = loc * maker.log_uniform(1e-7, 1e-4)
    return _means(maker, f"near {number_text(loc)}", maker.integer(2, 20), loc=loc, prior=30.0 * scale, scale=scale)


def parameters(maker: Maker) -> Piece:
    """Parameters of the model's own, one of them the weight of a module, and a constant or a tiny scale."""
    size = float(maker.rounded(maker.log_uniform(1e5, 1e9)))
    shift, weight = (float(maker.rounded(maker.rng.normal())) for _ in range(2))
    module = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(weight)

    def likelihood(prefix: str, m: Tensor) -> Tensor:
        pyro.module(f"{prefix}module", module)
        return m + pyro.param(f"{prefix}shift", torch.tensor(shift)) + module(torch.ones(1))

    def factor(prefix: str, m: Tensor) -> None:
        pyro.factor(f"{prefix}constant", pyro.param(f"{prefix}constant_size", torch.tensor(size)))

    given = {"likelihood": likelihood, "offset": shift + weight, "factor": factor, "constant": size}
    return _means(maker, f"two parameters, and {number_text(size)} nats", maker.integer(1, 20), **given)


VARIANTS = tuple(
    in_single(kind) for kind in (counts, trials, lines, constants, cancelling, many_rows, far_off, parameters)
)
