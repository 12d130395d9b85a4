"""Targets of the comparison of kernels: models and flows of short fits, or normal distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_flows as pf
from benchmarks.larger import models as larger
from benchmarks.named import models as named
from pyro_flows.inference.chains.latent import Latent
from pyro_flows.inference.chains.starts import affine_flow, starting_points

STEPS = 1000  # of training: flows that a sampler is needed for
SCHOOLS = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


def schools(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, centered."""
    mu = pyro.sample("mu", dist.Normal(named.ZERO, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0 * named.ONE))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def funnel() -> None:
    """Nine numbers whose common log variance is unknown."""
    v = pyro.sample("v", dist.Normal(named.ZERO, 3.0))
    with pyro.plate("leaf", 9):
        pyro.sample("x", dist.Normal(named.ZERO, (0.5 * v).exp()))


def normal(scale_tril: Tensor) -> None:
    """A correlated normal."""
    pyro.sample("x", dist.MultivariateNormal(scale_tril.new_zeros(len(scale_tril)), scale_tril=scale_tril))


def normal_data() -> tuple[Tensor, ...]:
    """Correlations of a Wishart matrix in 50 dimensions: standard deviations along its axes from 1 to 30."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(50, 50, generator=generator, dtype=torch.float64))[0]
    covariance = turn * torch.logspace(0.0, 3.0, 50, dtype=torch.float64) @ turn.mT
    return (torch.linalg.cholesky(covariance),)


def _hmm() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    from benchmarks.posteriors.models import load

    problem = load("bball_drive_event_0-hmm_drive_0")
    return problem.model, problem.args


@dataclass(frozen=True)
class Target:
    """What makes a model and its arguments, and whether chains move in the space of a normal distribution."""

    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    normal: bool = False


TARGETS = {
    "LKJ effects": Target(lambda: (named.lkj_effects, named.lkj_data())),
    "horseshoe": Target(lambda: (larger.horseshoe, larger.horseshoe_data())),
    "radon": Target(lambda: (named.radon_slopes, named.radon_data())),
    "hmm_drive_0": Target(_hmm),
    "eight schools, centered": Target(lambda: (schools, tuple(map(named.real, SCHOOLS)))),
    "funnel, 10": Target(lambda: (funnel, ())),
    "normal, 50": Target(lambda: (normal, normal_data()), normal=True),
}


def prepared(name: str, seed: int) -> tuple[Latent, list[str], Tensor]:
    """Return the space of a target, names of coordinates, and starting points of eight superchains."""
    model, arguments = TARGETS[name].make()
    posterior = pf.fit(model, *arguments, seed=seed, max_steps=STEPS, escalate=False, refine=False, progress=False)
    starts = starting_points(posterior.z, posterior.log_weights, 8, seed=seed)
    flow = affine_flow(posterior.z, posterior.log_weights) if TARGETS[name].normal else posterior.flow
    return Latent(flow, posterior.density), list(posterior.coordinates), starts
