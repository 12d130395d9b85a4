"""Mistakes are met at the door: before any work, by name, with a remedy."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_value
from pyro.infer.reparam import ProjectedNormalReparam

import pyro_flows as pf
from pyro_flows.inference.starts import portfolio
from tests.models import NAN, normal, real

Y = real(0.3, 1.2, -0.4)


def good(y):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def bad_model(body):
    """A model of a latent ``mu``, data ``y`` and whatever ``body`` adds."""

    def model(y):
        good(y)
        body()

    return model


MODELS = {
    "discrete": (
        lambda: pyro.sample("k", dist.Categorical(torch.ones(2))),
        r"site 'k': expected a continuous latent, got the discrete Categorical. Enumerate it .*hide=\['k'\]",
    ),
    "discrete in a plate": (
        lambda: pyro.sample("counts", dist.Poisson(real(2.0)).expand([3]).to_event(1)),
        "site 'counts': expected a continuous latent, got the discrete",
    ),
    "enumerated, without end": (
        lambda: pyro.sample("k", dist.Poisson(real(2.0)), infer={"enumerate": "parallel"}),
        "site 'k': expected finitely many values to be summed over, got the Poisson",
    ),
    "no density": (
        lambda: pyro.sample(
            "share",
            dist.TransformedDistribution(
                dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.SoftmaxTransform()]
            ),
        ),
        "site 'share': expected a prior with a density, got a TransformedDistribution without one.*StickBreaking",
    ),
    "sphere": (
        lambda: pyro.sample("direction", dist.ProjectedNormal(torch.ones(3))),
        r"site 'direction': no bijection .* support Sphere.*poutine.reparam",
    ),
    "times": (
        lambda: pyro.sample("times", dist.CoalescentTimes(torch.zeros(3))),
        r"site 'times': no bijection .* support .*oalescentTimesConstraint",
    ),
    "delta": (
        lambda: pyro.sample("fixed", dist.Delta(real(1.0))),
        r"site 'fixed': a Delta is a fixed value.*pyro.deterministic\('fixed'",
    ),
    "NaN in the data": (
        lambda: pyro.sample("more", dist.Normal(real(0.0, 0.0), 1.0).to_event(1), obs=real(1.0, NAN)),
        "site 'more': 1 of 1 observed values are NaN. Drop them, or mark them as missing with obs_mask=",
    ),
    "data that are no tensor": (
        lambda: pyro.sample("more", dist.Normal(real(0.0), 1.0), obs=np.array(1.0)),
        "site 'more': expected a tensor as obs=, got a ndarray. Use torch.as_tensor",
    ),
}
DOORS = {
    "LogDensity": lambda model, *args: pf.LogDensity(model, args),
    "guide": lambda model, *args: pf.AutoRealNVP(model).initialize(*args),
    "guide in use": lambda model, *args: pf.AutoRealNVP(model)(*args),
    "fit": lambda model, *args: pf.fit(model, *args, progress=False, max_steps=10),
}
each_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


@each_door
@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_fitted(name, door):
    body, message = MODELS[name]
    with pytest.raises(ValueError, match=message):
        door(bad_model(body), Y)


@each_door
def test_models_without_latents(door):
    def model(y):
        pyro.sample("y", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"at least one continuous latent site .*, got none. Sites seen: 'y'"):
        door(model, Y)
    with pytest.raises(ValueError, match=r"got none\. Sites seen: none"):
        door(lambda y: None, Y)


def test_a_nan_is_counted_only_where_it_is_observed():
    y = real([[1.0, NAN], [2.0, 3.0], [NAN, NAN]])

    def model(y, mask):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
        with pyro.plate("n", 3), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(mu, 1.0).expand([2]).to_event(1), obs=y)

    with pytest.raises(ValueError, match="site 'y': 2 of 3 observed values are NaN"):
        pf.LogDensity(model, (y, torch.tensor([True, True, True])))
    with pytest.raises(ValueError, match="site 'y': 1 of 3 observed values are NaN"):
        pf.LogDensity(model, (y, torch.tensor([True, True, False])))
    for mask in (torch.tensor([False, True, False]), False):
        assert torch.isfinite(pf.LogDensity(model, (y, mask)).value_and_grad(real([[0.3]]))[1]).all()


@pytest.mark.falls_back
def test_a_reparametrized_site_is_accepted():
    """What the message recommends."""

    def model():
        pyro.sample("angle", dist.ProjectedNormal(torch.ones(2, dtype=torch.float64)))

    reparametrized = poutine.reparam(model, {"angle": ProjectedNormalReparam()})
    density = pf.LogDensity(reparametrized)
    assert density.dim == 2
    assert density.constrain(normal(3, 2, seed=91))["angle"].shape == (3, 2)


@pytest.mark.falls_back
def test_latents_that_come_and_go():
    """At construction if a probe sees it, at evaluation otherwise; never silently."""

    def model(border):
        x = pyro.sample("x", dist.Normal(real(0.0), 1.0))
        if x > border:
            pyro.sample("above", dist.Normal(real(0.0), 1.0))
        else:
            pyro.sample("below", dist.Normal(real(0.0), 1.0))

    for border, name in ((-4.0, "below"), (4.0, "above")):
        density = pf.LogDensity(model, (border,))
        far = real([[2.0 * border, 0.0]])
        for evaluate in (density, density.value_and_grad, density.constrain):
            with pytest.raises(
                ValueError, match=f"site '{name}': a latent that is there for some values of the others"
            ):
                evaluate(far)
    with pytest.raises(ValueError, match="a latent that is there for some values of the others only"):
        pf.LogDensity(model, (0.0,))

    def vanishing(y):
        x = pyro.sample("x", dist.Normal(real(0.0), 1.0))
        if x < 2.0:
            pyro.sample("sometimes", dist.Normal(real(0.0), 1.0))

    with pytest.raises(ValueError, match="site 'sometimes': a latent that is there for some values"):
        pf.LogDensity(vanishing, (Y,))(real([[3.0, 0.0]]))


def test_random_densities():
    def model(y):
        x = pyro.sample("x", dist.Normal(real(0.0), 1.0))
        pyro.factor("noise", x * torch.randn((), dtype=torch.float64))

    with pytest.raises(ValueError, match=r"model: its log density is random, .* Take random numbers out of the model"):
        pf.LogDensity(model, (Y,))


def test_starting_values_of_the_wrong_shape():
    """Pyro's guides would tie the entries of such a site together."""

    def model(y):
        with pyro.plate("n", 3):
            x = pyro.sample("x", dist.Normal(real(0.0), 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    guide = pf.AutoRealNVP(model, init_loc_fn=init_to_value(values={"x": real(0.0)}))
    with pytest.raises(ValueError, match=r"site 'x': expected a starting value of shape \(3,\), got \(\)"):
        guide(Y)


# densities that are finite nowhere -----------------------------------------------------------------------------------


def impossible(y):
    rate = pyro.sample("rate", dist.Normal(real(0.0), 1.0))
    pyro.sample("counts", dist.Uniform(0.0, 1.0 + rate.sigmoid()), obs=y[0] + 7.0)


def undefined(y):
    rate = pyro.sample("rate", dist.Normal(real(0.0), 1.0))
    pyro.factor("penalty", (-1.0 - rate**2).log())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (impossible, "site 'counts' has log density -inf, from 1 of 1 values: counts = "),
        (undefined, "site 'penalty' has log density nan"),
    ],
)
def test_densities_that_are_finite_nowhere(model, message):
    """Without Pyro's own checks, which find NaN in the first run."""
    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match=f"log density: not finite at any of 200 draws of the prior.*{message}"):
            portfolio.portfolio(pf.LogDensity(model, (Y,)), seed=0)
        with pytest.raises(ValueError, match=message):
            pf.fit(model, Y, progress=False, max_steps=10)


