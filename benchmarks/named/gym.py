"""Posteriors of the package inference-gym, as Pyro models with its data and its true means and standard deviations.

The package needs TensorFlow; its data and ground truth are modules of numpy literals, which are read without it
(``pip install --no-deps inference-gym``). Apache-2.0, The TensorFlow Probability Authors.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

Moments = dict[str, dict[str, Any]]
RETURNS = 100  # of the small set of stochastic volatility


def literals(part: str) -> Any:
    """Return a module of literals of the package, without its own imports.

    Raises:
        LookupError: if the package is not installed.
    """
    found = importlib.util.find_spec("inference_gym")
    if found is None or not found.submodule_search_locations:
        raise LookupError(f"{part}: install inference-gym (--no-deps), which holds these data")
    path = Path(next(iter(found.submodule_search_locations)), *part.split(".")).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(f"literals_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def moments(name: str, sites: dict[str, str]) -> Moments:
    """Return true means and standard deviations of sites, by what the package calls them."""
    truth = literals(f"targets.ground_truth.{name}")
    return {
        site: {
            "mean": getattr(truth, f"IDENTITY_{theirs.upper()}_MEAN"),
            "sd": getattr(truth, f"IDENTITY_{theirs.upper()}_STANDARD_DEVIATION"),
        }
        for site, theirs in sites.items()
    }


# stochastic volatility ------------------------------------------------------------------------------------------------


def volatility(returns: Tensor) -> None:
    """Log variances of returns, an autoregressive series of order one with an unknown mean, persistence and scale."""
    beta = pyro.sample("beta", dist.Beta(returns.new_tensor(20.0), 1.5))
    persistence = pyro.deterministic("persistence", 2.0 * beta - 1.0)
    mean = pyro.sample("mean", dist.Cauchy(returns.new_tensor(0.0), 5.0))
    scale = pyro.sample("scale", dist.HalfCauchy(returns.new_tensor(2.0)))
    states = [pyro.sample("h_0", dist.Normal(mean, scale / (1.0 - persistence.square()).sqrt()))]
    for t in range(1, len(returns)):
        states.append(pyro.sample(f"h_{t}", dist.Normal(mean + persistence * (states[-1] - mean), scale)))
    h = pyro.deterministic("h", torch.stack(states, -1), event_dim=1)
    with pyro.plate("day", len(returns)):
        pyro.sample("y", dist.Normal(0.0, (0.5 * h).exp()), obs=returns)


def volatility_data() -> tuple[Tensor]:
    """The last hundred daily returns of the S&P 500 up to June 2020, less their mean."""
    prices = np.diff(literals("internal.datasets.sp500_closing_prices").CLOSING_PRICES)[-RETURNS:]
    return (torch.as_tensor(prices - prices.mean()),)


# By benchmarks/named/quadrature.py, which has the package's persistence and scale. The package's own sd of the mean is
# 1.048, and 60,000 draws of NumPyro's NUTS had 1.120: tails are heavy (kurtosis 27), since the persistence may be next
# to one, and chains did not get out far enough.
MEAN_LOG_VARIANCE = {"mean": 7.856, "sd": 1.2644}


def volatility_moments() -> Moments:
    """Of all latents."""
    sites = {"persistence": "persistence_of_volatility", "mean": "mean_log_volatility",
             "scale": "white_noise_shock_scale", "h": "log_volatility"}  # fmt: skip
    return {**moments("stochastic_volatility_sp500_small", sites), "mean": MEAN_LOG_VARIANCE}


# item response --------------------------------------------------------------------------------------------------------


def items(student: Tensor, question: Tensor, y: Tensor) -> None:
    """One-parameter logistic item response: 400 students, 100 questions, 30,012 answers."""
    mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.75), 1.0))
    with pyro.plate("student", int(student.max()) + 1):
        ability = pyro.sample("ability", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("question", int(question.max()) + 1):
        difficulty = pyro.sample("difficulty", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("answer", len(y)):
        logits = mean + ability[..., student] - difficulty[..., question]
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def items_data() -> tuple[Tensor, Tensor, Tensor]:
    """Students, questions, answers."""
    data = literals("internal.datasets.synthetic_item_response_theory")
    student, question = (torch.as_tensor(np.asarray(part)).long() for part in (data.STUDENT_IDS, data.QUESTION_IDS))
    return student, question, torch.as_tensor(np.asarray(data.CORRECT)).double()


def items_moments() -> Moments:
    """Of all latents."""
    sites = {"mean": "mean_student_ability", "ability": "centered_student_ability", "difficulty": "question_difficulty"}
    return moments("synthetic_item_response_theory", sites)


# Brownian motion ------------------------------------------------------------------------------------------------------


def brownian(y: Tensor) -> None:
    """A random walk of 30 steps with unknown scales, seen with noise but for the ten steps in the middle."""
    innovation = pyro.sample("innovation", dist.LogNormal(y.new_tensor(0.0), 2.0))
    noise = pyro.sample("noise", dist.LogNormal(y.new_tensor(0.0), 2.0))
    at, places = y.new_tensor(0.0), []
    for t, seen in enumerate(y.isnan().logical_not().tolist()):
        at = pyro.sample(f"x_{t}", dist.Normal(at, innovation))
        places.append(at)
        if seen:
            pyro.sample(f"y_{t}", dist.Normal(at, noise), obs=y[t])
    pyro.deterministic("x", torch.stack(places, -1), event_dim=1)


def brownian_data() -> tuple[Tensor]:
    """Places, NaN where none was seen."""
    return (torch.as_tensor(literals("internal.datasets.brownian_motion_missing_middle_observations").OBSERVED_LOC),)


def brownian_moments() -> Moments:
    """Of all latents, exactly: given both scales all is normal, and these lie on a grid of their logarithms.

    Those in the package have been found to be off: .1199 and .1011 for the scales, where the grid says .1155 and .1127.
    """
    y = brownian_data()[0].numpy()
    seen = ~np.isnan(y)
    steps = np.arange(1.0, len(y) + 1.0)
    prior = np.minimum.outer(steps, steps)  # of a walk with innovations of variance one
    values, vectors = np.linalg.eigh(prior[np.ix_(seen, seen)])
    turned, towards = vectors.T @ y[seen], prior[:, seen] @ vectors
    logs = np.meshgrid(np.linspace(np.log(0.01), np.log(2.0), 250), np.linspace(np.log(1e-5), np.log(2.0), 700))
    innovation, noise = (np.exp(part.ravel()) for part in logs)
    total = innovation[:, None] ** 2 * values + noise[:, None] ** 2
    log_p = -0.5 * (turned**2 / total + np.log(total)).sum(1) - sum((part.ravel() / 2.0) ** 2 / 2.0 for part in logs)
    weights = np.exp(log_p - log_p.max())
    weights /= weights.sum()
    gain = innovation[:, None] ** 2 / total
    mean = (gain * turned) @ towards.T
    variance = innovation[:, None] ** 2 * (np.diag(prior) - gain @ (towards**2).T)
    found: Moments = {}
    for name, first, second in (
        ("innovation", innovation, innovation**2), ("noise", noise, noise**2), ("x", mean, variance + mean**2),
    ):  # fmt: skip
        centre = weights @ first
        found[name] = {"mean": centre, "sd": np.sqrt(weights @ second - centre**2)}
    return found
