"""The result as a value: draws, weights, summary, resampling, predictive draws, how it prints."""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.inference.verdict.psis import psis
from pyro_flows.posterior.drawn import ROWS_SHOWN
from pyro_flows.posterior.draws import from_draws
from tests.posteriors import (
    SCHOOLS,
    SPREAD,
    Y,
    any_posterior,
    exact,
    line,
    line_guide,
    location,
    schools,
    schools_guide,
    schools_posterior,
)


@pytest.fixture(scope="module")
def by_status():
    return {status: schools_posterior(status) for status in ("ok", "corrected", "unreliable")}


@pytest.mark.parametrize("status", ["ok", "corrected", "unreliable"])
def test_status_and_draws_to_use(by_status, status):
    posterior = by_status[status]
    assert posterior.verdict.status == status
    assert posterior.resampled == (status == "corrected")
    assert torch.equal(posterior._used, posterior.z) == (status != "corrected")
    assert torch.equal(posterior.samples["theta"], posterior._used)  # theta is unconstrained
    assert torch.equal(posterior.samples["double"], 2 * posterior.samples["theta"])
    assert float(posterior.log_weights.exp().sum()) == pytest.approx(1.0)


def test_exact_guide_gives_the_exact_posterior(by_status):
    posterior = by_status["ok"]
    # log evidence: y_i ~ N(0, sqrt 5); all weights are equal, so this is exact
    assert posterior.log_evidence == pytest.approx(float(dist.Normal(0.0, 5**0.5).log_prob(Y).sum()), abs=1e-4)
    assert posterior.elbo == pytest.approx(posterior.log_evidence, abs=1e-4)
    assert posterior.ess == pytest.approx(2000, rel=1e-4)
    table = posterior.summary("theta", round_to="none")
    off = (table["mean"] - (0.8 * Y).numpy()) / table["mcse_mean"]
    assert off.abs().max() < 4.5  # 8 standard normals: fails once in 20 000 seeds


def test_resampled_draws_are_nearer_and_carry_their_own_densities(by_status):
    posterior = by_status["corrected"]
    raw, used = posterior.z.mean(0) - 0.8 * Y, posterior.samples["theta"].mean(0) - 0.8 * Y
    assert raw.mean() == pytest.approx(0.15 * SPREAD, abs=0.03)
    assert used.mean() == pytest.approx(0.0, abs=0.03)
    shifted = dist.Normal(0.8 * Y + 0.15 * SPREAD, SPREAD).to_event(1)
    torch.testing.assert_close(posterior._used_log_q, shifted.log_prob(posterior._used))
    torch.testing.assert_close(posterior._used_log_p, posterior.density(posterior._used))
    torch.testing.assert_close(posterior._used_log_weights.exp().sum(), torch.tensor(1.0))
    assert posterior._used_log_weights.unique().numel() == 1


def test_effective_draws(by_status):
    assert by_status["ok"].effective == by_status["ok"].ess
    assert math.isnan(by_status["unreliable"].effective)
    far = pf.diagnose(schools, schools_guide(shift=0.3), Y, draws=1000)
    assert far.resampled
    assert far.ess < 0.6 * 1000
    assert 700 < far.effective < 1000  # from a pool of four times as many, with repeats


@pytest.mark.slow
def test_effective_draws_predict_the_error_of_the_mean():
    """40 seeds times 8 means: the ratio of variances has a relative sd of .08, so this fails once in 10 000 or less."""
    errors, predicted = [], []
    for seed in range(40):
        posterior = pf.diagnose(schools, schools_guide(shift=0.3), Y, draws=500, seed=seed)
        assert posterior.resampled
        errors.append(posterior.samples["theta"].mean(0) - 0.8 * Y)
        predicted.append(posterior.samples["theta"].var(0) / posterior.effective)
    ratio = float(torch.stack(errors).square().mean() / torch.stack(predicted).mean())
    assert 0.7 < ratio < 1.4


def test_summary_columns_and_error(by_status):
    table = by_status["ok"].summary(ci_kind="eti", ci_prob=0.8, round_to="none")
    assert list(table.columns) == ["mean", "sd", "eti80_lb", "eti80_ub", "mcse_mean", "ess"]
    assert list(table.index) == [f"{name}[{i}]" for name in ("theta", "double") for i in range(SCHOOLS)]
    draws = by_status["ok"].samples["theta"]
    row, values = table.loc["theta[3]"], draws[:, 3]
    assert row["mean"] == pytest.approx(float(values.mean()), rel=1e-4)
    assert row["sd"] == pytest.approx(float(values.std()), rel=1e-4)
    assert row["mcse_mean"] == pytest.approx(row["sd"] / by_status["ok"].ess ** 0.5, rel=1e-4)
    inside = (values > row["eti80_lb"]) & (values < row["eti80_ub"])
    assert inside.double().mean() == pytest.approx(0.8, abs=1e-3)