def test_pyros_checks_are_on_in_the_first_run():
    """An invalid parameter can have a finite density: nobody would find out later."""

    def model(y):
        good(y)
        pyro.sample("share", dist.Beta(real(-0.5), 2.0), obs=real(0.3))

    assert torch.isfinite(dist.Beta(real(-0.5), 2.0, validate_args=False).log_prob(real(0.3)))
    for case, message in ((model, "Expected parameter"), (undefined, "log_factor: nan")):
        for door in DOORS.values():
            with pytest.raises(ValueError, match=message):
                door(case, Y)


def test_a_density_that_is_infinite_for_some_starts_is_fitted():
    """Zero, where the search begins, is impossible here; draws from the prior are not."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(5.0), 1.0))
        pyro.factor("above", torch.where(mu > 3.0, 0.0, -torch.inf))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[1])

    starts = portfolio.portfolio(pf.LogDensity(model, (Y,)), seed=0)
    assert starts
    assert all(torch.isfinite(real(start.elbo)) for start in starts)


def test_a_failed_fit_leaves_the_random_state_and_the_store_alone():
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="discrete"):
        pf.fit(bad_model(MODELS["discrete"][0]), Y, progress=False)
    with pytest.raises(ValueError, match="layers"):
        pf.fit(good, Y, layers=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not len(pyro.get_param_store())
