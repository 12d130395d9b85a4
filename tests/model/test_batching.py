"""Rows of a batch at which a model's matrix has no factorization: NaN there, and nothing lost elsewhere."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows.model.batching import where_possible
from tests.models import real
from tests.registry import RECORDED_FROM, normal

BAD = (3, 4, 11)


def correlated(y: Tensor, *, single: bool = False) -> None:
    """The covariance is positive definite for correlations below 1 only, and the prior goes on above."""
    rho = pyro.sample("rho", dist.Normal(real(0.0), 0.5))
    if single:
        float(rho.detach())
    covariance = torch.eye(2, dtype=y.dtype) + rho * (1.0 - torch.eye(2, dtype=y.dtype))
    factor = torch.linalg.cholesky(covariance)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2, dtype=y.dtype), scale_tril=factor), obs=y)


def points() -> Tensor:
    z = 0.3 * normal(16, 1, seed=1).clamp(-2.0, 2.0)
    z[list(BAD)] = real(1.5, -1.2, 4.0)[:, None]
    return z


@pytest.mark.falls_back
@pytest.mark.parametrize("single", [False, True])
def test_density_and_gradient_are_nan_there_and_right_elsewhere(single):
    density = pf.LogDensity(correlated, (real(0.3, -0.4),), {"single": single})
    assert density.batched is not single
    z = points()
    good = torch.ones(len(z), dtype=torch.bool)
    good[list(BAD)] = False
    values = density(z)
    again, gradients = density.value_and_grad(z)
    for found in (values, again, gradients[:, 0]):
        assert torch.equal(torch.isfinite(found), good)
    alone, slopes = density.value_and_grad(z[good])
    assert torch.allclose(values[good], alone)
    assert torch.allclose(again[good], alone)
    assert torch.allclose(gradients[good], slopes)


def test_recording_survives_a_first_batch_with_bad_rows():
    density = pf.LogDensity(correlated, (real(0.3, -0.4),))
    z = points()
    density.value_and_grad(z)
    assert density.reason is None
    clean = z.clamp(-0.5, 0.5)
    for _ in range(RECORDED_FROM):
        density.value_and_grad(clean)
    assert len(density._with_gradients.runners) == 1
    assert density.reason is None


def test_values_are_told_where_there_is_no_factorization():
    density = pf.LogDensity(with_deterministic, (real(0.3, -0.4),))
    z = points()
    found = density.constrain(z)
    assert torch.equal(found["rho"], z[:, 0])
    bad = torch.isnan(found["factor"]).flatten(1).any(1)
    assert bad.nonzero()[:, 0].tolist() == list(BAD)
    assert torch.isfinite(density.log_prior(z)["rho"]).all()
    assert torch.isnan(density.log_likelihood(z)["y"]).nonzero()[:, 0].tolist() == list(BAD)
    assert density.predictive(z, seed=1)["y"].shape == (16, 2)


def with_deterministic(y: Tensor) -> None:
    rho = pyro.sample("rho", dist.Normal(real(0.0), 0.5))
    covariance = torch.eye(2, dtype=y.dtype) + rho * (1.0 - torch.eye(2, dtype=y.dtype))
    factor = pyro.deterministic("factor", torch.linalg.cholesky(covariance), event_dim=2)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2, dtype=y.dtype), scale_tril=factor), obs=y)


@pytest.mark.parametrize("model", [correlated, with_deterministic])
def test_a_fit_goes_through(model):
    posterior = pf.fit(model, real(0.3, -0.4), progress=False, max_steps=40, escalate=False, draws=200)
    assert torch.isfinite(posterior.z).all()
    assert float(posterior.samples["rho"].abs().median()) < 1.0


def chain(y: Tensor) -> None:
    """A hidden Markov chain with two states; its probabilities are summed by Pyro."""
    stay = pyro.sample("stay", dist.Beta(real(8.0), 2.0).expand([2]).to_event(1))
    loc = pyro.sample("loc", dist.Normal(real(0.0, 3.0), 1.0).to_event(1))
    logits = torch.stack([torch.stack([stay[0], 1 - stay[0]]), torch.stack([1 - stay[1], stay[1]])]).log()
    pyro.sample("y", dist.DiscreteHMM(torch.zeros(2).to(y), logits, dist.Normal(loc, 1.0)), obs=y)


def test_hidden_markov_chains_run_in_batches():
    """Pyro's own logarithm with a bounded slope cannot be mapped: such a model ran draw by draw."""
    y = real(0.3, -0.5, 0.1, 2.8, 3.3, 3.1)
    density = pf.LogDensity(chain, (y,))
    assert density.batched
    z = normal(20, density.dim, seed=3)
    stay, loc = torch.sigmoid(z[:, :2]), z[:, 2:]
    at = torch.log(torch.full((20, 2), 0.5).double())
    for value in y:  # by the forward algorithm; Pyro's chain makes a step before the first value
        step = torch.stack(
            [torch.stack([stay[:, 0], 1 - stay[:, 0]], 1), torch.stack([1 - stay[:, 1], stay[:, 1]], 1)], 1
        )
        at = torch.logsumexp(at[:, :, None] + step.log(), 1) + dist.Normal(loc, 1.0).log_prob(value)
    prior = dist.Beta(real(8.0), 2.0).log_prob(stay).sum(1) + (stay * (1 - stay)).log().sum(1)
    prior = prior + dist.Normal(real(0.0, 3.0), 1.0).log_prob(loc).sum(1)
    torch.testing.assert_close(density(z), prior + torch.logsumexp(at, 1))
    single = torch.stack([density.value_and_grad(row[None])[1][0] for row in z])
    torch.testing.assert_close(density.value_and_grad(z)[1], single)


def test_no_row_at_all():
    def fails(z: Tensor) -> tuple[Tensor]:
        raise torch.linalg.LinAlgError("not positive-definite")

    found, wide = where_possible(fails, torch.zeros(3, 2), (), (2,))
    assert found.shape == (3,)
    assert wide.shape == (3, 2)
    assert torch.isnan(wide).all()
