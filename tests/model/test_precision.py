"""Models whose data are in double precision, and whose own numbers are in torch's default, single precision."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.posterior.comparison.sensitivity import _dependent
from tests.invariants import close
from tests.models import gauss
from tests.registry import needs_interpreter, normal

Y, COUNTS = normal(12, seed=0), torch.arange(12.0, dtype=torch.float64)


def gamma(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.3))
    with pyro.plate("rows", 12):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def half_cauchy(y):
    tau = pyro.sample("tau", dist.HalfCauchy(0.7))
    with pyro.plate("rows", 12):
        effect = pyro.sample("effect", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(effect, 0.3), obs=y)


def counts(y):
    """Counts have no precision; the column that tells of their rates has."""
    size = pyro.sample("size", dist.Gamma(2.0, 0.5))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 12):
        pyro.sample("y", dist.GammaPoisson(size, size / (slope * Y).exp()), obs=y)


def kernel(y):
    """Pyro itself refuses this: zeros are in single precision, and the covariance is not."""
    size = pyro.sample("size", dist.HalfNormal(1.0))
    near = torch.exp(-0.5 * (y[:, None] - y).square()) + 0.1 * torch.eye(12)
    value = pyro.sample("value", dist.MultivariateNormal(torch.zeros(12), size * near))
    with pyro.plate("rows", 12):
        pyro.sample("y", dist.Normal(value, 1.0), obs=y)


def in_double(model):
    """The same model, all in double precision from the beginning."""

    def run(y):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            model(y)
        finally:
            torch.set_default_dtype(before)

    return run


@needs_interpreter
@pytest.mark.parametrize(("model", "data"), [(gamma, COUNTS), (half_cauchy, Y), (counts, COUNTS.long()), (kernel, Y)])
def test_all_is_computed_in_double_precision(model, data):
    density = pf.LogDensity(model, (data,))
    expected = pf.LogDensity(in_double(model), (data,))
    z = normal(9, density.dim, seed=1)
    torch.set_default_dtype(torch.float64)  # of whole numbers, when they are scored
    try:
        wanted = expected.unrecorded(z)
    finally:
        torch.set_default_dtype(torch.float32)
    for _ in range(6):  # recorded on the way
        for got, value in zip(density.value_and_grad(z), wanted, strict=True):
            close(got, value, 1e-10)
    assert torch.get_default_dtype() == torch.float32
    assert all(value.dtype == torch.float64 for value in density.constrain(z).values())
    assert density.reason is None


def test_single_precision_stays_where_data_are_in_single():
    density = pf.LogDensity(half_cauchy, (Y.float(),))
    assert density.dtype == torch.float32
    assert {value.dtype for value in density.constrain(torch.zeros(2, density.dim)).values()} == {torch.float32}


def test_an_error_that_is_not_about_precisions_names_the_site():
    def model(y):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        raise RuntimeError("a file is missing")

    with pytest.raises(ValueError, match="after site 'a': RuntimeError: a file is missing"):
        pf.LogDensity(model, (Y,))
    assert torch.get_default_dtype() == torch.float32


def test_a_matrix_in_single_precision_goes_with_data_in_double():
    """Pyro itself refuses this."""
    matrix = torch.eye(3, dtype=torch.float32)

    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(matrix @ y[:3].double() + a, 1.0), obs=y[3:6])

    density = pf.LogDensity(model, (Y,))
    close(density(torch.zeros(1, 1)), (gauss(Y[3:6], Y[:3], 1.0) + gauss(0.0, 0.0, 1.0))[None], 1e-10)


def test_densities_of_networks_in_single_precision_are_asked_for_in_double():
    """A matrix product takes no two precisions; fits ended with its error at their last check."""
    prior, noise = pf.realnvp(2, layers=2), pf.spline(1, layers=1, context_dim=2)

    def model(y):
        place = pyro.sample("place", prior())
        with pyro.plate("rows", 12):
            pyro.sample("y", noise(place), obs=y)

    density = pf.LogDensity(model, (Y[:, None],))
    z = normal(3, 2, seed=1)
    assert density.complaint(z) is None
    assert "site 'y' has log density" in density.explain(torch.full((2,), torch.inf, dtype=torch.float64))
    assert _dependent(density, z) == []


def test_an_error_about_precisions_that_stays_is_the_first_one():
    def model(y):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        raise RuntimeError(f"expected scalar type Float, not {y.dtype}")

    with pytest.raises(RuntimeError, match="expected scalar type Float"):
        pf.LogDensity(model, (Y,))
