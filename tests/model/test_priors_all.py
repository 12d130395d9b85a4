"""Every continuous distribution as a prior: alone, in a plate and as one event, batched, with exact gradients."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.model.bijections import biject_to, bijection, real_log_prob

torch_of = torch.tensor
ones, zeros = torch.ones, torch.zeros


def real(value):
    return torch_of(value, dtype=torch.float64)


def pair(component):
    return dist.MixtureSameFamily(dist.Categorical(real([0.3, 0.7])), component)


def transformed(base, *maps):
    return dist.TransformedDistribution(base, list(maps))


def improper(support, *event):
    return dist.ImproperUniform(support, (), event)


A, B = real(0.4), real(1.3)
TWO = real([1.0, 2.0])
PRIORS = {
    "asymmetric Laplace": lambda: dist.AsymmetricLaplace(A, B, A),
    "beta": lambda: dist.Beta(A + 1, B),
    "beta on an interval": lambda: dist.AffineBeta(A + 1, B, -1 * B, 4 * B),
    "Cauchy": lambda: dist.Cauchy(A, B),
    "chi-squared": lambda: dist.Chi2(3 * B),
    "continuous Bernoulli": lambda: dist.ContinuousBernoulli(A),
    "Dirichlet": lambda: dist.Dirichlet(real([1.0, 2.0, 3.0])),
    "exponential": lambda: dist.Exponential(B),
    "F": lambda: dist.FisherSnedecor(3 * B, 9 * B),
    "folded": lambda: dist.FoldedDistribution(dist.Normal(A, B)),
    "gamma": lambda: dist.Gamma(B, B),
    "generalized Pareto, unbounded": lambda: dist.GeneralizedPareto(torch_of(0.4), 1.3, torch_of(0.2)),
    "generalized Pareto, bounded": lambda: dist.GeneralizedPareto(torch_of(0.4), 1.3, torch_of(-0.2)),
    "Gumbel": lambda: dist.Gumbel(A, B),
    "half-Cauchy": lambda: dist.HalfCauchy(B),
    "half-normal": lambda: dist.HalfNormal(B),
    "inverse gamma": lambda: dist.InverseGamma(2 * B, B),
    "Kumaraswamy": lambda: dist.Kumaraswamy(B, 2 * B),
    "LKJ": lambda: dist.LKJCholesky(3, B),
    "Laplace": lambda: dist.Laplace(A, B),
    "log-normal": lambda: dist.LogNormal(A, B),
    "logistic": lambda: dist.Logistic(A, B),
    "logistic normal": lambda: dist.LogisticNormal(TWO, TWO),
    "low rank": lambda: dist.LowRankMultivariateNormal(TWO, TWO[:, None], TWO),
    "mixture of diagonal normals": lambda: dist.MixtureOfDiagNormals(zeros(2, 3).double(), ones(2, 3).double(), TWO),
    "multivariate normal": lambda: dist.MultivariateNormal(TWO, torch.eye(2).double()),
    "multivariate t": lambda: dist.MultivariateStudentT(5 * B, TWO, torch.eye(2).double()),
    "normal": lambda: dist.Normal(A, B),
    "Pareto": lambda: dist.Pareto(B, 3 * B),
    "relaxed Bernoulli": lambda: dist.RelaxedBernoulli(A, A),
    "relaxed one-hot": lambda: dist.RelaxedOneHotCategorical(A, real([0.3, 0.7])),
    "bivariate von Mises": lambda: dist.SineBivariateVonMises(A, A, B, B, A),
    "sine-skewed": lambda: dist.SineSkewed(dist.VonMises(TWO, TWO).to_event(1), 0.1 * TWO),
    "skew logistic": lambda: dist.SkewLogistic(A, B, A),
    "soft Laplace": lambda: dist.SoftLaplace(A, B),
    "t": lambda: dist.StudentT(5 * B, A, B),
    "uniform": lambda: dist.Uniform(A, B),
    "von Mises": lambda: dist.VonMises(A, B),
    "Weibull": lambda: dist.Weibull(A, B),
    "Wishart": lambda: dist.Wishart(4 * B, torch.eye(2).double()),
    "mixture": lambda: pair(dist.Normal(TWO, TWO)),
    "mixture of betas": lambda: pair(dist.Beta(TWO, TWO + 1)),
    "mixture of gammas": lambda: pair(dist.Gamma(TWO, TWO)),
    "mixture of uniforms": lambda: pair(dist.Uniform(real([0.0, 2.0]), real([3.0, 5.0]))),
    "mixture of Paretos": lambda: pair(dist.Pareto(TWO, TWO)),
    "mixture of vectors": lambda: pair(dist.MultivariateNormal(zeros(2, 3).double(), torch.eye(3).double())),
    "mixture of events": lambda: pair(dist.Gamma(TWO[:, None] * ones(2, 3), TWO[:, None]).to_event(1)),
    "mixture of simplices": lambda: pair(dist.Dirichlet(TWO[:, None] * ones(2, 3))),
    "mixture of factors": lambda: pair(dist.LKJCholesky(3, TWO)),
    "mixture of mixtures": lambda: pair(
        dist.MixtureSameFamily(dist.Categorical(ones(2, 2).double()), dist.Gamma(TWO * ones(2, 2), TWO * ones(2, 2)))
    ),
    "mixture, masked": lambda: pair(dist.Gamma(TWO, TWO)).mask(torch_of(True)),
    "mixture, transformed": lambda: transformed(pair(dist.Normal(TWO, TWO)), transforms.ExpTransform()),
    "mixture of gammas, transformed": lambda: transformed(
        pair(dist.Gamma(TWO, TWO)), transforms.AffineTransform(3.0, -1.0)
    ),
    "by a mask": lambda: dist.MaskedMixture(
        torch_of([True, False]), dist.Normal(TWO, TWO), dist.Gamma(TWO, TWO)
    ).to_event(1),
    "shifted exponential": lambda: transformed(dist.Exponential(B), transforms.AffineTransform(3.0, 2.0)),
    "negative gamma": lambda: transformed(dist.Gamma(B, B), transforms.AffineTransform(0.0, -1.0)),
    "log of a gamma": lambda: transformed(dist.Gamma(B, B), transforms.ExpTransform().inv),
    "half a sigmoid": lambda: transformed(dist.Exponential(B), transforms.SigmoidTransform()),
    "ordered": lambda: transformed(dist.Normal(TWO, TWO).to_event(1), transforms.OrderedTransform()),
    "flat on parts": lambda: improper(
        constraints.cat([constraints.positive, constraints.unit_interval], -1, [1, 2]), 3
    ),
    "flat on a stack": lambda: improper(constraints.stack([constraints.positive, constraints.unit_interval], -1), 2),
    "flat and ordered": lambda: improper(dist.constraints.ordered_vector, 3),
    "flat correlations": lambda: improper(dist.constraints.corr_matrix, 2, 2),
    "flat covariance": lambda: improper(constraints.positive_definite, 2, 2),
    "flat factor": lambda: improper(constraints.lower_cholesky, 2, 2),
    "flat wrapped": lambda: improper(constraints.MixtureSameFamilyConstraint(constraints.positive)),
}
# Pyro's own samplers or expand do not go further
ALONE = {"by a mask", "bivariate von Mises", "sine-skewed"}
GAPS = {"mixture of uniforms", "mixture of Paretos"}


def alone(make):
    def model():
        pyro.sample("x", make())
        pyro.sample("y", dist.Normal(real(0.0), 1.0), obs=real(0.0))

    return model


def in_a_plate(make):
    def model():
        with pyro.plate("rows", 3):
            pyro.sample("x", make())
        pyro.sample("y", dist.Normal(real(0.0), 1.0), obs=real(0.0))

    return model


def as_an_event(make):
    def model():
        fn = make()
        pyro.sample("x", fn.expand((3, *fn.batch_shape)).to_event(1))
        pyro.sample("y", dist.Normal(real(0.0), 1.0), obs=real(0.0))

    return model


@pytest.mark.parametrize("name", PRIORS)
def test_any_prior_is_placed_scored_and_differentiated(name):
    """Alone, in a plate, and as an event; but for those that Pyro itself does not expand."""
    for shape in (alone,) if name in ALONE else (alone, in_a_plate, as_an_event):
        check_prior(name, pf.LogDensity(shape(PRIORS[name])))


def check_prior(name, density):
    """Coordinates come back, the density is the prior's with its Jacobian, the gradient that of differences."""
    assert density.batched
    torch.manual_seed(3)
    z = torch.randn(5, density.dim, dtype=density.dtype)
    values = density.constrain(z)
    torch.testing.assert_close(density.unconstrain(values), z, rtol=1e-3, atol=1e-4)
    log_p, grad = density.value_and_grad(z)
    assert torch.isfinite(log_p).all()
    assert torch.isfinite(grad).all()
    step = 1e-5 if density.dtype == torch.float64 else 1e-2
    for axis in range(density.dim):
        moved = torch.zeros_like(z)
        moved[:, axis] = step
        slope = (density(z + moved) - density(z - moved)) / (2 * step)
        smooth = torch.isclose(slope, grad[:, axis], rtol=1e-2, atol=1e-2)
        assert smooth.all() or name in GAPS
    if not name.startswith("flat"):
        prior = density.log_prior(z)["x"].reshape(5, -1).sum(1)
        offset = log_p - prior  # the Jacobian
        assert torch.isfinite(offset).all()


