"""Observed values outside of the likelihood's support, supports that move, and models that observe nothing."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms
from pyro.infer import autoguide, config_enumerate

import pyro_flows as pf
from pyro_flows.inference.starts import portfolio

real = torch.tensor
ones = torch.ones
PAIR = dist.Categorical(real([0.4, 0.6]))


def shifted(rate, start):
    return dist.TransformedDistribution(dist.Exponential(rate), transforms.AffineTransform(start, 1.0))


# the likelihood of a rate, values of which the second event is impossible, and possible ones
LIKELIHOODS = {
    "exponential": (dist.Exponential, [1.0, -0.4], [1.0, 0.0]),
    "gamma": (lambda r: dist.Gamma(r, 1.0), [1.0, -0.4], [1.0, 0.2]),
    "inverse gamma": (lambda r: dist.InverseGamma(r, 1.0), [1.0, -0.4], [1.0, 0.2]),
    "weibull": (lambda r: dist.Weibull(r, real(1.0)), [1.0, -0.4], [1.0, 0.2]),
    "log-normal": (lambda r: dist.LogNormal(r, 1.0), [1.0, -0.4], [1.0, 0.2]),
    "half-normal": (dist.HalfNormal, [1.0, -0.4], [1.0, 0.2]),
    "half-Cauchy": (dist.HalfCauchy, [1.0, -0.4], [1.0, 0.2]),
    "chi-squared": (dist.Chi2, [1.0, -0.4], [1.0, 0.2]),
    "F": (lambda r: dist.FisherSnedecor(r, real(2.0)), [1.0, -0.4], [1.0, 0.2]),
    "folded": (lambda r: dist.FoldedDistribution(dist.Normal(r, 1.0)), [1.0, -0.4], [1.0, 0.2]),
    "Pareto": (lambda r: dist.Pareto(real(1.0), r), [2.0, 0.4], [1.5, 1.1]),
    "generalized Pareto": (lambda r: dist.GeneralizedPareto(real(0.0), r, real(0.3)), [2.0, -0.4], [1.5, 1.1]),
    "beta": (lambda r: dist.Beta(r, 1.0), [0.5, 1.4], [0.5, 0.1]),
    "beta on an interval": (lambda r: dist.AffineBeta(r, real(1.0), 0.0, 2.0), [0.5, 2.4], [0.5, 1.1]),
    "Kumaraswamy": (lambda r: dist.Kumaraswamy(r, real(1.0)), [0.5, 1.4], [0.5, 0.1]),
    "continuous Bernoulli": (lambda r: dist.ContinuousBernoulli(logits=r), [0.5, 1.4], [0.5, 0.1]),
    "uniform": (lambda r: dist.Uniform(0.0 * ones(2), 2.0), [0.5, 2.4], [0.5, 0.1]),
    "Bernoulli": (lambda r: dist.Bernoulli(logits=r), [1.0, 2.0], [1.0, 0.0]),
    "binomial": (lambda r: dist.Binomial(real([5.0, 3.0]), logits=r), [4.0, 4.0], [4.0, 3.0]),
    "beta-binomial": (lambda r: dist.BetaBinomial(r, real(1.0), 5), [5, 6], [5, 0]),
    "Poisson": (dist.Poisson, [1.0, 2.5], [1.0, 2.0]),
    "Poisson of whole numbers": (dist.Poisson, [1, -2], [1, 2]),
    "geometric": (lambda r: dist.Geometric(logits=r), [1.0, 2.5], [1.0, 2.0]),
    "negative binomial": (lambda r: dist.NegativeBinomial(r, real(0.3)), [1.0, 2.5], [1.0, 2.0]),
    "gamma-Poisson": (lambda r: dist.GammaPoisson(r, real(0.3)), [1.0, 2.5], [1.0, 2.0]),
    "zero-inflated Poisson": (lambda r: dist.ZeroInflatedPoisson(r, gate=real(0.3)), [1.0, 2.5], [1.0, 2.0]),
    "zero-inflated": (
        lambda r: dist.ZeroInflatedNegativeBinomial(r, probs=real(0.3), gate=real(0.3)), [1.0, -2.0], [1.0, 2.0],
    ),
    "categorical": (lambda r: dist.Categorical(logits=r * ones(3)), [1, 3], [2, 0]),
    "one-hot": (lambda r: dist.OneHotCategorical(logits=r * ones(3)), [[1, 0, 0], [1, 1, 0]], [[1, 0, 0], [0, 1, 0]]),
    "multinomial": (
        lambda r: dist.Multinomial(4, logits=r * ones(3)), [[1.0, 3, 0], [1, -1, 4]], [[1.0, 3, 0], [0, 1, 3]],
    ),
    "parts of counts": (
        lambda r: dist.Multinomial(4, logits=r * ones(3)), [[1.0, 3, 0], [1.5, 1.5, 1]], [[1.0, 3, 0], [0, 1, 3]],
    ),
    "Dirichlet-multinomial": (
        lambda r: dist.DirichletMultinomial(r * ones(3), 4), [[1.0, 3, 0], [1, -1, 4]], [[1.0, 3, 0], [0, 1, 3]],
    ),
    "Dirichlet": (lambda r: dist.Dirichlet(r * ones(2)), [[0.4, 0.6], [0.5, 0.6]], [[0.4, 0.6], [0.5, 0.50001]]),
    "LKJ": (
        lambda r: dist.LKJCholesky(2, r),
        [[[1.0, 0], [0, 1]], [[1, 0], [0.5, 0.5]]], [[[1.0, 0], [0, 1]], [[1, 0], [0.6, 0.8]]],
    ),
    "Wishart": (
        lambda r: dist.Wishart(r + 2, torch.eye(2)),
        [[[1.0, 0], [0, 1]], [[1, 2], [2, 1]]], [[[1.0, 0], [0, 1]], [[1, 0.5], [0.5, 1]]],
    ),
    "ordered": (lambda r: dist.OrderedLogistic(r, real([0.0, 1.0])), [1, 3], [2, 0]),
    "Polya-gamma": (lambda r: dist.TruncatedPolyaGamma(0.0 * r), [1.0, -1.0], [1.0, 0.5]),
    "relaxed": (lambda r: dist.RelaxedBernoulli(real(0.5), logits=r), [0.3, 1.2], [0.3, 0.2]),
    "sphere": (
        lambda r: dist.VonMises3D(r * real([1.0, 0, 0])), [[1.0, 0, 0], [1, 1, 0]], [[1.0, 0, 0], [0, 0.6, 0.8]],
    ),
    "shifted exponential": (lambda r: shifted(r, 3.0), [4.0, 1.0], [4.0, 3.5]),
    "events": (lambda r: dist.Exponential(r * ones(2)).to_event(1), [[4.0, 1], [1, -1]], [[4.0, 1], [1, 1]]),
    "mixture": (lambda r: dist.MixtureSameFamily(PAIR, dist.Gamma(r * ones(2), 1.0)), [4.0, -1.0], [4.0, 1.0]),
    "mixture with a gap": (
        lambda r: dist.MixtureSameFamily(PAIR, dist.Uniform(real([0.0, 2.0]), real([1.0, 3.0]))),
        [0.4, 1.5], [0.4, 2.5],
    ),
}  # fmt: skip


def observing(likelihood):
    def model(y):
        rate = pyro.sample("rate", dist.LogNormal(real(0.0), 0.3))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", likelihood(rate), obs=y)

    return model


# torch's Wishart branches on its parameters, so it is scored draw by draw
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.falls_back if name == "Wishart" else ()) for name in LIKELIHOODS]
)
def test_impossible_values_are_refused_and_possible_ones_taken(name):
    likelihood, bad, good = LIKELIHOODS[name]
    with pytest.raises(ValueError, match=r"site 'y': expected .* the support of .*, got 1 of \d .*outside .*y\[1.*= "):
        pf.LogDensity(observing(likelihood), (real(bad),))
    density = pf.LogDensity(observing(likelihood), (real(good),))
    assert torch.isfinite(density(torch.zeros(1, 1))).all()


def test_a_mixture_by_a_mask_has_the_support_that_the_mask_says():
    """The normal one takes -1, the exponential one does not."""
    mask = real([True, False])
    model = observing(lambda rate: dist.MaskedMixture(mask, dist.Normal(0.0, rate), dist.Exponential(rate)))
    assert torch.isfinite(pf.LogDensity(model, (real([1.0, -1.0]),))(torch.zeros(1, 1))).all()
    with pytest.raises(ValueError, match=r"y\[0\] = -1"):
        pf.LogDensity(model, (real([-1.0, 1.0]),))


@pytest.mark.filterwarnings("ignore::pyro_flows.UnreliableWarning")  # the guide is not trained
def test_every_door_refuses_and_names_the_worst_entries(tmp_path):
    model, bad = observing(dist.Exponential), real([0.5, -0.1, -3.0, 2.0, -0.2, -7.0])
    message = r"got 4 of 6 outside of it: y\[5\] = -7, y\[2\] = -3, y\[4\] = -0.2, \.\.\.\. .*obs_mask=.*validate_args"
    guide = autoguide.AutoNormal(model)
    good = bad.abs()
    with pytest.raises(ValueError, match=message):
        pf.fit(model, bad, progress=False)
    with pytest.raises(ValueError, match=message):
        pf.diagnose(model, guide, bad)
    pf.diagnose(model, guide, good, draws=100).save(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        pf.load(tmp_path / "saved", model, bad)


@pytest.mark.parametrize("value", ["masked site", "masked distribution", "masked events", "obs_mask"])
def test_entries_that_are_masked_out_may_be_anything(value):
    y = real([1.0, -4.0, math.nan, 2.0])
    keep = real([True, False, False, True])

    def model():
        rate = pyro.sample("rate", dist.LogNormal(real(0.0), 0.3))
        gamma = dist.Gamma(2.0 * ones(4), rate)
        with pyro.plate("rows", 4):
            if value == "masked site":
                with poutine.mask(mask=keep):
                    pyro.sample("y", gamma, obs=y)
            elif value == "masked distribution":
                pyro.sample("y", gamma.mask(keep), obs=y)
            elif value == "obs_mask":
                pyro.sample("y", gamma, obs=y, obs_mask=keep)
        if value == "masked events":
            pyro.sample("y", gamma.mask(keep).to_event(1), obs=y)

    density = pf.LogDensity(model)
    log_p, grad = density.value_and_grad(torch.zeros(1, density.dim))
    assert torch.isfinite(log_p).all()
    assert torch.isfinite(grad).all()
    if value != "obs_mask":
        expected = dist.LogNormal(0.0, 0.3).log_prob(real(1.0)) + dist.Gamma(2.0, 1.0).log_prob(y[keep]).sum()
        torch.testing.assert_close(log_p[0], expected)


@pytest.mark.parametrize("everywhere", [True, False])
def test_validate_args_false_is_respected_where_a_distribution_says_so(everywhere):
    """A setting of the whole process is none of the distribution's, though plates hand it on to the distributions."""
    y = real([1.0, 2.5])
    with pyro.validation_enabled(everywhere):
        pf.LogDensity(observing(lambda rate: dist.Poisson(rate, validate_args=False)), (y,))
        with pytest.raises(ValueError, match=r"y\[1\] = 2.5"):
            pf.LogDensity(observing(dist.Poisson), (y,))


