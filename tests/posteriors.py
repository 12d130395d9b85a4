"""Models with known posteriors, and posteriors of each status, made without training."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import xarray
from torch import Tensor

import pyro_flows as pf

NETCDF, TENSORS, TEXT = "posterior.nc", "guide.pt", "posterior.json"  # the files of a saved posterior
SCHOOLS = 8
Y = torch.tensor([2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2])
SPREAD = math.sqrt(0.8)


def schools(y: Tensor) -> None:
    """theta_i ~ N(0, 2), y_i ~ N(theta_i, 1): the posterior is N(0.8 y_i, 0.8), independent."""
    with pyro.plate("school", SCHOOLS):
        theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
        pyro.deterministic("double", 2 * theta)
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def schools_guide(shift: float = 0.0, stretch: float = 1.0) -> Any:
    """The exact posterior of :func:`schools`, moved by ``shift`` sds and stretched."""

    def guide(y: Tensor) -> None:
        with pyro.plate("school", SCHOOLS):
            pyro.sample("theta", dist.Normal(0.8 * y + shift * SPREAD, stretch * SPREAD))

    return guide


OFF = {"ok": {}, "corrected": {"shift": 0.15}, "unreliable": {"stretch": 0.3}}


def new_schools_posterior(status: str = "ok", *, draws: int = 2000, seed: int = 0) -> pf.Posterior:
    """A posterior of :func:`schools` with this status, for tests that change it, or how it is made."""
    return pf.diagnose(schools, schools_guide(**OFF[status]), Y, draws=draws, seed=seed)


@functools.cache
def schools_posterior(status: str = "ok", *, draws: int = 2000, seed: int = 0) -> pf.Posterior:
    """The same, made once in a process, for tests that only look at it."""
    return new_schools_posterior(status, draws=draws, seed=seed)


@functools.cache
def schools_chains() -> pf.Posterior:
    """The same by chains, made once in a process."""
    return schools_posterior("unreliable", draws=500).refine(max_steps=400)


def schools_flow(dtype: torch.dtype = torch.float32) -> pf.AutoFlow:
    """A flow guide close to the posterior of :func:`schools`, its parameters all moved a little from the start."""
    y = Y.to(dtype)
    guide = pf.AutoFlow(schools, "realnvp", layers=2, hidden=(8,)).initialize(y)
    guide.to(dtype)
    guide.start_at(0.8 * y, torch.full((SCHOOLS,), SPREAD * (13 / 15) ** 0.5, dtype=dtype))  # the base is Student-t
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return guide


def location(y: Tensor) -> None:
    """mu ~ N(0, 5), y_i ~ N(mu, 1)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("observation", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def location_guide(y: Tensor) -> None:
    """The exact posterior of :func:`location`."""
    precision = len(y) + 1 / 25
    pyro.sample("mu", dist.Normal(y.sum() / precision, precision**-0.5))


def line(x: Tensor, y: Tensor | None = None) -> None:
    """A regression through the origin whose data can be left out."""
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("point", len(x)):
        mean = pyro.deterministic("mean", slope * x)
        pyro.sample("y", dist.Normal(mean, 0.1), obs=y)


def line_guide(x: Tensor, y: Tensor | None = None) -> None:
    """The exact posterior of :func:`line`."""
    assert y is not None
    precision = (x / 0.1).square().sum() + 0.01
    pyro.sample("slope", dist.Normal((x * y).sum() / 0.01 / precision, precision**-0.5))


def exact(model: Any, guide: Any, *args: Any, draws: int = 1000) -> pf.Posterior:
    """Diagnose, and check that the guide was as good as it should be."""
    posterior = pf.diagnose(model, guide, *args, draws=draws)
    assert posterior.verdict.status == "ok", posterior.verdict
    return posterior


def any_posterior(model: Any, *args: Any, draws: int = 200) -> pf.Posterior:
    """A posterior by an untrained flow guide: for tests of form, where the draws do not matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pf.NothingObservedWarning)
        return pf.diagnose(model, pf.AutoFlow(model, "nice", layers=2).initialize(*args), *args, draws=draws)


def same_group(one, other):
    """Two groups are alike but for last digits of single precision: what is evaluated anew may go block by block."""
    xarray.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-5)
    assert one.attrs == other.attrs