ONE_DIMENSIONAL = (
    "asymmetric Laplace", "beta", "beta on an interval", "Cauchy", "chi-squared", "continuous Bernoulli", "exponential",
    "F", "folded", "gamma", "generalized Pareto, unbounded", "generalized Pareto, bounded", "Gumbel", "half-Cauchy",
    "half-normal", "inverse gamma", "Kumaraswamy", "Laplace", "log-normal", "logistic", "normal", "Pareto",
    "relaxed Bernoulli", "skew logistic", "soft Laplace", "t", "uniform", "Weibull", "mixture", "mixture of betas",
    "mixture of gammas", "mixture of uniforms", "mixture of Paretos", "mixture of mixtures", "mixture, masked",
    "mixture, transformed", "mixture of gammas, transformed", "shifted exponential", "negative gamma",
    "log of a gamma", "half a sigmoid",
)  # fmt: skip


@pytest.mark.parametrize("name", ONE_DIMENSIONAL)
def test_one_dimensional_priors_have_mass_one(name):
    """The density over the coordinate, Jacobian and all, integrates to 1 up to what is cut off at its ends."""
    density = pf.LogDensity(alone(PRIORS[name]))
    grid = torch.linspace(-30.0, 30.0, 24_001, dtype=density.dtype)[:, None]
    log_p = density(grid).double() + 0.5 * math.log(2 * math.pi)
    heavy = {"Cauchy": 0.03, "t": 0.01, "mixture": 0.01}
    mass = float(log_p.nan_to_num(nan=-torch.inf).exp().sum() * 60.0 / 24_000)
    assert mass == pytest.approx(1.0, abs=heavy.get(name, 3e-3))


