"""Comparison of models, power scaling, and draws before any data."""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.posterior.comparison.compare import stacking_weights
from tests.conjugate import PINE, pine, pine_data, pine_guide


def located(y, sd):
    """mu ~ N(0, sd), y_i ~ N(mu, 1)."""
    mu = pyro.sample("mu", dist.Normal(0.0, sd))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def located_guide(y, sd):
    precision = len(y) + sd**-2
    pyro.sample("mu", dist.Normal(y.sum() / precision, precision**-0.5))


def located_evidence(y, sd):
    covariance = torch.eye(len(y)) + sd**2
    return float(dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y))


DATA = torch.tensor([0.4, 1.3, -0.2, 0.9, 0.1])


@pytest.fixture(scope="module")
def three():
    return {str(sd): pf.diagnose(located, located_guide, DATA, sd) for sd in (1.0, 10.0, 0.1)}


def test_bayes_factors_elpd_and_verdicts(three):
    found = pf.compare(three)
    assert set(found.names) == set(three)
    for one in three:
        for other in three:
            factor, error = found.log_bayes_factor(one, other)
            exact = located_evidence(DATA, float(one)) - located_evidence(DATA, float(other))
            assert factor == pytest.approx(exact, abs=1e-3)
            assert error < 0.01
    table = found.table
    assert list(table["elpd"]) == sorted(table["elpd"], reverse=True)
    assert table["weight"].sum() == pytest.approx(1.0)
    assert table["elpd_diff"].iloc[0] == 0.0
    assert (table["elpd_diff"].iloc[1:] < 0).all()
    assert set(table["verdict"]) == {"ok"}
    away, error = found.difference(*found.names[:2])
    assert away == pytest.approx(found.loo[found.names[0]].elpd - found.loo[found.names[1]].elpd)
    assert 0.0 < error < 1.0
    text = str(found)
    assert "log Bayes factor" in text
    assert "elpd of" in text


def test_monte_carlo_errors_are_small_beside_those_of_differences(three):
    found = pf.compare(three)
    best = found.names[0]
    for other in found.names[1:]:
        error = math.hypot(found.loo[best].mcse, found.loo[other].mcse)
        assert error < 1.3 * max(0.02, found.difference(best, other)[1] / 50.0)
    same = pf.compare({"one": three["1.0"], "again": three["1.0"]})
    assert same.difference("one", "again")[1] == 0.0
    assert any("has a Monte Carlo error of" in note for note in same.notes)


@pytest.mark.slow
def test_radiata_pine_bayes_factor():
    found = pf.compare({name: pf.diagnose(pine, pine_guide, *pine_data(name)) for name in PINE})
    assert found.names[0] == "adjusted_density"
    factor, _ = found.log_bayes_factor("adjusted_density", "density")
    assert factor == pytest.approx(PINE["adjusted_density"] - PINE["density"], abs=1e-3)
    assert found.weights["adjusted_density"] > 0.7


def test_stacking_maximizes_the_log_score_of_the_mixture():
    elpd = torch.tensor([[-1.0, -5.0, -1.0, -900.0], [-2.0, -1.0, -3.0, -901.0], [-9.0, -9.0, -9.0, -909.0]])
    weights = torch.tensor(stacking_weights(elpd), dtype=torch.float64)
    shifted = (elpd - elpd.amax(0)).exp().double()

    def score(w):
        return float((w @ shifted).log().sum())

    grid = torch.linspace(0.0, 1.0, 2001, dtype=torch.float64)
    best = max(score(torch.stack([w, 1 - w, 0 * w])) for w in grid)
    assert score(weights) == pytest.approx(best, abs=1e-4)
    assert float(weights[2]) < 1e-3


def test_models_of_different_data_are_refused(three):
    other = pf.diagnose(located, located_guide, DATA + 0.01, 1.0)
    with pytest.raises(ValueError, match=r"'1.0' and 'b' are of different data.*the values of 'y'"):
        pf.compare({"1.0": three["1.0"], "b": other})
    longer = pf.diagnose(located, located_guide, torch.cat([DATA, DATA]), 1.0)
    with pytest.raises(ValueError, match="5 values of 'y' and 10 of 'y'"):
        pf.compare({"a": three["1.0"], "b": longer})


def test_what_cannot_be_compared_is_refused(three, tmp_path):
    with pytest.raises(ValueError, match="two or more by name"):
        pf.compare({"a": three["1.0"]})
    with pytest.raises(ValueError, match=r"posteriors\['b'\]: expected a Posterior, got a int"):
        pf.compare({"a": three["1.0"], "b": 3})
    unreliable = pf.diagnose(located, lambda y, sd: pyro.sample("mu", dist.Normal(5.0, 0.1)), DATA, 1.0)
    with pytest.raises(ValueError, match=r"posteriors\['b'\]: loo: the verdict on the draws is unreliable"):
        pf.compare({"a": three["1.0"], "b": unreliable})