def test_summary_of_unreliable_draws_claims_no_accuracy(by_status):
    with pytest.warns(pf.UnreliableWarning):
        table = by_status["unreliable"].summary()
    assert table["ess"].isna().all()
    assert table["mcse_mean"].isna().all()


@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
def test_summary_intervals_differ_by_kind_and_default_to_the_installed_arviz():
    def model():
        pyro.sample("x", dist.Exponential(1.0))

    posterior = exact(model, model)
    shortest = posterior.summary(ci_kind="hdi", ci_prob=0.9).loc["x"]
    central = posterior.summary(ci_kind="eti", ci_prob=0.9).loc["x"]
    assert shortest["hdi90_lb"] < 0.03 < central["eti90_lb"] < 0.1  # an exponential starts at its mode
    assert any(str(column) in ("hdi94_lb", "eti89_lb") for column in posterior.summary().columns)


def test_chains_of_a_constant_have_no_r_hat():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.deterministic("limit", torch.tensor(3.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    draws = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)) / math.sqrt(2.0)
    table = pf.from_mcmc({"mu": draws}, model, torch.tensor(0.0)).summary()  # a warning is an error
    assert math.isnan(table.loc["limit", "r_hat"])
    assert table.loc["mu", "r_hat"] < 1.02


@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
def test_draws_that_overflow_have_a_mean_alone():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 100.0))
        pyro.deterministic("odds", x.exp())

    table = exact(model, model).summary()  # a warning is an error
    assert table.loc["odds", "mean"] == math.inf
    assert math.isnan(table.loc["odds", "sd"])


def test_summary_selects_names(by_status):
    assert list(by_status["ok"].summary("double").index) == [f"double[{i}]" for i in range(SCHOOLS)]
    labeled = by_status["ok"].assign_coords({"school": list("abcdefgh")})
    assert labeled.summary(["theta"]).index[0] == "theta[a]"
    assert list(labeled.summary(coords={"school": ["b"]}).index) == ["theta[b]", "double[b]"]
    assert list(labeled.summary("~theta", coords={"school": "c"}).index) == ["double[c]"]
    assert list(labeled.summary("doub", filter_vars="like", coords={"school": "c"}).index) == ["double[c]"]
    with pytest.raises(
        ValueError, match=r"var_names: expected one of 'double', 'theta', got 'thet'\. Did you mean 'theta'"
    ):
        by_status["ok"].summary("thet")
    with pytest.raises(ValueError, match=r"var_names: expected regular expressions, got '~\(' \(missing \)"):
        by_status["ok"].summary(["the", "~("], filter_vars="regex")


@pytest.mark.parametrize(("options", "message"), [({"round_to": -1}, r"round_to: expected an integer >= 0, got -1")])
def test_summary_refuses_bad_options(by_status, options, message):
    with pytest.raises(ValueError, match=message):
        by_status["ok"].summary(**options)
    with pytest.raises(TypeError, match="hdi_prob"):
        by_status["ok"].summary(hdi_prob=0.9)


@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
def test_summary_rounds_each_row_to_its_own_scale():
    def model():
        pyro.sample("small", dist.Normal(0.0, 1e-4))
        pyro.sample("large", dist.Normal(0.0, 1e4))

    table = exact(model, model).summary()
    assert table.loc["small", "sd"] == pytest.approx(1e-4, rel=0.1)  # not 0.00
    assert table.loc["large", "mean"] == round(table.loc["large", "mean"])


def test_resample_by_the_weights(by_status):
    corrected, ok = by_status["corrected"], by_status["ok"]
    drawn = corrected.resample(5000, seed=3)
    assert drawn["theta"].shape == (5000, SCHOOLS)
    assert (drawn["theta"].mean(0) - 0.8 * Y).mean() == pytest.approx(0.0, abs=0.03)
    assert torch.equal(drawn["double"], 2 * drawn["theta"])
    assert torch.equal(drawn["theta"], corrected.resample(5000, seed=3)["theta"])
    assert not torch.equal(drawn["theta"], corrected.resample(5000, seed=4)["theta"])
    assert ok.resample()["theta"].shape == ok.samples["theta"].shape
    weighted = (corrected.log_weights.exp()[:, None] * corrected.z).sum(0)
    torch.testing.assert_close(drawn["theta"].double().mean(0), weighted, atol=0.02, rtol=0)


