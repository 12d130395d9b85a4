"""The models: regression, eight schools, counts in groups, two outcomes, a time series, and a change point."""

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
PAIRS, TIMES = 20, 30  # of two outcomes; of a series, and of data with a change
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
    return _regression(X.double(), y.double())


def _regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is known of log tau and b, given columns x and data with one precision."""
    precision = x.T @ x + torch.eye(x.shape[1]).to(x)
    mean = torch.linalg.solve(precision, x.T @ y)
    shape, rate = torch.tensor(A + len(x) / 2).to(x), B + 0.5 * (y @ y - mean @ precision @ mean)
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


def outcomes(y: Tensor) -> None:
    """Pairs with a correlation of .6, of unknown means and precision."""
    tau = pyro.sample("tau", dist.Gamma(A, B))
    with pyro.plate("column", 2):
        b = pyro.sample("b", dist.Normal(0.0, tau**-0.5))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.MultivariateNormal(b, scale_tril=tau**-0.5 * ROOT), obs=y)


def exact_outcomes(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is known of log tau and b: without their correlation, pairs are a regression."""
    back = torch.linalg.inv(ROOT.double())
    return _regression(back.repeat(len(y), 1), (y.double() @ back.T).flatten())


def series(y: Tensor) -> None:
    """An AR(1) series from 0, of unknown coefficient and precision."""
    phi = pyro.sample("phi", dist.Normal(0.0, 0.5))
    tau = pyro.sample("tau", dist.Gamma(A, B))
    steps = torch.eye(len(y)) - phi * torch.ones(len(y) - 1).diag(-1)
    root = torch.linalg.solve_triangular(steps, torch.eye(len(y)), upper=False)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(y)), scale_tril=tau**-0.5 * root), obs=y)


def change(y: Tensor) -> None:
    """Two means, and the time of the change between them."""
    time = pyro.sample("time", dist.Uniform(0.0, float(len(y))))
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    late = torch.arange(len(y)) + 0.5 > time
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(torch.where(late, m[1], m[0]), 1.0), obs=y)


ROOT = torch.linalg.cholesky(torch.tensor([[1.0, 0.6], [0.6, 1.0]]))
TASKS = {
    "conjugate regression": Task(conjugate, (X, torch.zeros(ROWS)), 1, exact),
    "eight schools": Task(schools, (EFFECTS, ERRORS), 0, partial(quadrature.schools, sigma=ERRORS)),
    "counts in groups": Task(counts, (X[:, 0], GROUP, torch.zeros(ROWS)), 2, quadrature.Counts(X[:, 0], GROUP)),
    "two outcomes": Task(outcomes, (torch.zeros(PAIRS, 2),), 0, exact_outcomes),
    "AR(1) series": Task(series, (torch.zeros(TIMES),), 0, partial(quadrature.series, a=A, b=B)),
    "change point": Task(change, (torch.zeros(TIMES),), 0, quadrature.change),
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
