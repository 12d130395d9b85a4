"""Integer tensors: converted exactly where real numbers are expected, or refused; results are never cut off."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from tests.registry import RECORDED_FROM

WHOLE = (torch.int64, torch.int32, torch.uint8, torch.bool)


def model(y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    x = pyro.sample("x", dist.Normal(0.3, 1.7))
    pyro.sample("y", dist.Normal(x, scale), obs=y)


def equal(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = tuple(one.values()), tuple(other.values())
    if isinstance(one, tuple):
        for a, b in zip(one, other, strict=True):
            equal(a, b)
        return
    assert one.dtype == other.dtype
    assert torch.equal(one, other)


METHODS = ("__call__", "value_and_grad", "unrecorded", "constrain", "log_prior", "log_likelihood", "predictive")


@pytest.fixture(scope="module", params=[torch.float32, torch.float64])
def density(request):
    return pf.LogDensity(model, (torch.tensor(0.5, dtype=request.param),))


@pytest.mark.parametrize("name", METHODS)
def test_a_log_density_takes_whole_numbers(density, name):
    z = torch.tensor([[1, 0], [0, 1], [1, 1]])
    with torch.no_grad():
        for _ in range(RECORDED_FROM):  # a recorded density is the same as a plain one but for rounding
            expected = getattr(density, name)(z.to(density.dtype))
        for dtype in WHOLE:
            equal(getattr(density, name)(z.to(dtype)), expected)


def test_the_value_of_the_issue():
    def plain():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    value = pf.LogDensity(plain)(torch.tensor([[3]]))
    torch.testing.assert_close(value, dist.Normal(0.0, 1.0).log_prob(torch.tensor([3.0])))


@pytest.mark.parametrize("name", ["planar", "nice", "realnvp", "spline"])
@pytest.mark.parametrize("dtype", WHOLE)
def test_flows_and_densities_take_whole_numbers(name, dtype):
    flow = getattr(pf, name)(2, context_dim=1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    y, c = (torch.randint(2, (5, size)).to(dtype) for size in (2, 1))
    exact = flow.log_prob(y.float(), c.float())
    for context in (c, c.float()):
        equal(flow.log_prob(y, context), exact)
        torch.testing.assert_close(flow(context).log_prob(y), exact)
    equal(flow(c).log_prob(y), flow(c.float()).log_prob(y.float()))
    torch.manual_seed(0)
    drawn = flow.rsample_and_log_prob((), c)
    torch.manual_seed(0)
    equal(drawn, flow.rsample_and_log_prob((), c.float()))
    transform = flow(c).transforms[0]
    equal(transform(y), transform(y.float()))
    equal(transform.log_abs_det_jacobian(y, transform(y)), transform.log_abs_det_jacobian(y.float(), transform(y)))


def test_fitted_densities_take_whole_numbers():
    y = torch.randint(-20, 20, (100, 2))
    fit = pf.fit_density("nice", y, max_epochs=2, progress=False)
    equal(fit.log_prob(y), fit.log_prob(y.float()))
    equal(fit.log_prob(y.tolist()), fit.log_prob(y.float()))
    assert fit.nats(y) == fit.nats(y.float())


def test_what_would_be_rounded_is_refused():
    density = pf.LogDensity(model, (torch.tensor(0.5),))
    density(torch.tensor([[2**24, -(2**24)]]))
    for z in (torch.tensor([[2**24 + 1, 0]]), torch.zeros(1, 2, dtype=torch.complex64)):
        with pytest.raises(ValueError, match=r"z: expected real numbers of dtype torch\.float32 \(or whole ones up to"):
            density(z)
    with pytest.raises(ValueError, match="y: expected real numbers"):
        pf.nice(2).log_prob(torch.tensor([[2**40, 0]]))
