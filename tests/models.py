"""Pyro models in float64, each with its log joint density and its log Jacobian written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

from tests.registry import normal

NAN = float("nan")


def real(*numbers: Any) -> Tensor:
    """A float64 tensor: of one number a scalar, of several a vector."""
    return torch.tensor(numbers[0] if len(numbers) == 1 else numbers, dtype=torch.float64)


# densities and Jacobians by hand -------------------------------------------------------------------------------------


def gauss(x: Any, mean: Any, sd: Any) -> Tensor:
    """Log density of a normal distribution, summed over all entries."""
    x, mean, sd = torch.broadcast_tensors(*(torch.as_tensor(value, dtype=torch.float64) for value in (x, mean, sd)))
    return (-0.5 * ((x - mean) / sd) ** 2 - sd.log() - 0.5 * math.log(2 * math.pi)).sum()


def half_gauss(x: Tensor, sd: float) -> Tensor:
    """Log density of a half-normal distribution, summed."""
    return gauss(x, 0.0, sd) + x.numel() * math.log(2.0)


def flat_dirichlet(p: Tensor) -> Tensor:
    """Log density of Dirichlet(1, ..., 1), summed over rows: log (K - 1)! a row."""
    return real(math.lgamma(p.shape[-1]) * p[..., 0].numel())


def interval(x: Tensor, low: Any, high: Any) -> Tensor:
    """Log Jacobian of low + (high - low) sigmoid(z)."""
    return ((x - low).log() + (high - x).log() - torch.as_tensor(high - low, dtype=torch.float64).log()).sum()


# models --------------------------------------------------------------------------------------------------------------


def nested(y):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    with pyro.plate("rows", 3, dim=-2):
        tau = pyro.sample("tau", dist.HalfNormal(real(2.0)))
        with pyro.plate("columns", 4, dim=-1):
            x = pyro.sample("x", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def nested_joint(v, y):
    return (
        gauss(v["mu"], 0.0, 5.0) + half_gauss(v["tau"], 2.0) + gauss(v["x"], v["mu"], v["tau"]) + gauss(y, v["x"], 0.5)
    )


def factors(y):
    a = pyro.sample("a", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    pyro.factor("quartic", -a.pow(4).sum())
    rate = pyro.deterministic("rate", a.exp())
    with pyro.plate("n", 3):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def factors_joint(v, y):
    poisson = (y * v["a"] - v["a"].exp() - torch.lgamma(y + 1)).sum()
    return gauss(v["a"], 0.0, 1.0) - v["a"].pow(4).sum() + poisson


KEPT = torch.tensor([True, False, True, True, False])


def masked(y):
    with pyro.plate("n", 5), poutine.mask(mask=KEPT):
        x = pyro.sample("x", dist.Uniform(real(0.0), 5.0))
        pyro.sample("y", dist.Normal(x, 2.0), obs=y)


def masked_joint(v, y):
    return -3 * math.log(5.0) + gauss(y[KEPT], v["x"][KEPT], 2.0)


def scaled(y):
    with poutine.scale(scale=0.5):
        s = pyro.sample("s", dist.Gamma(real(2.0), 1.0))
    with poutine.scale(scale=2.5), pyro.plate("n", 5):
        pyro.sample("y", dist.Normal(0.0, s), obs=y)


def scaled_joint(v, y):
    return 0.5 * (v["s"].log() - v["s"]) + 2.5 * gauss(y, 0.0, v["s"])


def missing(y, there=None):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    with pyro.plate("n", 4):
        pyro.sample("y", dist.LogNormal(mu, 0.5), obs=y, obs_mask=~torch.isnan(y) if there is None else there)


def missing_joint(v, y, there=None):
    every = torch.where(~torch.isnan(y) if there is None else there, y, v["y_unobserved"])
    return gauss(v["mu"], 0.0, 5.0) + gauss(every.log(), v["mu"], 0.5) - every.log().sum()


def improper(y):
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("groups", 2):
        s = pyro.sample("s", dist.ImproperUniform(constraints.positive, (2,), ()))
        pyro.sample("y", dist.Normal(mu, s), obs=y)


def dependent(y):
    alpha = pyro.sample("alpha", dist.Uniform(real(0.0), 1.0))
    beta = pyro.sample("beta", dist.Uniform(real(0.0), 1.0 - alpha))
    pyro.sample("y", dist.Normal(alpha, beta), obs=y)


def dependent_joint(v, y):
    return -(1.0 - v["alpha"]).log() + gauss(y, v["alpha"], v["beta"])


def decentered(y):
    def model(y):
        tau = pyro.sample("tau", dist.HalfNormal(real(1.0)))
        with pyro.plate("n", 3):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, 0.5), obs=y)

    return poutine.reparam(model, {"theta": LocScaleReparam(0.0)})(y)


def decentered_joint(v, y):
    """With the deterministic site theta, which the reparametrization leaves."""
    theta = v["tau"] * v["theta_decentered"]
    torch.testing.assert_close(v["theta"], theta)
    return half_gauss(v["tau"], 1.0) + gauss(v["theta_decentered"], 0.0, 1.0) + gauss(y, theta, 0.5)


@config_enumerate
def mixture(y):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(2, dtype=torch.float64)))
    loc = pyro.sample("loc", dist.Normal(real(0.0), 3.0).expand([2]).to_event(1))
    with pyro.plate("n", len(y)):
        k = pyro.sample("k", dist.Categorical(p))
        pyro.sample("y", dist.Normal(Vindex(loc)[..., k], 0.7), obs=y)


def mixture_joint(v, y):
    total = flat_dirichlet(v["p"]) + gauss(v["loc"], 0.0, 3.0)
    for value in y:
        total = total + torch.stack([v["p"][k].log() + gauss(value, v["loc"][k], 0.7) for k in range(2)]).logsumexp(0)
    return total


@config_enumerate
def hidden_markov(y):
    """Two sequences (T, 2) that share a transition matrix."""
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(3, 3, dtype=torch.float64)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(real(0.0), 3.0).expand([3]).to_event(1))
    with pyro.plate("sequences", 2):
        x: Any = 0
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x{t}", dist.Categorical(Vindex(rows)[..., x, :]))
            pyro.sample(f"y{t}", dist.Normal(Vindex(loc)[..., x], 0.7), obs=y[t])


def hidden_markov_joint(v, y):
    """The forward algorithm."""
    total = flat_dirichlet(v["rows"]) + gauss(v["loc"], 0.0, 3.0)
    for sequence in y.T:
        emission = torch.stack([torch.stack([gauss(value, loc, 0.7) for loc in v["loc"]]) for value in sequence])
        forward = v["rows"][0].log() + emission[0]
        for row in emission[1:]:
            forward = (forward[:, None] + v["rows"].log()).logsumexp(0) + row
        total = total + forward.logsumexp(0)
    return total


class Regression(pyro.nn.PyroModule):
    """Sampled weights in a nested module, and parameters of its own: a bias, an offset, a constrained noise scale."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = pyro.nn.PyroModule[torch.nn.Linear](2, 1).double()
        self.linear.weight = pyro.nn.PyroSample(dist.Normal(real(0.0), 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = torch.nn.Parameter(real([0.3]))
        self.offset = torch.nn.Parameter(real(0.5))
        self.noise = pyro.nn.PyroParam(real(2.0), constraint=constraints.positive)

    def forward(self, x, y):
        mean = self.linear(x).squeeze(-1) + self.offset
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


def regression_joint(v, x, y):
    weight = v["linear.weight"]
    return gauss(weight, 0.0, 1.0) + gauss(y, (x @ weight.T).squeeze(-1) + 0.3 + 0.5, 2.0)


def with_params(y):
    center = pyro.param("center", real(0.4))
    spread = pyro.param("spread", real(1.5), constraint=constraints.positive)
    x = pyro.sample("x", dist.Normal(center, spread))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


# the registry --------------------------------------------------------------------------------------------------------


def no_jacobian(v: dict[str, Tensor]) -> Tensor:
    """All latents are real already."""
    return real(0.0)


@dataclass(frozen=True, eq=False)
class Case:
    """A model, its arguments, and by hand: the log joint of constrained values, the log Jacobian at them."""

    name: str
    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    joint: Callable[..., Tensor] = field(repr=False)
    ladj: Callable[[dict[str, Tensor]], Tensor] = field(default=no_jacobian, repr=False)
    dim: int = 1
    sites: bool = True  # the joint is the sum of the sites' densities: no factors, scales or enumerated sites
    pyro: bool = True  # Pyro's own potential takes it


COUNTS = real(1.0, 2.0, 0.0)
GAPS = real(1.0, NAN, 2.0, NAN)

CASES = [
    Case("nested", nested, (normal(3, 4, seed=1),), nested_joint, lambda v: v["tau"].log().sum(), dim=16),
    Case("factors", factors, (COUNTS,), factors_joint, dim=3, sites=False),
    Case(
        "masked",
        masked,
        (normal(5, seed=2),),
        masked_joint,
        lambda v: interval(v["x"][KEPT], 0.0, 5.0),
        dim=3,
        pyro=False,
    ),
    Case("scaled", scaled, (normal(5, seed=3),), scaled_joint, lambda v: v["s"].log(), sites=False),
    Case(
        "missing",
        missing,
        (GAPS,),
        missing_joint,
        lambda v: v["y_unobserved"][GAPS.isnan()].log().sum(),
        dim=3,
        pyro=False,
    ),
    Case(
        "filled",  # Pyro's ELBOs take no NaN
        missing,
        (GAPS.nan_to_num(1.0), ~GAPS.isnan()),
        missing_joint,
        lambda v: v["y_unobserved"][GAPS.isnan()].log().sum(),
        dim=3,
        pyro=False,
    ),
    Case(
        "improper",
        improper,
        (real(0.5, -1.0),),
        lambda v, y: gauss(y, v["mu"], v["s"]),
        lambda v: v["s"].log().sum(),
        dim=3,
        pyro=False,
    ),
    Case(
        "dependent",
        dependent,
        (real(0.4),),
        dependent_joint,
        lambda v: interval(v["alpha"], 0.0, 1.0) + interval(v["beta"], 0.0, 1.0 - v["alpha"]),
        dim=2,
        pyro=False,
    ),
    Case("decentered", decentered, (normal(3, seed=4),), decentered_joint, lambda v: v["tau"].log(), dim=4),
    Case(
        "mixture", mixture, (normal(6, seed=5),), mixture_joint, lambda v: v["p"].log().sum(), dim=3, sites=False
    ),
    Case(
        "hidden_markov",
        hidden_markov,
        (normal(4, 2, seed=6),),
        hidden_markov_joint,
        lambda v: v["rows"].log().sum(),
        dim=9,
        sites=False,
    ),
    Case("regression", Regression(), (normal(5, 2, seed=7), normal(5, seed=8)), regression_joint, dim=2),
    Case(
        "params", with_params, (real(1.1),), lambda v, y: gauss(v["x"], 0.4, 1.5) + gauss(y, v["x"], 1.0)
    ),
]  # fmt: skip


def each_model(*names: str, where: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Parametrize a test over the models that are named, or all, that satisfy ``where``."""
    chosen = [case for case in CASES if where(case) and (not names or case.name in names)]
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in chosen])
