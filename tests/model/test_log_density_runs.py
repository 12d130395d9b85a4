"""How a log density is run: batched, recorded or point by point, and what it says when something is wrong."""

import inspect
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_flows as pf
from tests.invariants import close
from tests.models import CASES, gauss, nested, normal, real
from tests.registry import RECORDED_FROM

Y = real(1.0)


def numbers(y):
    """Priors written with plain numbers: float32 in Pyro, whatever the data."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("n", 3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


# models that cannot be batched ---------------------------------------------------------------------------------------


def takes_item(y):
    x = pyro.sample("x", dist.Normal(real(0.0), 1.0))
    pyro.sample("y", dist.Normal(x, 1.0 + x.detach().abs().item()), obs=y)


def branches(y):
    x = pyro.sample("x", dist.Normal(real(0.0), 1.0))
    pyro.sample("y", dist.Normal(x, 1.0) if x > 0 else dist.Normal(-x, 2.0), obs=y)


def to_numpy(y):
    x = pyro.sample("x", dist.Normal(real(0.0), 1.0))
    pyro.sample("y", dist.Normal(x, torch.as_tensor(np.exp(x.detach().numpy()))), obs=y)


def line_in(model):
    """The last line of a model, which is the one that cannot be batched."""
    return model.__code__.co_firstlineno + len(inspect.getsource(model).splitlines()) - 1


FALLING_BACK = {
    "item": (takes_item, lambda x: gauss(x, 0.0, 1.0) + gauss(Y, x, 1.0 + x.detach().abs())),
    "branch": (branches, lambda x: gauss(x, 0.0, 1.0) + (gauss(Y, x, 1.0) if x > 0 else gauss(Y, -x, 2.0))),
    "numpy": (to_numpy, lambda x: gauss(x, 0.0, 1.0) + gauss(Y, x, x.detach().exp())),
}


@pytest.mark.falls_back
@pytest.mark.parametrize("name", FALLING_BACK)
def test_models_that_cannot_be_batched_give_the_same_values(name):
    model, by_hand = FALLING_BACK[name]
    density = pf.LogDensity(model, (Y,))
    assert not density.batched
    assert density.reason.startswith("not batched: RuntimeError")
    assert f"({__name__.rpartition('.')[2]}.py, line {line_in(model)}: `pyro.sample(" in density.reason
    z = real(-1.3, -0.2, 0.4, 2.0)[:, None].requires_grad_()
    expected = torch.stack([by_hand(x) for x in z[:, 0]])
    (gradient,) = torch.autograd.grad(expected.sum(), z)
    close(density(z), expected, 1e-12)
    value, ours = density.value_and_grad(z)
    close(value, expected.detach(), 1e-12)
    close(ours, gradient, 1e-12)
    close(density.unconstrain(density.constrain(z)), z.detach(), 1e-12)
    assert density.predictive(z)["y"].shape == (4,)
    assert density.prior(3)["x"].shape == (3,)


def test_constrained_values_of_a_model_with_many_rows_come_from_a_graph_without_its_data():
    runs = []

    def model(x, y):
        runs.append(None)
        scale = pyro.sample("scale", dist.HalfNormal(real(1.0)))
        slope = pyro.sample("slope", dist.Uniform(-scale, scale))
        pyro.deterministic("ratio", slope / scale)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(slope * x, scale), obs=y)

    x = torch.linspace(-1.0, 1.0, 100_000).double()
    density = pf.LogDensity(model, (x, x))
    z = torch.linspace(-2.0, 2.0, 200).double().reshape(100, 2)
    found = density.constrain(z)
    runs.clear()
    again = density.constrain(z.flip(0))
    assert not runs
    scale = z[:, 0].exp()
    for values in (found, {name: value.flip(0) for name, value in again.items()}):
        close(values["scale"], scale, 1e-12)
        close(values["ratio"], 2.0 * torch.sigmoid(z[:, 1]) - 1.0, 1e-12)
        close(values["slope"], scale * values["ratio"], 1e-12)
    density.forget()
    density.constrain(z)
    assert runs


@pytest.mark.falls_back
def test_recorded_constants_are_found_out():
    """A model that returns other numbers each time it runs cannot be replayed; the check at new points sees it."""
    state = {"runs": 0}

    def model(y):
        state["runs"] += 1
        x = pyro.sample("x", dist.Normal(real(0.0), 1.0))
        pyro.factor("drift", 0.0 * x if state["runs"] < 9 else state["runs"] * x)

    density = pf.LogDensity(model, (Y,))
    assert density.batched
    for _ in range(RECORDED_FROM):
        density.value_and_grad(normal(3, 1, seed=32))
    assert density.reason == "not recorded: the graph gave other values at new points"


# words ---------------------------------------------------------------------------------------------------------------


def test_explain_names_the_site():
    def model(y):
        rate = pyro.sample("rate", dist.HalfNormal(real(1.0)))
        with poutine.mask(mask=False):
            pyro.sample("unused", dist.Uniform(real(0.0), 1.0), obs=real(2.0))
        pyro.sample("fine", dist.Normal(rate, 1.0), obs=y)
        pyro.sample("counts", dist.Uniform(real(0.0), rate.detach()), obs=y + 100.0)

    density = pf.LogDensity(model, (Y,))
    said = density.explain(real([0.0]))
    assert said == f"site 'counts' has log density -inf, from 1 of 1 values: counts = {float(Y + 100.0):.6g}"
    assert pf.LogDensity(nested, (normal(3, 4, seed=1),)).explain(torch.zeros(16, dtype=torch.float64)).startswith(
        "log Jacobian"
    )  # fmt: skip


def test_complaints_of_argument_checks():
    """At points far from the first run a parameter may be invalid, and the density finite all the same."""

    def model(y):
        shape = pyro.sample("shape", dist.Normal(real(1.0), 1.0))
        pyro.sample("share", dist.Beta(shape, 2.0), obs=0.3 * y)
        pyro.factor("above", torch.where(shape > -2.0, 0.0, -torch.inf))

    density = pf.LogDensity(model, (Y,))
    assert density.complaint(real([[0.5], [1.5], [-3.0]])) is None, "the density is zero at -3"
    assert torch.isfinite(density(real([[-0.5]]))).all()
    message = density.complaint(real([[0.5], [-0.5]]))
    assert message.startswith("in or before site 'share': Expected parameter concentration")
    assert message.endswith("but found invalid values"), "the values themselves are left out"
    assert "Trace" not in message
    for case in CASES:
        if case.name not in ("masked", "nested", "missing", "dependent", "mixture", "regression"):
            continue
        fine = pf.LogDensity(case.model, case.args)
        assert fine.complaint(normal(3, fine.dim, seed=45)) is None, case.name


def test_shapes_are_checked():
    density = pf.LogDensity(nested, (normal(3, 4, seed=1),))
    z = normal(2, 16, seed=42)
    for call in (density, density.value_and_grad, density.constrain, density.predictive, density.log_prior):
        with pytest.raises(ValueError, match=r"z: expected shape \(S, 16\), got \(16,\)"):
            call(z[0])
    values = {name: value for name, value in density.constrain(z).items() if name != "tau"}
    with pytest.raises(ValueError, match="'tau' missing"):
        density.unconstrain(values)
    with pytest.raises(ValueError, match=r"values\['tau'\]: expected shape \(S, \*\(3, 1\)\), got \(2, 3\)"):
        density.unconstrain({**values, "tau": torch.ones(2, 3)})


def test_evaluations_are_counted():
    density = pf.LogDensity(numbers, (real(0.3, -0.2, 1.7),))
    z = normal(7, 1, seed=43)
    density(z)
    assert density.evaluations == 0
    density(z.clone().requires_grad_())
    density.value_and_grad(z)
    assert density.evaluations == 14


def test_argument_checks_of_distributions_made_elsewhere_are_not_taken_along():
    """A prior built once, with checks, outside of the model: its checks branch on values, which a graph cannot."""
    prior = dist.HalfNormal(real(1.0), validate_args=True).expand([3]).to_event(1)

    def model(y):
        pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(real(0.0), 1.0), obs=y)

    density = pf.LogDensity(model, (Y,))
    with warnings.catch_warnings(action="error"):
        value, _ = density.value_and_grad(normal(2, 3, seed=44))
    assert density.reason is None
    assert torch.isfinite(value).all()
    assert prior.base_dist._validate_args, "the model's own distribution was changed"


def test_a_plate_around_does_not_multiply_the_density():
    """Within another program, such as a guide's ELBO with vectorized particles, the model is run as it is alone."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = normal(5, seed=40)
    z = normal(3, 1, seed=41)
    alone = pf.LogDensity(model, (y,))
    expected = alone.value_and_grad(z)
    inside = []

    def outer():
        inside.append(pf.LogDensity(model, (y,)).value_and_grad(z))
        inside.append(alone.unrecorded(z))

    with pyro.plate("particles", 7, dim=-1):
        outer()
    for found in inside:
        for got, wanted in zip(found, expected, strict=True):
            close(got, wanted, 1e-12)
    with pyro.plate("rows", 4):  # its name is not taken either, and it is given back
        outer()
        assert pyro.sample("after", dist.Normal(0.0, 1.0)).shape == (4,)