# supports that move ---------------------------------------------------------------------------------------------------

MOVING = {
    "uniform": (lambda t: dist.Uniform(0.0, t), lambda t, y: -len(y) * t.log(), lambda t, y: y.max() < t),
    "Pareto": (
        lambda t: dist.Pareto(t, real(2.0)),
        lambda t, y: (math.log(2.0) + 2 * t.log() - 3 * y.log()).sum(),
        lambda t, y: y.min() >= t,
    ),
    "shifted exponential": (lambda t: shifted(1.0, t), lambda t, y: (t - y).sum(), lambda t, y: y.min() >= t),
    "negative binomial counts": (
        lambda t: dist.Binomial(t.ceil(), real(0.5)), lambda t, y: dist.Binomial(t.ceil(), 0.5).log_prob(y).sum(),
        lambda t, y: y.max() <= t.ceil(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVING)
def test_a_support_that_moves_refuses_no_data_and_has_no_density_outside(name):
    """Whatever the first run's latent is: data that lie outside there may lie inside elsewhere."""
    likelihood, log_density, allowed = MOVING[name]
    y = real([2.0, 3.0, 5.0])

    def model(y):
        t = pyro.sample("t", dist.HalfNormal(real(1.0)))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", likelihood(t), obs=y)

    density = pf.LogDensity(model, (y,))
    z = torch.linspace(-2.0, 4.0, 25)[:, None]
    found, grad = density.value_and_grad(z)
    seen = set()
    for row, value, slope in zip(z, found, grad, strict=True):
        t = row[0].exp()
        seen.add(bool(allowed(t, y)))
        if allowed(t, y):
            expected = dist.HalfNormal(1.0).log_prob(t) + t.log() + log_density(t, y)
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
            assert torch.isfinite(slope).all()
        else:
            assert value == -torch.inf
    assert seen == {True, False}


def test_a_value_that_moves_is_kept_inside_too():
    def model(y):
        start = pyro.sample("start", dist.Normal(real(0.0), 5.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("waiting", dist.Exponential(1.0), obs=y - start)

    density = pf.LogDensity(model, (real([2.0, 3.0]),))
    assert torch.isfinite(density(real([[1.9]]))).all()
    assert density(real([[2.1]])) == -torch.inf


def test_data_that_no_latent_allows_are_named_with_entry():
    def model(y):
        end = pyro.sample("end", dist.Uniform(real(0.0), 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Uniform(0.0, end), obs=y)

    with pytest.raises(ValueError, match=r"site 'y' has log density -inf, from \d of 3 values: .*y\[1\] = 1.5"):
        pf.fit(model, real([0.001, 1.5, 0.002]), progress=False)


def test_supports_of_enumerated_models():
    """The bound follows from a discrete latent; the other state allows the data, and the sum is exact."""
    bounds = real([1.0, 4.0])

    @config_enumerate
    def model(y):
        p = pyro.sample("p", dist.Beta(real(1.0), 1.0))
        k = pyro.sample("k", dist.Bernoulli(p)).long()
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Pareto(bounds[k], 2.0), obs=y)

    y = real([2.0, 3.0])
    density = pf.LogDensity(model, (y,))
    expected = math.log(0.25) + math.log(0.5) + dist.Pareto(1.0, 2.0).log_prob(y).sum()
    torch.testing.assert_close(density(torch.zeros(1, 1))[0], expected)
    with pytest.raises(ValueError, match="y"):
        portfolio.portfolio(pf.LogDensity(model, (y - 1.9,)), seed=0)


def test_a_conditioned_model_and_one_with_factors_alone():
    def model():
        rate = pyro.sample("rate", dist.LogNormal(real(0.0), 0.3))
        pyro.sample("y", dist.Exponential(rate))

    with pytest.raises(ValueError, match="y = -1"):
        pf.LogDensity(poutine.condition(model, data={"y": real(-1.0)}))

    def scored():
        rate = pyro.sample("rate", dist.LogNormal(real(0.0), 0.3))
        pyro.factor("y", dist.Exponential(rate, validate_args=False).log_prob(real(-1.0)))

    assert pf.LogDensity(scored).dim == 1


# nothing observed -----------------------------------------------------------------------------------------------------


def forgetful(y):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
    with pyro.plate("groups", 2):
        pyro.sample("effect", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0))


def heard(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [warning for warning in caught if issubclass(warning.category, pf.NothingObservedWarning)]


@pytest.mark.slow
def test_a_forgotten_obs_is_said_once_at_the_line_of_the_user():
    guide = autoguide.AutoNormal(forgetful)
    for call in (
        lambda: pf.diagnose(forgetful, guide, ones(4), draws=100),
        lambda: pf.fit(forgetful, ones(4), progress=False, max_steps=1, draws=100, escalate=False),
    ):
        (warning,) = heard(call)
        said = str(warning.message)
        assert "nothing is observed" in said
        assert "'y' (of the length of y)" in said
        assert "'effect'" not in said
        assert "'mu'" not in said
        assert warning.filename == __file__


@pytest.mark.parametrize("kind", ["observed", "factor", "condition"])
def test_models_that_observe_something_are_not_warned_of(kind):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
        pyro.sample("other", dist.Normal(mu, 1.0), obs=real(1.0) if kind == "observed" else None)
        if kind == "factor":
            pyro.factor("penalty", -(mu**2))

    run = poutine.condition(model, data={"other": real(1.0)}) if kind == "condition" else model
    guide = autoguide.AutoNormal(run)
    assert not heard(lambda: pf.diagnose(run, guide, ones(3), draws=100))


def test_a_prior_on_purpose_is_silenced_by_class():
    def model():
        pyro.sample("x", dist.Normal(real(0.0), 1.0))

    (warning,) = heard(lambda: pf.diagnose(model, autoguide.AutoNormal(model), draws=100))
    assert "look like data" not in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", pf.NothingObservedWarning)
        pf.diagnose(model, autoguide.AutoNormal(model), draws=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pf.LogDensity(model)
