"""``fit`` on three real posteriors whose reference is in the repository, so that each clone tests them.

Means within a tenth of the reference's sd, sds within 10 %, in coordinates where scales are logarithms.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_flows as pf
from tests.models import real

FOUND = json.loads((Path(__file__).parent.parent / "data" / "posteriors.json").read_text(encoding="utf-8"))
LEVELS = torch.tensor(FOUND["levels"], dtype=torch.float64)


def hyperpriors():
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    return mu, pyro.sample("tau", dist.HalfCauchy(real(5.0)))


def eight_schools_centered(y, sigma):
    mu, tau = hyperpriors()
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y, sigma):
    mu, tau = hyperpriors()
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta_trans", dist.Normal(real(0.0), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)


def kilpisjarvi(n, mean_x, mean_y, sxx, sxy, syy, prior):
    """A regression of summer temperatures on years, by its sufficient statistics."""
    alpha = pyro.sample("alpha", dist.Normal(prior[0], prior[1]))
    beta = pyro.sample("beta", dist.Normal(prior[2], prior[3]))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    squares = n * (mean_y - alpha - beta * mean_x) ** 2 + syy - 2.0 * beta * sxy + beta**2 * sxx
    pyro.factor("data", -0.5 * squares / sigma**2 - n * (sigma.log() + 0.5 * math.log(2.0 * math.pi)))


MODELS = {"eight_schools_noncentered": eight_schools_noncentered}
MODELS |= {"eight_schools_centered": eight_schools_centered, "kilpisjarvi": kilpisjarvi}


SLOW = pytest.param("kilpisjarvi", marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eight_schools_noncentered", "eight_schools_centered", SLOW])
def test_right_and_ok(name):
    found = FOUND["posteriors"][name]
    data = [torch.tensor(value, dtype=torch.float64) for value in found["data"].values()]
    posterior = pf.fit(MODELS[name], *data, progress=False)
    assert posterior.verdict.status == "ok", str(posterior.verdict)
    assert posterior.log_evidence == pytest.approx(found["log_evidence"], abs=0.1)
    assert {label.removeprefix("log ") for label in found["parameters"]} == set(posterior.density.names)
    for label, reference in found["parameters"].items():
        draws = posterior.samples[label.removeprefix("log ")].reshape(len(posterior._used), -1)
        draws = draws.log() if label.startswith("log ") else draws
        mean, sd, quantiles = (real(reference[key]) for key in ("mean", "sd", "quantiles"))
        assert float(((draws.mean(0) - mean) / sd).abs().max()) <= 0.1, label
        assert float((draws.std(0) / sd).log().abs().max()) <= math.log(1.1), label
        # the standard error of a 5 % quantile of 4000 draws is .033 sd, and half of that for the reference
        assert float(((torch.quantile(draws, LEVELS, dim=0) - quantiles) / sd).abs().max()) <= 0.16, label