def test_resample_refuses_weights_that_cannot_be_relied_on(by_status):
    with pytest.raises(ValueError, match=r"resample: the importance weights cannot be relied on \(k-hat .*force=True"):
        by_status["unreliable"].resample()
    with pytest.warns(pf.UnreliableWarning):
        assert by_status["unreliable"].resample(10, force=True)["theta"].shape == (10, SCHOOLS)


def test_resample_refuses_where_runs_disagree():
    density = pf.LogDensity(schools, (Y,))
    base = dist.Normal(0.8 * Y, SPREAD).to_event(1)

    def draw(n):
        z = base.sample((n,))
        return z, base.log_prob(z)

    nothing = torch.zeros(0)
    posterior = from_draws(density, draw, draws=500, seed=0, guide=None, losses=nothing, failures=["runs disagree"])
    assert posterior.verdict.status == "unreliable"
    with pytest.raises(ValueError, match="runs disagree"):
        posterior.resample()


def test_verdict_rests_on_a_pool_of_four_times_the_draws():
    """Only the later draws are far too narrow: the verdict sees them, though ``z`` does not hold them."""
    density = pf.LogDensity(schools, (Y,))
    asked = []

    def draw(n):
        asked.append(n)
        scale = torch.full((n, 1), SPREAD)
        scale[500:] *= 0.2
        base = dist.Normal(0.8 * Y, scale).to_event(1)
        z = base.sample()
        return z, base.log_prob(z)

    posterior = from_draws(density, draw, draws=500, seed=0, guide=None, losses=torch.zeros(0))
    assert asked == [2000]
    assert posterior.z.shape == (500, SCHOOLS)
    torch.testing.assert_close(posterior.log_weights.exp(), torch.full((500,), 1 / 500).double())  # these are exact
    assert posterior.verdict.status != "ok"
    assert posterior.verdict.ess_ratio < 0.5


def test_weights_without_a_tail_to_fit():
    equal, k_hat = psis(1e-5 * torch.randn(1000))
    assert k_hat == 0.0
    torch.testing.assert_close(equal.exp(), torch.full((1000,), 1e-3).double(), rtol=1e-3, atol=0)
    two_values, k_hat = psis(torch.where(torch.arange(2000) < 500, 0.0, -10.0))  # bounded
    assert k_hat == 0.0
    assert float(two_values.exp().sum()) == pytest.approx(1.0)


def test_weights_with_other_ties_are_not_admissible():
    """The lower half of the tail is one value: its shape cannot be told."""
    values = torch.zeros(2000)
    values[:60] = torch.linspace(1.0, 3.0, 60)
    values[500:] = -5.0
    log_weights, k_hat = psis(values)
    assert torch.isfinite(log_weights).all()
    assert k_hat == math.inf


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, 0.9995])
def test_draws_of_weight_zero_stay_at_zero(share):
    broken = torch.rand(2000) < share
    broken[0] = False
    log_weights, k_hat = psis(torch.where(broken, -torch.inf, torch.randn(2000)))
    assert (log_weights[broken] == -torch.inf).all()
    assert torch.isfinite(log_weights[~broken]).all()
    assert float(log_weights.exp().sum()) == pytest.approx(1.0)
    assert not math.isnan(k_hat)


@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
def test_a_guide_wider_than_a_uniform_posterior_is_mended():
    """All weights are one or zero; two thirds are zero."""

    def model():
        pyro.sample("x", dist.Uniform(0.0, 1.0))

    def guide():
        pyro.sample("x", dist.Uniform(-1.0, 2.0))

    posterior = pf.diagnose(model, guide, draws=1000)
    assert posterior.verdict.status == "corrected"
    assert posterior.log_evidence == pytest.approx(0.0, abs=0.1)
    assert float(posterior.samples["x"].mean()) == pytest.approx(0.5, abs=0.05)


# predictive draws -----------------------------------------------------------------------------------------------------


