"""Models that raise an error at some values of their latents: their log density is -inf there, and a note says so."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from tests.bad_points import Bad, bad_models
from tests.slow import rest_slow

MODELS = list(bad_models())
# Of the models that take a number out of a latent, and so run point by point: one of each kind of latent.
USUAL = ("raise, scalar, 1", "math, vector, 3", "divided by zero, plated, 4")
QUICK = {"max_steps": 20, "escalate": False, "refine": False, "draws": 100, "max_seconds": 4.0, "progress": False}


def of(bad: Bad) -> str:
    return bad.name


@pytest.mark.falls_back
@pytest.mark.parametrize("bad", rest_slow(MODELS, lambda bad: bad.batched or bad.name in USUAL), ids=of)
def test_models_are_read_and_scored(bad):
    """The guide is set up too: a flow guide in Pyro's own SVI reads the model in the same way."""
    density = pf.LogDensity(bad.model, bad.args)
    z = density.structure.points(1.0)
    z = torch.cat([density.structure.points(0.0), z - 3.0, z - 30.0])
    values = density(z)
    value, gradient = density.value_and_grad(z)
    assert values.shape == (6,)
    assert gradient.shape == z.shape
    assert torch.isfinite(values).any()
    torch.testing.assert_close(values, value, equal_nan=True)
    assert density.constrain(z)["a" if "a" in density.names else "period"].isfinite().all()
    assert pf.AutoRealNVP(bad.model, layers=2).initialize(*bad.args).structure.dim == density.dim


@pytest.mark.falls_back
@pytest.mark.slow
@pytest.mark.parametrize("bad", MODELS, ids=of)
def test_fits_go_through(bad):
    posterior = pf.fit(bad.model, *bad.args, **QUICK)
    assert torch.isfinite(posterior.z).all()


@pytest.mark.falls_back
def test_the_verdict_names_the_site():
    bad = next(bad for bad in MODELS if bad.name.startswith("raise, scalar"))
    posterior = pf.fit(bad.model, *bad.args, **QUICK)
    (note,) = [note for note in posterior.verdict.notes if "raised" in note]
    assert "points, in or before site 'y': ValueError: a has to be positive; these count as log density -inf" in note


def test_errors_at_all_points_are_raised_at_once():
    def too_long(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x * torch.ones(3), 1.0).to_event(1), obs=y)

    def singular(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + torch.linalg.inv(torch.zeros(2, 2))[0, 0], 1.0), obs=y)

    def misspelt(y):
        pyro.sample("x", dist.Normal(0.0, 1.0))
        return undefined_name  # noqa: F821

    with pytest.raises(ValueError, match="at site 'y': RuntimeError: The size of tensor a"):
        pf.LogDensity(too_long, (torch.ones(4),))
    with pytest.raises(ValueError, match=r"after site 'x': LinAlgError: linalg\.inv"):
        pf.LogDensity(singular, (torch.ones(4),))
    with pytest.raises(NameError, match="undefined_name"):
        pf.LogDensity(misspelt, (torch.ones(4),))


@pytest.mark.falls_back
def test_functions_that_torch_cannot_differentiate_are_named():
    def censored(t):
        shape = pyro.sample("shape", dist.LogNormal(0.0, 1.0))
        pyro.factor("later", torch.log1p(-dist.Gamma(shape, 1.0).cdf(t)).sum())

    with pytest.raises(ValueError, match=r"model: expected a log density with a derivative.*'igamma: input'"):
        pf.LogDensity(censored, (torch.ones(2),)).value_and_grad(torch.zeros(2, 1))