def test_loaded_posteriors_and_other_site_names_are_compared(three, tmp_path):
    three["1.0"].save(tmp_path / "saved")

    def renamed(y, sd):
        mu = pyro.sample("mu", dist.Normal(0.0, sd))
        pyro.sample("outcome", dist.Normal(mu, 1.0).expand([len(y)]), obs=y)

    other = pf.diagnose(renamed, located_guide, DATA, 1.0)
    found = pf.compare({"a": pf.load(tmp_path / "saved"), "b": other})
    assert found.log_bayes_factor("a", "b")[0] == pytest.approx(0.0, abs=1e-3)


def test_observations_must_be_the_same_ones(three):
    def together(y, sd):
        mu = pyro.sample("mu", dist.Normal(0.0, sd))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)

    other = pf.diagnose(together, located_guide, DATA, 1.0)
    with pytest.raises(ValueError, match="'a' takes the data for 5 observations, 'b' for 1"):
        pf.compare({"a": three["1.0"], "b": other})


def test_improper_priors_have_no_bayes_factors(three):
    def flat(y, sd):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    other = pf.diagnose(flat, lambda y, sd: pyro.sample("mu", dist.Normal(y.mean(), len(y) ** -0.5)), DATA, 1.0)
    found = pf.compare({"proper": three["10.0"], "<b>flat": other})
    assert math.isnan(found.log_bayes_factor("proper", "<b>flat")[0])
    assert any("improper" in note for note in found.notes)
    assert "improper" in str(found)
    assert "improper" in found._repr_html_()
    assert "<b>" not in found._repr_html_()


# power scaling --------------------------------------------------------------------------------------------------------


def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def centered(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


RESULTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


@pytest.fixture(scope="module")
def schools_by_importance():
    """8000 draws of the posterior, resampled from 200 000 of a wide proposal given mu and tau."""
    torch.manual_seed(0)
    tau, mu = dist.HalfCauchy(5.0).sample((200_000,)), dist.Normal(0.0, 5.0).sample((200_000,))
    spread = (ERRORS**2 + tau[:, None] ** 2).sqrt()
    log_w = dist.Normal(mu[:, None], spread).log_prob(RESULTS).sum(1)
    index = torch.multinomial(log_w.softmax(0), 8000, replacement=True)
    mu, tau = mu[index], tau[index]
    precision = ERRORS**-2 + tau[:, None] ** -2
    theta = dist.Normal((RESULTS / ERRORS**2 + mu[:, None] / tau[:, None] ** 2) / precision, precision**-0.5).sample()
    return {"mu": mu, "tau": tau, "theta": theta, "eta": (theta - mu[:, None]) / tau[:, None]}


def in_chains(draws, names):
    return {name: draws[name].reshape(4, 2000, *draws[name].shape[1:]) for name in names}


def test_only_priors_at_the_top_are_scaled(schools_by_importance):
    """Scaling the prior of the group effects too hides the sensitivity to that of tau: .20 becomes .08."""
    chains = pf.from_mcmc(in_chains(schools_by_importance, ("mu", "tau", "eta")), eight_schools, RESULTS, ERRORS)
    found = chains.sensitivity()
    assert found.prior_sites == ("mu", "tau")
    assert "scale tau" in found.left_out["eta"]
    assert float(found.table.loc["tau", "prior"]) == pytest.approx(0.203, abs=0.03)
    every = chains.sensitivity(["tau"], prior_sites=["mu", "tau", "eta"])
    assert list(every.table.index) == ["tau"]
    assert float(every.table.loc["tau", "prior"]) == pytest.approx(0.079, abs=0.03)
    assert found.table.loc["tau", "diagnosis"] == "strong prior or weak likelihood"
    text = str(found)
    assert "Not scaled: eta is a group effect with the scale tau" in text


def test_a_centered_group_effect_is_left_out_too(schools_by_importance):
    chains = pf.from_mcmc(in_chains(schools_by_importance, ("mu", "tau", "theta")), centered, RESULTS, ERRORS)
    found = chains.sensitivity()
    assert found.prior_sites == ("mu", "tau")
    assert "depends on other latents" in found.left_out["theta"]
    assert float(found.table.loc["tau", "prior"]) == pytest.approx(0.203, abs=0.03)


def test_sensitivity_in_closed_form():
    """N(0, 1) prior, one datum: raised to alpha, the prior N(0, 1 / alpha) moves the mean by -y / 4 d alpha.

    Checked in the ratio of two data: the distance is proportional to the shift, to first order.
    """

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))

    shifts = [
        float(pf.diagnose(model, guide, torch.tensor(y)).sensitivity().table.loc["mu", "prior"]) for y in (3.0, 6.0)
    ]
    assert shifts[1] / shifts[0] == pytest.approx(2.0, rel=0.25)
    assert shifts[0] > 0.05