def test_predictive_at_the_data_of_the_fit(by_status):
    drawn = by_status["ok"].predictive()
    assert set(drawn) == {"y"}
    assert drawn["y"].shape == (2000, SCHOOLS)
    # y_i | y ~ N(0.8 y_i, sqrt 1.8); 8 means at 5 standard errors: fails once in 200 000 seeds
    assert ((drawn["y"].mean(0) - 0.8 * Y) / (1.8 / 2000) ** 0.5).abs().max() < 5
    assert float(drawn["y"].var(0).mean()) == pytest.approx(1.8, rel=0.06)
    noise = drawn["y"] - by_status["ok"].samples["theta"]  # of the same seed as the posterior's draws, but its own
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), by_status["ok"]._used.flatten()]))[0, 1])) < 0.05
    assert torch.equal(drawn["y"], by_status["ok"].predictive()["y"])
    assert not torch.equal(drawn["y"], by_status["ok"].predictive(seed=1)["y"])
    assert by_status["ok"].predictive(draws=7)["y"].shape == (7, SCHOOLS)


def test_predictive_leaves_the_random_state(by_status):
    before = torch.get_rng_state()
    by_status["ok"].predictive(draws=5)
    by_status["ok"].resample(5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture(scope="module")
def fitted_line():
    x = torch.linspace(0.1, 1.0, 20)
    y = 2.0 * x + 0.1 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    return exact(line, line_guide, x, y)


@pytest.mark.parametrize("call", ["positional", "keyword"])
def test_predictive_at_new_data(fitted_line, call):
    x = torch.tensor([2.0, 3.0, 4.0])
    options = {"model_kwargs": {"x": x}} if call == "keyword" else {}
    drawn = fitted_line.predictive(*([] if call == "keyword" else [x]), draws=500, **options)
    assert {name: tuple(values.shape) for name, values in drawn.items()} == {"y": (500, 3), "mean": (500, 3)}
    slope = fitted_line.samples["slope"][:500]
    torch.testing.assert_close(drawn["mean"], slope[:, None] * x)
    noise = drawn["y"] - drawn["mean"]
    assert noise.std() == pytest.approx(0.1, rel=0.1)
    assert abs(float(torch.corrcoef(noise.T)[0, 1])) < 0.2


def test_predictive_draws_observed_values_anew_at_new_data(fitted_line):
    x = torch.tensor([2.0, 3.0])
    drawn = fitted_line.predictive(x, torch.tensor([100.0, 100.0]), draws=50)
    assert drawn["y"].max() < 10


def test_predictive_says_what_does_not_fit(by_status, fitted_line):
    with pytest.raises(ValueError, match=r"draws: expected at most 2000, the draws that there are, got 2001"):
        by_status["ok"].predictive(draws=2001)

    def growing(y):
        with pyro.plate("unit", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    posterior = any_posterior(growing, torch.zeros(3))
    with pytest.raises(ValueError, match=r"site 'theta': shape \(3,\) in the fit, \(5,\) with these arguments"):
        posterior.predictive(torch.zeros(5))

    def changing(centered):
        pyro.sample("mu" if centered else "nu", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"site 'mu': a latent of the fit, but not one of the model"):
        any_posterior(changing, True).predictive(False)


def test_predictive_repeats_a_scalar_distribution_for_each_observation():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)  # no plate: one distribution for five values

    drawn = any_posterior(model, torch.zeros(5)).predictive()["y"]
    assert drawn.shape == (200, 5)
    assert (drawn[:, 0] != drawn[:, 1]).all()


# how it prints --------------------------------------------------------------------------------------------------------


def test_text_names_sites_and_gives_the_verdict(by_status):
    text = str(by_status["corrected"])
    first, second = text.splitlines()
    assert first.startswith(
        "Posterior of theta, double: guide, 2000 draws, 8 unconstrained coordinates, log evidence -"
    )
    assert second == str(by_status["corrected"].verdict)
    assert repr(by_status["corrected"]) == text


def test_html_is_a_table_with_the_verdict_and_a_bound_on_rows(by_status):
    page = by_status["ok"]._repr_html_()
    assert "ok</b>: guide (k-hat" in page
    assert page.count("<tr") == 1 + 2 * SCHOOLS

    def model():
        with pyro.plate("many", 50):
            pyro.sample("a<b", dist.Normal(0.0, 1.0))

    page = any_posterior(model)._repr_html_()
    assert page.count("<tr") == 1 + ROWS_SHOWN
    assert "and 20 more rows" in page
    assert "a<b" not in page


def test_nothing_can_be_changed(by_status):
    with pytest.raises(dataclasses.FrozenInstanceError):
        by_status["ok"].k_hat = 0.1
    with pytest.raises(ValueError, match=r"draws: expected an integer >= 100, got 10"):
        pf.diagnose(location, location, torch.zeros(3), draws=10)