def test_a_gap_between_components_has_no_density():
    """Uniform components on (0, 1) and (2, 3): the coordinate goes over (0, 3)."""
    density = pf.LogDensity(alone(lambda: pair(dist.Uniform(real([0.0, 2.0]), real([1.0, 3.0])))))
    z = density.unconstrain({"x": real([0.5, 1.5, 2.5])})
    found = density.log_prior(z)["x"]
    torch.testing.assert_close(found, real([math.log(0.3), -math.inf, math.log(0.7)]))


def test_components_of_a_mixture_have_no_density_outside_of_their_own_support():
    """Torch's Pareto goes on below its scale."""
    density = pf.LogDensity(alone(lambda: pair(dist.Pareto(TWO, real([1.0, 1.0])))))
    x = real(1.5)
    found = density.log_prior(density.unconstrain({"x": x[None]}))["x"]
    torch.testing.assert_close(found[0], math.log(0.3) + dist.Pareto(real(1.0), real(1.0)).log_prob(x))


@pytest.mark.parametrize("square", [False, True])
def test_the_jacobian_of_triangles(square):
    support = constraints.positive_definite if square else constraints.lower_cholesky
    transform = biject_to(support)
    x = torch.randn(6, dtype=torch.float64)
    rows, columns = torch.tril_indices(3, 3)
    jacobian = torch.autograd.functional.jacobian(lambda x: transform(x)[rows, columns], x)
    y = transform(x)
    assert support.check(y)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(transform.inv(y), x)


BETAS, SHARES = (
    dist.Beta(real([[0.6, 2.0], [1.3, 0.7], [5.0, 0.9]]), 1.5),
    dist.Dirichlet(real([[0.5, 2, 3], [1, 4, 0.7]])),
)


@pytest.mark.parametrize(
    "prior",
    [BETAS, BETAS.to_event(1), SHARES, SHARES.to_event(1), dist.Independent(SHARES, 0), dist.Beta(real(0.5), 0.7)],
    ids=["Beta", "Beta of a vector", "Dirichlet", "Dirichlet of a plate", "Dirichlet of no event", "Beta of a scalar"],
)
def test_densities_of_real_numbers_are_those_of_shares_with_the_jacobian(prior):
    x, to_shares = prior.sample(), bijection(prior)
    y = to_shares.inv(x)
    expected = prior.log_prob(x) + to_shares.log_abs_det_jacobian(y, x)
    torch.testing.assert_close(real_log_prob(prior, y), expected)


@pytest.mark.parametrize("y", [-90.0, 90.0])
def test_densities_of_real_numbers_have_digits_where_shares_have_none(y):
    """log p(y) = a log(1 / (1 + exp(-y))) + b log(1 / (1 + exp(y))) - log B(a, b)."""
    a, b = 0.04, 0.08
    expected = (a if y < 0.0 else b) * -90.0 - (math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    assert float(real_log_prob(dist.Beta(real(a), real(b)), real(y))) == pytest.approx(expected)
    assert real_log_prob(dist.Normal(0.0, 1.0), real(y)) is None