def test_a_constant_hangs_on_nothing():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.deterministic("limits", torch.tensor([2.0, 3.0]))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    guide = lambda y: pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))  # noqa: E731
    table = pf.diagnose(model, guide, torch.tensor(6.0), draws=400).sensitivity().table
    assert table.loc["mu", "diagnosis"] == "prior and likelihood conflict"
    assert table.loc["limits[1]"].tolist() == [0.0, 0.0, "-"]


@pytest.mark.parametrize("potential", [0.0, 1.0])
def test_nothing_hangs_on_a_prior_or_a_likelihood_that_is_flat(potential):
    def model():
        x = pyro.sample("x", prior)
        pyro.factor("potential", -potential * x**2)

    prior = dist.Uniform(-1.0, 1.0) if potential else dist.Normal(0.0, 1.0)
    table = pf.diagnose(model, lambda: pyro.sample("x", prior), draws=400).sensitivity().table
    assert (table.loc["x", "prior"] == 0.0) == bool(potential)
    assert (table.loc["x", "likelihood"] == 0.0) != bool(potential)


def test_sensitivity_refuses_what_it_cannot_scale(three):
    with pytest.raises(ValueError, match="prior_sites: expected one of 'mu', got 'm'"):
        three["1.0"].sensitivity(prior_sites="m")
    with pytest.raises(ValueError, match="var_names: expected one of 'mu', got 'tau'"):
        three["1.0"].sensitivity("tau")


def test_the_model_with_summed_latents_is_scaled_too():
    def mixture(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            side = pyro.sample("side", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mu + 0.1 * side, 1.0), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal((y - 0.05).sum() / 4, 0.5))

    found = pf.diagnose(mixture, guide, torch.tensor([0.1, 0.2, -0.3])).sensitivity()
    assert found.prior_sites == ("mu",)
    assert float(found.table.loc["mu", "likelihood"]) > 0


def test_results_are_frozen(three):
    for found in (three["1.0"].loo(), pf.compare(three), three["1.0"].sensitivity(), three["1.0"].evidence()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            found.notes = ()


# before the data ------------------------------------------------------------------------------------------------------


def test_prior_predictive_draws_everything_from_the_prior():
    given, free = (pf.prior_predictive(eight_schools, y, ERRORS, draws=4000) for y in (RESULTS, None))
    assert set(given) == set(free) == {"mu", "tau", "eta", "theta", "y"}
    for name, value in given.items():
        assert torch.equal(value, free[name]), name
    assert given["y"].shape == (4000, 8)
    torch.testing.assert_close(given["theta"], given["mu"][:, None] + given["tau"][:, None] * given["eta"])
    assert float(given["mu"].std()) == pytest.approx(5.0, rel=0.06)
    rest = ((given["y"] - given["theta"]) / ERRORS).std()
    assert float(rest) == pytest.approx(1.0, rel=0.02)
    assert not torch.equal(given["mu"], pf.prior_predictive(eight_schools, RESULTS, ERRORS, draws=4000, seed=1)["mu"])


def test_prior_predictive_of_discrete_latents_and_outcomes():
    def model(n, y=None):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        kind = pyro.sample("kind", dist.Bernoulli(0.25), infer={"enumerate": "parallel"})
        with pyro.plate("row", n):
            pyro.sample("y", dist.Poisson(rate * (1 + kind)), obs=y)
        pyro.factor("penalty", -rate)

    before = torch.get_rng_state()
    found = pf.prior_predictive(model, 3, draws=4000, model_kwargs={"y": None})
    assert torch.equal(torch.get_rng_state(), before)
    assert set(found) == {"rate", "kind", "y"}
    assert float(found["kind"].mean()) == pytest.approx(0.25, abs=0.03)
    assert float(found["rate"].mean()) == pytest.approx(2.0, abs=0.1)
    assert float(found["y"].mean()) == pytest.approx(2.0 * 1.25, abs=0.15)


def test_prior_predictive_names_a_prior_that_cannot_be_drawn():
    def flat():
        pyro.sample("first", dist.Normal(0.0, 1.0))
        pyro.sample("flat", dist.ImproperUniform(dist.constraints.real, (), ()))

    with pytest.raises(ValueError, match=r"site 'flat': its prior, ImproperUniform, cannot be drawn from"):
        pf.prior_predictive(flat)
    with pytest.raises(ValueError, match="model: expected a callable"):
        pf.prior_predictive(3)
    with pytest.raises(ValueError, match="draws"):
        pf.prior_predictive(flat, draws=0)


@pytest.mark.falls_back
def test_prior_predictive_of_a_model_that_branches():
    def branching():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x > 0:
            x = 2 * x
        pyro.deterministic("y", x)

    found = pf.prior_predictive(branching, draws=200)
    torch.testing.assert_close(found["y"], torch.where(found["x"] > 0, 2 * found["x"], found["x"]))
