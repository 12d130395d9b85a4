"""SLCP and two moons of the package ``sbibm``: posteriors with reference draws, as Pyro models with a likelihood.

Only the files of the package are read: observations, and 10,000 reference draws for each of ten of them. Its code is
not imported, so that it can be installed without its dependencies (``pip install --no-deps sbibm``).

Reference: Lueckmann et al. 2021, "Benchmarking simulation-based inference" (arXiv 2101.04653).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

MISSING = "install sbibm without its dependencies (pip install --no-deps sbibm): its files hold the reference draws"


def slcp(y: Tensor) -> None:
    """Four points of a normal whose scales are squares of two parameters: four modes, by the signs of these."""
    p = pyro.sample("parameters", dist.Uniform(y.new_full((5,), -3.0), 3.0).to_event(1))
    s1, s2, rho = p[2].square(), p[3].square(), torch.tanh(p[4])
    cross = rho * s1 * s2
    tiny = 1e-6
    rows = [torch.stack([s1.square() + tiny, cross]), torch.stack([cross, s2.square() + tiny])]
    with pyro.plate("point", len(y)):
        pyro.sample("y", dist.MultivariateNormal(p[:2], covariance_matrix=torch.stack(rows)), obs=y)


def two_moons(y: Tensor) -> None:
    """A point on a half ring, moved by two parameters, one of them by its size: two crescents with hard ends.

    The density of the point is that of its radius over the ring's length at that radius.
    """
    p = pyro.sample("parameters", dist.Uniform(y.new_full((2,), -1.0), 1.0).to_event(1))
    half = math.sqrt(0.5)
    u = y[0] + (half * (p[0] + p[1])).abs() - 0.25
    v = y[1] - half * (p[1] - p[0])
    r = (u.square() + v.square()).sqrt()
    log_density = dist.Normal(y.new_tensor(0.1), 0.01).log_prob(r) - r.log() - math.log(math.pi)
    pyro.factor("point", torch.where(u > 0.0, log_density, -torch.inf))


@dataclass(frozen=True)
class Task:
    """A model, the shape of its data, and which mode each draw (S, D) is in, (S, M)."""

    model: Callable[[Tensor], None]
    shape: tuple[int, ...]
    modes: Callable[[Tensor], Tensor]


def _signs(draws: Tensor) -> Tensor:
    number = 2 * (draws[:, 2] < 0.0).long() + (draws[:, 3] < 0.0).long()
    return torch.nn.functional.one_hot(number, 4) > 0


def _sides(draws: Tensor) -> Tensor:
    below = draws.sum(1) < 0.0
    return torch.stack([below, ~below], 1)


TASKS = {"slcp": Task(slcp, (4, 2), _signs), "two_moons": Task(two_moons, (2,), _sides)}


def folder() -> Path:
    """Return where the package's tasks lie.

    Raises:
        LookupError: if it is not installed.
    """
    found = importlib.util.find_spec("sbibm")
    if found is None or found.origin is None:
        raise LookupError(MISSING)
    return Path(found.origin).parent / "tasks"


def observation(name: str, number: int) -> Tensor:
    """Return the data of one observation, in double precision."""
    values = np.loadtxt(_file(name, number, "observation.csv"), delimiter=",", skiprows=1)
    return torch.as_tensor(values, dtype=torch.float64).reshape(TASKS[name].shape)


def reference(name: str, number: int) -> Tensor:
    """Return the reference draws (10000, D) of one observation."""
    values = np.loadtxt(_file(name, number, "reference_posterior_samples.csv.bz2"), delimiter=",", skiprows=1)
    return torch.as_tensor(values, dtype=torch.float64)


def _file(name: str, number: int, file: str) -> Path:
    return folder() / name / "files" / f"num_observation_{number}" / file


def c2st(x: Tensor, y: Tensor, *, seed: int = 1) -> float:
    """Return the accuracy of a classifier that tells two samples apart, .5 if it cannot: the metric of ``sbibm``.

    Two hidden layers of 10 D units, five folds, values standardized by x.
    """
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    mean, sd = x.mean(0), x.std(0)
    values = torch.cat([(x - mean) / sd, (y - mean) / sd]).numpy()
    labels = np.repeat([0.0, 1.0], [len(x), len(y)])
    width = 10 * x.shape[1]
    network = MLPClassifier((width, width), activation="relu", solver="adam", max_iter=10_000, random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    return float(np.mean(cross_val_score(network, values, labels, cv=folds, scoring="accuracy")))
