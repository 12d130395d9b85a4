"""The models: a conjugate regression, eight schools, and counts in groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.amortized import quadrature
from benchmarks.calibration.models import EFFECTS, ERRORS, schools

ROWS, COLUMNS, GROUPS = 40, 3, 5
A, B = 3.0, 3.0  # tau ~ Gamma(A, B), b ~ N(0, 1 / tau)


class Task(NamedTuple):
    """A model, its arguments with some data ``y``, which of these is ``y``, and the exact answer."""

    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    place: int
    exact: Callable[[Tensor], tuple[Tensor, Tensor]]

    def with_data(self, y: Tensor) -> tuple[Tensor, ...]:
        """Return the arguments with other data."""
        return (*self.args[: self.place], y, *self.args[self.place + 1 :])


def _columns() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


X = _columns()
GROUP = torch.arange(ROWS) % GROUPS


def conjugate(x: Tensor, y: Tensor) -> None:
    """A regression with unknown noise, whose posterior is known."""
    tau = pyro.sample("tau", dist.Gamma(A, B))
    with pyro.plate("column", x.shape[1]):
        b = pyro.sample("b", dist.Normal(0.0, tau**-0.5))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(x @ b, tau**-0.5), obs=y)


def exact(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exact means and standard deviations of log tau and b."""
    x, y = X.double(), y.double()
    precision = x.T @ x + torch.eye(COLUMNS).to(x)
    mean = torch.linalg.solve(precision, x.T @ y)
    shape, rate = torch.tensor(A + ROWS / 2).to(x), B + 0.5 * (y @ y - mean @ precision @ mean)
    sds = (rate / (shape - 1.0) * torch.linalg.inv(precision).diagonal()).sqrt()
    first = torch.stack([torch.digamma(shape) - rate.log(), torch.polygamma(1, shape).sqrt()])
    return torch.cat([first[:1], mean]), torch.cat([first[1:], sds])


def counts(x: Tensor, group: Tensor, y: Tensor) -> None:
    """Poisson regression with an intercept for each group."""
    a = pyro.sample("a", dist.Normal(1.0, 0.7))
    slope = pyro.sample("slope", dist.Normal(0.0, 0.5))
    s = pyro.sample("s", dist.HalfNormal(0.7))
    with pyro.plate("group", GROUPS):
        b = pyro.sample("b", dist.Normal(0.0, s))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson((a + b[group] + slope * x).exp()), obs=y)


TASKS = {
    "conjugate regression": Task(conjugate, (X, torch.zeros(ROWS)), 1, exact),
    "eight schools": Task(schools, (EFFECTS, ERRORS), 0, partial(quadrature.schools, sigma=ERRORS)),
    "counts in groups": Task(counts, (X[:, 0], GROUP, torch.zeros(ROWS)), 2, quadrature.Counts(X[:, 0], GROUP)),
}
POSITIVE = ("tau", "s")


def values(samples: Mapping[str, Tensor], names: Sequence[str], axes: int = 1) -> Tensor:
    """Return draws (..., V) of some latents, logarithms of scales and precisions; ``axes`` lead to a draw."""
    found = []
    for name in sorted(names, key=lambda site: (site not in POSITIVE, site)):
        value = (
            samples[name].double().flatten(axes) if samples[name].dim() > axes else samples[name].double()[..., None]
        )
        found.append(value.log() if name in POSITIVE else value)
    return torch.cat(found, -1)
