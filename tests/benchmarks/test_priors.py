"""The benchmarks of priors: a short chain of each method, an autoencoder, and the tables."""

from dataclasses import replace

import pytest
import torch

import pyro_flows as pf
from benchmarks.priors import autoencoders, chains
from pyro_flows.priors.parts import coordinates


def test_effects_are_integrated_out():
    """Against draws of the effects from their prior, for two groups."""
    x, y = (part[:2] for part in chains.PROBLEMS["hierarchical counts"].data(torch.Generator().manual_seed(0)))
    density = pf.LogDensity(chains.counts_at_once, (x, y))
    values = {"mean": torch.tensor([0.7]), "slope": torch.tensor([0.3]), "scale": torch.tensor([0.5])}
    other = {**values, "scale": torch.tensor([0.4])}
    found = [
        float(density(density.unconstrain(one)) - density.log_jacobian(density.unconstrain(one)))
        for one in (values, other)
    ]
    effect = torch.randn(200_000, 2, 1, generator=torch.Generator().manual_seed(1))
    right = []
    for scale in (0.5, 0.4):
        rate = (0.7 + 0.3 * x + scale * effect).exp()
        each = torch.distributions.Poisson(rate).log_prob(y).sum(-1).double()
        prior = torch.distributions.HalfNormal(1.0).log_prob(torch.tensor(scale))
        right.append(float((torch.logsumexp(each, 0) - torch.tensor(200_000.0).log()).sum() + prior))
    assert found[0] - found[1] == pytest.approx(right[0] - right[1], abs=0.03)


def test_a_normal_prior_has_the_moments_of_the_draws():
    x, y = chains.PROBLEMS["logistic regression"].data(torch.Generator().manual_seed(0))
    z = torch.randn(4, 500, 5, generator=torch.Generator().manual_seed(2)) * torch.arange(1.0, 6.0)
    posterior = pf.from_mcmc({"beta": z}, chains.logistic, x[:50], y[:50])
    prior = chains.of_normal(posterior, ("beta",))
    drawn, given = prior.flow.draw(50_000)[0], coordinates(prior.parts, posterior.samples["beta"])[0]
    torch.testing.assert_close(drawn.T.cov(), given.T.cov(), rtol=0.05, atol=0.3)
    mean, sd = chains.moments_of(prior)
    torch.testing.assert_close(mean, given.double().mean(0), rtol=0.0, atol=0.1)
    torch.testing.assert_close(sd, given.double().std(0), rtol=0.03, atol=0.0)


def test_a_reference_may_come_from_chains_of_enough_draws(monkeypatch):
    """A fit of all counts at once ended with Markov chains, and a reference had to have weights."""
    problem = chains.PROBLEMS["logistic regression"]
    x, y = problem.data(torch.Generator().manual_seed(0))
    scale = torch.arange(1.0, 6.0)
    z = torch.randn(4, 25_000, 5, generator=torch.Generator().manual_seed(2)) * scale
    for draws, message in ((25_000, None), (500, "the reference has a standard error of 0.02")):
        posterior = pf.from_mcmc({"beta": z[:, :draws]}, chains.logistic, x[:50], y[:50])
        posterior = replace(posterior, verdict=replace(posterior.verdict, status="refined"))
        monkeypatch.setattr(pf, "fit", lambda *args, posterior=posterior, **options: posterior)
        if message:
            with pytest.raises(AssertionError, match=message):
                chains.at_once(problem, (x, y))
        else:
            mean, sd = chains.at_once(problem, (x, y))
            torch.testing.assert_close(mean / scale, torch.zeros(5).double(), rtol=0.0, atol=0.015)
            torch.testing.assert_close(sd, scale.double(), rtol=0.01, atol=0.0)


@pytest.mark.slow
def test_an_autoencoder_is_trained_and_judged(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(autoencoders, "DRAWS", 50)
    row = autoencoders.measure("Real-NVP, K = 40", 0, "v", epochs=1)
    assert row["error"] == ""
    coins = torch.distributions.Binomial(16, logits=torch.zeros(64)).log_prob(autoencoders.images()[1]).sum(-1).mean()
    assert float(coins) < float(row["elbo"]) <= float(row["bound"]) < -90.0
    plain = {**row, "variant": autoencoders.PLAIN, "bound": str(float(row["bound"]) - 1.5)}
    longer = [{**one, "epochs": "3", "bound": str(2.0 * float(one["bound"]))} for one in (row, plain)]
    text = autoencoders.section([row, plain, *longer])
    assert text.count("| 1.50 (1.50) |") == text.count("| 3.00 (3.00) |") == 1
    assert "| Real-NVP, K = 40 | 1 |" in text
    assert "| Real-NVP, K = 40 | 3 |" in text
