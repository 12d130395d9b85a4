"""Impossible data, which have to be refused or called unreliable; missing, masked and constant data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.zoo.case import Case, Draws, Maker
from benchmarks.zoo.conjugate import beta_binomial, gamma_poisson, normal_inverse_gamma
from benchmarks.zoo.pieces import assemble, of_pieces

LOG_TWO_PI = float(np.log(2.0 * np.pi))
Likelihood = Callable[[Tensor], dist.TorchDistribution]

# A likelihood of a positive rate, a datum that it allows and one that it does not.
IMPOSSIBLE: dict[str, tuple[Likelihood, float, float]] = {
    "Exponential": (dist.Exponential, 0.7, -0.4),
    "Poisson, a fraction": (dist.Poisson, 2.0, 2.5),
    "Poisson, negative": (dist.Poisson, 2.0, -1.0),
    "Bernoulli, 2": (lambda r: dist.Bernoulli(r / (1.0 + r)), 1.0, 2.0),
    "Bernoulli, a half": (lambda r: dist.Bernoulli(logits=r.log()), 1.0, 0.5),
    "Binomial, too many": (lambda r: dist.Binomial(5, r / (1.0 + r)), 3.0, 7.0),
    "Beta": (lambda r: dist.Beta(r, r), 0.3, 1.2),
    "Gamma": (lambda r: dist.Gamma(2.0 * torch.ones_like(r), r), 0.3, -1.0),
    "LogNormal": (lambda r: dist.LogNormal(r.log(), torch.ones_like(r)), 0.3, -2.0),
    "HalfNormal": (dist.HalfNormal, 0.3, -1.0),
    "HalfCauchy": (dist.HalfCauchy, 0.3, -1.0),
    "Categorical": (lambda r: dist.Categorical(torch.stack([r, r + 1.0, r + 2.0], -1)), 1.0, 3.0),
    "Geometric": (lambda r: dist.Geometric(r / (1.0 + r)), 1.0, -2.0),
    "Pareto": (lambda r: dist.Pareto(torch.ones_like(r), r), 1.5, 0.5),
    "Weibull": (lambda r: dist.Weibull(r, 2.0 * torch.ones_like(r)), 1.5, -0.5),
    "InverseGamma": (lambda r: dist.InverseGamma(2.0 * torch.ones_like(r), r), 1.5, -0.5),
    "NegativeBinomial": (lambda r: dist.NegativeBinomial(3.0 * torch.ones_like(r), r / (1.0 + r)), 1.0, 1.5),
    "Uniform below a bound below 1": (lambda r: dist.Uniform(torch.zeros_like(r), r / (1.0 + r)), 0.0, 1.5),
    "Uniform of fixed bounds": (lambda r: dist.Uniform(torch.zeros_like(r), torch.ones_like(r)), 0.5, 1.5),
    "LogNormal, NaN": (lambda r: dist.LogNormal(r.log(), torch.ones_like(r)), 0.3, float("nan")),
    "Normal, infinite": (lambda r: dist.Normal(r, torch.ones_like(r)), 0.3, float("inf")),
    "Poisson, NaN": (dist.Poisson, 2.0, float("nan")),
}


def impossible(maker: Maker) -> Case:
    """One or more data that no value of the latents allows."""
    kind = maker.choice(list(IMPOSSIBLE))
    likelihood, good, bad = IMPOSSIBLE[kind]
    groups, rows = maker.size(1, 10, 100), maker.integer(1, 30)
    y = np.full((rows, groups), good)
    y.flat[maker.rng.choice(y.size, 1 if maker.flag(0.7) else maker.integer(1, y.size), replace=False)] = bad
    scalar, single = groups == 1 and maker.flag(), rows == 1 and maker.flag()
    one = maker.tensor(1.0)
    prior = maker.choice([partial(dist.Gamma, 2.0 * one, one), partial(dist.LogNormal, 0.0 * one, one)])

    def model(y: Tensor) -> None:
        if scalar:
            rate = pyro.sample("rate", prior())
            with pyro.plate("row", rows):
                pyro.sample("y", likelihood(rate.expand(rows)), obs=y[:, 0])
            return
        with pyro.plate("group", groups, dim=-1):
            rate = pyro.sample("rate", prior())
            if single:
                pyro.sample("y", likelihood(rate), obs=y[0])
            else:
                with pyro.plate("row", rows, dim=-2):
                    pyro.sample("y", likelihood(rate.expand(rows, groups)), obs=y)

    share = int((y != good).sum())
    return Case(f"{kind}: {share} of {y.size} data", model, None, (maker.tensor(y),), impossible=True)


def masked(maker: Maker) -> Case:
    """Normal data of which some are missing, written in one of four ways; sometimes all of them are."""

    n, rows = maker.size(1, 20, 120), maker.integer(1, 20)
    way = maker.choice(["obs_mask", "mask handler", "masked distribution", "zero weights"])
    if way == "obs_mask":  # the entries that are missing are latents themselves
        n, rows = maker.integer(1, 8), maker.integer(1, 8)
    width, s = (float(maker.rounded(maker.log_uniform(0.3, 3.0))) for _ in range(2))
    y = maker.rounded(width * maker.rng.standard_normal(n) + s * maker.rng.standard_normal((rows, n)))
    kept = maker.rng.random((rows, n)) < (0.0 if maker.flag(0.1) and way != "obs_mask" else maker.uniform(0.3, 0.95))
    if way == "obs_mask" and kept.all():
        kept[0, 0] = False
    filler = np.nan if way != "zero weights" and maker.flag() else 99.0
    data, mask = maker.tensor(np.where(kept, y, filler)), cast(torch.BoolTensor, torch.as_tensor(kept))
    width_, s_, zero = maker.tensor(width), maker.tensor(s), maker.tensor(0.0)

    def model(y: Tensor) -> None:
        with pyro.plate("group", n, dim=-1):
            x = pyro.sample("x", dist.Normal(zero, width_))
            likelihood = dist.Normal(x, s_)
            if way == "zero weights":
                pyro.factor("y", torch.where(mask, likelihood.log_prob(y), zero).sum(0))
                return
            with pyro.plate("row", rows, dim=-2):
                if way == "obs_mask":
                    pyro.sample("y", likelihood, obs=y, obs_mask=mask)
                elif way == "mask handler":
                    with pyro.poutine.mask(mask=mask):
                        pyro.sample("y", likelihood, obs=y)
                else:
                    pyro.sample("y", likelihood.expand([rows, n]).mask(mask), obs=y)

    counts, sums, squares = kept.sum(0), (kept * y).sum(0), (kept * y**2).sum(0)
    precision = 1.0 / width**2 + counts / s**2
    mean = sums / s**2 / precision
    fit = -0.5 * (squares / s**2 - mean**2 * precision) - np.log(width) - 0.5 * np.log(precision)
    evidence = (fit - counts * np.log(s) - 0.5 * counts * LOG_TWO_PI).sum()

    def draw(count: int, rng: np.random.Generator) -> Draws:
        x = mean + rng.standard_normal((count, n)) / np.sqrt(precision)
        if way != "obs_mask":
            return {"x": x}
        new = x[:, None, :] + s * rng.standard_normal((count, rows, n))
        return {"x": x, "y": np.where(kept, y, new)}

    name = f"{n} means, {int(kept.sum())} of {kept.size} data left by {way}{', NaN elsewhere' * bool(np.isnan(filler))}"
    return Case(name, model, draw, (data,), log_evidence=float(evidence))


def constant_column(maker: Maker) -> Case:
    """Constant data, and a constant predictor beside an intercept: only their sum is known."""
    rows, width = maker.integer(2, 60), float(maker.rounded(maker.log_uniform(0.5, 20.0)))
    s, level = float(maker.rounded(maker.log_uniform(0.1, 2.0))), float(maker.rounded(maker.uniform(-5.0, 5.0)))
    column = float(maker.rounded(maker.log_uniform(0.1, 100.0)))
    width_, s_, zero = maker.tensor(width), maker.tensor(s), maker.tensor(0.0)
    x = np.array([1.0, column])
    precision = np.eye(2) / width**2 + rows * np.outer(x, x) / s**2
    covariance = np.linalg.inv(precision)
    mean = covariance @ (rows * level * x / s**2)
    fit = -0.5 * (rows * level**2 / s**2 - mean @ precision @ mean) - 2.0 * np.log(width)
    evidence = fit - 0.5 * np.linalg.slogdet(precision)[1] - rows * (np.log(s) + 0.5 * LOG_TWO_PI)

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(zero, width_))
        b = pyro.sample("b", dist.Normal(zero, width_))
        with pyro.plate("row", rows):
            pyro.sample("y", dist.Normal(a + b * x, s_), obs=y)

    def draw(count: int, rng: np.random.Generator) -> Draws:
        found = rng.multivariate_normal(mean, covariance, count, method="eigh")
        return {"a": found[:, 0], "b": found[:, 1]}

    args = (maker.tensor(np.full(rows, column)), maker.tensor(np.full(rows, level)))
    return Case(f"{rows} equal data, constant predictor", model, draw, args, log_evidence=float(evidence))


def constant_rows(maker: Maker) -> Case:
    """Means and variances of data that are all equal."""
    return assemble([normal_inverse_gamma(maker, constant=True)])


def extreme_counts(maker: Maker) -> Case:
    """Counts of which many are none or all."""
    return of_pieces(maker.choice([beta_binomial, gamma_poisson]), [normal_inverse_gamma])(maker)


VARIANTS = (impossible, masked, impossible, constant_rows, impossible, masked, impossible, constant_column)
